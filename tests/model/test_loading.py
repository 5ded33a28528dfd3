"""load_model and the builders: every layout opens, everything that does not fit is one clear error."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_files import STUDENT, TINY, make_model, student_model, whole_model, whole_weights
from safetensors.torch import save_file
from students import RELEASED
from torch import Tensor

from sam3.checkpoint_io import INDEX_SUFFIX, CheckpointError, CheckpointFile, write_merged
from sam3.checkpoint_keys import STUDENT_PREFIX, TRUNK_PREFIX, student_to_published
from sam3.checkpoint_parts import (
    DETECTOR,
    HEADS,
    MEMORY,
    MEMORY_PREFIXES,
    POINT_PROMPTS,
    SAM2_NECK_PREFIX,
    SEGMENTATION,
    TEXT,
    Part,
)
from sam3.config import Sam3Config, StudentConfig
from sam3.convert import main as convert
from sam3.hf_keys import POINT_PROJECTIONS, released_to_hf
from sam3.loading import load_model
from sam3.model.sam3_image import Sam3Image
from sam3.model_builder import assemble_image_model, build_sam3_image_model, build_sam3_trunk
from sam3.preprocess import Preprocess, PreprocessMismatchError
from sam3.recognition import recognise
from sam3.released_names import released_state_dict


@pytest.fixture(scope="module")
def teacher() -> Sam3Image:
    return whole_model()


@pytest.fixture(scope="module", name="student_model")
def student_model_fixture() -> Sam3Image:
    return student_model()


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.rand(1, 3, TINY.image_size_px, TINY.image_size_px, generator=torch.Generator().manual_seed(0)) * 2 - 1


def assert_same_model(loaded: Sam3Image, expected: Sam3Image, image: Tensor | None = None) -> None:
    assert loaded.config == expected.config
    assert loaded.missing_parts == ()
    assert not loaded.training
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    if image is not None:
        with torch.no_grad():
            for ours, theirs in zip(loaded.image_features(image), expected.image_features(image), strict=True):
                assert torch.equal(ours, theirs)
    for (name, ours), theirs in zip(loaded.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "flat": lambda sd: sd,
    "under model": lambda sd: {"model": sd},
    "without detector.": lambda sd: {k.removeprefix("detector."): v for k, v in sd.items()},
    "DDP": lambda sd: {"module." + k: v for k, v in sd.items()},
    "a saved model of Meta's image builder": lambda sd: {
        k.removeprefix("detector.").replace("tracker.", "inst_interactive_predictor.model."): v for k, v in sd.items()
    },
    "without rotary tables": lambda sd: {k: v for k, v in sd.items() if not k.endswith("freqs_cis")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_a_torch_file(tmp_path: Path, teacher: Sam3Image, image: Tensor, layout: str) -> None:
    torch.save(LAYOUTS[layout](released_state_dict(teacher)), tmp_path / "model.pt")
    assert_same_model(load_model(tmp_path / "model.pt", device="cpu"), teacher, image if layout == "flat" else None)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_merged_files_with_their_record(tmp_path: Path, student_model: Sam3Image, suffix: str) -> None:
    path = tmp_path / f"merged{suffix}"
    preprocess = Preprocess(TINY.image_size_px, mode="letterbox")
    record = {"variant": STUDENT, "model": student_model.config.to_dict(), "preprocess": preprocess.to_dict()}
    write_merged(path, released_state_dict(student_model), record)
    loaded = load_model(str(path), device="cpu")
    assert_same_model(loaded, student_model)
    assert loaded.preprocess == preprocess
    assert loaded.inst_interactive_predictor.preprocess == preprocess
    with pytest.raises(PreprocessMismatchError, match=r"the argument preprocess"):
        load_model(path, device="cpu", preprocess=Preprocess(TINY.image_size_px))


def test_student_without_a_record_is_recognised_by_its_keys(
    tmp_path: Path, student_model: Sam3Image, image: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    released = released_state_dict(student_model)
    assert STUDENT_PREFIX + "backbone.model.input_stem.op_list.0.conv.weight" in released
    own = student_model.backbone.vision_backbone.trunk.model.state_dict()
    assert {k for k in released if k.startswith(TRUNK_PREFIX)} == {
        STUDENT_PREFIX + key for key in student_to_published(own, STUDENT)
    }
    torch.save({"model": released}, tmp_path / "merged.pt")
    with caplog.at_level(logging.WARNING):
        assert_same_model(load_model(tmp_path / "merged.pt", device="cpu"), student_model, image)
    assert "does not say how its student's images were prepared" in caplog.text


@pytest.mark.parametrize(
    "student",
    [
        StudentConfig("repvit_m0_9"),
        StudentConfig("repvit_m1_1", fused=True),
        StudentConfig("tiny_vit_5m", fuse_stride16=True),
        StudentConfig("efficientvit_b1", fused=True),
    ],
    ids=lambda student: f"{student.backbone}{student.fuse_stride16:d}{student.fused:d}",
)
def test_every_form_of_student_is_recognised(tmp_path: Path, student: StudentConfig) -> None:
    """One of each family: plain, with the stride-16 fusion, and folded; without any record."""
    model = make_model(TINY.replace(student=student))
    torch.save(released_state_dict(model), tmp_path / "merged.pt")
    loaded = load_model(tmp_path / "merged.pt", device="cpu")
    assert loaded.config == model.config
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    for (name, ours), theirs in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_nine_released_students_are_recognised_at_full_size() -> None:
    """By names and shapes alone: no weights, no record. The counts are those of the published merged files."""
    for name, released in RELEASED.items():
        config = Sam3Config(student=StudentConfig(released.backbone))
        model = assemble_image_model(config, device="meta", enable_tracker=True)
        names = {key: value.to("meta") for key, value in released_state_dict(model).items()}
        assert len(names) == released.num_merged_keys, name
        found = recognise(CheckpointFile(Path(name), (), "torch", names, {}))
        assert found.config == config, name
        assert found.missing_parts == (), name
        found.check(model)


@pytest.fixture(scope="module")
def hf_weights(teacher: Sam3Image) -> dict[str, Tensor]:
    weights = released_to_hf(released_state_dict(teacher))
    return {key: value.clone(memory_format=torch.contiguous_format) for key, value in weights.items()}


def save_shards(folder: Path, weights: dict[str, Tensor], count: int) -> Path:
    """As transformers stores a large model: shards and an index."""
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    weight_map = {key: names[i % count] for i, key in enumerate(weights)}
    for name in names:
        shard = {key: value for key, value in weights.items() if weight_map[key] == name}
        save_file(shard, folder / name, metadata={"format": "pt"})
    index = folder / f"model{INDEX_SUFFIX}"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("form", ["file", "folder", "index of shards", "folder of shards", "Sam3Model"])
def test_hugging_face_layouts(tmp_path: Path, teacher: Sam3Image, hf_weights, image: Tensor, form: str) -> None:
    path = tmp_path / "model.safetensors"
    if form in ("file", "folder"):
        save_file(hf_weights, path, metadata={"format": "pt"})
    if form == "Sam3Model":
        prefix = "detector_model."
        save_file({k.removeprefix(prefix): v for k, v in hf_weights.items() if k.startswith(prefix)}, path)
    if "shards" in form:
        path = save_shards(tmp_path, hf_weights, 3)
    loaded = load_model(tmp_path if "folder" in form else path, device="cpu")
    heads = () if form != "Sam3Model" else (HEADS.name, MEMORY.name)
    assert loaded.missing_parts == (*heads, POINT_PROMPTS)
    if form == "file":
        with torch.no_grad():
            for ours, theirs in zip(loaded.image_features(image), teacher.image_features(image), strict=True):
                assert torch.equal(ours, theirs)
    own, theirs = released_state_dict(loaded), released_state_dict(teacher)
    for key, value in own.items():
        if key in POINT_PROJECTIONS:
            assert not value.any()
        elif not key.endswith("pos_embed"):
            assert torch.equal(value, theirs[key]), key


def test_what_hugging_face_does_not_know_is_said(tmp_path: Path, hf_weights) -> None:
    save_file(hf_weights | {"detector_model.novelty": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"Hugging Face file, but no rule for the key 'detector_model\.novelty'"):
        load_model(tmp_path)


ABSENT = {
    "text encoder": ((TEXT,), (TEXT.name,)),
    "segmentation head": ((SEGMENTATION,), (SEGMENTATION.name,)),
    "tracker memory": ((MEMORY,), (MEMORY.name,)),
    "SAM heads and memory": ((HEADS, MEMORY), (HEADS.name, MEMORY.name)),
    "SAM heads alone": ((HEADS,), (HEADS.name, MEMORY.name)),
    "detector and what hangs on it": ((DETECTOR, TEXT, SEGMENTATION), (TEXT.name, DETECTOR.name, SEGMENTATION.name)),
    "detector alone": ((DETECTOR,), (TEXT.name, DETECTOR.name, SEGMENTATION.name)),
    "point projections": ((Part("points", POINT_PROJECTIONS),), (POINT_PROMPTS,)),
}


@pytest.mark.parametrize("name", ABSENT)
def test_parts_may_be_absent_as_a_whole(tmp_path: Path, name: str) -> None:
    absent, missing = ABSENT[name]
    prefixes = tuple(prefix for part in absent for prefix in part.prefixes)
    torch.save({k: v for k, v in whole_weights().items() if not k.startswith(prefixes)}, tmp_path / "part.pt")
    loaded = load_model(tmp_path / "part.pt", device="cpu")
    assert loaded.missing_parts == missing
    assert (loaded.inst_interactive_predictor is None) == (HEADS.name in missing)
    assert loaded.has_tracker == (MEMORY.name not in missing)
    assert loaded.has_detector == (DETECTOR.name not in missing)
    assert (loaded.segmentation_head is None) == (SEGMENTATION.name in missing)
    assert (loaded.backbone.language_backbone is None) == (TEXT.name in missing)
    own, theirs = released_state_dict(loaded), whole_weights()
    assert all(torch.equal(value, theirs[key]) for key, value in own.items() if key not in POINT_PROJECTIONS)


HALVED = (TEXT, DETECTOR, SEGMENTATION, HEADS, MEMORY, Part("detector", POINT_PROJECTIONS))


@pytest.mark.parametrize("part", HALVED, ids=lambda part: part.prefixes[0])
@pytest.mark.parametrize("rest", [1, -1], ids=["one tensor is there", "one tensor is absent"])
def test_a_part_that_is_there_in_half_is_an_error(tmp_path: Path, part: Part, rest: int) -> None:
    weights = whole_weights()
    keys = [key for key in weights if key.startswith(part.prefixes)]
    gone = keys[rest:]
    torch.save({k: v for k, v in weights.items() if k not in gone}, tmp_path / "half.pt")
    # Point projections may be absent as a whole.
    counted = gone if not set(POINT_PROJECTIONS) <= set(gone) else [key for key in gone if key not in POINT_PROJECTIONS]
    with pytest.raises(CheckpointError, match=rf"{part.name}: {len(counted)} of \d+ missing: {counted[0]}"):
        load_model(tmp_path / "half.pt")


def test_the_detector_saved_without_its_tracker_opens(tmp_path: Path) -> None:
    """It has the neck of the SAM heads, which nothing reads then; the same neck in half is a damaged file."""
    weights = {k: v for k, v in whole_weights().items() if not k.startswith("tracker.")}
    torch.save(weights, tmp_path / "detector.pt")
    loaded = load_model(tmp_path / "detector.pt", device="cpu")
    assert loaded.missing_parts == (HEADS.name, MEMORY.name) and loaded.has_detector
    assert loaded.backbone.vision_backbone.sam2_convs is None
    build_sam3_image_model(tmp_path / "detector.pt", config="tiny", device="cpu")
    weights.pop(SAM2_NECK_PREFIX + "0.conv_1x1.bias")
    torch.save(weights, tmp_path / "damaged.pt")
    with pytest.raises(CheckpointError, match=r"SAM heads: \d+ of 171 missing"):
        load_model(tmp_path / "damaged.pt", device="cpu")


def test_half_precision_files_compute_in_float32_unless_asked(tmp_path: Path, teacher: Sam3Image) -> None:
    path = tmp_path / "half.safetensors"
    write_merged(path, released_state_dict(teacher), {"model": TINY.to_dict()}, dtype=torch.float16)
    loaded = load_model(path, device="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    low = load_model(path, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    # Rounding the Fourier matrix would move every point code by many degrees.
    assert low.heads.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.dtype == torch.float32
    for table in (low.tracker.transformer.encoder.rotary.table, low.tracker.memory_code.table):
        assert table.dtype == torch.float32


def test_bf16_predictions_stay_close(tmp_path: Path, teacher: Sam3Image) -> None:
    path = tmp_path / "model.safetensors"
    write_merged(path, released_state_dict(teacher), {"model": TINY.to_dict()})
    picture = torch.randint(0, 256, (3, 80, 100), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    results = []
    for dtype in (None, torch.bfloat16):
        predictor = load_model(path, device="cpu", dtype=dtype).inst_interactive_predictor
        predictor.set_image(picture)
        results.append(predictor.predict(box=[10, 10, 60, 60], return_logits=True))
    (_, ious, low_res), (_, low_ious, low_low_res) = results
    assert low_low_res.dtype == low_res.dtype
    assert abs(ious - low_ious).max() < 0.03
    assert abs(low_res - low_low_res).mean() < 0.05 * abs(low_res).mean() + 0.01


def test_a_bad_record_is_said(tmp_path: Path, teacher: Sam3Image) -> None:
    for record, message in (
        ({"model": {"size": 3}}, "unknown field 'size'"),
        ({"model": TINY.to_dict(), "preprocess": {"mode": "crop"}}, "'crop' is not one of"),
        ({"model": TINY.replace(student=StudentConfig(STUDENT)).to_dict()}, f"tiny with student {STUDENT}.*ViT trunk"),
    ):
        write_merged(tmp_path / "m.pt", released_state_dict(teacher), record)
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path / "m.pt")


def test_names_that_are_neither_file_nor_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "output").mkdir()
    monkeypatch.chdir(tmp_path)
    for name, message in (
        (str(tmp_path / "nothing.pt"), "no such checkpoint file"),
        ("output/nothing.pt", "no such checkpoint file"),
        ("output/gone/nothing.pt", "no such checkpoint file"),
        ("someone/something", "name the file too"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_model(name)


def test_builder_loads_with_and_without_interactivity(tmp_path: Path, teacher: Sam3Image, image: Tensor) -> None:
    torch.save(released_state_dict(teacher), tmp_path / "sam3.pt")
    options = {"checkpoint_path": tmp_path / "sam3.pt", "config": "tiny", "device": "cpu"}
    assert_same_model(build_sam3_image_model(**options, enable_tracker=True), teacher, image)
    heads = build_sam3_image_model(**options, enable_inst_interactivity=True)
    assert not heads.has_tracker
    assert torch.equal(heads.image_features(image).embedding, teacher.image_features(image).embedding)
    with pytest.raises(ValueError, match="this model has no tracker: build it with enable_tracker=True"):
        heads.tracker_features(image)
    plain = build_sam3_image_model(**options, eval_mode=False)
    assert plain.inst_interactive_predictor is None
    assert plain.training
    out, expected = plain.backbone.forward_image(image), teacher.backbone.forward_image(image)
    assert out["sam2_backbone_out"] is None
    assert torch.equal(out["vision_features"], expected["vision_features"])
    with pytest.raises(CheckpointError, match="does not fit the model 'sam3'"):
        build_sam3_image_model(tmp_path / "sam3.pt", device="cpu")
    with pytest.raises(CheckpointError, match="fit the preset 'sam3' alone"):
        build_sam3_image_model(config="tiny")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_builder_takes_the_names_that_load_model_takes(tmp_path: Path, teacher: Sam3Image, layout: str) -> None:
    torch.save(LAYOUTS[layout](released_state_dict(teacher)), tmp_path / "model.pt")
    options = {"config": "tiny", "device": "cpu", "enable_tracker": True}
    assert_same_model(build_sam3_image_model(tmp_path / "model.pt", **options), teacher)


def test_builder_says_what_a_file_from_hugging_face_lacks(tmp_path: Path, hf_weights) -> None:
    save_file(hf_weights, tmp_path / "hf.safetensors")
    with pytest.raises(CheckpointError, match=r"names of Hugging Face's Sam3VideoModel\. sam3\.load_model opens it"):
        build_sam3_image_model(tmp_path / "hf.safetensors", config="tiny", device="cpu")
    assert convert([str(tmp_path / "hf.safetensors"), str(tmp_path / "back.pt")]) == 0
    options = {"checkpoint_path": tmp_path / "back.pt", "config": "tiny", "device": "cpu"}
    assert build_sam3_image_model(**options).missing_parts == (POINT_PROMPTS,)
    assert build_sam3_image_model(**options, enable_detector=False).missing_parts == ()


@pytest.mark.parametrize("form", ["released", "without detector.", "trunk keys only"])
def test_trunk_alone(tmp_path: Path, teacher: Sam3Image, image: Tensor, form: str) -> None:
    released = released_state_dict(teacher)
    if form == "without detector.":
        released = {k.removeprefix("detector."): v for k, v in released.items()}
    if form == "trunk keys only":
        released = {k: v for k, v in released.items() if k.startswith(TRUNK_PREFIX)}
    torch.save(released, tmp_path / "teacher.pt")
    trunk = build_sam3_trunk(tmp_path / "teacher.pt", config="tiny", device="cpu")
    assert not trunk.training
    assert not any(p.requires_grad for p in trunk.parameters())
    assert torch.equal(trunk(image)[0], teacher.backbone.vision_backbone.trunk(image)[0])
    with pytest.raises(CheckpointError, match="of another shape"):
        build_sam3_trunk(tmp_path / "teacher.pt", device="cpu")


def test_student_trunk_alone(tmp_path: Path, student_model: Sam3Image, image: Tensor) -> None:
    torch.save(released_state_dict(student_model), tmp_path / "merged.pt")
    trunk = build_sam3_trunk(tmp_path / "merged.pt", config=student_model.config, device="cpu")
    with torch.no_grad():
        assert torch.equal(trunk(image)[0], student_model.backbone.vision_backbone.trunk(image)[0])
    with pytest.raises(CheckpointError, match="it holds a student in the trunk's place"):
        build_sam3_trunk(tmp_path / "merged.pt", config="tiny", device="cpu")


def test_preprocess_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"images of 1008 px, the model 'tiny' takes 252 px"):
        build_sam3_image_model(load_from_HF=False, config="tiny", preprocess=Preprocess(1008))


def test_the_memory_is_what_the_tracker_has_beyond_the_heads() -> None:
    with_memory = {key for key in whole_weights() if key.startswith("tracker.")}
    heads = set(released_state_dict(make_model(enable_tracker=False, enable_inst_interactivity=True)))
    assert {key for key in with_memory if key.startswith(MEMORY_PREFIXES)} == with_memory - heads


def test_importing_the_package_changes_nothing() -> None:
    """No global switches, no handlers, no heavy imports: neither by the package nor by the builder."""
    code = """
import logging, os, sys, torch
before = (torch.backends.cuda.matmul.allow_tf32, torch.get_default_dtype(), torch.get_num_threads(),
          torch.is_autocast_enabled(), len(logging.root.handlers), dict(os.environ), torch.is_grad_enabled())
import sam3
assert "timm" not in sys.modules and "sam3.model_builder" not in sys.modules
import sam3.loading
after = (torch.backends.cuda.matmul.allow_tf32, torch.get_default_dtype(), torch.get_num_threads(),
         torch.is_autocast_enabled(), len(logging.root.handlers), dict(os.environ), torch.is_grad_enabled())
assert before == after, (before, after)
assert not {"transformers", "timm", "scipy", "pycocotools", "cv2"} & set(sys.modules)
from sam3.model_builder import assemble_image_model
model = assemble_image_model(sam3.Sam3Config.preset("tiny"), enable_inst_interactivity=True, device="meta")
assert all(tensor.is_meta for tensor in model.state_dict().values())
assert "torch._dynamo" not in sys.modules, "importing torch's compiler takes longer than loading a model"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
