"""Moments follow their weights' memory layout through a checkpoint."""

from __future__ import annotations

import copy

import torch
from torch import nn

from sam3_train.config import training_defaults
from sam3_train.learner import _in_layout_of
from sam3_train.optim import build_optimizer, load_optimizer_state, parameter_groups


def make_pair() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    network = nn.Conv2d(3, 4, 3)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    train = training_defaults().TRAIN
    return network, build_optimizer(parameter_groups(network, 0.01), train, torch.device("cpu"))


def step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    network(images.contiguous(memory_format=torch.channels_last)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_channels_last_weight_continues_with_its_own_moments():
    """Found by killing runs: moments stored in C order met a weight in another order inside the fused kernel."""
    network, optimizer = make_pair()
    step(network, optimizer)
    resumed, fresh = make_pair()
    resumed.load_state_dict(network.state_dict())
    stored = copy.deepcopy(optimizer.state_dict())
    for values in stored["state"].values():
        for name, value in values.items():
            values[name] = value.contiguous()
    load_optimizer_state(fresh, stored, "a checkpoint")
    for parameter, values in fresh.state.items():
        assert values["exp_avg"].stride() == parameter.stride()
    step(network, optimizer)
    step(resumed, fresh)
    for mine, theirs in zip(resumed.parameters(), network.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_gradients_get_the_strides_of_their_parameters():
    """Of a depthwise kernel torch may give (9, 1, 3, 1) for (9, 9, 3, 1), which DDP takes for another layout."""
    kernel = torch.nn.Parameter(torch.zeros(4, 1, 3, 3))
    values = torch.arange(36.0).view(4, 1, 3, 3)
    odd = values.as_strided((4, 1, 3, 3), (9, 1, 3, 1))
    assert odd.is_contiguous() and odd.stride() != kernel.stride()
    settled = _in_layout_of(kernel)(odd)
    assert settled.stride() == kernel.stride() and torch.equal(settled, values)
    assert _in_layout_of(kernel)(values) is values
