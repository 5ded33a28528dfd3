"""The full tracker as a teacher: the same clip, the same prompts, and a memory that was not compressed.

Teacher and student have the same backbone, SAM heads and pointers; all that differs is what a frame remembers and how
it is read. So candidates of masks, features behind the memory attention and pointers mean the same in both, and are
compared one by one. Each object counts on each frame with the teacher's own IoU there: a teacher that lost an object
has nothing to teach.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sam3.checkpoint_io import CheckpointError
from sam3.devices import find_device
from sam3.loading import load_model
from sam3.model.clip_forward import ClipResult
from sam3.model.efficient_sam3_tracker import EfficientSam3Tracker
from sam3.model.memory_bank import FrameRecord, MemoryBank
from sam3.model.sam3_tracker import Sam3Tracker, TrackerFeatures
from sam3.sam.mask_decoder import SamOutput
from sam3_train.clip_judging import tracked_ious
from sam3_train.losses import dice_loss

_LEAST_VARIANCE_SHARE = 1e-3


@dataclass(frozen=True)
class DistillWeights:
    """How much the teacher's answers count; all 0: there is no teacher."""

    mask: float = 0.0
    """Cross entropy plus Dice of each candidate with the teacher's probabilities."""
    features: float = 0.0
    """Squared error of the features behind the memory attention, in units of the teacher's variance of each channel."""
    pointers: float = 0.0
    """One minus the cosine of the object pointers."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0.0:
                raise ValueError(f"distillation: weight {name} must be at least 0, got {value}")

    @property
    def is_on(self) -> bool:
        """Whether anything of the teacher is used."""
        return any(vars(self).values())


def full_memory_teacher(checkpoint_path: str | Path, device: torch.device | str | None = None) -> Sam3Tracker:
    """The tracker of a file with its uncompressed memory, frozen and in eval mode; its image backbone is let go.

    Args:
        checkpoint_path: What `sam3.load_model` opens.
        device: Where the tracker goes; default: CUDA where there is one, else the CPU.

    Raises:
        CheckpointError: If the file cannot be read or holds no such memory.
    """
    tracker = load_model(checkpoint_path, "cpu", memory="full").tracker
    if not isinstance(tracker, Sam3Tracker) or isinstance(tracker, EfficientSam3Tracker):
        raise CheckpointError(
            f"{checkpoint_path}: holds no full memory to distil from; name SAM 3 or a student merged into it, or set "
            "all DISTILL weights to 0"
        )
    return tracker.to(find_device(device)).eval().requires_grad_(False)


def distillation_terms(
    student: ClipResult, teacher: ClipResult, coverage_tbhw: Tensor, weights: DistillWeights
) -> dict[str, Tensor]:
    """Unweighted terms ``teacher_mask``, ``teacher_features``, ``teacher_pointers``, as far as their weights are not 0.

    Only frames that read a memory are compared, before any correction: the others are the same in both.

    Args:
        student: What is trained.
        teacher: Of the same clip with the same plan; without gradients.
        coverage_tbhw: The truth, (T, B, h, w), for the teacher's IoU.
        weights: Says which terms are needed.

    Raises:
        ValueError: If the two followed different plans.
    """
    if student.plan != teacher.plan:
        raise ValueError(f"student and teacher follow different plans: {student.plan} and {teacher.plan}")
    frames = sorted(student.conditioned)
    zero = coverage_tbhw.new_zeros(())
    trust_tb = _trust(teacher, coverage_tbhw)
    terms: dict[str, list[Tensor]] = {}
    for t in frames:
        trust = trust_tb[t]
        if weights.mask:
            pair = _first_answer(student, t), _first_answer(teacher, t)
            terms.setdefault("teacher_mask", []).append(_trusted(_mask_error(*pair), trust))
        if weights.features:
            error = _feature_error(student.conditioned[t], teacher.conditioned[t])
            terms.setdefault("teacher_features", []).append(_trusted(error, trust))
        if weights.pointers:
            error = _pointer_error(student.outputs[t].obj_ptr, teacher.outputs[t].obj_ptr)
            terms.setdefault("teacher_pointers", []).append(_trusted(error, trust))
    names = [f"teacher_{name}" for name, weight in vars(weights).items() if weight]
    return {name: torch.stack(terms[name]).mean() if name in terms else zero for name in names}


def forced_features(
    student: EfficientSam3Tracker, features: Sequence[TrackerFeatures], teacher: ClipResult, video_frames: int
) -> dict[int, Tensor]:
    """Frames as the student's memory shows them if it stores what the teacher has stored: the same masks, compressed.

    Neither masks are decoded nor memories encoded, so that this costs little, and an error on one frame is not carried
    to the next.

    Args:
        student: Compresses, and reads what it has compressed.
        features: Of each frame.
        teacher: Of the same clip, its memories not compressed.
        video_frames: Length of the video that the clip stands for.

    Returns:
        (B, C, G, G) of each frame that the teacher has read a memory on, by frame.
    """
    told, plan = teacher.bank.cond | teacher.bank.non_cond, teacher.plan
    own = {t: _compressed(student, record) for t, record in told.items()}
    found = {}
    for t in sorted(teacher.conditioned):
        before = {u: record for u, record in own.items() if u < t or u in plan.prompted}
        bank = MemoryBank()
        for u, record in before.items():
            (bank.cond if u in teacher.bank.cond else bank.non_cond)[u] = record
        found[t] = student.condition(t, features[t], bank, max(video_frames, len(features)))
    return found


def forced_error(
    student: EfficientSam3Tracker,
    features: Sequence[TrackerFeatures],
    teacher: ClipResult,
    coverage_tbhw: Tensor,
    video_frames: int,
) -> Tensor:
    """How far `forced_features` are from the teacher's, as in ``teacher_features`` of `distillation_terms`."""
    found = forced_features(student, features, teacher, video_frames)
    if not found:
        return coverage_tbhw.new_zeros(())
    trust = _trust(teacher, coverage_tbhw)
    return torch.stack([(_feature_error(found[t], teacher.conditioned[t]) * trust[t]).mean() for t in found]).mean()


def distillation_loss(terms: dict[str, Tensor], weights: DistillWeights) -> Tensor:
    """The weighted sum of `distillation_terms`."""
    return sum((getattr(weights, name.removeprefix("teacher_")) * v for name, v in terms.items()), torch.zeros(()))


def _first_answer(result: ClipResult, t: int) -> SamOutput:
    return next(sam for frame, sam in result.answers if frame == t)


def _trust(teacher: ClipResult, coverage_tbhw: Tensor) -> Tensor:
    """What each object counts on each frame, (T, B)."""
    ious, is_tracked = tracked_ious(teacher, coverage_tbhw)
    return torch.where(is_tracked, ious, torch.ones_like(ious))


def _compressed(student: EfficientSam3Tracker, record: FrameRecord) -> FrameRecord:
    dense = record.maskmem_features
    assert dense is not None, "forward_clip makes every frame's memory"
    return dataclasses.replace(record, maskmem_features=student.compress(dense.to(student.maskmem_tpos_enc.dtype)))


def _trusted(error_b: Tensor, trust_b: Tensor) -> Tensor:
    return (error_b * trust_b).mean()


def _mask_error(student: SamOutput, teacher: SamOutput) -> Tensor:
    """(B,): mean over candidates."""
    logits = student.mask_logits.float()
    wanted = teacher.mask_logits.detach().float().sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").flatten(1).mean(1)
    dice = dice_loss(logits.flatten(0, 1), wanted.flatten(0, 1)).view(logits.shape[:2]).mean(1)
    return entropy + dice


def _feature_error(student_bchw: Tensor, teacher_bchw: Tensor) -> Tensor:
    """(B,): predicting each channel's mean costs about 1."""
    wanted = teacher_bchw.detach().float()
    variance = wanted.var(dim=(0, 2, 3), unbiased=False)
    variance = torch.maximum(variance, _LEAST_VARIANCE_SHARE * variance.mean())
    error = (student_bchw.float() - wanted).square().mean(dim=(2, 3))
    return (error / variance).mean(1)


def _pointer_error(student_bc: Tensor, teacher_bc: Tensor) -> Tensor:
    """(B,)."""
    return 1.0 - F.cosine_similarity(student_bc.float(), teacher_bc.detach().float(), dim=1)
