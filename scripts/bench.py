"""Measures what the project promises and writes a table and JSON; never fails a test run.

    python scripts/bench.py stage1                     # everything: about a quarter of an hour on two cores
    python scripts/bench.py stage1 --only store model  # some parts
    python scripts/bench.py image                      # the image model beside Hugging Face's: about half an hour
    python scripts/bench.py video                      # the tracker: about half an hour
    python scripts/bench.py geometry                   # the fine-tune: about five minutes
    python scripts/bench.py stage2                     # the compressed memory: about ten minutes
    python scripts/bench.py stage1 --quick             # seconds; the numbers mean nothing, the paths are real

Every part lives in a file of its own beside this one (``bench_data.py`` and so on) with one function
``bench(quick, device) -> rows``. A row is a dict with ``name``, ``value`` and ``unit``, and optionally ``target`` and
``met`` (was it reached), and ``note``. A part that breaks is a row too, with the reason, and the others still run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from sam3_train.errors import UserError, run_cli

ROOT = Path(__file__).resolve().parents[1]
PARTS: dict[str, dict[str, tuple[str, str]]] = {
    "stage1": {
        "data": ("bench_data", "Decoding and preprocessing"),
        "store": ("bench_store", "Embedding store"),
        "export": ("bench_export", "Export loop"),
        "train": ("bench_train", "Training loop"),
        "model": ("bench_model", "Teacher at its real size"),
        "students": ("bench_students", "Students at 1008 px"),
    },
    "image": {
        "load": ("bench_load", "Loading a checkpoint of the released size"),
        "model": ("bench_image", "The image model at its real size"),
    },
    "video": {
        "stream": ("bench_stream", "Tracking at constant memory"),
        "tracker": ("bench_video", "The tracker at its real size"),
    },
    "geometry": {
        "prompts": ("bench_prompts", "Drawing prompts"),
        "step": ("bench_geometry", "A step of the fine-tune"),
        "real": ("bench_geometry_real", "A step at its real size"),
    },
    "stage2": {
        "memory": ("bench_memory", "Full and compressed memory at their real size"),
    },
}


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    facts = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "cpu_cores": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def run_part(module_name: str, quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Rows of one part; if it breaks, one row that says why, with the traceback on stderr."""
    try:
        rows = importlib.import_module(module_name).bench(quick=quick, device=device)
    except Exception as error:
        traceback.print_exc()
        return [
            {"name": module_name, "value": None, "unit": "", "note": f"not measured: {type(error).__name__}: {error}"}
        ]
    return [dict(row) for row in rows]


def format_value(value: Any) -> str:
    """Four digits at most for a float, a dash for what was not measured."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def format_table(title: str, facts: dict[str, Any], parts: dict[str, tuple[str, list[dict[str, Any]]]]) -> str:
    """All rows as Markdown, a table for each part."""
    lines = [f"# Benchmark: {title}", "", ", ".join(f"{name} {value}" for name, value in facts.items())]
    for heading, rows in parts.values():
        lines += [
            "",
            f"## {heading}",
            "",
            "| What | Value | Unit | Target | Met | Note |",
            "|---|---:|---|---|---|---|",
        ]
        for row in rows:
            met = {True: "yes", False: "no", None: ""}[row.get("met")]
            cells = [
                row["name"],
                format_value(row["value"]),
                row["unit"],
                row.get("target", ""),
                met,
                row.get("note", ""),
            ]
            lines.append("| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=sorted(PARTS), help="what to measure")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts to run; default all")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to check that everything runs")
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default the GPU where there is one")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "bench", help="folder of the two files")
    return parser


def _main(argv: list[str] | None) -> int:
    args = build_parser().parse_args(argv)
    chosen = PARTS[args.subject]
    for name in args.only or []:
        if name not in chosen:
            raise UserError(f"--only {name}: {args.subject} has the parts {', '.join(chosen)}")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    facts = machine_facts(device)
    parts: dict[str, tuple[str, list[dict[str, Any]]]] = {}
    for name, (module_name, heading) in chosen.items():
        if args.only and name not in args.only:
            continue
        print(f"== {heading}", flush=True)
        start = time.monotonic()
        rows = run_part(module_name, args.quick, device)
        for row in rows:
            print(
                f"   {row['name']}: {format_value(row['value'])} {row['unit']} {row.get('note', '')}".rstrip(),
                flush=True,
            )
        print(f"   ({time.monotonic() - start:.0f} s)", flush=True)
        parts[name] = (heading, rows)
    args.output.mkdir(parents=True, exist_ok=True)
    record = {"facts": facts, "quick": args.quick, "parts": {name: rows for name, (_, rows) in parts.items()}}
    (args.output / f"{args.subject}.json").write_text(json.dumps(record, indent=1) + "\n")
    table = format_table(args.subject, facts, parts)
    (args.output / f"{args.subject}.md").write_text(table)
    print(f"written: {args.output / args.subject}.md and .json")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; see the module's text."""
    return run_cli(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
