"""The order of clips: batches of one length each, on all ranks at once, and images among them where wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from sam3_train.data.samplers import ResumableDistributedSampler
from sam3_train.errors import UserError
from sam3_train.rng import mix_seed


class ClipSampler(ResumableDistributedSampler):
    """Positions of a `stage2.data.sav_dataset.ClipDataset`.

    An epoch shows every video ``clips_per_video`` times, but for up to one global batch that is left out, other videos
    each time. Where videos and images are trained on together, each global batch holds clips or images alone, because
    they differ in length; then ``image_share`` of the batches hold images, drawn anew in each epoch.

    Args:
        num_videos: In the data set.
        num_images: Likewise.
        batch_size: Clips of a batch on one rank.
        clips_per_video: Of an epoch.
        image_share: Share of the batches that hold images, below 1.
        seed: Decides the order together with the epoch.
        rank: This process.
        world_size: Number of processes.

    Raises:
        UserError: If there is no video, or a setting is impossible.
    """

    def __init__(
        self,
        num_videos: int,
        num_images: int = 0,
        *,
        batch_size: int,
        clips_per_video: int = 1,
        image_share: float = 0.0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0.0 <= image_share < 1.0:
            raise UserError(f"the share of image batches must lie in [0, 1), got {image_share}")
        if image_share and not num_images:
            raise UserError(f"a share of {image_share} of the batches is for images, but there is no image data set")
        if batch_size < 1 or clips_per_video < 1:
            raise UserError(f"batch size and clips per video must be 1 or more, got {batch_size} and {clips_per_video}")
        if num_videos < 1:
            raise UserError("the training set has no video")
        self.num_videos, self.num_images = num_videos, num_images
        self.global_batch = batch_size * world_size
        # A set smaller than one batch still makes one, of several clips of the same videos.
        self.clip_batches = max(1, num_videos * clips_per_video // self.global_batch)
        self.image_batches = round(self.clip_batches * image_share / (1.0 - image_share))
        super().__init__((self.clip_batches + self.image_batches) * self.global_batch, seed, rank, world_size)

    def order(self) -> list[int]:
        """The epoch's positions over all ranks."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        videos = _rounds(self.num_videos, self.clip_batches * self.global_batch, generator) + self.num_images
        images = videos.new_empty(0)
        if self.image_batches:
            images = _rounds(self.num_images, self.image_batches * self.global_batch, generator) % self.num_images
        batches = torch.cat([videos, images]).view(-1, self.global_batch)
        return batches[torch.randperm(len(batches), generator=generator)].flatten().tolist()


def _rounds(num: int, wanted: int, generator: torch.Generator) -> Tensor:
    """``wanted`` numbers: a permutation of 0..num - 1, then one of num..2 num - 1, and so on."""
    rounds = [torch.randperm(num, generator=generator) + start for start in range(0, wanted, num)]
    return torch.cat(rounds)[:wanted]
