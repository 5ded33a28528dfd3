"""The videos that a run uses: those of a split, as a share of the whole, and what happens to bad ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sam3_train.data.bad_images import bad_image_limit
from sam3_train.data.splits import DEFAULT_VAL_FRACTION, SPLITS, split_indices, subset_indices
from sam3_train.errors import UserError
from stage2.data.clip_index import ClipIndex, build_clip_index
from stage2.data.layouts import KINDS, VideoLayout, open_layout
from stage2.data.sav_layouts import ANNOTATIONS
from stage2.data.video_entry import VideoEntry, is_visible

ON_BAD = ("skip", "fail")
_SHOWN_REASONS = 5


@dataclass(frozen=True)
class VideoSettings:
    """Where the videos are and which of them are used."""

    root: str
    kind: str = "auto"
    """One of `layouts.KINDS`; the demo world must be named (``demo``)."""
    annotations: str = "any"
    """For SA-V: one of `sav_layouts.ANNOTATIONS`."""
    subset_fraction: float = 1.0
    """Share of the training videos, chosen by hash of their names; one at least."""
    subset_seed: int = 0
    """Another seed chooses another subset."""
    val_fraction: float = DEFAULT_VAL_FRACTION
    """Share of the videos held out, by hash of their names, where the data set has no list of its own; 1: all."""
    on_bad: str = "skip"
    """``skip`` leaves bad videos out, up to ``max_bad_fraction``; ``fail`` ends the run at the first."""
    max_bad_fraction: float = 0.01
    cache_dir: str = ""
    """Where the index is kept; empty: in the data set's folder."""

    def problems(self) -> list[str]:
        """What is impossible, one line each."""
        found = []
        for name, value, known in (
            ("kind", self.kind, KINDS),
            ("annotations", self.annotations, ANNOTATIONS),
            ("on_bad", self.on_bad, ON_BAD),
        ):
            if value not in known:
                found.append(f"{name} {value!r} is not one of {', '.join(known)}")
        if not 0.0 < self.subset_fraction <= 1.0:
            found.append(f"subset_fraction {self.subset_fraction} is not in (0, 1]")
        if not 0.0 <= self.val_fraction <= 1.0:
            found.append(f"val_fraction {self.val_fraction} is not in [0, 1]")
        if not 0.0 <= self.max_bad_fraction < 1.0:
            found.append(f"max_bad_fraction {self.max_bad_fraction} is not in [0, 1)")
        return found


class VideoSet:
    """Good videos of one split.

    Args:
        layout: Reads them.
        index: All videos of the data set.
        positions: Which of the index belong here, ascending.
        split: ``train`` or ``val``.
    """

    def __init__(self, layout: VideoLayout, index: ClipIndex, positions: np.ndarray, split: str) -> None:
        self.layout = layout
        self.index = index
        self.positions = positions
        self.split = split
        self.sha256 = index.names.select(positions).sha256

    def __len__(self) -> int:
        return len(self.positions)

    def __repr__(self) -> str:
        return f"VideoSet({self.split}: {len(self)} videos in {self.layout.root}, names {self.sha256[:12]})"

    def name(self, i: int) -> str:
        """Of the i-th video."""
        return self.index.names[int(self.positions[i])]

    def entry(self, i: int) -> VideoEntry:
        """What is known of the i-th video."""
        return self.index.entry(int(self.positions[i]))


def open_video_set(settings: VideoSettings, split: str, min_area: float = 0.0, num_workers: int = 1) -> VideoSet:
    """Find the videos of a split. Collective over ranks.

    Args:
        settings: Where and which.
        split: ``train`` or ``val``.
        min_area: Videos in which no object ever covers that share of the frame are left out.
        num_workers: Processes that read annotations, where the index must be made first.

    Raises:
        UserError: If a setting is impossible, the data set is missing, of an unknown layout or empty, a video is bad
            and ``on_bad`` is ``fail``, more are bad than ``max_bad_fraction``, or no video remains.
    """
    problems = settings.problems()
    if split not in SPLITS:
        problems.append(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if problems:
        raise UserError.from_problems("video data set", problems)
    layout = open_layout(settings.root, settings.kind, settings.annotations)
    index = build_clip_index(layout, settings.cache_dir or None, num_workers)
    _check_bad(index, settings)
    positions = _positions_of_split(layout, index, split, settings.val_fraction)
    in_split = len(positions)
    positions = positions[[_is_usable(index.entry(int(i)), min_area) for i in positions]]
    if split == "train" and settings.subset_fraction < 1.0 and len(positions):
        names = index.names.select(positions)
        positions = positions[subset_indices(names, settings.subset_fraction, settings.subset_seed)]
    if not len(positions):
        raise UserError(
            f"{layout.root}: no {split} video can be used: of {len(index)} videos {len(index.bad())} are bad, and "
            f"{in_split} good ones belong to {split}" + "".join(f"; {reason}" for _, reason in index.bad()[:1])
        )
    return VideoSet(layout, index, positions, split)


def _positions_of_split(layout: VideoLayout, index: ClipIndex, split: str, val_fraction: float) -> np.ndarray:
    """Good videos of a split; a bad one never moves another between splits."""
    listed = layout.names_of_split(split)
    if listed is not None:
        return np.array([i for i in index.good() if index.names[int(i)] in listed], np.int64)
    return np.intersect1d(split_indices(index.names, split, val_fraction), index.good())


def _is_usable(entry: VideoEntry, min_area: float) -> bool:
    return bool(is_visible(entry.area_codes, min_area).any())


def _check_bad(index: ClipIndex, settings: VideoSettings) -> None:
    bad = index.bad()
    limit = 0 if settings.on_bad == "fail" else bad_image_limit(settings.max_bad_fraction, len(index))
    if len(bad) <= limit:
        return
    shown = [reason for _, reason in bad[:_SHOWN_REASONS]]
    if len(bad) > len(shown):
        shown.append(f"... and {len(bad) - len(shown)} more")
    allowed = "none is allowed (on_bad fail)" if settings.on_bad == "fail" else f"{limit} are allowed"
    raise UserError.from_problems(
        f"{len(bad)} of {len(index)} videos in {settings.root} cannot be used, {allowed} (DATA.ON_BAD, "
        "DATA.MAX_BAD_FRACTION)",
        shown,
    )
