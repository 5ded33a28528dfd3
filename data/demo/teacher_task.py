"""The tiny teacher's training task: simulated prompts, rounds of corrections, and the losses of SAM 2's recipe."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from teacher_data import augment, choose_objects
from torch import Tensor, nn

from sam3.model.prompt_sampling import (
    LABEL_PADDING,
    PointPrompts,
    box_prompts,
    correction_clicks,
    jitter_boxes,
    uniform_clicks,
)
from sam3.model.sam3_image import Sam3Image
from sam3.sam.heads import SamFeatures
from sam3.sam.mask_decoder import SamOutput
from sam3.sam.transformer import Attention
from sam3_train.losses import dice_loss, iou_l1_loss, sigmoid_focal_loss
from sam3_train.metrics import mask_iou
from sam3_train.task import Task, freeze

FOCAL_WEIGHT = 20.0
IOU_WEIGHT = 2.0
OTHERS_SHARE = 0.3
"""Weight of the two candidates that are not the best one. SAM gives them none; here a prompt is rarely ambiguous, and a
candidate that the IoU head takes by mistake should not be arbitrary."""
BOX_SHARE = 0.5
"""Of the first prompts; the others are single clicks."""
ABSENT_SHARE = 0.06
"""Of the prompts: a click where no object is, which only the object score learns from."""
MAX_PROMPT_LOGIT = 32.0


class PromptableTask(Task):
    """Batch of scenes in, losses out.

    Each object of a batch gets a box or a click, then ``num_corrections`` clicks where the mask is still wrong, each
    with the previous logits as mask prompt. Every answer is judged: the single mask, and of the three candidates the
    best one; the IoU head on all four; the object score.
    """

    best_metric: ClassVar[str] = "iou_box"
    best_mode: ClassVar[str] = "max"
    steps_done: Tensor

    def __init__(
        self,
        model: Sam3Image,
        prompts_per_image: int = 4,
        num_corrections: int = 1,
        balanced_steps: int = 0,
        more_corrections_from: int = 0,
    ) -> None:
        """
        Args:
            model: With SAM heads.
            prompts_per_image: Objects that are prompted in each scene.
            num_corrections: Clicks after the first prompt.
            balanced_steps: So many steps a balanced cross entropy stands in for the focal loss, to which it gives way
                over as many steps again, and there are no corrections. With the focal loss alone a fresh model answers
                "nothing" for a long time, because objects fill few pixels of a scene.
            more_corrections_from: From this step on there is one correction more; 0 means never.
        """
        super().__init__()
        self.model = model
        self.balanced_steps = balanced_steps
        self.more_corrections_from = more_corrections_from
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.long))
        self.hints = Hints(model.config.hidden_dim)
        # Deep supervision reads the image tokens as the prompt has marked them.
        model.heads.sam_mask_decoder.transformer.register_forward_hook(self._keep_marked_tokens)
        # The detector's neck belongs to the model but not to this loss.
        freeze(model.backbone.vision_backbone.convs)
        sam2_convs = model.backbone.vision_backbone.sam2_convs
        assert sam2_convs is not None, "the model has SAM heads"
        for coarsest in sam2_convs[-model.config.neck.scalp :]:
            coarsest.requires_grad_(False)  # nothing reads it
        self.prompts_per_image = prompts_per_image
        self.num_corrections = num_corrections

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch of scenes, augmented, with prompts drawn at random.

        Args:
            batch: Collated items of a `teacher_data.ScenePool`.

        Returns:
            ``loss``, its terms ``focal``, ``dice``, ``iou_head``, ``object``, and the mean IoU after the first prompt,
            ``iou``, and after the corrections, ``iou_corrected``, on the logits' grid.
        """
        chosen = augment(choose_objects(batch, self.prompts_per_image, shuffle=True))
        means, _, _ = self._play(chosen)
        self.steps_done += 1
        return means

    def validate(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss, and the IoU per scene for boxes and for clicks, with the same prompts each time."""
        devices = [batch["image"].device] if batch["image"].is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            chosen = choose_objects(batch, self.prompts_per_image, shuffle=False)
            means, iou, is_box = self._play(chosen)
        nan = iou.new_full((), float("nan"))
        by_scene = (len(batch["image"]), -1)
        box = torch.where(is_box, iou, nan).view(by_scene).nanmean(dim=1)
        click = torch.where(is_box, nan, iou).view(by_scene).nanmean(dim=1)
        return {"loss": means["loss"], "iou_box": box, "iou_click": click, "iou_corrected": means["iou_corrected"]}

    def batch_size(self, batch: Any) -> int:
        """Number of scenes."""
        return len(batch["image"])

    def _play(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Prompt, judge, correct. Returns the means, and per prompt the first answer's IoU (NaN if absent) and kind."""
        features, fine_map, target, present, prompts, is_box = self._prepare(batch)
        num_images, per_image = batch["coverage"].shape[:2]
        image_index = torch.arange(num_images, device=target.device).repeat_interleave(per_image)
        selected = features.select(image_index)
        terms: dict[str, list[Tensor]] = {n: [] for n in ("focal", "dice", "balanced", "iou_head", "object", "marked")}
        mask_prompt: Tensor | None = None
        ious: list[Tensor] = []
        step = int(self.steps_done)
        num_corrections = self._num_corrections(step)
        for round_index in range(num_corrections + 1):
            output = self._answer(selected, prompts, mask_prompt)
            self._judge(output, target, present, terms)
            terms["marked"].append(self.hints.marked_loss(self._marked_pnc, target, present))
            shown = self._shown(output, prompts)
            iou = mask_iou(shown > 0, target > 0.5)
            ious.append(torch.where(present, iou, iou.new_full((), float("nan"))))
            if round_index < num_corrections:
                mask_prompt = shown[:, None].clamp(-MAX_PROMPT_LOGIT, MAX_PROMPT_LOGIT)
                clicks = self._jittered(correction_clicks(target > 0.5, shown > 0)).scaled_to(prompts.frame_hw)
                prompts = prompts.followed_by(clicks)
        means = {name: torch.stack(values).mean() for name, values in terms.items()}
        balanced_share = min(1.0, max(0.0, 2.0 - step / max(1, self.balanced_steps)))
        pixels = balanced_share * means["balanced"] + (1 - balanced_share) * FOCAL_WEIGHT * means["focal"]
        means["instance"] = self.hints.instance_loss(fine_map, batch["coverage"])
        means["loss"] = pixels + means["dice"] + IOU_WEIGHT * means["iou_head"] + means["object"]
        means["loss"] = means["loss"] + means["marked"] + means["instance"]
        means["iou"], means["iou_corrected"] = ious[0].nanmean(), ious[-1].nanmean()
        return means, ious[0], is_box

    def _keep_marked_tokens(self, module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        self._marked_pnc = output[1]

    def _num_corrections(self, step: int) -> int:
        if self.training and step < self.balanced_steps:
            return 0
        return self.num_corrections + bool(self.more_corrections_from and step >= self.more_corrections_from)

    def _prepare(self, batch: dict[str, Tensor]) -> tuple[SamFeatures, Tensor, Tensor, Tensor, PointPrompts, Tensor]:
        preprocess = self.model.preprocess
        images = torch.stack([preprocess.normalize(image) for image in batch["image"]])
        backbone_out = self.model.backbone.forward_image(images, need_detector=False)["sam2_backbone_out"]
        features = self.model.heads.image_features(backbone_out)
        target = batch["coverage"].flatten(0, 1).to(torch.float32) / 255.0
        frame_hw = (images.shape[-2], images.shape[-1])
        boxes = jitter_boxes(batch["boxes"].flatten(0, 1), frame_hw, max_shift_px=12.0)
        box = box_prompts(boxes, frame_hw)
        draw = torch.rand(len(target), device=target.device)
        occupied = (batch["occupied"] > 0).repeat_interleave(batch["coverage"].shape[1], dim=0)
        has_room = ~occupied.flatten(1).all(dim=1)
        absent = (draw > 1 - ABSENT_SHARE) & has_room
        target = torch.where(absent[:, None, None], torch.zeros_like(target), target)
        clickable = torch.where(absent[:, None, None], ~occupied, target > 0.5)
        click = self._jittered(uniform_clicks(_never_empty(clickable, target))).scaled_to(frame_hw)
        is_box = draw < BOX_SHARE
        padding = torch.full_like(click.labels, LABEL_PADDING)
        points = torch.where(is_box[:, None, None], box.points_xy_px, click.points_xy_px.expand(-1, 2, -1))
        labels = torch.where(is_box[:, None], box.labels, torch.cat([click.labels, padding], dim=1))
        return (
            features,
            backbone_out["backbone_fpn"][0],
            target,
            ~absent,
            PointPrompts(points, labels, frame_hw),
            is_box,
        )

    def _jittered(self, clicks: PointPrompts) -> PointPrompts:
        """Clicks were drawn on a coarse grid: move each one inside its cell."""
        shift = torch.rand_like(clicks.points_xy_px) * 0.6 - 0.3
        return PointPrompts(clicks.points_xy_px + shift, clicks.labels, clicks.frame_hw)

    def _answer(self, selected: SamFeatures, prompts: PointPrompts, mask_prompt: Tensor | None) -> SamOutput:
        heads = self.model.heads
        image_index = torch.arange(len(prompts.labels), device=prompts.labels.device)
        return heads.forward_prompts(selected, prompts.points_xy_px, prompts.labels, mask_prompt, image_index)

    def _judge(self, output: SamOutput, target: Tensor, present: Tensor, terms: dict[str, list[Tensor]]) -> None:
        """Append this round's loss terms; masks count only where the object is present."""
        num_prompts, num_masks = output.mask_logits.shape[:2]
        logits = output.mask_logits.flatten(0, 1).float()
        targets = target.repeat_interleave(num_masks, dim=0)
        focal = sigmoid_focal_loss(logits, targets).view(num_prompts, num_masks)
        dice = dice_loss(logits, targets).view(num_prompts, num_masks)
        best = (FOCAL_WEIGHT * focal + dice)[:, 1:].argmin(dim=1, keepdim=True) + 1
        weight = present.float() / present.float().sum().clamp(min=1)
        share = torch.full_like(focal, OTHERS_SHARE).scatter(1, best, 1.0)
        share[:, 0] = 1.0
        share = share / share.sum(dim=1, keepdim=True) * weight[:, None]
        terms["focal"].append((focal * share).sum())
        terms["dice"].append((dice * share).sum())
        balanced = balanced_cross_entropy(logits, targets).view(num_prompts, num_masks)
        terms["balanced"].append((balanced * share).sum())
        iou_error = iou_l1_loss(output.ious.flatten(), logits, targets).view(num_prompts, num_masks)
        terms["iou_head"].append((iou_error.mean(dim=1) * weight).sum())
        score = output.object_score_logits.float()[:, 0]
        terms["object"].append(nn.functional.binary_cross_entropy_with_logits(score, present.float()))

    def _shown(self, output: SamOutput, prompts: PointPrompts) -> Tensor:
        """The logits a user would be shown: of three candidates for a single click, else the single mask. (P, G, G)."""
        with torch.no_grad():
            num_points = (prompts.labels != LABEL_PADDING).sum(dim=1)
            best = output.ious[:, 1:].argmax(dim=1) + 1
            index = torch.where(num_points == 1, best, torch.zeros_like(best))
            return output.mask_logits[torch.arange(len(index), device=index.device), index].float()


def balanced_cross_entropy(logits_nhw: Tensor, targets_nhw: Tensor) -> Tensor:
    """Cross entropy where the inside and the outside of each mask weigh the same, whatever their areas: (N,)."""
    logits, targets = logits_nhw.flatten(1), targets_nhw.flatten(1)
    inside = (nn.functional.softplus(-logits) * targets).sum(1) / targets.sum(1).clamp(min=1)
    outside = (nn.functional.softplus(logits) * (1 - targets)).sum(1) / (1 - targets).sum(1).clamp(min=1)
    return 0.5 * (inside + outside)


class Hints(nn.Module):
    """Two losses with throw-away heads that get a fresh model going; nothing of it is shipped.

    With the mask loss alone the decoder stays for very long at "every object, whatever the prompt".
    """

    def __init__(self, dim: int, instance_dim: int = 16) -> None:
        super().__init__()
        self.marked = nn.Linear(dim, 1)
        self.instance = nn.Conv2d(dim, instance_dim, 1)
        self.sharpness = nn.Parameter(torch.tensor(1.0))
        self.radius = nn.Parameter(torch.tensor(2.0))

    def marked_loss(self, marked_pnc: Tensor, target_phw: Tensor, present_p: Tensor) -> Tensor:
        """The decoder's image tokens must tell by themselves, coarsely, which cells the prompt means."""
        logits = self.marked(marked_pnc)[..., 0]
        side = round(logits.shape[1] ** 0.5)
        target = nn.functional.adaptive_avg_pool2d(target_phw[:, None], side)[:, 0]
        weight = present_p.float() / present_p.float().sum().clamp(min=1)
        return (balanced_cross_entropy(logits.view_as(target), target) * weight).sum()

    def instance_loss(self, fine_bchw: Tensor, coverage_bqhw: Tensor) -> Tensor:
        """Pixels of one object must be close to each other in a small space, and far from all others."""
        codes = self.instance(fine_bchw).flatten(2)
        per_image = coverage_bqhw.shape[1]
        target = coverage_bqhw.flatten(0, 1).flatten(1).float() / 255.0
        chosen = torch.multinomial((target > 0.7).float() + 1e-6, 1)
        codes = codes.repeat_interleave(per_image, dim=0)
        own = codes.gather(2, chosen[:, None].expand(-1, codes.shape[1], 1))
        logits = self.radius - self.sharpness.abs() * (codes - own).square().sum(1)
        return (balanced_cross_entropy(logits, target) + dice_loss(logits[:, None], target[:, None])).mean()


@torch.no_grad()
def init_for_training(model: Sam3Image, seed: int) -> None:
    """Weights to start from: a decoder this narrow does not find by itself what a prompt has to do with its place.

    The trunk's linear maps are drawn at Xavier's scale. The position code of prompts gets low frequencies in all
    directions, from 0.08 to 0.5 turns per half image. In the cross-attentions of the mask decoder, queries and keys
    start with the same orthogonal map, so that a prompt attends to its own place at once, and image features and
    learned tokens start small beside positions.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.backbone.vision_backbone.trunk.modules():
        if isinstance(module, nn.Linear):
            std = (2.0 / (module.in_features + module.out_features)) ** 0.5
            module.weight.normal_(0.0, std, generator=generator)
    neck: Any = model.backbone.vision_backbone.sam2_convs
    neck[2].conv_3x3.weight.mul_(0.1)
    frequencies = model.heads.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    angle = torch.rand(frequencies.shape[1], generator=generator) * 2 * torch.pi
    frequencies.copy_(torch.stack([angle.cos(), angle.sin()]) * torch.logspace(-1.1, -0.3, len(angle)))
    for name, module in model.heads.named_modules():
        if isinstance(module, nn.Embedding):
            module.weight.mul_(0.05 if name.endswith("no_mask_embed") else 0.2)
        if isinstance(module, Attention) and not name.endswith("self_attn"):
            nn.init.orthogonal_(module.q_proj.weight, gain=2.0, generator=generator)
            module.k_proj.weight.copy_(module.q_proj.weight)
            nn.init.zeros_(module.q_proj.bias)
            nn.init.zeros_(module.k_proj.bias)


def _never_empty(clickable: Tensor, target: Tensor) -> Tensor:
    """A tiny object may fill no cell of the grid by half: click its best covered cell then."""
    empty = ~clickable.flatten(1).any(dim=1)
    if not empty.any():
        return clickable
    best = target.flatten(1) >= target.flatten(1).amax(dim=1, keepdim=True)
    return torch.where(empty[:, None, None], best.view_as(clickable), clickable)
