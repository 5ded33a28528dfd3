"""The demo's page from invented results: complete, self-contained, well-formed."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from demo_drawing import BOX_RGB, STUDENT_RGB, draw_mask, draw_prompt, to_jpeg
from demo_page import (
    Comparison,
    FineTune,
    ModelRow,
    Report,
    Score,
    StepRow,
    TunedScene,
    TunedScore,
    render_page,
)
from demo_page_video import MemoryComparison, MemoryScore, StoredMemory, TrackedClip, Tracking, TrackingScore
from PIL import Image
from svg_chart import Series, line_chart, nice_ticks

VOID_TAGS = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects what a browser would load and checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.links += [value for name, value in attrs if name in {"src", "href", "xlink:href", "data"} and value]
        if tag == "img":
            self.images.append(values)
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in {"src", "href"} and value]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def make_report() -> Report:
    image = Image.fromarray(np.full((60, 80, 3), 90, np.uint8))
    jpeg = to_jpeg(image)
    views = (jpeg, jpeg, jpeg)
    return Report(
        scores=[Score("box", 0.8, 0.76), Score("one click", 0.6, 0.45)],
        num_objects=123,
        scenes=[Comparison("scene <1>", "box", views, 0.91, 0.88, 0.83)],
        photos=[Comparison("coffee", "one click", views, 0.77)],
        charts=[line_chart("Loss", "step", "loss", [Series("mse", [0, 1], [1, 0.5]), Series("val", [0, 1], [1, 0.6])])],
        models=[
            ModelRow("teacher", "tiny ViT", 2_000_000, 3_000_000, 6_400_000, 40.0, 4.0),
            ModelRow("student", "demo_cnn", 500_000, 1_500_000, 3_000_000, 10.0, 4.0),
        ],
        load_lines='import sam3\nmodel = sam3.load_model("a & b.pt")',
        load_output="mask of 60 x 80",
        steps=[StepRow("train", "bash train.sh GPUS=0", 200.4)],
        environment={"torch": "2.11.0"},
    )


def test_page_shows_every_result():
    page = Page(render_page(make_report()))
    assert page.open == []
    for expected in ("95%", "25%", "4.0×", "0.800", "0.760", "75.0%", "123 objects", "scene <1>", "coffee", "IoU 0.88"):
        assert expected in page.text, expected
    for expected in ("0.77", "2.00 M", "6.40 MB", "40.0 ms", 'sam3.load_model("a & b.pt")', "mask of 60 x 80", "200 s"):
        assert expected in page.text, expected


def test_page_loads_nothing_from_outside():
    text = render_page(make_report())
    page = Page(text)
    assert page.links
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    assert not re.search(r"https?://|@import|url\(|<script", text)


def test_images_on_the_page_decode_and_are_described():
    page = Page(render_page(make_report()))
    assert len(page.images) == 6
    for values in page.images:
        data = base64.b64decode((values["src"] or "").split(",", 1)[1])
        assert Image.open(io.BytesIO(data)).size == (80, 60)
        assert values["alt"]


def test_photos_without_ground_truth_show_no_iou_for_each_model():
    report = make_report()
    figure = render_page(report).split("Real photos")[1].split("</figure>")[0]
    assert "IoU <b>0.77</b>" in figure
    assert figure.count("<b>") == 1


def test_a_report_without_scores_is_refused():
    report = make_report()
    with pytest.raises(ValueError, match="at least one score"):
        render_page(Report(**{**report.__dict__, "scores": []}))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.02, 0.98), (3, 3), (-5, 1200), (1e-6, 3e-6)])
def test_ticks_cover_the_data_with_round_steps(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 9
    step = ticks[1] - ticks[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-6


def test_chart_puts_points_where_they_belong():
    svg = line_chart("A < B", "epoch", "IoU", [Series("one", [0, 10], [0.0, 1.0])])
    (points,) = re.findall(r'<polyline[^>]* points="([^"]*)"', svg)
    (x0, y0), (x1, y1) = [tuple(map(float, pair.split(","))) for pair in points.split()]
    assert x0 < x1
    assert y0 > y1, "larger values are higher, so they have a smaller y in an SVG"
    assert "A &lt; B" in svg
    assert "legend" not in svg


def test_an_axis_can_start_at_zero():
    def height(svg: str) -> float:
        return float(re.findall(r'points="[^"]* [\d.]+,([\d.]+)"', svg)[0])

    line = [Series("one", [0, 1], [0.9, 0.8])]
    assert height(line_chart("t", "x", "y", line)) > height(line_chart("t", "x", "y", line, y_low=0.0))
    assert ">0<" in line_chart("t", "x", "y", line, y_low=0.0)


def test_chart_leaves_out_points_that_are_not_finite_and_refuses_to_be_empty():
    svg = line_chart("t", "x", "y", [Series("one", [0, 1, 2], [0.5, float("nan"), 0.1])])
    assert len(re.findall(r'points="([^"]*)"', svg)[0].split()) == 2
    with pytest.raises(ValueError, match="nothing to draw"):
        line_chart("t", "x", "y", [Series("one", [0], [float("nan")])])
    with pytest.raises(ValueError, match="2 x values and 1 y values"):
        line_chart("t", "x", "y", [Series("one", [0, 1], [1.0])])


def test_mask_is_tinted_inside_and_grey_outside():
    image = Image.fromarray(np.full((40, 60, 3), (200, 30, 30), np.uint8))
    mask = np.zeros((40, 60), bool)
    mask[10:30, 20:40] = True
    pixels = np.asarray(draw_mask(image, mask, STUDENT_RGB)).astype(int)
    assert pixels.shape == (40, 60, 3)
    assert np.ptp(pixels[2, 2]) == 0, "outside is grey"
    assert abs(pixels[20, 30] - (0.55 * np.array([200, 30, 30]) + 0.45 * np.array(STUDENT_RGB))).max() <= 2
    assert tuple(pixels[20, 19]) == STUDENT_RGB, "the outline is just outside the mask"
    with pytest.raises(ValueError, match=r"shape \(3, 3\) does not fit an image of 40 x 60"):
        draw_mask(image, mask[:3, :3], STUDENT_RGB)


def test_prompts_are_drawn_at_their_place_in_a_shrunk_picture():
    image = Image.fromarray(np.zeros((400, 800, 3), np.uint8))
    picture = draw_prompt(image, box_xyxy_px=(200, 100, 600, 300), max_side_px=400)
    assert picture.size == (400, 200)
    assert picture.getpixel((200, 50)) == BOX_RGB
    assert picture.getpixel((200, 100)) == (0, 0, 0)
    clicked = draw_prompt(image, points_xy_px=[(400, 200), (80, 80)], labels=[1, 0], max_side_px=400)
    green, red = clicked.getpixel((200, 100)), clicked.getpixel((40, 40))
    assert green[1] > green[0]
    assert red[0] > red[1]


def test_videos_are_shown_where_there_is_a_tracker():
    report = make_report()
    assert "Videos" not in Page(render_page(report)).text
    picture = report.scenes[0].views_jpeg[0]
    tracking = Tracking(
        [TrackingScore("box", 0.71, 0.64)], 0.31, 9, 4, [TrackedClip("clip <7>", picture, b"RIFF not a real one")]
    )
    page = Page(render_page(dataclasses.replace(report, tracking=tracking)))
    assert page.open == []
    for expected in ("Videos", "box 0.710 0.640", "standing still 0.310", "9 objects in 4 held-out clips", "clip <7>"):
        assert expected in page.text, expected
    kinds = [image["src"].split(";")[0] for image in page.images if "clip <7>" in image["alt"]]
    assert kinds == ["data:image/jpeg", "data:image/webp"]


def test_both_memories_are_shown_where_stage_2_ran():
    """What each keeps of a frame, how well it tracks, and both on a clip."""
    report = make_report()
    assert "Compressed memory" not in Page(render_page(report)).text
    memory = MemoryComparison(
        scores=[MemoryScore("mask", 0.5, 0.48), MemoryScore("box", 0.4, 0.41)],
        full=StoredMemory(324, 10368),
        compressed=StoredMemory(64, 2048),
        stand_still=0.22,
        num_objects=13,
        num_clips=4,
        clips=[TrackedClip("clip <8>", report.scenes[0].views_jpeg[0], b"RIFF not a real one")],
        chart=report.charts[0],
    )
    assert memory.mean_ratio == pytest.approx(0.89 / 0.9)
    page = Page(render_page(dataclasses.replace(report, memory=memory)))
    assert page.open == []
    for expected in (
        "99% of the full memory's J&F with 64 of 324 tokens",
        *("full 324 10,368", "compressed 64 2,048", "mask 0.500 0.480 96.0%", "box 0.400 0.410 102.5%"),
        *("standing still 0.220 0.220", "13 in 4 held-out clips", "clip <8> · prompts, full memory, compressed memory"),
    ):
        assert expected in page.text, expected
    alts = [str(image["alt"]) for image in page.images]
    assert "clip <8>: masks of full memory and compressed memory, animated" in alts
    assert all(link.startswith("data:image/") for link in page.links)


def test_the_fine_tune_is_shown_before_and_after_where_it_ran():
    """Gains and losses alike, in points; three masks of each object beside the prompt."""
    report = make_report()
    assert "before and after" not in Page(render_page(report)).text
    picture = report.scenes[0].views_jpeg[0]
    finetune = FineTune(
        [TunedScore("box mIoU", 0.842, 0.773, 0.791), TunedScore("one click mIoU", 0.788, 0.708, 0.701)],
        [TunedScene("scene <9>", "one click", (picture,) * 4, 0.9, 0.61, 0.72)],
        report.charts[0],
    )
    page = Page(render_page(dataclasses.replace(report, finetune=finetune)))
    assert page.open == []
    for expected in ("+1.8 points of box mIoU by the geometry fine-tune", "0.773 0.791 +1.8", "0.708 0.701 -0.7"):
        assert expected in page.text, expected
    assert "after: IoU 0.72" in page.text and "scene <9>" in page.text
    alts = [str(values["alt"]) for values in page.images]
    assert {"mask of the teacher on scene <9>", "mask of before on scene <9>", "mask of after on scene <9>"} <= {*alts}
    assert all(link.startswith("data:image/") for link in page.links)
