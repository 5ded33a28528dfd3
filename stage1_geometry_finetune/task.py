"""What the geometry fine-tune trains: a student on whose features SAM 3 answers as on its teacher's.

    images -> student -> features -> neck, heads -> answers  ~  answers of the teacher's features to the same prompts

The teacher's features come with the batch, stored or computed in the loop; its answers are computed here without
gradients, image by image, and kept where prompts repeat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from sam3.model.student_encoder import StudentEncoder
from sam3_train.losses import masked_mse
from sam3_train.metrics import image_means, mask_iou
from sam3_train.student_task import StudentTask
from stage1_geometry_finetune.frozen_heads import FrozenHeads
from stage1_geometry_finetune.losses import GeometryLossWeights, object_weights
from stage1_geometry_finetune.matching import MatchOptions
from stage1_geometry_finetune.prompt_formats import trim_points
from stage1_geometry_finetune.prompts import PromptBatch
from stage1_geometry_finetune.refinement import refine_prompts
from stage1_geometry_finetune.routes import DetectorRoute, Route, SamRoute, join_targets
from stage1_geometry_finetune.teacher_cache import TeacherCache

_TERMS = ("mask_bce", "mask_dice", "score", "presence", "box")
MEGABYTE = 2**20


@dataclass(frozen=True)
class GeometryOptions:
    """How the task works; the weights of its loss are `GeometryLossWeights`."""

    train_neck: bool = False
    """Also train the necks of the routes that run."""
    train_mask_decoder: bool = False
    """Also train what makes the masks of the routes that run."""
    refine_rounds: int = 0
    """Rounds after the first, each with further clicks where student and teacher disagree."""
    refine_clicks: int = 1
    """Clicks per object and round."""
    cache_bytes: int = 0
    """Memory for the teacher's answers to prompts that come back; 0: none is kept."""
    objects_per_pass: int = 4
    """Objects that run through the detector at a time: 1.4 GB each at full size while the backward pass runs."""
    has_padding: bool = False
    """Whether images are letterboxed: masks are then judged inside the image only."""
    channels_last: bool = True
    match: MatchOptions = field(default_factory=MatchOptions)


class GeometryTask(StudentTask):
    """See the module's docstring.

    Args:
        student: What is trained.
        heads: Frozen parts of the routes that run. Not a module of the task: nothing of them is trained, saved or
            synchronised, but for the parts that ``options`` names, of which the student has its own copy.
        variance_c: What each channel's squared error is divided by, (C,).
        weights: Of the loss.
        options: See there.
    """

    best_metric = "truth_iou"
    best_mode = "max"
    variance_c: Tensor

    def __init__(
        self,
        student: StudentEncoder,
        heads: FrozenHeads,
        variance_c: Tensor,
        weights: GeometryLossWeights | None = None,
        options: GeometryOptions | None = None,
    ) -> None:
        self.weights = weights or GeometryLossWeights()
        self.options = options or GeometryOptions()
        super().__init__(student, self.options.channels_last)
        self.register_buffer("variance_c", variance_c.detach().float().clone(), persistent=False)
        student_heads, trained = heads.trainable_copy(
            neck=self.options.train_neck,
            mask_decoder=self.options.train_mask_decoder,
            predicts_scores=self.weights.score > 0 and self.weights.presence > 0,
        )
        self.trained_parts = TrainedParts(trained)
        self._student_heads = student_heads
        self.routes = self._build_routes(heads, student_heads)
        self.cache = TeacherCache(self.options.cache_bytes) if self.options.cache_bytes else None

    @classmethod
    def from_config(
        cls, student: StudentEncoder, heads: FrozenHeads, variance_c: Tensor, cfg: CfgNode, has_padding: bool = False
    ) -> GeometryTask:
        """The task that a config describes; ``has_padding``: whether its preprocessing letterboxes."""
        distill, prompts = cfg.DISTILL, cfg.PROMPTS
        weights = GeometryLossWeights(
            embedding=distill.EMBEDDING,
            mask_bce=distill.MASK_BCE,
            mask_dice=distill.MASK_DICE,
            score=distill.SCORE,
            presence=distill.PRESENCE,
            box=distill.BOX,
            detector=distill.ROUTE_DETECTOR,
            sam=distill.ROUTE_SAM,
        )
        options = GeometryOptions(
            train_neck=cfg.MODEL.TRAIN_NECK,
            train_mask_decoder=cfg.MODEL.TRAIN_MASK_DECODER,
            refine_rounds=prompts.REFINE_ROUNDS,
            refine_clicks=prompts.REFINE_POINTS,
            cache_bytes=int(distill.TEACHER_CACHE_MB * MEGABYTE) if prompts.FIXED else 0,
            objects_per_pass=distill.OBJECTS_PER_PASS,
            has_padding=has_padding,
            channels_last=cfg.TRAIN.CHANNELS_LAST,
            match=MatchOptions(distill.MATCH_TOP, distill.MATCH_SCORE, distill.MATCH_MASK_COST),
        )
        return cls(student, heads, variance_c, weights, options)

    def _build_routes(self, teacher: FrozenHeads, student: FrozenHeads) -> list[tuple[float, Route]]:
        """Weight and route of those that run."""
        routes: list[tuple[float, Route]] = []
        size = self.options.objects_per_pass
        if self.weights.detector:
            routes.append((self.weights.detector, DetectorRoute(teacher, student, self.options.match, size)))
        if self.weights.sam:
            routes.append((self.weights.sam, SamRoute(teacher, student, 4 * size)))
        return routes

    # --- training -----------------------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Loss of a training batch.

        Args:
            batch: ``image`` (B, 3, S, S), ``teacher`` (B, C, G, G), ``valid`` (B, 1, G, G) and ``prompts``, a
                `PromptBatch`, on one device.

        Returns:
            ``loss``; ``mse``; for each route, named ``detector_*`` and ``sam_*``: the unweighted terms ``mask_bce``,
            ``mask_dice``, ``score``, ``presence``, ``box`` (means over rounds) and ``mask_iou``, how well the compared
            masks agree in the first round; ``objects`` per image; with a cache ``cache_hits``, the share of images
            whose teacher answers were known.
        """
        features = self.student_features(batch).float()
        mse = masked_mse(features, batch["teacher"], batch["valid"], self.variance_c)
        terms, loss = {"mse": mse}, self.weights.embedding * mse
        before = (self.cache.hits, self.cache.misses) if self.cache is not None else (0, 0)
        if batch["prompts"].num_objects:
            for factor, route in self.routes:
                judged = self.route_terms(route, features, batch)
                loss = loss + factor * sum(
                    (getattr(self.weights, name) * judged[name] for name in _TERMS if name in judged), mse.new_zeros(())
                )
                terms |= {f"{route.name}_{name}": value for name, value in judged.items()}
        terms["objects"] = mse.new_tensor(batch["prompts"].num_objects / len(features))
        if self.cache is not None:
            hits, misses = self.cache.hits - before[0], self.cache.misses - before[1]
            if hits + misses:
                terms["cache_hits"] = mse.new_tensor(hits / (hits + misses))
        # Not every part is used in every batch (a batch of boxes reads one of four mask tokens), but every rank must
        # have a gradient of every parameter.
        loss = loss + 0.0 * sum((p.float().sum() for p in self.trained_parts.parameters()), mse.new_zeros(()))
        return {"loss": loss, **terms}

    def route_terms(self, route: Route, features: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Unweighted terms of one route over all rounds.

        Args:
            route: One of ``routes``.
            features: The student's, (B, C, G, G).
            batch: As for `forward`, with at least one object.
        """
        prompts: PromptBatch = batch["prompts"]
        inside = self._inside(batch, prompts)
        weights = object_weights(prompts.image_of_object)
        student_maps = route.maps(features, of_teacher=False)
        teacher = TeacherMaps(route, batch["teacher"])
        rounds = 1 + self.options.refine_rounds
        total: dict[str, Tensor] = {}
        for number in range(rounds):
            targets = self.teacher_targets(teacher, prompts, inside, use_cache=number == 0)
            judged = route.judge(student_maps, prompts, targets, weights, inside)
            for name in _TERMS:
                if name in judged.terms:
                    total[name] = total.get(name, 0.0) + judged.terms[name] / rounds
            if number == 0:
                total["mask_iou"] = judged.terms["mask_iou"]
            if number + 1 < rounds:
                student, wanted = judged.student_masks, judged.teacher_masks
                if inside is not None:
                    student = student & inside
                prompts = refine_prompts(prompts, student, wanted, self.options.refine_clicks)
        return total

    @torch.no_grad()
    def teacher_targets(
        self, maps: TeacherMaps, prompts: PromptBatch, inside_kmm: Tensor | None, use_cache: bool = True
    ) -> Any:
        """What the teacher says to the prompts, image by image.

        An image's answers are known together or computed together, so they are the same whatever the cache holds.
        """
        parts = []
        for image in range(maps.num_images):
            objects = (prompts.image_of_object == image).nonzero()[:, 0]
            if not len(objects):
                continue
            own = trim_points(prompts.select(objects))
            own = own._replace(image_of_object=torch.zeros_like(own.image_of_object))
            cache = self.cache if use_cache else None
            key = (maps.route.name, *own.prompt_ids.tolist()) if cache is not None else ()
            answer = None if cache is None else cache.get(key, objects.device)
            if answer is None:
                answer = maps.route.targets(
                    maps.of_image(image), own, None if inside_kmm is None else inside_kmm[objects]
                )
                if cache is not None:
                    cache.put(key, answer)
            parts.append(answer)
        return join_targets(parts)

    def _inside(self, batch: dict[str, Any], prompts: PromptBatch) -> Tensor | None:
        """Where the objects' images are no padding, bool (K, M, M); None: everywhere."""
        if not self.options.has_padding:
            return None
        side = prompts.masks.shape[-1]
        return F.interpolate(batch["valid"].float(), size=(side, side))[:, 0][prompts.image_of_object] > 0

    # --- validation ---------------------------------------------------------------------------------------------------

    def validate(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Overlap of what a user would get with the annotated masks and with the teacher's.

        Each object is asked for with its box alone and with its clicks alone, as far as it has them. Nothing is random.

        Returns:
            (B,) each, NaN for an image without objects: ``truth_iou`` and ``teacher_iou``, the means over all routes
            and both kinds; ``<route>_<kind>_truth_iou`` and ``<route>_<kind>_teacher_iou`` with the kinds ``box`` and
            ``click``; ``teacher_truth_iou``, how well the teacher does itself; and ``mse``.
        """
        features = self.student_features(batch).float()
        mse = partial(masked_mse, channel_var_c=self.variance_c)
        images = zip(features.split(1), batch["teacher"].split(1), batch["valid"].split(1), strict=True)
        values = {"mse": torch.stack([mse(*each) for each in images])}
        asked = {"box": batch["prompts"].boxes_only(), "click": batch["prompts"].points_only()}
        truth: list[Tensor] = []
        imitated: list[Tensor] = []
        teacher_truth: list[Tensor] = []
        for _, route in self.routes:
            own_maps = route.maps(features, of_teacher=False)
            teacher_maps = route.maps(batch["teacher"], of_teacher=True)
            for kind, prompts in asked.items():
                prompts = prompts.select(prompts.has_box | prompts.is_point.any(1))
                inside = self._inside(batch, prompts)
                own, theirs = route.masks(own_maps, prompts, False), route.masks(teacher_maps, prompts, True)
                if inside is not None:
                    own, theirs = own & inside, theirs & inside
                means = [
                    image_means(mask_iou(a, b), prompts.image_of_object, len(features))
                    for a, b in ((own, prompts.masks), (own, theirs), (theirs, prompts.masks))
                ]
                name = f"{route.name}_{kind}"
                values |= {f"{name}_truth_iou": means[0], f"{name}_teacher_iou": means[1]}
                for collected, mean in zip((truth, imitated, teacher_truth), means, strict=True):
                    collected.append(mean)
        if truth:
            for name, collected in (
                ("truth_iou", truth),
                ("teacher_iou", imitated),
                ("teacher_truth_iou", teacher_truth),
            ):
                values[name] = torch.stack(collected).mean(0)
        return values

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def saved_state(self) -> dict[str, Tensor]:
        """The student under its published names, and trained parts, as wholes, under their released ones."""
        return super().saved_state() | self._student_heads.released_parts(self.trained_parts.names)

    def load_saved_state(self, state_dict: Mapping[str, Tensor], where: str) -> None:
        """Load what `saved_state` returned.

        Raises:
            UserError: If names or shapes are not those of this student and these parts.
        """
        released = {k: v for k, v in state_dict.items() if k.startswith(("detector.", "tracker."))}
        super().load_saved_state({k: v for k, v in state_dict.items() if k not in released}, where)
        self._student_heads.load_released_parts(self.trained_parts.names, released, where)


class TrainedParts(nn.Module):
    """Parameters of the heads that a run trains beside the student; the heads themselves are no module of the task."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.names = tuple(parameters)
        for name, parameter in parameters.items():
            self.register_parameter(name.replace(".", "/"), parameter)


class TeacherMaps:
    """The neck's maps of the teacher's features, each image's made when it is first asked for."""

    def __init__(self, route: Route, features_bchw: Tensor) -> None:
        self.route = route
        self.features = features_bchw
        self._made: dict[int, Any] = {}

    @property
    def num_images(self) -> int:
        return len(self.features)

    def of_image(self, index: int) -> Any:
        if index not in self._made:
            self._made[index] = self.route.maps(self.features[index : index + 1], of_teacher=True)
        return self._made[index]
