"""Videos as folders of JPEGs beside folders of PNG masks: DAVIS, MOSE, YouTube-VOS, LVOS, and SA-V's val and test."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sam3_train.errors import UserError
from stage2.data.frame_readers import FrameReader, PictureReader, numbered_pictures, picture_size
from stage2.data.layouts import MaskReader, VideoLayout, stamp_of, visible_folders
from stage2.data.png_masks import VOID, label_areas, read_labels
from stage2.data.video_entry import BadVideoError, VideoEntry, encode_areas

_VOID_COUNTS = f" (pixels of {VOID} are void: number objects from 1)"
_RESOLUTIONS = ("480p", "Full-Resolution")


class _PngLayout(VideoLayout):
    """What both have in common: frames in one folder, masks in another.

    Attributes:
        images: Holds a folder of pictures per video.
        masks: Holds a folder of masks per video.
    """

    def __init__(self, root: Path, description: str, images: Path, masks: Path) -> None:
        for folder in (images, masks):
            if not folder.is_dir():
                raise UserError(f"{folder} is not a folder (DATA.DATA_PATH {root})")
        super().__init__(root, description)
        self.images, self.masks = images, masks

    def find(self) -> dict[str, int]:
        """See `VideoLayout`."""
        names = sorted({*visible_folders(self.images), *visible_folders(self.masks)})
        return {name: stamp_of(self._folders(name)) for name in names}

    def _folders(self, name: str) -> list[Path]:
        return [self.images / name, self.masks / name]

    def open_frames(self, name: str) -> FrameReader:
        """See `VideoLayout`."""
        return PictureReader(self.images / name)

    def _frames_with_masks(self, name: str, numbers: set[int]) -> tuple[list[int], tuple[int, int], int]:
        """The annotated frames in order, their size, and the length of the video."""
        pictures = numbered_pictures(self.images / name)
        missing = sorted(numbers - set(pictures))
        if missing:
            raise BadVideoError(f"{self.masks / name}: frame {missing[0]} has a mask but no picture in {self.images}")
        return sorted(numbers), picture_size(pictures[min(numbers)]), max(pictures) + 1


class PalettePngLayout(_PngLayout):
    """``JPEGImages/<video>/00000.jpg`` and ``Annotations/<video>/00000.png``, whose pixels hold object numbers.

    Both may lie below ``train``, and below a resolution as DAVIS's do. Not every frame needs a mask (YouTube-VOS has
    one for every fifth), and objects may first appear late.
    """

    def __init__(self, root: Path) -> None:
        base = root if (root / "JPEGImages").is_dir() else root / "train"
        resolution = next((name for name in _RESOLUTIONS if (base / "JPEGImages" / name).is_dir()), "")
        super().__init__(
            root, f"palette {resolution}", base / "JPEGImages" / resolution, base / "Annotations" / resolution
        )
        self._lists = base / "ImageSets" / "2017"

    def names_of_split(self, split: str) -> frozenset[str] | None:
        """See `VideoLayout`; DAVIS has lists."""
        path = self._lists / f"{split}.txt"
        if not path.is_file():
            return None
        return frozenset(path.read_text(encoding="utf-8").split())

    def scan(self, name: str) -> VideoEntry:
        """See `VideoLayout`."""
        masks = numbered_pictures(self.masks / name)
        numbers, size_hw, num_frames = self._frames_with_masks(name, set(masks))
        areas = np.stack([label_areas(read_labels(masks[number], size_hw)) for number in numbers])
        objects = np.flatnonzero(areas.any(axis=0))
        if not len(objects):
            raise BadVideoError(f"{self.masks / name}: all masks are empty{_VOID_COUNTS}")
        return VideoEntry(
            name,
            size_hw,
            num_frames,
            np.array(numbers, np.int32),
            objects.astype(np.int32),
            encode_areas(areas[:, objects], size_hw),
        )

    def open_masks(self, entry: VideoEntry) -> MaskReader:
        """See `VideoLayout`."""
        return _PaletteMasks(entry, numbered_pictures(self.masks / entry.name))


class _PaletteMasks:
    def __init__(self, entry: VideoEntry, paths: dict[int, Path]) -> None:
        self._entry, self._paths = entry, paths
        self._row, self._labels = -1, np.zeros((0, 0), np.uint8)

    def mask(self, row: int, column: int) -> np.ndarray:
        """See `MaskReader`; the file of the last row is kept."""
        if row != self._row:
            number = int(self._entry.frame_numbers[row])
            if number not in self._paths:
                raise BadVideoError(f"{self._entry.name}: the mask of frame {number} has disappeared")
            self._labels, self._row = read_labels(self._paths[number], self._entry.size_hw), row
        return self._labels == self._entry.objects[column]


class ObjectPngLayout(_PngLayout):
    """``JPEGImages_24fps/<video>/00000.jpg`` and ``Annotations_6fps/<video>/<object>/00000.png``: SA-V's val and test.

    Objects may overlap, so each has files of its own. A frame without a file of an object says nothing about it.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root, "object_png", root / "JPEGImages_24fps", root / "Annotations_6fps")

    def _folders(self, name: str) -> list[Path]:
        masks = self.masks / name
        return [*super()._folders(name), *(masks / each for each in visible_folders(masks))]

    def scan(self, name: str) -> VideoEntry:
        """See `VideoLayout`."""
        paths = self._paths(name)
        numbers, size_hw, num_frames = self._frames_with_masks(
            name, {number for each in paths.values() for number in each}
        )
        areas = np.full((len(numbers), len(paths)), -1, np.int64)
        for column, files in enumerate(paths.values()):
            for row, number in enumerate(numbers):
                if number in files:
                    areas[row, column] = np.count_nonzero(read_labels(files[number], size_hw))
        if not (areas > 0).any():
            raise BadVideoError(f"{self.masks / name}: all masks are empty{_VOID_COUNTS}")
        return VideoEntry(
            name,
            size_hw,
            num_frames,
            np.array(numbers, np.int32),
            np.array(list(paths), np.int32),
            encode_areas(areas, size_hw),
        )

    def open_masks(self, entry: VideoEntry) -> MaskReader:
        """See `VideoLayout`."""
        return _ObjectMasks(entry, self._paths(entry.name))

    def _paths(self, name: str) -> dict[int, dict[int, Path]]:
        """Files by object and frame."""
        folder = self.masks / name
        objects = visible_folders(folder)
        unnumbered = next((each for each in objects if not (each.isascii() and each.isdigit())), None)
        if unnumbered is not None or not objects:
            found = f"{unnumbered!r}" if objects else "none"
            raise BadVideoError(f"{folder}: masks lie in one numbered folder per object, found {found}")
        return {int(each): numbered_pictures(folder / each) for each in objects}


class _ObjectMasks:
    def __init__(self, entry: VideoEntry, paths: dict[int, dict[int, Path]]) -> None:
        self._entry, self._paths = entry, paths

    def mask(self, row: int, column: int) -> np.ndarray:
        """See `MaskReader`."""
        files = self._paths.get(int(self._entry.objects[column]), {})
        path = files.get(int(self._entry.frame_numbers[row]))
        if path is None:
            return np.zeros(self._entry.size_hw, bool)
        return read_labels(path, self._entry.size_hw) > 0
