"""Where clips come from: videos, or images as clips of one frame."""

from __future__ import annotations

from contextlib import closing
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sam3.image_input import ImageInputError, to_rgb_uint8
from sam3.model.tracker_memory import TrackerFeatures
from sam3.preprocess import Preprocess
from sam3_train.data.decode import UnreadableImageError
from sam3_train.data.image_index import ImageIndex
from sam3_train.data.sa1b import AnnotationError, parse_sa1b_annotation
from stage2.data.clip_batch import Clip
from stage2.data.clip_canvas import ClipCanvas, is_seen
from stage2.data.clip_choice import ClipSpec, choose_clip
from stage2.data.clip_look import LookSpec, draw_look
from stage2.data.video_entry import BadVideoError, VideoEntry
from stage2.data.video_set import VideoSet


class ClipSource(Protocol):
    """Draws clips. What it draws is a function of its arguments alone."""

    def __len__(self) -> int:
        """How many videos or images there are."""

    def name(self, i: int) -> str:
        """What messages call the i-th."""

    def draw(self, i: int, epoch: int, rng: np.random.Generator) -> Clip | None:
        """A clip of the i-th, or None if nothing of the drawn one can be seen on its first frame.

        Raises:
            BadVideoError: If it cannot be used.
        """


class FrameFeatures(Protocol):
    """Knows what the tracker reads of annotated frames (`stage2.feature_cache.FeatureCache`)."""

    def read(self, entry: VideoEntry, rows: np.ndarray) -> TrackerFeatures:
        """Maps of annotated frames, by their places in a video's entry, with a row for each.

        Raises:
            BadVideoError: If they are missing or damaged.
        """


class VideoClips:
    """Clips of annotated videos.

    Args:
        videos: The videos.
        spec: Which clips are drawn.
        preprocess: That of the model.
        mask_side: M, that of the mask decoder's logits (4 G).
        look: Changes of flips and colours; None for none.
        features: Takes the place of frames, which then are not decoded; None: frames.

    Raises:
        ValueError: If features, which are those of unchanged frames, are to be changed.
    """

    def __init__(
        self,
        videos: VideoSet,
        spec: ClipSpec,
        preprocess: Preprocess,
        mask_side: int,
        look: LookSpec | None = None,
        features: FrameFeatures | None = None,
    ) -> None:
        if look is not None and features is not None:
            raise ValueError("cached features cannot be flipped or recoloured: give a look or features")
        self.features = features
        self.videos = videos
        self.spec = spec
        self.preprocess = preprocess
        self.mask_side = mask_side
        self.look = look

    def __len__(self) -> int:
        return len(self.videos)

    def name(self, i: int) -> str:
        """See `ClipSource`."""
        return self.videos.name(i)

    def draw(self, i: int, epoch: int, rng: np.random.Generator) -> Clip | None:
        """See `ClipSource`."""
        entry, layout = self.videos.entry(i), self.videos.layout
        choice = choose_clip(entry, self.spec.length_at(epoch), self.spec, rng)
        look = draw_look(self.look, rng)
        canvas = ClipCanvas(entry.size_hw, self.preprocess, self.mask_side, look)
        masks = layout.open_masks(entry)
        rows, place = np.unique(choice.rows, return_inverse=True)
        coverage = np.zeros((len(rows), len(choice.columns), self.mask_side, self.mask_side), np.uint8)
        for k, row in enumerate(rows):
            for column, object_column in enumerate(choice.columns):
                coverage[k, column] = canvas.cover(masks.mask(int(row), int(object_column)))
        seen = is_seen(coverage[place[0]])
        if not seen.any():
            return None
        pixels, features = torch.zeros(len(place), 3, 0, 0, dtype=torch.uint8), None
        if self.features is not None:
            features = self.features.read(entry, choice.rows)
        else:
            with closing(layout.open_frames(entry.name)) as frames:
                numbers = entry.frame_numbers[rows].tolist()
                shown = (checked_frame(frames.frame(number), entry, number) for number in numbers)
                pixels = canvas.paint(shown, len(rows))[torch.from_numpy(place)]
        return Clip(
            name=entry.name,
            pixels=pixels,
            resized_hw=torch.tensor(canvas.resized_hw),
            coverage=torch.from_numpy(coverage[place][:, seen]),
            frame_numbers=torch.from_numpy(entry.frame_numbers[choice.rows].astype(np.int64)),
            object_ids=torch.from_numpy(entry.objects[choice.columns[seen]].astype(np.int64)),
            num_frames=entry.num_frames,
            features=features,
        )


class ImageClips:
    """Images with annotated objects (SA-1B) as clips of one frame, for training on images and videos together.

    Args:
        index: The images, with annotations.
        spec: ``max_objects``, ``min_area`` and ``is_fixed`` count.
        preprocess: That of the model.
        mask_side: M.
        look: See `VideoClips`.
    """

    def __init__(
        self, index: ImageIndex, spec: ClipSpec, preprocess: Preprocess, mask_side: int, look: LookSpec | None = None
    ) -> None:
        self.index = index
        self.spec = spec
        self.preprocess = preprocess
        self.mask_side = mask_side
        self.look = look

    def __len__(self) -> int:
        return len(self.index)

    def name(self, i: int) -> str:
        """See `ClipSource`."""
        return self.index.key(i)

    def draw(self, i: int, epoch: int, rng: np.random.Generator) -> Clip | None:
        """See `ClipSource`; every epoch draws other objects."""
        key = self.index.key(i)
        try:
            pixels = to_rgb_uint8(self.index.open_image(i))
            content = self.index.source.read_annotation(i, key)
            where = self.index.source.annotation_where(i, key)
            if content is None or where is None:
                raise BadVideoError(f"{self.index.where(i)}: has no annotation")
            objects = parse_sa1b_annotation(content, where)
            size_hw = (pixels.shape[-2], pixels.shape[-1])
            large = [each for each in objects if each.area_px >= self.spec.min_area * size_hw[0] * size_hw[1]]
            order = range(len(large)) if self.spec.is_fixed else rng.permutation(len(large)).tolist()
            chosen = [large[k] for k in list(order)[: self.spec.max_objects]]
            canvas = ClipCanvas(size_hw, self.preprocess, self.mask_side, draw_look(self.look, rng))
            covers = [canvas.cover(_mask_of_size(each.mask(), size_hw, where)) for each in chosen]
        except (UnreadableImageError, AnnotationError, ImageInputError) as error:
            raise BadVideoError(str(error)) from None
        coverage = np.stack(covers) if covers else np.zeros((0, self.mask_side, self.mask_side), np.uint8)
        seen = is_seen(coverage)
        if not seen.any():
            return None
        ids = [each.object_id for each, shown in zip(chosen, seen, strict=True) if shown]
        return Clip(
            name=key,
            pixels=canvas.paint([pixels], 1),
            resized_hw=torch.tensor(canvas.resized_hw),
            coverage=torch.from_numpy(coverage[None, seen]),
            frame_numbers=torch.zeros(1, dtype=torch.int64),
            object_ids=torch.tensor(ids, dtype=torch.int64),
            num_frames=1,
        )


def checked_frame(pixels: np.ndarray, entry: VideoEntry, number: int) -> Tensor:
    """A frame as uint8 (3, H, W).

    Raises:
        BadVideoError: If it has another size than its masks.
    """
    if pixels.shape[:2] != entry.size_hw:
        raise BadVideoError(
            f"{entry.name}: frame {number} is {pixels.shape[1]} x {pixels.shape[0]} pixels, its masks are "
            f"{entry.size_hw[1]} x {entry.size_hw[0]}"
        )
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _mask_of_size(mask: np.ndarray, size_hw: tuple[int, int], where: str) -> np.ndarray:
    if mask.shape != size_hw:
        raise BadVideoError(
            f"{where}: masks are {mask.shape[1]} x {mask.shape[0]} pixels, the image {size_hw[1]} x {size_hw[0]}"
        )
    return mask
