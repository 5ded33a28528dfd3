"""Running means and mask overlap."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def mask_iou(predicted_nhw: Tensor, target_nhw: Tensor) -> Tensor:
    """Intersection over union of pairs of boolean masks.

    Args:
        predicted_nhw: bool, (..., H, W).
        target_nhw: bool, same shape.

    Returns:
        float32, (...): 1 where both masks are empty.
    """
    intersection = (predicted_nhw & target_nhw).flatten(-2).sum(-1).float()
    union = (predicted_nhw | target_nhw).flatten(-2).sum(-1).float()
    return torch.where(union > 0, intersection / union.clamp(min=1), torch.ones_like(union))


def image_means(values_k: Tensor, image_of_object: Tensor, num_images: int) -> Tensor:
    """Mean over the objects of each image, (B,); NaN for an image without any.

    Args:
        values_k: One value per object, (K,).
        image_of_object: Whose image each is, int64 (K,).
        num_images: B.
    """
    sums, counts = values_k.new_zeros(num_images), values_k.new_zeros(num_images)
    sums = sums.index_add(0, image_of_object, values_k)
    return sums / counts.index_add(0, image_of_object, torch.ones_like(values_k))


class RunningMean:
    """Means of named values, kept on their device until they are read: adding never waits for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor | float], weight: float = 1.0) -> None:
        """Add one value per name.

        Args:
            values: A scalar counts ``weight`` times; of a vector each finite-or-infinite element counts once, NaN
                elements (which mean "does not apply to this image") are left out.
            weight: How many images a scalar stands for.
        """
        for name, value in values.items():
            tensor = torch.as_tensor(value, dtype=torch.float32).detach()
            applies = ~tensor.isnan() if tensor.ndim else torch.ones_like(tensor, dtype=torch.bool)
            amount = weight if tensor.ndim == 0 else 1.0
            # float64 sums are not available on every device (MPS): float32 sums are exact enough for windows of steps.
            total = (torch.where(applies, tensor, torch.zeros_like(tensor)) * amount).sum()
            count = applies.sum().float() * amount
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._counts[name] = self._counts[name] + count if name in self._counts else count

    def sums(self) -> dict[str, tuple[float, float]]:
        """Name to (sum, count), both on the host; waits for the device once."""
        if not self._sums:
            return {}
        values = [*self._sums.values(), *self._counts.values()]
        if len({value.device for value in values}) > 1:
            values = [value.cpu() for value in values]
        numbers = torch.stack(values).tolist()
        half = len(self._sums)
        return dict(zip(self._sums, zip(numbers[:half], numbers[half:], strict=True), strict=True))

    def means(self) -> dict[str, float]:
        """Name to mean over what was added on this rank; NaN where nothing was."""
        return {name: total / count if count else float("nan") for name, (total, count) in self.sums().items()}

    def means_over_ranks(self) -> dict[str, float]:
        """Name to mean over what was added on all ranks. Collective; ranks may hold different names."""
        from sam3_train.distributed import all_gather_object

        merged: dict[str, list[float]] = {}
        for sums in all_gather_object(self.sums()):
            for name, (total, count) in sums.items():
                pair = merged.setdefault(name, [0.0, 0.0])
                pair[0] += total
                pair[1] += count
        return {name: total / count if count else float("nan") for name, (total, count) in merged.items()}

    def reset(self) -> None:
        """Forget everything added so far."""
        self._sums.clear()
        self._counts.clear()
