"""The comparison of teacher and students: published sizes, the honest ones beside them, and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from students import RELEASED
from torch import nn

from sam3.config import Sam3Config
from sam3.released_counts import COMPONENTS, NECK, TOTAL, TRUNK, VISION_ENCODER
from stage1 import compare_models

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED_MILLIONS = {
    "es_ev_s": "0.68",
    "es_ev_m": "4.64",
    "es_ev_l": "14.98",
    "es_rv_s": "4.72",
    "es_rv_m": "7.77",
    "es_rv_l": "22.40",
    "es_tv_s": "5.07",
    "es_tv_m": "10.55",
    "es_tv_l": "20.62",
}


@pytest.fixture(scope="module")
def report() -> dict:
    teacher = compare_models.teacher_report()
    students = [compare_models.student_report(backbone) for backbone in compare_models.chosen_backbones("all")]
    return {"teacher": teacher, "students": students}


def test_the_released_table_adds_up() -> None:
    assert sum(part.parameters for part in COMPONENTS) == TOTAL == 860_055_224
    assert VISION_ENCODER == TRUNK + 2 * NECK == 461_841_920


def test_the_teacher_is_reported_by_component(report: dict) -> None:
    counts = {part["name"]: part["parameters"] for part in report["teacher"]["components"]}
    assert counts == {part.name: part.parameters for part in COMPONENTS}
    assert 5.3e12 < report["teacher"]["trunk_flops"] < 5.5e12


def test_a_built_component_of_another_size_is_not_reported_as_the_released_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_models, "TEACHER", Sam3Config.preset("tiny"))
    with pytest.raises(RuntimeError, match="components differ from the released ones"):
        compare_models.teacher_report()


def test_all_nine_students_have_the_published_sizes_and_the_head_beside_them(report: dict) -> None:
    """D-06: the size of a student is what is deployed, head included."""
    rows = {row["student"]: row for row in report["students"]}
    assert {name: f"{row['backbone_parameters'] / 1e6:.2f}" for name, row in rows.items()} == PUBLISHED_MILLIONS
    for name, row in rows.items():
        facts = RELEASED[name]
        assert row["head_parameters"] == facts.head_parameters
        assert row["parameters"] == facts.backbone_parameters + facts.head_parameters
        assert row["merged_parameters"] == 860_055_224 - 446_237_696 + row["parameters"]
    assert f"{rows['es_ev_s']['saving_backbone_only']:.2%}" == "99.85%"
    assert f"{rows['es_ev_s']['saving_deployed']:.2%}" == "94.40%"


def test_flops_of_the_head_are_those_of_its_two_convolutions(report: dict) -> None:
    rows = {row["student"]: row for row in report["students"]}
    # 32x32 positions: 1x1 from 128 channels, 3x3 over 1024; a multiply and an add each.
    assert rows["es_ev_s"]["head_flops"] == 2 * 32 * 32 * (128 * 1024 + 9 * 1024 * 1024)
    assert rows["es_rv_s"]["flops"] > rows["es_ev_s"]["flops"] > rows["es_ev_s"]["head_flops"]


def test_the_text_names_units_and_every_student(report: dict) -> None:
    text = compare_models.format_report(report)
    assert "860.06M parameters" in text
    assert "461.84M" in text
    assert all(name in text for name in PUBLISHED_MILLIONS)


def test_latency_is_measured_in_the_form_asked_for(report: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[nn.Module] = []

    def measure(module: nn.Module, runs: int, device: torch.device) -> float:
        measured.append(module)
        return 0.25

    monkeypatch.setattr(compare_models, "measure_latency", measure)
    row = next(dict(row) for row in report["students"] if row["student"] == "es_ev_s")
    for form, folded in (("eager", False), ("best", True)):
        args = compare_models.build_parser().parse_args(["--latency", "--form", form])
        timed = {"teacher": report["teacher"], "students": [row]}
        compare_models.add_latency(timed, args)
        assert measured[-1].student.fused is folded
        assert f"form {form}" in compare_models.format_report(timed)
        assert " 250" in compare_models.format_report(timed)


def test_the_median_of_the_timed_forwards_leaves_out_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 9.0, 10.0, 11.0, 20.0, 23.0, 30.0, 32.0])
    monkeypatch.setattr(compare_models.time, "perf_counter", lambda: next(ticks))
    assert compare_models.measure_latency(nn.Identity(), runs=3, device=torch.device("cpu")) == 2.0


def test_it_runs_from_a_bare_checkout_and_prints_json(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "stage1" / "compare_models.py"), "--student", "es_rv_m", "--json"]
    environment = {"PYTHONPATH": str(ROOT / "sam3"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["students"]
    assert (row["student"], row["backbone"], row["backbone_parameters"]) == ("es_rv_m", "repvit_m1_1", 7_774_864)


def test_an_unknown_student_is_a_user_error_that_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_models.main(["--student", "es_rv_x"]) == 2
    message = capsys.readouterr().err
    assert "'es_rv_x' (did you mean es_rv_s or es_rv_m?)" in message
    assert all(name in message for name in PUBLISHED_MILLIONS)


def test_zero_runs_and_an_absent_device_are_user_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_models.main(["--latency", "--runs", "0"]) == 2
    assert "--runs 0" in capsys.readouterr().err
    assert compare_models.main(["--latency", "--device", "cuda:99"]) == 2
    assert "--device cuda:99" in capsys.readouterr().err
