"""The measuring code of the geometry fine-tune runs; its numbers mean nothing here."""

from __future__ import annotations

import bench_geometry
import bench_geometry_real
import bench_prompts
import pytest
import torch

from sam3.config import Sam3Config

CPU = torch.device("cpu")
TINY = Sam3Config.preset("tiny")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return bench_prompts.make_annotated_photos(tmp_path_factory.mktemp("photos"), (60, 90), num_images=2, num_objects=3)


def test_prompts_are_timed_for_every_way_to_draw_points():
    rows = bench_prompts.bench(quick=True, device=CPU)
    assert len(rows) == 8 and all(row["value"] > 0 for row in rows)
    assert "8 objects per image of 90 x 130 px" in rows[1]["note"]


@pytest.mark.parametrize("route", ["detector", "SAM heads"])
def test_the_parts_of_a_step_add_up_to_it(index, route):
    rows = bench_geometry.bench_parts(TINY, "demo_cnn", index, route, CPU, num_steps=1)
    values = {row["name"].removeprefix(f"{route}, "): row["value"] for row in rows}
    parts = [values[name] for name in (*bench_geometry.PARTS, "rest")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(values["step"])
    assert values["objects"] == pytest.approx(1e3 * 6 / values["step"])


def test_a_cached_step_does_not_ask_the_teacher(index):
    rows = {row["name"]: row for row in bench_geometry.bench_cache(TINY, index, CPU, 1, routes=("SAM heads",))}
    computed, cached = (
        float(rows[f"SAM heads, step, teacher {kind}"]["note"].split()[2]) for kind in ("computed", "cached")
    )
    assert cached < computed / 2
    assert "KiB per object" in rows["SAM heads, saved by the cache"]["note"]


def test_prompts_can_run_some_at_a_time(index):
    rows = bench_geometry.bench_prompt_batch(TINY, index, CPU, num_steps=1, counts=(1, 3))
    names = [row["name"].removeprefix("prompt batch: ") for row in rows]
    assert names == [
        "1 objects per image, 1 at a time",
        "3 objects per image, 3 at a time",
        "3 objects per image, 1 at a time",
    ]


def test_a_real_step_reports_its_peak_memory():
    rows = {row["name"]: row for row in bench_geometry_real.measure("tiny", "SAM heads", CPU)}
    peak = rows["tiny, SAM heads: peak memory of the process"]
    assert peak["target"] == "< 24" and (peak["value"] is None or (0.1 < peak["value"] < 24 and peak["met"]))


def test_a_failing_route_is_no_silent_zero(monkeypatch):
    monkeypatch.setattr(bench_geometry_real, "__file__", "/nowhere/bench_geometry_real.py")
    with pytest.raises(RuntimeError, match="tiny detector cpu: exit code 2"):
        bench_geometry_real.bench(quick=True, device=CPU)
