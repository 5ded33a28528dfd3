"""Clips of SA-V and its kin for the loader: reproducible, and replaced where a video turns out to be bad."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from sam3_train.errors import UserError
from sam3_train.rng import mix_seed
from stage2.batch_errors import BatchError
from stage2.data.clip_batch import Clip
from stage2.data.clip_sources import ClipSource
from stage2.data.video_entry import BadVideoError

_DRAWS_PER_VIDEO = 4
_VIDEOS_PER_ITEM = 8


class ClipDataset(Dataset[dict[str, Any]]):
    """Clips of videos and, where wanted, of images.

    An item is a function of seed, epoch and position; no global random state is read. Positions below the number of
    images are images; every further one is a video, modulo their number, so that larger positions are more clips of
    the same videos. An item has

    - ``clip``: a `Clip`;
    - ``bad``: (name, reason) of videos that were tried before it and cannot be used. Another one takes their place, so
      that all batches stay whole;
    - or only ``error``: what ends the run.

    Args:
        videos: Draws clips of videos.
        images: Draws clips of one frame; None for none.
        seed: Of the run.
        on_bad: ``skip`` or ``fail``: whether a bad video is replaced or ends the run.
        is_fixed: The same clips in every epoch, for validation.
    """

    def __init__(
        self,
        videos: ClipSource,
        images: ClipSource | None = None,
        *,
        seed: int = 0,
        on_bad: str = "skip",
        is_fixed: bool = False,
    ) -> None:
        self.videos = videos
        self.images = images
        self.seed = seed
        self.on_bad = on_bad
        self.is_fixed = is_fixed
        # Shared memory, because persistent workers keep the copy of the dataset that they were started with.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def num_images(self) -> int:
        """How many positions are images."""
        return 0 if self.images is None else len(self.images)

    def __len__(self) -> int:
        return self.num_images + len(self.videos)

    @property
    def epoch(self) -> int:
        """The epoch whose clips are drawn."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and with it the length of clips, in this process and in workers that already run."""
        self._epoch.fill_(epoch)

    def __getitem__(self, position: int) -> dict[str, Any]:
        try:
            return self._draw(position)
        except UserError as error:
            # A worker's exception would reach the user wrapped in tracebacks; the loader raises this instead.
            return {"error": str(error)}

    def _draw(self, position: int) -> dict[str, Any]:
        is_image = position < self.num_images
        source = self.images if is_image and self.images is not None else self.videos
        first = position if is_image else position - self.num_images
        bad: list[tuple[str, str]] = []
        for attempt in range(_VIDEOS_PER_ITEM):
            i = (first if not attempt else first + self._rng(position, attempt).integers(len(source))) % len(source)
            try:
                clip = self._draw_from(source, int(i), position, attempt)
            except BadVideoError as error:
                if self.on_bad == "fail":
                    raise UserError(_with_name(source.name(int(i)), str(error))) from error
                bad.append((source.name(int(i)), _with_name(source.name(int(i)), str(error))))
                continue
            if clip is not None:
                return {"clip": clip, "bad": bad}
        reasons = "; ".join(reason for _, reason in bad) or "no drawn clip shows an object on its first frame"
        raise UserError(f"{source.name(first % len(source))} and {_VIDEOS_PER_ITEM - 1} others gave no clip: {reasons}")

    def _draw_from(self, source: ClipSource, i: int, position: int, attempt: int) -> Clip | None:
        """A clip of one video; it may take several draws until its first frame shows an object."""
        for draw in range(_DRAWS_PER_VIDEO):
            try:
                clip = source.draw(i, self.epoch, self._rng(position, attempt, draw))
            except UserError:
                raise
            except Exception as error:
                raise BatchError(f"clips of {source.name(i)} failed: {type(error).__name__}: {error}") from error
            if clip is not None:
                return clip
        return None

    def _rng(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng(mix_seed(self.seed, 0 if self.is_fixed else self.epoch, *numbers))


def _with_name(name: str, reason: str) -> str:
    """A reason that names the video, however deep in it something went wrong."""
    return reason if name in reason else f"{name}: {reason}"
