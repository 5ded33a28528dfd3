"""The export from its command line: what it writes, and how it stops, resumes and refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fault_injection import run_and_kill
from fixtures_data import make_jpeg
from fixtures_embeddings import store_bytes
from toy_training import Group, run_group

from sam3.preprocess import Preprocess
from sam3_train.config import load_config
from sam3_train.data.augmentation import AugmentSpec, seed_of_key, view_of_seed
from sam3_train.data.bad_images import BadImageLog
from sam3_train.embeddings import EmbeddingStore, EmbeddingWriter, StoreSpec, begin_export
from sam3_train.embeddings.verify import verify_store
from sam3_train.stop_signal import StopSignal
from sam3_train.teacher import Teacher
from stage1 import export_preflight, export_report, export_run
from stage1.config import get_defaults
from stage1.export import export_batches
from stage1.save_embedding_stage1 import _main, main

ROOT = Path(__file__).resolve().parents[2]
ALL_KEYS = [f"sa_{number}" for number in (*range(7), 100, 101)]


@pytest.fixture
def teacher(tiny_teacher_file) -> Teacher:
    cfg = get_defaults()
    cfg.MODEL.PRESET, cfg.MODEL.SAM3_CHECKPOINT = "tiny", str(tiny_teacher_file)
    return Teacher.from_config(cfg, torch.device("cpu"))


def photo(data: Path, key: str, split: str = "train"):
    from PIL import Image

    return Image.open(data / "images" / split / f"{key}.jpg")


def test_an_export_leaves_the_documented_tree(command, tmp_path, small_data, teacher, capsys):
    """D-24: train and val; D-25: all below one folder; D-26: config.json is JSON; D-01: the deployed preprocessing."""
    assert main(command()) == 0
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} >= {"config.json", "log_rank0.txt", "embeddings"}
    record = json.loads((run / "config.json").read_text())
    assert record["num_images"] == {"train": 7, "val": 2} and record["store"]["shape"] == [128, 18, 18]
    assert (run / "embeddings/rank0-keys.txt").read_text().split() == ALL_KEYS
    assert (run / "embeddings/rank0-values.bin").stat().st_size == 9 * (4 + 2 * 128 * 18 * 18)
    store = EmbeddingStore(run / "embeddings")
    for key, split in (("sa_3", "train"), ("sa_101", "val")):
        expected = teacher(Preprocess(252)(photo(small_data, key, split))[None])[0]
        seed, embedding = store.read(key)
        assert seed == seed_of_key(0, key)
        np.testing.assert_allclose(embedding, expected.numpy(), rtol=2e-3, atol=2e-3)
    assert store.spec.teacher == teacher.description and store.spec.preprocess == Preprocess(252).to_dict()
    printed = capsys.readouterr().out
    assert "7 train + 2 val images" in printed and "9 to export at 82,948 bytes each" in printed
    assert "MB free" in printed or "GB free" in printed
    assert "estimate:" in printed and "complete: 9 of 9" in printed


def test_the_teacher_is_the_trunk_alone(teacher):
    """No text encoder, neck or decoder is built, and nothing of it can be trained."""
    names = [name for name, _ in teacher.trunk.named_parameters()]
    assert not [name for name in names if "language" in name or "convs" in name or "decoder" in name]
    assert not any(parameter.requires_grad for parameter in teacher.trunk.parameters()) and not teacher.trunk.training
    assert not isinstance(teacher, torch.nn.Module)


def test_a_finished_export_has_nothing_left_to_do(command, tmp_path, monkeypatch):
    assert main(command()) == 0
    before = store_bytes(tmp_path / "run/embeddings")
    monkeypatch.setattr(Teacher, "__call__", lambda *args: pytest.fail("the teacher ran again"))
    assert main(command()) == 0
    assert store_bytes(tmp_path / "run/embeddings") == before


def test_added_images_are_exported_alone(command, tmp_path, small_data, monkeypatch):
    """D-34: an incremental export appends what is missing."""
    assert main(command()) == 0
    (small_data / "images/train/sa_2b.jpg").write_bytes(make_jpeg(77))
    batch_sizes = []
    forward = Teacher.__call__
    monkeypatch.setattr(
        Teacher, "__call__", lambda self, images: batch_sizes.append(len(images)) or forward(self, images)
    )
    monkeypatch.setattr(export_run, "measure_seconds_per_image", lambda *args: 1.0)
    assert main(command()) == 0
    assert batch_sizes == [1]
    assert list(EmbeddingStore(tmp_path / "run/embeddings").keys()) == [*ALL_KEYS, "sa_2b"]


def test_kill_9_and_resume_end_with_the_same_bytes(command, tmp_path):
    """D-10: 3 kills here, 20 in scripts/fault_injection.py export."""
    assert main(command(name="whole")) == 0
    values = tmp_path / "killed/embeddings/rank0-values.bin"
    for num_records in (1, 4, 7):
        size = num_records * 82_948 - 1000
        outcome = run_and_kill(
            main, command(name="killed"), lambda size=size: values.exists() and values.stat().st_size > size
        )
        assert outcome == -signal.SIGKILL
    assert main(command(name="killed")) == 0
    assert store_bytes(tmp_path / "killed/embeddings") == store_bytes(tmp_path / "whole/embeddings")


def test_sigterm_stores_what_is_computed_and_ends_with_130(command, tmp_path, capfd):
    values = tmp_path / "run/embeddings/rank0-values.bin"
    outcome = run_and_kill(main, command(), lambda: values.exists() and values.stat().st_size > 0, signal.SIGTERM)
    assert outcome == 130
    assert "stopped by SIGTERM; what was exported is stored" in capfd.readouterr().err
    stored = EmbeddingStore(tmp_path / "run/embeddings")
    assert 0 < len(stored) < 9
    assert main(command()) == 0
    assert len(EmbeddingStore(tmp_path / "run/embeddings")) == 9


def export_slowly(argv: list[str], seconds_per_batch: float) -> None:
    forward = Teacher.__call__

    def slow(self: Teacher, images: torch.Tensor) -> torch.Tensor:
        time.sleep(seconds_per_batch)
        return forward(self, images)

    Teacher.__call__ = slow  # type: ignore[method-assign]
    _main(argv)


def test_a_signal_to_one_rank_stops_all_and_loses_nothing(command, tmp_path):
    """D-30, D-46: one line, exit 130 on every rank; the same command then ends with the uninterrupted bytes."""
    one_by_one = {"DATA.BATCH_SIZE": 1}
    assert run_group(export_slowly, 2, tmp_path, command(name="whole", **one_by_one), 0.0).codes == [0, 0]
    store, num_stored = tmp_path / "run/embeddings", 0
    for victim, number, named in ((0, signal.SIGTERM, "SIGTERM"), (1, signal.SIGINT, "SIGINT on rank 1")):
        group = Group(export_slowly, 2, tmp_path, (command(name="run", **one_by_one), 0.4))
        deadline = time.monotonic() + 60
        while sum(path.stat().st_size for path in store.glob("rank*-values.bin")) < (num_stored + 1) * 82_948:
            assert time.monotonic() < deadline, group.log.read_text()
            time.sleep(0.01)
        os.kill(group.processes[victim].pid or 0, number)
        ended = group.wait()
        assert ended.codes == [130, 130], ended.text
        assert ended.text.count(f"stopped by {named}; what was exported is stored") == 1
        assert "Traceback" not in ended.text
        num_stored = len(EmbeddingStore(store))
        assert 0 < num_stored < 9
    assert run_group(export_slowly, 2, tmp_path, command(name="run", **one_by_one), 0.0).codes == [0, 0]
    assert store_bytes(store) == store_bytes(tmp_path / "whole/embeddings")


def test_an_unreadable_photo_is_left_out_and_written_down(command, tmp_path, small_data, capsys):
    """D-21: a truncated file is no training image; D-22: nor does it end the export."""
    photo_file = small_data / "images/train/sa_4.jpg"
    photo_file.write_bytes(photo_file.read_bytes()[:-300])
    assert main(command()) == 0
    store = EmbeddingStore(tmp_path / "run/embeddings")
    assert sorted(store.keys()) == sorted(set(ALL_KEYS) - {"sa_4"})
    assert "sa_4.jpg: unreadable image" in store.quarantined["sa_4"]
    assert (tmp_path / "run/bad_images.txt").read_text().startswith("sa_4\t")
    assert "1 images have no embedding (1 unreadable" in capsys.readouterr().out
    assert main(command()) == 0  # and it is not tried again
    photo_file.write_bytes(make_jpeg(4))
    (tmp_path / "run/embeddings/rank0-quarantine.txt").unlink()
    assert main(command()) == 0  # until it is repaired and taken off the list
    assert set(EmbeddingStore(tmp_path / "run/embeddings").keys()) == set(ALL_KEYS)


def test_training_reads_where_the_export_writes():
    """D-41: one default path, for the released teacher and for the demo."""
    for teacher_file, student_file in (("sam_vit_huge_sa1b", "es_rv_m"), ("demo_tiny", "demo_cnn")):
        exported = load_config(get_defaults(), ROOT / f"stage1/configs/teacher/{teacher_file}.yaml")
        trained = load_config(get_defaults(), ROOT / f"stage1/configs/{student_file}.yaml")
        assert export_preflight.embeddings_folder(exported) == Path(trained.DISTILL.TEACHER_EMBED_PATH)


def test_too_many_unreadable_photos_end_the_export(command, small_data, capsys):
    for number in (1, 4):
        (small_data / f"images/train/sa_{number}.jpg").write_bytes(b"no image")
    assert main(command()) == 2
    error = capsys.readouterr().err
    assert (
        "2 unreadable images, more than the 1 that DATA.MAX_BAD_FRACTION allows" in error and "Traceback" not in error
    )
    assert main(command()) == 2, "starting again allows no more"
    assert "2 unreadable images, more than the 1" in capsys.readouterr().err


def test_missing_annotations_do_not_matter(command, small_data):
    """D-19 and D-22: the trunk is distilled from images alone."""
    for path in (small_data / "annotations").rglob("*.json"):
        path.write_text("")
    assert main(command("--split", "train")) == 0


def test_the_check_passes_on_what_was_exported(command, capsys):
    """D-16: the check runs with the export's own settings and says so per image."""
    assert main(command()) == 0
    assert main(command("--check-saved-embed", "4")) == 0
    printed = capsys.readouterr().out
    assert "4 of 4 embeddings agree" in printed and "sa_101" in printed


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_the_check_has_a_verdict(command, tmp_path, codec, capsys):
    """D-17: an embedding that is not the teacher's fails by name, with exit code 2."""
    assert main(command("--codec", codec)) == 0
    store = EmbeddingStore(tmp_path / "run/embeddings")
    copied = tmp_path / "other/embeddings"
    begin_export(copied, store.spec, ALL_KEYS)
    with EmbeddingWriter(copied) as writer:
        for key in ALL_KEYS:
            seed, embedding = store.read(key)
            writer.put(key, seed, embedding * np.float16(1.2 if key == "sa_5" else 1.0))
    assert not verify_store(copied).problems
    capsys.readouterr()
    assert main(command("--codec", codec, "--check-saved-embed", "9", name="other")) == 2
    out, error = capsys.readouterr()
    assert "8 of 9 embeddings agree" in out
    assert "1 of 9 stored embeddings are not what the teacher computes (sa_5)" in error


def test_the_check_refuses_another_teacher(command, tiny_teacher_file, tmp_path, capsys):
    assert main(command()) == 0
    other = torch.load(tiny_teacher_file, weights_only=True)
    other["model"] = {k: v + 0.01 if v.is_floating_point() else v for k, v in other["model"].items()}
    torch.save(other, tmp_path / "other.pt")
    for action in (["--check-saved-embed"], []):
        assert main(command(*action, **{"MODEL.SAM3_CHECKPOINT": tmp_path / "other.pt"})) == 2
        assert "teacher: {'name': 'tiny'" in capsys.readouterr().err


def test_int8_takes_half_the_bytes(command, tmp_path, capsys):
    """D-18."""
    assert main(command("--codec", "int8")) == 0
    store = EmbeddingStore(tmp_path / "run/embeddings")
    assert store.spec.record_bytes == 4 + 4 * 128 + 128 * 18 * 18
    assert main(command("--codec", "int8", "--check-saved-embed")) == 0
    assert "relative error" in capsys.readouterr().out


def test_views_are_replayed_from_the_stored_seed(command, tmp_path, small_data, teacher):
    """D-27: with DISTILL.NO_RAND False the seed in front of an embedding gives the view that the teacher saw."""
    from sam3.image_input import to_rgb_uint8

    assert main(command("--split", "train", **{"DISTILL.NO_RAND": False})) == 0
    store = EmbeddingStore(tmp_path / "run/embeddings")
    spec = AugmentSpec.from_dict(store.spec.augmentation)
    seed, embedding = store.read("sa_3")
    pixels = view_of_seed(spec, seed).apply(to_rgb_uint8(photo(small_data, "sa_3")))
    np.testing.assert_allclose(embedding, teacher(Preprocess(252)(pixels)[None])[0].numpy(), rtol=2e-3, atol=2e-3)


def test_features_that_are_not_finite_are_quarantined(tmp_path, teacher):
    """D-20: one bad image costs itself and not the export."""
    begin_export(tmp_path, StoreSpec((128, 18, 18)), ["a", "b"])
    images = torch.zeros(2, 3, 252, 252)
    images[1, 0, 0, 0] = float("nan")
    batch = {"key": ["a", "b"], "seed": torch.tensor([1, 2]), "image": images, "bad": []}
    with StopSignal() as stop, EmbeddingWriter(tmp_path) as writer:
        counts = list(export_batches(teacher, [batch], writer, frozenset(), BadImageLog(None, 0), stop, 2))
    assert counts[-1].num_images == 2
    store = EmbeddingStore(tmp_path)
    assert list(store.keys()) == ["a"] and "not finite" in store.quarantined["b"]


def test_the_estimate_is_in_words():
    """D-32: what the user reads before a run of days."""
    estimate = export_report.ExportEstimate(100_674, 100_674, StoreSpec((1024, 72, 72)).record_bytes, 2 * 10**12)
    lines = " ".join(estimate.lines(StoreSpec((1024, 72, 72))))
    assert "100,674 to export at 10,616,836 bytes each" in lines and "1,068.84 GB to write, 2,000.00 GB free" in lines
    assert estimate.problem(Path("x"), StoreSpec((1024, 72, 72))) is None
    assert [export_report.format_seconds(s) for s in (3.2, 75, 12_000)] == ["3 s", "1 min 15 s", "3 h 20 min"]


def test_two_agents_on_one_machine_share_an_export_exactly(command, tmp_path):
    """D-28 and D-31: two torchrun agents, gloo on the CPU; each image once, and the same values as one process."""
    assert main(command(name="one")) == 0
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    words = ["NNODES=2", "NPROC=1", "GPUS=0", f"RDZV_ENDPOINT=localhost:{29_600 + os.getpid() % 300}"]
    launch = ["bash", "stage1/scripts/save_stage1_embeddings.sh", *words]
    flags = command(name="two")
    agents = [
        subprocess.Popen([*launch, f"NODE_RANK={rank}", *flags], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [agent.communicate(timeout=300)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    one, two = (EmbeddingStore(tmp_path / name / "embeddings") for name in ("one", "two"))
    shares = [(tmp_path / f"two/embeddings/rank{rank}-keys.txt").read_text().split() for rank in range(2)]
    assert shares == [ALL_KEYS[0::2], ALL_KEYS[1::2]]
    for key in ALL_KEYS:
        assert one.read_seed(key) == two.read_seed(key)
        np.testing.assert_allclose(one.read(key)[1], two.read(key)[1], rtol=2e-3, atol=2e-3)
    # A store of two ranks is read by one, and continued by one.
    start = time.monotonic()
    assert main(command(name="two")) == 0 and time.monotonic() - start < 60


def test_a_tolerance_of_zero_is_taken_at_its_word(command, capsys):
    """D-17: zero is a bound, not "the default"."""
    assert main(command("--codec", "int8", name="tolerance")) == 0
    assert main(command("--codec", "int8", "--check-saved-embed", "2", "--check-tolerance", "0", name="tolerance")) == 2
    assert "(tolerance 0)" in capsys.readouterr().out
