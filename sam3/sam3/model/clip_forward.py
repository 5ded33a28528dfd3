"""A clip in training: simulated prompts, corrections from errors, and every answer of the mask decoder.

After SAM 2 (https://arxiv.org/abs/2408.00714, appendix D.2.2). Works with any tracker that keeps `Sam3Tracker`'s
methods ``condition``, ``decode`` and ``make_record``. The tracker is in training mode or not as the caller left it;
gradients reach everything that requires them, through the memory too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sam3.model.memory_bank import MemoryBank
from sam3.model.prompt_sampling import (
    LABEL_NEGATIVE,
    LABEL_PADDING,
    LABEL_POSITIVE,
    PointPrompts,
    box_prompts,
    boxes_from_masks,
    correction_clicks,
    jitter_boxes,
    uniform_clicks,
)
from sam3.model.sam3_tracker import NO_OBJECT_LOGIT, Sam3Tracker, TrackerFeatures, TrackOutput
from sam3.sam.mask_decoder import SamOutput

PROMPT_KINDS = ("mask", "box", "click")
MAX_PROMPT_LOGIT = 32.0
"""Earlier logits are cut to plus and minus this before they are a mask prompt again."""
_CERTAIN_LOGIT = 10.0


@dataclass(frozen=True)
class ClipPrompting:
    """How often which prompts are simulated."""

    mask_share: float = 0.5
    box_share: float = 0.25
    """What is left goes to single clicks."""
    num_prompted: tuple[int, int] = (1, 2)
    """Fewest and most frames that start with a prompt, the first frame always being one."""
    num_corrected: tuple[int, int] = (1, 2)
    """Fewest and most frames whose answer is corrected by clicks, prompted frames first; none after mask prompts."""
    clicks_per_frame: int = 7
    """Corrections on each of them."""
    click_from_truth_share: float = 0.1
    """Corrections that ignore the answer so far and fall anywhere on the object."""
    box_noise: float = 0.1
    """Standard deviation of a box corner relative to the box's side."""
    max_box_shift: float = 20 / 1008
    """No corner moves further than this share of the frame's side."""

    def __post_init__(self) -> None:
        shares = {"mask_share": self.mask_share, "box_share": self.box_share}
        shares["click_from_truth_share"] = self.click_from_truth_share
        for name, value in shares.items():
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"clip prompting: {name} must lie in 0..1, got {value}")
        if self.mask_share + self.box_share > 1.0:
            raise ValueError(
                f"clip prompting: mask_share {self.mask_share} and box_share {self.box_share} add up to more than 1"
            )
        for name, least, (fewest, most) in (
            ("num_prompted", 1, self.num_prompted),
            ("num_corrected", 0, self.num_corrected),
        ):
            if not least <= fewest <= most:
                raise ValueError(f"clip prompting: {name} {fewest, most} must be fewest and most, at least {least}")
        if self.clicks_per_frame < 0:
            raise ValueError(f"clip prompting: clicks_per_frame must be at least 0, got {self.clicks_per_frame}")


@dataclass(frozen=True)
class ClipPlan:
    """What happens on which frame of a clip; the same for all its objects."""

    kind: str
    """One of `PROMPT_KINDS`."""
    prompted: tuple[int, ...]
    """Frames that start with a prompt and read no memory."""
    corrected: tuple[int, ...] = ()
    """Frames whose answer is corrected; they condition other frames as prompted ones do."""

    def __post_init__(self) -> None:
        if self.kind not in PROMPT_KINDS:
            raise ValueError(f"clip plan: kind {self.kind!r} is not one of {PROMPT_KINDS}")
        if not self.prompted:
            raise ValueError("clip plan: no frame is prompted, so nothing says what to track")
        if self.kind == "mask" and self.corrected:
            raise ValueError("clip plan: a mask prompt is the answer, it can't be corrected")


class ClipAnswer(NamedTuple):
    """One answer of the mask decoder."""

    frame_idx: int
    sam: SamOutput
    """The candidates as decoded, also for objects that are found absent."""


@dataclass
class ClipResult:
    """Everything a clip gave."""

    plan: ClipPlan
    answers: list[ClipAnswer] = field(default_factory=list)
    """In the order of work: prompted frames first; a mask prompt gives none."""
    outputs: dict[int, TrackOutput] = field(default_factory=dict)
    """The last output of each frame, by frame; objects that are found absent have no mask there."""
    conditioned: dict[int, Tensor] = field(default_factory=dict)
    """Features as the objects see them through the memory, of frames that read it: (B, C, G, G)."""
    bank: MemoryBank = field(default_factory=MemoryBank)


def draw_plan(num_frames: int, prompting: ClipPrompting, generator: torch.Generator | None = None) -> ClipPlan:
    """Choose prompts for a clip. At least one frame of several is left to be tracked.

    Args:
        num_frames: Of the clip.
        prompting: What is how likely.
        generator: Source of randomness; None: torch's global generator.
    """
    draw = float(torch.rand((), generator=generator))
    by_share = ((prompting.mask_share, "mask"), (prompting.mask_share + prompting.box_share, "box"), (2.0, "click"))
    kind = next(name for limit, name in by_share if draw < limit)
    others = (torch.randperm(num_frames - 1, generator=generator) + 1).tolist()
    num_prompted = _draw_count(prompting.num_prompted, max(1, num_frames - 1), generator)
    prompted = (0, *others[: num_prompted - 1])
    num_corrected = _draw_count(prompting.num_corrected, num_frames, generator)
    if kind == "mask" or not prompting.clicks_per_frame:
        num_corrected = 0
    return ClipPlan(kind, prompted, (*prompted, *others[num_prompted - 1 :])[:num_corrected])


def forward_clip(
    tracker: Sam3Tracker,
    features: Sequence[TrackerFeatures],
    coverage_tbhw: Tensor,
    plan: ClipPlan,
    prompting: ClipPrompting | None = None,
    *,
    video_frames: int | None = None,
    force_presence: bool = False,
    through_masks: bool = True,
    generator: torch.Generator | None = None,
) -> ClipResult:
    """Track B objects through a clip of T frames.

    Args:
        tracker: The network.
        features: Of each frame: one row that the objects share, or a row for each, where the objects of several clips
            of the same length are tracked at once.
        coverage_tbhw: Share of each cell that each object covers, 0..1, (T, B, h, w); empty where it is absent. Clicks
            are drawn on this grid.
        plan: From `draw_plan`.
        prompting: Noise of the prompts and number of corrections; None: SAM 2's.
        video_frames: Length of the video that the clip stands for, which scales the pointers' positions in time; None:
            T. Long videos behave as 16 frames do.
        force_presence: Write memories and pointers as if the object score were right. A head that finds objects absent
            by mistake otherwise stops every gradient through their masks.
        through_masks: Let gradients of later frames pass through the masks that memories are made of, into earlier
            answers. Over many frames they grow; without them, memory and answers still learn from every frame.
        generator: Source of randomness; None: torch's global generator.

    Raises:
        ValueError: If numbers of frames or objects differ, or the plan names a frame that the clip does not have.
    """
    num_frames = len(features)
    if coverage_tbhw.ndim != 4 or len(coverage_tbhw) != num_frames:
        raise ValueError(f"coverage must be ({num_frames}, B, h, w), got {tuple(coverage_tbhw.shape)}")
    outside = [t for t in (*plan.prompted, *plan.corrected) if not 0 <= t < num_frames]
    if outside:
        raise ValueError(f"the plan names frame {outside[0]}, but the clip has {num_frames} frames")
    player = _Player(
        tracker,
        features,
        coverage_tbhw,
        plan,
        prompting or ClipPrompting(),
        max(num_frames, video_frames or num_frames),
        force_presence,
        through_masks,
        generator,
    )
    for t in (*plan.prompted, *(t for t in range(num_frames) if t not in plan.prompted)):
        player.play_frame(t)
    return player.result


def is_present(coverage: Tensor) -> Tensor:
    """Whether each object is there at all: (..., h, w) -> bool (...). Half of one cell at least."""
    return (coverage > 0.5).flatten(-2).any(dim=-1)


class _Player:
    """The state of `forward_clip`."""

    def __init__(
        self,
        tracker: Sam3Tracker,
        features: Sequence[TrackerFeatures],
        coverage_tbhw: Tensor,
        plan: ClipPlan,
        prompting: ClipPrompting,
        video_frames: int,
        force_presence: bool,
        through_masks: bool,
        generator: torch.Generator | None,
    ) -> None:
        self.tracker, self.features, self.coverage, self.plan = tracker, features, coverage_tbhw, plan
        self.prompting, self.video_frames, self.generator = prompting, video_frames, generator
        self.force_presence, self.through_masks = force_presence, through_masks
        side = tracker.config.image_size_px
        self.frame_hw = (side, side)
        self.present = is_present(coverage_tbhw)
        self.result = ClipResult(plan)

    def play_frame(self, t: int) -> None:
        """Prompt or track, correct, and remember."""
        tracker, features, is_prompted = self.tracker, self.features[t], t in self.plan.prompted
        masks = self._mask_prompt(t) if is_prompted and self.plan.kind == "mask" else None
        points: PointPrompts | None = None
        if masks is not None:
            output = tracker.use_mask_as_output(features, masks)
        else:
            if is_prompted:
                conditioned = tracker.without_memory(features)
                points = self._point_prompt(t)
            else:
                conditioned = tracker.condition(t, features, self.result.bank, self.video_frames)
                self.result.conditioned[t] = conditioned
            output = self._decode(t, conditioned, points)
            if t in self.plan.corrected:
                output, points = self._correct(t, conditioned, output, points)
        if self.force_presence and output.sam is not None:
            output = _with_presence(tracker, output, output.sam, self.present[t])
        written = output if self.through_masks else output._replace(pred_masks=output.pred_masks.detach())
        record = tracker.make_record(features, written, masks, points is not None)
        store = self.result.bank.cond if is_prompted or t in self.plan.corrected else self.result.bank.non_cond
        store[t] = record
        self.result.outputs[t] = output

    def _decode(
        self, t: int, conditioned: Tensor, points: PointPrompts | None, previous: Tensor | None = None
    ) -> TrackOutput:
        tracker, num_objects = self.tracker, self.coverage.shape[1]
        inputs = None if points is None else (points.points_xy_px, points.labels)
        multimask = tracker.use_multimask(0 if points is None else points.labels.shape[1])
        output = tracker.decode(self.features[t], conditioned, num_objects, inputs, previous, multimask)
        assert output.sam is not None, "decode gives candidates"
        self.result.answers.append(ClipAnswer(t, output.sam))
        return output

    def _correct(
        self, t: int, conditioned: Tensor, output: TrackOutput, points: PointPrompts | None
    ) -> tuple[TrackOutput, PointPrompts | None]:
        truth = self.coverage[t] > 0.5
        for _ in range(self.prompting.clicks_per_frame):
            assert output.sam is not None, "mask prompts are not corrected"
            shown = _best_masks(output.sam).detach()
            found = shown[:, 0] > 0
            if float(torch.rand((), generator=self.generator)) < self.prompting.click_from_truth_share:
                found = truth  # nothing is wrong then, and the click falls anywhere on the object
            click = self._inside_cells(correction_clicks(truth, found, generator=self.generator))
            points = click if points is None else points.followed_by(click)
            output = self._decode(t, conditioned, points, shown.clamp(-MAX_PROMPT_LOGIT, MAX_PROMPT_LOGIT))
        return output, points

    def _mask_prompt(self, t: int) -> Tensor:
        """Sharp masks of the size that mask prompts have, (B, 1, S, S)."""
        side = self.tracker.mask_prompt_size
        coverage = self.coverage[t][:, None].float()
        return (F.interpolate(coverage, size=(side, side), mode="bilinear", align_corners=False) > 0.5).float()

    def _point_prompt(self, t: int) -> PointPrompts:
        """A box or a click on each object, a negative click anywhere for those that are absent."""
        truth, present = self.coverage[t] > 0.5, self.present[t]
        somewhere = torch.where(present[:, None, None], truth, True)
        click = self._inside_cells(uniform_clicks(somewhere, self.generator))
        labels = torch.where(present[:, None], LABEL_POSITIVE, LABEL_NEGATIVE)
        if self.plan.kind == "click":
            return PointPrompts(click.points_xy_px, labels, self.frame_hw)
        grid_hw = (truth.shape[-2], truth.shape[-1])
        scale = self.frame_hw[0] / grid_hw[0]
        corners = (boxes_from_masks(somewhere) + 0.5) * scale - 0.5
        shift = self.prompting.max_box_shift * self.frame_hw[0]
        boxes = jitter_boxes(corners, self.frame_hw, self.prompting.box_noise, shift, self.generator)
        box = box_prompts(boxes, self.frame_hw)
        padding = torch.full_like(labels, LABEL_PADDING)
        points = torch.where(present[:, None, None], box.points_xy_px, click.points_xy_px.expand(-1, 2, -1))
        return PointPrompts(
            points, torch.where(present[:, None], box.labels, torch.cat([labels, padding], dim=1)), self.frame_hw
        )

    def _inside_cells(self, clicks: PointPrompts) -> PointPrompts:
        """Clicks drawn on the coverage's coarse grid, each moved inside its cell, in pixels of the model input."""
        points = clicks.points_xy_px
        device = self.generator.device if self.generator is not None else points.device
        shift = torch.rand(points.shape, generator=self.generator, device=device).to(points.device) * 0.8 - 0.4
        return PointPrompts(points + shift, clicks.labels, clicks.frame_hw).scaled_to(self.frame_hw)


def _best_masks(sam: SamOutput) -> Tensor:
    """Logits of the candidate with the highest predicted IoU, float32 (B, 1, h, w)."""
    best = sam.ious.argmax(dim=1)
    return sam.mask_logits[torch.arange(len(best), device=best.device), best][:, None].to(torch.float32)


def _with_presence(tracker: Sam3Tracker, output: TrackOutput, sam: SamOutput, present_b: Tensor) -> TrackOutput:
    """The output as it would be if the object score had been right."""
    present = present_b[:, None]
    best = sam.ious.argmax(dim=1)
    pointers = tracker.obj_ptr_proj(sam.mask_tokens[torch.arange(len(best), device=best.device), best])
    return output._replace(
        pred_masks=torch.where(present[..., None, None], _best_masks(sam), NO_OBJECT_LOGIT),
        obj_ptr=tracker.blend_pointers(pointers, present),
        object_score_logits=_CERTAIN_LOGIT * (2 * present.to(torch.float32) - 1),
    )


def _draw_count(bounds: tuple[int, int], limit: int, generator: torch.Generator | None) -> int:
    return min(limit, int(torch.randint(bounds[0], bounds[1] + 1, (), generator=generator)))
