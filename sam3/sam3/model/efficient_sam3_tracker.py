"""The tracker with a compressed memory: a few tokens per frame in place of one per cell, and a light attention.

Names are those of the published EfficientSAM3 stage-2 checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sam3.config import Sam3Config
from sam3.efficient_memory_config import EfficientMemoryConfig
from sam3.model.efficient_memory_attention import EfficientMemoryAttention
from sam3.model.memory_attention import MemoryTokens
from sam3.model.perceiver import PerceiverResampler
from sam3.model.sam3_tracker import Sam3Tracker
from sam3.model.tracker_memory import TrackerFeatures


class EfficientSam3Tracker(Sam3Tracker):
    """`Sam3Tracker` with other ways to store a frame's memory, (B, tokens, Cm), and to read it.

    Which frames are read, how masks are made and what a record holds are the tracker's, so predictors, memory policies
    and streams work with either.

    Attributes:
        memory: ``config.efficient_memory``.
        spatial_perceiver: Makes the tokens; None for uncompressed memory.
        memory_attention: Reads them.
        mem_proj, mem_pos_proj: Bring tokens and their codes to the width of the features.
    """

    def __init__(self, config: Sam3Config, memory_dtype: torch.dtype = torch.bfloat16) -> None:
        """
        Raises:
            ValueError: If the description has no compressed memory.
        """
        memory = config.efficient_memory
        if memory is None:
            raise ValueError(
                f"the model description {config.name!r} has no compressed memory: take config.with_efficient_memory()"
            )
        self.memory: EfficientMemoryConfig = memory
        super().__init__(config, memory_dtype)

    def _build_memory_attention(self, config: Sam3Config) -> None:
        dim, mem_dim, memory = config.hidden_dim, config.tracker.mem_dim, self.memory
        self.spatial_perceiver = PerceiverResampler(mem_dim, config.grid_size, memory) if memory.is_compressed else None
        self.memory_attention = EfficientMemoryAttention(config, memory)
        self.mem_proj = nn.Linear(mem_dim, dim)
        self.mem_pos_proj = nn.Linear(mem_dim, dim)

    def compress(self, memory_bchw: Tensor) -> Tensor:
        """The tokens that are stored of memories (B, Cm, G, G): (B, tokens, Cm)."""
        if self.spatial_perceiver is None:
            return memory_bchw.flatten(2).transpose(1, 2)
        return self.spatial_perceiver(memory_bchw)

    def stored_tokens(self, stored: Tensor) -> Tensor:
        """What is stored are tokens already."""
        return stored

    def token_codes(self, grid_hw: tuple[int, int]) -> Tensor:
        """Position codes of the tokens, (tokens, Cm); of compressed ones they do not depend on the grid."""
        return self.memory_code(grid_hw) if self.spatial_perceiver is None else self.spatial_perceiver.latent_codes()

    def attend(self, features: TrackerFeatures, memory: MemoryTokens) -> Tensor:
        """The frame as B objects see it through their memories, (B, C, G, G)."""
        wide = memory._replace(
            spatial=self.mem_proj(memory.spatial),
            spatial_codes=self.mem_pos_proj(memory.spatial_codes),
            pointers=self.mem_proj(memory.pointers),
            pointer_codes=self.mem_pos_proj(memory.pointer_codes),
        )
        return self.memory_attention(features.coarse, wide)

    def without_memory(self, features: TrackerFeatures) -> Tensor:
        """What a frame without memory shows to the decoder, as many rows as the features have.

        By default that is SAM 3's own. The published code lets such frames read one token of zeros with a code of
        zeros.
        """
        if self.memory.initial_frames == "no_mem_embed" or self.settings.num_maskmem == 0:
            return super().without_memory(features)
        weight = self.maskmem_tpos_enc
        num_rows, mem_dim = len(features.coarse), weight.shape[-1]
        nothing = MemoryTokens(
            weight.new_zeros(num_rows, 1, 1, mem_dim),
            weight.new_zeros(1, 1, mem_dim),
            weight.new_zeros(num_rows, 0, mem_dim),
            weight.new_zeros(0, mem_dim),
        )
        return self.attend(features, nothing)
