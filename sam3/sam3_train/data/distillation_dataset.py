"""What a distillation reads: photos, the teacher's embeddings of them, and what a stage adds to each.

Without extras no annotation is opened: a trunk is distilled from images alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sam3.image_input import to_rgb_uint8
from sam3.preprocess import Preprocess
from sam3_train.data.augmentation import AugmentSpec, View, seed_of_key, view_of_seed
from sam3_train.data.decode import UnreadableImageError
from sam3_train.data.image_index import ImageIndex
from sam3_train.errors import UserError

MODES = ("export", "train", "online")


class EmbeddingReader(Protocol):
    """What the dataset needs of `sam3_train.embeddings.EmbeddingStore`."""

    def read_raw(self, key: str) -> tuple[int, dict[str, np.ndarray]]:
        """A record's seed, and its payload as named arrays of the stored types."""

    def prefetch(self, keys: Iterable[str]) -> None:
        """Announce records that will be read soon."""


class ItemExtras(Protocol):
    """What a stage adds to the images of a data set, such as prompts of their annotations.

    Called in the loader's workers, so it must pickle; what it draws is a function of its arguments and own settings.
    """

    def load(self, photo: Photo) -> dict[str, Any]:
        """More entries for the item of a photo.

        Raises:
            UnreadableImageError: With the reason why this image cannot be used; it is left out and accounted for.
        """

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """More entries for the batch of some items, at least one."""

    def report(self, batch: dict[str, Any]) -> None:
        """Take note of a batch that the loader is about to hand out; called in the main process."""


@dataclass(frozen=True)
class Photo:
    """What `ItemExtras` may want to know about an image."""

    index: ImageIndex
    position: int
    """Where it stands in the index."""
    key: str
    view: View
    """What the student is shown of it."""
    original_hw: tuple[int, int]
    """Its size in pixels before the view."""
    view_hw: tuple[int, int]
    """The size of the view, which the preprocessing brings to the model's input."""
    epoch: int


class DistillationDataset(Dataset[dict[str, Any]]):
    """Photos of an index as model inputs.

    Every item is a function of the index position, the run's seed and (mode ``online``) the epoch; no global random
    state is read. An item has

    - ``key``: the image's name; ``bad``: why it cannot be read. If that is not empty, nothing else is there; nor if
      there is an ``error``: what ends the run, such as a damaged embedding;
    - ``image``: float32, (3, S, S), made by the preprocessing;
    - ``seed``: the 4-byte seed of the view (mode ``export``: to be stored with the embedding);
    - ``valid`` (modes ``train`` and ``online``): float32, (1, G, G), 1 inside the image and 0 in its padding;
    - ``embedding`` (mode ``train``): the record's arrays in their stored types; decode them on the device with
      ``store.spec.codec_object.to_float``;
    - whatever ``extras`` adds.

    Args:
        index: The images.
        preprocess: Pixels to tensor.
        mode: ``export`` (teacher), ``train`` (student with stored embeddings) or ``online`` (student, teacher in the
            loop).
        grid_size: Side of the feature grid, for ``valid``.
        store: Embeddings, in mode ``train``.
        augment: Views to draw; None shows the whole image. In mode ``train`` this must be the store's own.
        seed: Seed of the views that modes ``export`` and ``online`` draw.
        extras: Adds to each item.

    Raises:
        ValueError: If the mode is unknown, or a store is missing or superfluous.
    """

    def __init__(
        self,
        index: ImageIndex,
        preprocess: Preprocess,
        mode: str,
        grid_size: int,
        *,
        store: EmbeddingReader | None = None,
        augment: AugmentSpec | None = None,
        seed: int = 0,
        extras: ItemExtras | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"dataset mode {mode!r} is not one of {MODES}")
        if (store is not None) != (mode == "train"):
            raise ValueError(f"mode {mode!r} {'needs a' if mode == 'train' else 'takes no'} store")
        self.index = index
        self.preprocess = preprocess
        self.mode = mode
        self.grid_size = grid_size
        self.store = store
        self.augment = augment
        self.seed = seed
        self.extras = extras
        # Shared memory, because persistent workers keep the copy of the dataset that they were started with.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.index)

    @property
    def epoch(self) -> int:
        """The epoch whose views mode ``online`` draws, and that extras are told."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, in this process and in workers that are already running."""
        self._epoch.fill_(epoch)

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """The items of a batch; the store hears of all their keys first, so that the disk reads ahead."""
        if self.store is not None:
            self.store.prefetch([self.index.key(position) for position in positions])
        return [self[position] for position in positions]

    def __getitem__(self, position: int) -> dict[str, Any]:
        try:
            return self._load(position)
        except UserError as error:
            # A worker's exception would reach the user wrapped in tracebacks; the loader raises this instead.
            return {"key": self.index.key(position), "bad": "", "error": str(error)}

    def _load(self, position: int) -> dict[str, Any]:
        key = self.index.key(position)
        item: dict[str, Any] = {"key": key, "bad": ""}
        try:
            image = self.index.open_image(position)
        except UnreadableImageError as error:
            return {"key": key, "bad": str(error)}
        if self.store is not None:
            seed, parts = self.store.read_raw(key)
            item["embedding"] = {name: torch.from_numpy(part) for name, part in parts.items()}
        else:
            seed = seed_of_key(self.seed, key, self.epoch if self.mode == "online" else 0)
        view, whole = view_of_seed(self.augment, seed), to_rgb_uint8(image)
        pixels = view.apply(whole)
        original_hw, view_hw = _size_of(whole), _size_of(pixels)
        item["image"] = self.preprocess(pixels)
        item["seed"] = seed
        if self.mode != "export":
            item["valid"] = self._valid_mask(view_hw)
        if self.extras is not None:
            photo = Photo(self.index, position, key, view, original_hw, view_hw, self.epoch)
            try:
                item.update(self.extras.load(photo))
            except UnreadableImageError as error:
                return {"key": key, "bad": str(error)}
        return item

    def _valid_mask(self, original_hw: tuple[int, int]) -> Tensor:
        if self.preprocess.mode == "stretch":
            return torch.ones(1, self.grid_size, self.grid_size)
        return self.preprocess.build_valid_mask(original_hw, self.grid_size)


def _size_of(pixels_chw: Tensor) -> tuple[int, int]:
    return pixels_chw.shape[-2], pixels_chw.shape[-1]
