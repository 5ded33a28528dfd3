"""The resampler: how many tokens, what each of them reads, and that they know where things are."""

from __future__ import annotations

import pytest
import torch
from golden import table
from torch import Tensor

from sam3.efficient_memory_config import EfficientMemoryConfig, efficient_memory_preset
from sam3.model.building import building_on
from sam3.model.perceiver import PerceiverResampler, _windows

DIM, GRID = 16, 18
TINY = efficient_memory_preset("tiny")


def make_perceiver(memory: EfficientMemoryConfig = TINY) -> PerceiverResampler:
    torch.manual_seed(0)
    return PerceiverResampler(DIM, GRID, memory).eval()


def dense(batch: int = 2, grid: int = GRID) -> Tensor:
    return table("memory", (batch, DIM, grid, grid))


def num_parameters(memory: EfficientMemoryConfig) -> int:
    with building_on(torch.device("meta")):
        return sum(p.numel() for p in PerceiverResampler(64, 72, memory).parameters())


@pytest.mark.parametrize("num_latents", [16, 64, 256])
@pytest.mark.parametrize("num_latents_2d", [0, 16])
@torch.no_grad()
def test_latents_are_tokens(num_latents: int, num_latents_2d: int) -> None:
    perceiver = make_perceiver(TINY.replace(num_latents=num_latents, num_latents_2d=num_latents_2d))
    assert perceiver(dense()).shape == (2, num_latents + num_latents_2d, DIM)
    assert perceiver.latent_codes().shape == (num_latents + num_latents_2d, DIM)
    assert perceiver(dense(grid=12)).shape == (2, num_latents + num_latents_2d, DIM)


def test_default_compresses_81_times() -> None:
    assert 81 * efficient_memory_preset("sam3").num_tokens == 72 * 72
    assert efficient_memory_preset("sam3", "published").num_tokens == 320


def test_parameters_of_the_published_configurations() -> None:
    published = EfficientMemoryConfig().published()
    assert num_parameters(published) == 218_496
    assert num_parameters(published.replace(num_latents_2d=0)) == 202_112
    wide = published.replace(perceiver_heads=8, position_on_keys=True)
    assert [num_parameters(wide.replace(num_latents_2d=n)) for n in (0, 256)] == [726_400, 742_784]
    assert num_parameters(EfficientMemoryConfig()) == 202_112, "positions on keys need no weights at these widths"


def test_positions_of_another_width_are_projected() -> None:
    config = EfficientMemoryConfig(perceiver_heads=2)
    assert num_parameters(config) - num_parameters(config.replace(position_on_keys=False)) == 2 * 64 * 128


@torch.no_grad()
@pytest.mark.parametrize("kind", [{}, {"num_latents": 0, "num_latents_2d": 64}], ids=["global", "windows"])
def test_tokens_know_where_things_are(kind: dict[str, int]) -> None:
    """Defect 7.6 (7) of the published training."""
    memory = dense(1)
    order = torch.randperm(GRID * GRID, generator=torch.Generator().manual_seed(1))
    shuffled = memory.flatten(2)[..., order].unflatten(-1, (GRID, GRID))
    tokens, moved = (make_perceiver(TINY.replace(**kind))(m) for m in (memory, shuffled))
    assert (tokens - moved).abs().max() > 0.02
    blob = torch.zeros(1, DIM, GRID, GRID)
    blob[..., 2:5, 2:5] = 3 * table("blob", (DIM, 1, 1))
    here, there = (make_perceiver(TINY.replace(**kind))(m) for m in (blob, blob.roll((9, 9), (2, 3))))
    assert (here - there).abs().max() > 0.02


@torch.no_grad()
def test_published_global_tokens_do_not() -> None:
    """Defect: without positions on keys the tokens of any permutation of the cells are the same."""
    perceiver = make_perceiver(TINY.published().replace(num_latents_2d=0))
    memory = dense(1)
    order = torch.randperm(GRID * GRID, generator=torch.Generator().manual_seed(1))
    shuffled = memory.flatten(2)[..., order].unflatten(-1, (GRID, GRID))
    torch.testing.assert_close(perceiver(memory), perceiver(shuffled))


def test_codes_of_windows_are_their_places() -> None:
    codes = make_perceiver(TINY.replace(num_latents_2d=16)).latent_codes()
    assert not codes[: TINY.num_latents].any()
    assert len(codes[TINY.num_latents :].unique(dim=0)) == 16
    published = make_perceiver(TINY.replace(num_latents_2d=16, position_on_latents_2d=False))
    assert not published.latent_codes().any()


def test_a_window_token_reads_its_own_window() -> None:
    perceiver = make_perceiver(TINY.replace(num_latents=0, num_latents_2d=9))  # windows of 6 x 6 cells
    memory = dense(1).requires_grad_()
    perceiver(memory)[0, 5].square().sum().backward()  # row 1, column 2
    assert memory.grad is not None
    read = memory.grad[0].abs().sum(dim=0) > 0
    expected = torch.zeros(GRID, GRID, dtype=torch.bool)
    expected[6:12, 12:18] = True
    assert torch.equal(read, expected)


def test_windows_are_row_major() -> None:
    cells = torch.arange(24.0).view(1, 1, 4, 6)
    assert _windows(cells, 2)[:, :, 0].tolist() == [
        [0, 1, 2, 6, 7, 8],
        [3, 4, 5, 9, 10, 11],
        [12, 13, 14, 18, 19, 20],
        [15, 16, 17, 21, 22, 23],
    ]


@pytest.mark.parametrize("memory", [TINY, TINY.replace(num_latents_2d=16), TINY.replace(perceiver_heads=2)])
def test_every_parameter_gets_a_gradient(memory: EfficientMemoryConfig) -> None:
    perceiver = make_perceiver(memory)
    (perceiver(dense()) * table("weights", (2, memory.num_tokens, DIM))).sum().backward()
    assert [name for name, p in perceiver.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_dropout_acts_in_training_alone() -> None:
    memory = TINY.replace(hidden_dropout=0.3, attention_dropout=0.3)
    perceiver, x = make_perceiver(memory), dense()
    assert torch.equal(perceiver(x), perceiver(x))
    perceiver.train()
    assert not torch.equal(perceiver(x), perceiver(x))


BAD = {
    "no square": ({"num_latents_2d": 60}, "num_latents_2d 60 must be a square number"),
    "negative": ({"num_latents": -1}, "num_latents -1 must be at least 0"),
    "no layer": ({"perceiver_depth": 0}, "perceiver_depth 0 must be at least 1"),
    "pooled latents": ({"pool_size": 2}, "pool_size 2 averages neighbours on a grid, and 64 compressed tokens"),
    "attention": ({"attention": "fast"}, "attention 'fast' is not one of softmax, linear"),
    "initial frames": ({"initial_frames": "zeros"}, "initial_frames 'zeros' is not one of no_mem_embed, zero_token"),
    "dropout": ({"hidden_dropout": 1.0}, r"hidden_dropout 1.0 must be in 0\.\.1"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_impossible_settings(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EfficientMemoryConfig(**changes)


def test_misspelt_settings_are_refused() -> None:
    """D-113, 7.6 (6): the published constructor swallows them."""
    with pytest.raises(TypeError, match="dim_head"):
        EfficientMemoryConfig(dim_head=32)  # type: ignore[call-arg]


def test_unknown_compatibility() -> None:
    with pytest.raises(ValueError, match="compat 'edgetam' is not one of published"):
        efficient_memory_preset("sam3", "edgetam")


def test_a_resampler_needs_latents() -> None:
    with pytest.raises(ValueError, match="a resampler needs latents"):
        PerceiverResampler(DIM, GRID, TINY.replace(num_latents=0))
