"""SAM 3 behind its trunk: from features to the answers of both promptable parts, frozen but differentiable.

Teacher and student features run through the same modules by SAM 3's own forward: `Sam3Image.forward_grounding` with the
"visual" text token for the detector (geometry encoder, fusion, decoder, mask head), and `SamHeads` for what interactive
users run (prompt encoder, mask decoder). The trunk is never built, and the text encoder is dropped once it has encoded
its one word.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sam3.checkpoint_io import read_state_dict
from sam3.checkpoint_keys import TRUNK_PREFIX
from sam3.config import Sam3Config
from sam3.model.data_misc import FindStage
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_image_processor import VISUAL_TEXT
from sam3.model_builder import assemble_image_model
from sam3.released_names import load_released, released_layout, to_released
from sam3.sam.heads import SamFeatures
from sam3.sam.mask_decoder import SamOutput
from sam3_train.errors import UserError
from stage1_geometry_finetune.prompt_formats import to_geometric_prompt, to_sam_prompt
from stage1_geometry_finetune.prompts import PromptBatch

T = TypeVar("T")

_VISION = "backbone.vision_backbone."
_SAM_DECODER = "inst_interactive_predictor.model.sam_mask_decoder."
_TRAINABLE_PARTS = (_VISION + "convs.", _VISION + "sam2_convs.", "segmentation_head.", _SAM_DECODER)


class DetectorMaps(NamedTuple):
    """What the detector reads of B images."""

    levels: tuple[Tensor, ...]
    """Finest first, (B, C, 4 G, 4 G) .. (B, C, G, G). Prompts are pooled from, and the fusion encoder reads, the last:
    72 x 72 = 5,184 tokens for ``sam3``."""
    positions: Sequence[Tensor]
    """Position code of each level."""

    def image(self, index: int) -> DetectorMaps:
        """One image of them; position codes are the same for all."""
        return DetectorMaps(tuple(level[index : index + 1] for level in self.levels), self.positions)


class DetectorAnswer(NamedTuple):
    """What the detector says about K prompts, Q queries each."""

    mask_logits: Tensor
    """(K, Q, 4 G, 4 G)."""
    boxes: Tensor
    """Normalised (cx, cy, w, h), (K, Q, 4)."""
    logits: Tensor
    """Class logits, without presence, (K, Q)."""
    presence: Tensor
    """Presence logits, (K,)."""

    @property
    def scores(self) -> Tensor:
        """What a user is shown: probability of the class times that of presence, (K, Q)."""
        return self.logits.sigmoid() * self.presence.sigmoid()[:, None]


class FrozenHeads:
    """Neck and heads of SAM 3 in eval mode, without trunk and text encoder.

    Not an nn.Module, so that a task that holds one neither trains, nor saves, nor synchronises it.

    Attributes:
        model: Holds the parts; its trunk and its text encoder are gone.
        checkpointing: Recompute the heads in the backward pass instead of keeping their activations: at full size these
            take 1.4 GB per object and, in the neck, 0.4 GB per image. Changes no result.
    """

    def __init__(
        self, model: Sam3Image, text: Tensor | None, text_mask: Tensor | None, checkpointing: bool = True
    ) -> None:
        """
        Args:
            model: Any `Sam3Image`; trunk and text encoder are taken out of it, gradients and training mode turned off.
            text: The prompt tokens of "visual", (L, 1, C); None without a detector.
            text_mask: Their padding, (1, L).
            checkpointing: See above.
        """
        model.backbone.vision_backbone.trunk = nn.Identity()
        model.backbone.language_backbone = None
        self.model = model.eval().requires_grad_(False)
        self.checkpointing = checkpointing
        self._text = text
        self._text_mask = text_mask

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        config: Sam3Config,
        device: torch.device,
        *,
        detector: bool = True,
        sam: bool = False,
        checkpointing: bool = True,
    ) -> FrozenHeads:
        """Load the parts that the routes need from a file in the released layout; the rest of it is never read.

        Args:
            path: ``sam3.pt`` or another file of the teacher.
            config: The teacher's description.
            device: Where the parts go.
            detector: Whether prompts will go through the detector.
            sam: Whether prompts will go through the SAM heads.
            checkpointing: See the class.

        Raises:
            CheckpointError: If the file is missing, damaged, of another model, or lacks a part.
            ValueError: If no route is asked for.
        """
        if not detector and not sam:
            raise ValueError("frozen heads without a route: ask for the detector, the SAM heads or both")
        model = assemble_image_model(config, enable_inst_interactivity=sam, device="meta", enable_detector=detector)
        model.backbone.vision_backbone.trunk = nn.Identity()
        state_dict, _ = read_state_dict(path)
        released = released_layout(state_dict, str(path))
        load_released(model, {k: v for k, v in released.items() if not k.startswith(TRUNK_PREFIX)}, str(path))
        model.eval().requires_grad_(False)
        text = text_mask = None
        if detector:
            with torch.no_grad():
                words = model.backbone.forward_text([VISUAL_TEXT])
            text, text_mask = words["language_features"].to(device), words["language_mask"].to(device)
        model.backbone.language_backbone = None
        if not detector:
            model.backbone.vision_backbone.convs = nn.ModuleList()  # the other neck is the one that is read
        return cls(model.to(device), text, text_mask, checkpointing)

    @property
    def config(self) -> Sam3Config:
        """The teacher's description."""
        return self.model.config

    @property
    def has_sam(self) -> bool:
        """Whether the SAM heads are there."""
        return self.model.inst_interactive_predictor is not None

    @property
    def mask_side(self) -> int:
        """Side of the mask logits of either part, 4 G."""
        return 4 * self.config.grid_size

    # --- from features to maps ----------------------------------------------------------------------------------------

    def detector_maps(self, features_bchw: Tensor) -> DetectorMaps:
        """The detector's neck.

        Args:
            features_bchw: A trunk's output, (B, C, G, G).

        Raises:
            ValueError: If the features have another shape than the trunk's, or the levels are not the deployed ones.
        """
        self._require_trunk_shape(features_bchw)
        neck = self.model.backbone.vision_backbone.neck
        levels, positions, _, _ = self._run(lambda: neck(features_bchw, need_sam2=False))
        assert levels is not None and positions is not None
        self._require_levels(levels)
        return DetectorMaps(tuple(levels), positions)

    def sam_maps(self, features_bchw: Tensor) -> SamFeatures:
        """The SAM heads' neck, as they read it.

        Raises:
            ValueError: As `detector_maps`, or if there are no SAM heads.
        """
        self._require_trunk_shape(features_bchw)
        neck, heads = self.model.backbone.vision_backbone.neck, self.model.heads

        def run() -> tuple[SamFeatures, list[Tensor]]:
            _, _, levels, _ = neck(features_bchw, need_detector=False)
            assert levels is not None
            return heads.image_features({"backbone_fpn": levels}), levels

        features, levels = self._run(run)
        self._require_levels(levels)
        return features

    def _require_trunk_shape(self, features_bchw: Tensor) -> None:
        if tuple(features_bchw.shape[1:]) != self.config.embedding_shape:
            raise ValueError(
                f"features of shape {tuple(features_bchw.shape)} are not those of a trunk of {self.config.name!r}, "
                f"(B, {', '.join(map(str, self.config.embedding_shape))})"
            )

    def _require_levels(self, levels: Sequence[Tensor]) -> None:
        """D-81: the coarsest level must be the deployed one. One level more changes every answer without an error."""
        grid = self.config.grid_size
        sides = [tuple(level.shape[-2:]) for level in levels]
        if sides != [(4 * grid, 4 * grid), (2 * grid, 2 * grid), (grid, grid)]:
            raise ValueError(
                f"the neck's levels are {sides}, deployed are three with sides of 4, 2 and 1 times {grid}: prompts "
                f"must be pooled from {grid} x {grid} = {grid * grid} tokens"
            )

    # --- from maps and prompts to answers -----------------------------------------------------------------------------

    def detect(self, maps: DetectorMaps, prompts: PromptBatch) -> DetectorAnswer:
        """Answers of the detector to K prompts, each a query of its own.

        Args:
            maps: From `detector_maps`.
            prompts: Boxes and points; ``image_of_object`` counts the maps' images.

        Raises:
            ValueError: If there is no detector, or it did not read the deployed number of tokens.
        """
        if self._text is None or self._text_mask is None:
            raise ValueError("these heads were loaded without the detector: from_checkpoint(detector=True)")
        geometry = to_geometric_prompt(prompts)
        backbone_out = {
            "backbone_fpn": list(maps.levels),
            "vision_pos_enc": maps.positions,
            "language_features": self._text,
            "language_mask": self._text_mask,
        }
        stage = FindStage(prompts.image_of_object, torch.zeros_like(prompts.image_of_object))

        def run() -> DetectorAnswer:
            out = self.model.forward_grounding(dict(backbone_out), stage, None, geometry)
            num_tokens, deployed = out["encoder_hidden_states"].shape[0], self.config.grid_size**2
            if num_tokens != deployed:
                raise ValueError(f"the detector read {num_tokens} image tokens, deployed are {deployed}")
            logits, presence = out["pred_logits"].squeeze(-1), out["presence_logit_dec"].squeeze(-1)
            return DetectorAnswer(out["pred_masks"], out["pred_boxes"], logits, presence)

        return self._run(run)

    def segment(self, features: SamFeatures, prompts: PromptBatch) -> SamOutput:
        """All four candidates of the SAM heads for K prompts of the same layout (see `prompt_formats.layouts`).

        Args:
            features: From `sam_maps`.
            prompts: Boxes and points; ``image_of_object`` counts the features' images.

        Raises:
            ValueError: If prompts differ in their layout, or one is empty.
        """
        points_xy_px, labels = to_sam_prompt(prompts, self.config.image_size_px)
        heads, image_index = self.model.heads, prompts.image_of_object
        return self._run(lambda: heads.forward_prompts(features, points_xy_px, labels, image_index=image_index))

    def _run(self, forward: Callable[[], T]) -> T:
        """A frozen forward; with gradients its activations are computed again when the backward pass needs them.

        Nothing in it is random: modules are in eval mode.
        """
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(forward, use_reentrant=False, preserve_rng_state=False)
        return forward()

    # --- parts that a run may train -----------------------------------------------------------------------------------

    def trainable_copy(
        self, *, neck: bool = False, mask_decoder: bool = False, predicts_scores: bool = True
    ) -> tuple[FrozenHeads, dict[str, nn.Parameter]]:
        """The student's heads where a run trains a part of them; the teacher keeps this object.

        Args:
            neck: Train the neck of each route.
            mask_decoder: Train what makes the masks of each route: the detector's mask head, the SAM mask decoder.
            predicts_scores: Whether a loss term reads the scores of the SAM heads; without one, what predicts them
                stays frozen.

        Returns:
            Heads that share every other tensor with these, and the trained parameters by their names in the model.
            Weights that no answer depends on are not among them. Without either option: these heads, and nothing.
        """
        if not neck and not mask_decoder:
            return self, {}
        names = {
            name
            for name, _ in self.model.named_parameters()
            if (neck and self._is_read_neck(name)) or (mask_decoder and self._is_read_decoder(name, predicts_scores))
        }
        tensors = (*self.model.named_parameters(), *self.model.named_buffers())
        shared = {id(tensor): tensor for name, tensor in tensors if name not in names}
        model = copy.deepcopy(self.model, shared)
        trained = {name: parameter for name, parameter in model.named_parameters() if name in names}
        for parameter in trained.values():
            parameter.requires_grad_(True)
        heads = copy.copy(self)
        heads.model = model
        return heads, trained

    def _is_read_neck(self, name: str) -> bool:
        levels = range(self.model.backbone.vision_backbone.num_levels)
        kinds = ("convs", "sam2_convs") if self.has_sam else ("convs",)
        return name.startswith(tuple(f"{_VISION}{kind}.{level}." for kind in kinds for level in levels))

    def _is_read_decoder(self, name: str, predicts_scores: bool) -> bool:
        if name.startswith("segmentation_head."):
            stages = self.model.backbone.vision_backbone.num_levels - 1
            unread = [f"segmentation_head.pixel_decoder.{part}.{stages}." for part in ("conv_layers", "norms")]
            return not name.startswith(("segmentation_head.semantic_seg_head.", *unread))
        scores = () if predicts_scores else ("iou_prediction_head.", "pred_obj_score_head.")
        if not name.startswith(_SAM_DECODER):
            return False
        return not scores or not name.removeprefix(_SAM_DECODER).startswith(scores)

    def released_parts(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The whole parts that some parameters of ``model`` belong to, under released names.

        Files and their converter know parts as wholes, so weights that no answer depends on are among them.
        """
        names = tuple(names)
        prefixes = tuple(part for part in _TRAINABLE_PARTS if any(name.startswith(part) for name in names))
        if not prefixes:
            return {}
        state = {name: value for name, value in self.model.state_dict().items() if name.startswith(prefixes)}
        return to_released(state, self.config)

    @torch.no_grad()
    def load_released_parts(self, names: Iterable[str], weights: Mapping[str, Tensor], where: str) -> None:
        """Load what `released_parts` returned, in place.

        Args:
            names: As for `released_parts`.
            weights: Released name to tensor.
            where: The file, for the message.

        Raises:
            UserError: If names or shapes differ.
        """
        own = self.released_parts(names)
        differing = sorted(
            {name for name in own if name not in weights or weights[name].shape != own[name].shape}
            | {name for name in weights if name not in own}
        )
        if differing:
            raise UserError(
                f"{where}: the trained parts are not those of this run ({len(differing)} of {len(own)} names or shapes "
                f"differ, first {', '.join(differing[:3])}): MODEL.TRAIN_NECK, MODEL.TRAIN_MASK_DECODER and the routes "
                "must be as they were"
            )
        for name, value in weights.items():
            own[name].copy_(value)


def trained_part_sizes(
    config: Sam3Config, *, detector: bool, sam: bool, neck: bool, mask_decoder: bool
) -> dict[str, int]:
    """What a run trains beside the student, before anything is loaded.

    Args:
        config: The teacher's description.
        detector: Whether the detector's route runs.
        sam: Whether the SAM heads' route runs.
        neck: Whether necks are trained.
        mask_decoder: Whether what makes the masks is trained.

    Returns:
        Released prefix of each part that checkpoints will hold -> its number of values.
    """
    wanted = (detector and neck, sam and neck, detector and mask_decoder, sam and mask_decoder)
    sizes = {part: 0 for part, is_trained in zip(_TRAINABLE_PARTS, wanted, strict=True) if is_trained}
    if not sizes:
        return {}
    model = assemble_image_model(
        config, None, sam, "meta", enable_detector=detector, enable_text_encoder=False, enable_segmentation=detector
    )
    for name, value in model.state_dict().items():
        for part in sizes:
            if name.startswith(part):
                sizes[part] += value.numel()
    return to_released(sizes, config)
