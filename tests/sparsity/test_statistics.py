"""What is said about masks: error, overlap, flips and history, against NumPy on random masks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from lightning_distopt.sparsity import statistics
from lightning_distopt.sparsity.dpf import DPF
from lightning_distopt.sparsity.pruner import Pruner
from lightning_distopt.sparsity.selection import DISTRIBUTIONS, Distribution, largest
from lightning_distopt.sparsity.statistics import LastFlips, SparsityHistory, flip_curve, overlap, pruning_error


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_error_is_the_equation_and_at_most_the_sparsity(distribution: Distribution) -> None:
    random = np.random.default_rng(0)
    for _ in range(60):
        weights = [random.standard_t(2, size=(4, n)) for n in random.integers(1, 20, size=3)]
        tensors = [torch.from_numpy(w) for w in weights]
        masks = largest(tensors, float(random.uniform(0, 1)), distribution)
        x = np.concatenate([w.ravel() for w in weights])
        m = np.concatenate([mask.numpy().ravel() for mask in masks])
        delta = pruning_error(tensors, masks)
        assert delta == pytest.approx(np.sum((x - m * x) ** 2) / np.sum(x**2), abs=1e-12)
        if distribution == "global":
            assert delta <= 1 - m.mean() + 1e-12


def test_error_at_its_ends() -> None:
    weights, ones = [torch.randn(5), torch.randn(2, 2)], [torch.ones(5), torch.ones(2, 2)]
    assert pruning_error(weights, ones) == 0.0
    assert pruning_error(weights, [0 * m for m in ones]) == 1.0
    assert pruning_error([torch.zeros(3)], [torch.zeros(3)]) == 0.0
    assert pruning_error([torch.full((10,), 1e-25)], [torch.zeros(10)]) == 1.0  # whose squares single precision loses


def test_overlap() -> None:
    random = np.random.default_rng(1)
    for _ in range(50):
        a, b = random.random((2, 3, 7)) < 0.4
        masks = [[torch.from_numpy(row.astype(np.float32)) for row in m] for m in (a, b)]
        assert overlap(*masks) == pytest.approx((a & b).sum() / (a | b).sum())
        assert overlap(masks[0], masks[0]) == 1.0 and overlap(*masks) == overlap(*reversed(masks))
    assert overlap([torch.zeros(3)], [torch.zeros(3)]) == 1.0
    assert overlap([torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 1.0])]) == 0.0


def test_flip_curve_of_a_pruner() -> None:
    """Against all masks that there have been."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    pruner = Pruner({"0": net[0], "1": net[1]}, DPF())
    seen = [np.concatenate([m.numpy().ravel().copy() for m in pruner.masks])]
    flips = LastFlips(pruner.masks)
    for step in range(8):
        with torch.no_grad():
            for w in pruner.weights:
                w.add_(0.2 * torch.randn_like(w))
        pruner.update(min(0.6, 0.1 * step))
        flips.add(pruner.masks)
        seen.append(np.concatenate([m.numpy().ravel().copy() for m in pruner.masks]))
    curve = flip_curve(flips.last, flips.updates)
    for u in range(9):
        changes = np.zeros(len(seen[0]), dtype=bool)
        for v in range(u + 1, 9):
            changes |= seen[v] != seen[v - 1]
        assert curve[u] == pytest.approx(changes.mean())
    assert curve[0] > 0.5 and curve[-1] == 0 and sorted(curve, reverse=True) == curve


def test_flip_curve_without_masks() -> None:
    assert flip_curve([], 0) == [0.0]
    assert flip_curve([torch.zeros(4, dtype=torch.int32)], 3) == [0.0] * 4


def _filled(updates: int) -> tuple[SparsityHistory, np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(2)
    history = SparsityHistory({"a": 1000, "b": 50})
    regrown, killed = random.integers(0, 3, size=(updates, 2)), random.integers(2, 4, size=(updates, 2))
    for k in range(updates):
        history.add(16 * k, *({"a": int(n[0]), "b": int(n[1]) % 2} for n in (regrown[k], killed[k])))
    regrown, killed = (np.stack([n[:, 0], n[:, 1] % 2], axis=1) for n in (regrown, killed))
    return history, regrown, killed, np.cumsum(killed - regrown, axis=0) / [1000, 50]


def test_history_is_what_has_been() -> None:
    history, regrown, killed, sparsity = _filled(20)
    assert history.steps == list(range(0, 320, 16))
    assert history.regrown == regrown.sum(1).tolist() and history.killed == killed.sum(1).tolist()
    np.testing.assert_allclose(history.sparsity, sparsity)


@pytest.mark.parametrize("updates", [9, 10, 11, 16, 17, 33, 40, 100, 101])
def test_a_long_history_is_thinned_and_loses_no_flip(updates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_RECORDS", 8)
    history, regrown, killed, sparsity = _filled(updates)
    assert 4 < len(history.steps) <= 9
    assert history.steps[-1] == 16 * (updates - 1)
    ends = [step // 16 for step in history.steps]
    stride = ends[1] - ends[0]
    assert {b - a for a, b in itertools.pairwise(ends[:-1])} == {stride}  # all but the last are equally long
    np.testing.assert_allclose(history.sparsity, sparsity[ends])
    for column, values in ((history.regrown, regrown), (history.killed, killed)):
        totals = values.sum(1).cumsum()[ends]
        assert np.cumsum(column).tolist() == totals.tolist()


def test_history_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_RECORDS", 8)
    for stop in range(1, 30, 3):
        whole, *_ = _filled(30)
        _, regrown, killed, _ = _filled(30)
        begun = SparsityHistory({"a": 1000, "b": 50})
        for k in range(30):
            if k == stop:
                state = begun.state_dict()
                begun = SparsityHistory({"a": 1000, "b": 50})
                begun.load_state_dict(state)
            begun.add(16 * k, *({"a": int(n[0]), "b": int(n[1])} for n in (regrown[k], killed[k])))
        assert (begun.steps, begun.sparsity, begun.regrown) == (whole.steps, whole.sparsity, whole.regrown)


def test_history_before_the_first_update() -> None:
    history = SparsityHistory({"a": 10})
    other = SparsityHistory({"a": 10})
    other.load_state_dict(history.state_dict())
    other.add(0, {"a": 0}, {"a": 5})
    assert other.sparsity == [[0.5]] and history.steps == []
