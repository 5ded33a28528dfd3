"""Which frames and objects of a video make a clip: annotated frames only, the first of which shows an object."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stage2.data.video_entry import UNKNOWN, BadVideoError, VideoEntry, is_visible


@dataclass(frozen=True)
class ClipSpec:
    """Which clips are drawn."""

    lengths: tuple[tuple[int, int], ...] = ((0, 8),)
    """The curriculum: (first epoch, frames of a clip from then on), e.g. ((0, 4), (4, 8), (8, 16))."""
    strides: tuple[int, ...] = (1,)
    """Distances between frames in annotated frames (of SA-V: a sixth of a second each); a clip has one of those that
    fit into its video, all equally likely."""
    reverse_share: float = 0.5
    """Clips that run backwards in time."""
    gap_share: float = 0.0
    """Clips that lose frames, as if everything had been hidden for a while: one run of annotated frames is left out."""
    max_gap: int = 4
    """The longest such run."""
    max_objects: int = 3
    """Per clip; of more visible ones a random subset is taken."""
    min_area: float = 1e-4
    """Share of the frame that an object covers at least on the first frame of a clip, as far as it is chosen."""
    is_fixed: bool = False
    """Always the earliest clip that shows something, with its first objects, forwards and without gap."""

    def __post_init__(self) -> None:
        problems = []
        epochs = [first for first, _ in self.lengths]
        if not epochs or epochs[0] != 0 or sorted(set(epochs)) != epochs:
            problems.append(f"the curriculum's first epochs must ascend from 0, got {epochs}")
        if any(length < 1 for _, length in self.lengths):
            problems.append(f"a clip has at least one frame, got lengths {[length for _, length in self.lengths]}")
        if not self.strides or min(self.strides) < 1:
            problems.append(f"strides must be 1 or more, got {self.strides}")
        for name in ("reverse_share", "gap_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                problems.append(f"{name} must lie in 0..1, got {getattr(self, name)}")
        if self.max_gap < 1 or self.max_objects < 1:
            problems.append(f"max_gap and max_objects must be 1 or more, got {self.max_gap} and {self.max_objects}")
        if not 0.0 <= self.min_area < 1.0:
            problems.append(f"min_area must lie in [0, 1), got {self.min_area}")
        if problems:
            raise ValueError("clips: " + "; ".join(problems))

    def length_at(self, epoch: int) -> int:
        """Frames of the clips of an epoch."""
        return next(length for first, length in reversed(self.lengths) if first <= epoch)

    def for_validation(self, length: int) -> ClipSpec:
        """The same clips every time."""
        return dataclasses.replace(self, lengths=((0, length),), is_fixed=True)


class ClipChoice(NamedTuple):
    """A clip of T frames and K objects."""

    rows: np.ndarray
    """int64 (T,): annotated frames of the video, by their places in its entry; not ascending where time runs back."""
    columns: np.ndarray
    """int64 (K,): objects, by their places in the entry."""


def choose_clip(entry: VideoEntry, length: int, spec: ClipSpec, rng: np.random.Generator) -> ClipChoice:
    """Choose a clip that starts where an object is visible, and objects that are visible there.

    An object of which some frame of the clip says nothing is not chosen. A video with fewer annotated frames than the
    clip is played to its end and back again.

    Args:
        entry: The video.
        length: T.
        spec: What to choose.
        rng: Source of randomness.

    Raises:
        BadVideoError: If no start shows an object.
    """
    num_rows = len(entry.frame_numbers)
    is_reversed = not spec.is_fixed and rng.random() < spec.reverse_share
    offsets = _offsets(num_rows, length, spec, rng)
    plain = np.arange(length)
    for steps, backwards in ((offsets, is_reversed), (plain, is_reversed), (plain, not is_reversed)):
        choice = _choose(entry, steps, backwards, spec, rng)
        if choice is not None:
            return choice
    raise BadVideoError(f"{entry.name}: no clip of {length} frames starts with an object that is visible")


def _offsets(num_rows: int, length: int, spec: ClipSpec, rng: np.random.Generator) -> np.ndarray:
    """Distances of a clip's frames from its first one, in annotated frames: int64 (T,)."""
    if spec.is_fixed:
        return np.arange(length)
    fitting = [stride for stride in spec.strides if stride * (length - 1) < num_rows] or [1]
    offsets = np.arange(length) * fitting[rng.integers(len(fitting))]
    longest = min(spec.max_gap, num_rows - 1 - int(offsets[-1]))
    if rng.random() < spec.gap_share and length > 1 and longest > 0:
        offsets[int(rng.integers(1, length)) :] += int(rng.integers(1, longest + 1))
    return offsets


def _choose(
    entry: VideoEntry, offsets: np.ndarray, is_reversed: bool, spec: ClipSpec, rng: np.random.Generator
) -> ClipChoice | None:
    codes = entry.area_codes[::-1] if is_reversed else entry.area_codes
    num_rows = len(codes)
    num_starts = max(1, num_rows - int(offsets[-1]))
    if num_rows <= offsets[-1]:
        num_starts = num_rows  # played to the end and back, from anywhere
    rows = _there_and_back(np.arange(num_starts)[:, None] + offsets, num_rows)
    eligible = is_visible(codes[:num_starts], spec.min_area) & ~(codes == UNKNOWN)[rows].any(axis=1)
    starts = np.flatnonzero(eligible.any(axis=1))
    if not len(starts):
        return None
    start = starts[0] if spec.is_fixed else starts[rng.integers(len(starts))]
    columns = np.flatnonzero(eligible[start])
    if not spec.is_fixed:
        columns = rng.permutation(columns)
    chosen = rows[start]
    return ClipChoice(num_rows - 1 - chosen if is_reversed else chosen, columns[: spec.max_objects])


def _there_and_back(rows: np.ndarray, num_rows: int) -> np.ndarray:
    """Reflect row numbers at the last and the first row."""
    period = max(1, 2 * (num_rows - 1))
    folded = rows % period
    return np.minimum(folded, period - folded) if num_rows > 1 else np.zeros_like(rows)
