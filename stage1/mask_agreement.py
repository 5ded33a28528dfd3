"""How alike the masks are that student and teacher features lead to: the metric that the embedding loss stands for.

Both features go through the same frozen neck and SAM heads, asked with the same grid of clicks; no annotation is
needed. A click has three candidate masks; compared is the one whose IoU the heads predict highest on the teacher's
features.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from sam3.checkpoint_io import read_state_dict
from sam3.checkpoint_keys import TRUNK_PREFIX
from sam3.config import Sam3Config
from sam3.model.necks import Sam3DualViTDetNeck
from sam3.model.sam3_image import Sam3Image
from sam3.model.vl_backbone import SAM3VLBackbone
from sam3.preprocess import Preprocess
from sam3.released_names import load_released, released_layout
from sam3.sam.heads import SamHeads
from sam3.sam.mask_decoder import SamOutput
from sam3_train.metrics import mask_iou


class MaskAgreement:
    """IoU of student's and teacher's masks.

    Not an nn.Module, so that a task that holds one neither trains, nor saves, nor synchronises it.

    Args:
        model: A model with SAM heads; its trunk is never called.
        prompts_per_side: Clicks along each side of the image.
    """

    def __init__(self, model: Sam3Image, prompts_per_side: int = 4) -> None:
        self.model = model.eval().requires_grad_(False)
        steps = (torch.arange(prompts_per_side) + 0.5) * model.config.image_size_px / prompts_per_side
        y, x = torch.meshgrid(steps, steps, indexing="ij")
        self.points_xy_px = torch.stack([x.flatten(), y.flatten()], -1)[:, None].to(model.device)
        self.labels = torch.ones(len(self.points_xy_px), 1, dtype=torch.long, device=model.device)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, config: Sam3Config, device: torch.device, prompts_per_side: int = 4
    ) -> MaskAgreement:
        """Load neck and heads alone from a file in the released layout.

        Raises:
            CheckpointError: If the file is missing, damaged, or of another model.
        """
        with torch.device("meta"):
            neck = Sam3DualViTDetNeck(nn.Identity(), config)
            model = Sam3Image(config, SAM3VLBackbone(neck), Preprocess(config.image_size_px), SamHeads(config))
        state_dict, _ = read_state_dict(path)
        released = released_layout(state_dict, str(path))
        load_released(model, {k: v for k, v in released.items() if not k.startswith(TRUNK_PREFIX)}, str(path))
        return cls(model.to(device), prompts_per_side)

    @torch.no_grad()
    def __call__(self, student_bchw: Tensor, teacher_bchw: Tensor) -> Tensor:
        """Mean IoU over the clicks, per image.

        Args:
            student_bchw: Student features, (B, C, G, G).
            teacher_bchw: Teacher features of the same shape.

        Returns:
            (B,) in [0, 1].
        """
        # One image at a time: at 1008 px the masks of 16 clicks on one image already take 64 MB.
        pairs = zip(student_bchw.split(1), teacher_bchw.split(1), strict=True)
        return torch.stack([self._image_agreement(student, teacher) for student, teacher in pairs])

    def _image_agreement(self, student_1chw: Tensor, teacher_1chw: Tensor) -> Tensor:
        teacher, student = self._masks(teacher_1chw), self._masks(student_1chw)
        best = teacher.ious.argmax(1)
        prompts = torch.arange(len(best), device=best.device)
        return mask_iou(student.mask_logits[prompts, best] > 0, teacher.mask_logits[prompts, best] > 0).mean()

    def _masks(self, features_1chw: Tensor) -> SamOutput:
        heads = self.model.heads
        _, _, maps, _ = self.model.backbone.vision_backbone.neck(features_1chw, need_detector=False)
        assert maps is not None, "the model was built with the second neck"
        features = heads.image_features({"backbone_fpn": maps})
        output = heads.forward_prompts(features, self.points_xy_px, self.labels)
        return heads.select(output, multimask_output=True)
