"""The demo's report as one self-contained HTML page: images and charts are inside, so it opens from disk anywhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Comparison:
    """One image with one prompt, segmented by teacher and student."""

    title: str
    prompt: str
    """What was drawn, e.g. ``box`` or ``one click``."""
    views_jpeg: tuple[bytes, bytes, bytes]
    """The image with its prompt, the teacher's mask, the student's mask."""
    agreement: float
    """IoU of the student's mask with the teacher's."""
    teacher_iou: float | None = None
    """IoU with the ground truth; None where there is none."""
    student_iou: float | None = None


@dataclass(frozen=True)
class Score:
    """Mean IoU on the held-out scenes for one kind of prompt."""

    prompt: str
    teacher: float
    student: float

    @property
    def ratio(self) -> float:
        return self.student / self.teacher if self.teacher else 0.0


@dataclass(frozen=True)
class DetectorScore:
    """One measure of the detector on the held-out scenes, 0..1."""

    words: str
    teacher: float
    student: float


@dataclass(frozen=True)
class TrackingScore:
    """Mean J&F on the held-out clips for one kind of prompt."""

    prompt: str
    teacher: float
    student: float


@dataclass(frozen=True)
class TrackedClip:
    """Pictures of one clip that teacher and student have tracked."""

    title: str
    strip_jpeg: bytes
    """Frames with the prompts, the teacher's masks, the student's masks: three rows."""
    animation_webp: bytes
    """The teacher's masks on the left, the student's on the right."""


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
class TunedScore:
    """One measure on the held-out scenes, 0..1, of the teacher and of the student before and after the fine-tune."""

    words: str
    teacher: float
    before: float
    after: float

    @property
    def gain_points(self) -> float:
        return 100.0 * (self.after - self.before)


@dataclass(frozen=True)
class TunedScene:
    """One held-out object, segmented by the teacher and by the student before and after the fine-tune."""

    title: str
    prompt: str
    views_jpeg: tuple[bytes, bytes, bytes, bytes]
    """The image with its prompt, the teacher's mask, the student's before and after."""
    teacher_iou: float
    before_iou: float
    after_iou: float


@dataclass(frozen=True)
class FineTune:
    """What the geometry fine-tune changed."""

    scores: Sequence[TunedScore]
    """The first is the headline (box)."""
    scenes: Sequence[TunedScene]
    chart: str
    """`svg_chart.line_chart` element."""


@dataclass(frozen=True)
class ModelRow:
    """What a model weighs and how fast it is."""

    name: str
    encoder: str
    encoder_params: int
    total_params: int
    file_bytes: int
    encode_ms: float
    """One image through `set_image`, median."""
    predict_ms: float
    """One prompt through `predict`, median."""


@dataclass(frozen=True)
class StepRow:
    """One step of the run that made the page."""

    name: str
    command: str
    seconds: float


@dataclass(frozen=True)
class Report:
    """All that the page shows."""

    scores: Sequence[Score]
    """The first is the headline (box)."""
    num_objects: int
    scenes: Sequence[Comparison]
    photos: Sequence[Comparison]
    charts: Sequence[str]
    """`svg_chart.line_chart` elements."""
    models: Sequence[ModelRow]
    load_lines: str
    load_output: str
    """What the lines printed when they were run for this page."""
    steps: Sequence[StepRow] = ()
    environment: dict[str, str] = field(default_factory=dict)
    phrases: Sequence[Comparison] = ()
    """What phrases and exemplar boxes find."""
    detector_scores: Sequence[DetectorScore] = ()
    num_phrases: int = 0
    tracking: Tracking | None = None
    finetune: FineTune | None = None


STYLE = (Path(__file__).parent / "demo_page.css").read_text(encoding="utf-8")


def format_bytes(num_bytes: int) -> str:
    """1.25 MB rather than 1250000."""
    return f"{num_bytes / 1e6:.2f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.2f} GB"


def _image(encoded: bytes, alt: str, kind: str = "jpeg") -> str:
    data = base64.b64encode(encoded).decode("ascii")
    return f'<img loading="lazy" alt="{html.escape(alt, quote=True)}" src="data:image/{kind};base64,{data}">'


def _figure(one: Comparison) -> str:
    def caption(name: str, iou: float | None) -> str:
        return f"{name}: IoU <b>{iou:.2f}</b>" if iou is not None else name

    title, prompt = html.escape(one.title), html.escape(one.prompt)
    captions = (f"prompt: {prompt}", caption("teacher", one.teacher_iou), caption("student", one.student_iou))
    alts = (f"{one.title} with its prompt", f"the teacher's mask on {one.title}", f"the student's mask on {one.title}")
    views = "".join(
        f"<div>{_image(jpeg, alt)}<span>{text}</span></div>"
        for jpeg, alt, text in zip(one.views_jpeg, alts, captions, strict=True)
    )
    agreement = f"student against teacher: IoU <b>{one.agreement:.2f}</b>"
    return f'<figure><figcaption>{title} · {agreement}</figcaption><div class="views">{views}</div></figure>'


def _tuned_figure(one: TunedScene) -> str:
    names = ("prompt: " + html.escape(one.prompt), "teacher", "before", "after")
    alts = (f"{one.title} with its prompt", *(f"mask of {who} on {one.title}" for who in ("the teacher", *names[2:])))
    ious = ("", *(f": IoU <b>{iou:.2f}</b>" for iou in (one.teacher_iou, one.before_iou, one.after_iou)))
    views = "".join(
        f"<div>{_image(jpeg, alt)}<span>{name}{iou}</span></div>"
        for jpeg, alt, name, iou in zip(one.views_jpeg, alts, names, ious, strict=True)
    )
    return f'<figure><figcaption>{html.escape(one.title)}</figcaption><div class="views four">{views}</div></figure>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[int] = (0,)) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        classes = [' class="text"' if index in text_columns else "" for index in range(len(values))]
        return "".join(f"<{tag}{kind}>{value}</{tag}>" for kind, value in zip(classes, values, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{cells("th", header)}</tr>{body}</table></div>'


def _headline(report: Report) -> str:
    box, teacher, student = report.scores[0], report.models[0], report.models[-1]
    facts = [
        (
            f"{box.ratio:.0%}",
            f"of the teacher's {box.prompt} mIoU on held-out scenes ({box.student:.3f} of {box.teacher:.3f})",
        ),
        (f"{student.encoder_params / teacher.encoder_params:.0%}", "of the parameters of the teacher's image encoder"),
        (f"{teacher.encode_ms / student.encode_ms:.1f}×", "the teacher's speed on this CPU, one image"),
    ]
    if report.finetune is not None:
        tuned = report.finetune.scores[0]
        facts.append((f"{tuned.gain_points:+.1f}", f"points of {tuned.words} by the geometry fine-tune"))
    return '<div class="headline">' + "".join(f"<div><b>{a}</b>{html.escape(b)}</div>" for a, b in facts) + "</div>"


def _scores_table(report: Report) -> str:
    rows = [[s.prompt, f"{s.teacher:.3f}", f"{s.student:.3f}", f"{s.ratio:.1%}"] for s in report.scores]
    return _table(["prompt", "teacher mIoU", "student mIoU", "student / teacher"], rows)


def _phrases(report: Report) -> str:
    """The section on the detector; empty where the teacher has none."""
    if not report.detector_scores:
        return ""
    rows = [[html.escape(s.words), f"{s.teacher:.3f}", f"{s.student:.3f}"] for s in report.detector_scores]
    return f"""<h2>Phrases and exemplars</h2>
<p>The detector, untouched by distillation, on the teacher's trunk and on the student's: it finds every object that a
phrase or an example box describes. {report.num_phrases} phrases on held-out scenes, as many that nothing answers;
IoU is of everything found with everything meant.</p>
{_table(["measure", "teacher", "student"], rows)}
<div class="grid-rows">{"".join(_figure(one) for one in report.phrases)}</div>"""


def _finetune(finetune: FineTune | None) -> str:
    """The section on the geometry fine-tune; empty where it did not run."""
    if finetune is None:
        return ""
    rows = [
        [html.escape(s.words), f"{s.teacher:.3f}", f"{s.before:.3f}", f"{s.after:.3f}", f"{s.gain_points:+.1f}"]
        for s in finetune.scores
    ]
    return f"""<h2>Geometry fine-tune: before and after</h2>
<p>Stage 1, shown above, taught the student the teacher's features. The fine-tune then put prompts in the loop: both
features went through the same frozen neck and heads, and the student learned to be answered as the teacher is. Measured
on the same scenes and objects as above; the pictures are of the same objects and were not chosen by their results.</p>
{_table(["measure", "teacher", "before", "after", "gain, points"], rows)}
<div class="stack">{"".join(_tuned_figure(one) for one in finetune.scenes)}</div>
<div class="charts"><div>{finetune.chart}</div></div>"""


def _tracking(tracking: Tracking | None) -> str:
    """The section on videos; empty where the teacher has no tracker."""
    if tracking is None:
        return ""
    rows = [[html.escape(s.prompt), f"{s.teacher:.3f}", f"{s.student:.3f}"] for s in tracking.scores]
    rows.append(["the exact first mask, standing still", f"{tracking.stand_still:.3f}", f"{tracking.stand_still:.3f}"])
    figures = "".join(
        f'<figure class="film"><figcaption>{html.escape(clip.title)} · prompts, teacher, student</figcaption>'
        f"{_image(clip.strip_jpeg, f'frames of {clip.title}: prompts, masks of the teacher, masks of the student')}"
        f'<span class="soft">The whole clip: teacher left, student right</span>'
        f"{_image(clip.animation_webp, f'{clip.title}: masks of teacher and student, animated', 'webp')}</figure>"
        for clip in tracking.clips
    )
    return f"""<h2>Videos</h2>
<p>The tracker's memory, untouched by distillation, on the teacher's trunk and on the student's. Every object is
prompted once, on the first frame that shows it, and followed to the end of its clip through motion, crossings and
disappearance: {tracking.num_objects} objects in {tracking.num_clips} held-out clips. J&amp;F is the mean of mask
overlap and outline accuracy, as on the DAVIS benchmark.</p>
{_table(["prompt", "teacher J&amp;F", "student J&amp;F"], rows)}
{figures}"""


def _models_table(report: Report) -> str:
    rows = [
        [
            html.escape(m.name),
            html.escape(m.encoder),
            f"{m.encoder_params / 1e6:.2f} M",
            f"{m.total_params / 1e6:.2f} M",
            format_bytes(m.file_bytes),
            f"{m.encode_ms:.1f} ms",
            f"{m.predict_ms:.1f} ms",
        ]
        for m in report.models
    ]
    header = ["model", "image encoder", "encoder parameters", "all parameters", "file", "image", "prompt"]
    return _table(header, rows, (0, 1))


def render_page(report: Report) -> str:
    """The whole page.

    Raises:
        ValueError: If there is no score or no model, which the headline needs.
    """
    if not report.scores or not report.models:
        raise ValueError("a report needs at least one score and one model")
    steps = _table(
        ["step", "command", "time"],
        [[html.escape(s.name), f"<code>{html.escape(s.command)}</code>", f"{s.seconds:.0f} s"] for s in report.steps],
        (0, 1),
    )
    environment = " · ".join(f"{html.escape(k)} {html.escape(v)}" for k, v in report.environment.items())
    scenes = "".join(_figure(one) for one in report.scenes)
    photos = "".join(_figure(one) for one in report.photos)
    charts = "".join(f"<div>{chart}</div>" for chart in report.charts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>EfficientSAM3 demo</title>
<style>{STYLE}</style>
</head>
<body><main>
<h1>EfficientSAM3 demo</h1>
<p class="soft">A small student learned to stand in for a teacher's image encoder, was merged into the teacher's
checkpoint, and segments from a box or a click. Everything on this page was made by the run that wrote it. The teacher
here is the <em>tiny</em> preset of the same architecture, trained on generated scenes: it shows the path that the
released SAM 3 takes, not its quality.</p>
{_headline(report)}
<h2>Held-out scenes</h2>
<p>Backgrounds and shapes that neither training nor validation has seen; IoU is against the exact mask.
Mean over {report.num_objects} objects:</p>
{_scores_table(report)}
<div class="grid-rows">{scenes}</div>
{_phrases(report)}
{_finetune(report.finetune)}
{_tracking(report.tracking)}
<h2>Real photos</h2>
<p>No ground truth exists here: the IoU is the student's mask against the teacher's, which is what distillation is
after.</p>
<div class="grid-rows">{photos}</div>
<h2>Training</h2>
<div class="charts">{charts}</div>
<h2>Teacher and student</h2>
{_models_table(report)}
<p class="soft">Latency is the median on this machine's CPU: <em>image</em> is <code>set_image</code> (decoded photo to
features), <em>prompt</em> is <code>predict</code> with one box.</p>
<h2>Load the merged file</h2>
<p>These lines were run for this page and printed the output below them.</p>
<pre>{html.escape(report.load_lines)}</pre>
<pre class="soft">{html.escape(report.load_output)}</pre>
<h2>What ran</h2>
{steps}
<p class="soft">{environment}</p>
</main></body>
</html>
"""
