"""A step of the geometry fine-tune and its parts; a part of ``bench.py``.

    python scripts/bench.py geometry                     # about five minutes on two cores
    python scripts/bench.py geometry --only step         # without the released size

The parts are timed inside the task's own forward, by a stopwatch around its methods, so what is measured is what runs:

- data: photos, annotations and prompts through the loader, in this process;
- student: the trunk's forward;
- teacher forward: neck and heads on the teacher's features, without gradients, and what is kept of the answers;
- frozen forward: neck and heads on the student's features, matching and losses;
- backward: with the frozen parts computed again (``MODEL.CHECKPOINT_FROZEN``);
- the rest: optimizer, clipping and bookkeeping.

Weights are random: they cost what trained ones cost. Teacher features are random too; reading stored ones is measured
by ``bench.py stage1 --only store``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_prompts import make_annotated_photos

from sam3.config import Sam3Config, StudentConfig
from sam3.model.student_encoder import build_student
from sam3.model_builder import assemble_image_model
from sam3.preprocess import Preprocess
from sam3_train.data.distillation_dataset import DistillationDataset
from sam3_train.data.distillation_loader import build_loader
from sam3_train.data.image_index import ImageIndex
from sam3_train.data.samplers import ResumableDistributedSampler
from sam3_train.optim import build_optimizer, parameter_groups
from sam3_train.precision import autocast, pick_dtype
from sam3_train.task import to_device
from stage1_geometry_finetune.config import get_defaults
from stage1_geometry_finetune.data import PromptExtras, PromptSpec
from stage1_geometry_finetune.frozen_heads import FrozenHeads
from stage1_geometry_finetune.losses import GeometryLossWeights
from stage1_geometry_finetune.task import GeometryOptions, GeometryTask

Row = dict[str, Any]
PARTS = ("data", "student", "teacher forward", "frozen forward", "backward")
GIB = 2**30


def bench(quick: bool, device: torch.device) -> list[Row]:
    """All rows of this part."""
    config, steps = Sam3Config.preset("tiny"), 1 if quick else 7
    with tempfile.TemporaryDirectory(prefix="bench-geometry-") as name:
        index = make_annotated_photos(Path(name), (240, 336), num_images=4, num_objects=20)
        rows = []
        for route in ("detector", "SAM heads"):
            rows += bench_parts(config, "demo_cnn", index, route, device, steps)
        rows += bench_prompt_batch(config, index, device, steps, counts=(1, 4) if quick else (1, 4, 16))
        rows += bench_cache(config, index, device, steps)
    return rows


class Bench:
    """A task, its loader and its optimizer, ready to step.

    Args:
        config: The teacher's description.
        backbone: The student's.
        index: Annotated photos.
        route: "detector" or "SAM heads".
        device: Where it runs.
        num_images: Per step.
        spec: Prompts to draw.
        options: Of the task.
    """

    def __init__(
        self,
        config: Sam3Config,
        backbone: str,
        index: ImageIndex,
        route: str,
        device: torch.device,
        num_images: int,
        spec: PromptSpec,
        options: GeometryOptions | None = None,
    ) -> None:
        self.device = device
        preprocess = Preprocess(config.image_size_px)
        extras = PromptExtras(spec, preprocess, 4 * config.grid_size)
        dataset = DistillationDataset(index, preprocess, "online", config.grid_size, extras=extras)
        self.sampler = ResumableDistributedSampler(len(dataset), shuffle=False)
        self.loader = build_loader(dataset, self.sampler, num_images, num_workers=0, drop_last=True)
        self.features = torch.randn(num_images, *config.embedding_shape, device=device)
        torch.manual_seed(0)
        student = build_student(config.replace(student=StudentConfig(backbone)))
        heads = random_heads(config, route, device)
        weights = GeometryLossWeights(detector=float(route == "detector"), sam=float(route != "detector"))
        variance_c = torch.ones(config.trunk.embed_dim)
        self.task = GeometryTask(student, heads, variance_c, weights, options).to(device)
        self.task.train()
        self.train = get_defaults().TRAIN
        self.optimizer = build_optimizer(parameter_groups(self.task, self.train.WEIGHT_DECAY), self.train, device)
        self.dtype = pick_dtype(get_defaults(), device)
        self.clock = Stopwatch(device)
        self.num_objects = 0
        way = self.task.routes[0][1]
        self.clock.around(self.task, "student_features", "student")
        self.clock.around(self.task, "teacher_targets", "teacher forward")
        self.clock.around(way, "judge", "frozen forward")
        self.clock.around(
            way, "maps", lambda features, of_teacher: "teacher forward" if of_teacher else "frozen forward"
        )
        self._batches = self._endless()

    def _endless(self) -> Iterator[dict[str, Any]]:
        for epoch in itertools.count():
            self.sampler.set_epoch(epoch)
            yield from self.loader

    def step(self) -> None:
        """Load, forward, backward, update."""
        with self.clock.part("data"):
            batch = to_device(next(self._batches), self.device)
        batch["teacher"] = self.features
        self.num_objects = batch["prompts"].num_objects
        with autocast(self.device, self.dtype):
            loss = self.task(batch)["loss"]
        with self.clock.part("backward"):
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.task.parameters(), self.train.CLIP_GRAD)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def timed_step(self) -> dict[str, float]:
        """Seconds of a step (``step``) and of its parts, and its objects (``objects``)."""
        self.clock.seconds.clear()
        with self.clock.part("step"):
            self.step()
        return {**{name: self.clock.seconds[name] for name in ("step", *PARTS)}, "objects": float(self.num_objects)}

    def timed(self, num_steps: int) -> dict[str, float]:
        """Medians over some steps after a first one, which allocates."""
        self.step()
        return medians([self.timed_step() for _ in range(num_steps)])


def medians(steps: list[dict[str, float]]) -> dict[str, float]:
    """Name by name; a busy machine disturbs a median least."""
    return {name: statistics.median(step[name] for step in steps) for name in steps[0]}


class Stopwatch:
    """Seconds by part. A part inside another one of the same name is not counted twice."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: set[str] = set()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside."""
        if name in self._running:
            yield
            return
        self._running.add(name)
        start = self._now()
        try:
            yield
        finally:
            self.seconds[name] += self._now() - start
            self._running.remove(name)

    def around(self, owner: Any, method: str, name: str | Callable[..., str]) -> None:
        """Count an object's method under a name, or under what a function of its arguments says."""
        original = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name if isinstance(name, str) else name(*args, **kwargs)):
                return original(*args, **kwargs)

        setattr(owner, method, timed)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def random_heads(config: Sam3Config, route: str, device: torch.device) -> FrozenHeads:
    """Neck and heads of one route with random weights; neither trunk nor text encoder is ever made at its size."""
    is_detector = route == "detector"
    trunk = dataclasses.replace(config.trunk, depth=1, global_blocks=(0,))
    torch.manual_seed(0)
    model = assemble_image_model(
        config.replace(trunk=trunk),
        None,
        not is_detector,
        device,
        enable_detector=is_detector,
        enable_text_encoder=False,
    )
    if not is_detector:
        return FrozenHeads(model, None, None)
    length = config.text.context_length
    text = torch.randn(length, 1, config.hidden_dim, device=device)
    padding = torch.arange(length, device=device)[None] >= 3  # "visual" is one word between start and end
    return FrozenHeads(model, text, padding)


def bench_parts(
    config: Sam3Config, backbone: str, index: ImageIndex, route: str, device: torch.device, num_steps: int
) -> list[Row]:
    """A step by its parts."""
    bench = Bench(config, backbone, index, route, device, 2, PromptSpec(4, min_area=0))
    return part_rows(
        f"{route}, ", bench.timed(num_steps), f"{backbone}, 2 images of {config.image_size_px} px, 4 objects each"
    )


def part_rows(label: str, seconds: dict[str, float], note: str) -> list[Row]:
    """Rows of one `Bench.timed`."""
    total = seconds["step"]
    rest = total - sum(seconds[name] for name in PARTS)
    rows: list[Row] = [{"name": f"{label}step", "value": 1e3 * total, "unit": "ms", "note": note}]
    for name, value in (*((name, seconds[name]) for name in PARTS), ("rest", rest)):
        share = f"{100 * value / total:.0f} % of the step"
        rows.append({"name": f"{label}{name}", "value": 1e3 * value, "unit": "ms", "note": share})
    objects = {"name": f"{label}objects", "value": seconds["objects"] / total, "unit": "objects/s", "note": note}
    return [*rows, objects]


def bench_prompt_batch(
    config: Sam3Config, index: ImageIndex, device: torch.device, num_steps: int, counts: tuple[int, ...]
) -> list[Row]:
    """Objects per second by how many an image is asked for, and by how many run at a time."""
    most, rows = max(counts), []
    cases = [(count, count) for count in counts] + [(most, size) for size in counts if size != most]
    for count, size in cases:
        spec = PromptSpec(count, min_area=0)
        bench = Bench(config, "demo_cnn", index, "detector", device, 1, spec, GeometryOptions(objects_per_pass=size))
        seconds = bench.timed(num_steps)
        rows.append(
            {
                "name": f"prompt batch: {count} objects per image, {size} at a time",
                "value": seconds["objects"] / seconds["step"],
                "unit": "objects/s",
                "note": f"detector, 1 image; a step takes {1e3 * seconds['step']:.0f} ms",
            }
        )
    return rows


def bench_cache(
    config: Sam3Config,
    index: ImageIndex,
    device: torch.device,
    num_steps: int,
    routes: tuple[str, ...] = ("detector", "SAM heads"),
) -> list[Row]:
    """Steps whose teacher answers are computed and steps that find them, by turns."""
    rows: list[Row] = []
    for route in routes:
        spec, options = PromptSpec(4, min_area=0, is_fixed=True), GeometryOptions(cache_bytes=GIB)
        unknown = Bench(config, "demo_cnn", index, route, device, 2, spec)
        known = Bench(config, "demo_cnn", index, route, device, 2, spec, options)
        cache = known.task.cache
        assert cache is not None
        unknown.step()
        for _ in range(len(index) // 2):  # the first epoch fills the cache
            known.step()
        turns = [(unknown.timed_step(), known.timed_step()) for _ in range(num_steps)]
        computed, found = (medians(list(steps)) for steps in zip(*turns, strict=True))
        for name, seconds in (("teacher computed", computed), ("teacher cached", found)):
            note = f"of it {1e3 * seconds['teacher forward']:.1f} ms for the teacher's answers"
            rows.append({"name": f"{route}, step, {name}", "value": 1e3 * seconds["step"], "unit": "ms", "note": note})
        saved = 100 * (1 - statistics.median(after["step"] / before["step"] for before, after in turns))
        note = f"{cache.num_bytes / 1024 / (4 * len(index)):.0f} KiB per object, median of {num_steps} turns"
        rows.append({"name": f"{route}, saved by the cache", "value": saved, "unit": "% of the step", "note": note})
    return rows
