"""The light memory attention: shared work, pooling, linear attention, biases and the choice of frames."""

from __future__ import annotations

import math

import pytest
import torch
from golden import table
from torch import Tensor, nn

from sam3.config import Sam3Config
from sam3.efficient_memory_config import EfficientMemoryConfig, efficient_memory_preset
from sam3.model.building import building_on
from sam3.model.efficient_memory_attention import EfficientMemoryAttention, linear_attention, pool_memories
from sam3.model.memory_attention import MemoryTokens

TINY = Sam3Config.preset("tiny")
DIM, GRID = TINY.hidden_dim, TINY.grid_size
MEMORY = efficient_memory_preset("tiny")
DENSE = MEMORY.replace(num_latents=0)


def make_attention(memory: EfficientMemoryConfig = MEMORY) -> EfficientMemoryAttention:
    torch.manual_seed(0)
    return EfficientMemoryAttention(TINY, memory).eval()


def frame(batch: int = 1) -> Tensor:
    return table("frame", (batch, DIM, GRID, GRID))


def memories(num_frames: int = 3, num_tokens: int = 64, num_pointers: int = 8, batch: int = 2) -> MemoryTokens:
    return MemoryTokens(
        table("spatial", (batch, num_frames, num_tokens, DIM)),
        table("codes", (num_frames, num_tokens, DIM)),
        table("pointers", (batch, num_pointers, DIM)),
        table("pointer codes", (num_pointers, DIM)),
    )


def rows(memory: MemoryTokens, *chosen: int) -> MemoryTokens:
    index = list(chosen)
    return memory._replace(spatial=memory.spatial[index], pointers=memory.pointers[index])


@torch.no_grad()
def test_objects_do_not_see_each_other() -> None:
    attention, memory = make_attention(), memories()
    together = attention(frame(), memory)
    assert together.shape == (2, DIM, GRID, GRID)
    for i in range(2):
        torch.testing.assert_close(together[i : i + 1], attention(frame(), rows(memory, i)), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], together[1])


@torch.no_grad()
def test_frame_is_read_once_for_all_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, batches = make_attention(), []
    first = attention.layers[0]
    read_frame = type(first).read_frame
    monkeypatch.setattr(type(first), "read_frame", lambda self, x, p: batches.append(len(x)) or read_frame(self, x, p))
    attention(frame(), memories())
    assert batches == [1, 2]


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [0, 3])
@pytest.mark.parametrize("memory", [MEMORY, DENSE.replace(pool_size=2)], ids=["tokens", "pooled"])
def test_frames_and_pointers_may_each_be_absent(num_frames: int, memory: EfficientMemoryConfig) -> None:
    attention = make_attention(memory)
    seen = attention(frame(), memories(num_frames, GRID * GRID, 8))
    assert seen.shape == (2, DIM, GRID, GRID) and bool(seen.isfinite().all())
    if num_frames:
        assert attention(frame(), memories(num_frames, GRID * GRID, 0)).shape == seen.shape


def test_positions_of_tokens_count() -> None:
    attention, memory = make_attention(), memories()
    other = memory._replace(spatial_codes=memory.spatial_codes.flip(1))
    assert not torch.allclose(attention(frame(), memory), attention(frame(), other), atol=1e-3)


# --- pooling ----------------------------------------------------------------------------------------------------------


def test_blocks_are_averages_with_the_weight_of_their_cells() -> None:
    memory = memories(2, 5 * 4)
    pooled, log_counts = pool_memories(memory, (5, 4), 3)
    assert log_counts.exp().round().tolist() == [9, 3, 6, 2]
    cells = memory.spatial.unflatten(2, (5, 4))
    torch.testing.assert_close(pooled.spatial[:, :, 1], cells[:, :, :3, 3:].mean(dim=(2, 3)))
    torch.testing.assert_close(pooled.spatial[:, :, 3], cells[:, :, 3:, 3:].mean(dim=(2, 3)))
    codes = memory.spatial_codes.unflatten(1, (5, 4))
    torch.testing.assert_close(pooled.spatial_codes[:, 2], codes[:, 3:, :3].mean(dim=(1, 2)))
    assert pooled.pointers is memory.pointers


@torch.no_grad()
@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_pooling_equal_neighbours_changes_nothing(attention: str) -> None:
    """Also where blocks do not divide the grid: each counts as its cells do."""
    memory = memories(2, GRID * GRID)
    blocks = [torch.arange(GRID) // 4 * 4] * 2
    cells = (blocks[0][:, None] * GRID + blocks[1]).flatten()
    memory = memory._replace(spatial=memory.spatial[:, :, cells], spatial_codes=memory.spatial_codes[:, cells])
    config = DENSE.replace(attention=attention)
    whole, pooled = make_attention(config), make_attention(config.replace(pool_size=4))
    torch.testing.assert_close(whole(frame(), memory), pooled(frame(), memory), atol=1e-5, rtol=1e-4)


def test_only_grids_are_pooled() -> None:
    """Defect: the published code pools whatever number of tokens a grid divides, compressed ones too."""
    attention = make_attention(DENSE.replace(pool_size=2))
    with pytest.raises(ValueError, match="memories of 64 tokens can't be pooled on a grid of 18 x 18 cells"):
        attention(frame(), memories(81, 64))


# --- linear attention -------------------------------------------------------------------------------------------------


def test_linear_attention_is_the_weighted_sum_that_it_replaces() -> None:
    q, k, v = (table(name, (2, 3, n, 4)) for name, n in (("q", 7), ("k", 9), ("v", 9)))
    bias = table("bias", (1, 1, 1, 9))
    weights = (nn.functional.elu(q) + 1) @ (nn.functional.elu(k) + 1).transpose(-1, -2) * bias.exp()
    expected = weights / weights.sum(dim=-1, keepdim=True) @ v
    torch.testing.assert_close(linear_attention(q, k, v, bias), expected)
    assert linear_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_attention(q, k, v, bias), linear_attention(q, k, v, bias.double()))
        torch.testing.assert_close(linear_attention(q, k, v, bias), expected)


def test_linear_attention_is_another_answer_from_the_same_weights() -> None:
    linear, softmax = make_attention(MEMORY.replace(attention="linear")), make_attention()
    linear.load_state_dict(softmax.state_dict())
    answers = [attention(frame(), memories()) for attention in (linear, softmax)]
    assert answers[0].shape == answers[1].shape and not torch.allclose(*answers, atol=1e-3)


# --- options that the released attention has too ----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("config", [MEMORY, DENSE.replace(pool_size=3)], ids=["tokens", "pooled"])
def test_frames_far_below_are_not_read(config: EfficientMemoryConfig) -> None:
    attention, memory = make_attention(config), memories(3, GRID * GRID)
    hidden = memory._replace(frame_bias=torch.tensor([0.0, -math.inf, 0.0]))
    without = memory._replace(spatial=memory.spatial[:, ::2], spatial_codes=memory.spatial_codes[::2])
    torch.testing.assert_close(attention(frame(), hidden), attention(frame(), without), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_top_k_reads_what_is_attended_most() -> None:
    attention, memory = make_attention(), memories(4)
    x = frame().flatten(2).transpose(1, 2)
    position = attention.position_code((GRID, GRID))
    first = attention.layers[0]
    x = first.read_frame(x + attention.position_scale * position, position)
    cross = first.cross_attn
    q = cross.heads(cross.q_proj(first.norm2(x) + position))
    k = cross.heads(cross.k_proj((memory.spatial + memory.spatial_codes).flatten(1, 2)))
    shares = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1).unflatten(-1, (4, -1)).sum(-1)
    best = 1 + shares.mean(dim=(1, 2))[:, 1:].argmax(dim=1)
    seen = attention(frame(), memory._replace(num_fixed=1, top_k=1))
    for i in range(2):
        alone = rows(memory, i)
        kept = [0, int(best[i])]
        alone = alone._replace(spatial=alone.spatial[:, kept], spatial_codes=alone.spatial_codes[kept])
        torch.testing.assert_close(seen[i : i + 1], attention(frame(), alone), atol=1e-5, rtol=1e-4)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_every_parameter_gets_a_gradient(attention: str) -> None:
    module = make_attention(MEMORY.replace(attention=attention))
    (module(frame(), memories()) * table("weights", (2, DIM, GRID, GRID))).sum().backward()
    silent = {name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == set()


def test_parameters_of_the_published_configuration() -> None:
    with building_on(torch.device("meta")):
        sizes = [
            sum(p.numel() for p in EfficientMemoryAttention(Sam3Config(), memory).parameters())
            for memory in (EfficientMemoryConfig(), EfficientMemoryConfig(mlp_dim=2048))
        ]
    assert sizes == [2_107_392, 3_158_016]


def test_heads_divide_the_width() -> None:
    with pytest.raises(ValueError, match="width 64 is no multiple of 5 heads"):
        make_attention(MEMORY.replace(num_heads=5))
