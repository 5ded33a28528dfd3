"""Teacher against students: parameters, FLOPs and, on request, time.

    PYTHONPATH=sam3 python stage1/compare_models.py --student all
    PYTHONPATH=sam3 python stage1/compare_models.py --student es_rv_m --latency --form best
    PYTHONPATH=sam3 python stage1/compare_models.py --student all --json > report.json

Runs from a bare checkout; no weights are needed. The published sizes are those of the backbone alone; a student that
runs also has a projection head, which is counted beside it. FLOPs are those of convolutions and matrix products, one
multiply and one add being two; attention counts as the two products it is made of. Everything but the measured time is
computed on the meta device, in seconds and without memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sam3.backbones import UnknownBackboneError, backbone_spec, student_names
from sam3.config import Sam3Config, StudentConfig
from sam3.model.deployment import optimize_for_deployment
from sam3.model.student_encoder import StudentEncoder, build_student
from sam3.model_builder import assemble_image_model, build_trunk
from sam3.released_counts import COMPONENTS, NECK, TOTAL, TRUNK, VISION_ENCODER, compare_built
from sam3_train.distributed import pick_device
from sam3_train.errors import UserError, run_cli

TEACHER = Sam3Config.preset("sam3")


def chosen_backbones(student: str) -> list[str]:
    """Backbone names for ``all`` (the released nine) or one student or backbone name.

    Raises:
        UserError: If the name is unknown; the message lists all.
    """
    if student == "all":
        return [student_names()[name] for name in sorted(student_names())]
    try:
        return [backbone_spec(student).name]
    except UnknownBackboneError as error:
        raise UserError(f"--student: {error}; or all") from error


def teacher_report() -> dict[str, Any]:
    """The teacher's parameters by component.

    Raises:
        RuntimeError: If a built component has another size than the released one.
    """
    model = assemble_image_model(TEACHER, device="meta", enable_tracker=True)
    built = compare_built(model)
    wrong = {name: counts for name, counts in built.items() if counts[0] != counts[1]}
    if wrong:
        raise RuntimeError(f"components differ from the released ones (released, built): {wrong}")
    components = [{"name": part.name, "parameters": part.parameters} for part in COMPONENTS]
    return {
        "components": components,
        "parameters": TOTAL,
        "vision_encoder_parameters": VISION_ENCODER,
        "trunk_parameters": TRUNK,
        "trunk_flops": count_flops(model.backbone.vision_backbone.trunk),
    }


def student_report(backbone: str) -> dict[str, Any]:
    """Parameters and FLOPs of one student, beside the teacher's."""
    with torch.device("meta"):
        student = build_student(TEACHER.replace(student=StudentConfig(backbone)))
    backbone_parameters, head_parameters = count_parameters(student.backbone), count_parameters(student.head)
    together = backbone_parameters + head_parameters
    flops = count_flops(student)
    return {
        "student": backbone_spec(backbone).student_name or backbone,
        "backbone": backbone,
        "backbone_parameters": backbone_parameters,
        "head_parameters": head_parameters,
        "parameters": together,
        # As published: the backbone in place of trunk and necks.
        "saving_backbone_only": 1 - backbone_parameters / VISION_ENCODER,
        # As it runs: backbone, head and the two necks that stay.
        "saving_deployed": 1 - (together + 2 * NECK) / VISION_ENCODER,
        "merged_parameters": TOTAL - TRUNK + together,
        "flops": flops,
        "head_flops": flops - count_flops(student, head=False),
    }


def count_parameters(module: nn.Module) -> int:
    """Parameters, not buffers."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_flops(module: nn.Module, head: bool = True) -> int:
    """FLOPs of one image at the teacher's size, on the meta device (where attention is counted as matrix products).

    Args:
        module: A trunk or student; moved to the meta device.
        head: False leaves out a student's projection head.
    """
    module = module.to("meta").eval()
    if not head and isinstance(module, StudentEncoder):
        module = module.backbone
    image = torch.empty(1, 3, TEACHER.image_size_px, TEACHER.image_size_px, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(image)
    return counter.get_total_flops()


def measure_latency(module: nn.Module, runs: int, device: torch.device) -> float:
    """Median seconds of a forward of one image at the teacher's size, after one warm-up."""
    image = torch.zeros(1, 3, TEACHER.image_size_px, TEACHER.image_size_px, device=device)
    times = []
    with torch.inference_mode():
        for _ in range(runs + 1):
            start = time.perf_counter()
            module(image)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def add_latency(report: dict[str, Any], args: argparse.Namespace) -> None:
    """Measured seconds, in place: of each student, and of the teacher's trunk if asked for."""
    device = pick_device(args.device)
    report["latency"] = {
        "form": args.form,
        "device": str(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "runs": args.runs,
    }
    for row in report["students"]:
        student = build_student(TEACHER.replace(student=StudentConfig(row["backbone"]))).eval().to(device)
        module = optimize_for_deployment(student) if args.form == "best" else student
        row["latency_s"] = measure_latency(module, args.runs, device)
    if args.latency_teacher:
        trunk = build_trunk(TEACHER).eval().to(device)
        report["teacher"]["trunk_latency_s"] = measure_latency(trunk, args.runs, device)


def format_report(report: dict[str, Any]) -> str:
    """The report as text."""
    teacher = report["teacher"]
    lines = [f"Teacher: SAM 3, {_millions(teacher['parameters'])}M parameters"]
    rows = [
        [part["name"], _millions(part["parameters"]), f"{part['parameters'] / TOTAL:.1%}"]
        for part in teacher["components"]
    ]
    lines += _table(["component", "M", "share"], rows)
    lines.append(
        f"Vision encoder (trunk and both necks): {_millions(teacher['vision_encoder_parameters'])}M. Trunk: "
        f"{_giga(teacher['trunk_flops'])} GFLOPs at {TEACHER.image_size_px} px"
        + (f", {teacher['trunk_latency_s']:.2f} s." if "trunk_latency_s" in teacher else ".")
    )
    lines += ["", "Students, parameters in millions"]
    header = [
        "student",
        "backbone",
        "backbone M",
        "head M",
        "together M",
        "saving",
        "deployed",
        "merged M",
        "GFLOPs",
        "of head",
    ]
    rows = [_student_row(row) for row in report["students"]]
    if "latency" in report:
        header.append("ms")
        for cells, row in zip(rows, report["students"], strict=True):
            cells.append(f"{row['latency_s'] * 1000:.0f}")
    lines += _table(header, rows)
    lines.append(
        f"saving: backbone alone against the {_millions(VISION_ENCODER)}M vision encoder (as published). deployed: "
        "backbone, head and the two necks that stay, against the same. merged: the whole model with this trunk."
    )
    if "latency" in report:
        facts = report["latency"]
        lines.append(
            f"ms: median of {facts['runs']} forwards of one image, form {facts['form']}, {facts['device']}, "
            f"{facts['threads']} threads, torch {facts['torch']}."
        )
    return "\n".join(lines)


def _student_row(row: dict[str, Any]) -> list[str]:
    return [
        row["student"],
        row["backbone"],
        _millions(row["backbone_parameters"]),
        _millions(row["head_parameters"]),
        _millions(row["parameters"]),
        f"{row['saving_backbone_only']:.2%}",
        f"{row['saving_deployed']:.2%}",
        _millions(row["merged_parameters"]),
        _giga(row["flops"]),
        f"{row['head_flops'] / row['flops']:.0%}",
    ]


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}"


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.1f}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Aligned columns; the first two to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    numeric = [all(row[i][:1].isdigit() for row in rows) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numeric, strict=True)]
        return ("  " + "  ".join(padded)).rstrip()

    return [line(header), line(["-" * width for width in widths]), *(line(row) for row in rows)]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="all", help="all, a student (es_rv_m) or a backbone (repvit_m1_1)")
    parser.add_argument("--latency", action="store_true", help="measure the time of a forward of each student")
    parser.add_argument(
        "--latency-teacher", action="store_true", help="also of the teacher's trunk (a minute on a CPU)"
    )
    parser.add_argument("--form", choices=("eager", "best"), default="eager", help="as trained, or as deployed")
    parser.add_argument("--runs", type=int, default=3, help="forwards that are timed")
    parser.add_argument("--device", default="cpu", help="where time is measured")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    return parser


def _main(argv: list[str] | None) -> int:
    args = build_parser().parse_args(argv)
    if args.runs < 1:
        raise UserError(f"--runs {args.runs}: at least one forward has to be timed")
    pick_device(args.device)
    backbones = chosen_backbones(args.student)
    report = {"teacher": teacher_report(), "students": [student_report(backbone) for backbone in backbones]}
    if args.latency or args.latency_teacher:
        add_latency(report, args)
    print(json.dumps(report, indent=2) if args.json else format_report(report))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; see the module's docstring."""
    return run_cli(_main, argv)


if __name__ == "__main__":
    raise SystemExit(main())
