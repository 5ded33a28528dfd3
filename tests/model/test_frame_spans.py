"""Spans answer what a dict of all frames would, in any order of noting and forgetting, and stay few."""

from __future__ import annotations

import random

from sam3.model.frame_spans import FrameSpans


def test_spans_answer_as_a_dict_does() -> None:
    rng = random.Random(0)
    for _ in range(50):
        spans, expected = FrameSpans(), {}
        for _ in range(60):
            frame_idx, reverse = rng.randrange(12), rng.random() < 0.5
            if rng.random() < 0.25:
                spans.discard(frame_idx)
                expected.pop(frame_idx, None)
            else:
                spans.add(frame_idx, reverse)
                expected[frame_idx] = reverse
            assert dict(spans.items()) == expected
            assert len(spans) == len(expected)
            assert all((t in spans) == (t in expected) for t in range(-1, 13))
        spans.clear()
        assert not list(spans.items())


def test_a_long_run_is_one_span() -> None:
    spans = FrameSpans()
    for t in range(5000):
        spans.add(t, False)
    for t in range(4000, -1, -1):
        spans.add(t, True)
    assert len(spans._spans) == 2
    assert spans.direction(4000) is True
    assert spans.direction(4001) is False
    assert spans.direction(5000) is None
