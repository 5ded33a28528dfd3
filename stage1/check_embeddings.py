"""``--check-saved-embed``: run the teacher again over some images and compare with what is stored."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import numpy as np
from yacs.config import CfgNode

from sam3_train.distributed import RunContext, all_gather_object
from sam3_train.embeddings import EmbeddingStore, StoreError, StoreSpec, compare_embeddings
from sam3_train.embeddings.codecs import Distortion
from sam3_train.errors import UserError
from sam3_train.teacher import Teacher
from stage1.export_data import ExportData, build_export_loader
from stage1.export_preflight import prepare_export, require_same_export

CODEC_TOLERANCE = {"fp16": 2e-3, "int8": 3e-2}
"""Largest relative RMS error between a stored and a recomputed embedding in float32."""
LOW_PRECISION_TOLERANCE = 5e-2
"""The same where one of the two was computed in 16 bit: batch size and device change the rounding."""


@dataclass(frozen=True)
class CheckedKey:
    """The comparison of one image."""

    key: str
    distortion: Distortion | None
    problem: str
    """Empty if the stored embedding is fine."""

    def line(self) -> str:
        """One line of the report."""
        verdict = f"FAIL: {self.problem}" if self.problem else "ok"
        if self.distortion is None:
            return f"{self.key:<24} {verdict}"
        d = self.distortion
        return (
            f"{self.key:<24} relative error {d.relative_rms:.2e}  largest {d.max_abs:.2e}  "
            f"lowest cosine {d.min_cosine:.6f}  {verdict}"
        )


def check_saved_embeddings(args: argparse.Namespace, run: RunContext) -> None:
    """Compare ``args.check_saved_embed`` stored embeddings with the teacher; prints a line per image.

    Raises:
        UserError: If any of them differs by more than the tolerance, or the store is of another teacher.
    """
    prepared = prepare_export(args, run)
    cfg, data = prepared.cfg, prepared.data
    store = EmbeddingStore(prepared.directory)
    teacher = Teacher.from_config(cfg, run.device)
    require_same_export(prepared.directory, replace(prepared.spec, teacher=teacher.description))
    tolerance = args.check_tolerance
    if tolerance is None:
        tolerance = pick_tolerance(store.spec, teacher)
    chosen = sample_positions(data, store, args.check_saved_embed)
    mine = chosen[run.rank :: run.world_size]
    checked = [
        result for part in all_gather_object(compare(cfg, data, store, teacher, mine, tolerance)) for result in part
    ]
    failed = [result for result in checked if result.problem]
    if run.is_main:
        for result in sorted(checked, key=lambda result: result.key):
            print(result.line())
        print(f"{len(checked) - len(failed)} of {len(checked)} embeddings agree (tolerance {tolerance:g})", flush=True)
    if failed:
        names = ", ".join(result.key for result in failed[:5])
        raise UserError(
            f"{store.directory}: {len(failed)} of {len(checked)} stored embeddings are not what the teacher computes "
            f"({names}); check the files with python -m sam3_train.embeddings.verify, and the teacher's settings"
        )


def pick_tolerance(spec: StoreSpec, teacher: Teacher) -> float:
    """Largest relative RMS error that rounding explains."""
    dtypes = {spec.teacher.get("dtype"), teacher.description["dtype"]}
    base = CODEC_TOLERANCE[spec.codec]
    return base if dtypes == {"float32"} else max(base, LOW_PRECISION_TOLERANCE)


def sample_positions(data: ExportData, store: EmbeddingStore, count: int) -> list[int]:
    """Positions of images that have a record, evenly spread.

    Raises:
        UserError: If there is none.
    """
    present = [position for position, key in enumerate(data.keys) if key in store]
    if not present:
        raise UserError(f"{store.directory}: holds none of the {len(data.keys)} images of this data set")
    picked = np.linspace(0, len(present) - 1, min(count, len(present))).astype(int)
    return [present[int(i)] for i in picked]


def compare(
    cfg: CfgNode, data: ExportData, store: EmbeddingStore, teacher: Teacher, positions: list[int], tolerance: float
) -> list[CheckedKey]:
    """Compare the images at some positions, batch by batch."""
    size = cfg.DATA.BATCH_SIZE
    batches = [positions[start : start + size] for start in range(0, len(positions), size)]
    checked = []
    for batch in build_export_loader(cfg, data, batches):
        checked += [CheckedKey(key, None, f"the image is unreadable now: {reason}") for key, reason in batch["bad"]]
        if not batch["key"]:
            continue
        features = teacher(batch["image"]).cpu()
        for position, key in enumerate(batch["key"]):
            checked.append(_compare_one(store, key, int(batch["seed"][position]), features[position], tolerance))
    return checked


def _compare_one(store: EmbeddingStore, key: str, seed: int, features: object, tolerance: float) -> CheckedKey:
    try:
        stored_seed, embedding = store.read(key)
    except StoreError as error:
        return CheckedKey(key, None, str(error))
    distortion = compare_embeddings(features, embedding)
    problem = ""
    if stored_seed != seed:
        problem = f"stored seed {stored_seed}, expected {seed} (another SEED?)"
    elif not distortion.relative_rms <= tolerance:
        problem = f"relative error {distortion.relative_rms:.3g} is above {tolerance:g}"
    return CheckedKey(key, distortion, problem)
