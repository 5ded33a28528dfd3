"""One export from its settings to a finished store: preflight, plan, loop, summary."""

from __future__ import annotations

import argparse
import os
import socket
import time
from dataclasses import replace
from pathlib import Path

from yacs.config import CfgNode

from sam3_train.config import write_run_record
from sam3_train.distributed import RunContext, all_gather_object, barrier, patient_barrier
from sam3_train.embeddings import EmbeddingStore, EmbeddingWriter, StoreError, StoreSpec, begin_export, plan_rank
from sam3_train.embeddings.spec import STORE_FILE
from sam3_train.errors import Interrupted
from sam3_train.log import RunLog
from sam3_train.stop_signal import StopSignal
from sam3_train.teacher import Teacher
from stage1.export import ExportCounts, export_batches
from stage1.export_data import ExportData, build_export_loader
from stage1.export_preflight import embeddings_folder, open_bad_log, prepare_export
from stage1.export_report import (
    ExportProgress,
    format_seconds,
    measure_seconds_per_image,
    rank_result,
    summary_lines,
)

KEEP_ALL_NUMBERS = 2**62


def run_export(args: argparse.Namespace, run: RunContext) -> None:
    """Export, on every rank.

    Raises:
        UserError: For anything the user can repair.
        Interrupted: After SIGTERM or SIGINT, when all that was computed is stored.
    """
    prepared = prepare_export(args, run)
    cfg, data, estimate, directory = prepared.cfg, prepared.data, prepared.estimate, prepared.directory
    outlook = [
        f"{data.describe()} in {cfg.DATA.DATA_PATH} -> {directory}",
        *data.notes,
        *estimate.lines(prepared.spec),
    ]
    if args.dry_run:
        if run.is_main:
            print("\n".join(outlook), flush=True)
        return
    with StopSignal(run.watch) as stop, open_log(cfg, run) as log:
        for line in outlook:
            log.info(line)
        teacher = Teacher.from_config(cfg, run.device)
        log.info(f"teacher {teacher.config.name} ({teacher.sha256[:12]}) on {run.device} in {teacher.dtype}")
        prepare_store(cfg, data, replace(prepared.spec, teacher=teacher.description), run, log)
        if estimate.num_missing:
            seconds = measure_seconds_per_image(teacher, cfg.DATA.BATCH_SIZE)
            total = format_seconds(seconds * estimate.num_missing / run.world_size)
            log.info(f"estimate: {1 / seconds:.2f} images/s per process, {total} in all")
        start = time.monotonic()
        mine = export_rank(cfg, data, teacher, run, log, stop)
        patient_barrier()  # a rank that is asked to stop tells the others, here too: they come after their batch
        parts = all_gather_object((mine, stop.requested))
        for line in summary_lines([result for result, _ in parts], time.monotonic() - start):
            log.info(line)
        stopped_by = next((name for _, name in parts if name), None)
        if stopped_by:
            raise Interrupted(f"stopped by {stopped_by}; what was exported is stored: the same command continues")
        finish(data, directory, run, log)


def open_log(cfg: CfgNode, run: RunContext) -> RunLog:
    """The run's log; no numbers of earlier parts of the export are dropped."""
    return RunLog(cfg.OUTPUT, run.is_main, tensorboard=False, resume_step=KEEP_ALL_NUMBERS)


def prepare_store(cfg: CfgNode, data: ExportData, spec: StoreSpec, run: RunContext, log: RunLog) -> None:
    """Create or repair the store on the main rank, then check that every rank sees it.

    Raises:
        StoreError: If the store is of other settings, or a node does not share the folder.
    """
    directory = embeddings_folder(cfg)
    if run.is_main:
        state = begin_export(directory, spec, data.keys, run.world_size, cfg.DATA.BATCH_SIZE)
        if state.num_records:
            log.info(f"continuing: {state.num_records:,} embeddings are there")
        if state.num_cut:
            log.warn(f"{state.num_cut} records at the end were incomplete and are made again")
        extra = {
            "world_size": run.world_size,
            "num_images": {index.split: len(index) for index in data.indices},
            "key_order_sha256": data.keys.sha256,
            "store": spec.to_dict(),
        }
        write_run_record(cfg.OUTPUT, cfg, extra)
    barrier()
    require_shared_folder(directory, run)


def require_shared_folder(directory: Path, run: RunContext, patience_s: float = 10.0) -> None:
    """Check that every rank sees the store that the main rank has made; network file systems get some seconds.

    Raises:
        StoreError: On all ranks, naming the hosts that do not.
    """
    deadline = time.monotonic() + patience_s
    mine = b""
    seen: list[tuple[int, str, bytes]] = []
    while True:
        path = directory / STORE_FILE
        mine = path.read_bytes() if path.exists() else b""
        seen = all_gather_object((run.rank, socket.gethostname(), mine))
        if all(content == seen[0][2] for _, _, content in seen):
            return
        late = all_gather_object(time.monotonic() > deadline)
        if any(late):
            break
        time.sleep(0.5)
    rank, host, _ = next(entry for entry in seen if entry[2] != seen[0][2])
    raise StoreError(
        f"{directory}: rank {rank} on {host} does not see the store of rank 0 on {seen[0][1]}: OUTPUT must be a folder "
        "that all nodes share"
    )


def export_rank(
    cfg: CfgNode, data: ExportData, teacher: Teacher, run: RunContext, log: RunLog, stop: StopSignal
) -> dict[str, float]:
    """This rank's share of the export; what it did."""
    directory = embeddings_folder(cfg)
    plan = plan_rank(directory, data.keys, run.rank, run.world_size)
    bad_log = open_bad_log(cfg, data)
    loader = build_export_loader(cfg, data, plan.batches)
    counts = ExportCounts()
    with (
        EmbeddingWriter(directory, run.rank, in_background=teacher.device.type != "cpu") as writer,
        ExportProgress(log, plan.num_missing, writer, run.world_size) as progress,
    ):
        args = (writer, plan.done_keys, bad_log, stop, cfg.DATA.BATCH_SIZE)
        for counts in export_batches(teacher, loader, *args):
            progress.update(counts)
    return rank_result(counts, writer)


def finish(data: ExportData, directory: Path, run: RunContext, log: RunLog) -> None:
    """Check the coverage of the finished store and say what comes next.

    Raises:
        StoreError: If a key is missing after all.
    """
    if run.is_main:
        with EmbeddingStore(directory) as store:
            coverage = store.require_coverage(data.keys)
        log.info(f"complete: {coverage.num_present:,} of {coverage.num_wanted:,} images have an embedding")
        log.info(f"check the files with: python -m sam3_train.embeddings.verify {os.path.relpath(directory)}")
    barrier()
