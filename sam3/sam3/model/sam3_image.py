"""The model: backbone, detector and, on request, the interactive predictor with the SAM heads or the tracker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam3.config import Sam3Config
from sam3.model.data_misc import BatchedDatapoint, FindStage, SAM3Output
from sam3.model.decoder import TransformerWrapper
from sam3.model.fusion_encoder import EncoderOutput
from sam3.model.geometry import SequenceGeometryEncoder
from sam3.model.prompt import Prompt
from sam3.model.sam3_tracker import Sam3Tracker, TrackerFeatures
from sam3.model.scoring import ONE_TO_MANY, DotProductScoring, update_scores_and_boxes
from sam3.model.segmentation_head import UniversalSegmentationHead
from sam3.model.vl_backbone import SAM3VLBackbone
from sam3.preprocess import Preprocess
from sam3.sam.heads import SamFeatures, SamHeads
from sam3.sam.interactive_predictor import Masks, SAM3InteractiveImagePredictor


class Sam3Image(nn.Module):
    """SAM 3: everything about single images, and the weights that video predictors work with.

    Attributes:
        config: Sizes of every component.
        preprocess: How an image becomes the model's input.
        backbone: ``backbone.vision_backbone.{trunk, convs, sam2_convs}`` and ``backbone.language_backbone``, or None.
        geometry_encoder, transformer, dot_prod_scoring: The detector behind its neck; all three or none.
        segmentation_head: Masks of what the detector finds, or None: boxes alone.
        inst_interactive_predictor: Masks from clicks and boxes, or None. Its ``model`` is the `SamHeads`, or the
            `Sam3Tracker`, which is the same with a memory.
        missing_parts: What the checkpoint did not hold and the model therefore lacks; `sam3.load_model` says it here.
        supervise_joint_box_scores: Return class logits that hold the presence too, as the video model does.
        matcher: Assigns queries to objects in training: called with class logits (B, N), boxes (B, N, 4) and the
            targets; its results are ``indices`` in what `forward_grounding` returns. None: no matching.
    """

    TEXT_ID_FOR_TEXT = 0
    TEXT_ID_FOR_VISUAL = 1
    TEXT_ID_FOR_GEOMETRIC = 2

    def __init__(
        self,
        config: Sam3Config,
        backbone: SAM3VLBackbone,
        preprocess: Preprocess,
        heads: SamHeads | None = None,
        *,
        geometry_encoder: SequenceGeometryEncoder | None = None,
        transformer: TransformerWrapper | None = None,
        segmentation_head: UniversalSegmentationHead | None = None,
        dot_prod_scoring: DotProductScoring | None = None,
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
        self.missing_parts: tuple[str, ...] = ()
        self.supervise_joint_box_scores = False
        self.matcher: nn.Module | None = None
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

    @property
    def has_tracker(self) -> bool:
        """Whether the model can carry objects through a video."""
        return self.inst_interactive_predictor is not None and isinstance(self.heads, Sam3Tracker)

    @property
    def tracker(self) -> Sam3Tracker:
        """The tracker.

        Raises:
            ValueError: If the model was built without it.
        """
        if self.inst_interactive_predictor is None or not isinstance(self.heads, Sam3Tracker):
            raise ValueError(
                "this model has no tracker: build it with enable_tracker=True, or load a checkpoint that holds the "
                "tracker's memory"
            )
        return self.heads

    # --- detector -----------------------------------------------------------------------------------------------------

    def forward(self, input: BatchedDatapoint) -> SAM3Output:
        """Images and texts to results, for training and for batched evaluation.

        Boxes and points of the stage are used; without any, the texts alone are the prompts.

        Raises:
            ValueError: If the model has no detector or text encoder, or the batch has several stages (video).
        """
        if len(input.find_inputs) != 1:
            raise ValueError(f"an image model takes one stage of prompts, the batch has {len(input.find_inputs)}")
        (stage,) = input.find_inputs
        backbone_out = self.backbone.forward_image(input.img_batch, need_sam2=False)
        backbone_out |= self.backbone.forward_text(input.find_text_batch, device=input.img_batch.device)
        if stage.input_boxes is None and stage.input_points is None:
            prompt = self._get_dummy_prompt(len(stage.img_ids))
        else:
            prompt = Prompt(
                box_embeddings=stage.input_boxes,
                box_mask=stage.input_boxes_mask,
                box_labels=stage.input_boxes_label,
                point_embeddings=stage.input_points,
                point_mask=stage.input_points_mask,
                point_labels=stage.input_points_label,
            )
        target = input.find_targets[0] if input.find_targets else None
        return SAM3Output([[self.forward_grounding(backbone_out, stage, target, prompt)]])

    def forward_grounding(
        self,
        backbone_out: dict[str, Any],
        find_input: FindStage,
        find_target: Any = None,
        geometric_prompt: Prompt | None = None,
    ) -> dict[str, Any]:
        """Find what B prompts describe.

        Args:
            backbone_out: From ``backbone.forward_image`` and ``backbone.forward_text``: ``backbone_fpn`` and
                ``vision_pos_enc`` of I images, ``language_features`` (L, n, C) and ``language_mask`` (n, L) of n texts
                (from anywhere, if the model has no text encoder). In place of the former,
                ``img_batch_all_stages`` (I, 3, S, S): images that are encoded when a prompt needs them.
            find_input: Which image and which text each prompt belongs to. Its boxes and points are not read.
            find_target: What the prompts should find, for ``matcher``; in training only.
            geometric_prompt: Boxes and points of the B prompts; None for none.

        Returns:
            ``pred_logits`` (B, N, 1) of N queries, ``pred_boxes`` (B, N, 4) as normalised cxcywh,
            ``pred_boxes_xyxy``, ``presence_logit_dec`` (B, 1), ``queries`` (B, N, C), ``presence_feats`` (1, B, C),
            ``encoder_hidden_states`` (L, B, C), ``prev_encoder_out``; with a segmentation head ``pred_masks``
            (B, N, 4 G, 4 G) and ``semantic_seg`` (B, 1, 4 G, 4 G), both logits, and ``presence_logit`` None. In
            training also ``aux_outputs``, keys with the suffix ``_o2m``, and ``indices`` if there is a matcher.

        Raises:
            ValueError: If the model has no detector, ``backbone_out`` lacks images or texts, or the numbers of prompts
                differ.
        """
        transformer, scoring = self._require_detector()
        geometric_prompt = geometric_prompt or self._get_dummy_prompt(len(find_input.img_ids))
        _require_same_count(find_input, geometric_prompt)
        image_ids = self._require_images(backbone_out, find_input.img_ids)
        maps = backbone_out["backbone_fpn"]
        size_hw = (maps[-1].shape[-2], maps[-1].shape[-1])
        tokens = maps[-1][image_ids].flatten(2).permute(2, 0, 1)
        positions = backbone_out["vision_pos_enc"][-1][:1].flatten(2).permute(2, 0, 1).expand_as(tokens)
        prompt, prompt_mask = self._encode_prompt(
            backbone_out, find_input.text_ids, geometric_prompt, tokens, positions, size_hw
        )
        encoded = transformer.encoder(tokens, prompt, positions, prompt_mask, size_hw)
        decoded = transformer.decoder(encoded.memory, encoded.pos_embed, prompt, prompt_mask, size_hw)
        out = update_scores_and_boxes(decoded, scoring, prompt, prompt_mask, self.supervise_joint_box_scores)
        if self.segmentation_head is not None:
            out |= self._segment(maps, decoded.hs[-1], image_ids, encoded.memory, prompt, prompt_mask)
        out["encoder_hidden_states"] = encoded.memory
        out["prev_encoder_out"] = {
            "encoder_out": _describe_encoder_output(encoded, prompt_mask),
            "backbone_out": backbone_out,
        }
        if self.training and self.matcher is not None and find_target is not None:
            for layer in (out, *out.get("aux_outputs", ())):
                layer["indices"] = self.matcher(layer["pred_logits"].squeeze(-1), layer["pred_boxes"], find_target)
        return out

    def _get_dummy_prompt(self, num_prompts: int = 1) -> Prompt:
        """Prompts without boxes and points."""
        weight = next(self.parameters())
        return Prompt(
            box_embeddings=weight.new_zeros(0, num_prompts, 4, dtype=torch.float32),
            point_embeddings=weight.new_zeros(0, num_prompts, 2, dtype=torch.float32),
        )

    def _require_detector(self) -> tuple[TransformerWrapper, DotProductScoring]:
        if self.transformer is None or self.dot_prod_scoring is None or self.geometry_encoder is None:
            raise ValueError(
                "this model has no detector: build it with enable_detector=True, or load a checkpoint that holds one"
            )
        return self.transformer, self.dot_prod_scoring

    def _require_images(self, backbone_out: dict[str, Any], img_ids: Tensor) -> Tensor:
        """Rows of the feature maps for each prompt; encodes the images first if that was put off."""
        images, rows = backbone_out.get("img_batch_all_stages"), backbone_out.get("id_mapping")
        has_maps = backbone_out.get("backbone_fpn") is not None
        if not has_maps and images is None:
            raise ValueError("backbone_out has neither backbone_fpn nor img_batch_all_stages: set an image first")
        is_other = images is not None and rows is not None and bool((rows[img_ids] < 0).any())
        if images is not None and (is_other or not has_maps):
            needed = img_ids.unique()
            weight = next(self.parameters())
            backbone_out |= self.backbone.forward_image(images[needed].to(weight.device, weight.dtype))
            rows = torch.full((len(images),), -1, dtype=torch.int64, device=img_ids.device)
            rows[needed] = torch.arange(len(needed), device=img_ids.device)
            backbone_out["id_mapping"] = rows
        return img_ids if rows is None else rows[img_ids]

    def _encode_prompt(
        self,
        backbone_out: Mapping[str, Any],
        text_ids: Tensor,
        geometric_prompt: Prompt,
        tokens: Tensor,
        positions: Tensor,
        size_hw: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """Text tokens, then those of points, boxes and the geometry encoder's own: (T, B, C), padding (B, T)."""
        if backbone_out.get("language_features") is None or backbone_out.get("language_mask") is None:
            raise ValueError(
                "backbone_out has no language_features and language_mask: they come from backbone.forward_text, or "
                "from you if the model has no text encoder"
            )
        assert self.geometry_encoder is not None
        geo_tokens, geo_mask = self.geometry_encoder(geometric_prompt, [tokens], [size_hw], [positions])
        text_tokens = backbone_out["language_features"][:, text_ids]
        text_mask = backbone_out["language_mask"][text_ids]
        return torch.cat([text_tokens, geo_tokens.to(text_tokens.dtype)]), torch.cat([text_mask, geo_mask], dim=1)

    def _segment(
        self,
        maps: Sequence[Tensor],
        queries: Tensor,
        image_ids: Tensor,
        memory: Tensor,
        prompt: Tensor,
        prompt_mask: Tensor,
    ) -> dict[str, Tensor | None]:
        assert self.segmentation_head is not None and self.transformer is not None
        out = self.segmentation_head(maps, queries, image_ids, memory, prompt, prompt_mask)
        num_queries = self.transformer.decoder.num_queries
        if queries.shape[1] > num_queries:
            masks = out["pred_masks"]
            out |= {"pred_masks": masks[:, :num_queries], "pred_masks" + ONE_TO_MANY: masks[:, num_queries:]}
        return out

    # --- SAM heads ----------------------------------------------------------------------------------------------------

    def image_features(self, images: Tensor) -> SamFeatures:
        """What the SAM heads read of a batch of images; differentiable, and without the detector's neck.

        Args:
            images: Preprocessed images, (N, 3, S, S).

        Raises:
            ValueError: If the model has no SAM heads, or not the neck that they read.
        """
        return self.heads.image_features(self._second_neck(images))

    def tracker_features(self, images: Tensor) -> TrackerFeatures:
        """What the tracker reads of one frame; differentiable, and without the detector's neck.

        Args:
            images: A preprocessed image, (1, 3, S, S).

        Raises:
            ValueError: If the model has no tracker, or not the neck that it reads.
        """
        return self.tracker.frame_features(self._second_neck(images))

    def _second_neck(self, images: Tensor) -> dict[str, Any]:
        sam2 = self.backbone.forward_image(images, need_detector=False)["sam2_backbone_out"]
        if sam2 is None:
            raise ValueError("this model has SAM heads but not the neck that they read: build both or neither")
        return sam2

    def predict_inst(self, inference_state: Mapping[str, Any], **kwargs: Any) -> Masks:
        """Masks from clicks and boxes on the image of a `Sam3Processor` state, without encoding it again.

        Args:
            inference_state: From ``processor.set_image``.
            **kwargs: Those of `SAM3InteractiveImagePredictor.predict`.

        Returns:
            Masks, IoUs and low-resolution logits, as `SAM3InteractiveImagePredictor.predict`.

        Raises:
            ValueError: If the model has no SAM heads, the state no image, or a prompt is malformed.
        """
        if "original_heights" in inference_state:
            raise ValueError("this state holds a batch of images: use predict_inst_batch")
        size_hw = (inference_state.get("original_height"), inference_state.get("original_width"))
        with self._predictor_on(inference_state, [size_hw], is_batch=False) as predictor:
            return predictor.predict(**kwargs)

    def predict_inst_batch(
        self, inference_state: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """`predict_inst` for each image of ``processor.set_image_batch``.

        Args:
            inference_state: From ``processor.set_image_batch``.
            *args: Those of `SAM3InteractiveImagePredictor.predict_batch`.
            **kwargs: The same by name.

        Returns:
            Three lists with one entry per image: masks, IoUs, low-resolution logits.

        Raises:
            ValueError: As for `predict_inst`.
        """
        if "original_heights" not in inference_state:
            raise ValueError("this state holds no batch of images: use predict_inst, or set_image_batch before")
        sizes = zip(inference_state["original_heights"], inference_state["original_widths"], strict=True)
        with self._predictor_on(inference_state, list(sizes), is_batch=True) as predictor:
            return predictor.predict_batch(*args, **kwargs)

    def _predictor_on(
        self, inference_state: Mapping[str, Any], original_hws: list[Any], is_batch: bool
    ) -> AbstractContextManager[SAM3InteractiveImagePredictor]:
        heads = self.heads  # says what is missing, if it is
        assert self.inst_interactive_predictor is not None
        sam2 = inference_state.get("backbone_out", {}).get("sam2_backbone_out")
        if sam2 is None:
            raise ValueError(
                "this state has no features for the SAM heads: call set_image first, of a Sam3Processor made after "
                "the heads and with for_clicks=True"
            )
        maps = sam2["backbone_fpn"]
        if maps[0].shape[1] == self.config.hidden_dim:  # straight from the neck; a processor has projected them
            features = heads.image_features(sam2)
        else:
            features = heads.join_maps(*maps)
        return self.inst_interactive_predictor.using(features, original_hws, is_batch)

    @torch.no_grad()
    def _predictor_features(self, images: Tensor) -> SamFeatures:
        return self.image_features(images)


def _require_same_count(find_input: FindStage, prompt: Prompt) -> None:
    counts = {"img_ids": len(find_input.img_ids), "text_ids": len(find_input.text_ids)}
    for what, embeddings in (("boxes", prompt.box_embeddings), ("points", prompt.point_embeddings)):
        if embeddings is not None:
            counts[what] = embeddings.shape[1]
    if len(set(counts.values())) > 1:
        raise ValueError(f"numbers of prompts differ: {counts}")


def _describe_encoder_output(encoded: EncoderOutput, prompt_mask: Tensor) -> dict[str, Any]:
    """What a later step may want of the fusion encoder, under the released names."""
    return {
        "encoder_hidden_states": encoded.memory,
        "pos_embed": encoded.pos_embed,
        "padding_mask": encoded.padding_mask,
        "level_start_index": encoded.level_start_index,
        "spatial_shapes": encoded.spatial_shapes,
        "valid_ratios": encoded.valid_ratios,
        "vis_feat_sizes": [encoded.size_hw],
        "prompt_before_enc": encoded.memory_text,
        "prompt_after_enc": encoded.memory_text,
        "prompt_mask": prompt_mask,
    }
