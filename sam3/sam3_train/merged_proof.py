"""A merged file appears only once it has been shown to be what was trained.

What a stage writes aside (`written_aside`) is loaded again as a user would load it and shown one image (`prove`): its
trunk has to give what the student gave in training, and its heads finite answers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sam3.checkpoint_io import TABLE_SUFFIX, CheckpointError, read_checkpoint
from sam3.config import EfficientMemoryConfig
from sam3.finite import NonFiniteError
from sam3.loading import load_model
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_image_processor import Sam3Processor
from sam3.model.student_encoder import StudentEncoder
from sam3.preprocess import Preprocess
from sam3_train.errors import UserError

SUFFIXES = (".pt", ".pth", ".safetensors")
TOLERANCE = 1e-4
"""Largest difference of trunk outputs, over the largest output, that rounding explains."""
TOLERANCE_FUSED = 1e-3
"""The same between a student and its folded form, both in float32."""
TOLERANCE_FASTER = 5e-3
"""The same between the predictor's fast form of the trunk and the trunk, after the neck."""


@dataclass(frozen=True)
class ProvenStudent:
    """The student that a merged file has to hold, in eval mode on the CPU.

    Attributes:
        trained: As it was in training.
        folded: In the form that went into the file: folded, or ``trained`` itself.
        stored: ``folded`` with its weights rounded as in the file (`as_stored`), so that the comparison's tolerance
            need only cover the rounding of the arithmetic.
        preprocess: What it saw in training.
    """

    trained: StudentEncoder
    folded: StudentEncoder
    stored: StudentEncoder
    preprocess: Preprocess


@dataclass(frozen=True)
class MergedProof:
    """How near a proven file's trunk is to the student; differences are over the largest output."""

    trunk_error: float
    """From the student with its weights rounded as in the file."""
    rounding_error: float
    """From the student as it was trained."""

    def line(self) -> str:
        """One line for a report."""
        return (
            f"checked: the loaded file's trunk gives the student's features (relative error {self.trunk_error:.1e}; "
            f"{self.rounding_error:.1e} before rounding to the file's precision)"
        )


def file_problems(
    output: Path, inputs: Mapping[str, Path], image: Path | None = None, flag: str = "--output"
) -> list[str]:
    """What is wrong with the files that a merging command was given, one line each.

    Args:
        output: What it shall write.
        inputs: The flag of each file that it reads, and the file.
        image: The photo of ``--image``, if one was named.
        flag: The flag of ``output``.
    """
    problems = []
    if output.suffix not in SUFFIXES:
        problems.append(f"{flag} {output}: the name must end in one of {', '.join(SUFFIXES)}")
    if output.is_dir():
        problems.append(f"{flag} {output} is a folder; name a file in it")
    for name, path in inputs.items():
        if path.is_dir():
            problems.append(f"{name}: {path} is a folder; make one file of shards first (python -m sam3.convert)")
        elif not path.is_file():
            problems.append(f"{name}: there is no file {path}")
        elif output.exists() and path.samefile(output):
            problems.append(f"{flag} {output} is the {name} itself; choose another name")
    if image is not None and not image.is_file():
        problems.append(f"--image: there is no file {image}")
    return problems


@contextmanager
def written_aside(output: Path, flag: str = "--output") -> Iterator[Path]:
    """A name beside ``output`` to write to and to prove; it takes the place of ``output`` if the block ends well.

    Raises:
        UserError: If something cannot be written; ``output`` is as before.
    """
    # The final suffix stays, because it decides the format.
    aside = output.with_name(f".{output.stem}.{os.getpid()}.unproven{output.suffix}")
    try:
        yield aside
        os.replace(aside, output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error}; free some space or choose another {flag}") from error
    finally:
        aside.unlink(missing_ok=True)


def require_written(path: Path, weights: Mapping[str, Tensor], output: Path) -> None:
    """Read a new file and compare every tensor with what it should hold; NaN equals NaN.

    A safetensors file holds no rotary tables.

    Args:
        path: The file, written aside.
        weights: What it should hold.
        output: What messages call it.

    Raises:
        UserError: If a key is missing, unexpected, or of another type or value.
    """
    written = read_checkpoint(path).state_dict
    if path.suffix == ".safetensors":
        weights = {key: value for key, value in weights.items() if not key.endswith(TABLE_SUFFIX)}
    wrong = sorted(weights.keys() ^ written.keys()) or [
        key for key, value in weights.items() if not _equal(value, written[key])
    ]
    if wrong:
        raise UserError(
            f"{output} was not written: {len(wrong)} keys would not be what they should, such as {wrong[0]}"
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    """The same type and numbers, where NaN equals NaN."""
    return a.dtype == b.dtype and (torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


def usage_lines(output: Path) -> list[str]:
    """What was written, and the lines of Python that use it."""
    return [
        f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB). Use it:",
        "",
        "    import numpy as np, sam3",
        "    from PIL import Image",
        f"    model = sam3.load_model({str(output)!r})",
        "    predictor = model.inst_interactive_predictor",
        '    predictor.set_image(Image.open("photo.jpg"))',
        "    masks, ious, _ = predictor.predict(box=np.array([100, 150, 420, 380]), multimask_output=False)",
    ]


def memory_notes(path: Path, memory: EfficientMemoryConfig | None) -> list[str]:
    """What to say where a file whose trunk is replaced holds a compressed memory, which is kept.

    Args:
        path: The file.
        memory: The memory that it holds, or None.
    """
    if memory is None:
        return []
    return [
        f"warning: the compressed memory of {path} is kept, but it was trained behind the trunk that was replaced: "
        'train it again (stage2/train_memory_stage2.py), or track with load_model(..., memory="full")'
    ]


def as_stored(student: StudentEncoder, dtypes: Mapping[str, torch.dtype]) -> StudentEncoder:
    """The student with its weights rounded as a file stores them, computing in float32.

    Args:
        student: In eval mode.
        dtypes: Under the names of its state dict; those of floating-point tensors count.
    """
    state = {k: v.to(dtypes[k]).float() if v.is_floating_point() else v for k, v in student.state_dict().items()}
    if all(torch.equal(value, state[key]) for key, value in student.state_dict().items()):
        return student
    rounded = StudentEncoder(student.student, student.image_size_px, student.embed_dim, student.grid_size).eval()
    rounded.load_state_dict(state)
    return rounded


@torch.no_grad()
def prove(path: Path, student: ProvenStudent, output: Path, image: Path | None = None) -> MergedProof:
    """Load a merged file as a user would and compare it with the student as it was in training.

    Args:
        path: The file, written aside.
        student: What its trunk has to be.
        output: What messages call the file.
        image: A photo to look at; default: a generated picture.

    Raises:
        UserError: If the file does not load, the outputs differ by more than rounding explains, or an answer is not
            finite.
        PreprocessMismatchError: If the file expects other images than the student saw.
    """
    try:
        deployed = load_model(path, device="cpu", dtype=torch.float32)
    except CheckpointError as error:
        raise UserError(f"the merged file does not load: {str(error).replace(str(path), str(output))}") from None
    picture = _picture(image)
    student.preprocess.require_equal(deployed.preprocess, "the training checkpoint", "the merged model")
    pixels = deployed.preprocess(picture)[None]
    found = deployed.backbone.vision_backbone.trunk(pixels)[-1]
    expected = student.trained(pixels)
    difference = relative_difference(found, student.stored(pixels))
    folding = 0.0 if student.folded is student.trained else relative_difference(student.folded(pixels), expected)
    if not (difference <= TOLERANCE and folding <= TOLERANCE_FUSED):
        raise UserError(
            f"{output} was not written: its trunk differs from the trained student by {difference:.1e} of its largest "
            f"output (limit {TOLERANCE:.0e}), folding alone by {folding:.1e} (limit {TOLERANCE_FUSED:.0e})"
        )
    if deployed.inst_interactive_predictor is not None:
        _require_same_embedding(deployed, pixels, found, output)
    try:
        _answer_a_box(deployed, picture)
    except NonFiniteError as error:
        raise UserError(f"{output} was not written: asked for a box, {error}") from None
    return MergedProof(difference, relative_difference(found, expected))


def relative_difference(output: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return float((output - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def _require_same_embedding(model: Sam3Image, pixels: Tensor, trunk_output: Tensor, output: Path) -> None:
    """The predictor runs the trunk in a faster form; what its heads read must be the same within `TOLERANCE_FASTER`."""
    maps = model.backbone.vision_backbone.neck(trunk_output, need_detector=False)[2]
    assert maps is not None, "a model with SAM heads has the second neck"
    expected = model.heads.image_features({"backbone_fpn": maps}).embedding
    difference = relative_difference(model.image_features(pixels).embedding, expected)
    if not difference <= TOLERANCE_FASTER:
        raise UserError(
            f"{output} was not written: the predictor's image embedding differs from the trunk's by {difference:.1e} "
            f"of its largest value (limit {TOLERANCE_FASTER:.0e})"
        )


def _answer_a_box(model: Sam3Image, picture: Image.Image) -> None:
    """Run the heads and the detector, whichever the file has; both refuse to give what is not finite."""
    width, height = picture.size
    predictor = model.inst_interactive_predictor
    if predictor is not None:
        predictor.set_image(picture)
        predictor.predict(box=np.array([width, height, 3 * width, 3 * height]) // 4, multimask_output=False)
    if model.has_detector and model.backbone.language_backbone is not None:
        processor = Sam3Processor(model)
        processor.add_geometric_prompt([0.5, 0.5, 0.5, 0.5], True, processor.set_image(picture))


def _picture(path: Path | None) -> Image.Image:
    if path is not None:
        return Image.open(path).convert("RGB")
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    return coarse.resize((640, 480), Image.Resampling.BICUBIC)
