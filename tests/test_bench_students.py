"""The student benchmark: what counts as best, and that its paths run."""

from __future__ import annotations

import bench_students
import pytest
import torch
from bench_students import AS_TRAINED, StudentTimes
from torch.utils.flop_counter import FlopCounterMode

from sam3.config import Sam3Config, StudentConfig
from sam3.model.student_encoder import build_student


def test_the_best_form_is_the_fastest_whose_outputs_agree() -> None:
    seconds = {AS_TRAINED: 1.0, "deployed": 0.4, "compiled": 0.1}
    times = StudentTimes("es_ev_s", seconds, {AS_TRAINED: 0.0, "deployed": 1e-5, "compiled": 0.5}, 3.0, 40.0, 200.0)
    assert (times.best_form, times.speedup) == ("deployed", 2.5)
    rows = {row["name"]: row for row in bench_students.rows_of(times)}
    assert rows["es_ev_s: as trained / deployed"]["met"] is True
    assert rows["es_ev_s: forward, compiled"]["met"] is False
    assert rows["es_ev_s: training step"]["value"] == 3.0
    assert rows["es_ev_s: share of the machine's arithmetic"]["value"] == pytest.approx(0.5)
    assert bench_students.summary([times]).splitlines()[2] == (
        "| es_ev_s | 1.000 s | 0.400 s | 0.100 s | deployed | 2.50x | yes | 40.0 | 50% | 3.00 s |"
    )


def test_the_arithmetic_of_a_student_counts_a_quarter_of_the_heads_convolution() -> None:
    student = build_student(Sam3Config.preset("tiny").replace(student=StudentConfig("demo_cnn"))).eval()
    image = torch.randn(1, 3, 252, 252)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        student(image)
    head = next(flops for name, flops in counter.get_flop_counts().items() if name.endswith("head.3"))
    expected = counter.get_total_flops() - 0.75 * sum(head.values())
    assert bench_students.deployed_gflop(student, image) == pytest.approx(expected / 1e9)


def test_a_quick_run_measures_every_form_and_their_outputs_agree() -> None:
    rows = bench_students.bench(quick=True, students=["demo_cnn"])
    forwards = [row for row in rows if "forward" in row["name"]]
    assert [row["name"].rpartition(", ")[2] for row in forwards] == [AS_TRAINED, "channels_last", "folded", "deployed"]
    assert all(row["met"] for row in forwards if "met" in row)
    assert all(row["value"] > 0 for row in rows)


def test_an_unknown_device_is_a_user_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_students.main(["--quick", "--device", "abacus"]) == 2
    assert "abacus" in capsys.readouterr().err
