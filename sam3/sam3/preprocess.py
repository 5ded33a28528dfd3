"""The one place where pixels become tensors, and where coordinates and masks cross between image and model frames.

SAM 3 stretches every image to a square and maps it to [-1, 1]; that is the default. The same object is used when a
teacher is exported, a student trained and a merged model deployed; its description is stored in the embedding store and
in every checkpoint and compared wherever two meet, because a student that is shown other pixels than its teacher learns
the wrong function without any error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sam3.image_input import ImageInputError, require_image_list, to_rgb_uint8

MODES = ("stretch", "letterbox")
INTERPOLATIONS = ("bilinear", "bicubic", "nearest")


class PreprocessMismatchError(ValueError):
    """Two things that must see the same pixels were made with different preprocessing."""


@dataclass(frozen=True)
class Preprocess:
    """Image to model input, and back for coordinates and masks.

    ``stretch`` resizes to (size_px, size_px) and gives up the aspect ratio; ``letterbox`` resizes the longest side to
    ``size_px`` and pads the right and the bottom with zeros *after* normalisation. Resizing is antialiased and done
    on uint8, as the deployed SAM 3 processor does on the CPU.
    """

    size_px: int = 1008
    mode: str = "stretch"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per RGB channel, for pixel values in 0..1."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"preprocessing mode {self.mode!r} is not one of {MODES}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"preprocessing interpolation {self.interpolation!r} is not one of {INTERPOLATIONS}")
        if self.size_px < 1:
            raise ValueError(f"preprocessing size_px must be positive, got {self.size_px}")
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) != 3:
                raise ValueError(f"preprocessing {name} needs three values (R, G, B), got {values}")
            object.__setattr__(self, name, values)
        if min(self.std) <= 0:
            raise ValueError(f"preprocessing std must be positive, got {self.std}")

    @classmethod
    def letterbox_imagenet(cls, size_px: int = 1008) -> Preprocess:
        """What published EfficientSAM3 stage-1 files were distilled with."""
        return cls(size_px, "letterbox", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON and checkpoints."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Preprocess:
        """Inverse of `to_dict`.

        Raises:
            ValueError: If a field is unknown or a value is impossible.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(f"preprocessing description: unknown field {unknown[0]!r}; known are {sorted(known)}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)

    def require_equal(self, other: Preprocess, mine: str, theirs: str) -> None:
        """Check that two preprocessing descriptions that meet are the same.

        Args:
            other: The description to compare with.
            mine: What this description belongs to, e.g. ``the training config``.
            theirs: What the other belongs to, e.g. ``the embedding store output/teacher/embeddings``.

        Raises:
            PreprocessMismatchError: If they differ; the message prints both.
        """
        if self != other:
            raise PreprocessMismatchError(
                f"preprocessing differs between {mine} and {theirs}:\n  {mine}: {self.to_dict()}\n"
                f"  {theirs}: {other.to_dict()}\nMake both the same, or export the embeddings again."
            )

    def resized_hw(self, original_hw: tuple[int, int]) -> tuple[int, int]:
        """Height and width that the image itself has inside the model's square input."""
        if self.mode == "stretch":
            return self.size_px, self.size_px
        height, width = original_hw
        scale = self.size_px / max(height, width)
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

    def __call__(self, image: Any) -> Tensor:
        """Turn one image into a model input.

        Args:
            image: See `sam3.image_input.to_rgb_uint8`.

        Returns:
            float32 tensor, (3, size_px, size_px).
        """
        return self.normalize(self.resize(to_rgb_uint8(image)))

    def prepare(self, images: Sequence[Any]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Turn several images of any sizes into one batch; one at a time is in memory at its full size.

        Args:
            images: A list; for each, see `sam3.image_input.to_rgb_uint8`.

        Returns:
            float32, (N, 3, size_px, size_px), and height and width of each image.

        Raises:
            ImageInputError: If it is no list or an empty one, or one is no image; the message says which.
        """
        inputs, hws = [], []
        for i, image in enumerate(require_image_list(images)):
            try:
                pixels = to_rgb_uint8(image)
            except ImageInputError as error:
                if len(images) == 1:
                    raise
                raise type(error)(f"image {i}: {error}") from None
            hws.append((pixels.shape[-2], pixels.shape[-1]))
            inputs.append(self.normalize(self.resize(pixels)))
        return torch.stack(inputs), hws

    def resize(self, pixels_chw: Tensor) -> Tensor:
        """Resize a uint8 image (3, H, W) to its size in the model's input: uint8, (3, h, w), contiguous."""
        # Importing torchvision takes as long as half of torch and makes torch's compiler set an environment variable.
        from torchvision.transforms.v2.functional import InterpolationMode
        from torchvision.transforms.v2.functional import resize as tv_resize

        resized_hw = self.resized_hw((pixels_chw.shape[-2], pixels_chw.shape[-1]))
        mode = InterpolationMode(self.interpolation)
        # One layout for all sources: with the channels last, as photos are decoded, torch resizes three times as fast.
        batch = pixels_chw[None].contiguous(memory_format=torch.channels_last)
        return tv_resize(batch, list(resized_hw), mode, antialias=mode != InterpolationMode.NEAREST)[0].contiguous()

    def normalize(self, pixels_chw: Tensor) -> Tensor:
        """Scale and pad a resized uint8 image (3, h, w): float32, (3, size_px, size_px)."""
        mean = torch.tensor(self.mean, device=pixels_chw.device)[:, None, None]
        std = torch.tensor(self.std, device=pixels_chw.device)[:, None, None]
        normalized = pixels_chw.to(torch.float32).div_(255.0).sub_(mean).div_(std)
        height, width = normalized.shape[-2:]
        if (height, width) == (self.size_px, self.size_px):
            return normalized
        return F.pad(normalized, (0, self.size_px - width, 0, self.size_px - height))

    def valid_hw(self, original_hw: tuple[int, int]) -> tuple[float, float]:
        """Scale factors (y, x) from original pixels to model-input pixels."""
        height, width = self.resized_hw(original_hw)
        return height / original_hw[0], width / original_hw[1]

    def coords_to_model(self, coords_xy_px: Tensor, original_hw: tuple[int, int]) -> Tensor:
        """Map (..., 2) x, y pixel coordinates of the original image to pixels of the model input."""
        scale_y, scale_x = self.valid_hw(original_hw)
        return coords_xy_px * coords_xy_px.new_tensor([scale_x, scale_y])

    def boxes_to_model(self, boxes_xyxy_px: Tensor, original_hw: tuple[int, int]) -> Tensor:
        """Map (..., 4) xyxy pixel boxes of the original image to pixels of the model input."""
        return self.coords_to_model(boxes_xyxy_px.unflatten(-1, (2, 2)), original_hw).flatten(-2)

    def masks_to_image(self, logits_bchw: Tensor, original_hw: tuple[int, int]) -> Tensor:
        """Resize mask logits that cover the model input to the original image, dropping padding.

        Args:
            logits_bchw: Logits of any square size, (B, C, S, S).
            original_hw: Height and width of the original image.

        Returns:
            Logits, (B, C, H, W), bilinear without corner alignment.
        """
        if self.mode == "letterbox":
            height, width = self.resized_hw(original_hw)
            logits_bchw = F.interpolate(logits_bchw, (self.size_px, self.size_px), mode="bilinear", align_corners=False)
            logits_bchw = logits_bchw[..., :height, :width]
        return F.interpolate(logits_bchw, original_hw, mode="bilinear", align_corners=False)

    def build_valid_mask(self, original_hw: tuple[int, int], grid_size: int) -> Tensor:
        """Which cells of a feature grid lie inside the image.

        Args:
            original_hw: Height and width of the original image.
            grid_size: Side of the grid.

        Returns:
            float32, (1, grid_size, grid_size): 1 inside the image, 0 in its padding. At least one cell is 1.
        """
        height, width = self.resized_hw(original_hw)
        inside = torch.zeros(1, 1, self.size_px, self.size_px)
        inside[..., :height, :width] = 1.0
        grid = F.interpolate(inside, (grid_size, grid_size), mode="bilinear", align_corners=False)[0]
        valid = (grid > 0.5).to(torch.float32)
        if not valid.any():
            valid[0, 0, 0] = 1.0
        return valid
