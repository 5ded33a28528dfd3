"""One frame of a video through the image model: features for the tracker, and what the detector finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam3.model.data_misc import FindStage
from sam3.model.detections import ResultFilter
from sam3.model.prompt import Prompt
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_tracker import TrackerFeatures
from sam3.model.scoring import joint_logits
from sam3.model.video_config import VideoConfig


@dataclass(frozen=True)
class Detections:
    """N detections of a frame, in the order of the model's queries."""

    scores: list[float]
    """Presence times class, 0 to 1."""
    masks: Tensor
    """Logits, float32, (N, 4 G, 4 G)."""

    def __len__(self) -> int:
        return len(self.scores)


@dataclass
class EncodedFrame:
    """Features of a frame, as long as it may be asked for again."""

    frame_idx: int
    tracker: TrackerFeatures
    backbone_out: dict[str, Any] | None
    """What the detector reads; None if it was not asked for."""
    detections: dict[int, Detections] = field(default_factory=dict)
    """By the number of the prompt they were made for."""


def encode_frame(
    model: Sam3Image, pixels: np.ndarray, frame_idx: int, need_detector: bool, config: VideoConfig
) -> EncodedFrame:
    """Run trunk and necks.

    Args:
        model: With a tracker.
        pixels: RGB uint8, (H, W, 3).
        frame_idx: Of the frame.
        need_detector: Compute what the detector reads.
        config: How the tracker's features are rounded.
    """
    weight = next(model.parameters())
    image = model.preprocess(pixels)[None].to(weight.device, weight.dtype)
    out = model.backbone.forward_image(image, need_detector=need_detector)
    second_neck = out.pop("sam2_backbone_out")
    if config.bf16_tracker_features:
        rounded = [level.to(torch.bfloat16).to(level.dtype) for level in second_neck["backbone_fpn"]]
        second_neck = second_neck | {"backbone_fpn": rounded}
    return EncodedFrame(frame_idx, model.tracker.frame_features(second_neck), out if need_detector else None)


def detect(
    model: Sam3Image,
    backbone_out: Mapping[str, Any],
    text_features: Mapping[str, Tensor],
    geometry: Prompt | None,
    config: VideoConfig,
) -> Detections:
    """Run the detector on an encoded frame.

    Args:
        model: With a detector and its mask head.
        backbone_out: From `encode_frame`.
        text_features: ``language_features`` and ``language_mask`` of one text.
        geometry: Boxes of this frame.
        config: Thresholds.
    """
    inputs = {**backbone_out, **text_features}
    stage = FindStage.of([0], [0], model.device)
    out = model.forward_grounding(inputs, stage, geometric_prompt=None if geometry is None else geometry.clone())
    logits = out["pred_logits"][0, :, 0].to(torch.float32)
    if config.use_presence and not model.supervise_joint_box_scores:
        logits = joint_logits(logits[:, None], out["presence_logit_dec"][0].to(torch.float32))[:, 0]
    scores, masks = logits.sigmoid(), out["pred_masks"][0].to(torch.float32)
    require_finite(scores, out["pred_logits"].dtype)
    duplicates = ResultFilter(config.score_threshold_detection, nms_iou=config.det_nms_thresh)
    kept = duplicates.select(scores, out["pred_boxes_xyxy"][0], masks)
    if config.suppress_det_close_to_boundary:
        centers = out["pred_boxes"][0, kept, :2]
        is_inside = (centers >= config.boundary_margin) & (centers <= 1 - config.boundary_margin)
        kept = kept[is_inside.all(dim=1)]
    return Detections(scores[kept].tolist(), masks[kept])


def require_finite(scores: Tensor, dtype: torch.dtype) -> None:
    """Refuse what a damaged model or too narrow a precision gives.

    Raises:
        ValueError: If a score is NaN.
    """
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(
            f"the model's scores are not finite (NaN) in {dtype}: its weights are damaged, or this dtype is too narrow "
            "for them (float16 overflows where bfloat16 does not)"
        )
