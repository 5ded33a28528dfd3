"""Flips and crops that a 4-byte seed describes completely.

A teacher's embedding belongs to one view of a photo. The export stores the seed that made the view in front of the
embedding; training makes the same view from the same seed, so the student is shown exactly what its teacher saw. The
seed itself is a function of the export's seed and the image's key, so a resumed export stores the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

MAX_SEED = 2**31 - 1


@dataclass(frozen=True)
class AugmentSpec:
    """Which views there are."""

    flip_prob: float = 0.5
    """Probability of a left-right flip."""
    min_crop_area: float = 0.5
    """A crop keeps the image's aspect ratio and between this share and all of its area."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.flip_prob <= 1.0:
            raise ValueError(f"augmentation flip_prob must lie in 0..1, got {self.flip_prob}")
        if not 0.0 < self.min_crop_area <= 1.0:
            raise ValueError(f"augmentation min_crop_area must lie in (0, 1], got {self.min_crop_area}")

    def to_dict(self) -> dict[str, Any]:
        """Plain types for the embedding store's description."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AugmentSpec:
        """Inverse of `to_dict`.

        Raises:
            ValueError: If a field is unknown or a value is impossible.
        """
        unknown = sorted(set(data) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"augmentation description: unknown field {unknown[0]!r}")
        return cls(**data)


@dataclass(frozen=True)
class View:
    """One view of an image; the crop comes first. Positions and sizes are shares of the image's width and height."""

    is_flipped: bool = False
    left: float = 0.0
    top: float = 0.0
    side: float = 1.0
    """Width of the crop over that of the image; the same for the heights."""

    def window(self, image_hw: tuple[int, int]) -> tuple[int, int, int, int]:
        """Top, left, height and width in pixels of the crop of an image of this size, before the flip."""
        height, width = image_hw
        crop_h, crop_w = max(1, round(height * self.side)), max(1, round(width * self.side))
        top, left = min(round(height * self.top), height - crop_h), min(round(width * self.left), width - crop_w)
        return top, left, crop_h, crop_w

    def apply(self, pixels_chw: Tensor) -> Tensor:
        """The view of an image (C, H, W): a contiguous tensor (C, h, w)."""
        top, left, crop_h, crop_w = self.window((pixels_chw.shape[-2], pixels_chw.shape[-1]))
        view = pixels_chw[:, top : top + crop_h, left : left + crop_w]
        return (view.flip(-1) if self.is_flipped else view).contiguous()


def seed_of_key(run_seed: int, key: str, epoch: int = 0) -> int:
    """The 4-byte seed of an image, in 0..2^31 - 1: depends on the run's seed, the key and the epoch alone."""
    digest = hashlib.blake2b(f"{run_seed}\n{epoch}\n{key}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & MAX_SEED


def view_of_seed(spec: AugmentSpec | None, seed: int) -> View:
    """The view that a seed stands for; without a spec, the whole image.

    Uses the generator's raw 64-bit stream, which numpy keeps stable across versions, unlike its distributions.

    Raises:
        ValueError: If the seed is no non-negative int32.
    """
    if spec is None:
        return View()
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"an augmentation seed must lie in 0..{MAX_SEED}, got {seed}")
    flip, area, x, y = (int(value) >> 11 for value in np.random.PCG64(seed).random_raw(4))
    unit = 2.0**-53
    side = (spec.min_crop_area + (1.0 - spec.min_crop_area) * area * unit) ** 0.5
    return View(flip * unit < spec.flip_prob, x * unit * (1.0 - side), y * unit * (1.0 - side), side)
