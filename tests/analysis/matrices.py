"""Matrices as operators, spectra like those of networks, and dense second derivatives by autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_distopt.analysis import Objective


class Matrix:
    """A symmetric matrix, or a diagonal, that counts products."""

    def __init__(self, values: Any, dtype: torch.dtype = torch.float64) -> None:
        self.values = torch.as_tensor(np.asarray(values), dtype=dtype)
        self.dim, self.dtype, self.device, self.products = len(self.values), dtype, self.values.device, 0

    def matvec(self, vector: torch.Tensor) -> torch.Tensor:
        self.products += 1
        vector = vector.to(self.dtype)
        return self.values * vector if self.values.dim() == 1 else self.values @ vector

    def agreed(self, condition: bool) -> bool:
        return condition


def symmetric(eigenvalues: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return a dense matrix with these eigenvalues."""
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues), len(eigenvalues))))[0]
    return (Q * eigenvalues) @ Q.T


def networks(seed: int, d: int = 500) -> dict[str, np.ndarray]:
    """Return eigenvalues like those of networks: most near zero, with some outliers, pairs of them, and a negative end."""
    rng = np.random.default_rng(seed)

    def most() -> np.ndarray:
        sizes = np.abs(rng.normal(size=d)) ** 3 * 0.01
        return np.where(rng.random(d) < 0.3, -0.3 * sizes, sizes)

    def with_outliers(*outliers: float) -> np.ndarray:
        return np.concatenate([outliers, most()[len(outliers) :]])

    return {
        "classes": with_outliers(*rng.uniform(1, 20, 9)),
        "pairs": with_outliers(10, 9.9, 5, 4.95, 4.9, -0.5, -0.49),
        "early": with_outliers(*10 * 0.75 ** np.arange(12), *-(0.75 ** np.arange(6))),
        "decay": np.concatenate([10 / np.arange(1.0, d // 2), -1 / np.arange(1.0, d - d // 2 + 2)]),
        "wide": with_outliers(100, 10, 1, 0.5, 0.3, -0.2),
    }


def ends(eigenvalues: np.ndarray, k: int, which: str) -> np.ndarray:
    """Return the wanted ones in falling order."""
    falling = np.sort(eigenvalues)[::-1]
    if which == "LM":
        return np.sort(falling[np.argsort(-np.abs(falling))[:k]])[::-1]
    upper = {"LA": k, "SA": 0, "BE": (k + 1) // 2}[which]
    return np.concatenate([falling[:upper], falling[len(falling) - (k - upper) :]])


def dense(objective: Objective) -> np.ndarray:
    """Return the Hessian, entry by entry, from `torch.autograd.functional` on the loss of all samples at once."""

    def loss(vector: torch.Tensor) -> torch.Tensor:
        place = objective.tensors(vector)
        total = sum(
            size * objective.batch_loss(batch, place) for size, batch in zip(objective.sizes, objective.batches, strict=True)
        )
        return total / objective.samples

    with objective.session():
        matrix = torch.autograd.functional.hessian(loss, objective.vector())
    return matrix.numpy()


def matrix_of(operator: Any) -> np.ndarray:
    """Return the matrix, column by column."""
    eye = torch.eye(operator.dim, dtype=operator.dtype)
    return torch.stack([operator.matvec(column) for column in eye]).numpy().T


def entropy(net: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def classified(net: nn.Module, shape: tuple[int, ...], classes: int = 3, size: int = 7, **options: Any) -> Objective:
    """Return the cross entropy of random samples, in batches of three, the last smaller."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(size, *shape, generator=generator, dtype=torch.float64)
    y = torch.randint(0, classes, (size,), generator=generator)
    return Objective(net.double(), entropy, list(zip(x.split(3), y.split(3), strict=True)), **options)


class Sequence(nn.Module):
    """Attention over a recurrent layer, which no fused kernel may compute here."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(2, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = self.recurrent(x)[0]
        return self.head(self.attention(states, states, states, need_weights=False)[0].mean(dim=1))


class Fused(nn.Module):
    """Attention by torch's function, which picks a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(2, 12), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.mix(x)[:, None].chunk(3, dim=-1)
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0].mean(dim=1))


def conv() -> nn.Module:
    """Return a network with batch norm that has seen data."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
    net(torch.randn(9, 1, 4, 4).double() * 2 + 1)
    return net


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
