"""How one embedding becomes bytes and back: a small class per codec.

========  ===================  ==============================  =========================================
codec     bytes for (C, H, W)  released size (1024, 72, 72)    distortion on unit-variance features
========  ===================  ==============================  =========================================
fp16      2 C H W              10,616,832 (10.6 MB)            relative RMS error 2e-4 (a float16 cast)
int8      C H W + 4 C           5,312,512 (5.3 MB)             about 1e-2, cosine of a cell above 0.995
========  ===================  ==============================  =========================================

`measure_distortion` gives the figures for your own embeddings; ``--check-saved-embed`` reports them for a store.
A new codec is one class with these methods and a line in `CODECS`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, int, int]
FP16_EXPONENT = np.uint16(0x7C00)  # all exponent bits set: the value is an infinity or not a number
CHUNK = 1 << 17  # values looked at together: they stay in the processor's cache


class Codec(ABC):
    """Turns a float16 embedding (C, H, W) into a payload of fixed size and back."""

    name: str

    @abstractmethod
    def layout(self, shape: Shape) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Stored type and shape of the parts that a payload consists of, by name, in their order on the disk."""

    def payload_bytes(self, shape: Shape) -> int:
        """Bytes that an embedding of ``shape`` takes, without the 4-byte seed."""
        return sum(dtype.itemsize * math.prod(part_shape) for dtype, part_shape in self.layout(shape).values())

    def empty_parts(self, shape: Shape) -> dict[str, np.ndarray]:
        """Arrays for the parts of one payload, not filled, each with memory of its own."""
        return {name: np.empty(part_shape, dtype) for name, (dtype, part_shape) in self.layout(shape).items()}

    @abstractmethod
    def encode(self, embedding_chw: np.ndarray) -> np.ndarray:
        """The payload of a finite float16 embedding in C order: uint8, (`payload_bytes`,); may share its memory."""

    def split(self, payload: np.ndarray, shape: Shape) -> dict[str, np.ndarray]:
        """Views of a uint8 payload as named arrays of the stored types; nothing is copied."""
        parts, start = {}, 0
        for name, (dtype, part_shape) in self.layout(shape).items():
            end = start + dtype.itemsize * math.prod(part_shape)
            parts[name] = payload[start:end].view(dtype).reshape(part_shape)
            start = end
        return parts

    @abstractmethod
    def to_float(self, parts: dict[str, Tensor]) -> Tensor:
        """Embeddings from stored parts, on the parts' device: (..., C, H, W), float32.

        The parts are those of `split` as tensors, optionally stacked along leading batch dimensions; decoding after the
        copy to the device moves fewer bytes and costs the loader nothing.
        """

    def to_half(self, parts: dict[str, np.ndarray]) -> np.ndarray:
        """The embedding of one record's parts, float16, (C, H, W); may share their memory."""
        tensors = {name: torch.from_numpy(part) for name, part in parts.items()}
        return self.to_float(tensors).to(torch.float16).numpy()

    def decode(self, payload: np.ndarray, shape: Shape) -> np.ndarray:
        """The embedding of a payload as a float16 array of its own, (C, H, W)."""
        return self.to_half({name: np.array(part) for name, part in self.split(payload, shape).items()})


class Fp16Codec(Codec):
    """The float16 grid in C order: the public layout."""

    name = "fp16"

    def layout(self, shape: Shape) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        return {"values": (np.dtype("<f2"), shape)}

    def encode(self, embedding_chw: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(embedding_chw, "<f2").reshape(-1).view(np.uint8)

    def to_float(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["values"].to(torch.float32)

    def to_half(self, parts: dict[str, np.ndarray]) -> np.ndarray:
        return parts["values"]


class Int8Codec(Codec):
    """One float32 scale per channel (its largest magnitude / 127), then the rounded int8 grid.

    Trunk features have a few channels that are tens of times larger than the rest, so the scale is per channel.
    """

    name = "int8"

    def layout(self, shape: Shape) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        return {"scale": (np.dtype("<f4"), shape[:1]), "values": (np.dtype(np.int8), shape)}

    def encode(self, embedding_chw: np.ndarray) -> np.ndarray:
        values = torch.from_numpy(np.ascontiguousarray(embedding_chw)).to(torch.float32)
        scale = values.flatten(1).abs().amax(1) / 127.0
        divisor = torch.where(scale > 0, scale, 1.0)
        shape = (values.shape[0], values.shape[1], values.shape[2])
        payload = np.empty(self.payload_bytes(shape), np.uint8)
        parts = self.split(payload, shape)
        parts["scale"][...] = scale.numpy()
        parts["values"][...] = values.div_(divisor[:, None, None]).round_().clamp_(-127, 127).to(torch.int8).numpy()
        return payload

    def to_float(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["values"].to(torch.float32) * parts["scale"][..., None, None]


CODECS: dict[str, Codec] = {codec.name: codec for codec in (Fp16Codec(), Int8Codec())}


@dataclass(frozen=True)
class Distortion:
    """What a codec costs on some embeddings, against their float32 originals."""

    relative_rms: float
    """Root mean square of the error over that of the original."""
    max_abs: float
    """Largest error of one value."""
    min_cosine: float
    """Lowest cosine along channels over all cells."""

    def to_dict(self) -> dict[str, float]:
        """Plain types for a report."""
        return {"relative_rms": self.relative_rms, "max_abs": self.max_abs, "min_cosine": self.min_cosine}


def compare_embeddings(original_chw: Any, decoded_chw: Any) -> Distortion:
    """Distortion of one embedding: two (C, H, W) arrays or tensors of any floating type."""
    original, decoded = (
        torch.as_tensor(value).detach().cpu().to(torch.float32) for value in (original_chw, decoded_chw)
    )
    error = decoded - original
    norm = original.square().mean().sqrt().item()
    rms = error.square().mean().sqrt().item()
    cosine = torch.nn.functional.cosine_similarity(original, decoded, dim=0)
    # A cell that is zero in both is equal, not orthogonal.
    both_zero = (original.abs().amax(0) == 0) & (decoded.abs().amax(0) == 0)
    cosine = torch.where(both_zero, 1.0, cosine)
    relative = rms / norm if norm > 0 else (0.0 if rms == 0 else math.inf)
    return Distortion(relative, error.abs().max().item(), cosine.min().item())


def measure_distortion(codec: Codec, embedding_chw: Any) -> Distortion:
    """Encode and decode one finite embedding (C, H, W) and compare with the original."""
    original = torch.as_tensor(embedding_chw).to(torch.float32)
    shape: Shape = (original.shape[0], original.shape[1], original.shape[2])
    payload = codec.encode(original.to(torch.float16).numpy())
    return compare_embeddings(original, codec.decode(payload, shape))


def count_nonfinite(embedding_chw: np.ndarray) -> int:
    """How many values of a float16 array are infinite or not a number.

    Works on the bits: numpy's own test converts each value and is ten times slower.
    """
    bits = np.ascontiguousarray(embedding_chw).reshape(-1).view(np.uint16)
    scratch = np.empty(min(len(bits), CHUNK), np.uint16)
    count = 0
    for start in range(0, len(bits), CHUNK):
        exponents = scratch[: len(bits) - start]
        np.bitwise_and(bits[start : start + CHUNK], FP16_EXPONENT, out=exponents)
        if int(exponents.max()) == FP16_EXPONENT:
            count += int(np.count_nonzero(exponents == FP16_EXPONENT))
    return count
