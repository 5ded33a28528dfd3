"""Masks of one or several images from clicks, boxes and earlier masks, as in Segment Anything.

Coordinates are x, y in pixels of the image that was set; masks come back in that image's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam3.finite import require_finite
from sam3.preprocess import Preprocess
from sam3.sam.connected_components import fill_holes
from sam3.sam.heads import SamFeatures, SamHeads
from sam3.sam.prompts import PromptError, Prompts

Masks = tuple[np.ndarray, np.ndarray, np.ndarray]

# SAM 3 fills holes of up to 256 pixels on its 288 x 288 grid; a smaller model's grid has fewer, larger pixels.
_HOLE_SHARE_OF_GRID = 256 / 288**2
_LOW_RES_LOGIT_LIMIT = 32.0


class SAM3InteractiveImagePredictor(nn.Module):
    """Set an image once, then ask for masks as often as needed.

    Example::

        predictor = model.inst_interactive_predictor
        predictor.set_image(Image.open("photo.jpg"))
        masks, ious, low_res_logits = predictor.predict(box=np.array([100, 150, 420, 380]), multimask_output=False)
    """

    def __init__(
        self,
        sam_model: SamHeads,
        encode_images: Callable[[Tensor], SamFeatures],
        preprocess: Preprocess,
        mask_threshold: float = 0.0,
        max_hole_area: float | None = None,
        max_sprinkle_area: float = 0.0,
    ) -> None:
        """
        Args:
            sam_model: The SAM heads.
            encode_images: Preprocessed images (N, 3, S, S) to what the heads read of them.
            preprocess: How an image becomes the model's input, and coordinates and masks cross between the two.
            mask_threshold: Logit above which a pixel belongs to the mask.
            max_hole_area: Holes of at most this many low-resolution pixels are filled; None: 256 on a 288 x 288 grid
                and the same share of another grid.
            max_sprinkle_area: Islands of at most this many low-resolution pixels are removed.
        """
        super().__init__()
        self.model = sam_model
        self.preprocess = preprocess
        self.mask_threshold = mask_threshold
        self.max_hole_area = max_hole_area
        self.max_sprinkle_area = max_sprinkle_area
        self._encode_images = encode_images
        self.reset_predictor()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.no_mem_embed.device

    def reset_predictor(self) -> None:
        """Forget the images."""
        self._features: SamFeatures | None = None
        self._original_hws: list[tuple[int, int]] = []
        self._is_batch = False

    def set_image(self, image: Any) -> None:
        """Encode one image, of any kind that `sam3.image_input.to_rgb_uint8` takes."""
        self._set_images([image], is_batch=False)

    def set_image_batch(self, image_list: Sequence[Any]) -> None:
        """Encode several images, of any sizes, in one pass; use `predict_batch` afterwards.

        Raises:
            ImageInputError: If it is no list or an empty one, or one is no image; the message says which.
        """
        self._set_images(image_list, is_batch=True)

    @torch.no_grad()
    def _set_images(self, images: Sequence[Any], is_batch: bool) -> None:
        self.reset_predictor()
        weight = self.model.no_mem_embed
        batch, original_hws = self.preprocess.prepare(images)
        self._features = self._encode_images(batch.to(weight.device, weight.dtype))
        self._original_hws = original_hws
        self._is_batch = is_batch

    @contextmanager
    def using(
        self, features: SamFeatures, original_hws: Sequence[tuple[int, int]], is_batch: bool
    ) -> Iterator[SAM3InteractiveImagePredictor]:
        """Answer prompts on images that were encoded elsewhere; afterwards the images are those that were set before.

        Args:
            features: What the heads read of N images.
            original_hws: Height and width of each image in pixels.
            is_batch: Whether `predict_batch` or `predict` follows.
        """
        before = self._features, self._original_hws, self._is_batch
        self._features, self._original_hws, self._is_batch = features, list(original_hws), is_batch
        try:
            yield self
        finally:
            self._features, self._original_hws, self._is_batch = before

    def get_image_embedding(self) -> Tensor:
        """The coarse map of the images that are set, (N, C, G, G).

        Raises:
            RuntimeError: If no image is set.
        """
        return self._require_features().embedding

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        normalize_coords: bool = True,
    ) -> Masks:
        """Masks for one prompt, or for n prompts at once, on the image that is set.

        Args:
            point_coords: Clicks, x and y in pixels of the image, (P, 2); for n prompts (n, P, 2).
            point_labels: 1 for a click on the object, 0 for one off it, (P,) or (n, P). Also accepted: -1 for padding,
                2 and 3 for a box's top-left and bottom-right corner.
            box: x0, y0, x1, y1 in pixels, (4,); for n prompts (n, 4). With clicks, both describe the same prompts.
            mask_input: Low-resolution logits of an earlier prediction, (S, S), (1, S, S) or (n, 1, S, S); S is 288
                for ``sam3``.
            multimask_output: Three candidates (for an ambiguous prompt such as a single click), or one mask.
            return_logits: Return logits in place of binary masks.
            normalize_coords: False if coordinates are already fractions of the image's width and height.

        Returns:
            float32 arrays. Masks (k, H, W) of zeros and ones, or logits; predicted IoUs (k,); low-resolution logits
            (k, S, S), clamped to +-32. k is 3 or 1; for n > 1 prompts a leading axis n is added.

        Raises:
            ValueError: If a prompt is malformed; the message says which. `NonFiniteError`, which is one too, if the
                model's answer is not finite.
            RuntimeError: If no image is set, or several are.
        """
        self._require_features()
        if self._is_batch:
            raise RuntimeError("several images are set: use predict_batch, or set_image for a single one")
        prompts = Prompts.parse(point_coords, point_labels, box, mask_input, normalize_coords)
        return self._predict(0, prompts, multimask_output, return_logits)

    def predict_batch(
        self,
        point_coords_batch: Sequence[np.ndarray | None] | None = None,
        point_labels_batch: Sequence[np.ndarray | None] | None = None,
        box_batch: Sequence[np.ndarray | None] | None = None,
        mask_input_batch: Sequence[np.ndarray | None] | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        normalize_coords: bool = True,
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """`predict` for each image of `set_image_batch`; each argument is a list with one entry per image.

        Returns:
            Three lists with one entry per image: masks, IoUs, low-resolution logits.
        """
        self._require_features()
        if not self._is_batch:
            raise RuntimeError("no batch of images is set: call set_image_batch first")
        num_images = len(self._original_hws)
        columns: list[Sequence[np.ndarray | None]] = []
        for name, column in (
            ("point_coords_batch", point_coords_batch),
            ("point_labels_batch", point_labels_batch),
            ("box_batch", box_batch),
            ("mask_input_batch", mask_input_batch),
        ):
            if column is not None and len(column) != num_images:
                raise ValueError(f"{name} has {len(column)} entries for {num_images} images")
            columns.append(column if column is not None else [None] * num_images)
        results = []
        for index, (points, labels, box, mask) in enumerate(zip(*columns, strict=True)):
            try:
                prompts = Prompts.parse(points, labels, box, mask, normalize_coords)
            except PromptError as error:
                raise PromptError(f"image {index}: {error}") from None
            results.append(self._predict(index, prompts, multimask_output, return_logits))
        masks, ious, low_res = zip(*results, strict=True)
        return list(masks), list(ious), list(low_res)

    def _require_features(self) -> SamFeatures:
        if self._features is None:
            raise RuntimeError("no image is set: call set_image first")
        return self._features

    @torch.no_grad()
    def _predict(self, index: int, prompts: Prompts, multimask_output: bool, return_logits: bool) -> Masks:
        features = SamFeatures(*(m[index : index + 1] for m in self._require_features()))
        original_hw = self._original_hws[index]
        points, labels, mask_logits = prompts.to_model(self.preprocess, original_hw, features)
        output = self.model.forward_prompts(features, points, labels, mask_logits)
        chosen = self.model.select(output, multimask_output)
        low_res = chosen.mask_logits.to(torch.float32)
        require_finite(chosen.ious, "estimated IoUs", features.embedding.dtype)
        require_finite(low_res, "masks", features.embedding.dtype)
        masks = self._full_size_masks(low_res, original_hw, return_logits)
        ious = chosen.ious.to(torch.float32).cpu().numpy()
        low_res_array = low_res.clamp(-_LOW_RES_LOGIT_LIMIT, _LOW_RES_LOGIT_LIMIT).cpu().numpy()
        if prompts.num_prompts == 1:
            return masks[0], ious[0], low_res_array[0]
        return masks, ious, low_res_array

    def _full_size_masks(self, low_res: Tensor, original_hw: tuple[int, int], return_logits: bool) -> np.ndarray:
        """(n, k, S, S) logits -> (n, k, H, W) float32, one prompt at a time: full-size logits of many do not fit."""
        max_hole_area = self.max_hole_area
        if max_hole_area is None:
            max_hole_area = _HOLE_SHARE_OF_GRID * low_res.shape[-2] * low_res.shape[-1]
        filled = fill_holes(low_res, self.mask_threshold, max_hole_area, self.max_sprinkle_area)
        masks = np.empty((*low_res.shape[:2], *original_hw), dtype=np.float32)
        for target, logits in zip(masks, filled, strict=True):
            full = self.preprocess.masks_to_image(logits[None], original_hw)[0]
            target[...] = (full if return_logits else full > self.mask_threshold).cpu().numpy()
        return masks
