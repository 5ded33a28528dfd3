"""The tiny tracker's training task: clips of growing length, simulated prompts, and the losses of SAM 2's recipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from clip_pool import ClipBatch, choose_clips
from teacher_task import balanced_cross_entropy
from torch import Tensor, nn

from sam3.model.clip_forward import ClipPlan, ClipPrompting, ClipResult, draw_plan, forward_clip, is_present
from sam3.model.sam3_tracker import Sam3Tracker
from sam3_train.clip_judging import absent_loss, judged_answers, tracked_ious
from sam3_train.task import Task, freeze
from sam3_train.tracking_losses import TrackingAnswer, TrackingLossWeights, tracking_losses

VIDEO_FRAMES = 16
"""Clips stand for videos of at least this length, so that pointers' positions in time mean what they mean in those."""
PROMPTING = ClipPrompting(num_prompted=(1, 2), num_corrected=(0, 1), clicks_per_frame=1, mask_share=0.4, box_share=0.3)
LARGE_WEIGHTS = (".out_proj.weight", ".linear2.weight", ".encoder.norm.weight", ".encoder.norm.bias")
LARGE_LR_SCALE = 6.0
"""Coarse features are some 30 times as large as what layers give from normalised inputs."""
SMALL_LR_SCALE = 0.03
"""For the weights that make them as small in the memory encoder."""
MASK_LOSS = TrackingLossWeights(iou=2.0, others=0.5)
BALANCED_WEIGHT = 2.0
ABSENT_WEIGHT = 0.5


class TrackingTask(Task):
    """Batch of clips in, losses out. Trunk and necks are not here at all: clips come as features."""

    best_metric: ClassVar[str] = "iou_tracked"
    best_mode: ClassVar[str] = "max"
    steps_done: Tensor

    def __init__(
        self,
        tracker: Sam3Tracker,
        num_objects: int = 2,
        lengths: tuple[int, ...] = (4,),
        steps_per_length: int = 1,
        hint_steps: int = 0,
        heads_lr_scale: float = 0.3,
        memory_frames: tuple[int, ...] = (),
        mask_loss: TrackingLossWeights = MASK_LOSS,
    ) -> None:
        """
        Args:
            tracker: From `tracker_init.init_for_tracking`.
            num_objects: Most objects of each clip.
            lengths: Frames of a clip, for each part of the training.
            steps_per_length: Length of such a part; the last length stays.
            hint_steps: Over so many steps a balanced cross entropy, which all candidates share, gives way to the focal
                loss, and the loss of `marked` fades; until then presence is forced. With the focal loss alone masks
                stay small for long.
            heads_lr_scale: Learning rate of the SAM heads, relative to the memory's.
            memory_frames: How many recent frames are read, drawn from these in each step; none given: as in tracking.
                Fewer make a step faster, and say no less about the frame before.
            mask_loss: Weights of the losses, once nothing is hinted.
        """
        super().__init__()
        self.tracker = tracker
        self.num_objects = num_objects
        self.lengths = lengths
        self.steps_per_length = max(1, steps_per_length)
        self.hint_steps = hint_steps
        self.heads_lr_scale = heads_lr_scale
        self.memory_frames = memory_frames
        self.mask_loss = mask_loss
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.long))
        self.marked = nn.Conv2d(tracker.config.hidden_dim, 1, 1)
        """A throw-away head: what the memory has told the features must by itself say where the object is."""
        for unused in (tracker.sam_mask_decoder.conv_s0, tracker.sam_mask_decoder.conv_s1):
            freeze(unused)  # the features were computed with them
        tracker.no_mem_pos_enc.requires_grad_(False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch of clips, with cuts, objects and prompts drawn at random."""
        step = int(self.steps_done)
        part = min(step // self.steps_per_length, len(self.lengths) - 1)
        clips = choose_clips(batch, self.lengths[part], self.num_objects, shuffle=True)
        hint = max(0.0, 1.0 - step / self.hint_steps) if self.hint_steps else 0.0
        plan = draw_plan(len(clips.features), PROMPTING)
        with self._drawn_memory():
            result = forward_clip(
                self.tracker,
                clips.features,
                clips.coverage_tbhw,
                plan,
                PROMPTING,
                video_frames=VIDEO_FRAMES,
                force_presence=hint > 0.0,
                through_masks=False,
            )
        self.steps_done += 1
        answers = judged_answers(result, clips.coverage_tbhw)
        loss = self.mask_loss
        weights = replace(loss, focal=(1.0 - hint) * loss.focal, others=max(hint, loss.others))
        terms = tracking_losses(answers, weights)
        terms["marked"] = self._marked_loss(result, clips)
        terms["absent"] = absent_loss(answers)
        terms["loss"] = terms["loss"] + ABSENT_WEIGHT * terms["absent"]
        if hint:
            terms["balanced"] = balanced_loss(answers)
            terms["loss"] = terms["loss"] + hint * (BALANCED_WEIGHT * terms["balanced"] + terms["marked"])
        iou, is_tracked = tracked_ious(result, clips.coverage_tbhw)
        return {**terms, "iou_tracked": _mean(iou, is_tracked)}

    def validate(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """IoU on frames without a prompt, per clip, where the first frame got a mask, a box or a click."""
        devices = [batch["coverage"].device] if batch["coverage"].is_cuda else []
        found: dict[str, Tensor] = {}
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            clips = choose_clips(batch, batch["coverage"].shape[1], self.num_objects, shuffle=False)
            for kind in ("mask", "box", "click"):
                found[f"iou_{kind}"] = self._track(clips, kind)
        found["iou_tracked"] = torch.stack(list(found.values())).mean(dim=0)
        return found

    def batch_size(self, batch: Any) -> int:
        """Number of clips."""
        return len(batch["coverage"])

    def lr_scale(self, name: str) -> float:
        """The SAM heads already know what they do; what is added to the large features must grow large."""
        if ".sam_" in name:
            return self.heads_lr_scale
        if ".pix_feat_proj." in name:
            return SMALL_LR_SCALE
        return LARGE_LR_SCALE if name.startswith("tracker.transformer.") and name.endswith(LARGE_WEIGHTS) else 1.0

    @contextmanager
    def _drawn_memory(self) -> Iterator[None]:
        settings = self.tracker.settings
        if self.memory_frames:
            drawn = self.memory_frames[int(torch.randint(len(self.memory_frames), ()))]
            self.tracker.settings = settings.replace(memory_frames=drawn)
        try:
            yield
        finally:
            self.tracker.settings = settings

    def _track(self, clips: ClipBatch, kind: str) -> Tensor:
        result = forward_clip(
            self.tracker, clips.features, clips.coverage_tbhw, ClipPlan(kind, (0,)), video_frames=VIDEO_FRAMES
        )
        iou, is_tracked = tracked_ious(result, clips.coverage_tbhw)
        per_object = torch.where(is_tracked, iou, torch.nan).nanmean(dim=0)
        owners = clips.clip_of_object
        return torch.stack([per_object[owners == clip].nanmean() for clip in owners.unique()])

    def _marked_loss(self, result: ClipResult, clips: ClipBatch) -> Tensor:
        losses = []
        for t, conditioned in result.conditioned.items():
            coverage = clips.coverage_tbhw[t]
            side = conditioned.shape[-1]
            target = nn.functional.adaptive_avg_pool2d(coverage[:, None], side)[:, 0]
            present = is_present(coverage).float()
            loss = balanced_cross_entropy(self.marked(conditioned / conditioned.std().detach())[:, 0], target)
            losses.append((loss * present).sum() / present.sum().clamp(min=1))
        return torch.stack(losses).mean() if losses else clips.coverage_tbhw.new_zeros(())


def balanced_loss(answers: list[TrackingAnswer]) -> Tensor:
    """Cross entropy where the inside and the outside of each object weigh the same, over all candidates."""
    losses = []
    for answer in answers:
        num_masks = answer.mask_logits.shape[1]
        targets = answer.target.repeat_interleave(num_masks, dim=0)
        loss = balanced_cross_entropy(answer.mask_logits.flatten(0, 1), targets).view(-1, num_masks).mean(dim=1)
        losses.append((loss * answer.present).sum() / len(loss))
    return torch.stack(losses).mean()


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    return (values.detach() * chosen).sum() / chosen.sum().clamp(min=1)
