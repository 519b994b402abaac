"""A module with a convex quadratic loss, as a function that NumPy knows too, and a network with all that real ones have."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_distopt.analysis import Objective
from tests.conformance.problems import Augmented, SmallNet


class Linear(nn.Module):
    """f(x) = mean_i (a_i^T x - y_i)^2 / 2 with x = (a matrix of two filters, a vector)."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(2, 3, generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(2, generator=generator, dtype=torch.float64))

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        return a @ torch.cat([self.weight.flatten(), self.bias])


def numbers(size: int = 11) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    return rng.normal(size=(size, 8)), rng.normal(size=size)


def squares(net: nn.Module, batch: Any) -> torch.Tensor:
    return (net(batch[0]) - batch[1]).square().mean() / 2


def linear(part: slice = slice(None), size: int = 11, **options: Any) -> Objective:
    """Return the objective on some of the batches of four, the last of three."""
    a, y = (torch.from_numpy(values) for values in numbers(size))
    batches = list(zip(a.split(4), y.split(4), strict=True))[part]
    return Objective(Linear(), squares, batches, **options)


def entropy(net: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def accuracy(net: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    return {"accuracy": (net(batch[0]).argmax(dim=1) == batch[1]).double().mean()}


def small_net(seed: int = 1) -> nn.Module:
    """Return a net with batch norm, dropout, tied and frozen parameters whose running statistics have seen data."""
    torch.manual_seed(seed)
    net = SmallNet().double()
    net.train()
    with torch.no_grad():
        net(1.0 + seed * Augmented().x)
    return net.eval()


def images(net: nn.Module, part: slice = slice(None), **options: Any) -> Objective:
    data = Augmented(23)
    batches = list(zip(data.x.split(5), data.y.split(5), strict=True))[part]
    return Objective(net, entropy, batches, metrics=accuracy, **options)


def state_of(net: nn.Module) -> dict[str, Any]:
    """Return copies of everything that an analysis could disturb."""
    return {
        "state": {key: value.clone() for key, value in net.state_dict().items()},
        "modes": [child.training for child in net.modules()],
        "grad": [None if p.grad is None else p.grad.clone() for p in net.parameters()],
        "needed": [p.requires_grad for p in net.parameters()],
        "random": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
    }


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)
