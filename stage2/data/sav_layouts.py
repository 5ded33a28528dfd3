"""SA-V as released (mp4 beside JSON), and its frames extracted into folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sam3.video.frame_source import VideoInputError
from sam3.video.video_index import read_header
from sam3_train.errors import UserError
from stage2.data.frame_readers import FrameReader, PictureReader, VideoFileReader, numbered_pictures, picture_size
from stage2.data.layouts import DEMO_MANIFEST, MaskReader, VideoLayout, stamp_of, visible_folders
from stage2.data.sav_annotation import ANNOTATED_EVERY, SavAnnotation, read_sav_annotation
from stage2.data.video_entry import BadVideoError, VideoEntry, encode_areas

ANNOTATIONS = ("any", "manual", "auto", "both")
"""Which of a video's files is read: the manual one where there is one, else the automatic one; always the manual one;
always the automatic one; or the objects of both."""
_SUFFIXES = {"manual": "_manual.json", "auto": "_auto.json"}


class _SavMasks:
    """Objects of one or two annotation files, one after another."""

    def __init__(self, annotations: Sequence[SavAnnotation]) -> None:
        self._owners = [(each, column) for each in annotations for column in range(each.num_objects)]

    def mask(self, row: int, column: int) -> np.ndarray:
        """See `MaskReader`."""
        annotation, own_column = self._owners[column]
        return annotation.mask(row, own_column)


class _JsonLayout(VideoLayout):
    """What both ways to keep SA-V share: the annotation files."""

    def __init__(self, root: Path, description: str, annotations: str) -> None:
        if annotations not in ANNOTATIONS:
            raise UserError(f"SA-V annotations {annotations!r} are not one of {', '.join(ANNOTATIONS)}")
        super().__init__(root, f"{description} {annotations}")
        self.annotations = annotations

    def _stem(self, name: str) -> Path:
        """Path of the annotation files without their suffixes."""
        raise NotImplementedError

    def _json_paths(self, name: str) -> list[Path]:
        stem = self._stem(name)
        by_kind = {kind: stem.with_name(stem.name + suffix) for kind, suffix in _SUFFIXES.items()}
        if self.annotations in by_kind:
            return [by_kind[self.annotations]]
        present = [path for path in by_kind.values() if path.is_file()]
        if not present:
            raise BadVideoError(f"{stem}: has no annotation {stem.name}_manual.json or {stem.name}_auto.json")
        return present if self.annotations == "both" else present[:1]

    def _annotations(self, name: str) -> list[SavAnnotation]:
        paths = self._json_paths(name)
        missing = next((path for path in paths if not path.is_file()), None)
        if missing is not None:
            raise BadVideoError(f"{missing}: the annotation is missing")
        found = [read_sav_annotation(path) for path in paths]
        for other in found[1:]:
            if (other.size_hw, other.num_frames) != (found[0].size_hw, found[0].num_frames):
                raise BadVideoError(f"{other.where}: is of another size or length than {found[0].where}")
        return found

    def _entry(self, name: str, annotations: Sequence[SavAnnotation], num_frames: int) -> VideoEntry:
        areas = np.concatenate([each.areas() for each in annotations], axis=1)
        if not (areas > 0).any():
            raise BadVideoError(f"{annotations[0].where}: all masks are empty")
        return VideoEntry(
            name,
            annotations[0].size_hw,
            num_frames,
            np.arange(len(areas), dtype=np.int32) * ANNOTATED_EVERY,
            np.arange(areas.shape[1], dtype=np.int32),
            encode_areas(areas, annotations[0].size_hw),
        )

    def open_masks(self, entry: VideoEntry) -> MaskReader:
        """See `VideoLayout`."""
        return _SavMasks(self._annotations(entry.name))


class SavLayout(_JsonLayout):
    """``<name>.mp4`` with ``<name>_manual.json`` and ``<name>_auto.json``, at any depth."""

    def __init__(self, root: Path, annotations: str) -> None:
        super().__init__(root, "sav", annotations)

    def find(self) -> dict[str, int]:
        """See `VideoLayout`."""
        wanted = _SUFFIXES.values() if self.annotations in ("any", "both") else [_SUFFIXES[self.annotations]]
        stems: set[str] = set()
        seen: set[str] = set()
        for folder, subfolders, files in os.walk(self.root, followlinks=True):
            if os.path.realpath(folder) in seen:  # a link to a folder that was walked, its own parents among them
                subfolders.clear()
                continue
            seen.add(os.path.realpath(folder))
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            place = Path(folder).relative_to(self.root)
            for file in files:
                suffix = next((s for s in (".mp4", *wanted) if file.endswith(s) and not file.startswith(".")), None)
                if suffix is not None:
                    stems.add((place / file.removesuffix(suffix)).as_posix())
        if self.annotations == "auto":
            # SA-V itself has no automatic annotation for some of its videos.
            stems = {stem for stem in stems if self._json_paths(stem)[0].is_file() or not self._has_manual(stem)}
        return {name: stamp_of(self._files(name)) for name in sorted(stems)}

    def _has_manual(self, name: str) -> bool:
        return (self.root / f"{name}{_SUFFIXES['manual']}").is_file()

    def _files(self, name: str) -> list[Path]:
        return [self.root / f"{name}{suffix}" for suffix in (".mp4", *_SUFFIXES.values())]

    def _stem(self, name: str) -> Path:
        return self.root / name

    def scan(self, name: str) -> VideoEntry:
        """See `VideoLayout`."""
        video = self.root / f"{name}.mp4"
        if not video.is_file():
            raise BadVideoError(f"{video}: the video is missing, although its annotation is there")
        annotations = self._annotations(name)
        try:
            header = read_header(video)
        except VideoInputError as error:
            raise BadVideoError(str(error)) from None
        size_hw, num_rows = annotations[0].size_hw, len(annotations[0].rows)
        if sorted(header.size_hw) != sorted(size_hw):  # a rotation is applied when frames are decoded
            raise BadVideoError(
                f"{video}: is {header.size_hw[1]} x {header.size_hw[0]} pixels, its annotation "
                f"{size_hw[1]} x {size_hw[0]}"
            )
        if header.num_frames and -(-header.num_frames // ANNOTATED_EVERY) != num_rows:
            raise BadVideoError(
                f"{video}: has {header.num_frames} frames, but {annotations[0].where} is of "
                f"{annotations[0].num_frames} ({num_rows} annotated)"
            )
        return self._entry(name, annotations, header.num_frames or annotations[0].num_frames)

    def open_frames(self, name: str) -> FrameReader:
        """See `VideoLayout`."""
        return VideoFileReader(self.root / f"{name}.mp4")


class SavFramesLayout(_JsonLayout):
    """``<video>/00000.jpg``, ... with ``<video>/<video>_manual.json`` or ``_auto.json``.

    Pictures are numbered as the video's frames are, all of them or every fourth.
    """

    def __init__(self, root: Path, annotations: str = "any") -> None:
        super().__init__(root, "sav_frames", annotations)

    def find(self) -> dict[str, int]:
        """See `VideoLayout`."""
        return {name: stamp_of(self._files(name)) for name in self._folders()}

    def _folders(self) -> list[str]:
        return visible_folders(self.root)

    def _files(self, name: str) -> list[Path]:
        stem = self._stem(name)
        return [stem.parent, *(stem.with_name(stem.name + suffix) for suffix in _SUFFIXES.values())]

    def _stem(self, name: str) -> Path:
        folder = self.root / name
        return folder / folder.name

    def scan(self, name: str) -> VideoEntry:
        """See `VideoLayout`."""
        folder = self.root / name
        pictures = numbered_pictures(folder)
        annotations = self._annotations(name)
        numbers = range(0, len(annotations[0].rows) * ANNOTATED_EVERY, ANNOTATED_EVERY)
        missing = next((number for number in numbers if number not in pictures), None)
        num_frames = annotations[0].num_frames
        if missing is not None or max(pictures) >= num_frames:
            raise BadVideoError(
                f"{folder}: holds {len(pictures)} pictures up to frame {max(pictures)}, but {annotations[0].where} is "
                f"of {num_frames} frames"
                + ("" if missing is None else f", and picture {missing:05d} (annotated) is missing; pictures are ")
                + ("" if missing is None else "numbered as the frames at 24 a second")
            )
        found_hw, size_hw = picture_size(pictures[0]), annotations[0].size_hw
        if found_hw != size_hw:
            raise BadVideoError(
                f"{pictures[0]}: is {found_hw[1]} x {found_hw[0]} pixels, the annotation {size_hw[1]} x {size_hw[0]}"
            )
        return self._entry(name, annotations, num_frames)

    def open_frames(self, name: str) -> FrameReader:
        """See `VideoLayout`."""
        return PictureReader(self.root / name)


class DemoLayout(SavFramesLayout):
    """The generated clips of the demo world, ``clips/{train,val,test}/<clip>/`` as extracted frames."""

    def __init__(self, world: Path) -> None:
        if not (world / DEMO_MANIFEST).is_file():
            raise UserError(f"{world} is no demo world (it has no {DEMO_MANIFEST}): data/demo/demo_world.py makes one")
        super().__init__(world / "clips")
        self.description = "demo"

    def _folders(self) -> list[str]:
        return [
            f"{split}/{name}" for split in visible_folders(self.root) for name in visible_folders(self.root / split)
        ]

    def names_of_split(self, split: str) -> frozenset[str]:
        """See `VideoLayout`."""
        return frozenset(f"{split}/{name}" for name in visible_folders(self.root / split))
