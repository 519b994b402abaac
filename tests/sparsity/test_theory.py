"""What chapter 6 of the thesis proves about dynamic pruning with feedback, on quadratics, as they are trained here."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from lightning_distopt.sparsity.dpf import DPF
from lightning_distopt.sparsity.pruner import Pruner
from lightning_distopt.sparsity.schedule import cubic_sparsity
from lightning_distopt.sparsity.selection import largest


class Quadratic:
    """`f(x) = (x - a)^T A (x - a) / 2`, whose minimum is 0."""

    def __init__(self, d: int, condition: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
        eigenvalues = torch.linspace(1.0, condition, d, dtype=torch.float64)
        self.a = torch.randn(d, generator=generator, dtype=torch.float64)
        self.matrix = basis @ torch.diag(eigenvalues) @ basis.T
        self.smoothness = condition

    def __call__(self, x: Tensor) -> Tensor:
        return 0.5 * (x - self.a) @ self.matrix @ (x - self.a)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8, 0.95])
def test_pruning_loses_no_more_than_its_error_costs(sparsity: float) -> None:
    # (15.1): f(x^) - f* <= 2 (f(x) - f*) + delta L ||x||^2, for any x
    generator = torch.Generator().manual_seed(1)
    for seed in range(50):
        f = Quadratic(20, condition=10.0 ** (seed % 3), seed=seed)
        x = f.a + 10.0 ** (seed % 5 - 2) * torch.randn(20, generator=generator, dtype=torch.float64)
        (mask,) = largest([x], sparsity)
        pruned = mask * x
        delta = (x - pruned).square().sum() / x.square().sum()
        assert 0 <= delta <= sparsity
        assert f(pruned) <= (2 * f(x) + delta * f.smoothness * x.square().sum()) * (1 + 1e-12)


@pytest.mark.parametrize(("sparsity", "period"), [(0.0, 1), (0.3, 16), (0.5, 1), (0.8, 16)])
def test_gradients_at_pruned_weights_are_as_small_as_theorem_6_5_2_says(sparsity: float, period: int) -> None:
    # 1/(T+1) sum ||grad f(x^_t)||^2 <= 2 (f_0 - f*) / (gamma (T+1)) + L gamma G^2 + L^2/(T+1) sum ||e_t||^2; for exact
    # gradients it holds of every run, with the mean of ||grad f(x^_t)||^2 in place of G^2.
    steps, f = 200, Quadratic(30, condition=10.0, seed=3)
    layer = nn.Linear(30, 1, bias=False, dtype=torch.float64)
    start = torch.randn(30, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    layer.weight.data.copy_(start)
    pruner = Pruner({"layer": layer}, DPF())
    (dense,) = pruner.weights
    gamma = 1 / (f.smoothness * math.sqrt(steps))
    squares, errors = [], []
    for step in range(steps):
        if sparsity and step % period == 0:
            pruner.update(cubic_sparsity(step / (0.75 * steps), sparsity))
        seen = layer.weight[0]
        errors.append((seen - dense[0]).square().sum().item())
        f(seen).backward()
        squares.append(dense.grad.square().sum().item())
        with torch.no_grad():
            dense -= gamma * dense.grad
        dense.grad = None
    mean = sum(squares) / steps
    bound = 2 * f(start).item() / (gamma * steps) + f.smoothness * gamma * mean + f.smoothness**2 * sum(errors) / steps
    assert mean <= bound
    if sparsity == 0:
        assert sum(errors) == 0
    else:
        assert sum(errors) > 0
        assert int((layer.weight == 0).sum()) == round(30 * sparsity)


def test_pruned_weights_that_grow_come_back() -> None:
    # f(x) = ||x - (1, 1.2)||^2 / 2 at half sparsity: what is pruned keeps being pulled towards its optimum, overtakes the
    # other, and takes its place; the support alternates, and dense weights drift beyond the optimum.
    layer = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    layer.weight.data.copy_(torch.tensor([[0.5, 0.1]]))
    pruner = Pruner({"layer": layer}, DPF())
    (dense,) = pruner.weights
    target = torch.tensor([[1.0, 1.2]], dtype=torch.float64)
    supports = []
    for step in range(320):
        if step % 16 == 0:
            pruner.update(0.5)
            supports.append(int(pruner.masks[0].argmax()))
        (0.5 * (layer.weight - target).square().sum()).backward()
        with torch.no_grad():
            dense -= 0.02 * dense.grad
        dense.grad = None
    assert supports[0] == 0 and set(supports) == {0, 1}
    changes = sum(a != b for a, b in itertools.pairwise(supports))
    assert changes > 10
    assert (dense.detach() > target).all()
