"""Algorithms in a plain loop, in one process: the order of hooks that a strategy keeps, without Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distopt.algorithms import GossipAlgorithm
from lightning_distopt.communication import Communicator, Replicas
from lightning_distopt.topologies import make


class Quadratics:
    """f_i(x) = 1/2 sum_k a_ik (x_k - c_ik)^2, another for each replica."""

    def __init__(self, n: int, d: int = 3, seed: int = 0, noise: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.a = 0.5 + torch.rand(n, d, generator=generator, dtype=torch.float64)
        self.c = 2 * torch.randn(n, d, generator=generator, dtype=torch.float64)
        self.noise, self.n, self.d = noise, n, d

    def gradient(self, i: int, t: int, x: Tensor) -> Tensor:
        drawn = torch.randn(self.d, generator=torch.Generator().manual_seed(1000 * t + i), dtype=torch.float64)
        return self.a[i] * (x - self.c[i]) + self.noise * drawn

    @property
    def optimum(self) -> Tensor:
        """Of the mean of all f_i."""
        return (self.a * self.c).sum(dim=0) / self.a.sum(dim=0)

    def fixed_point(self, matrix: Tensor, eta: float) -> Tensor:
        """Solve X = W (X - eta A (X - C)), for each coordinate by itself: `[n, d]`."""
        points = []
        for a, c in zip(self.a.T, self.c.T, strict=True):
            step = eta * matrix @ torch.diag(a)
            points.append(torch.linalg.solve(torch.eye(self.n, dtype=torch.float64) - matrix + step, step @ c))
        return torch.stack(points, dim=1)


def run(
    algorithm: GossipAlgorithm,
    topology: Any,
    problem: Quadratics,
    steps: int,
    eta: float | Callable[[int], float] = 0.05,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    watch: Callable[[int], None] | None = None,
    before_round: Callable[[], None] | None = None,
) -> Tensor:
    """Train; returns the iterates `[steps + 1, n, d]`, those of the start first. `watch` is called after each step."""
    module = nn.Module()
    module.x = nn.Parameter(torch.ones(problem.d, dtype=torch.float64))
    replicas, communicator = Replicas(module, problem.n), Communicator(problem.n)
    made = optimizer(list(module.parameters())) if optimizer else torch.optim.SGD(module.parameters(), lr=1.0)
    replicas.attach_optimizers([made])
    algorithm.check_optimizers([made])
    algorithm.plan(algorithm.gossip_steps)
    algorithm.connect(make(topology, problem.n, algorithm.column_stochastic))
    algorithm.setup(replicas, communicator)
    history = [replicas.matrix()]
    for t in range(steps):
        made.param_groups[0]["lr"] = eta(t) if callable(eta) else eta
        algorithm.before_step(t)
        for row in reversed(range(problem.n)):
            replicas.activate(row)
            module.x.grad = problem.gradient(row, t, module.x.detach())
            if algorithm.transforms_gradients:
                replicas.collect_gradients()
        if algorithm.transforms_gradients:
            algorithm.transform_gradients(t)
        for row in reversed(range(problem.n)):
            replicas.activate(row)
            algorithm.before_update()
            made.step()
            algorithm.after_update()
        if before_round is not None:
            before_round()
        algorithm.after_step(t)
        history.append(replicas.matrix(algorithm.iterates()))
        if watch is not None:
            watch(t)
    return torch.stack(history)
