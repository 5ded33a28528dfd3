"""Set an image once, then ask for everything that a text, boxes or points describe, as often as needed.

The state that the methods pass on is a plain dict. Its keys are those of Meta's SAM 3 package 0.1.4 (restated from its
public behaviour; no code is shared), with additions: several texts, boxes and points at once, prompts on a batch of
images, ``mask_logits``, and ``raw_outputs``, from which results are filtered again without running the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sam3.checkpoint_parts import POINT_PROMPTS
from sam3.model.data_misc import FindStage
from sam3.model.detections import RAW_KEYS, MaskOptions, ResultFilter, detections, image_share, is_positive_int
from sam3.model.detector_prompts import (
    parse_boxes,
    parse_labels,
    parse_points,
    parse_texts,
    rows_of_one_image,
    select_rows,
    warn_of_cut_texts,
)
from sam3.model.processor_state import (
    IMAGE_KEYS,
    PROMPT_KEYS,
    RESULT_KEYS,
    TEXT_KEYS,
    State,
    forget,
    original_hws,
    require_device,
    require_image_index,
)
from sam3.model.prompt import Prompt
from sam3.model.sam3_image import Sam3Image
from sam3.sam.prompts import PromptError

VISUAL_TEXT = "visual"
"""The text that stands in where boxes or points alone say what to find."""


class Sam3Processor:
    """Prompts in, objects out.

    Example::

        processor = Sam3Processor(model)
        state = processor.set_image(Image.open("street.jpg"))
        state = processor.set_text_prompt("yellow bus", state)
        state["boxes"], state["masks"], state["scores"]          # (n, 4) pixels, (n, 1, H, W) bool, (n,)
        state = processor.add_geometric_prompt([0.3, 0.5, 0.2, 0.1], False, state)    # nothing like this box
        state = processor.set_confidence_threshold(0.3, state)                        # does not run the model

    After a run ``state["results"]`` holds one dict per prompt, with ``text``, ``image_index`` and the keys below. With
    one image and one text they lie in the state itself too; with several, the state holds a list under each key.

    - ``boxes``: x0, y0, x1, y1 in pixels, not clamped to the image, (n, 4).
    - ``scores``: 0 to 1, (n,).
    - ``masks``: bool, (n, 1, H, W). This and the next keys are missing if the model has no segmentation head.
    - ``masks_logits``: probabilities, in spite of the released name, (n, 1, H, W).
    - ``mask_logits``: real logits, if the processor was made with ``return_logits=True``.

    ``raw_outputs`` keeps all masks of a prompt at the model's own size, 66 MB for the released model, until the next
    prompt.
    """

    def __init__(
        self,
        model: Sam3Image,
        resolution: int | None = None,
        device: torch.device | str | None = None,
        confidence_threshold: float = 0.5,
        *,
        top_k: int | None = None,
        nms_iou: float | None = None,
        sort_by_score: bool = False,
        return_probabilities: bool = True,
        return_logits: bool = False,
        for_clicks: bool = True,
        max_prompts_per_pass: int = 4,
    ) -> None:
        """
        Args:
            model: The image model, in eval mode.
            resolution: Side of the model's input in pixels. Default, and what the weights were made for: the model's
                own. Another one must be a multiple of its patch size; ``predict_inst`` is then not available.
            device: Default, and all that is possible: where the model is. Accepted so that released calls work.
            confidence_threshold: Scores strictly above it are results.
            top_k: Keep at most so many per prompt.
            nms_iou: Drop what overlaps a better result by more than this IoU.
            sort_by_score: Best first; otherwise in the order of the model's queries.
            return_probabilities: Make ``masks_logits``. Without, full-size masks cost a fifth of the memory.
            return_logits: Make ``mask_logits``.
            for_clicks: Also encode what ``model.predict_inst`` reads, if the model has SAM heads.
            max_prompts_per_pass: Prompts that run at a time; each needs about 0.5 GB at the released size.

        Raises:
            ValueError: If a value is impossible, or ``device`` is not where the model is.
        """
        if not is_positive_int(max_prompts_per_pass):
            raise ValueError(f"max_prompts_per_pass must be a positive integer, got {max_prompts_per_pass!r}")
        self.model = model
        self.device = require_device(device, model.device)
        self.preprocess = model.preprocess
        if resolution is not None and resolution != model.preprocess.size_px:
            patch = model.config.trunk.patch_size_px
            if not is_positive_int(resolution) or resolution % patch:
                raise ValueError(f"resolution {resolution!r} is not a positive multiple of the patch size, {patch} px")
            self.preprocess = dataclasses.replace(model.preprocess, size_px=resolution)
        self.resolution = self.preprocess.size_px
        self.filter = ResultFilter(confidence_threshold, nms_iou, top_k, sort_by_score)
        self.mask_options = MaskOptions(return_probabilities, return_logits)
        self.max_prompts_per_pass = max_prompts_per_pass
        self._for_clicks = (
            for_clicks and model.inst_interactive_predictor is not None and self.preprocess == model.preprocess
        )

    @property
    def confidence_threshold(self) -> float:
        """Scores strictly above it are results."""
        return self.filter.confidence_threshold

    # --- images -------------------------------------------------------------------------------------------------------

    def set_image(self, image: Any, state: State | None = None) -> State:
        """Encode an image.

        Args:
            image: Anything that `sam3.image_input.to_rgb_uint8` takes.
            state: A state to use again; what it holds of another image is forgotten. Default: a new one.

        Returns:
            The state, with ``original_height``, ``original_width`` and ``backbone_out``.

        Raises:
            ImageInputError: If it is no image.
        """
        state, hws = self._encode([image], {} if state is None else state)
        state["original_height"], state["original_width"] = hws[0]
        return state

    def set_image_batch(self, images: Sequence[Any], state: State | None = None) -> State:
        """Encode several images, of any sizes, in one pass. Prompts then apply to each of them.

        Args:
            images: A list of what `set_image` takes.
            state: As for `set_image`.

        Returns:
            The state, with the lists ``original_heights`` and ``original_widths``, and ``backbone_out``.

        Raises:
            ImageInputError: If there is no image, or one is no image; the message says which.
        """
        state, hws = self._encode(images, {} if state is None else state)
        state["original_heights"], state["original_widths"] = [h for h, _ in hws], [w for _, w in hws]
        return state

    @torch.inference_mode()
    def _encode(self, images: Sequence[Any], state: State) -> tuple[State, list[tuple[int, int]]]:
        """Features of images, in place of all that the state holds of others; and their heights and widths."""
        self._require_eval_mode()
        weight = next(self.model.parameters())
        batch, hws = self.preprocess.prepare(images)
        batch = batch.to(weight.device, weight.dtype)
        backbone_out = self.model.backbone.forward_image(batch, need_sam2=self._for_clicks)
        if self._for_clicks:
            sam2, decoder = backbone_out["sam2_backbone_out"], self.model.heads.sam_mask_decoder
            fine, middle, coarse = sam2["backbone_fpn"]
            projected = [decoder.conv_s0(fine), decoder.conv_s1(middle), coarse]
            backbone_out["sam2_backbone_out"] = sam2 | {"backbone_fpn": projected}
        forget(state, IMAGE_KEYS, PROMPT_KEYS, RESULT_KEYS)
        state["backbone_out"] = backbone_out
        return state, hws

    # --- prompts ------------------------------------------------------------------------------------------------------

    def set_text_prompt(self, prompt: str | Sequence[str], state: State) -> State:
        """Find all objects that a text names; several texts are several prompts.

        The text replaces an earlier one; boxes and points stay and apply to every text.

        Raises:
            PromptError: If a text is empty.
            RuntimeError: If no image is set.
            ValueError: If the model has no detector or no text encoder.
        """
        original_hws(state)
        return self._run(state, texts=parse_texts(prompt))

    def add_geometric_prompt(
        self, box: Any, label: Any, state: State, *, box_format: str = "cxcywh", image_index: int | None = None
    ) -> State:
        """Add boxes as examples: everything like a positive box is found, everything like a negative one excluded.

        Without a text, boxes alone say what to find.

        Args:
            box: (4,) or (n, 4).
            label: True or 1 for positive, False or 0 for negative; one for all boxes, or one each.
            state: From `set_image` or `set_image_batch`.
            box_format: ``cxcywh``, fractions of the image (as released); ``xyxy_px`` or ``xywh_px``.
            image_index: Which image of a batch.

        Raises:
            PromptError: If a box is misshapen, not finite, inverted, without area or outside the image, or a label is
                neither.
            RuntimeError: If no image is set.
        """
        geometry = self._geometry(state)
        self._append_boxes(geometry, state, box, label, box_format, image_index)
        return self._run(state, geometry=geometry)

    def add_point_prompt(
        self, point: Any, label: Any, state: State, *, point_format: str = "xy", image_index: int | None = None
    ) -> State:
        """Add points as examples, like boxes of unknown size. For the mask of one clicked object see ``predict_inst``.

        Args:
            point: (2,) or (n, 2).
            label: As for `add_geometric_prompt`.
            state: From `set_image` or `set_image_batch`.
            point_format: ``xy``, fractions of the image; or ``xy_px``.
            image_index: Which image of a batch.

        Raises:
            PromptError: If a point is misshapen, not finite or outside the image, or a label is neither.
            RuntimeError: If no image is set.
        """
        geometry = self._geometry(state)
        self._append_points(geometry, state, point, label, point_format, image_index)
        return self._run(state, geometry=geometry)

    def set_prompts(
        self,
        state: State,
        *,
        text: str | Sequence[str] | None = None,
        boxes: Any = None,
        box_labels: Any = True,
        points: Any = None,
        point_labels: Any = True,
        box_format: str = "cxcywh",
        point_format: str = "xy",
        image_index: int | None = None,
    ) -> State:
        """Text, boxes and points together, in place of all earlier prompts, in one run of the model.

        Raises:
            PromptError: If there is no prompt, or one is refused by the methods above.
            RuntimeError: If no image is set.
        """
        geometry = self._geometry(state, is_empty=True)
        if text is None and boxes is None and points is None:
            raise PromptError("no prompt: give text, boxes or points")
        if boxes is not None:
            self._append_boxes(geometry, state, boxes, box_labels, box_format, image_index)
        if points is not None:
            self._append_points(geometry, state, points, point_labels, point_format, image_index)
        return self._run(state, [VISUAL_TEXT] if text is None else parse_texts(text), geometry)

    def reset_all_prompts(self, state: State) -> State:
        """Forget texts, boxes, points and results; the image stays encoded."""
        forget(state.get("backbone_out", {}), TEXT_KEYS)
        forget(state, PROMPT_KEYS, RESULT_KEYS)
        return state

    # --- results ------------------------------------------------------------------------------------------------------

    def set_confidence_threshold(self, threshold: float, state: State | None = None) -> State | None:
        """Change the threshold, and filter the state's results again; the model does not run."""
        return self.set_filter(state, confidence_threshold=threshold)

    def set_filter(self, state: State | None = None, **changes: Any) -> State | None:
        """Change ``confidence_threshold``, ``top_k``, ``nms_iou`` or ``sort_by_score``, and filter again.

        Raises:
            ValueError: If a value is impossible.
        """
        self.filter = dataclasses.replace(self.filter, **changes)
        if state is not None and "raw_outputs" in state:
            self._update_results(state)
        return state

    @torch.inference_mode()
    def _run(self, state: State, texts: list[str] | None = None, geometry: Prompt | None = None) -> State:
        """Run the detector with changed prompts. The state changes only when everything has gone well."""
        hws = original_hws(state)
        if self.model.training:
            raise RuntimeError(
                "the model is in training mode, in which its results are not those to predict: model.eval()"
            )
        self.model._require_detector()
        backbone_out = dict(state["backbone_out"])
        if texts is None and "language_features" not in backbone_out:
            texts = [VISUAL_TEXT]
        if texts is not None:
            if self.model.backbone.language_backbone is not None:
                warn_of_cut_texts(texts, self.model.backbone.language_backbone.tokenizer)
            backbone_out |= self.model.backbone.forward_text(texts, device=self.device)
        geometry = self._geometry(state) if geometry is None else geometry
        num_texts = backbone_out["language_features"].shape[1]
        pairs = [(image, text) for image in range(len(hws)) for text in range(num_texts)]
        parts: list[dict[str, Tensor]] = []
        for start in range(0, len(pairs), self.max_prompts_per_pass):
            image_ids, text_ids = map(list, zip(*pairs[start : start + self.max_prompts_per_pass], strict=True))
            stage = FindStage.of(image_ids, text_ids, self.device)
            output = self.model.forward_grounding(
                backbone_out=dict(backbone_out),
                find_input=stage,
                find_target=None,
                geometric_prompt=select_rows(geometry, stage.img_ids),
            )
            parts.append({key: output[key] for key in RAW_KEYS if output.get(key) is not None})
        raw = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        state["backbone_out"].update({key: backbone_out[key] for key in TEXT_KEYS if key in backbone_out})
        if texts is not None:
            state["texts"] = texts
        state["geometric_prompt"] = geometry
        state["raw_outputs"] = raw
        return self._update_results(state)

    @torch.inference_mode()
    def _update_results(self, state: State) -> State:
        hws, raw = original_hws(state), state["raw_outputs"]
        num_texts = len(raw["pred_logits"]) // len(hws)
        texts = state.get("texts") or [None] * num_texts
        forget(state, RESULT_KEYS)
        results = []
        for index in range(len(raw["pred_logits"])):
            image_index, text_index = divmod(index, num_texts)
            found = detections(
                raw,
                index,
                hws[image_index],
                self.preprocess,
                self.filter,
                self.mask_options,
                self.model.supervise_joint_box_scores,
            )
            results.append({"text": texts[text_index], "image_index": image_index, **found})
        state["results"] = results
        for key in found:
            values = [result[key] for result in results]
            state[key] = values if len(results) > 1 or "original_heights" in state else values[0]
        return state

    def _require_eval_mode(self) -> None:
        if self.model.training:
            raise RuntimeError(
                "the model is in training mode, where dropout changes its results and images its statistics: call "
                "model.eval()"
            )

    def _geometry(self, state: State, is_empty: bool = False) -> Prompt:
        """A copy of the state's boxes and points, one row per image."""
        num_images = len(original_hws(state))
        prompt = None if is_empty else state.get("geometric_prompt")
        return self.model._get_dummy_prompt(num_images) if prompt is None else prompt.clone()

    def _append_boxes(
        self, geometry: Prompt, state: State, boxes: Any, labels: Any, box_format: str, image_index: int | None
    ) -> None:
        hws = original_hws(state)
        index = require_image_index(image_index, len(hws))
        values = parse_boxes(boxes, hws[index], box_format)
        values = values * values.new_tensor(image_share(self.preprocess, hws[index]) * 2)
        label_values = parse_labels(labels, len(values), "box")
        geometry.append_boxes(*rows_of_one_image(values, label_values, index, len(hws), self.device))

    def _append_points(
        self, geometry: Prompt, state: State, points: Any, labels: Any, point_format: str, image_index: int | None
    ) -> None:
        hws = original_hws(state)
        index = require_image_index(image_index, len(hws))
        if POINT_PROMPTS in self.model.missing_parts:
            raise PromptError(
                "this model's checkpoint has no weights for point prompts of the detector, which Hugging Face's layout "
                "cannot hold: load sam3.pt, draw a box, or use predict_inst for the mask of one clicked object"
            )
        values = parse_points(points, hws[index], point_format)
        values = values * values.new_tensor(image_share(self.preprocess, hws[index]))
        label_values = parse_labels(labels, len(values), "point")
        geometry.append_points(*rows_of_one_image(values, label_values, index, len(hws), self.device))
