"""``verify_training_pipeline.py`` passes on the demo's tiny tracker, and notices what it is there to notice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from training_world import MemoryWorld

from sam3.model.efficient_sam3_train import EfficientSam3Train
from sam3.model.prompt_sampling import PointPrompts
from sam3_train.distributed import training_run
from stage2.train_memory_stage2 import DEFAULT_CONFIG
from stage2.verification import Verification
from stage2.verification_checks import (
    CHECKS,
    CheckError,
    check_clicks,
    check_gradients,
    check_modes,
    check_tokens,
)
from stage2.verify_training_pipeline import main


@pytest.fixture(scope="module")
def verification(memory_world: MemoryWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Verification]:
    """Shared: each check brings it to the mode that it needs."""
    folder = tmp_path_factory.mktemp("verification")
    with training_run("cpu") as run:
        yield Verification(run, folder, memory_world.base, DEFAULT_CONFIG, ("MODEL.START", "fresh"))


def test_all_is_well(memory_world: MemoryWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--device", "cpu", "--sam3_checkpoint", str(memory_world.base), "--output_dir", str(tmp_path)])
    shown = capsys.readouterr().out
    assert code == 0, shown
    for name, _ in CHECKS:
        assert f"ok    {name}" in shown
    assert f"{len(CHECKS)} of {len(CHECKS)} checks passed" in shown
    for part in ("64 of 16 numbers instead of 324 (5x)", "135 trained tensors, 93 of them new to SAM 3", "bit for bit"):
        assert part in shown
    assert list(tmp_path.glob("verify_*/whole/model_final.pth"))


def test_clicks_of_another_grid_are_noticed(verification: Verification, monkeypatch: pytest.MonkeyPatch) -> None:
    """D-111: the published code takes positions in the mask for pixels of the image."""
    monkeypatch.setattr(PointPrompts, "scaled_to", lambda self, frame_hw: self)
    with pytest.raises(CheckError, match="are not in the corner of 252 px"):
        check_clicks(verification)


def test_frozen_modules_in_training_mode_are_noticed(
    verification: Verification, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D-112"""
    assert check_modes(verification).startswith("119 modules train")
    verification.task.train()
    verification.model.sam_mask_decoder.training = True
    monkeypatch.setattr("stage2.task.Stage2Task.train", lambda self, mode=True: nn.Module.train(self, mode))
    monkeypatch.setattr(EfficientSam3Train, "train", nn.Module.train)
    with pytest.raises(CheckError, match="frozen modules are in training mode"):
        check_modes(verification)


def test_a_part_that_is_cut_off_is_noticed(verification: Verification, monkeypatch: pytest.MonkeyPatch) -> None:
    compress = EfficientSam3Train.compress
    monkeypatch.setattr(EfficientSam3Train, "compress", lambda self, memory: compress(self, memory).detach())
    with pytest.raises(CheckError, match="gradients are zero"):
        check_gradients(verification)


@pytest.mark.parametrize("windows", [64, 0])
def test_tokens_without_a_place_are_noticed(
    windows: int, memory_world: MemoryWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect 7.6 (7): of each kind of token."""
    opts = ("MODEL.START", "fresh", "MODEL.MEMORY.NUM_LATENTS_2D", str(windows))
    opts += ("MODEL.MEMORY.NUM_LATENTS", str(64 - windows))
    with training_run("cpu") as run:
        verification = Verification(run, tmp_path, memory_world.base, DEFAULT_CONFIG, opts)
        assert "64 codes" in check_tokens(verification)
        resampler = verification.model.spatial_perceiver
        assert resampler is not None
        blind = torch.zeros_like(resampler.latent_codes())
        monkeypatch.setattr(type(resampler), "latent_codes", lambda self: blind)
        resampler.position_code.table.zero_()
        with pytest.raises(CheckError, match=r"the same position|keys have no spatial position"):
            check_tokens(verification)


def test_failed_checks_are_in_the_table_and_in_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(verification: Verification) -> str:
        raise CheckError("as it should")

    checks = (("fine", lambda verification: "seen"), ("broken", fails), ("crash", lambda verification: str(1 // 0)))
    monkeypatch.setattr("stage2.verification_checks.CHECKS", checks)
    assert main(["--device", "cpu", "--traceback"]) == 1
    shown = capsys.readouterr()
    assert "ok    fine" in shown.out and "FAIL  broken" in shown.out and "as it should" in shown.out
    assert "ZeroDivisionError" in shown.out and "1 of 3 checks passed" in shown.out and "Traceback" in shown.err


def test_a_checkpoint_that_is_missing_is_an_error_and_no_failed_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--device", "cpu", "--sam3_checkpoint", str(tmp_path / "no.pt")]) == 2
    shown = capsys.readouterr()
    assert "no.pt" in shown.err and "checks passed" not in shown.out
