"""A file with a trained memory appears only once it has tracked a clip as the model did in training.

The training-time model is built by the builder that training uses, from the same two files, and a merged file is opened
as a user would open it. Both follow an object through a generated clip: what the memory makes of a frame, and what the
decoder then answers, has to be the same. A session on the same clip shows that the file tracks as a stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sam3.checkpoint_io import CheckpointError
from sam3.loading import load_model
from sam3.model.clip_forward import ClipPlan, ClipResult, forward_clip
from sam3.model.efficient_sam3_model_builder import build_efficient_sam3_train
from sam3.model.efficient_sam3_tracker import EfficientSam3Tracker
from sam3.model.efficient_sam3_train import EfficientSam3Train
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
from sam3.model.streaming import StreamingTracker
from sam3.model.tracker_memory import TrackerFeatures
from sam3.sam.prompts import PromptError
from sam3_train.errors import UserError
from sam3_train.merged_proof import TOLERANCE, relative_difference
from stage2.trained_memory import TrainedMemory

NUM_FRAMES = 3
_SIZE_HW = (144, 192)
_SIDE_PX = 48


@dataclass(frozen=True)
class MemoryProof:
    """How near a proven file is to the model in training; differences are over the largest value."""

    memory_error: float
    """Of what the frames show through their memory, from the trained weights rounded as in the file."""
    answer_error: float
    """Of all mask logits, likewise."""
    rounding_error: float
    """Of what the frames show through their memory, from the weights as they were trained."""
    num_tokens: int
    """Stored of a frame, as the session has them."""
    dense_tokens: int
    """What SAM 3's own memory stores of a frame."""

    def lines(self) -> list[str]:
        """For a report."""
        return [
            f"checked: over {NUM_FRAMES} frames the loaded file gives what the model gave in training (relative error "
            f"{self.memory_error:.1e} behind the memory, {self.answer_error:.1e} in the masks; "
            f"{self.rounding_error:.1e} before rounding to the file's precision)",
            f"checked: a stream with it stores {self.num_tokens} tokens of a frame, where SAM 3 stores "
            f"{self.dense_tokens:,}",
        ]


def generated_clip(num_frames: int = NUM_FRAMES) -> tuple[list[np.ndarray], np.ndarray]:
    """A square that moves over a pattern: frames, uint8 RGB (H, W, 3), and where it is, bool (frames, H, W)."""
    generator = np.random.default_rng(0)
    height, width = _SIZE_HW
    pattern = np.kron(generator.integers(30, 110, (height // 16, width // 16, 3)), np.ones((16, 16, 1)))
    masks = np.zeros((num_frames, height, width), bool)
    frames = []
    for number, mask in enumerate(masks):
        left = width // 8 + number * width // 16
        mask[height // 3 : height // 3 + _SIDE_PX, left : left + _SIDE_PX] = True
        frames.append(np.where(mask[..., None], (235, 180, 40), pattern).astype(np.uint8))
    return frames, masks


@torch.no_grad()
def prove_memory(
    path: Path, base: Path, trained: TrainedMemory, dtypes: Mapping[str, torch.dtype], output: Path
) -> MemoryProof:
    """Open a merged file as a user would and compare it with the model as it was in training.

    Args:
        path: The file, written aside.
        base: The file that the memory was trained in front of, or one that holds the same.
        trained: The memory.
        dtypes: In what each of its tensors is stored, under the tracker's names.
        output: What messages call the file.

    Raises:
        UserError: If the file does not open, one of its memories is not whole, or it tracks otherwise than the model
            did in training.
    """
    try:
        merged = load_model(path, device="cpu", dtype=torch.float32, memory="efficient")
    except CheckpointError as error:
        raise UserError(f"the merged file does not load: {str(error).replace(str(path), str(output))}") from None
    trained.preprocess.require_equal(merged.preprocess, str(trained.path), "the merged model")
    reference = _as_trained(base, trained)
    frames, masks = generated_clip()
    images = torch.stack([merged.preprocess(frame) for frame in frames])[None]
    features = reference.clip_features(images, frames_at_once=1)
    coverage = _coverage(masks, merged)
    exact = _track(reference, features, coverage)
    stored = {key: value.to(dtypes[key]).float() for key, value in trained.weights.items()}
    reference.load_state_dict(stored, strict=False)  # the memory alone; its names have been compared
    rounded = _track(reference, features, coverage)
    assert isinstance(merged.tracker, EfficientSam3Tracker)
    found = _track(merged.tracker, [merged.tracker_features(image[None]) for image in images[0]], coverage)
    proof = MemoryProof(
        _difference(_seen(found), _seen(rounded)),
        _difference(_answers(found), _answers(rounded)),
        _difference(_seen(found), _seen(exact)),
        _stream(merged, frames, masks[0], output),
        merged.config.grid_size**2,
    )
    if not (proof.memory_error <= TOLERANCE and proof.answer_error <= TOLERANCE):
        raise UserError(
            f"{output} was not written: on a generated clip it differs from the trained model by "
            f"{proof.memory_error:.1e} of the largest value behind the memory and {proof.answer_error:.1e} in the "
            f"masks (limit {TOLERANCE:.0e})"
        )
    return proof


def _as_trained(base: Path, trained: TrainedMemory) -> EfficientSam3Train:
    """The model of the training, in eval mode on the CPU, with the weights as they were trained."""
    torch.manual_seed(0)  # a new memory's start, all of which is replaced
    model = build_efficient_sam3_train(
        base, memory=trained.model.efficient_memory, device="cpu", preprocess=trained.preprocess
    )
    model.load_state_dict(model.state_dict() | {key: value.float() for key, value in trained.weights.items()})
    return model.eval().requires_grad_(False)


def _coverage(masks: np.ndarray, model: Sam3Image) -> Tensor:
    """The square's share of each cell of the memory encoder's grid, (T, 1, h, w)."""
    side = model.tracker.mask_prompt_size
    squares = torch.from_numpy(masks).float()[:, None]
    return torch.nn.functional.interpolate(squares, (side, side), mode="bilinear", antialias=True)


def _track(tracker: EfficientSam3Tracker, features: list[TrackerFeatures], coverage: Tensor) -> ClipResult:
    """Follow the square from its mask on the first frame, with memories in float32."""
    before, tracker.memory_dtype = tracker.memory_dtype, torch.float32
    try:
        return forward_clip(tracker, features, coverage, ClipPlan("mask", (0,)))
    finally:
        tracker.memory_dtype = before


def _seen(result: ClipResult) -> Tensor:
    return torch.stack([result.conditioned[t] for t in sorted(result.conditioned)])


def _answers(result: ClipResult) -> Tensor:
    return torch.stack([answer.sam.mask_logits for answer in result.answers])


def _difference(found: Tensor, expected: Tensor) -> float:
    """As `relative_difference`; infinite where a value is not finite."""
    return relative_difference(found, expected) if bool(found.isfinite().all()) else float("inf")


def _stream(model: Sam3Image, frames: list[np.ndarray], mask: np.ndarray, output: Path) -> int:
    """Track the clip as a stream; returns the tokens that are stored of a frame.

    Raises:
        UserError: If a mask is not finite, or a frame's memory has another size than the description says.
    """
    stream = StreamingTracker(Sam3TrackerPredictor(model), memory_policy="no_late_edits")
    try:
        stream.add_mask(1, mask)
        results = [stream.push(frame) for frame in frames]
    except PromptError as error:
        raise UserError(f"{output} was not written: a stream with it fails: {error}") from None
    if not all(bool(result.masks.isfinite().all()) for result in results):
        raise UserError(f"{output} was not written: a stream with it gives masks that are not finite")
    (group,) = stream.state.groups
    (record,) = list(group.bank.cond.values())[:1]
    memory = model.config.efficient_memory
    assert memory is not None and record.maskmem_features is not None
    num_tokens = record.maskmem_features.shape[1]
    expected = memory.num_tokens or model.config.grid_size**2
    if num_tokens != expected:
        raise UserError(f"{output} was not written: it stores {num_tokens} tokens of a frame and not {expected}")
    return num_tokens
