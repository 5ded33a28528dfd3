"""Every stage that exists on the demo world, one after the other, each through its own launcher.

    bash scripts/demo.sh                       # makes the environment, then runs this
    python scripts/demo.py                     # in an environment that is there already
    python scripts/demo.py --fresh             # forget what an earlier run made
    python scripts/demo.py --output DIR        # elsewhere than output/demo

Finished steps are kept and reused until one of their inputs changes: settings, the teacher's weights, every source file
that the step's script imports. A changed step starts from nothing, a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from step_runner import Step, StepFailedError, run_steps
from step_sources import sources_of

from sam3_train.errors import UserError, run_cli

ROOT = Path(__file__).resolve().parents[1]
TEACHER = Path("data/demo/tiny_teacher.safetensors")
TEACHER_CFG = Path("stage1/configs/teacher/demo_tiny.yaml")
STUDENT_CFG = Path("stage1/configs/demo_cnn.yaml")
FINETUNE_CFG = Path("stage1_geometry_finetune/configs/demo_cnn.yaml")
MEMORY_CFG = Path("stage2/configs/demo_cnn.yaml")
STUDENT = "demo_cnn"
LAUNCH_SOURCES = (Path("scripts/launch.sh"), Path("sam3/sam3_train/torchrun.py"))
# Two processes of one thread each beat one of two on networks this small, and show that every step is distributed.
CPU = ("DEVICE=cpu", "NPROC=2")


def read_settings(path: Path) -> dict[str, Any]:
    """The demo's YAML.

    Raises:
        UserError: If the file is missing or lacks a section.
    """
    if not path.is_file():
        raise UserError(f"--cfg {path} does not exist; the demo's own is configs/demo.yaml")
    settings = yaml.safe_load(path.read_text())
    for section in ("WORLD", "REPORT"):
        if not isinstance(settings, dict) or section not in settings:
            raise UserError(f"{path} has no section {section}; see configs/demo.yaml")
    return settings


def from_root(path: Path) -> Path:
    """The path relative to the repository if it lies inside, which keeps the printed commands short."""
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def with_bases(cfg_file: Path) -> list[Path]:
    """A config and every file that it inherits from."""
    settings = yaml.safe_load((ROOT / cfg_file).read_text()) or {}
    return [cfg_file, *(path for base in settings.get("BASE", ()) for path in with_bases(cfg_file.parent / base))]


class Places(NamedTuple):
    """Where the steps put what they make."""

    world: Path
    export: Path
    run: Path
    merged: Path
    tuned_run: Path
    tuned: Path
    memory_run: Path
    memory: Path
    page: Path
    stamps: Path

    @classmethod
    def below(cls, output: Path) -> Places:
        """All of them in one folder."""
        return cls(
            world=output / "world",
            export=output / "stage1_teacher",
            run=output / "stage1" / STUDENT,
            merged=output / f"efficient_sam3_{STUDENT}.pt",
            tuned_run=output / "stage1_geometry" / STUDENT,
            tuned=output / f"efficient_sam3_{STUDENT}_geometry.pt",
            memory_run=output / "stage2" / STUDENT,
            memory=output / f"efficient_sam3_{STUDENT}_memory.pt",
            page=output / "index.html",
            stamps=output / "steps",
        )


def demo_steps(cfg_file: Path, settings: dict[str, Any], output: Path) -> list[Step]:
    """The demo from an empty folder to the page; paths are relative to the repository where they lie in it."""
    at = Places.below(output)
    stages = [*stage1_steps(at), *finetune_steps(at), *memory_steps(at)]
    return [world_step(settings, at), *stages, report_step(cfg_file, at)]


def world_step(settings: dict[str, Any], at: Places) -> Step:
    """The generated scenes that everything else learns from and is measured on."""
    world_options = [word for name, value in settings["WORLD"].items() for word in (f"--{name}", str(value))]
    return Step(
        "world",
        "Make the demo world",
        ["python", "data/demo/demo_world.py", "--output", str(at.world), *world_options],
        sources_of(Path("data/demo/demo_world.py"), ROOT),
        [at.world / "images/train", at.world / "images/val", at.world / "images/test", at.world / "photos"],
        owned=[at.world],
    )


def stage1_steps(at: Places) -> list[Step]:
    """Stage 1: embeddings, student, merged file."""
    return [
        Step(
            "export",
            "Export the teacher's embeddings",
            [
                *("bash", "stage1/scripts/save_stage1_embeddings.sh", f"CFG={TEACHER_CFG}", f"DATA_PATH={at.world}"),
                *(f"OUTPUT={at.export}", *CPU),
            ],
            [
                *(*with_bases(TEACHER_CFG), TEACHER, Path("stage1/scripts/save_stage1_embeddings.sh"), *LAUNCH_SOURCES),
                *sources_of(Path("stage1/save_embedding_stage1.py"), ROOT),
            ],
            [at.export / "embeddings"],
            owned=[at.export],
        ),
        Step(
            "train",
            "Train the student",
            [
                *("bash", "stage1/scripts/train_stage1_student.sh", f"CFG={STUDENT_CFG}", f"DATA_PATH={at.world}"),
                *(f"OUTPUT={at.run}", *CPU, "--opts", "DISTILL.TEACHER_EMBED_PATH", str(at.export / "embeddings")),
            ],
            [
                *(*with_bases(STUDENT_CFG), Path("stage1/scripts/train_stage1_student.sh"), *LAUNCH_SOURCES),
                *sources_of(Path("stage1/train_stage1.py"), ROOT),
            ],
            [at.run / "best.pth"],
            owned=[at.run],
        ),
        Step(
            "merge",
            "Merge the student into the teacher's checkpoint",
            [
                *("python", "stage1/convert_stage1_weights.py", "--student-ckpt", str(at.run / "best.pth")),
                *("--sam3-ckpt", str(TEACHER), "--output", str(at.merged), "--fuse", "--dtype", "fp16"),
            ],
            sources_of(Path("stage1/convert_stage1_weights.py"), ROOT),
            [at.merged],
            owned=[at.merged],
        ),
    ]


def finetune_steps(at: Places) -> list[Step]:
    """The geometry fine-tune, and the merged file with what it trained."""
    return [
        Step(
            "finetune",
            "Fine-tune the student through the teacher's frozen heads",
            [
                *("bash", "stage1_geometry_finetune/scripts/train_geometry_finetune.sh", f"CFG={FINETUNE_CFG}"),
                *(f"DATA_PATH={at.world}", f"OUTPUT={at.tuned_run}", f"PRETRAINED={at.run / 'best.pth'}"),
                *(f"TEACHER_EMBED_PATH={at.export / 'embeddings'}", *CPU),
            ],
            [
                *(*with_bases(FINETUNE_CFG), Path("stage1_geometry_finetune/scripts/train_geometry_finetune.sh")),
                *(TEACHER, *LAUNCH_SOURCES),
                *sources_of(Path("stage1_geometry_finetune/train_geometry_finetune.py"), ROOT),
            ],
            [at.tuned_run / "best.pth"],
            owned=[at.tuned_run],
        ),
        Step(
            "convert",
            "Put the fine-tuned student into the merged file",
            [
                *("python", "stage1_geometry_finetune/convert_geometry_finetune.py", "--finetune-ckpt"),
                *(str(at.tuned_run / "best.pth"), "--pretrained", str(at.merged), "--output", str(at.tuned)),
            ],
            sources_of(Path("stage1_geometry_finetune/convert_geometry_finetune.py"), ROOT),
            [at.tuned],
            owned=[at.tuned],
        ),
    ]


def memory_steps(at: Places) -> list[Step]:
    """Stage 2: a compressed memory in front of the fine-tuned student, and the file that holds both memories."""
    return [
        Step(
            "memory",
            "Train the compressed memory",
            [
                *("bash", "stage2/scripts/train_memory.sh", f"CFG={MEMORY_CFG}", f"DATA_PATH={at.world}"),
                *(f"SAM3_CHECKPOINT={at.tuned}", f"OUTPUT={at.memory_run}", *CPU),
                *("--opts", "DATA.FEATURE_CACHE", str(at.memory_run / "features")),
            ],
            [
                *(*with_bases(MEMORY_CFG), Path("stage2/scripts/train_memory.sh"), *LAUNCH_SOURCES),
                *sources_of(Path("stage2/train_memory_stage2.py"), ROOT),
            ],
            [at.memory_run / "model_final.pth"],
            owned=[at.memory_run],
        ),
        Step(
            "remember",
            "Put the compressed memory beside the full one",
            [
                *("python", "stage2/convert_memory_weights_stage2.py"),
                *("--trained_checkpoint", str(at.memory_run / "model_final.pth")),
                *("--sam3_checkpoint", str(at.tuned), "--output_path", str(at.memory)),
            ],
            sources_of(Path("stage2/convert_memory_weights_stage2.py"), ROOT),
            [at.memory],
            owned=[at.memory],
        ),
    ]


def report_step(cfg_file: Path, at: Places) -> Step:
    """The page."""
    return Step(
        "report",
        "Compare teacher and student",
        [
            *("python", "scripts/demo_report.py", "--cfg", str(cfg_file), "--world", str(at.world)),
            *("--teacher", str(TEACHER), "--student", str(at.merged), "--run", str(at.run)),
            *("--finetuned", str(at.tuned), "--finetune-run", str(at.tuned_run)),
            *("--memory", str(at.memory), "--memory-run", str(at.memory_run)),
            *("--stamps", str(at.stamps), "--output", str(at.page)),
        ],
        [
            *(cfg_file, Path("scripts/demo_page.css")),
            *sources_of(Path("scripts/demo_report.py"), ROOT, [Path("data/demo")]),
        ],
        [at.page],
        {"PYTHONPATH": "data/demo"},
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "demo", help="where everything goes")
    parser.add_argument("--cfg", type=Path, default=ROOT / "configs" / "demo.yaml", help="sizes of the demo")
    parser.add_argument("--fresh", action="store_true", help="delete what an earlier run made, then run")
    return parser


def _main(argv: list[str] | None) -> int:
    args = build_parser().parse_args(argv)
    start = time.monotonic()
    settings = read_settings(args.cfg)
    output = args.output.resolve()
    if args.fresh and output.exists():
        if not (output / "steps").is_dir():
            raise UserError(f"--fresh: {output} was not made by the demo (it has no steps folder); delete it yourself")
        shutil.rmtree(output)
    try:
        run_steps(demo_steps(from_root(args.cfg), settings, from_root(output)), output / "steps", ROOT)
    except StepFailedError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return error.exit_code
    print(f"\nDone in {time.monotonic() - start:.0f} s. Open this file in a browser:\n  {output / 'index.html'}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; see the module's text."""
    return run_cli(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
