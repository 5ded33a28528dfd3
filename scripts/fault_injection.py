"""Kill runs at random moments, resume them, and compare the result with that of a run that was left alone.

    python scripts/fault_injection.py export --kills 20      # store: the same bytes
    python scripts/fault_injection.py train --kills 20       # weights, average, optimizer: the same bits

Each run is a forked child that executes the stage's own command; it is killed with SIGKILL (kill -9), which no handler
sees. Prints a line per kill and a summary; exit code 1 if any result differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from sam3_train.errors import run_cli

ROOT = Path(__file__).resolve().parents[1]
POLL_S = 0.002
RECORD_KEEPERS = ("keys.txt", "values.bin", "quarantine.txt")  # the index holds the export's random id as well


def run_and_kill(
    main: Callable[[list[str]], int],
    argv: list[str],
    is_time: Callable[[], bool],
    signal_number: int = signal.SIGKILL,
    timeout_s: float = 300.0,
) -> int:
    """Run a command in a forked child and send it a signal when a condition holds.

    Args:
        main: The command's entry point.
        argv: Its arguments.
        is_time: Asked every 2 ms.
        signal_number: What is sent, once.
        timeout_s: A child that runs longer is killed and the run fails.

    Returns:
        The child's exit code, or the negative number of the signal that ended it.

    Raises:
        TimeoutError: If the child did not end in time.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            import torch

            torch.set_num_threads(1)
            code = main(argv)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    start, is_sent = time.monotonic(), False
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if not is_sent and is_time():
            os.kill(child, signal_number)
            is_sent = True
        if time.monotonic() - start > timeout_s:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError(f"the run did not end within {timeout_s:.0f} s")
        time.sleep(POLL_S)


def rank_bytes(directory: Path) -> dict[str, bytes]:
    """The rank files of a store whose bytes do not depend on when it was made."""
    return {
        path.name: path.read_bytes() for path in sorted(directory.glob("rank*")) if path.name.endswith(RECORD_KEEPERS)
    }


def kill_exports(num_kills: int, folder: Path, num_images: int, seed: int) -> bool:
    """Kill an export of the tiny preset ``num_kills`` times; begin a new store whenever one got finished.

    Returns:
        Whether every finished store has the bytes of the undisturbed one.
    """
    # Imported here, so that a child that is killed dies in its work and not in its imports.
    import stage1.export_run  # noqa: F401
    from stage1.save_embedding_stage1 import main as export

    def argv(name: str) -> list[str]:
        flags = ["--cfg", str(ROOT / "stage1/configs/teacher/demo_tiny.yaml"), "--device", "cpu"]
        flags += ["--data-path", str(folder / "data"), "--output", str(folder / name)]
        opts = ["MODEL.SAM3_CHECKPOINT", str(folder / "teacher.pt"), "DATA.NUM_WORKERS", "0", "DATA.BATCH_SIZE", "4"]
        return [*flags, "--opts", *opts]

    in_child(_make_export_inputs, folder, num_images, seed)
    if run_and_kill(export, argv("whole"), lambda: False):
        raise RuntimeError("the undisturbed export failed")
    whole = rank_bytes(folder / "whole/embeddings")
    num_bytes = len(whole["rank0-values.bin"])
    chance, killed, store, all_same, num_finished = random.Random(seed), 0, 0, True, 0
    while killed < num_kills or num_finished == 0:
        values = folder / f"killed{store}/embeddings/rank0-values.bin"
        is_time = random_moment(chance, values, num_bytes) if killed < num_kills else lambda: False
        outcome = run_and_kill(export, argv(f"killed{store}"), is_time)
        if outcome == -signal.SIGKILL:
            killed += 1
            print(f"kill {killed}: store {store} at {file_size(values):,} of {num_bytes:,} bytes", flush=True)
            if killed < num_kills:
                continue
            outcome = run_and_kill(export, argv(f"killed{store}"), lambda: False)
        if outcome:
            raise RuntimeError(f"the resumed export ended with exit code {outcome}")
        is_same = rank_bytes(values.parent) == whole
        all_same, num_finished, store = all_same and is_same, num_finished + 1, store + 1
        print(f"store {store - 1} finished: {'the same bytes' if is_same else 'OTHER BYTES'}", flush=True)
    print(
        f"{killed} kills over {num_finished} stores of {num_images} images: {'all' if all_same else 'NOT all'} the same"
    )
    return all_same


def random_moment(chance: random.Random, values: Path, num_bytes: int) -> Callable[[], bool]:
    """A moment within the first seconds, or one after a file has grown by up to a quarter of its final size."""
    if chance.random() < 0.2:
        moment = time.monotonic() + chance.uniform(0.0, 2.0)
        return lambda: time.monotonic() > moment
    target = file_size(values) + chance.uniform(0.0, 0.25 * num_bytes)
    delay_s = chance.uniform(0.0, 0.05)
    reached: list[float] = []

    def is_time() -> bool:
        if not reached and file_size(values) > target:
            reached.append(time.monotonic() + delay_s)
        return bool(reached) and time.monotonic() >= reached[0]

    return is_time


def file_size(path: Path) -> int:
    """Bytes of a file, 0 if it is not there."""
    return path.stat().st_size if path.exists() else 0


def kill_trainings(num_kills: int, folder: Path, num_images: int, seed: int) -> bool:
    """Kill a training run of the tiny preset ``num_kills`` times; begin a new run whenever one got finished.

    A checkpoint is written after every step, so that kills fall into the writing too.

    Returns:
        Whether every finished run has the weights, averages and optimizer state of the undisturbed one, bit for bit.
    """
    import stage1.run  # noqa: F401  torch and the rest are imported once, not in every child
    from stage1.train_stage1 import main as train

    in_child(_make_training_inputs, folder, num_images, seed)

    def argv(name: str) -> list[str]:
        return ["--cfg", str(folder / "train.yaml"), "--device", "cpu", "--output", str(folder / name)]

    if run_and_kill(train, argv("whole"), lambda: False):
        raise RuntimeError("the undisturbed training run failed")
    log = folder / "whole/log_rank0.txt"
    training_s = (folder / "whole/last.json").stat().st_mtime - log.with_name("config.json").stat().st_mtime
    whole = in_child(_training_digest, folder / "whole")
    chance, killed, run, all_same, num_finished = random.Random(seed), 0, 0, True, 0
    while killed < num_kills or num_finished == 0:
        name = f"killed{run}"
        # Counted from the first line of the log on, so that a kill meets training and not the import of torch.
        delay_s = chance.uniform(0.0, 0.9 * training_s) if killed < num_kills else 1e9
        outcome = run_and_kill(train, argv(name), grown_since(folder / name / "log_rank0.txt", delay_s))
        if outcome == -signal.SIGKILL:
            killed += 1
            print(f"kill {killed}: run {run}, newest checkpoint {newest_checkpoint(folder / name)}", flush=True)
            if killed < num_kills:
                continue
            outcome = run_and_kill(train, argv(name), lambda: False)
        if outcome:
            raise RuntimeError(f"the resumed training ended with exit code {outcome}")
        is_same = in_child(_training_digest, folder / name) == whole
        all_same, num_finished, run = all_same and is_same, num_finished + 1, run + 1
        print(f"run {run - 1} finished: {'the same bits' if is_same else 'OTHER BITS'}", flush=True)
    print(f"{killed} kills over {num_finished} runs: {'all' if all_same else 'NOT all'} the same; digest {whole[:16]}")
    return all_same


def grown_since(path: Path, delay_s: float) -> Callable[[], bool]:
    """A condition that holds ``delay_s`` seconds after a file has become longer than it is now."""
    size_before = path.stat().st_size if path.exists() else 0
    grown_at: list[float] = []

    def is_time() -> bool:
        if not grown_at and path.exists() and path.stat().st_size > size_before:
            grown_at.append(time.monotonic())
        return bool(grown_at) and time.monotonic() - grown_at[0] >= delay_s

    return is_time


def newest_checkpoint(run: Path) -> str:
    """Name of the file that a run would continue from."""
    pointer = run / "last.json"
    return json.loads(pointer.read_text())["checkpoints"][0]["file"] if pointer.exists() else "none yet"


def in_child(function: Callable[..., str | None], *arguments: object) -> str:
    """A function's text, computed in a forked child: torch and fork disagree once torch has started threads."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, (function(*arguments) or "").encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        text = stream.read().decode()
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"{function.__name__} failed")
    return text


def _training_digest(run: Path) -> str:
    """Hash of all tensors of a run's last checkpoint that training depends on."""
    from sam3_train.checkpoint import load_checkpoint, state_dict_sha256

    state = load_checkpoint(run / newest_checkpoint(run))
    moments = {
        f"optimizer.{index}.{name}": value
        for index, values in state["optimizer"]["state"].items()
        for name, value in values.items()
    }
    weights = {f"{kind}.{name}": value for kind in ("model", "ema") for name, value in state[kind].items()}
    return state_dict_sha256({**weights, **moments})


def _make_training_inputs(folder: Path, num_images: int, seed: int) -> None:
    """The export's inputs, their embeddings, and a config that writes a checkpoint after each step."""
    import yaml

    from stage1.save_embedding_stage1 import main as export

    _make_export_inputs(folder, num_images, seed)
    data, embeddings = folder / "data", folder / "teacher/embeddings"
    flags = ["--cfg", str(ROOT / "stage1/configs/teacher/demo_tiny.yaml"), "--device", "cpu", "--data-path", str(data)]
    opts = ["MODEL.SAM3_CHECKPOINT", str(folder / "teacher.pt"), "DATA.NUM_WORKERS", "0"]
    if export([*flags, "--output", str(folder / "teacher"), "--opts", *opts]):
        raise RuntimeError("the export failed")
    settings = {
        "BASE": [str(ROOT / "stage1/configs/demo_cnn.yaml")],
        "DATA": {"DATA_PATH": str(data), "BATCH_SIZE": 4, "NUM_WORKERS": 1},
        "DISTILL": {"TEACHER_EMBED_PATH": str(embeddings), "STATISTICS_IMAGES": 8},
        "TRAIN": {"EPOCHS": 3, "ACCUMULATION_STEPS": 2, "EMA_DECAY": 0.9, "SAVE_EVERY_STEPS": 1},
        "VAL": {"ENABLE": False},
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(settings))


def _make_export_inputs(folder: Path, num_images: int, seed: int) -> None:
    """Photos of smooth noise, and a tiny teacher with random weights."""
    import numpy as np
    import torch
    from PIL import Image

    from sam3.checkpoint_keys import TRUNK_PREFIX
    from sam3.model_builder import build_sam3_trunk

    rng = np.random.default_rng(seed)
    images = folder / "data/images/train"
    images.mkdir(parents=True)
    for number in range(num_images):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((160, 120), Image.Resampling.BICUBIC).save(images / f"sa_{number}.jpg")
    torch.manual_seed(seed)
    trunk = build_sam3_trunk(config="tiny", load_from_HF=False, device="cpu")
    state = {TRUNK_PREFIX + name: value for name, value in trunk.state_dict().items()}
    torch.save({"model": state}, folder / "teacher.pt")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["export", "train"], help="the run to disturb")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="how often; default 20")
    parser.add_argument("--images", type=int, default=60, metavar="N", help="size of the data set; default 60")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments and the inputs")
    return parser


def _main(argv: list[str] | None) -> int:
    args = build_parser().parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported: a forked child does not inherit its threads
    with tempfile.TemporaryDirectory(prefix="fault-injection-") as folder:
        kill_runs = {"export": kill_exports, "train": kill_trainings}[args.what]
        return 0 if kill_runs(args.kills, Path(folder), args.images, args.seed) else 1


def main(argv: list[str] | None = None) -> int:
    """Entry point; see the module's text."""
    return run_cli(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
