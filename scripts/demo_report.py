"""Compares the demo's student with its teacher and writes the report page; `scripts/demo.py` runs it last.

    PYTHONPATH=data/demo python scripts/demo_report.py --world output/demo/world \
        --teacher data/demo/tiny_teacher.safetensors --student output/demo/efficient_sam3_demo_cnn.pt \
        --run output/demo/stage1/demo_cnn --stamps output/demo/steps --output output/demo/index.html

``--finetuned`` and ``--finetune-run`` add what the geometry fine-tune changed, ``--memory`` and ``--memory-run`` the
compressed memory of stage 2. Beside the page it writes ``results.json`` with the same numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from demo_compare import Prompt, compare, describe_model
from demo_finetune import compare_finetuned
from demo_memory import compare_memories
from demo_page import Comparison, DetectorScore, FineTune, ModelRow, Report, StepRow, TunedScene, render_page
from demo_page_video import MemoryComparison, Tracking
from demo_phrases import compare_phrases, detector_scores
from demo_scores import box_ious, checkpoint_scores, read_scenes, score_prompts, shown_prompts
from demo_tracking import compare_tracking
from PIL import Image
from step_runner import read_stamp
from svg_chart import Series, line_chart
from tqdm import tqdm
from tracker_eval import read_clips

import sam3
from sam3_train.errors import UserError, run_cli
from sam3_train.log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
LOAD_LINES = """\
import numpy as np
from PIL import Image
import sam3

model = sam3.load_model("{model}")
predictor = model.inst_interactive_predictor
predictor.set_image(Image.open("{photo}"))
masks, scores, _ = predictor.predict(box=np.array({box}), multimask_output=False)
print("masks", masks.shape, "pixels inside", int(masks[0].sum()), "predicted IoU", round(float(scores[0]), 2))
"""


def photo_prompts(world: Path, settings: Sequence[Mapping[str, Any]]) -> list[tuple[Path, str, Prompt]]:
    """File, title and prompt (in pixels) for each photo of the settings.

    Raises:
        UserError: If a photo is not in the world.
    """
    found = []
    for entry in settings:
        matches = sorted((world / "photos").glob(f"{entry['name']}.*"))
        if not matches:
            raise UserError(f"REPORT.photos names {entry['name']}, but {world / 'photos'} has no such file")
        with Image.open(matches[0]) as photo:
            width, height = photo.size
        points = [(x * width, y * height) for x, y in entry.get("points", [])]
        box = entry.get("box")
        scaled = [value * side for value, side in zip(box, (width, height) * 2, strict=True)] if box else None
        found.append((matches[0], entry["title"], Prompt(scaled, points)))
    return found


def compare_photos(teacher: Any, student: Any, photos: Sequence[tuple[Path, str, Prompt]]) -> list[Comparison]:
    """Both models on the real photos."""
    compared = []
    for path, title, prompt in photos:
        with Image.open(path) as photo:
            compared.append(compare(teacher, student, photo.convert("RGB"), prompt, title))
    return compared


def training_charts(run: Path, epoch_scores: Sequence[tuple[float, float]], teacher_score: float) -> list[str]:
    """Loss and validation curves of a training run.

    Args:
        run: The run's folder with its ``metrics.jsonl``.
        epoch_scores: (epoch, box mIoU on the val scenes) of the kept checkpoints.
        teacher_score: The teacher's box mIoU on the same scenes.

    Raises:
        UserError: If the run has logged nothing.
    """
    train, val = read_metrics(run, "train"), read_metrics(run, "val")
    if not train or not val:
        raise UserError(f"{run} has no metrics.jsonl with training and validation records: was the run finished?")

    def series(records: Sequence[Mapping[str, Any]], name: str, split: str, color: int) -> Series:
        kept = [record for record in records if record.get(name) is not None]
        steps, values = [record["step"] for record in kept], [record[name] for record in kept]
        return Series(f"{name}, {split}", steps, values, split == "validation", color)

    charts = [
        line_chart(
            "Loss",
            "optimizer step",
            "loss",
            [
                series(records, name, split, color)
                for color, name in enumerate(("mse", "cosine"))
                for split, records in (("training", train), ("validation", val))
            ],
            y_low=0.0,
        )
    ]
    if epoch_scores:
        epochs = [epoch for epoch, _ in epoch_scores]
        ends = [epochs[0], epochs[-1]]
        charts.append(
            line_chart(
                "Box mIoU on validation scenes",
                "epoch",
                "mIoU against the exact masks",
                [
                    Series("student", epochs, [score for _, score in epoch_scores]),
                    Series("teacher", ends, [teacher_score] * 2, color=1),
                    Series("90% of the teacher", ends, [0.9 * teacher_score] * 2, dashed=True, color=1),
                ],
                y_low=0.0,
            )
        )
    return charts


def run_load_lines(lines: str) -> str:
    """What the lines print in a fresh Python.

    Raises:
        UserError: If they fail: a page never shows lines that do not run.
    """
    done = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the lines that load the merged file fail:\n{lines}\n{done.stderr.strip()}")
    return done.stdout.strip()


def read_steps(stamps: Path) -> list[StepRow]:
    """The finished steps of the demo, in order."""
    records = [read_stamp(path) for path in sorted(stamps.glob("*.json"))]
    return [StepRow(str(r["name"]), str(r["command"]), float(str(r["seconds"]))) for r in records if r]


def from_root(path: Path) -> str:
    """The path as a person at the repository's root would type it."""
    path = path.resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def write_results(path: Path, report: Report) -> None:
    """The page's numbers as JSON."""

    def numbers(one: Comparison | TunedScene) -> dict[str, Any]:
        return {field: value for field, value in vars(one).items() if field != "views_jpeg"}

    tracking = report.tracking
    record = {
        "scores": [{**dataclasses.asdict(score), "ratio": score.ratio} for score in report.scores],
        "num_objects": report.num_objects,
        "scenes": [numbers(one) for one in report.scenes],
        "detector_scores": [dataclasses.asdict(score) for score in report.detector_scores],
        "num_phrases": report.num_phrases,
        "phrases": [numbers(one) for one in report.phrases],
        "tracking": None
        if tracking is None
        else {
            "scores": [dataclasses.asdict(score) for score in tracking.scores],
            "stand_still": tracking.stand_still,
            "num_objects": tracking.num_objects,
            "num_clips": tracking.num_clips,
        },
        "photos": [numbers(one) for one in report.photos],
        "models": [dataclasses.asdict(model) for model in report.models],
        "steps": [dataclasses.asdict(step) for step in report.steps],
        "finetune": None
        if report.finetune is None
        else {
            "scores": [dataclasses.asdict(score) for score in report.finetune.scores],
            "scenes": [numbers(one) for one in report.finetune.scenes],
        },
        "memory": None if report.memory is None else _memory_record(report.memory),
        "environment": report.environment,
        "load_lines": report.load_lines,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def _memory_record(memory: MemoryComparison) -> dict[str, Any]:
    return {
        "scores": [{**dataclasses.asdict(score), "ratio": score.ratio} for score in memory.scores],
        "mean_ratio": memory.mean_ratio,
        "full": dataclasses.asdict(memory.full),
        "compressed": dataclasses.asdict(memory.compressed),
        "stand_still": memory.stand_still,
        "num_objects": memory.num_objects,
        "num_clips": memory.num_clips,
    }


def build_report(args: argparse.Namespace, settings: Mapping[str, Any]) -> Report:
    """Run every comparison, with a progress bar."""
    with tqdm(total=10, desc="report", unit="part") as progress:
        teacher, student = sam3.load_model(args.teacher, "cpu"), sam3.load_model(args.student, "cpu")
        photos = photo_prompts(args.world, settings["photos"])
        models = measure_models(args, teacher, student, photos[0][0], settings["latency_repeats"])
        progress.update()
        test = read_scenes(args.world, "test")
        scores, num_objects = score_prompts(teacher, student, test)
        progress.update()
        scenes = [
            compare(teacher, student, scene.image, prompt, title, truth)
            for scene, prompt, title, truth in shown_prompts(test[: settings["num_scenes"]])
        ]
        progress.update()
        phrases: list[Comparison] = []
        measures: list[DetectorScore] = []
        num_phrases = 0
        if teacher.has_detector:
            phrases = compare_phrases(teacher, student, test[: settings["num_phrase_scenes"]])
            measures, num_phrases = detector_scores(teacher, student, test[: settings["num_scored_phrase_scenes"]])
        progress.update()
        finetune: FineTune | None = None
        if args.finetuned is not None:
            models_by_name = {"teacher": teacher, "before": student, "after": sam3.load_model(args.finetuned, "cpu")}
            finetune = compare_finetuned(models_by_name, test, scores, measures, settings, args.finetune_run)
        progress.update()
        tracking = track_clips(args.world, teacher, student, settings)
        progress.update()
        memory: MemoryComparison | None = None
        if args.memory is not None:
            memory = compare_memories(args.memory, args.world, settings, args.memory_run)
        progress.update()
        photo_comparisons = compare_photos(teacher, student, photos)
        progress.update()
        val = read_scenes(args.world, "val")
        epoch_scores = checkpoint_scores(student, args.run, val)
        charts = training_charts(args.run, epoch_scores, float(box_ious(teacher, val).mean()))
        progress.update()
        load_lines = make_load_lines(args.student, *photos[0][::2])
        load_output = run_load_lines(load_lines)
        progress.update()
    return Report(
        scores=scores,
        num_objects=num_objects,
        scenes=scenes,
        photos=photo_comparisons,
        charts=charts,
        models=models,
        load_lines=load_lines,
        load_output=load_output,
        steps=read_steps(args.stamps) if args.stamps else [],
        phrases=phrases,
        detector_scores=measures,
        num_phrases=num_phrases,
        tracking=tracking,
        finetune=finetune,
        memory=memory,
        environment={
            "EfficientSAM3": sam3.__version__,
            "torch": torch.__version__,
            "Python": platform.python_version(),
            "CPU cores": str(os.cpu_count()),
        },
    )


def track_clips(world: Path, teacher: Any, student: Any, settings: Mapping[str, Any]) -> Tracking | None:
    """Both models on the world's test clips; None where the teacher has no tracker or the world no clips."""
    if not teacher.has_tracker:
        return None
    clips = read_clips(world / "clips" / "test", settings["num_clips"])
    return compare_tracking(teacher, student, clips, settings["num_shown_clips"]) if clips else None


def measure_models(args: argparse.Namespace, teacher: Any, student: Any, photo: Path, repeats: int) -> list[ModelRow]:
    """Size and speed of both, on one photo."""
    with Image.open(photo) as opened:
        image = opened.convert("RGB")
    return [
        describe_model("teacher", "ViT (tiny preset)", teacher, args.teacher, image, repeats),
        describe_model("student", student.config.student.backbone, student, args.student, image, repeats),
    ]


def make_load_lines(model: Path, photo: Path, prompt: Prompt) -> str:
    """The Python that a reader copies."""
    box = [round(value) for value in prompt.box_xyxy_px or ()]
    return LOAD_LINES.format(model=from_root(model), photo=from_root(photo), box=box)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", type=Path, default=ROOT / "configs" / "demo.yaml", help="settings, section REPORT")
    parser.add_argument("--world", type=Path, required=True, help="folder of the demo world")
    parser.add_argument("--teacher", type=Path, required=True, help="the teacher's checkpoint")
    parser.add_argument("--student", type=Path, required=True, help="the merged file")
    parser.add_argument("--run", type=Path, required=True, help="folder of the student's training run")
    parser.add_argument("--finetuned", type=Path, help="the merged file after the geometry fine-tune")
    parser.add_argument("--finetune-run", type=Path, help="folder of the fine-tuning; goes with --finetuned")
    parser.add_argument("--memory", type=Path, help="the merged file with a compressed memory")
    parser.add_argument("--memory-run", type=Path, help="folder of the memory's training; goes with --memory")
    parser.add_argument("--stamps", type=Path, help="folder of the demo's finished steps, for their commands and times")
    parser.add_argument("--output", type=Path, required=True, help="the page, .html")
    return parser


def _main(argv: list[str] | None) -> int:
    args = build_parser().parse_args(argv)
    paths = [args.cfg, args.world, args.teacher, args.student, args.run]
    paths += [args.finetuned, args.finetune_run, args.memory, args.memory_run]
    problems = [f"{path} does not exist" for path in paths if path is not None and not path.exists()]
    if (args.finetuned is None) != (args.finetune_run is None):
        problems.append("--finetuned and --finetune-run go together")
    if (args.memory is None) != (args.memory_run is None):
        problems.append("--memory and --memory-run go together")
    if problems:
        raise UserError.from_problems("no report", problems)
    report = build_report(args, yaml.safe_load(args.cfg.read_text())["REPORT"])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(render_page(report), encoding="utf-8")
    write_results(args.output.with_name("results.json"), report)
    for score in report.scores:
        print(f"{score.prompt}: teacher {score.teacher:.3f}, student {score.student:.3f} ({score.ratio:.1%})")
    for tuned in report.finetune.scores if report.finetune else ():
        print(f"{tuned.words}: fine-tuned {tuned.before:.3f} -> {tuned.after:.3f} ({tuned.gain_points:+.1f} points)")
    for kept in report.memory.scores if report.memory else ():
        print(f"{kept.prompt}, J&F: full memory {kept.full:.3f}, compressed {kept.compressed:.3f} ({kept.ratio:.1%})")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; see the module's text."""
    return run_cli(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
