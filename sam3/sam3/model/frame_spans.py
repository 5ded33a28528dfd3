"""Which frames were tracked, and in which direction: a few spans, however many frames."""

from __future__ import annotations

from collections.abc import Iterator


class FrameSpans:
    """Frame indices with the direction in which each was tracked last; like a dict, but small for long runs."""

    def __init__(self) -> None:
        self._spans: list[tuple[int, int, bool]] = []  # first frame, one past the last, reverse; disjoint

    def add(self, frame_idx: int, reverse: bool) -> None:
        """Note that a frame was tracked in this direction."""
        for i, (start, stop, direction) in enumerate(self._spans):
            if start <= frame_idx < stop and direction == reverse:
                return
            if start <= frame_idx < stop:
                self._spans[i : i + 1] = _without(start, stop, direction, frame_idx)
                break
        start, stop, others = frame_idx, frame_idx + 1, []
        for span in self._spans:
            if span[2] == reverse and span[1] == start:
                start = span[0]
            elif span[2] == reverse and span[0] == stop:
                stop = span[1]
            else:
                others.append(span)
        self._spans = [*others, (start, stop, reverse)]

    def discard(self, frame_idx: int) -> None:
        """Forget a frame; one that was never noted is none of these."""
        for i, (start, stop, direction) in enumerate(self._spans):
            if start <= frame_idx < stop:
                self._spans[i : i + 1] = _without(start, stop, direction, frame_idx)
                return

    def direction(self, frame_idx: int) -> bool | None:
        """True if the frame was tracked in reverse, False if forward, None if it was not tracked."""
        return next((d for start, stop, d in self._spans if start <= frame_idx < stop), None)

    def clear(self) -> None:
        """Forget all frames."""
        self._spans.clear()

    def items(self) -> Iterator[tuple[int, bool]]:
        """Frames and their directions, in the order of the frames."""
        for start, stop, direction in sorted(self._spans):
            yield from ((t, direction) for t in range(start, stop))

    def __contains__(self, frame_idx: int) -> bool:
        return self.direction(frame_idx) is not None

    def __len__(self) -> int:
        return sum(stop - start for start, stop, _ in self._spans)


def _without(start: int, stop: int, direction: bool, frame_idx: int) -> list[tuple[int, int, bool]]:
    halves = (start, frame_idx, direction), (frame_idx + 1, stop, direction)
    return [half for half in halves if half[0] < half[1]]
