"""Open any known checkpoint without being told what it is."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam3.checkpoint_io import CheckpointError, read_state_dict
from sam3.checkpoint_keys import BACKBONE_PREFIX, STUDENT_PREFIX, UnknownLayoutError, identify_student_config
from sam3.config import PRESETS, Sam3Config
from sam3.hf_keys import is_hf_layout, released_from_hf
from sam3.hub import SAM3_FILE, SAM3_REPO, download_ckpt_from_hf
from sam3.model.sam3_image import Sam3Image
from sam3.model_builder import assemble_image_model
from sam3.preprocess import Preprocess
from sam3.released_names import load_released, released_layout, to_released

_LOG = logging.getLogger(__name__)
_NECK_KEY = "detector.backbone.vision_backbone.convs.2.conv_1x1.weight"
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[\w./-]+))?")


def load_model(
    path_or_hub_id: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    preprocess: Preprocess | None = None,
) -> Sam3Image:
    """Open a checkpoint for prediction.

    Opens the released ``sam3.pt``, Hugging Face's safetensors, merged students and files of this project. What the file
    holds is read from its metadata record, else from its keys and shapes. The model is built without memory and takes
    the file's tensors, memory-mapped on the CPU, so the peak is about the file's size.

    Args:
        path_or_hub_id: A file, or a model on the Hub: ``facebook/sam3``, or ``owner/model/file.safetensors``.
        device: Default: CUDA where there is one, else the CPU.
        dtype: Of the weights and of the computation; default float32.
        preprocess: For files without a record of it. Default: what SAM 3 is deployed with. Files that were distilled
            with the published EfficientSAM3 scripts saw `Preprocess.letterbox_imagenet`.

    Returns:
        The model in eval mode, with ``inst_interactive_predictor``.

    Raises:
        CheckpointError: If the file cannot be found, read or recognised, or does not fit what it says it is.
        PreprocessMismatchError: If ``preprocess`` contradicts the file's record.
    """
    path = _find(path_or_hub_id)
    state_dict, metadata = read_state_dict(path)
    released = _to_released_layout(state_dict, str(path))
    config = _config_from_record(metadata, path) or identify_config(released, str(path))
    model = assemble_image_model(
        config, _preprocess(metadata, config, preprocess, path), enable_inst_interactivity=True, device="meta"
    )
    model.to(dtype or torch.float32)
    load_released(model, released, str(path))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval()


def identify_config(released: Mapping[str, Tensor], source: str) -> Sam3Config:
    """The description of a checkpoint that has no record of it, from keys and shapes.

    Args:
        released: State dict in the released layout.
        source: The file's name, for errors.

    Raises:
        CheckpointError: If nothing fits; the message names the nearest layout and the first differing keys.
    """
    shape = tuple(released[_NECK_KEY].shape[:2]) if _NECK_KEY in released else None
    for config in PRESETS.values():
        if shape == (config.hidden_dim, config.trunk.embed_dim):
            return config.replace(student=_identify_student(released, source))
    if any(key.startswith(("detector." + BACKBONE_PREFIX, BACKBONE_PREFIX)) for key in released):
        raise CheckpointError(
            f"{source}: a student's own checkpoint, without neck and heads: merge it into a SAM 3 checkpoint first "
            "(stage1/convert_stage1_weights.py)"
        )
    raise CheckpointError(_nearest_layout(released, source))


def _identify_student(released: Mapping[str, Tensor], source: str):
    if not any(key.startswith(STUDENT_PREFIX) for key in released):
        return None
    try:
        return identify_student_config({key: value.shape for key, value in released.items()})
    except UnknownLayoutError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _nearest_layout(released: Mapping[str, Tensor], source: str) -> str:
    layouts = {}
    for name, config in PRESETS.items():
        model = assemble_image_model(config, enable_inst_interactivity=True, device="meta")
        layouts[name] = to_released(model.state_dict(), config)
    name = max(layouts, key=lambda n: len(layouts[n].keys() & released.keys()))
    missing = [key for key in layouts[name] if key not in released]
    unexpected = sorted(key for key in released if key not in layouts[name])
    return (
        f"{source}: not a layout that is known here. The nearest is {name!r}, with {len(missing)} of "
        f"{len(layouts[name])} keys missing, first {missing[:2]}; the file has {len(unexpected)} others, first "
        f"{unexpected[:2]}"
    )


def _find(path_or_hub_id: str | Path) -> Path:
    path = Path(path_or_hub_id)
    hub_id = _HUB_ID.fullmatch(str(path_or_hub_id))
    if path.exists() or hub_id is None or (path.suffix in (".pt", ".pth") and not hub_id["file"]):
        return path
    filename = hub_id["file"]
    if filename is None and hub_id["repo"] == SAM3_REPO:
        filename = SAM3_FILE
    if filename is None:
        raise CheckpointError(
            f"{path_or_hub_id}: no such file. If it is a model on the Hub, name the file too: {path_or_hub_id}/FILE"
        )
    if Path(filename).suffix not in (".pt", ".pth", ".safetensors") or path.parent.is_dir():
        raise CheckpointError(f"{path_or_hub_id}: no such checkpoint file")
    return download_ckpt_from_hf(hub_id["repo"], filename)


def _to_released_layout(state_dict: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    if not is_hf_layout(state_dict):
        return released_layout(state_dict, source)
    try:
        return released_from_hf(state_dict)
    except UnknownLayoutError as error:
        raise CheckpointError(f"{source}: looks like a Hugging Face file, but {error}") from error


def _config_from_record(metadata: Mapping[str, Any], path: Path) -> Sam3Config | None:
    record = metadata.get("model")
    if record is None:
        return None
    try:
        return Sam3Config.from_dict(record)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: the model description in the metadata cannot be read: {error}") from error


def _preprocess(
    metadata: Mapping[str, Any], config: Sam3Config, given: Preprocess | None, path: Path
) -> Preprocess | None:
    record = metadata.get("preprocess")
    if record is None:
        if given is None and config.student is not None:
            _LOG.warning(
                "%s does not say how its student's images were prepared; assuming SAM 3's own way (stretched to "
                "%d px). If it was distilled otherwise, pass preprocess=",
                path,
                config.image_size_px,
            )
        return given
    try:
        recorded = Preprocess.from_dict(record)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the preprocessing in the metadata cannot be read: {error}") from error
    if given is not None:
        given.require_equal(recorded, "the argument preprocess", str(path))
    return recorded
