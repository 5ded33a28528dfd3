"""The compressed memory of a training checkpoint of stage 2: read, described, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam3.checkpoint_fit import fit_problems
from sam3.checkpoint_io import sniff
from sam3.config import Sam3Config
from sam3.efficient_keys import OWN_PREFIXES, STAGE2_BACKBONE_PREFIX, is_stage2
from sam3.model.building import building_on
from sam3.model.efficient_sam3_tracker import EfficientSam3Tracker
from sam3.preprocess import Preprocess
from sam3_train.checkpoint import load_checkpoint
from sam3_train.errors import UserError

STAGE = "stage2"
"""What the identity of its checkpoints calls the stage."""
_REMEDY = "give the model_final.pth, best.pth or ckpt_epoch_N.pth of a run of stage2/train_memory_stage2.py"
_FIELDS = {"identity": dict, "model": dict, "epoch": int}
_IDENTITY = {"model": dict, "preprocess": dict, "frozen_sha256": str}


@dataclass(frozen=True)
class TrainedMemory:
    """A trained memory and what is known about it."""

    path: Path
    model: Sam3Config
    """With the compressed memory."""
    preprocess: Preprocess
    weights: dict[str, Tensor]
    """Exactly what `EfficientSam3Tracker` has of its own, under its names."""
    heads: dict[str, Tensor]
    """Of the frozen rest of the tracker what the file holds too, under the tracker's names: all of it or nothing."""
    left_out: dict[str, int]
    """What else was trained or counted and no tracker has, such as throw-away heads: number of tensors by module."""
    frozen_sha256: str
    """What the memory was trained behind; see `stage2.base_file.frozen_sha256`."""
    start: dict[str, Any]
    """The file that the run began with, by name and hash; {} if that is not recorded."""
    is_ema: bool
    epoch: int
    step: int
    metrics: dict[str, float]
    config: dict[str, Any]


def read_trained_memory(path: Path, use_ema: bool | None = None) -> TrainedMemory:
    """Read a checkpoint of stage 2; nothing in the file can run code.

    Args:
        path: ``model_final.pth``, ``best.pth``, ``ckpt_epoch_N.pth`` or a step checkpoint.
        use_ema: Take the averaged weights; None takes them if there are any.

    Raises:
        UserError: If the file is missing, damaged, of another kind, lacks what is asked for, or its tensors are not
            exactly those of the memory that it describes.
    """
    if path.is_file() and path.stat().st_size and sniff(path) == "safetensors":
        raise UserError(f"{path} is a safetensors file, which no training writes: {_REMEDY}")
    state = load_checkpoint(path)
    _require_stage2(state, path)
    identity = state["identity"]
    try:
        model, preprocess = Sam3Config.from_dict(identity["model"]), Preprocess.from_dict(identity["preprocess"])
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: its model description cannot be read: {error}") from None
    is_ema = _choose_ema(state, path, use_ema)
    weights = dict(state["ema" if "ema" in state and is_ema else "model"])
    own = {key: value for key, value in weights.items() if key.startswith(OWN_PREFIXES)}
    heads, others = _split_rest({key: value for key, value in weights.items() if key not in own}, model, path)
    _require_whole(own, heads, model, path)
    return TrainedMemory(
        path=path,
        model=model,
        preprocess=preprocess,
        weights=own,
        heads=heads,
        left_out=_count_by_module(others),
        frozen_sha256=identity["frozen_sha256"],
        start=dict(state.get("start") or {}),
        is_ema=is_ema,
        epoch=state["epoch"],
        step=int(state.get("step", 0)),
        metrics=dict(state.get("metrics") or {}),
        config=dict(state.get("config") or {}),
    )


def _require_stage2(state: Mapping[str, Any], path: Path) -> None:
    """Say what another file is, and what to do about it."""
    nested = state.get("model")
    names = [str(key) for key in (nested if isinstance(nested, Mapping) else state)]
    identity = state.get("identity")
    if isinstance(identity, dict) and identity.get("stage") != STAGE:
        raise UserError(
            f"{path} is a checkpoint of another stage (its identity says {identity.get('stage', 'nothing')!r} and not "
            f"{STAGE!r}): students are merged by stage1/convert_stage1_weights.py or "
            f"stage1_geometry_finetune/convert_geometry_finetune.py; here {_REMEDY}"
        )
    if identity is None and is_stage2(names):
        with_backbone = any(name.startswith(STAGE2_BACKBONE_PREFIX) for name in names)
        use = "sam3.load_model opens it as it is" if with_backbone else "it does not say which file it belongs to"
        raise UserError(f"{path}: a memory without a record of its training ({use}): {_REMEDY}")
    if identity is None and any(name.startswith(("detector.", "tracker.")) for name in names):
        raise UserError(f"{path} is a whole model and no training checkpoint: {_REMEDY}")
    missing = [name for name, kind in _FIELDS.items() if not isinstance(state.get(name), kind)]
    if isinstance(identity, dict):
        missing += [f"identity.{name}" for name, kind in _IDENTITY.items() if not isinstance(identity.get(name), kind)]
    if missing:
        raise UserError(
            f"{path} is no checkpoint of stage 2: it lacks {', '.join(missing)} (it has "
            f"{sorted(map(str, state))[:6]}): {_REMEDY}"
        )


def _choose_ema(state: Mapping[str, Any], path: Path, use_ema: bool | None) -> bool:
    """Whether the weights that are taken are averaged ones. A final file holds one kind alone and says which."""
    if "is_ema" in state:
        is_ema = bool(state["is_ema"])
        if use_ema is not None and use_ema != is_ema:
            kind = "averaged weights alone" if is_ema else "no averaged weights (TRAIN.EMA_DECAY was 0)"
            raise UserError(f"{path}: it holds {kind}; leave --{'' if use_ema else 'no-'}use-ema out")
        return is_ema
    if use_ema and "ema" not in state:
        raise UserError(f"{path}: it holds no averaged weights (TRAIN.EMA_DECAY was 0); leave --use-ema out")
    return "ema" in state if use_ema is None else use_ema


def tracker_on_meta(model: Sam3Config) -> EfficientSam3Tracker:
    """The tracker that a description asks for, without data."""
    with building_on(torch.device("meta")):
        return EfficientSam3Tracker(model)


def _split_rest(
    rest: Mapping[str, Tensor], model: Sam3Config, path: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Frozen tensors of the tracker, and what is of no tracker."""
    if model.efficient_memory is None:
        raise UserError(f"{path}: its model description has no compressed memory: {_REMEDY}")
    known = tracker_on_meta(model).state_dict()
    heads = {key: value for key, value in rest.items() if key in known}
    return heads, {key: value for key, value in rest.items() if key not in known}


def _require_whole(own: Mapping[str, Tensor], heads: Mapping[str, Tensor], model: Sam3Config, path: Path) -> None:
    """The memory's tensors must be exactly those that its description asks for; heads whole or absent."""
    expected = tracker_on_meta(model).state_dict()
    wanted = {key: value for key, value in expected.items() if key in heads or key.startswith(OWN_PREFIXES)}
    if heads:
        wanted = expected
    problems = fit_problems({**own, **heads}, wanted)
    if problems:
        raise UserError(
            f"{path} is not whole: its tensors are not those of the memory that it describes ({len(wanted)} tensors): "
            f"{'; '.join(problems)}; give another checkpoint of the run"
        )


def _count_by_module(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        module = name.partition(".")[0]
        counts[module] = counts.get(module, 0) + 1
    return dict(sorted(counts.items()))
