"""Benchmark of stage-1 training: the loop around a step, and a real run on a GPU; a part of ``bench.py``.

    python scripts/bench.py stage1 --only train

Overhead is measured in turns of bare loop and `sam3_train.loop.fit` over the same loader, task and batches, so that the
machine's mood hits both; the figure is the median of the turns' ratios. On a GPU a real run (photos decoded by workers,
stored embeddings of the released size) adds images/s, the share of time spent waiting for data, and MFU.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from sam3.config import Sam3Config, StudentConfig
from sam3.model.student_encoder import build_student
from sam3.preprocess import Preprocess
from sam3_train.data.distillation_dataset import DistillationDataset
from sam3_train.data.distillation_loader import build_loader, image_index_from_config
from sam3_train.data.samplers import ResumableDistributedSampler
from sam3_train.distributed import RunContext
from sam3_train.embeddings import EmbeddingStore, EmbeddingWriter, StoreSpec, begin_export
from sam3_train.log import read_metrics
from sam3_train.loop import fit
from sam3_train.optim import build_optimizer, parameter_groups
from sam3_train.precision import autocast, pick_dtype
from sam3_train.task import to_device
from sam3_train.teacher import stored_features
from stage1.config import get_defaults
from stage1.model import Stage1Task

Row = dict[str, Any]
TINY, SAM3 = Sam3Config.preset("tiny"), Sam3Config.preset("sam3")
PEAK_BF16_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "A10": 125}
"""Dense bf16 peaks that the makers state, by a part of the device's name."""


def bench(quick: bool, device: torch.device) -> list[Row]:
    """All rows of this part."""
    rows = bench_loop(device, num_steps=2 if quick else 20, turns=1 if quick else 5)
    if device.type == "cuda":
        rows += bench_real_run(device, num_images=32 if quick else 256, num_steps=4 if quick else 60)
    return rows


class RandomBatches(Dataset[dict[str, Tensor]]):
    """Images and teacher features made once: the loader then costs the same few microseconds for both loops."""

    def __init__(self, config: Sam3Config, num_images: int) -> None:
        generator = torch.Generator().manual_seed(0)
        size = config.image_size_px
        self.num_images = num_images
        self.image = torch.randn(3, size, size, generator=generator)
        self.teacher = torch.randn(config.embedding_shape, generator=generator)
        self.valid = torch.ones(1, config.grid_size, config.grid_size)

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.image, "teacher": self.teacher, "valid": self.valid}


def make_task(config: Sam3Config, backbone: str, device: torch.device) -> Stage1Task:
    """A student with random weights and its loss."""
    torch.manual_seed(0)
    student = build_student(config.replace(student=StudentConfig(backbone)))
    return Stage1Task(student, torch.ones(config.trunk.embed_dim)).to(device)


def settings(epochs: int = 1) -> Any:
    """Stage 1's defaults, without checkpoints inside the epoch."""
    cfg = get_defaults()
    cfg.TRAIN.EPOCHS, cfg.TRAIN.WARMUP_EPOCHS, cfg.TRAIN.SAVE_EVERY_MINUTES = epochs, 0.0, 0.0
    return cfg


def bench_loop(device: torch.device, num_steps: int, turns: int) -> list[Row]:
    """Seconds per step of the loop over those of bare forward, backward, clip and update."""
    micro_batch = 8
    dataset = RandomBatches(TINY, micro_batch * num_steps)
    sampler = ResumableDistributedSampler(len(dataset))
    loader = DataLoader(dataset, micro_batch, sampler=sampler, drop_last=True)
    bare_s, loop_s = [], []
    for turn in range(turns + 1):
        bare, looped = time_bare(loader, device), time_fit(loader, device)
        if turn or turns == 0:  # the first turn warms up
            bare_s.append(bare)
            loop_s.append(looped)
    overhead = statistics.median(b / a for a, b in zip(bare_s, loop_s, strict=True)) - 1.0
    note = f"demo_cnn, {micro_batch} images of {TINY.image_size_px} px, median of {turns} turns of {num_steps} steps"
    return [
        {"name": "step, bare", "value": 1e3 * statistics.median(bare_s), "unit": "ms", "note": note},
        {"name": "step, in the loop", "value": 1e3 * statistics.median(loop_s), "unit": "ms", "note": note},
        {
            "name": "loop over bare forward + backward + step",
            "value": 100.0 * overhead,
            "unit": "%",
            "target": "<= 5",
            "met": overhead <= 0.05,
            "note": note,
        },
    ]


def time_bare(loader: DataLoader[Any], device: torch.device) -> float:
    """Seconds per step of the shortest correct training loop."""
    task, cfg = make_task(TINY, "demo_cnn", device), settings()
    optimizer = build_optimizer(parameter_groups(task, cfg.TRAIN.WEIGHT_DECAY), cfg.TRAIN, device)
    dtype = pick_dtype(cfg, device)
    task.train()
    clock = StepClock(device)
    for batch in loader:
        batch = clock(to_device(batch, device))
        with autocast(device, dtype):
            loss = task(batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), cfg.TRAIN.CLIP_GRAD)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return clock.seconds_per_step()


def time_fit(loader: DataLoader[Any], device: torch.device) -> float:
    """Seconds per step of `sam3_train.loop.fit`, its logging included, start and final checkpoint left out."""
    task, clock = make_task(TINY, "demo_cnn", device), StepClock(device)
    with tempfile.TemporaryDirectory(prefix="bench-train-") as output, contextlib.redirect_stdout(io.StringIO()):
        fit(task, loader, None, settings(), RunContext(device), output, prepare_batch=clock)
    return clock.seconds_per_step()


class StepClock:
    """Notes when each batch arrives; steps are the times between them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, batch: Any) -> Any:
        synchronize(self.device)
        self.times.append(time.perf_counter())
        return batch

    def seconds_per_step(self) -> float:
        """Median over the steps but the first, which allocates; a busy machine disturbs a median least."""
        steps = [after - before for before, after in itertools.pairwise(self.times)]
        return statistics.median(steps[1:] or steps)


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bench_real_run(device: torch.device, num_images: int, num_steps: int) -> list[Row]:
    """es_ev_s on JPEG photos of SA-1B's size and stored embeddings of the released size, decoded by workers."""
    with tempfile.TemporaryDirectory(prefix="bench-train-") as name:
        folder = Path(name)
        cfg = settings(epochs=1 + num_steps * 16 // num_images)
        cfg.DATA.DATA_PATH, cfg.DATA.BATCH_SIZE, cfg.TRAIN.MAX_STEPS = str(folder / "data"), 16, num_steps
        store = make_real_inputs(folder, num_images)
        index = image_index_from_config(cfg.DATA, "train")
        dataset = DistillationDataset(index, Preprocess(), "train", SAM3.grid_size, store=store)
        loader = build_loader(dataset, ResumableDistributedSampler(len(index)), 16, drop_last=True)
        task = make_task(SAM3, "efficientvit_b0", device)
        flops = step_flops(task, next(prepared_batches(loader, store, device)))
        with contextlib.redirect_stdout(io.StringIO()):
            fit(task, loader, None, cfg, RunContext(device), folder / "run", prepare_batch=stored_features(store.codec))
        windows = read_metrics(folder / "run", "train")[1:]
        images_per_s = statistics.median(window["images_per_s"] for window in windows)
        wait = statistics.median(window["data_wait_share"] for window in windows)
    note = "es_ev_s, 16 images per step, photos of 1500 x 2250 px and fp16 embeddings from disk"
    rows: list[Row] = [
        {"name": "training, whole pipeline", "value": images_per_s, "unit": "images/s", "note": note},
        {"name": "waiting for data", "value": 100.0 * wait, "unit": "% of the time", "note": note},
    ]
    gpu = torch.cuda.get_device_name(device)
    peak = next((tflops for part, tflops in PEAK_BF16_TFLOPS.items() if part in gpu), None)
    if peak is not None:
        mfu = images_per_s * flops / 16 / (peak * 1e12)
        rows.append({"name": "MFU", "value": 100.0 * mfu, "unit": "%", "note": f"of {peak} TFLOP/s ({gpu})"})
    return rows


def prepared_batches(loader: Any, store: EmbeddingStore, device: torch.device) -> Iterator[dict[str, Any]]:
    """Batches as the task sees them."""
    prepare = stored_features(store.codec)
    for batch in loader:
        yield prepare(to_device(batch, device))


def step_flops(task: Stage1Task, batch: dict[str, Any]) -> int:
    """Floating-point operations of forward and backward on one batch, counted by torch."""
    with FlopCounterMode(display=False) as counter:
        task(batch)["loss"].backward()
    task.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def make_real_inputs(folder: Path, num_images: int) -> EmbeddingStore:
    """Smooth photos with some noise (about 1 MB each), and random embeddings."""
    rng = np.random.default_rng(0)
    images = folder / "data/images/train"
    images.mkdir(parents=True)
    coarse = Image.fromarray(rng.integers(0, 256, (30, 45, 3), dtype=np.uint8)).resize((2250, 1500))
    pixels = np.asarray(coarse, np.int16) + rng.integers(-20, 21, (1500, 2250, 3))
    photo = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    keys = [f"sa_{number}" for number in range(num_images)]
    embedding = rng.standard_normal(SAM3.embedding_shape, dtype=np.float32).astype(np.float16)
    begin_export(folder / "store", StoreSpec(SAM3.embedding_shape, preprocess=Preprocess().to_dict()), keys)
    with EmbeddingWriter(folder / "store") as writer:
        for key in keys:
            photo.save(images / f"{key}.jpg", quality=90)
            writer.put(key, 0, embedding)
    return EmbeddingStore(folder / "store")
