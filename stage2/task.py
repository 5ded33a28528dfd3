"""What stage 2 trains: a compressed memory between a frozen backbone and frozen SAM heads, on clips.

frames -> backbone -> features --+-> memory attention -> SAM heads -> masks ~ truth (and the full tracker's)
                                 |        ^ tokens                      |
                                 +-> memory encoder -> resampler <------+
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sam3.model.clip_forward import PROMPT_KINDS, ClipPlan, ClipPrompting, ClipResult, draw_plan, forward_clip
from sam3.model.efficient_sam3_train import EfficientSam3Train, features_of_objects, is_trained
from sam3.model.sam3_tracker import Sam3Tracker
from sam3.model.tracker_memory import TrackerFeatures
from sam3_train.checkpoint import load_strict
from sam3_train.clip_judging import absent_loss, judged_answers, tracked_ious
from sam3_train.errors import UserError
from sam3_train.metrics import image_means
from sam3_train.task import Task, freeze
from sam3_train.tracking_losses import tracking_losses
from sam3_train.video_metrics import score_clip
from stage2.batch_errors import naming_videos
from stage2.data.clip_batch import ClipBatch
from stage2.distill import DistillWeights, distillation_loss, distillation_terms, forced_error
from stage2.losses import (
    MemoryDecoder,
    Stage2LossWeights,
    reconstruction_loss,
    temporal_loss,
    watched_compressions,
)
from stage2.start_memory import play_clips, start_from_full

_MODEL = "model."
_ADDED_TO_FEATURES = (".out_proj.weight", ".linear2.weight")
"""Of the memory attention: weights whose outputs are added to the coarse features."""
_SCALES_LIKE_FEATURES = ("memory_attention.norm.",)
_READS_FEATURES = ("maskmem_backbone.pix_feat_proj.",)
_TABLES = ("spatial_perceiver.latents", "maskmem_tpos_enc", "no_obj_embed_spatial")
_IDLE_WHEN_FORCED = (_MODEL + "maskmem_backbone.", _MODEL + "no_obj_embed_spatial", "memory_decoder.")
_MOST_SCALE = 30.0


@dataclass(frozen=True)
class Stage2Options:
    """How the task works."""

    prompting: ClipPrompting = field(default_factory=ClipPrompting)
    losses: Stage2LossWeights = field(default_factory=Stage2LossWeights)
    distill: DistillWeights = field(default_factory=DistillWeights)
    video_frames: int = 16
    """Clips stand for videos of at least this length, so that pointers' positions in time mean what they mean there."""
    presence_batches: int = 0
    """For so many first batches memories are written as if the object score were right: the frozen score may find
    everything absent as long as the memory is bad, and nothing is then learned from what masks leave in it."""
    forced_batches: int = 0
    """For so many first batches the memory stores what the teacher has stored, compressed, and only the features behind
    the memory attention are compared with the teacher's: `stage2.distill.forced_features`."""
    through_masks: bool = False
    """Let gradients of later frames pass through the masks that memories are made of."""
    still_frames: int = 2
    """An image is played as a still clip of so many frames: on the first it is prompted, on the others found again
    through the memory. With 1 nothing reads its memory, and it teaches the reconstruction alone."""
    frames_at_once: int = 8
    """Images that pass the backbone together."""
    feature_dtype: torch.dtype | None = None
    """The backbone computes in it; None: in that of its weights."""
    feature_scale: float = 1.0
    """Standard deviation of the coarse features (`measure_feature_scale`): learning rates of what is added to them grow
    with its root, that of what reads them into the memory falls with it."""
    val_kinds: tuple[str, ...] = PROMPT_KINDS
    """Prompts of the first frame that validation asks with."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least 1"
            for name in ("video_frames", "still_frames", "frames_at_once")
            if getattr(self, name) < 1
        ]
        problems += [
            f"{name} must be at least 0" for name in ("presence_batches", "forced_batches") if getattr(self, name) < 0
        ]
        if self.forced_batches and not self.distill.features:
            problems.append(f"{self.forced_batches} forced_batches compare features alone, whose weight is 0")
        if not self.feature_scale > 0:
            problems.append(f"feature_scale must be positive, got {self.feature_scale}")
        if not self.val_kinds or set(self.val_kinds) - set(PROMPT_KINDS):
            problems.append(f"val_kinds must be some of {PROMPT_KINDS}, got {self.val_kinds}")
        if problems:
            raise ValueError("stage 2: " + "; ".join(problems))


class Stage2Task(Task):
    """See the module's docstring.

    What is random about a batch, its plan and its prompts, comes from torch's global generators, which the loop seeds
    for each epoch and rank and restores when a run is continued.

    Args:
        model: What is trained; everything else of it stays frozen and in eval mode, and out of checkpoints.
        options: See there.
        teacher: The full tracker, from `stage2.distill.full_memory_teacher`, if ``options.distill`` asks for it. Not a
            module of the task: nothing of it is trained, saved or synchronised.

    Raises:
        ValueError: If there is no teacher and one is needed, or a memory to reconstruct and it is not compressed.
    """

    best_metric = "j_and_f"
    best_mode = "max"
    samples = "clips"
    batches_done: Tensor

    def __init__(
        self, model: EfficientSam3Train, options: Stage2Options | None = None, teacher: Sam3Tracker | None = None
    ) -> None:
        super().__init__()
        self.options = options or Stage2Options()
        if self.options.distill.is_on and teacher is None:
            raise ValueError("distillation needs a teacher: the full tracker of the same checkpoint")
        self.model = model
        for name, child in model.named_children():
            if not is_trained(name + "."):
                freeze(child)
        self._teacher = [teacher] if teacher is not None and self.options.distill.is_on else []
        self.memory_decoder: MemoryDecoder | None = None
        if self.options.losses.reconstruction:
            if not model.memory.is_compressed:
                raise ValueError("a memory that is not compressed has nothing to reconstruct: set reconstruction to 0")
            self.memory_decoder = MemoryDecoder(model.settings.mem_dim, model.config.grid_size)
        self.register_buffer("batches_done", torch.zeros((), dtype=torch.long))
        self._batch: int | None = None  # the same on the host, which need not wait for the device then
        self._was_forced = False

    @property
    def teacher(self) -> Sam3Tracker | None:
        """The full tracker, where one is used."""
        return self._teacher[0] if self._teacher else None

    # --- training -----------------------------------------------------------------------------------------------------

    def watching(self, batch: Any) -> AbstractContextManager[None]:
        """A batch that fails ends the run with a `UserError` (out of memory) or `BatchError` that names its videos."""
        return naming_videos(batch)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Loss of a batch of clips.

        Args:
            batch: From `stage2.data.clip_batch.collate_clips`, on the run's device.

        Returns:
            ``loss``; the unweighted terms ``focal``, ``dice``, ``iou``, ``object_score`` and, as far as they count,
            ``absent``, ``temporal``, ``reconstruction``, ``teacher_mask``, ``teacher_features``, ``teacher_pointers``;
            ``iou_tracked``, how well frames without a prompt were tracked (NaN where there are none).
        """
        clips: ClipBatch = batch["clips"]
        options, weights = self.options, self.options.losses
        features, coverage = self.tracked_rows(clips)
        plan = draw_plan(len(features), options.prompting)
        seed, place = int(torch.randint(2**62, ())), int(self.batches_done) if self._batch is None else self._batch
        self._batch = place + 1
        self.batches_done += 1
        taught = self._teach(features, coverage, plan, seed)
        self._was_forced = place < options.forced_batches and taught is not None
        if self._was_forced and taught is not None:
            error = forced_error(self.model, features, taught, coverage, options.video_frames)
            loss = options.distill.features * error
            return {"loss": loss + 0.0 * self._nothing(), "teacher_features": error}
        with watched_compressions(self.model) as compressions:
            result = self._play(self.model, features, coverage, plan, seed, place < options.presence_batches)
        judged = judged_answers(result, coverage)
        terms = tracking_losses(judged, weights, len(features)) if judged else self._no_terms()
        if weights.absent:
            terms["absent"] = absent_loss(judged) if judged else terms["loss"] * 0.0
        if weights.temporal:
            terms["temporal"] = temporal_loss(result, coverage)
        if self.memory_decoder is not None:
            terms["reconstruction"] = reconstruction_loss(self.memory_decoder, compressions)
        for name in ("absent", "temporal", "reconstruction"):
            if name in terms:
                terms["loss"] = terms["loss"] + getattr(weights, name) * terms[name]
        if taught is not None:
            compared = distillation_terms(result, taught, coverage, options.distill)
            terms |= compared
            terms["loss"] = terms["loss"] + distillation_loss(compared, options.distill).to(terms["loss"].device)
        terms["loss"] = terms["loss"] + 0.0 * self._nothing()
        ious, is_tracked = tracked_ious(result, coverage)
        return {**terms, "iou_tracked": (ious * is_tracked).sum() / is_tracked.sum()}

    def _nothing(self) -> Tensor:
        """A number that every trained parameter has a gradient of.

        Not every part acts in every clip (an image alone reads no memory, objects that are never absent need no
        embedding of absence), but every rank must have a gradient of every parameter.
        """
        sums = [parameter.float().sum() for parameter in self.parameters() if parameter.requires_grad]
        return torch.stack(sums).sum()

    @torch.no_grad()
    def _teach(self, features: list[TrackerFeatures], coverage: Tensor, plan: ClipPlan, seed: int) -> ClipResult | None:
        """What the teacher makes of the clip, where there is one."""
        return None if self.teacher is None else self._play(self.teacher, features, coverage, plan, seed, False)

    def _no_terms(self) -> dict[str, Tensor]:
        """Of a clip whose every frame has a mask prompt: there was nothing to answer."""
        zero = self.model.no_mem_embed.new_zeros(())
        return {name: zero.clone() for name in ("loss", "focal", "dice", "iou", "object_score")}

    def tracked_rows(self, clips: ClipBatch) -> tuple[list[TrackerFeatures], Tensor]:
        """Features with a row for each object, and coverage, of what is tracked: an image is played as a still clip."""
        features = features_of_objects(self._features(clips), clips.clip_of_object)
        coverage = clips.coverage_tbhw()
        if clips.length == 1 and self.options.still_frames > 1:
            features, coverage = (
                features * self.options.still_frames,
                coverage.repeat(self.options.still_frames, 1, 1, 1),
            )
        return features, coverage

    def _features(self, clips: ClipBatch) -> list[TrackerFeatures]:
        """Of each frame, a row for each clip: cached, or made by the backbone."""
        options = self.options
        if clips.features is not None:
            dtype = self.model.no_mem_embed.dtype
            return [TrackerFeatures(*(level[:, t].to(dtype) for level in clips.features)) for t in range(clips.length)]
        images = clips.images(self.model.preprocess)
        return self.model.clip_features(images, options.frames_at_once, options.feature_dtype)

    def _play(
        self,
        tracker: Sam3Tracker,
        features: list[TrackerFeatures],
        coverage: Tensor,
        plan: ClipPlan,
        seed: int,
        force_presence: bool,
    ) -> ClipResult:
        return forward_clip(
            tracker,
            features,
            coverage,
            plan,
            self.options.prompting,
            video_frames=self.options.video_frames,
            force_presence=force_presence,
            through_masks=self.options.through_masks,
            generator=torch.Generator().manual_seed(seed),
        )

    def start_from_full(self, full: Sam3Tracker, batches: Iterable[dict[str, Any]]) -> float:
        """Let the memory start as near to the full one as can be written down: `stage2.start_memory`.

        Args:
            full: The full tracker of the same file, on the same device.
            batches: A few, as `forward` takes them; their first frames are prompted with masks.

        Returns:
            How far the features behind the memory attention are from the full memory's, as there.

        Raises:
            UserError: If none of the clips has a second frame.
        """
        played = []
        for batch in batches:
            with naming_videos(batch):
                played.append(play_clips(full, *self.tracked_rows(batch["clips"])))
        try:
            return start_from_full(self.model, full, played)
        except ValueError as error:
            raise UserError(str(error)) from None

    # --- validation ---------------------------------------------------------------------------------------------------

    def validate(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """How well objects are followed from one prompt on the first frame. Nothing is random.

        Returns:
            (C,) each, means over a clip's objects: ``j_and_f``, the mean over the kinds of prompts, ``j_and_f_<kind>``,
            and ``iou``, J alone, the mean over kinds.
        """
        with naming_videos(batch):
            clips: ClipBatch = batch["clips"]
            features, coverage = self.tracked_rows(clips)
            found: dict[str, list[Tensor]] = {"j_and_f": [], "iou": []}
            values = {}
            for kind in self.options.val_kinds:
                result = self._play(self.model, features, coverage, ClipPlan(kind, (0,)), 0, False)
                region, both = (
                    image_means(v, clips.clip_of_object, clips.num_clips) for v in _scores(result, coverage)
                )
                values[f"j_and_f_{kind}"] = both
                found["j_and_f"].append(both)
                found["iou"].append(region)
            return {name: torch.stack(each).mean(0) for name, each in found.items()} | values

    def batch_size(self, batch: Any) -> int:
        """Number of clips."""
        return int(batch["clips"].num_clips)

    # --- optimizer and checkpoints ------------------------------------------------------------------------------------

    def idle_prefixes(self) -> tuple[str, ...]:
        """As long as memories are the teacher's, nothing writes one."""
        return _IDLE_WHEN_FORCED if self._was_forced else ()

    def lr_scale(self, name: str) -> float:
        """What is added to large features must grow large, what reads them must grow less; see ``feature_scale``."""
        scale = min(max(self.options.feature_scale, 1.0 / _MOST_SCALE), _MOST_SCALE)
        own = name.removeprefix(_MODEL)
        if own.startswith(_READS_FEATURES):
            return 1.0 / scale
        is_added = own.startswith("memory_attention.") and own.endswith(_ADDED_TO_FEATURES)
        return scale**0.5 if is_added or own.startswith(_SCALES_LIKE_FEATURES) else 1.0

    def has_weight_decay(self, name: str, parameter: nn.Parameter) -> bool:
        """Latents and tables are what embeddings are elsewhere: they are not decayed, and neither are vectors."""
        return not name.removeprefix(_MODEL).startswith(_TABLES) and super().has_weight_decay(name, parameter)

    def saved_state(self) -> dict[str, Tensor]:
        """What training changes: the memory under its own names, its reconstruction's decoder, the count of steps."""
        kept = {name: value for name, value in self.state_dict().items() if not _is_frozen_name(name)}
        return {name.removeprefix(_MODEL): value for name, value in kept.items()}

    def load_saved_state(self, state_dict: Mapping[str, Tensor], where: str) -> None:
        """Load what `saved_state` returned.

        Raises:
            UserError: If names or shapes differ.
        """
        self._batch = None
        own = {(_MODEL if is_trained(name) else "") + name: value for name, value in state_dict.items()}
        load_strict(self, own, where, allow_missing=[name for name in self.state_dict() if _is_frozen_name(name)])


@torch.no_grad()
def measure_feature_scale(
    model: EfficientSam3Train, batches: Iterable[dict[str, Any]], frames_at_once: int = 8
) -> float:
    """Standard deviation of the coarse features over clips, for ``Stage2Options.feature_scale``.

    Args:
        model: Whose backbone is asked.
        batches: As `Stage2Task.forward` takes them; one is enough.
        frames_at_once: Images that pass the backbone together.

    Raises:
        UserError: If there is no batch, or the features do not vary.
    """
    squares, count = 0.0, 0
    for batch in batches:
        clips: ClipBatch = batch["clips"]
        if clips.features is not None:
            coarse = list(clips.features.coarse.unbind(1))
        else:
            frames = model.clip_features(clips.images(model.preprocess), frames_at_once)
            coarse = [frame.coarse for frame in frames]
        for frame in coarse:
            centred = frame.double() - frame.double().mean(dim=(0, 2, 3), keepdim=True)
            squares += float(centred.square().sum())
            count += centred.numel()
    if not squares > 0.0:
        raise UserError("the coarse features of the first clips do not vary: check the checkpoint and the frames")
    return (squares / count) ** 0.5


def _is_frozen_name(name: str) -> bool:
    return name.startswith(_MODEL) and not is_trained(name.removeprefix(_MODEL))


def _scores(result: ClipResult, coverage_tbhw: Tensor) -> tuple[Tensor, Tensor]:
    """J and J&F of each object on all frames but the first, (B,) each; NaN for clips of one frame."""
    truth = (coverage_tbhw > 0.5)[1:]
    if not len(truth):
        nothing = torch.full((truth.shape[1],), torch.nan, device=truth.device)
        return nothing, nothing
    found = torch.stack([result.outputs[t].pred_masks[:, 0] > 0 for t in range(1, 1 + len(truth))])
    scores = [score_clip(found[:, i], truth[:, i], [True] * len(truth)) for i in range(truth.shape[1])]
    return (
        torch.tensor([score.region for score in scores], device=truth.device),
        torch.tensor([score.j_and_f for score in scores], device=truth.device),
    )
