"""``convert_memory_weights_stage2.py``: every trained tensor arrives, nothing else changes, and the file tracks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import TINY, make_model, student_model, whole_model
from memory_files import (
    convert,
    identity_of,
    rewrite,
    trained_module,
    weights_of,
    write_base,
    write_trained,
)

from sam3.checkpoint_io import read_checkpoint, read_state_dict, sha256_file
from sam3.checkpoint_keys import EFFICIENT_PREFIX
from sam3.checkpoint_parts import FULL_MEMORY_PREFIXES
from sam3.efficient_keys import OWN_PREFIXES
from sam3.inspection import inspect_checkpoint
from sam3.loading import load_model
from sam3.model.efficient_sam3_tracker import EfficientSam3Tracker
from sam3.model.sam3_image_processor import Sam3Processor
from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
from sam3.model.sam3_video_inference import Sam3VideoInference
from sam3.model.streaming import StreamingTracker
from sam3.model.text_streaming import TextStream
from sam3.recognition import recognise
from stage2.memory_proof import generated_clip
from stage2.merge import merge_memory


@pytest.fixture(scope="module")
def merged_file(base_file: Path, trained_file: Path, memory_folder: Path) -> Path:
    output = memory_folder / "merged.safetensors"
    assert convert(trained_file, base_file, output) == 0
    return output


def test_every_trained_tensor_is_written_and_all_else_is_kept(base_file, trained_file, merged_file) -> None:
    """D-74, D-117, 7.6 (4): the published merge drops the trained modules and damages the original tracker."""
    merged, base = read_checkpoint(merged_file).state_dict, read_checkpoint(base_file).state_dict
    trained = {k: v for k, v in weights_of(trained_file).items() if k.startswith(OWN_PREFIXES)}
    assert len(trained) == 135
    assert merged.keys() == base.keys() | {EFFICIENT_PREFIX + key for key in trained}
    assert all(torch.equal(merged[EFFICIENT_PREFIX + key], value) for key, value in trained.items())
    assert all(torch.equal(merged[key], value) for key, value in base.items())
    assert any(key.startswith("detector.backbone.language_backbone.") for key in merged)


def test_both_memories_open_and_are_shown(base_file, trained_file, merged_file) -> None:
    efficient, full = load_model(merged_file, "cpu"), load_model(merged_file, "cpu", memory="full")
    assert isinstance(efficient.tracker, EfficientSam3Tracker) and not isinstance(full.tracker, EfficientSam3Tracker)
    expected = load_model(base_file, "cpu").tracker.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in full.tracker.state_dict().items())
    trained = weights_of(trained_file)
    assert all(torch.equal(value, trained[key]) for key, value in efficient.tracker.state_dict().items())
    assert efficient.missing_parts == full.missing_parts == ()
    shown = "\n".join(inspect_checkpoint(merged_file).lines())
    assert "tracker memory" in shown and "efficient memory" in shown


def test_the_record_names_both_files_and_keeps_what_was_known(base_file, trained_file, merged_file) -> None:
    _, metadata = read_state_dict(merged_file)
    assert metadata["model"] == TINY.with_efficient_memory().to_dict()
    record = metadata["provenance"]
    assert record["stage"] == "stage2" and record["teacher_trunk_sha256"] == "a" * 64
    assert record["memory_sha256"] == sha256_file(trained_file) and record["base"]["sha256"] == sha256_file(base_file)
    assert record["base"]["provenance"]["teacher_file"] == "sam3.pt"
    assert (record["epoch"], record["step"], record["metrics"]) == (3, 40, {"j_and_f": 0.5})


def test_the_report_counts(base_file, trained_file, tmp_path, capfd) -> None:
    assert convert(trained_file, base_file, tmp_path / "new" / "folder" / "merged.pt") == 0
    told = capfd.readouterr().out
    num_kept = len(read_checkpoint(base_file).state_dict)
    for line in (
        "Trained tensors:         135, written: 135 (as float32)",
        "new to SAM 3:           93",
        "beside SAM 3's own:     42",
        f"Kept of sam3.safetensors: {num_kept}, of them SAM 3's own memory: 96",
        f"Total keys in output: {num_kept + 135}",
        "bit for bit",
        "base checked: the memory was trained behind this file's backbone and heads",
        "a stream with it stores 64 tokens of a frame, where SAM 3 stores 324",
        'memory="full"',
    ):
        assert line in told, told


def test_the_94_tensors_that_sam3_does_not_have_are_counted(base_file, tmp_path) -> None:
    """With the published tokens, global and windowed ones, there are 94 of them."""
    memory = TINY.with_efficient_memory(compat="published").efficient_memory
    module = trained_module(base_file, memory)
    base = recognise(read_checkpoint(base_file))
    merged, report = merge_memory(module.trained_state(), base)
    assert (report.num_new, report.num_beside, report.num_trained) == (94, 42, 136)
    assert report.num_full_memory == sum(key.startswith(FULL_MEMORY_PREFIXES) for key in base.weights)
    assert all(merged[key] is value for key, value in base.weights.items())


def test_images_videos_and_texts_are_answered_with_a_merged_file(merged_file) -> None:
    """Defect D-117, 7.6 (5) of the published training."""
    model = load_model(merged_file, "cpu")
    frames, masks = generated_clip(3)
    model.inst_interactive_predictor.set_image(frames[0])
    found, _, _ = model.inst_interactive_predictor.predict(box=np.array([20, 40, 80, 100]), multimask_output=False)
    assert found.shape == (1, *masks[0].shape)
    processor = Sam3Processor(model)
    assert "masks" in processor.set_text_prompt("square", processor.set_image(frames[0]))
    stream = StreamingTracker(Sam3TrackerPredictor(model))
    stream.add_points(1, box=[0.1, 0.3, 0.4, 0.7])
    results = [stream.push(frame) for frame in frames]
    assert all(result.masks.shape == (1, 1, *masks[0].shape) for result in results)
    texts = TextStream(Sam3VideoInference(model), "square")
    assert [frame_idx for frame_idx, _ in texts.run(frames)] == [0, 1, 2]


def test_a_student_keeps_its_backbone(tmp_path) -> None:
    base = write_base(tmp_path / "student.pt", student_model())
    trained = write_trained(tmp_path / "model_final.pth", base)
    assert convert(trained, base, tmp_path / "merged.pt") == 0
    model = load_model(tmp_path / "merged.pt", "cpu")
    assert model.config.student == student_model().config.student
    assert isinstance(model.tracker, EfficientSam3Tracker)


def test_the_files_precision_is_kept(tmp_path, base_file, capfd) -> None:
    """A file without rotary tables from one with them, too: they are computed again."""
    base = write_base(tmp_path / "sam3.pt", whole_model(), torch.bfloat16)
    trained = write_trained(tmp_path / "model_final.pth", base)
    assert convert(trained, base, tmp_path / "merged.safetensors") == 0
    assert "written: 135 (as bfloat16)" in capfd.readouterr().out
    merged, kept = read_checkpoint(tmp_path / "merged.safetensors").state_dict, read_checkpoint(base).state_dict
    assert {v.dtype for k, v in merged.items() if k.startswith(EFFICIENT_PREFIX)} == {torch.bfloat16}
    assert all(torch.equal(merged[key], kept[key]) for key in merged.keys() & kept.keys())


def test_a_name_without_a_folder_is_enough(base_file, trained_file, tmp_path, monkeypatch) -> None:
    """D-125: the published merge fails if the output has no directory part."""
    monkeypatch.chdir(tmp_path)
    assert convert(trained_file, base_file, Path("merged.pth")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["merged.pth"]


def test_an_earlier_compressed_memory_is_replaced(base_file, trained_file, merged_file, tmp_path, capfd) -> None:
    module = trained_module(base_file, TINY.with_efficient_memory().efficient_memory.replace(num_latents=16))
    trained = write_trained(tmp_path / "model_final.pth", base_file, module)
    assert convert(trained, merged_file, tmp_path / "merged.pt") == 0
    told = capfd.readouterr().out
    assert "Replaced compressed memory: 135 tensors" in told and "stores 16 tokens" in told
    assert load_model(tmp_path / "merged.pt", "cpu").config.efficient_memory.num_latents == 16
    assert read_state_dict(tmp_path / "merged.pt")[1]["provenance"]["base"]["provenance"]["stage"] == "stage2"


def test_checkpoints_inside_a_run_merge_too(base_file, trained_file, tmp_path, capfd) -> None:
    """They hold what is trained alone, and perhaps an average and throw-away heads."""
    module = trained_module(base_file)
    state = module.trained_state()
    averaged = {key: value + 0.01 for key, value in state.items()}
    more = {"reconstruction.weight": torch.zeros(1), "reconstruction.bias": torch.zeros(1)}
    content = {
        "model": state | more,
        "ema": averaged | more,
        "identity": identity_of(module, base_file),
        "epoch": 1,
        "step": 5,
        "metrics": {},
        "config": {},
    }
    torch.save(content, tmp_path / "ckpt_epoch_1.pth")
    name = EFFICIENT_PREFIX + "mem_proj.bias"
    for flag, expected in (((), averaged), (("--no-use-ema",), state)):
        assert convert(tmp_path / "ckpt_epoch_1.pth", base_file, tmp_path / "merged.pt", *flag) == 0
        told = capfd.readouterr().out
        assert "Left out, for training alone: reconstruction (2)" in told
        merged = read_checkpoint(tmp_path / "merged.pt").state_dict
        assert torch.equal(merged[name], expected["mem_proj.bias"])
        assert not any("reconstruction" in key for key in merged)


def test_another_base_is_merged_only_if_asked_for(base_file, trained_file, tmp_path, capfd) -> None:
    other = write_base(tmp_path / "other.pt", make_model(TINY, seed=5))
    assert convert(trained_file, other, tmp_path / "merged.pt") == 2
    told = capfd.readouterr().err
    assert "was trained behind a backbone and heads with sha256" in told
    assert "give the file that the training began with, sam3.safetensors, or --allow-other-base" in told
    assert not (tmp_path / "merged.pt").exists()
    assert convert(trained_file, other, tmp_path / "merged.pt", "--allow-other-base") == 0
    assert "warning: " in capfd.readouterr().out


def test_rewriting_a_file_does_not_make_it_another_base(base_file, trained_file, tmp_path, capfd) -> None:
    """The hash is of the weights and not of the file."""
    copy = write_base(tmp_path / "copy.pth", whole_model(), note="the same weights")
    assert sha256_file(copy) != sha256_file(base_file)
    final = rewrite(tmp_path / "again.pth", trained_file, start=None)
    assert convert(final, copy, tmp_path / "merged.pt") == 0
