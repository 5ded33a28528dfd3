"""From what the model returns for a batch of prompts to scores, boxes and masks of each image.

Restates the public behaviour of ``PostProcessImage`` of Meta's SAM 3 package 0.1.4. What differs: masks are enlarged
where the model is, some at a time, and only those that are kept; no device is required.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sam3.coco_rle import encode_mask
from sam3.finite import require_finite
from sam3.model.box_ops import cxcywh_to_xyxy
from sam3.model.data_misc import FindMetadata
from sam3.model.detections import MaskOptions, full_size_masks, image_share
from sam3.preprocess import Preprocess

IOU_TYPES = ("bbox", "segm")
Sizes = Sequence[Sequence[float]] | Tensor
Result = dict[str, Any]


class PostProcessImage(nn.Module):
    """Results of a batch of prompts, as many as asked for of each image.

    Example::

        images, sizes = model.preprocess.prepare([street, garden])
        stage = FindStage.of([0, 0, 1], [0, 1, 1])  # "car" and "dog" on the street, "dog" in the garden
        names = FindMetadata([1, 1, 2], [1, 1, 2], [3, 18, 18], [sizes[0], sizes[0], sizes[1]])
        with torch.inference_mode():
            output = model(BatchedDatapoint(images, ["car", "dog"], [stage], [], [names]))
        options = {"use_original_ids": True, "use_original_sizes_box": True, "use_original_sizes_mask": True}
        results = PostProcessImage(100, "segm", detection_threshold=0.5, **options).process_results(output, [names])
        results[1]["boxes"], results[1]["labels"]  # what was found on the street: 3 is "car" here, 18 is "dog"

    It has no weights. For one image and the prompts of a user see `sam3.Sam3Processor`.
    """

    def __init__(
        self,
        max_dets_per_img: int,
        iou_type: str = "bbox",
        to_cpu: bool = True,
        use_original_ids: bool = False,
        use_original_sizes_box: bool = False,
        use_original_sizes_mask: bool = False,
        convert_mask_to_rle: bool = False,
        always_interpolate_masks_on_gpu: bool = True,
        use_presence: bool = True,
        detection_threshold: float = -1.0,
        *,
        preprocess: Preprocess | None = None,
    ) -> None:
        """
        Args:
            max_dets_per_img: Keep the best of each image; 0 or less: all.
            iou_type: ``bbox`` for boxes alone, ``segm`` for masks too.
            to_cpu: Bring the results to the CPU; otherwise they stay where the model is.
            use_original_ids: Results are listed under ``original_image_id`` and labelled with
                ``original_category_id``; otherwise under ``coco_image_id``, and every label is 1.
            use_original_sizes_box: Boxes in pixels of the image; otherwise as fractions of it.
            use_original_sizes_mask: Masks in the size of the image; otherwise in the model's own.
            convert_mask_to_rle: ``masks_rle``, COCO run lengths, in place of ``masks``.
            always_interpolate_masks_on_gpu: Accepted so that released calls work: masks are enlarged where they are.
            use_presence: Multiply scores by the presence. False for a model with joint scores
                (``supervise_joint_box_scores``), which hold it already.
            detection_threshold: Keep scores strictly above it; 0 or less: all.
            preprocess: How images became the model's input; default: stretched.

        Raises:
            ValueError: If ``iou_type`` is unknown, or letterboxed images lack their sizes.
        """
        super().__init__()
        if iou_type not in IOU_TYPES:
            raise ValueError(f"iou_type {iou_type!r} is not one of {IOU_TYPES}")
        self.preprocess = preprocess or Preprocess()
        if self.preprocess.mode != "stretch" and not (use_original_sizes_box and use_original_sizes_mask):
            raise ValueError(
                f"preprocessing mode {self.preprocess.mode!r}: an image's padding follows from its size, so set "
                "use_original_sizes_box=True and use_original_sizes_mask=True"
            )
        self.max_dets_per_img = max_dets_per_img
        self.iou_type = iou_type
        self.to_cpu = to_cpu
        self.use_original_ids = use_original_ids
        self.use_original_sizes_box = use_original_sizes_box
        self.use_original_sizes_mask = use_original_sizes_mask
        self.convert_mask_to_rle = convert_mask_to_rle
        self.use_presence = use_presence
        self.detection_threshold = detection_threshold

    @torch.no_grad()
    def forward(
        self,
        outputs: Mapping[str, Any],
        target_sizes_boxes: Sizes | None = None,
        target_sizes_masks: Sizes | None = None,
        forced_labels: Sequence[int] | Tensor | None = None,
    ) -> list[Result]:
        """Results of each prompt.

        Args:
            outputs: What ``Sam3Image.forward_grounding`` returned for B prompts.
            target_sizes_boxes: Height and width that boxes are scaled to, (B, 2); None: fractions.
            target_sizes_masks: Height and width of the masks, (B, 2); None: the model's own size.
            forced_labels: A label for each prompt, (B,); None: 1.

        Returns:
            B dicts: ``scores`` (n,) and ``boxes`` (n, 4), x0, y0, x1, y1, float32; ``labels`` (n,), int64; with masks
            ``masks``, bool (n, 1, H, W), or ``masks_rle``, a list. In the order of the queries.

        Raises:
            ValueError: If masks are asked for and the model made none, or a number of sizes or labels is not B.
                `NonFiniteError`, which is one too, if scores are not finite.
        """
        num_prompts = len(outputs["pred_logits"])
        for name, values in (
            ("target_sizes_boxes", target_sizes_boxes),
            ("target_sizes_masks", target_sizes_masks),
            ("forced_labels", forced_labels),
        ):
            if values is not None and len(values) != num_prompts:
                raise ValueError(f"{name} has {len(values)} entries for {num_prompts} prompts")
        if self.iou_type == "segm" and outputs.get("pred_masks") is None:
            raise ValueError("iou_type 'segm' needs pred_masks: build the model with enable_segmentation=True")
        scores = self._scores(outputs)
        return [
            self._result(
                outputs,
                index,
                scores[index],
                None if target_sizes_boxes is None else target_sizes_boxes[index],
                None if target_sizes_masks is None else target_sizes_masks[index],
                1 if forced_labels is None else int(forced_labels[index]),
            )
            for index in range(num_prompts)
        ]

    def process_results(
        self, find_stages: Iterable[Mapping[str, Any]], find_metadatas: Sequence[FindMetadata]
    ) -> dict[int, Result]:
        """Results of each image: those of its prompts together, the best ``max_dets_per_img`` of them.

        Args:
            find_stages: What the model returned for each stage; a `SAM3Output` is that.
            find_metadatas: What each stage's prompts were asked of, as many as stages.

        Returns:
            By image id what `forward` returns for a prompt.

        Raises:
            ValueError: As for `forward`, or if the stages differ in number.
        """
        results: dict[int, Result] = {}
        for outputs, metadata in zip(find_stages, find_metadatas, strict=True):
            found = self(
                outputs,
                metadata.original_size if self.use_original_sizes_box else None,
                metadata.original_size if self.use_original_sizes_mask else None,
                metadata.original_category_id if self.use_original_ids else None,
            )
            ids = metadata.original_image_id if self.use_original_ids else metadata.coco_image_id
            for image_id, result in zip(ids, found, strict=True):
                key = int(image_id)
                results[key] = _joined(results[key], result) if key in results else result
        return {image_id: self._best(result) for image_id, result in results.items()}

    def _scores(self, outputs: Mapping[str, Any]) -> Tensor:
        """(B, N), float32."""
        scores = outputs["pred_logits"].squeeze(-1).to(torch.float32).sigmoid()
        if self.use_presence:
            scores = scores * outputs["presence_logit_dec"].to(torch.float32).sigmoid()
        require_finite(scores, "scores", outputs["pred_logits"].dtype)
        return scores

    def _result(
        self,
        outputs: Mapping[str, Any],
        index: int,
        scores: Tensor,
        box_size_hw: Any,
        mask_size_hw: Any,
        label: int,
    ) -> Result:
        kept = torch.arange(len(scores), device=scores.device)
        if self.detection_threshold > 0:
            kept = kept[scores > self.detection_threshold]
        kept = kept[_best_rows(scores[kept], self.max_dets_per_img)]
        boxes = cxcywh_to_xyxy(outputs["pred_boxes"][index, kept].to(torch.float32))
        if box_size_hw is not None:
            height, width = (int(side) for side in box_size_hw)
            share_x, share_y = image_share(self.preprocess, (height, width))
            boxes = boxes * boxes.new_tensor([width / share_x, height / share_y] * 2)
        result: Result = {"scores": scores[kept], "labels": torch.full_like(kept, label), "boxes": boxes}
        if self.iou_type == "segm":
            result["masks"] = self._masks(outputs["pred_masks"][index, kept], mask_size_hw)
        if self.to_cpu:
            result = {key: value.cpu() for key, value in result.items()}
        if self.convert_mask_to_rle and "masks" in result:
            result["masks_rle"] = [encode_mask(mask[0].cpu().numpy()) for mask in result.pop("masks")]
        return result

    def _masks(self, logits_nhw: Tensor, size_hw: Any) -> Tensor:
        """Bool, (n, 1, H, W): probability above 0.5, which is logit above 0."""
        if size_hw is None:
            return logits_nhw[:, None] > 0
        height, width = (int(side) for side in size_hw)
        options = MaskOptions(probabilities=False)
        return full_size_masks(logits_nhw, (height, width), self.preprocess, options)["masks"]

    def _best(self, result: Result) -> Result:
        rows = _best_rows(result["scores"], self.max_dets_per_img)
        return {
            key: [value[row] for row in rows.tolist()] if isinstance(value, list) else value[rows]
            for key, value in result.items()
        }


def _best_rows(scores: Tensor, limit: int) -> Tensor:
    """Rows of the ``limit`` highest scores (0 or less: of all), in their order."""
    if limit <= 0 or len(scores) <= limit:
        return torch.arange(len(scores), device=scores.device)
    return scores.argsort(descending=True, stable=True)[:limit].sort().values


def _joined(first: Result, second: Result) -> Result:
    """Results of two prompts on one image."""
    return {
        key: value + second[key] if isinstance(value, list) else torch.cat([value, second[key]])
        for key, value in first.items()
    }
