"""The demo's report as one self-contained HTML page: images and charts are inside, so it opens from disk anywhere."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from demo_html import format_bytes, image_tag, table
from demo_page_video import MemoryComparison, Tracking, memory_section, tracking_section


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
    memory: MemoryComparison | None = None


STYLE = (Path(__file__).parent / "demo_page.css").read_text(encoding="utf-8")


def _figure(one: Comparison) -> str:
    def caption(name: str, iou: float | None) -> str:
        return f"{name}: IoU <b>{iou:.2f}</b>" if iou is not None else name

    title, prompt = html.escape(one.title), html.escape(one.prompt)
    captions = (f"prompt: {prompt}", caption("teacher", one.teacher_iou), caption("student", one.student_iou))
    alts = (f"{one.title} with its prompt", f"the teacher's mask on {one.title}", f"the student's mask on {one.title}")
    views = "".join(
        f"<div>{image_tag(jpeg, alt)}<span>{text}</span></div>"
        for jpeg, alt, text in zip(one.views_jpeg, alts, captions, strict=True)
    )
    agreement = f"student against teacher: IoU <b>{one.agreement:.2f}</b>"
    return f'<figure><figcaption>{title} · {agreement}</figcaption><div class="views">{views}</div></figure>'


def _tuned_figure(one: TunedScene) -> str:
    names = ("prompt: " + html.escape(one.prompt), "teacher", "before", "after")
    alts = (f"{one.title} with its prompt", *(f"mask of {who} on {one.title}" for who in ("the teacher", *names[2:])))
    ious = ("", *(f": IoU <b>{iou:.2f}</b>" for iou in (one.teacher_iou, one.before_iou, one.after_iou)))
    views = "".join(
        f"<div>{image_tag(jpeg, alt)}<span>{name}{iou}</span></div>"
        for jpeg, alt, name, iou in zip(one.views_jpeg, alts, names, ious, strict=True)
    )
    return f'<figure><figcaption>{html.escape(one.title)}</figcaption><div class="views four">{views}</div></figure>'


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
    if report.memory is not None:
        kept, tokens = report.memory.mean_ratio, report.memory.compressed.tokens
        facts.append((f"{kept:.0%}", f"of the full memory's J&F with {tokens} of {report.memory.full.tokens} tokens"))
    return '<div class="headline">' + "".join(f"<div><b>{a}</b>{html.escape(b)}</div>" for a, b in facts) + "</div>"


def _scores_table(report: Report) -> str:
    rows = [[s.prompt, f"{s.teacher:.3f}", f"{s.student:.3f}", f"{s.ratio:.1%}"] for s in report.scores]
    return table(["prompt", "teacher mIoU", "student mIoU", "student / teacher"], rows)


def _phrases(report: Report) -> str:
    """The section on the detector; empty where the teacher has none."""
    if not report.detector_scores:
        return ""
    rows = [[html.escape(s.words), f"{s.teacher:.3f}", f"{s.student:.3f}"] for s in report.detector_scores]
    return f"""<h2>Phrases and exemplars</h2>
<p>The detector, untouched by distillation, on the teacher's trunk and on the student's: it finds every object that a
phrase or an example box describes. {report.num_phrases} phrases on held-out scenes, as many that nothing answers;
IoU is of everything found with everything meant.</p>
{table(["measure", "teacher", "student"], rows)}
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
{table(["measure", "teacher", "before", "after", "gain, points"], rows)}
<div class="stack">{"".join(_tuned_figure(one) for one in finetune.scenes)}</div>
<div class="charts"><div>{finetune.chart}</div></div>"""


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
    return table(header, rows, (0, 1))


def render_page(report: Report) -> str:
    """The whole page.

    Raises:
        ValueError: If there is no score or no model, which the headline needs.
    """
    if not report.scores or not report.models:
        raise ValueError("a report needs at least one score and one model")
    steps = table(
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
{tracking_section(report.tracking)}
{memory_section(report.memory)}
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
