"""What rounding does to algorithms in single and in half precision: the oracles, in double precision, do not see it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_distopt.algorithms import (
    CHOCO,
    D2,
    DCD,
    DMSGD,
    DPSGD,
    DSGD,
    ECD,
    EFSign,
    GossipAlgorithm,
    GradientTracking,
    PowerGossip,
    PushSum,
    QuasiGlobal,
)
from lightning_distopt.communication import Communicator, Replicas
from lightning_distopt.topologies import make

N = 8


def moves(
    algorithm: GossipAlgorithm, steps: int, change: Callable[[int], Tensor | None], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Add `change(row)` to replicas that start equal, on a ring; returns start and end, `[n, d]`, and all that was added."""
    module = nn.Module()
    module.x = nn.Parameter(torch.randn(300, generator=torch.Generator().manual_seed(0)).to(dtype))
    replicas, communicator = Replicas(module, N), Communicator(N)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    replicas.attach_optimizers([optimizer])
    algorithm.plan().connect(make("ring", N)).setup(replicas, communicator)
    start, added = replicas.matrix().double(), torch.zeros(300, dtype=torch.float64)
    for step in range(steps):
        algorithm.before_step(step)
        for row in range(N):
            replicas.activate(row)
            if algorithm.transforms_gradients:
                module.x.grad = torch.zeros_like(module.x)
                replicas.collect_gradients()
        if algorithm.transforms_gradients:
            algorithm.transform_gradients(step)
        for row in range(N):
            replicas.activate(row)
            if (by := change(row)) is not None:
                before = module.x.detach().double()
                module.x.data.add_(by)
                added += (module.x.detach().double() - before) / N
        algorithm.after_step(step)
    return start, replicas.matrix().double(), added


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "algorithm",
    [
        *(DSGD(), DPSGD(), CHOCO(), CHOCO(compressor="qsgd:4"), DCD(), D2(), QuasiGlobal(), GradientTracking()),
        *(DMSGD(), DMSGD(2), EFSign(), PushSum(), PowerGossip()),
    ],
    ids=str,
)
def test_equal_replicas_stay_where_they_are(algorithm, dtype):
    """Without gradients nothing moves, to the last bit; DMSGD's first option by rounding errors that do not grow."""
    start, end, _ = moves(algorithm, 200, lambda row: None, dtype)
    rounds = isinstance(algorithm, DMSGD) and algorithm.option == 1 and dtype == torch.float32
    torch.testing.assert_close(end, start, rtol=0, atol=1e-5 if rounds else 0)


def test_extrapolation_does_not_round_what_it_adds_up():
    """ECD's estimates are those of a compressor, but in half precision they are not rounded twice."""
    start, end, _ = moves(ECD("identity"), 50, lambda row: None, torch.bfloat16)
    assert torch.equal(end, start)


@pytest.mark.parametrize("compressor", ["sign", "top_k:0.1", "qsgd:4"])
def test_the_mean_of_choco_is_preserved_over_thousands_of_steps(compressor):
    """In single precision too: sums of `x_hat` that are rounded on their own move it by 5e-4 here."""
    generator = torch.Generator().manual_seed(1)
    start, end, added = moves(CHOCO(compressor=compressor), 2000, lambda row: 1e-3 * torch.randn(300, generator=generator))
    off = (end.mean(dim=0) - start[0] - added).norm() / start[0].norm()
    assert off < 1e-5


@pytest.mark.parametrize("n", [3, 7])
def test_means_of_compressed_gradients_are_in_double_precision(n):
    """A third in single precision is off by 1e-8."""
    module = nn.Module()
    module.x = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    replicas, algorithm = Replicas(module, n), EFSign("identity")
    replicas.attach_optimizers([torch.optim.SGD(module.parameters(), lr=0.1)])
    algorithm.plan().setup(replicas, Communicator(n))
    for row in range(n):
        replicas.activate(row)
        module.x.grad = torch.ones_like(module.x)
        replicas.collect_gradients()
    algorithm.transform_gradients(0)
    gradients = replicas.gradients[0][:, :5]  # without padding
    torch.testing.assert_close(gradients, torch.ones_like(gradients), rtol=0, atol=1e-14)
