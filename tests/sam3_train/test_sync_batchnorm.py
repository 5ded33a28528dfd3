"""BatchNorm over the ranks of a gloo group equals BatchNorm over the whole batch in one process (D-51)."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from sam3_train.replicas import convert_sync_batchnorm
from sam3_train.sync_batchnorm import GlobalBatchNorm2d, synchronized


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    nn.init.uniform_(network[1].weight, 0.5, 1.5)
    return network


def make_batch() -> torch.Tensor:
    return 5.0 + torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def run_rank(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    network = make_network()
    assert convert_sync_batchnorm(network, torch.device("cpu")) == 1
    # Ranks of unequal size: the statistics must weigh images, not ranks.
    part = make_batch()[:4] if rank == 0 else make_batch()[4:]
    network.train()
    loss = network(part).square().sum()
    loss.backward()
    gradients = [p.grad.clone() for p in network.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
    torch.save({"gradients": gradients, "buffers": [b.clone() for b in network.buffers()]}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_process_at_the_same_global_batch(tmp_path):
    """Gradients, running statistics and the count of batches."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(run_rank, (port, str(tmp_path)), nprocs=2, start_method="fork")
    network = make_network().train()
    network(make_batch()).square().sum().backward()
    for rank in (0, 1):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for own, other in zip(network.parameters(), result["gradients"], strict=True):
            torch.testing.assert_close(other, own.grad, rtol=1e-10, atol=1e-10)
        for own, other in zip(network.buffers(), result["buffers"], strict=True):
            torch.testing.assert_close(other, own, rtol=1e-12, atol=1e-12)


def test_names_values_and_eval_mode_do_not_change():
    plain, converted = make_network(), make_network()
    convert_sync_batchnorm(converted, torch.device("cpu"))
    assert isinstance(converted[1], GlobalBatchNorm2d)
    assert plain.state_dict().keys() == converted.state_dict().keys()
    assert convert_sync_batchnorm(converted, torch.device("cpu")) == 0, "converting twice changes nothing"
    batch = make_batch()
    assert torch.equal(plain.eval()(batch), converted.eval()(batch))
    assert torch.equal(plain.train()(batch), converted.train()(batch)), "one process needs no collective"


def test_a_norm_with_extra_work_is_refused():
    class NormAct(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    with pytest.raises(ValueError, match="NormAct cannot be synchronised on cpu"):
        synchronized(NormAct(2), torch.device("cpu"))
