"""How much of a memory's training is worth what: variants of it, trained alike and tracked with on held-out clips.

    PYTHONPATH=data/demo python scripts/ablate_memory.py --world output/demo/world --seeds 3 --jobs 2

Each variant changes one thing of ``--cfg``: how many tokens a frame has and of which kind, whether the full memory
teaches, whether a new memory starts from it, whether clips grow. Runs share the features of the frozen backbone, which
are computed first; then ``--jobs`` of them go on at a time, the first seed of all variants before the second. Each one
follows the objects of ``--test-clips`` generated clips from their first masks, and so does the full memory. What is
done already is not done again. The table is ``memory_ablation.md`` in ``--output``, with the numbers in
``memory_ablation.json``; both are written anew after every run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean
from typing import Any

from bench import machine_facts

from sam3_train.errors import UserError, run_cli

ROOT = Path(__file__).resolve().parents[1]
KIND = "mask"
TABLE = "memory_ablation"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One thing that differs."""

    name: str
    title: str
    opts: tuple[str, ...] = ()
    """``--opts`` of the training."""


def tokens(num: int, windows: bool = True) -> tuple[str, ...]:
    """So many tokens of a frame, each of a window or each of the whole frame."""
    latents = (0, num) if windows else (num, 0)
    return ("MODEL.MEMORY.NUM_LATENTS", str(latents[0]), "MODEL.MEMORY.NUM_LATENTS_2D", str(latents[1]))


_NO_TEACHER = tuple(
    word for name in ("MASK", "FEATURES", "POINTERS", "FORCED_SHARE") for word in (f"DISTILL.{name}", "0")
)
_GROWING = ("CLIPS.LENGTHS", "[4, 8]", "CLIPS.LENGTH_EPOCHS", "[]")
"""As many frames in all, to a few percent, as clips of 6 frames."""
VARIANTS = (
    Variant("windows64", "64 tokens, one for each window", tokens(64)),
    Variant("windows16", "16 tokens, one for each window", tokens(16)),
    Variant("windows256", "256 tokens, one for each window", tokens(256)),
    Variant("global64", "64 tokens that read the whole frame", tokens(64, windows=False)),
    Variant("no_teacher", "64 windows, without distillation", (*tokens(64), *_NO_TEACHER)),
    Variant("fresh", "64 windows, without a start from the full memory", (*tokens(64), "MODEL.START", "fresh")),
    Variant("curriculum", "64 windows, clips of 4 frames and then of 8", (*tokens(64), *_GROWING)),
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    names = [variant.name for variant in VARIANTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, default=ROOT / "output/demo/world", help="demo world with training clips")
    parser.add_argument("--sam3-checkpoint", type=Path, default=ROOT / "data/demo/tiny_teacher.safetensors")
    parser.add_argument("--cfg", type=Path, default=ROOT / "stage2/configs/demo_tiny.yaml", help="the recipe")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="changes of all variants")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="VARIANT", help=", ".join(names))
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each variant")
    parser.add_argument("--test-clips", type=int, default=12, help="clips that are tracked")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core")
    parser.add_argument("--output", type=Path, default=ROOT / "output/bench", help="folder of the table and the runs")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SEED"), help=argparse.SUPPRESS)
    return parser


def training_words(args: argparse.Namespace, variant: Variant, seed: int, output: Path) -> list[str]:
    """The command line of a run, for ``train_memory_stage2.py``."""
    opts = ["DATA.DATASET", "demo", "DATA.FEATURE_CACHE", str(_folder(args) / "features"), "VAL.ENABLE", "False"]
    opts += ["TRAIN.ACCUMULATION_STEPS", "2"]  # the steps of two processes, which the recipe is for
    opts += [*variant.opts, *args.opts]
    flags = {"--cfg": args.cfg, "--sam3-checkpoint": args.sam3_checkpoint, "--data-path": args.world}
    flags |= {"--output": output, "--seed": seed, "--device": "cpu"}
    return [*(str(word) for pair in flags.items() for word in pair), "--opts", *opts]


# --- one run ----------------------------------------------------------------------------------------------------------


def run_one(args: argparse.Namespace, variant: Variant, seed: int) -> dict[str, Any]:
    """Train, merge, track; what came out, also in the run's ``result.json``."""
    from stage2.train_memory_stage2 import main as train

    run, key = _folder(args) / f"{variant.name}_{seed}", run_key(args, variant, seed)
    begun = run / "begun.json"
    if begun.is_file() and begun.read_text() != key:
        shutil.rmtree(run)  # of other settings; it would be continued
    run.mkdir(parents=True, exist_ok=True)
    begun.write_text(key)
    start = time.monotonic()
    code = train(training_words(args, variant, seed, run))
    if code:
        raise UserError(f"{variant.name}, seed {seed}: the training ended with exit code {code}")
    seconds = time.monotonic() - start
    found = {**score(args, merged_model(args, run)), "variant": variant.name, "seed": seed, "training_s": seconds}
    found["key"] = key
    (run / "result.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def merged_model(args: argparse.Namespace, run: Path) -> Any:
    """The file as a user would have it, opened."""
    import sam3
    from stage2.merge import MergeRequest, merge_files

    merged = run / "merged.safetensors"
    merged.unlink(missing_ok=True)
    merge_files(MergeRequest(run / "model_final.pth", args.sam3_checkpoint, merged))
    return sam3.load_model(merged, "cpu")


def score(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """J&F of the held-out clips, and what is stored of a frame for an object."""
    from demo_memory import stored_memory
    from tracker_eval import score_objects, track_clip

    from sam3_train.video_metrics import mean_score

    clips, features = test_clips(args)
    scores = [
        each
        for clip, maps in zip(clips, features, strict=True)
        for each in score_objects(clip, *track_clip(model, clip, KIND, maps))
    ]
    stored = stored_memory(model, clips[0])
    return {"j_and_f": mean_score(scores).j_and_f, "tokens": stored.tokens, "bytes": stored.num_bytes}


def test_clips(args: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """The held-out clips and the features of their frames, which are computed once for all runs."""
    import hashlib

    import torch
    from tracker_eval import clip_features, generate_test_clips

    import sam3
    from sam3.checkpoint_io import sha256_file
    from sam3.model.tracker_memory import TrackerFeatures

    clips = generate_test_clips(args.test_clips)
    shown = hashlib.sha256(sha256_file(args.sam3_checkpoint).encode())
    for clip in clips:
        for frame in clip.frames:
            shown.update(frame.tobytes())
    path = _folder(args) / f"test_features_{shown.hexdigest()[:16]}.pt"
    if path.is_file():
        stored = torch.load(path, weights_only=True)
        return clips, [{t: TrackerFeatures(*maps) for t, maps in clip.items()} for clip in stored]
    model = sam3.load_model(args.sam3_checkpoint, "cpu", memory="full")
    features = [clip_features(model, clip) for clip in clips]
    torch.save([{t: tuple(maps) for t, maps in clip.items()} for clip in features], path)
    return clips, features


def run_key(args: argparse.Namespace, variant: Variant, seed: int) -> str:
    """Everything that decides a result, in words."""
    from sam3.checkpoint_io import sha256_file

    words = [word for word in training_words(args, variant, seed, Path()) if word != "."]
    recipe = [path.read_text() for path in sorted(args.cfg.parent.glob("*.yaml"))]
    return json.dumps([words, recipe, sha256_file(args.sam3_checkpoint), args.test_clips])


# --- all runs ---------------------------------------------------------------------------------------------------------


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Features of all training frames and test frames, and how the full memory does."""
    import sam3
    from sam3_train.distributed import training_run
    from stage2.run import prepare_run
    from stage2.starting_task import build_model
    from stage2.train_memory_stage2 import build_parser as training_parser
    from stage2.training_clips import fill_cache

    with training_run("cpu") as run:
        words = training_words(args, VARIANTS[0], 0, _folder(args) / "prepared")
        prepared = prepare_run(training_parser().parse_args(words), run)
        assert prepared.cache is not None
        fill_cache(prepared.cfg, prepared.clips, prepared.cache, build_model(prepared.cfg, prepared.base, run), run)
    return score(args, sam3.load_model(args.sam3_checkpoint, "cpu", memory="full"))


def finished(args: argparse.Namespace, variant: Variant, seed: int) -> dict[str, Any] | None:
    """The result of an earlier call with the same settings."""
    path = _folder(args) / f"{variant.name}_{seed}" / "result.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    return found if found.get("key") == run_key(args, variant, seed) else None


def start_apart(argv: Sequence[str], variant: Variant, seed: int) -> int:
    """A run in a process of its own, on one core; its exit code."""
    command = [sys.executable, str(Path(__file__).resolve()), *argv, "--one", variant.name, str(seed)]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode


def table(full: dict[str, Any], results: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Markdown: a row for the full memory and for each variant that has a result."""
    lines = ["# Ablation of the compressed memory", "", ", ".join(f"{k} {v}" for k, v in facts.items()), ""]
    lines += [
        "| Memory | J&F | lowest .. highest | Seeds | Share of the full one | Tokens of a frame | Bytes | Training |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
        f"| SAM 3's own | {100 * full['j_and_f']:.1f} |  |  | 100% | {full['tokens']} | {full['bytes']:,} |  |",
    ]
    for variant in VARIANTS:
        of_it = [result for result in results if result["variant"] == variant.name]
        if not of_it:
            continue
        scores = [result["j_and_f"] for result in of_it]
        lines.append(
            f"| {variant.title} | {100 * mean(scores):.1f} | {100 * min(scores):.1f} .. {100 * max(scores):.1f} | "
            f"{len(scores)} | {100 * mean(scores) / full['j_and_f']:.0f}% | {of_it[0]['tokens']} | "
            f"{of_it[0]['bytes']:,} | {mean(result['training_s'] for result in of_it):.0f} s |"
        )
    return "\n".join(lines) + "\n"


def _folder(args: argparse.Namespace) -> Path:
    return Path(args.output) / TABLE


def _write(args: argparse.Namespace, full: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    import torch

    facts = {**machine_facts(torch.device("cpu")), "test clips": args.test_clips, "runs at a time": args.jobs}
    record = {"facts": facts, "full": full, "runs": list(results)}
    (args.output / f"{TABLE}.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.output / f"{TABLE}.md").write_text(table(full, results, facts))


def _ablate(argv: list[str] | None) -> int:
    words = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(words)
    chosen = [variant for variant in VARIANTS if variant.name in args.only]
    if args.one:
        (variant,) = (variant for variant in VARIANTS if variant.name == args.one[0])
        run_one(args, variant, int(args.one[1]))
        return 0
    _folder(args).mkdir(parents=True, exist_ok=True)
    full = prepare(args)
    jobs = [(variant, seed) for seed in range(args.seeds) for variant in chosen]
    results = [found for job in jobs if (found := finished(args, *job)) is not None]
    left = [job for job in jobs if finished(args, *job) is None]
    _write(args, full, results)
    failed = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(start_apart, words, *job): job for job in left}
        for done in as_completed(running):
            result = finished(args, *running[done])
            failed += result is None
            results += [result] if result is not None else []
            _write(args, full, results)
    print((args.output / f"{TABLE}.md").read_text())
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_cli(_ablate, argv)


if __name__ == "__main__":
    sys.exit(main())
