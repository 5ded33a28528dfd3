"""Students at 1008 px: time of a forward as trained and in every deployment form, and of a training step.

    python scripts/bench.py stage1 --only students
    python scripts/bench_students.py --student es_ev_s es_rv_m --no-compile

All forms of a student are timed in turn within one run, so that a busy machine slows all of them alike; the figure is
the fastest of the runs. Outputs of each form are compared with those of the student as trained. The share of the
machine's arithmetic that the best form reaches says how much more there is to gain: 100% is a matrix product of
2048x2048 by 2048x2048 in the same run.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sam3.backbones import backbone_spec, student_names
from sam3.backbones.packed import has_packed_operations, packed_linear, reorder_linear
from sam3.config import Sam3Config, StudentConfig
from sam3.model.deployment import has_cpp_compiler, optimize_for_deployment
from sam3.model.student_encoder import StudentEncoder, build_student, fuse_for_inference
from sam3_train.distributed import pick_device
from sam3_train.errors import run_cli

TARGET_SPEEDUP = 2.0
TOLERANCE = 1e-3
AS_TRAINED = "as trained"
SUMMARY_FORMS = (AS_TRAINED, "deployed", "compiled")


@dataclass
class StudentTimes:
    """What was measured of one student."""

    student: str
    seconds: dict[str, float]
    """Form -> fastest forward of one image."""
    differences: dict[str, float]
    """Form -> largest difference from the outputs as trained, in units of their standard deviation."""
    training_step_s: float
    gflop: float
    """Arithmetic of the deployed form, which needs a quarter of the head's 3x3 convolution (`WinogradConv2d`)."""
    peak_gflops: float
    """Of this machine, measured in the same run."""

    @property
    def share_of_peak(self) -> float:
        """Arithmetic of the best form per second, over the machine's."""
        return self.gflop / self.seconds[self.best_form] / self.peak_gflops

    @property
    def best_form(self) -> str:
        """The fastest form whose outputs agree."""
        agreeing = [form for form in self.seconds if self.differences[form] < TOLERANCE]
        return min(agreeing, key=self.seconds.__getitem__)

    @property
    def speedup(self) -> float:
        """As trained over best."""
        return self.seconds[AS_TRAINED] / self.seconds[self.best_form]


def deployment_forms(student: StudentEncoder, compile: bool) -> dict[str, nn.Module]:
    """Every form that is timed; the first is the student itself."""
    forms: dict[str, nn.Module] = {
        AS_TRAINED: student,
        "channels_last": optimize_for_deployment(student, fuse=False),
        "folded": fuse_for_inference(student),
        "deployed": optimize_for_deployment(student),
    }
    if compile:
        forms["compiled"] = optimize_for_deployment(student, compile=True)
    return forms


def measure_student(
    name: str, config: Sam3Config, device: torch.device, compile: bool = True, runs: int = 5
) -> StudentTimes:
    """Time one student.

    Args:
        name: Student or backbone name.
        config: Description of the teacher, which sets the image size and the embedding.
        device: Where to run.
        compile: Time the compiled form too.
        runs: Timed forwards per form, after one that is not.
    """
    torch.manual_seed(0)
    spec = backbone_spec(name)
    student = build_student(config.replace(student=StudentConfig(spec.name))).to(device)
    calibrate(student, device)
    image = torch.randn(1, 3, config.image_size_px, config.image_size_px, device=device)
    forms = deployment_forms(student, compile)
    seconds = dict.fromkeys(forms, float("inf"))
    with torch.no_grad():
        outputs = {form: module(image) for form, module in forms.items()}
        for _ in range(runs):
            for form, module in forms.items():
                seconds[form] = min(seconds[form], _timed(lambda m=module: m(image), device))  # type: ignore[misc]
    gflop = deployed_gflop(student, image)
    differences = {form: _difference(output, outputs[AS_TRAINED]) for form, output in outputs.items()}
    del forms, outputs
    step_s = training_step_seconds(student, image)
    if compile:
        torch._dynamo.reset()
    gc.collect()
    return StudentTimes(spec.student_name or name, seconds, differences, step_s, gflop, peak_gflops(device))


@torch.no_grad()
def deployed_gflop(student: StudentEncoder, image_bchw: Tensor) -> float:
    """Multiplications and additions of matrix products and convolutions in one forward, with Winograd's in the head."""
    conv: Any = student.head[3]
    maps: list[Tensor] = []
    handle = conv.register_forward_hook(lambda _module, _inputs, output: maps.append(output))
    with FlopCounterMode(display=False) as counter:
        student(image_bchw)
    handle.remove()
    direct = 2 * maps[0].numel() * conv.weight[0].numel()
    return (counter.get_total_flops() - 0.75 * direct) / 1e9


@torch.no_grad()
def peak_gflops(device: torch.device, side: int = 2048) -> float:
    """Arithmetic per second of one large matrix product, by the fastest means there is."""
    x, weight = torch.randn(side, side, device=device), torch.randn(side, side, device=device)
    product: Callable[[], Tensor] = lambda: x @ weight  # noqa: E731
    if device.type == "cpu" and has_packed_operations():
        packed = reorder_linear(weight, side)
        product = lambda: packed_linear(x, packed)  # noqa: E731
    product()
    return 2 * side**3 / min(_timed(product, device) for _ in range(5)) / 1e9


@torch.no_grad()
def calibrate(student: StudentEncoder, device: torch.device) -> None:
    """Give each BatchNorm the statistics of one batch: with fresh ones, folding would have nothing to do."""
    norms = [module for module in student.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    student.train()(torch.randn(2, 3, 224, 224, device=device))
    for norm in norms:
        norm.momentum = 0.1
    student.eval()


def training_step_seconds(student: StudentEncoder, image_bchw: Tensor, runs: int = 2) -> float:
    """Fastest forward, backward and AdamW step on one image, in float32."""
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        student(image_bchw).square().mean().backward()
        optimizer.step()

    step()
    return min(_timed(step, image_bchw.device) for _ in range(runs))


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _difference(output: Tensor, reference: Tensor) -> float:
    return float((output - reference).abs().max() / reference.std())


def rows_of(times: StudentTimes) -> list[dict[str, Any]]:
    """Rows for the benchmark's table."""
    rows: list[dict[str, Any]] = [
        {"name": f"{times.student}: forward, {form}", "value": value, "unit": "s"}
        for form, value in times.seconds.items()
    ]
    for row, difference in zip(rows, times.differences.values(), strict=True):
        if difference:
            row["note"] = f"largest difference {difference:.1e} of the outputs' scale"
            row["target"], row["met"] = f"difference < {TOLERANCE:g}", difference < TOLERANCE
    rows.append(
        {"name": f"{times.student}: share of the machine's arithmetic", "value": times.share_of_peak, "unit": ""}
    )
    rows.append({"name": f"{times.student}: training step", "value": times.training_step_s, "unit": "s"})
    rows.append(
        {
            "name": f"{times.student}: {AS_TRAINED} / {times.best_form}",
            "value": times.speedup,
            "unit": "x",
            "target": f">= {TARGET_SPEEDUP:g}",
            "met": times.speedup >= TARGET_SPEEDUP,
        }
    )
    return rows


TITLES = ("Student", *SUMMARY_FORMS, "Best", "Gain", f">= {TARGET_SPEEDUP:g}x", "GFLOP", "Of peak", "Training step")


def summary(all_times: Sequence[StudentTimes]) -> str:
    """One line per student, as Markdown."""
    head = ["| " + " | ".join(TITLES) + " |", "|---|" + "---:|" * (len(TITLES) - 1)]
    return "\n".join([*head, *(summary_line(times) for times in all_times)]) + "\n"


def summary_line(times: StudentTimes) -> str:
    """A student's line of `summary`."""
    cells = [
        times.student,
        *(f"{times.seconds[form]:.3f} s" if form in times.seconds else "" for form in SUMMARY_FORMS),
        times.best_form,
        f"{times.speedup:.2f}x",
        "yes" if times.speedup >= TARGET_SPEEDUP else "no",
        f"{times.gflop:.1f}",
        f"{times.share_of_peak:.0%}",
        f"{times.training_step_s:.2f} s",
    ]
    return "| " + " | ".join(cells) + " |"


def bench(
    quick: bool = False, device: torch.device | None = None, students: list[str] | None = None, compile: bool = True
) -> list[dict[str, Any]]:
    """Rows for all nine students, or those named; see `measure`."""
    return [row for times in measure(quick, device, students, compile) for row in rows_of(times)]


def measure(
    quick: bool = False, device: torch.device | None = None, students: list[str] | None = None, compile: bool = True
) -> list[StudentTimes]:
    """Times of all nine students, or those named; each line of the summary is printed when it is known.

    Args:
        quick: One student at the tiny preset's size: the paths are real, the figures are not.
        device: Default: the CPU.
        students: Student or backbone names.
        compile: Also time ``torch.compile``, where it can work.
    """
    device = device or torch.device("cpu")
    config = Sam3Config.preset("tiny" if quick else "sam3")
    names = students or (["es_ev_s"] if quick else list(student_names()))
    compile = compile and not quick and (device.type != "cpu" or has_cpp_compiler())
    all_times = []
    for name in names:
        all_times.append(measure_student(name, config, device, compile, runs=1 if quick else 5))
        print(summary_line(all_times[-1]), file=sys.stderr, flush=True)
    return all_times


def _main(argv: list[str] | None) -> int:
    from bench import format_table, machine_facts

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", nargs="+", help="students or backbones; default all nine")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile (half a minute each)")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to check that everything runs")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    all_times = measure(args.quick, device, args.student, not args.no_compile)
    rows = [row for times in all_times for row in rows_of(times)]
    print(format_table("students", machine_facts(device), {"students": ("Students", rows)}))
    print(summary(all_times))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; see the module's docstring."""
    return run_cli(_main, argv)


if __name__ == "__main__":
    raise SystemExit(main())
