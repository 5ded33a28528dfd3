"""``convert_stage1_weights.py``: what it writes opens with ``sam3.load_model`` and has the student's features."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stage1_world import TINY, Stage1World, make_random_teacher

import sam3
from sam3.checkpoint_io import read_state_dict, sha256_file, write_merged
from sam3.checkpoint_keys import STUDENT_PREFIX, TRUNK_PREFIX
from sam3.config import StudentConfig
from sam3.efficient_keys import own_weights, tracker_to_released
from sam3.model.efficient_sam3_tracker import EfficientSam3Tracker
from sam3.model.student_encoder import build_student
from sam3.model_builder import build_sam3_trunk
from sam3.preprocess import Preprocess
from sam3_train.checkpoint import load_checkpoint, save_checkpoint
from sam3_train.errors import UserError
from sam3_train.student_checkpoint import build_trained_student, read_student
from sam3_train.teacher import Teacher
from stage1.convert_stage1_weights import main
from stage1.model import Stage1Task
from stage1.train_stage1 import main as train


@pytest.fixture(scope="module")
def run(world: Stage1World, tmp_path_factory) -> Path:
    """A training run of two steps, averaged weights included."""
    run = tmp_path_factory.mktemp("run")
    cfg = world.config("converted", TRAIN__EMA_DECAY=0.5)
    assert train(["--cfg", str(cfg), "--output", str(run), "--device", "cpu", "--max-steps", "2"]) == 0
    return run


def convert(student: Path, teacher: Path, output: Path, *words: str) -> int:
    return main(["--student-ckpt", str(student), "--sam3-ckpt", str(teacher), "--output", str(output), *words])


def make_checkpoint(path: Path, backbone: str, **changes: bool) -> Path:
    """A training checkpoint of a student with random weights and moved BatchNorm statistics."""
    torch.manual_seed(0)
    model = TINY.replace(student=StudentConfig(backbone, **changes))
    student = build_student(model).train()
    with torch.no_grad():
        student(torch.randn(2, 3, TINY.image_size_px, TINY.image_size_px))
    task = Stage1Task(student, torch.ones(TINY.trunk.embed_dim))
    identity = {"model": model.to_dict(), "preprocess": Preprocess(TINY.image_size_px).to_dict()}
    state = {"model": task.saved_state(), "identity": identity, "epoch": 3, "step": 40, "metrics": {"loss": 0.5}}
    save_checkpoint(path, {**state, "config": {"MODEL": {"NAME": "", "BACKBONE": backbone}}})
    return path


def photo() -> Image.Image:
    generator = np.random.default_rng(5)
    return Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((320, 240))


@torch.no_grad()
def features_of(path: Path) -> torch.Tensor:
    model = sam3.load_model(path, device="cpu")
    return model.backbone.vision_backbone.trunk(model.preprocess(photo())[None])[-1]


@torch.no_grad()
def trained_features(path: Path, **choice: bool) -> torch.Tensor:
    checkpoint = read_student(path, **choice)
    return build_trained_student(checkpoint)(checkpoint.preprocess(photo())[None])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_merged_file_gives_the_trained_features_bit_for_bit(world, run, tmp_path, suffix, capfd):
    """D-08: student and deployed model are the same function; sizes, counts and the lines to load it are printed."""
    output = tmp_path / f"merged{suffix}"
    assert convert(run / "best.pth", world.teacher, output) == 0
    assert torch.equal(features_of(output), trained_features(run / "best.pth"))
    printed = capfd.readouterr().out
    keys, _ = read_state_dict(output)
    assert f"student keys in        {sum(k.startswith(STUDENT_PREFIX) for k in keys)}" in printed
    assert f"merged                 {len(keys)}" in printed
    assert f"model = sam3.load_model({str(output)!r})" in printed
    assert [path.name for path in tmp_path.iterdir()] == [output.name], "nothing else is left behind"


def test_the_printed_lines_run(world, run, tmp_path, capfd, monkeypatch):
    """D-78: a user can paste them."""
    monkeypatch.chdir(tmp_path)
    assert convert(run / "best.pth", world.teacher, Path("m.safetensors")) == 0
    lines = [line.strip() for line in capfd.readouterr().out.split("Use it:")[1].splitlines()]
    photo().resize((500, 400)).save("photo.jpg")
    scope: dict = {}
    exec("\n".join(lines), scope)
    assert scope["masks"].shape == (1, 400, 500)


def test_no_teacher_trunk_key_is_left_and_all_else_is_the_teachers(world, run, tmp_path):
    """D-70: the file holds one trunk; heads and neck are the teacher's bytes."""
    output = tmp_path / "merged.pt"
    assert convert(run / "best.pth", world.teacher, output) == 0
    merged, _ = read_state_dict(output)
    teacher, _ = read_state_dict(world.teacher)
    kept = {key for key in teacher if not key.startswith(TRUNK_PREFIX)}
    assert {key for key in merged if key.startswith(TRUNK_PREFIX)} == {
        k for k in merged if k.startswith(STUDENT_PREFIX)
    }
    assert {key for key in merged if not key.startswith(TRUNK_PREFIX)} == kept
    assert all(torch.equal(merged[key], teacher[key]) for key in kept)
    assert output.stat().st_size < 1.1 * sum(v.nbytes for v in merged.values())


def test_the_metadata_say_where_it_came_from(world, run, tmp_path):
    """D-75, D-77: variant, descriptions, hashes, epoch, metrics and config; plain JSON."""
    output = tmp_path / "merged.safetensors"
    assert convert(run / "best.pth", world.teacher, output) == 0
    _, metadata = read_state_dict(output)
    json.dumps(metadata)
    state = load_checkpoint(run / "best.pth")
    assert metadata["variant"] == "converted"
    assert metadata["model"] == state["identity"]["model"]
    assert metadata["preprocess"] == Preprocess(TINY.image_size_px).to_dict()
    provenance = metadata["provenance"]
    assert provenance["teacher_sha256"] == sha256_file(world.teacher)
    assert provenance["student_sha256"] == sha256_file(run / "best.pth")
    assert provenance["is_ema"] is True
    assert provenance["metrics"]["loss"] == pytest.approx(state["best"]["value"])
    assert provenance["config"]["MODEL"]["BACKBONE"] == "demo_cnn"


def test_a_compressed_memory_is_kept_and_called_stale(world, run, tmp_path, capfd):
    """Stage 2 trained it behind the trunk that goes."""
    weights, _ = read_state_dict(world.teacher)
    tracker = EfficientSam3Tracker(TINY.with_efficient_memory()).state_dict()
    own = own_weights(tracker)
    write_merged(
        tmp_path / "sam3.pt", tracker_to_released(tracker) | weights, {"model": TINY.with_efficient_memory().to_dict()}
    )
    assert convert(run / "best.pth", tmp_path / "sam3.pt", tmp_path / "merged.pt") == 0
    assert f"the compressed memory of {tmp_path / 'sam3.pt'} is kept" in capfd.readouterr().out
    merged, metadata = read_state_dict(tmp_path / "merged.pt")
    assert all(torch.equal(merged[key], value) for key, value in own.items())
    assert metadata["model"]["efficient_memory"] == TINY.with_efficient_memory().to_dict()["efficient_memory"]


def test_live_or_averaged_weights_can_be_chosen(world, run, tmp_path):
    averaged, live = tmp_path / "averaged.pt", tmp_path / "live.pt"
    assert convert(run / "best.pth", world.teacher, averaged, "--use-ema") == 0
    assert convert(run / "best.pth", world.teacher, live, "--no-use-ema") == 0
    assert torch.equal(features_of(live), trained_features(run / "best.pth", use_ema=False))
    assert not torch.equal(features_of(live), features_of(averaged))


@pytest.mark.parametrize(
    ("backbone", "fuse_stride16"),
    [("efficientvit_b0", False), ("repvit_m0_9", False), ("tiny_vit_5m", False), ("efficientvit_b0", True)],
)
def test_one_student_of_each_family_folded_and_not(world, tmp_path, backbone, fuse_stride16):
    """D-76: folding BatchNorm and branches changes names and size, not features; published names inside."""
    checkpoint = make_checkpoint(tmp_path / "student.pth", backbone, fuse_stride16=fuse_stride16)
    plain, folded = tmp_path / "plain.pt", tmp_path / "folded.safetensors"
    assert convert(checkpoint, world.teacher, plain) == 0
    assert convert(checkpoint, world.teacher, folded, "--fuse") == 0
    expected = trained_features(checkpoint)
    assert torch.equal(features_of(plain), expected)
    assert (features_of(folded) - expected).abs().max() < 1e-3 * expected.abs().max()
    assert len(read_state_dict(folded)[0]) < len(read_state_dict(plain)[0])
    student = {k.removeprefix(STUDENT_PREFIX) for k in read_state_dict(plain)[0] if k.startswith(STUDENT_PREFIX)}
    assert student == load_checkpoint(checkpoint)["model"].keys()


@pytest.mark.parametrize(("dtype", "fuse"), list(itertools.product(("fp16", "bf16"), (False, True))))
def test_half_precision_halves_the_file(world, run, tmp_path, dtype, fuse):
    """D-76."""
    output = tmp_path / "half.safetensors"
    assert convert(run / "best.pth", world.teacher, output, "--dtype", dtype, *(["--fuse"] if fuse else [])) == 0
    weights, _ = read_state_dict(output)
    # Rounding the Fourier matrix would turn the codes of points by degrees.
    assert {str(v.dtype) for k, v in weights.items() if v.is_floating_point() and "gaussian_matrix" not in k} == {
        f"torch.{'b' * (dtype == 'bf16')}float16"
    }
    full = sum(4 * v.numel() for v in weights.values())
    assert output.stat().st_size < 0.55 * full
    expected = trained_features(run / "best.pth")
    assert (features_of(output) - expected).abs().max() < 0.05 * expected.abs().max()


def with_key(state: dict, key: str, value: torch.Tensor | None) -> dict:
    changed = {name: tensor for name, tensor in state.items() if name != key}
    return changed if value is None else {**changed, key: value}


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda sd: with_key(sd, TRUNK_PREFIX + "pos_embed", None), "1 keys are missing, such as pos_embed"),
        (lambda sd: with_key(sd, TRUNK_PREFIX + "extra", torch.zeros(1)), "1 keys do not belong, such as extra"),
        (lambda sd: with_key(sd, TRUNK_PREFIX + "pos_embed", torch.zeros(3)), "pos_embed has shape (3,), expected"),
        (lambda sd: {k: v for k, v in sd.items() if "trunk" not in k}, "no SAM 3 key lies under --replace-prefix"),
        (lambda sd: {k: v for k, v in sd.items() if "sam2_convs" not in k}, "the merged file does not load"),
        (lambda sd: with_key(sd, "tracker.surprise", torch.zeros(1)), "tracker.surprise"),
        (lambda sd: with_key(sd, "tracker.no_mem_embed", torch.full((1, 1, 64), float("nan"))), "tracker.no_mem_embed"),
    ],
    ids=["missing", "unexpected", "shape", "no trunk", "no neck", "foreign key", "not finite"],
)
def test_a_teacher_that_does_not_fit_leaves_no_file(world, run, tmp_path, capfd, break_it, message):
    """D-71, D-73: exit 2, one message, nothing at the output."""
    teacher = tmp_path / "teacher.pt"
    torch.save({"model": break_it(read_state_dict(world.teacher)[0])}, teacher)
    output = tmp_path / "out" / "merged.pt"
    output.parent.mkdir()
    assert convert(run / "best.pth", teacher, output) == 2
    stderr = capfd.readouterr().err
    assert message in stderr and "Traceback" not in stderr
    assert not list(output.parent.iterdir())


def another_teacher(teacher: Path, path: Path) -> Path:
    weights, _ = read_state_dict(teacher)
    key = TRUNK_PREFIX + "pos_embed"
    torch.save({"model": with_key(weights, key, weights[key] + 1e-3)}, path)
    return path


def test_another_teacher_than_the_students_is_refused(world, run, tmp_path, capfd):
    """Neck and heads must be those of the trunk that the student imitates; both hashes and files are named."""
    other, output = another_teacher(world.teacher, tmp_path / "other.pt"), tmp_path / "m.pt"
    assert convert(run / "best.pth", other, output) == 2
    stderr = capfd.readouterr().err
    learned = load_checkpoint(run / "best.pth")["identity"]["teacher"]["sha256"]
    assert f"best.pth learned from a teacher whose trunk has sha256 {learned}" in stderr
    assert f"{other} has {trunk_hash(other)}" in stderr and "--allow-other-teacher" in stderr
    assert not output.exists()
    assert convert(run / "best.pth", other, output, "--allow-other-teacher") == 0
    printed = capfd.readouterr().out
    assert "warning: " in printed and learned in printed and trunk_hash(other) in printed
    provenance = read_state_dict(output)[1]["provenance"]
    assert provenance["teacher_trunk_sha256"] == trunk_hash(other)
    assert provenance["student_teacher_trunk_sha256"] == learned


def trunk_hash(path: Path) -> str:
    """As the export and the training hash their teacher."""
    trunk = build_sam3_trunk(path, config=TINY, device="cpu")
    return Teacher(trunk, TINY, Preprocess(TINY.image_size_px), torch.device("cpu")).sha256


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_student_without_a_recorded_teacher_is_merged_and_says_so(world, tmp_path, capfd, suffix):
    checkpoint, output = make_checkpoint(tmp_path / "student.pth", "demo_cnn"), tmp_path / f"m{suffix}"
    assert convert(checkpoint, world.teacher, output) == 0
    assert f"teacher not checked: {checkpoint} does not record" in capfd.readouterr().out
    provenance = read_state_dict(output)[1]["provenance"]
    assert provenance["student_teacher_trunk_sha256"] is None
    assert provenance["teacher_trunk_sha256"] == trunk_hash(world.teacher)


@pytest.mark.parametrize("in_half", [False, True], ids=["fp32", "fp16"])
def test_the_students_own_teacher_is_recognised_whatever_the_file(world, run, tmp_path, capfd, in_half):
    """The hash is of the trunk as loaded, not of the file: names in front of the keys or its format do not matter."""
    weights, _ = read_state_dict(world.teacher)
    state, student = load_checkpoint(run / "best.pth"), tmp_path / "student.pth"
    if in_half:
        weights = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    same = tmp_path / "same.pt"
    torch.save({"model": weights}, same)
    state["identity"]["teacher"]["sha256"] = trunk_hash(same)
    save_checkpoint(student, state)
    renamed = {k.replace(TRUNK_PREFIX, "image_encoder."): v for k, v in weights.items()}
    torch.save({f"module.{k}" if in_half else k: v for k, v in renamed.items()}, same)
    assert convert(student, same, tmp_path / "m.pt", "--replace-prefix", "image_encoder") == 0
    assert "teacher checked: the student learned from this SAM 3 trunk" in capfd.readouterr().out


@pytest.mark.parametrize("prefix", [STUDENT_PREFIX.rstrip("."), f"module.{STUDENT_PREFIX}"])
def test_a_target_prefix_that_loads_is_taken(world, run, tmp_path, prefix):
    output = tmp_path / "m.pt"
    assert convert(run / "best.pth", world.teacher, output, "--target-prefix", prefix) == 0
    assert torch.equal(features_of(output), trained_features(run / "best.pth"))


def test_a_student_that_is_not_what_it_says_leaves_no_file(world, run, tmp_path, capfd):
    state = load_checkpoint(run / "best.pth")
    state["identity"]["model"]["student"]["backbone"] = "efficientvit_b0"
    save_checkpoint(tmp_path / "lie.pth", state)
    assert convert(tmp_path / "lie.pth", world.teacher, tmp_path / "m.pt") == 2
    assert "the weights are not those of efficientvit_b0" in capfd.readouterr().err
    assert not (tmp_path / "m.pt").exists()


def test_a_failed_proof_keeps_the_old_file(world, run, tmp_path, capfd, monkeypatch):
    """D-08: if the deployed trunk gives anything else, the file does not appear and an older one stays."""
    output = tmp_path / "m.pt"
    output.write_bytes(b"older")
    import sam3_train.merged_proof

    def load_another(path, **kwargs):
        model = sam3.load_model(path, **kwargs)
        with torch.no_grad():
            model.backbone.vision_backbone.trunk.model.head[3].bias.add_(1.0)
        return model

    monkeypatch.setattr(sam3_train.merged_proof, "load_model", load_another)
    assert convert(run / "best.pth", world.teacher, output) == 2
    assert "its trunk differs from the trained student" in capfd.readouterr().err
    assert output.read_bytes() == b"older"
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"--output": "m.bin"}, "the name must end in one of .pt, .pth, .safetensors"),
        ({"--student-ckpt": "none.pth"}, "--student-ckpt: there is no file none.pth"),
        ({"--sam3-ckpt": "none.pt"}, "--sam3-ckpt: there is no file none.pt"),
        ({"--image": "none.jpg"}, "--image: there is no file none.jpg"),
        ({"--target-prefix": "image_encoder"}, "--target-prefix 'image_encoder': sam3.load_model looks for a student"),
        ({"--replace-prefix": "image_encoder"}, "no SAM 3 key lies under --replace-prefix 'image_encoder.'"),
    ],
)
def test_bad_flags_end_with_exit_2(world, run, tmp_path, capfd, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    flags = {"--student-ckpt": str(run / "best.pth"), "--sam3-ckpt": str(world.teacher), "--output": "m.pt", **words}
    assert main([word for pair in flags.items() for word in pair]) == 2
    assert message in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "named"),
    [("config", "config"), ("epoch", "epoch"), ("metrics", "metrics"), ("model", "model"), ("identity", "identity")],
)
def test_a_checkpoint_that_lacks_a_part_says_which(run, tmp_path, field, named):
    state = load_checkpoint(run / "best.pth")
    del state[field]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(UserError, match=rf"part\.pth: not a training checkpoint of a student: it lacks {named} \("):
        read_student(tmp_path / "part.pth")


def test_a_checkpoint_without_a_name_or_preprocessing_says_so(run, tmp_path):
    state = load_checkpoint(run / "best.pth")
    del state["identity"]["preprocess"], state["config"]["MODEL"]["NAME"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"it lacks identity\.preprocess, config\.MODEL\.NAME \("):
        read_student(tmp_path / "part.pth")


def test_a_merged_file_is_no_input(world, run, tmp_path, capfd):
    """Neither as the student nor as the teacher, nor may an input be overwritten."""
    merged = tmp_path / "merged.pt"
    assert convert(run / "best.pth", world.teacher, merged) == 0
    assert convert(merged, world.teacher, tmp_path / "m.pt") == 2
    assert "not a training checkpoint of a student" in capfd.readouterr().err
    assert convert(run / "best.pth", merged, tmp_path / "m.pt") == 2
    assert "already holds a student" in capfd.readouterr().err
    teacher = make_random_teacher(tmp_path / "teacher.safetensors")
    assert convert(run / "best.pth", teacher, teacher) == 2
    assert "is the --sam3-ckpt itself" in capfd.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--student-ckpt", "x"])
