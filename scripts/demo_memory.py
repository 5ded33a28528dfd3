"""The compressed memory on the demo's page: one file's two memories on the same clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from demo_page_video import MemoryComparison, MemoryScore, StoredMemory
from demo_tracking import compare_tracking
from svg_chart import Series, line_chart
from tracker_eval import EvalClip, read_clips

import sam3
from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
from sam3_train.errors import UserError
from sam3_train.log import read_metrics

CHART_TERMS = {
    "teacher_features": "features, of the full memory",
    "teacher_mask": "masks, of the full memory",
    "focal": "mask cross entropy x 4",  # the recipe's focal loss is half of one, and counts 8
    "dice": "Dice",
    "object_score": "object score",
}
"""Terms of the loss that are drawn, and what the page calls them."""


def compare_memories(path: Path, world: Path, settings: Mapping[str, Any], run: Path) -> MemoryComparison:
    """Track the world's test clips with both memories of a file.

    Args:
        path: The merged file.
        world: The demo world.
        settings: Section REPORT of the demo's settings.
        run: Folder of the memory's training.

    Raises:
        UserError: If the world has no clips, or the run has logged nothing.
        CheckpointError: If the file does not hold both memories.
    """
    clips = read_clips(world / "clips" / "test", settings["num_clips"])
    if not clips:
        raise UserError(f"{world} has no test clips to track: make it with --test-clips")
    models = tuple(sam3.load_model(path, "cpu", memory=kind) for kind in ("full", "efficient"))
    tracking = compare_tracking(models[0], models[1], clips, settings["num_shown_clips"], shares_trunk=True)
    full, compressed = (stored_memory(model, clips[0]) for model in models)
    return MemoryComparison(
        scores=[MemoryScore(score.prompt, score.teacher, score.student) for score in tracking.scores],
        full=full,
        compressed=compressed,
        stand_still=tracking.stand_still,
        num_objects=tracking.num_objects,
        num_clips=tracking.num_clips,
        clips=tracking.clips,
        chart=loss_chart(run),
    )


def stored_memory(model: Any, clip: EvalClip) -> StoredMemory:
    """What a session really keeps of a frame for one object."""
    predictor = Sam3TrackerPredictor(model)
    state = predictor.init_state(video_path=clip.frames[:1])
    predictor.add_new_points_or_box(state, 0, 1, points=[[0.5, 0.5]], labels=[1])
    for _ in predictor.propagate_in_video(state):
        pass
    ((record, *_),) = [list(group.bank.cond.values()) for group in state.groups]
    assert record.maskmem_features is not None, "the session has encoded the frame"
    memory: torch.Tensor = record.maskmem_features[0]
    tokens = memory.shape[0] if memory.ndim == 2 else memory[0].numel()
    return StoredMemory(int(tokens), memory.numel() * memory.element_size())


def loss_chart(run: Path) -> str:
    """The terms of the loss while it ran.

    Raises:
        UserError: If the run has logged nothing.
    """
    records: Sequence[Mapping[str, Any]] = read_metrics(run, "train")
    series: list[Series] = []
    for term, words in CHART_TERMS.items():
        kept = [record for record in records if record.get(term) is not None]
        if kept:
            steps, scale = [record["step"] for record in kept], 8.0 if term == "focal" else 1.0
            series.append(Series(words, steps, [scale * record[term] for record in kept], color=len(series)))
    if not series:
        raise UserError(f"{run} has no metrics.jsonl with training records: was the run finished?")
    return line_chart("Loss of the memory", "optimizer step", "term", series, y_low=0.0)
