"""The frozen teacher: SAM 3's image trunk and nothing else, or its stored features in its place.

Used by the export, by ``--check-saved-embed`` and by training without a store (``DISTILL.ONLINE_TEACHER``). The text
encoder, necks and decoders are never built: 446 M parameters of the released 860 M.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from sam3.checkpoint_io import read_state_dict
from sam3.config import Sam3Config
from sam3.preprocess import Preprocess
from sam3_train.checkpoint import state_dict_sha256
from sam3_train.distillation_config import preprocess_config, teacher_config
from sam3_train.embeddings import Codec, EmbeddingStore
from sam3_train.errors import UserError
from sam3_train.precision import autocast, pick_dtype


class Teacher:
    """A trunk in eval mode whose parameters take no gradient.

    Not an nn.Module on purpose: a task that holds one neither trains, nor saves, nor synchronises it.

    Args:
        trunk: Images (B, 3, S, S) -> list of one feature map (B, C, G, G).
        config: The model it is part of.
        preprocess: What it expects of its images.
        device: Where it is.
        dtype: Other than float32 the forward runs under autocast.
    """

    def __init__(
        self,
        trunk: nn.Module,
        config: Sam3Config,
        preprocess: Preprocess,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.trunk = trunk.to(device).eval().requires_grad_(False)
        self.config = config
        self.preprocess = preprocess
        self.device = device
        self.dtype = dtype

    @classmethod
    def from_config(cls, cfg: CfgNode, device: torch.device) -> Teacher:
        """Build the trunk of ``MODEL.PRESET`` with the weights of ``MODEL.SAM3_CHECKPOINT``.

        Raises:
            UserError: If a setting is impossible.
            CheckpointError: If the file is missing, damaged or of another model.
        """
        from sam3.model_builder import build_sam3_trunk

        config = teacher_config(cfg)
        require_teacher_file(cfg)
        # SAM 3 was trained in bf16; in fp16 its trunk can overflow, so auto takes bf16 where there is one.
        dtype = pick_dtype(cfg, device)
        trunk = build_sam3_trunk(cfg.MODEL.SAM3_CHECKPOINT or None, config=config, device=device)
        return cls(trunk, config, preprocess_config(cfg), device, dtype)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of preprocessed images.

        Args:
            images: float32, (B, 3, S, S), on any device.

        Returns:
            float32, (B, C, G, G), on the teacher's device; values in the precision of the forward.
        """
        images = images.to(self.device, non_blocking=True)
        with autocast(self.device, self.dtype):
            features = self.trunk(images)[-1]
        return features.float()

    @cached_property
    def sha256(self) -> str:
        """Hash of the trunk's parameters as loaded, whatever file they came from; buffers are left out."""
        return state_dict_sha256(dict(self.trunk.named_parameters()))

    @property
    def description(self) -> dict[str, str]:
        """What an embedding store records about the teacher."""
        return {"name": self.config.name, "sha256": self.sha256, "dtype": dtype_name(self.dtype)}


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def require_teacher_file(cfg: CfgNode) -> None:
    """Check that ``MODEL.SAM3_CHECKPOINT`` names a file, or that the hub has one for the preset.

    Raises:
        UserError: If not.
    """
    path = cfg.MODEL.SAM3_CHECKPOINT
    if path and not Path(path).is_file():
        raise UserError(
            f"MODEL.SAM3_CHECKPOINT: there is no file {path}; download sam3.pt there, name another file, or set it to "
            '"" to fetch the gated file from the hub'
        )
    if not path and teacher_config(cfg).name != "sam3":
        raise UserError(
            f"MODEL.SAM3_CHECKPOINT is empty: only the preset sam3 has a file on the hub, not {cfg.MODEL.PRESET!r}; "
            "name the teacher's checkpoint, e.g. data/demo/tiny_teacher.safetensors"
        )


def trunk_file_sha256(path: str | Path, config: Sam3Config) -> str:
    """What `Teacher.sha256` will be for a file: its trunk is read and hashed, nothing is computed.

    Raises:
        CheckpointError: If the file is missing, damaged or of another model.
    """
    from sam3.model_builder import build_sam3_trunk

    trunk = build_sam3_trunk(path, config=config, device="cpu")
    return state_dict_sha256(dict(trunk.named_parameters()))


def require_teacher_of_store(
    path: str | Path, config: Sam3Config, preprocess: Preprocess, store: EmbeddingStore | None, remedy: str = ""
) -> None:
    """Check that a file holds the teacher whose features are imitated: its heads understand no other ones.

    Args:
        path: What the heads will be read from.
        config: The teacher's description.
        preprocess: What the run's images go through; compared if the file records its own.
        store: The embeddings; None with an online teacher, which comes from the same file.
        remedy: What else the user can do, e.g. ``, or set A.B False``.

    Raises:
        UserError: If the embeddings are of another teacher.
        PreprocessMismatchError: If the file was made for other inputs.
        CheckpointError: If the file cannot be read or does not fit.
    """
    _, metadata = read_state_dict(path)
    if metadata.get("preprocess") is not None:
        try:
            theirs = Preprocess.from_dict(metadata["preprocess"])
        except (TypeError, ValueError) as error:
            raise UserError(
                f"MODEL.SAM3_CHECKPOINT {path}: its record of the preprocessing is damaged: {error}"
            ) from None
        preprocess.require_equal(theirs, "the training config (DATA.PREPROCESS)", f"MODEL.SAM3_CHECKPOINT {path}")
    stored = None if store is None else store.spec.teacher.get("sha256")
    if store is None or not stored:  # the public layout does not say whose features it holds
        return
    found = trunk_file_sha256(path, config)
    if found != stored:
        raise UserError(
            f"MODEL.SAM3_CHECKPOINT: the trunk in {path} has sha256 {found[:12]}, but the embeddings in "
            f"{store.directory} are of a teacher with {stored[:12]}: name the file that they were exported with"
            f"{remedy}"
        )


def stored_features(codec: Codec) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A step between loader and task that decodes stored embeddings on the batch's device.

    The copy to the device moves the stored types; float32 exists only there.
    """

    def prepare(batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "teacher": codec.to_float(batch["embedding"])}

    return prepare


def online_features(teacher: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The same for a teacher in the loop: a `Teacher`. One pass serves all students."""

    def prepare(batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "teacher": teacher(batch["image"])}

    return prepare
