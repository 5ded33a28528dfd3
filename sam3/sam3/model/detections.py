"""From the detector's raw outputs to what a user sees: the queries that count, boxes in pixels, full-size masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from sam3.finite import require_finite
from sam3.model.box_ops import cxcywh_to_xyxy
from sam3.preprocess import Preprocess

RAW_KEYS = ("pred_logits", "presence_logit_dec", "pred_boxes", "pred_masks")
"""What of ``forward_grounding`` is kept, so that another threshold needs no other forward pass."""
PIXELS_PER_CHUNK = 2**25
"""Mask pixels that are enlarged at a time: 128 MiB of logits."""


@dataclass(frozen=True)
class ResultFilter:
    """Which of the model's queries are results."""

    confidence_threshold: float = 0.5
    """Scores strictly above it count."""
    nms_iou: float | None = None
    """Drop what overlaps a better result by more than this IoU, of masks where the model makes them, else of boxes.
    None: the model's queries rarely repeat an object, and the released processor drops none."""
    top_k: int | None = None
    """Keep at most so many, the best."""
    sort_by_score: bool = False
    """Best first; otherwise in the order of the queries, as the released processor."""

    def __post_init__(self) -> None:
        if not _is_share(self.confidence_threshold):
            raise ValueError(f"confidence_threshold must lie in 0..1, got {self.confidence_threshold!r}")
        if self.nms_iou is not None and not _is_share(self.nms_iou):
            raise ValueError(f"nms_iou must lie in 0..1 or be None, got {self.nms_iou!r}")
        if self.top_k is not None and not is_positive_int(self.top_k):
            raise ValueError(f"top_k must be a positive integer or None, got {self.top_k!r}")

    def select(self, scores: Tensor, boxes_xyxy: Tensor, mask_logits: Tensor | None) -> Tensor:
        """Indices of the results.

        Args:
            scores: (N,), 0 to 1.
            boxes_xyxy: (N, 4) in any unit that is the same for x and y alike, e.g. normalised.
            mask_logits: (N, h, w) or None.

        Returns:
            int64, (n,), n <= N.
        """
        kept = torch.nonzero(scores > self.confidence_threshold)[:, 0]
        kept = kept[scores[kept].argsort(descending=True, stable=True)]
        if self.nms_iou is not None and len(kept) > 1:
            iou = pairwise_box_iou(boxes_xyxy[kept]) if mask_logits is None else pairwise_mask_iou(mask_logits[kept])
            kept = kept[_not_suppressed(iou, self.nms_iou).to(kept.device)]
        kept = kept[: self.top_k]
        return kept if self.sort_by_score else kept.sort().values


@dataclass(frozen=True)
class MaskOptions:
    """Which forms of the full-size masks are made; each costs H x W values for every result."""

    probabilities: bool = True
    """``masks_logits``, which holds probabilities in spite of its released name."""
    logits: bool = False
    """``mask_logits``, the real ones."""


def detections(
    raw: Mapping[str, Tensor],
    index: int,
    original_hw: tuple[int, int],
    preprocess: Preprocess,
    result_filter: ResultFilter,
    mask_options: MaskOptions,
    is_joint_score: bool = False,
) -> dict[str, Tensor]:
    """Results of one prompt.

    Args:
        raw: `RAW_KEYS` of what ``forward_grounding`` returned for B prompts; ``pred_masks`` may be missing.
        index: Which of the B prompts.
        original_hw: Height and width of the prompt's image.
        preprocess: How that image became the model's input.
        result_filter: Which queries count.
        mask_options: Which forms of the masks are made.
        is_joint_score: The class logits hold the presence already.

    Returns:
        ``scores`` (n,) and ``boxes`` (n, 4), x0, y0, x1, y1 in pixels of the image and not clamped to it; with
        ``pred_masks`` also ``masks`` (n, 1, H, W) bool, ``masks_logits`` and ``mask_logits`` as asked for. float32.

    Raises:
        NonFiniteError: If the model's scores are not finite.
    """
    scores = raw["pred_logits"][index, :, 0].to(torch.float32).sigmoid()
    if not is_joint_score:
        scores = scores * raw["presence_logit_dec"][index].to(torch.float32).sigmoid()
    require_finite(scores, "scores", raw["pred_logits"].dtype)
    boxes = cxcywh_to_xyxy(raw["pred_boxes"][index].to(torch.float32))
    low_res = raw["pred_masks"][index] if "pred_masks" in raw else None
    kept = result_filter.select(scores, boxes, low_res)
    share_x, share_y = image_share(preprocess, original_hw)
    height, width = original_hw
    size = boxes.new_tensor([width / share_x, height / share_y] * 2)
    result = {"scores": scores[kept], "boxes": boxes[kept] * size}
    if low_res is not None:
        result |= full_size_masks(low_res[kept], original_hw, preprocess, mask_options)
    return result


def image_share(preprocess: Preprocess, original_hw: tuple[int, int]) -> tuple[float, float]:
    """Which part of the model's input is image and not padding, in x and in y: 1.0, 1.0 unless it is letterboxed."""
    height, width = preprocess.resized_hw(original_hw)
    return width / preprocess.size_px, height / preprocess.size_px


def full_size_masks(
    low_res: Tensor, original_hw: tuple[int, int], preprocess: Preprocess, options: MaskOptions
) -> dict[str, Tensor]:
    """Enlarge masks to the image, some at a time: beside the results only `PIXELS_PER_CHUNK` logits (at least one
    mask) are ever in memory.

    Args:
        low_res: Logits, (n, h, w).
        original_hw: Height and width of the image.
        preprocess: How the image became the model's input.
        options: Which forms are wanted.

    Returns:
        ``masks`` (n, 1, H, W), logit above 0, which is probability above 0.5; and what ``options`` asks for.
    """
    shape = (len(low_res), 1, *original_hw)
    result = {"masks": low_res.new_empty(shape, dtype=torch.bool)}
    if options.probabilities:
        result["masks_logits"] = low_res.new_empty(shape, dtype=torch.float32)
    if options.logits:
        result["mask_logits"] = low_res.new_empty(shape, dtype=torch.float32)
    step = max(1, PIXELS_PER_CHUNK // (original_hw[0] * original_hw[1]))
    for start in range(0, len(low_res), step):
        chunk = slice(start, start + step)
        logits = preprocess.masks_to_image(low_res[chunk, None].to(torch.float32), original_hw)
        torch.gt(logits, 0, out=result["masks"][chunk])
        if options.logits:
            result["mask_logits"][chunk] = logits
        if options.probabilities:
            torch.sigmoid(logits, out=result["masks_logits"][chunk])
    return result


def pairwise_box_iou(boxes_xyxy: Tensor) -> Tensor:
    """(n, 4) -> (n, n) intersection over union; 0 where both boxes are empty."""
    top_left = torch.maximum(boxes_xyxy[:, None, :2], boxes_xyxy[None, :, :2])
    bottom_right = torch.minimum(boxes_xyxy[:, None, 2:], boxes_xyxy[None, :, 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(dim=-1)
    areas = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).clamp(min=0).prod(dim=-1)
    return intersection / (areas[:, None] + areas - intersection).clamp(min=1e-9)


def pairwise_mask_iou(mask_logits: Tensor) -> Tensor:
    """Logits (n, h, w) -> (n, n) intersection over union of logit > 0; 0 where both masks are empty."""
    inside = (mask_logits > 0).flatten(1).to(torch.float32)
    intersection = inside @ inside.T
    areas = inside.sum(dim=1)
    return intersection / (areas[:, None] + areas - intersection).clamp(min=1)


def is_positive_int(value: Any) -> bool:
    """Whether a setting is a whole number of at least 1, of Python's or of numpy's."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _is_share(value: Any) -> bool:
    """Whether a setting is a number in 0..1; NaN is none."""
    return isinstance(value, (Real, Tensor)) and 0.0 <= float(value) <= 1.0


def _not_suppressed(iou: Tensor, limit: float) -> Tensor:
    """Greedy: rows come best first, and one that overlaps a kept better one too much is dropped. Bool, (n,), CPU."""
    overlaps = (iou > limit).cpu()
    kept = torch.ones(len(overlaps), dtype=torch.bool)
    for i in range(1, len(overlaps)):
        kept[i] = not bool((overlaps[i, :i] & kept[:i]).any())
    return kept
