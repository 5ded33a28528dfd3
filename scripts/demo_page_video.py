"""Videos on the demo's page: the tracker on two trunks, and with its full and its compressed memory."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from demo_html import image_tag, table


@dataclass(frozen=True)
class TrackingScore:
    """Mean J&F on the held-out clips for one kind of prompt."""

    prompt: str
    teacher: float
    student: float


@dataclass(frozen=True)
class TrackedClip:
    """Pictures of one clip that two models have tracked, such as teacher and student."""

    title: str
    strip_jpeg: bytes
    """Frames with the prompts, the masks of the first model, those of the second: three rows."""
    animation_webp: bytes
    """The masks of the first model on the left, those of the second on the right."""


@dataclass(frozen=True)
class Tracking:
    """What the tracker does on the held-out clips."""

    scores: Sequence[TrackingScore]
    stand_still: float
    """J&F of the exact first masks, kept as they are."""
    num_objects: int
    num_clips: int
    clips: Sequence[TrackedClip]


@dataclass(frozen=True)
class MemoryScore:
    """Mean J&F on the held-out clips for one kind of prompt, of one file with either of its memories."""

    prompt: str
    full: float
    compressed: float

    @property
    def ratio(self) -> float:
        return self.compressed / self.full if self.full else 0.0


@dataclass(frozen=True)
class StoredMemory:
    """What a memory keeps of one frame for one object."""

    tokens: int
    num_bytes: int


@dataclass(frozen=True)
class MemoryComparison:
    """What the compressed memory of stage 2 changes."""

    scores: Sequence[MemoryScore]
    """The first is the headline."""
    full: StoredMemory
    compressed: StoredMemory
    stand_still: float
    num_objects: int
    num_clips: int
    clips: Sequence[TrackedClip]
    chart: str
    """`svg_chart.line_chart` element."""

    @property
    def mean_ratio(self) -> float:
        """Compressed over full, of the mean over all prompts."""
        full = sum(score.full for score in self.scores)
        return sum(score.compressed for score in self.scores) / full if full else 0.0


def _film(clip: TrackedClip, who: tuple[str, str]) -> str:
    title, (first, second) = html.escape(clip.title), who
    strip = image_tag(clip.strip_jpeg, f"frames of {clip.title}: prompts, masks of {first}, masks of {second}")
    film = image_tag(clip.animation_webp, f"{clip.title}: masks of {first} and {second}, animated", "webp")
    return (
        f'<figure class="film"><figcaption>{title} · prompts, {first}, {second}</figcaption>{strip}'
        f'<span class="soft">The whole clip: {first} left, {second} right</span>{film}</figure>'
    )


def tracking_section(tracking: Tracking | None) -> str:
    """The section on videos; empty where the teacher has no tracker."""
    if tracking is None:
        return ""
    rows = [[html.escape(s.prompt), f"{s.teacher:.3f}", f"{s.student:.3f}"] for s in tracking.scores]
    rows.append(["the exact first mask, standing still", f"{tracking.stand_still:.3f}", f"{tracking.stand_still:.3f}"])
    figures = "".join(_film(clip, ("teacher", "student")) for clip in tracking.clips)
    return f"""<h2>Videos</h2>
<p>The tracker's memory, untouched by distillation, on the teacher's trunk and on the student's. Every object is
prompted once, on the first frame that shows it, and followed to the end of its clip through motion, crossings and
disappearance: {tracking.num_objects} objects in {tracking.num_clips} held-out clips. J&amp;F is the mean of mask
overlap and outline accuracy, as on the DAVIS benchmark.</p>
{table(["prompt", "teacher J&amp;F", "student J&amp;F"], rows)}
{figures}"""


def memory_section(memory: MemoryComparison | None) -> str:
    """The section on the compressed memory; empty where stage 2 did not run."""
    if memory is None:
        return ""
    rows = [[html.escape(s.prompt), f"{s.full:.3f}", f"{s.compressed:.3f}", f"{s.ratio:.1%}"] for s in memory.scores]
    rows.append(["the exact first mask, standing still", *[f"{memory.stand_still:.3f}"] * 2, ""])
    stored = [
        [name, f"{one.tokens:,}", f"{one.num_bytes:,}"]
        for name, one in (("full", memory.full), ("compressed", memory.compressed))
    ]
    figures = "".join(_film(clip, ("full memory", "compressed memory")) for clip in memory.clips)
    return f"""<h2>Compressed memory</h2>
<p>Stage 2 trained a memory that keeps a few tokens of a frame in place of one for each cell, and a light attention that
reads them, in front of the fine-tuned student; one file holds it beside the full memory. Both follow the same objects:
{memory.num_objects} in {memory.num_clips} held-out clips. What they keep of each frame for each object:</p>
{table(["memory", "tokens", "bytes"], stored)}
<p>How well they follow, as the mean of mask overlap and outline accuracy:</p>
{table(["prompt", "full, J&amp;F", "compressed, J&amp;F", "compressed / full"], rows)}
{figures}
<div class="charts"><div>{memory.chart}</div></div>"""
