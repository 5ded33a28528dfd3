"""The training task of the tiny teacher's detector side: phrases and exemplars in, set losses out.

The trunk learned to segment and to name (`teacher_names`) and is not touched, so that the SAM heads keep what they
know.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from detector_queries import Queries, draw_queries, normalised_boxes
from teacher_data import COLOUR_NAMES, KINDS, flip
from torch import Tensor, nn

from sam3.model.data_misc import FindStage
from sam3.model.matcher import BinaryHungarianMatcherV2, SetTargets
from sam3.model.sam3_image import Sam3Image
from sam3.sam.layers import MLP
from sam3_train.metrics import mask_iou
from sam3_train.set_losses import SetLossWeights, semantic_loss, set_losses
from sam3_train.task import Task, freeze

VALIDATION_KINDS = ("category", "kind", "colour", "exemplar", "absent")
SCORE_THRESHOLD = 0.5
LOSS_WEIGHTS = SetLossWeights(score_alpha=0.5, score_gamma=0.0)
"""Cross entropy in place of the focal loss: with 24 queries there are no thousands of easy negatives to discount, and
scores that are probabilities can be compared with a threshold of 0.5."""
MARKED_WEIGHT = 4.0


class DetectorTask(Task):
    """Batch of scenes in, losses out: set losses and hints. Trunk and SAM heads stay as they are.

    Boxes and masks are learned from all objects of a scene, whatever the prompt; scores tell those that it asks for.
    """

    best_metric: ClassVar[str] = "iou_category"
    best_mode: ClassVar[str] = "max"

    steps_done: Tensor

    def __init__(
        self,
        model: Sam3Image,
        prompts_per_image: int = 5,
        masked_per_image: int = 1,
        one_to_many_repeats: int = 3,
        hint_steps: int = 0,
    ) -> None:
        """
        Args:
            model: With its detector.
            prompts_per_image: Prompts drawn for each scene that are answered with boxes alone.
            masked_per_image: Further prompts for each scene that are answered with masks too, at twice the cost.
            one_to_many_repeats: Queries per object in the branch where several may claim the same one.
            hint_steps: So many steps only the word hints are trained, which is many times cheaper than prompts.
        """
        super().__init__()
        self.model = model
        self.matcher = BinaryHungarianMatcherV2()
        self.prompts_per_image = prompts_per_image
        self.masked_per_image = masked_per_image
        self.one_to_many_repeats = one_to_many_repeats
        self.hint_steps = hint_steps
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.long))
        vision = model.backbone.vision_backbone
        freeze(vision.trunk)
        self.hints = WordHints(model.config.hidden_dim)
        self.marked = nn.Linear(model.config.hidden_dim, 1)
        if vision.sam2_convs is not None:
            freeze(vision.sam2_convs)
        if model.inst_interactive_predictor is not None:
            freeze(model.inst_interactive_predictor)
        for unread in self._unread_parts():
            unread.requires_grad_(False)

    def _unread_parts(self) -> list[nn.Module | nn.Parameter]:
        """What released files hold and no output depends on."""
        backbone, head = self.model.backbone, self.model.segmentation_head
        if head is None or backbone.language_backbone is None:
            raise ValueError("the detector is trained whole: build the model with text encoder and segmentation head")
        coarsest = backbone.vision_backbone.convs[-self.model.config.neck.scalp :]
        pixel_decoder = head.pixel_decoder
        text_projection = backbone.language_backbone.encoder.text_projection
        return [*coarsest, pixel_decoder.conv_layers[-1], pixel_decoder.norms[-1], text_projection]

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch of scenes, flipped and prompted at random.

        Args:
            batch: Collated items of a `teacher_data.ScenePool`.
        """
        batch = flip(batch)
        backbone_out = self._encode(batch["image"])
        kind, colour = self.hints(backbone_out["backbone_fpn"][-1], self._words(), batch)
        loss = kind + colour
        terms = {"kind": kind.detach(), "colour": colour.detach()}
        if int(self.steps_done) >= self.hint_steps:
            with without_masks(self.model):
                judged = self._judge(backbone_out, batch, self.prompts_per_image)
            masked = self._judge(backbone_out, batch, self.masked_per_image)
            share = self.masked_per_image / (self.masked_per_image + self.prompts_per_image)
            loss = loss + (1 - share) * judged.pop("loss") + share * masked.pop("loss")
            terms |= masked | judged
        self.steps_done += 1
        return {"loss": loss, **terms}

    def _judge(self, backbone_out: dict[str, Any], batch: dict[str, Tensor], per_image: int) -> dict[str, Tensor]:
        """Draw prompts, answer them, and judge the answers: the terms of the set losses and ``marked``."""
        queries = draw_queries(batch, per_image)
        outputs = self._ground(dict(backbone_out), queries)
        targets, masks = self._targets(batch, queries)
        judged = set_losses(outputs, targets, masks, self.matcher, LOSS_WEIGHTS, self.one_to_many_repeats)
        # The encoder's image tokens must tell by themselves, coarsely, which cells the prompt means.
        logits = self.marked(outputs["encoder_hidden_states"]).permute(1, 2, 0)
        side = backbone_out["backbone_fpn"][-1].shape[-1]
        coarse = nn.functional.adaptive_avg_pool2d(masks, side)
        marked = semantic_loss(logits.unflatten(-1, (side, side)), targets, coarse)
        return {**judged, "loss": judged["loss"] + MARKED_WEIGHT * marked, "marked": marked.detach()}

    def validate(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Per scene: overlap of everything found with everything meant, for each kind of prompt; for phrases that
        nothing answers, how often nothing was found. The same prompts each time."""
        devices = [batch["image"].device] if batch["image"].is_cuda else []
        values: dict[str, Tensor] = {}
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            backbone_out = self._encode(batch["image"])
            words = self.hints.accuracy(backbone_out["backbone_fpn"][-1], self._words(), batch)
            values |= dict(zip(("right_kind", "right_kind_cells", "right_colour_cells"), words, strict=True))
            for kind in VALIDATION_KINDS:
                queries = draw_queries(batch, 1, {kind: 1.0})
                outputs = self._ground(dict(backbone_out), queries)
                targets, masks = self._targets(batch, queries)
                values[f"iou_{kind}"] = found_iou(outputs, targets, masks)
                if kind == "category":
                    values["loss"] = set_losses(outputs, targets, masks, self.matcher, LOSS_WEIGHTS)["loss"]
        return values

    def batch_size(self, batch: Any) -> int:
        """Number of scenes."""
        return len(batch["image"])

    def _encode(self, images_u8: Tensor) -> dict[str, Any]:
        """What the detector reads of a batch of images."""
        images = (images_u8.float() / 255.0 - 0.5) / 0.5
        return self.model.backbone.forward_image(images, need_sam2=False)

    def _words(self) -> Tensor:
        """Features of the words for all kinds and colours, (25, C): the mean over each text's tokens."""
        out = self.model.backbone.forward_text([*KINDS, *COLOUR_NAMES], device=self.model.device)
        valid = (~out["language_mask"]).T[..., None].float()
        return (out["language_features"] * valid).sum(0) / valid.sum(0)

    def _ground(self, backbone_out: dict[str, Any], queries: Queries) -> dict[str, Any]:
        device = self.model.device
        texts = sorted(set(queries.texts))
        backbone_out |= self.model.backbone.forward_text(texts, device=device)
        num_images = len(backbone_out["backbone_fpn"][-1])
        find = FindStage(
            img_ids=torch.arange(num_images, device=device).repeat_interleave(len(queries.texts) // num_images),
            text_ids=torch.tensor([texts.index(text) for text in queries.texts], device=device),
        )
        return self.model.forward_grounding(backbone_out, find, None, queries.to_prompt())

    def _targets(self, batch: dict[str, Tensor], queries: Queries) -> tuple[SetTargets, Tensor]:
        per_image = len(queries.texts) // len(batch["image"])
        boxes = normalised_boxes(batch["boxes"], batch["image"].shape[-1])
        is_real = torch.arange(boxes.shape[1], device=boxes.device) < batch["count"][:, None]
        boxes, is_real = (values.repeat_interleave(per_image, dim=0) for values in (boxes, is_real))
        targets = SetTargets(boxes, is_real, queries.members)
        return targets, (batch["coverage"].float() / 255.0).repeat_interleave(per_image, dim=0)


class WordHints(nn.Module):
    """Names objects by comparing the image's features with those of the words; nothing of it is shipped.

    It brings image and text into one space before the detector has to find anything with them. Each object is named
    twice: from the mean over the cells that it touches, which asks for features of outlines, and from each cell inside
    it, which asks the trunk to carry them there.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.pooled_norm = nn.LayerNorm(dim)
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, map_bchw: Tensor, words_wc: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Cross entropy of kind and of colour, each the mean of objects named whole and cell by cell."""
        cells, cell_names, objects, object_names = self._labelled(map_bchw, batch)
        words = words_wc - words_wc.mean(0)
        losses = []
        for i, part in enumerate((words[: len(KINDS)], words[len(KINDS) :])):
            by_cell = nn.functional.cross_entropy(self._logits(self.norm(cells), part), cell_names[:, i])
            whole = nn.functional.cross_entropy(self._logits(self.pooled_norm(objects), part), object_names[:, i])
            losses.append(by_cell + whole)
        return losses[0], losses[1]

    def accuracy(self, map_bchw: Tensor, words_wc: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Share named right: kind of a whole object, kind of a cell, colour of a cell."""
        cells, cell_names, objects, object_names = self._labelled(map_bchw, batch)
        words = words_wc - words_wc.mean(0)
        kinds, colours = words[: len(KINDS)], words[len(KINDS) :]
        return (
            (self._logits(self.pooled_norm(objects), kinds).argmax(-1) == object_names[:, 0]).float().mean(),
            (self._logits(self.norm(cells), kinds).argmax(-1) == cell_names[:, 0]).float().mean(),
            (self._logits(self.norm(cells), colours).argmax(-1) == cell_names[:, 1]).float().mean(),
        )

    def _logits(self, features_mc: Tensor, words_wc: Tensor) -> Tensor:
        return features_mc @ words_wc.T * self.log_scale.exp() * words_wc.shape[1] ** -0.5

    @staticmethod
    def _labelled(map_bchw: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features of the cells inside objects (M, C) and of whole objects (N, C), each with kind and colour."""
        tokens = map_bchw.permute(0, 2, 3, 1)
        coverage = nn.functional.adaptive_avg_pool2d(batch["coverage"].float() / 255.0, map_bchw.shape[-1])
        most, owner = coverage.max(dim=1)
        inside = most > 0.5
        scene = torch.arange(len(owner), device=owner.device)[:, None, None].expand_as(owner)
        touched = (coverage > 0.02).float()
        pooled = torch.einsum("bnhw,bhwc->bnc", touched, tokens) / touched.sum((2, 3))[..., None].clamp(min=1)
        real = torch.arange(coverage.shape[1], device=owner.device) < batch["count"][:, None]
        names = batch["categories"]
        return tokens[inside], names[scene[inside], owner[inside]], pooled[real], names[real]


def found_iou(outputs: dict[str, Any], targets: SetTargets, masks_bthw: Tensor) -> Tensor:
    """IoU of the union of all found masks with the union of all that were meant, (B,); 1 if both are empty."""
    scores = outputs["pred_logits"][..., 0].sigmoid() * outputs["presence_logit_dec"].sigmoid()
    kept = (scores > SCORE_THRESHOLD)[..., None, None]
    found = ((outputs["pred_masks"] > 0) & kept).any(dim=1)
    meant = ((masks_bthw > 0.5) & targets.answers_bt[..., None, None]).any(dim=1)
    return mask_iou(found, meant)


@contextlib.contextmanager
def without_masks(model: Sam3Image) -> Iterator[None]:
    """Inside, the model answers with boxes alone: masks are more than half of what a prompt costs."""
    head, model.segmentation_head = model.segmentation_head, None
    try:
        yield
    finally:
        model.segmentation_head = head


@torch.no_grad()
def init_for_training(model: Sam3Image, seed: int) -> None:
    """Steps from the usual initialisation that a decoder this small profits from.

    In the fusion encoder, image tokens start to read the words that resemble them: queries and keys of its cross
    attention share one orthogonal map. The queries' first boxes lie on a grid over the image, not at random, and each
    query starts to look into its box: the further a cell is outside, the less it is attended to. The finer maps start
    as those that the SAM heads read, which show where objects end.
    """
    if model.transformer is None:
        raise ValueError("this model has no detector: build it with enable_detector=True")
    generator = torch.Generator().manual_seed(seed)
    dim = model.config.hidden_dim
    for name, weight in model.transformer.encoder.named_parameters():
        if name.endswith("cross_attn_image.in_proj_weight"):
            tied = nn.init.orthogonal_(torch.empty(dim, dim), gain=2.0, generator=generator)
            weight[:dim].copy_(tied)
            weight[dim : 2 * dim].copy_(tied)
    decoder = model.transformer.decoder
    for embed in (decoder.boxRPB_embed_x, decoder.boxRPB_embed_y):
        _look_inside(embed)
    count = model.config.decoder.num_queries
    columns = math.ceil(count**0.5)
    rows = math.ceil(count / columns)
    index = torch.arange(count)
    boxes = torch.stack([(index % columns + 0.5) / columns, (index // columns + 0.5) / rows], dim=1)
    boxes = torch.cat([boxes, torch.full_like(boxes, 0.3)], dim=1)
    decoder.reference_points.weight.copy_(torch.logit(boxes))
    vision = model.backbone.vision_backbone
    if vision.sam2_convs is not None:
        for own, other in list(zip(vision.convs, vision.sam2_convs, strict=True))[: vision.num_levels - 1]:
            own.load_state_dict(other.state_dict())


def _look_inside(embed: MLP) -> None:
    """Make the bias 0 between the two edges and fall outside, in each head at another rate.

    The input is how far a cell is right of the first and of the second edge, on a logarithmic scale.
    """
    hidden, out = (cast(nn.Linear, layer) for layer in embed.layers)
    slopes = torch.linspace(2.0, 20.0, out.out_features)
    hidden.weight[:2] = torch.tensor([[-1.0, 0.0], [0.0, 1.0]])
    hidden.bias[:2] = 0.0
    out.weight.mul_(0.1)
    out.weight[:, :2] = -slopes[:, None]
    out.bias.zero_()
