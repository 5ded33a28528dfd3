"""Every constant of the text-prompted video model's rules."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class VideoConfig:
    """When detections become objects, when objects go, and what is remembered of them.

    The defaults are those of Meta's SAM 3 package 0.1.4. "IoU" is that of masks on the detector's mask grid,
    thresholded at logit 0. Detector scores are probabilities: presence times class.
    """

    score_threshold_detection: float = 0.5
    """Detections with a score strictly above it exist."""
    use_presence: bool = True
    """A score is the probability that the text is on the frame times that of the query; False: the latter alone."""
    det_nms_thresh: float = 0.1
    """A detection whose IoU with a better one is above it is dropped."""
    assoc_iou_thresh: float = 0.1
    """From this IoU on, a detection belongs to a tracked object and can make no new one."""
    trk_assoc_iou_thresh: float = 0.5
    """From this IoU on, a tracked object counts as confirmed by the detector on a frame."""
    new_det_thresh: float = 0.7
    """From this score on, a detection that belongs to no object becomes one. Not asked while nothing is tracked."""
    hotstart_delay: int = 15
    """For so many frames a new object is on probation, and results are held back. 0: no probation."""
    hotstart_unmatch_thresh: int = 8
    """Frames without confirmation, in all, that end an object on probation."""
    hotstart_dup_thresh: int = 8
    """Detections shared with an older object, in all frames together, that end an object on probation."""
    suppress_unmatched_only_within_hotstart: bool = True
    """False: an object whose keep-alive count is used up is hidden until the detector confirms it again."""
    init_trk_keep_alive: int = 30
    max_trk_keep_alive: int = 30
    min_trk_keep_alive: int = -1
    decrease_trk_keep_alive_for_empty_masklets: bool = False
    """Count a frame on which the tracked mask is empty as one without confirmation, for keep-alive alone."""
    suppress_overlapping_based_on_recent_occlusion_threshold: float = 0.7
    """Of two objects that overlap by this IoU, the one that was hidden more recently is hidden. 0: none is."""
    suppress_det_close_to_boundary: bool = False
    """Drop detections whose box has its centre within `boundary_margin` of the image's edge."""
    boundary_margin: float = 0.025
    """As a fraction of width and height."""
    recondition_every_nth_frame: int = 16
    """On frames whose index is a multiple of it, sure detections renew the objects' pointers. 0: never."""
    high_conf_thresh: float = 0.8
    """Least score of a detection that renews an object."""
    high_iou_thresh: float = 0.8
    """Least IoU of that detection with the object."""
    high_track_logit: float = 0.8
    """The tracker's object score, a logit and no probability, must be above it."""
    fill_hole_area: int = 16
    """Holes and specks of at most so many pixels of the mask grid (of the video, after a click) go. 0: they stay."""
    max_num_objects: int = 10_000
    """Objects at a time; of more new ones than fit, those with the best scores are taken. Objects past their probation
    are never dropped, so that where objects come and go without end, this alone bounds memory and time per frame."""
    click_demotion_window: int = 16
    """A click takes the rank of conditioning frame from the detector's frames at most so many frames away."""
    box_reaches_next_frame: bool = True
    """The detector sees a box prompt also on the frame after it, as the released look-ahead has it."""
    bf16_tracker_features: bool = False
    """Round the features that the tracker reads to bfloat16, as the released model does whatever its precision."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if "thresh" in name and isinstance(value, float) and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must lie in 0..1, got {value}")
        for name in (
            "hotstart_delay",
            "hotstart_unmatch_thresh",
            "hotstart_dup_thresh",
            "recondition_every_nth_frame",
            "fill_hole_area",
            "click_demotion_window",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.max_num_objects < 1:
            raise ValueError(f"max_num_objects must be positive, got {self.max_num_objects}")
        if not self.min_trk_keep_alive <= self.init_trk_keep_alive <= self.max_trk_keep_alive:
            raise ValueError(
                f"init_trk_keep_alive {self.init_trk_keep_alive} must lie between min_trk_keep_alive "
                f"{self.min_trk_keep_alive} and max_trk_keep_alive {self.max_trk_keep_alive}"
            )
        if self.hotstart_delay and not (self.hotstart_unmatch_thresh and self.hotstart_dup_thresh):
            raise ValueError(
                "hotstart_unmatch_thresh and hotstart_dup_thresh must be positive while hotstart_delay is "
                f"{self.hotstart_delay}: with 0 every object would end at once"
            )

    def replace(self, **changes: Any) -> VideoConfig:
        """A copy with some fields changed (``dataclasses.replace``)."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def without_temporal_disambiguation(cls) -> VideoConfig:
        """The released ablation: no probation and no renewal. (It also tracks without memory selection.)"""
        return cls(hotstart_delay=0, hotstart_unmatch_thresh=0, hotstart_dup_thresh=0, recondition_every_nth_frame=0)
