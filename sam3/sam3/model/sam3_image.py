"""The image model: backbone and, on request, the interactive predictor with the SAM heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sam3.config import Sam3Config
from sam3.model.deployed_trunk import DeployedTrunk
from sam3.model.vl_backbone import SAM3VLBackbone
from sam3.preprocess import Preprocess
from sam3.sam.heads import SamFeatures, SamHeads
from sam3.sam.interactive_predictor import SAM3InteractiveImagePredictor


class Sam3Image(nn.Module):
    """SAM 3 for single images.

    Attributes:
        config: Sizes of every component.
        preprocess: How an image becomes the model's input.
        backbone: ``backbone.vision_backbone.{trunk, convs, sam2_convs}``.
        geometry_encoder, transformer, dot_prod_scoring: The detector behind its neck; all three or none.
        segmentation_head: Masks of what the detector finds, or None: boxes alone.
        inst_interactive_predictor: Masks from clicks and boxes, or None. Its ``model`` is the `SamHeads`.
    """

    def __init__(
        self,
        config: Sam3Config,
        backbone: SAM3VLBackbone,
        preprocess: Preprocess,
        heads: SamHeads | None = None,
        *,
        geometry_encoder: nn.Module | None = None,
        transformer: nn.Module | None = None,
        segmentation_head: nn.Module | None = None,
        dot_prod_scoring: nn.Module | None = None,
    ) -> None:
        """
        Raises:
            ValueError: If ``preprocess`` makes another image size than the model takes.
        """
        super().__init__()
        if preprocess.size_px != config.image_size_px:
            raise ValueError(
                f"preprocessing makes images of {preprocess.size_px} px, the model {config.name!r} takes "
                f"{config.image_size_px} px: set Preprocess(size_px={config.image_size_px})"
            )
        self.config = config
        self.preprocess = preprocess
        self.backbone = backbone
        self.geometry_encoder = geometry_encoder
        self.transformer = transformer
        self.segmentation_head = segmentation_head
        self.dot_prod_scoring = dot_prod_scoring
        self._deployed_trunk = DeployedTrunk()
        self.inst_interactive_predictor: SAM3InteractiveImagePredictor | None = None
        if heads is not None:
            self.inst_interactive_predictor = SAM3InteractiveImagePredictor(heads, self._predictor_features, preprocess)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def has_detector(self) -> bool:
        """Whether the model answers text, box and point prompts with `forward_grounding`."""
        return self.transformer is not None

    @property
    def heads(self) -> SamHeads:
        """The SAM heads.

        Raises:
            ValueError: If the model was built without them.
        """
        if self.inst_interactive_predictor is None:
            raise ValueError("this model has no SAM heads: build it with enable_inst_interactivity=True")
        return self.inst_interactive_predictor.model

    def image_features(self, images: Tensor) -> SamFeatures:
        """What the SAM heads read of a batch of images; differentiable, and without the detector's neck.

        Args:
            images: Preprocessed images, (N, 3, S, S).
        """
        backbone_out = self.backbone.forward_image(images, need_detector=False)
        return self.heads.image_features(backbone_out["sam2_backbone_out"])

    @torch.no_grad()
    def _predictor_features(self, images: Tensor) -> SamFeatures:
        """`image_features` through the trunk's fastest form; equal within 1e-3 where they are of order 1."""
        vision = self.backbone.vision_backbone
        features = self._deployed_trunk.of(vision.trunk)(images)[-1]
        maps = vision.neck(features, need_detector=False)[2]
        if maps is None:
            raise ValueError("this model has SAM heads but not the neck that they read: build both or neither")
        return self.heads.image_features({"backbone_fpn": maps})

    def _apply(self, fn, recurse=True):
        self._deployed_trunk.reset()  # its copy would stay on the old device and in the old dtype
        return super()._apply(fn, recurse)
