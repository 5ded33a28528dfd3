"""Builders and checkpoints of the compressed memory: tracker, predictor, and what stage 2 trains.

Example::

    model = build_efficient_sam3_train("sam3.pt")           # or a merged student
    result = model(images, coverage, clip_of_object, draw_plan(num_frames, ClipPrompting()))
    save_efficient_sam3_checkpoint(model, "memory.pt", epoch=1)
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam3.checkpoint_fit import check_fit, fit_problems
from sam3.checkpoint_io import FORMAT_VERSION, CheckpointError, CheckpointFile, read_checkpoint, write_atomically
from sam3.checkpoint_keys import EFFICIENT_PREFIX, TRACKER_PREFIX, strip_prefixes
from sam3.checkpoint_parts import FULL_MEMORY_PREFIXES
from sam3.config import EfficientMemoryConfig, Sam3Config
from sam3.devices import find_device
from sam3.efficient_keys import STAGE2_BACKBONE_PREFIX, is_stage2, own_weights, stage2_to_released
from sam3.loading import choose_preprocess, find_checkpoint, load_model
from sam3.model.building import building_on
from sam3.model.efficient_sam3_tracker import EfficientSam3Tracker
from sam3.model.efficient_sam3_train import EfficientSam3Train
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
from sam3.model_builder import assemble_image_model
from sam3.preprocess import Preprocess
from sam3.recognition import Recognised, recognise
from sam3.released_names import HEADS_PREFIX, from_released, load_released, to_released

_LOG = logging.getLogger(__name__)

STARTS_FROM = {
    "maskmem_backbone.": "tracker.maskmem_backbone.",
    "maskmem_tpos_enc": "tracker.maskmem_tpos_enc",
    "no_obj_embed_spatial": "tracker.no_obj_embed_spatial",
    "memory_attention.norm.": "tracker.transformer.encoder.norm.",
}
"""What of a compressed memory starts from the released one, where the shapes are the same: the memory encoder, its
tables, and the norm behind the attention, which scales what the frozen decoder reads."""
_BACKBONE = "detector.backbone.vision_backbone."
_MODEL, _METADATA = "model", "metadata"


def build_efficient_sam3_tracker(
    checkpoint_path: str | Path | None = None,
    config: Sam3Config | str = "sam3",
    memory: EfficientMemoryConfig | None = None,
    compat: str | None = None,
    device: torch.device | str | None = None,
) -> EfficientSam3Tracker:
    """The tracker alone, in eval mode: it takes features of frames, from `Sam3Tracker.frame_features`.

    Args:
        checkpoint_path: A file with the SAM heads and a memory, compressed or released (see `STARTS_FROM`), or a model
            on the Hub. None: fresh weights.
        config: Without a file, sizes: a preset's name or a description.
        memory: The compressed memory; default: the file's, the description's, or the preset that fits.
        compat: ``published`` for the preset with the published code's rules; not together with ``memory``.
        device: Default: CUDA where there is one, else the CPU.

    Raises:
        CheckpointError: If the file cannot be read, or lacks a part.
        ValueError: If ``memory`` and ``compat`` are both given, or ``compat`` is unknown.
    """
    model = _build(checkpoint_path, config, memory, compat, None)
    tracker = model.tracker
    assert isinstance(tracker, EfficientSam3Tracker)
    return tracker.to(find_device(device)).eval()


def build_efficient_sam3_predictor(
    checkpoint_path: str | Path,
    device: torch.device | str | None = None,
    *,
    preprocess: Preprocess | None = None,
    **options: Any,
) -> Sam3TrackerPredictor:
    """Sessions of interactive tracking with a file's compressed memory.

    Args:
        checkpoint_path: What `sam3.load_model` opens, with a compressed memory.
        device: Default: CUDA where there is one, else the CPU.
        preprocess: As for `sam3.load_model`.
        **options: Those of `Sam3TrackerPredictor`; it refuses unknown ones.

    Raises:
        CheckpointError: If the file cannot be opened or has no compressed memory.
    """
    return Sam3TrackerPredictor(
        load_model(checkpoint_path, device, preprocess=preprocess, memory="efficient"), **options
    )


def build_efficient_sam3_train(
    checkpoint_path: str | Path | None = None,
    config: Sam3Config | str = "sam3",
    memory: EfficientMemoryConfig | None = None,
    compat: str | None = None,
    device: torch.device | str | None = None,
    *,
    preprocess: Preprocess | None = None,
) -> EfficientSam3Train:
    """What stage 2 trains, in training mode.

    Args:
        checkpoint_path: SAM 3 itself or a student merged into it, whose backbone is then the one that is tracked with.
            Its compressed memory is trained further, if it has one of the wanted sizes; else a new one starts from
            the released memory (see `STARTS_FROM`). None: fresh weights.
        config: As for `build_efficient_sam3_tracker`, and so are the next three.
        memory: As there.
        compat: As there.
        device: As there.
        preprocess: As for `sam3.load_model`.

    Returns:
        The module; ``module.preprocess`` is how images are prepared for its backbone.

    Raises:
        CheckpointError: If the file cannot be read, or lacks a part.
        PreprocessMismatchError: If ``preprocess`` contradicts the file's record.
        ValueError: As there.
    """
    model = _build(checkpoint_path, config, memory, compat, preprocess)
    with building_on(torch.device("meta")):
        train = EfficientSam3Train(model.config, model.backbone, preprocess=model.preprocess)
    backbone = {STAGE2_BACKBONE_PREFIX + key: value for key, value in model.backbone.state_dict().items()}
    train.load_state_dict(backbone | model.tracker.state_dict(), assign=True)
    return train.to(find_device(device)).train()


def _build(
    checkpoint_path: str | Path | None,
    config: Sam3Config | str,
    memory: EfficientMemoryConfig | None,
    compat: str | None,
    preprocess: Preprocess | None,
) -> Sam3Image:
    """Backbone and tracker with a compressed memory, without detector and text encoder."""
    if memory is not None and compat is not None:
        raise ValueError(f"memory and compat {compat!r} both describe the compressed memory: give one of them")
    if checkpoint_path is None:
        config = Sam3Config.preset(config) if isinstance(config, str) else config
        if memory is not None or compat is not None or config.efficient_memory is None:
            config = config.with_efficient_memory(memory, compat)
        return assemble_image_model(config, preprocess, enable_detector=False, enable_tracker=True)
    checkpoint = recognise(read_checkpoint(find_checkpoint(checkpoint_path)))
    checkpoint.check_other_memory()
    config = checkpoint.config
    if memory is not None or compat is not None or config.efficient_memory is None:
        config = config.with_efficient_memory(memory, compat)
    model = assemble_image_model(
        config, choose_preprocess(checkpoint, preprocess), device="meta", enable_detector=False, enable_tracker=True
    )
    own = _own_start(checkpoint, config)
    shared = {key: value for key, value in checkpoint.weights.items() if not key.startswith(EFFICIENT_PREFIX)}
    load_released(model, shared | own, checkpoint.source)
    return model


def _own_start(checkpoint: Recognised, config: Sam3Config) -> dict[str, Tensor]:
    """What a compressed memory has of its own, under the released names: the file's, or a new one's start."""
    if checkpoint.efficient_memory == config.efficient_memory:
        found = {key: value for key, value in checkpoint.weights.items() if key.startswith(EFFICIENT_PREFIX)}
        return {key: value.clone() for key, value in found.items()}  # trained in memory, not in the mapped file
    if "full" not in checkpoint.memories:
        found_text = " and ".join(checkpoint.memories) or "none"
        raise CheckpointError(
            f"{checkpoint.source}: a new compressed memory starts from the released memory, which the file does not "
            f"hold (it holds: {found_text}); give SAM 3 or a student merged into it"
        )
    own = own_weights(EfficientSam3Tracker(config).state_dict())
    for key, fresh in own.items():
        name = key.removeprefix(EFFICIENT_PREFIX)
        source = next((s + name.removeprefix(p) for p, s in STARTS_FROM.items() if name.startswith(p)), None)
        if source is None:
            continue
        value = checkpoint.weights.get(source)
        if value is None or value.shape != fresh.shape:
            found_text = "nothing" if value is None else str(tuple(value.shape))
            raise CheckpointError(
                f"{checkpoint.source}: {source} should be {tuple(fresh.shape)} for {name} to start from, and is "
                f"{found_text}"
            )
        own[key] = value.to(fresh.dtype).clone()
    return own


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save_efficient_sam3_checkpoint(
    model: EfficientSam3Tracker,
    checkpoint_path: str | Path,
    optimizer: torch.optim.Optimizer | None = None,
    epoch: int = 0,
    **extra_state: Any,
) -> None:
    """Write a tracker's weights, without any backbone, under the published names; the file appears whole or not at all.

    Args:
        model: The tracker, or what is trained.
        checkpoint_path: A ``.pt`` or ``.pth`` file.
        optimizer: Its state is stored too.
        epoch: That is done.
        **extra_state: More to store, of tensors and plain types.

    Raises:
        ValueError: If the name has another suffix, or an extra is called ``metadata``.
    """
    path = Path(checkpoint_path)
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"{path}: a checkpoint with an optimizer is stored as .pt or .pth")
    if _METADATA in extra_state:
        raise ValueError(f"extra_state {_METADATA!r} is the name of something else in the file")
    weights = {k: v.detach().cpu() for k, v in model.state_dict().items() if not k.startswith(STAGE2_BACKBONE_PREFIX)}
    content = {
        _MODEL: weights,
        "epoch": epoch,
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        _METADATA: {"format_version": FORMAT_VERSION, "model": model.config.to_dict()},
        **extra_state,
    }
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def load_efficient_sam3_checkpoint(
    model: EfficientSam3Tracker, checkpoint_path: str | Path, strict: bool = True
) -> dict[str, Any]:
    """Load weights into a tracker with a compressed memory, or into what is trained.

    Args:
        model: Its description must be the file's. A backbone takes the file's, if that holds one, else keeps its own.
        checkpoint_path: What `save_efficient_sam3_checkpoint` or the published training wrote, or a file that
            `sam3.load_model` opens.
        strict: False lets weights be missing or unknown, and says so in the log. Shapes must fit in any case.

    Returns:
        What the file holds beside the weights: ``epoch``, ``optimizer`` and extras; for other files its record.

    Raises:
        CheckpointError: If the file cannot be read, describes another memory, or does not fit.
    """
    checkpoint = read_checkpoint(checkpoint_path)
    source = str(checkpoint.path)
    _require_described(checkpoint, model.config)
    weights = _released_weights(checkpoint)
    expected = to_released(_image_names(model.state_dict()), model.config)
    if not (_has_backbone(weights) and _has_backbone(expected)):
        weights, expected = _without_backbone(weights), _without_backbone(expected)
    _require_fit(weights, expected, source, model.config, strict)
    found = from_released({key: value for key, value in weights.items() if key in expected}, model.config)
    model.load_state_dict({key.removeprefix(HEADS_PREFIX): v for key, v in found.items()}, strict=False)  # compared
    if not checkpoint.is_nested:
        return dict(checkpoint.metadata)
    is_mapped = checkpoint.container == "torch"
    content = torch.load(checkpoint.files[0], map_location="cpu", weights_only=True, mmap=is_mapped)
    return {key: value for key, value in content.items() if key != _MODEL}


def _has_backbone(released: Mapping[str, Tensor]) -> bool:
    return any(key.startswith(_BACKBONE) for key in released)


def _without_backbone(released: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in released.items() if not key.startswith(_BACKBONE)}


def _image_names(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of what is trained -> those of an image model: the backbone's are the same."""
    return {key if key.startswith(STAGE2_BACKBONE_PREFIX) else HEADS_PREFIX + key: v for key, v in own.items()}


def _released_weights(checkpoint: CheckpointFile) -> dict[str, Tensor]:
    """The vision backbone, heads and compressed memory of a file, under the released names."""
    names = strip_prefixes(checkpoint.state_dict, ("module.",))
    if is_stage2(names):
        return stage2_to_released(names)
    if not any(key.startswith(EFFICIENT_PREFIX) for key in names):
        raise CheckpointError(f"{checkpoint.path}: holds no compressed memory, under none of its names")
    return {
        key: value
        for key, value in names.items()
        if key.startswith((EFFICIENT_PREFIX, TRACKER_PREFIX, _BACKBONE)) and not key.startswith(FULL_MEMORY_PREFIXES)
    }


def _require_described(checkpoint: CheckpointFile, config: Sam3Config) -> None:
    """Compare the memory that a file's record describes, if it does, with the model's."""
    record = checkpoint.metadata.get("model")
    described = None if record is None else Sam3Config.from_dict(record).efficient_memory
    if described is None or described == config.efficient_memory:
        return
    theirs, ours = (dataclasses.asdict(memory) for memory in (described, config.efficient_memory) if memory)
    differing = [f"{name} is {theirs[name]}, here {ours[name]}" for name in ours if theirs[name] != ours[name]]
    raise CheckpointError(f"{checkpoint.path}: holds another compressed memory: {'; '.join(differing)}")


def _require_fit(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str, config: Sam3Config, strict: bool
) -> None:
    if strict:
        check_fit(weights, expected, source, config)
        return
    shared = weights.keys() & expected.keys()
    check_fit({key: weights[key] for key in shared}, {key: expected[key] for key in shared}, source, config)
    for problem in fit_problems(weights, expected):
        _LOG.warning("%s: %s", source, problem)
