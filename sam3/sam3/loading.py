"""Open any known checkpoint without being told what it is."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch

from sam3.checkpoint_io import INDEX_SUFFIX, CheckpointError, read_checkpoint
from sam3.checkpoint_parts import POINT_PROMPTS
from sam3.devices import find_device
from sam3.hub import SAM3_FILE, SAM3_REPO, download_ckpt_from_hf
from sam3.model.sam3_image import Sam3Image
from sam3.preprocess import Preprocess
from sam3.recognition import Recognised, recognise
from sam3.released_names import load_released

_LOG = logging.getLogger(__name__)
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[\w./-]+))?")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SUFFIXES = (".pt", ".pth", ".safetensors")


def load_model(
    path_or_hub_id: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    preprocess: Preprocess | None = None,
    memory: str | None = None,
) -> Sam3Image:
    """Open a checkpoint for prediction.

    Opens the released ``sam3.pt``, Hugging Face's safetensors (one file, shards or a folder), merged students and files
    of this project. What the file holds is read from its metadata record, else from its keys and shapes; nothing in it
    is executed. The model is built without memory and takes the file's tensors, memory-mapped on the CPU, so the peak
    is about the file's size.

    The model has the parts that the file has. Text encoder, detector, segmentation head, SAM heads and the tracker's
    memory may each be absent as a whole: ``model.missing_parts`` names them. A part that is there only in half is an
    error. A file of Hugging Face gives a detector without point prompts, because their weights have no place in its
    layout.

    Args:
        path_or_hub_id: A file, an index of shards, a folder, or a model on the Hub: ``facebook/sam3``, or
            ``owner/model/file.safetensors``.
        device: Default: CUDA where there is one, else the CPU.
        dtype: Of the weights and of the computation; default float32.
        preprocess: For files without a record of it. Default: what SAM 3 is deployed with. Files that were distilled
            with the published EfficientSAM3 scripts saw `Preprocess.letterbox_imagenet`.
        memory: For files that hold two memories for videos: ``efficient`` for the compressed one, ``full`` for the
            released one. Default: the compressed one, if there is one.

    Returns:
        The model in eval mode.

    Raises:
        CheckpointError: If the file cannot be found, read or recognised, does not fit what it says it is, or does not
            hold the ``memory``.
        PreprocessMismatchError: If ``preprocess`` contradicts the file's record.
        ValueError: If there is no such device (`DeviceError`), or nothing can be computed in ``dtype``,
            or there is no such kind of memory.
    """
    device = find_device(device)
    if dtype not in (None, *_DTYPES):
        raise ValueError(f"dtype {dtype!r}: weights and computation can be in {', '.join(map(str, _DTYPES))}")
    checkpoint = recognise(read_checkpoint(find_checkpoint(path_or_hub_id))).with_memory(memory)
    checkpoint.check_other_memory()
    model = checkpoint.assemble(choose_preprocess(checkpoint, preprocess))
    model.to(dtype or torch.float32)
    load_released(model, checkpoint.weights_for(model), checkpoint.source)
    model.missing_parts = checkpoint.missing_parts
    if POINT_PROMPTS in model.missing_parts:
        _LOG.info("%s has no weights for point prompts of the detector", checkpoint.source)
    return model.to(device).eval()


def find_checkpoint(path_or_hub_id: str | Path) -> Path:
    """A path as it is, or the local copy of a model on the Hub.

    Raises:
        CheckpointError: If it is neither, or cannot be downloaded.
    """
    path = Path(path_or_hub_id)
    hub_id = _HUB_ID.fullmatch(str(path_or_hub_id))
    if path.exists() or hub_id is None or (path.suffix in _SUFFIXES and not hub_id["file"]):
        return path
    filename = hub_id["file"]
    if filename is None and hub_id["repo"] == SAM3_REPO:
        filename = SAM3_FILE
    if filename is None:
        raise CheckpointError(
            f"{path_or_hub_id}: no such file. If it is a model on the Hub, name the file too: {path_or_hub_id}/FILE"
        )
    if filename.endswith(INDEX_SUFFIX):
        raise CheckpointError(f"{path_or_hub_id}: download the shards first, and give their folder")
    if Path(filename).suffix not in _SUFFIXES or Path(path.parts[0]).is_dir():
        raise CheckpointError(f"{path_or_hub_id}: no such checkpoint file")
    return download_ckpt_from_hf(hub_id["repo"], filename)


def choose_preprocess(checkpoint: Recognised, given: Preprocess | None) -> Preprocess | None:
    """What a checkpoint's record says, else what the caller says, else None: SAM 3's own.

    Raises:
        PreprocessMismatchError: If the two contradict each other.
    """
    recorded = checkpoint.preprocess
    if recorded is not None:
        if given is not None:
            given.require_equal(recorded, "the argument preprocess", checkpoint.source)
        return recorded
    if given is None and checkpoint.config.student is not None:
        _LOG.warning(
            "%s does not say how its student's images were prepared; assuming SAM 3's own way (stretched to "
            "%d px). If it was distilled otherwise, pass preprocess=",
            checkpoint.source,
            checkpoint.config.image_size_px,
        )
    return given
