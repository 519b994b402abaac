"""Which weights stay: exactly the largest ones, whatever the values, their type and how they lie in memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_distopt.sparsity import selection
from lightning_distopt.sparsity.selection import DISTRIBUTIONS, Distribution, largest, pruned_count, shares, smallest

SHAPES = [(3, 4, 2, 2), (7,), (1,), (5, 6), (40, 3)]


def expected(values: list[Tensor], k: int) -> list[np.ndarray]:
    """The masks by NumPy's stable sort: of equal values, the first ones go."""
    flat = np.concatenate([v.double().numpy().ravel() for v in values])
    mask = np.ones(len(flat))
    mask[np.argsort(flat, kind="stable")[:k]] = 0
    ends = np.cumsum([v.numel() for v in values])[:-1]
    return [part.reshape(v.shape) for part, v in zip(np.split(mask, ends), values, strict=True)]


def draw(kind: str, seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    if kind == "ties":
        values = [(4 * v).round() for v in values]
    elif kind == "equal":
        values = [torch.full_like(v, 0.5) for v in values]
    elif kind == "zeros":
        values = [v * (v > 0.8) for v in values]
    elif kind == "skewed":  # the layers differ by orders of magnitude
        values = [v * 10.0**-n for n, v in enumerate(values)]
    elif kind == "infinite":
        values = [torch.where(v > 0.9, math.inf, v) for v in values]
    return [v.to(dtype) for v in values]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "zeros", "skewed", "infinite"])
def test_exactly_the_smallest_go(kind: str, dtype: torch.dtype) -> None:
    for seed in range(2):
        values = draw(kind, seed, dtype)
        total = sum(v.numel() for v in values)
        for k in (0, 1, 2, total // 3, total // 2, int(0.9 * total), total - 1, total):
            masks = smallest(values, k)
            for mask, wanted, v in zip(masks, expected(values, k), values, strict=True):
                assert mask.dtype == dtype and mask.shape == v.shape
                np.testing.assert_array_equal(mask.double().numpy(), wanted)


@pytest.mark.parametrize("sample", [2, 8, 64])
@pytest.mark.parametrize("chunk", [5, 1000])
def test_whatever_the_sample_brackets(sample: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_BRACKET_SAMPLE", sample)
    monkeypatch.setattr(selection, "_CHUNK", chunk)
    for seed in range(2):
        values = [v.sort().values for v in draw("skewed" if seed % 2 else "ties", seed, torch.float32)]
        total = sum(v.numel() for v in values)
        for k in range(1, total, 11):
            for mask, wanted in zip(smallest(values, k), expected(values, k), strict=True):
                np.testing.assert_array_equal(mask.numpy(), wanted)


def test_a_sample_unlike_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_BRACKET_SAMPLE", 100)
    values = torch.arange(10_000.0)
    values[::101] = 1e6  # what a sample at distances of 101 sees
    looked: list[int] = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts, *rest: looked.append(sum(map(len, parts))) or cat(parts, *rest))
    (mask,) = smallest([values], 500)
    assert looked[-1] == 10_000  # all were candidates
    np.testing.assert_array_equal(mask.numpy(), expected([values], 500)[0])


def test_many_values_need_few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(500, 1000, generator=torch.Generator().manual_seed(0))
    looked: list[int] = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts, *rest: looked.append(sum(map(len, parts))) or cat(parts, *rest))
    (mask,) = largest([values], 0.9)
    np.testing.assert_array_equal(mask.numpy(), expected([values.abs()], 450_000)[0])
    assert looked[-1] < 0.02 * values.numel()


@pytest.mark.parametrize("exact", [True, False])
def test_other_layouts_in_memory(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exact:
        monkeypatch.setattr(selection, "_SAMPLE", 100)
    plain = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    (wanted,) = largest([plain], 0.7, exact=exact)
    for values in (
        plain.to(memory_format=torch.channels_last),
        plain.transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack([plain, plain], dim=-1)[..., 0],
        plain.clone().requires_grad_(),
    ):
        (mask,) = largest([values], 0.7, exact=exact)
        if exact:
            assert torch.equal(mask, wanted)
        assert not mask.requires_grad
        if values.stride()[-1] != 2:  # a product with a mask of another layout is slower
            assert mask.stride() == values.stride()
    one = torch.randn(6, 4, 1, 1).to(memory_format=torch.channels_last)
    assert int(largest([one], 0.5)[0].sum()) == 12


def test_ties_in_another_layout_are_broken_once() -> None:
    values = torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last)
    for k in range(25):
        (mask,) = smallest([values], k)
        assert int(mask.sum()) == 24 - k


def test_values_stay_as_they_are() -> None:
    values = [torch.randn(100), torch.randn(3, 5)]
    copies = [v.clone() for v in values]
    largest(values, 0.5)
    assert all(torch.equal(v, c) for v, c in zip(values, copies, strict=True))


def test_more_than_all_can_not_go() -> None:
    with pytest.raises(ValueError, match="There are 3 values, of which the 4 smallest can't be taken"):
        smallest([torch.ones(3)], 4)


@pytest.mark.parametrize("sparsity", [0.3, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["normal", "layers of other scales", "kernels with large centres"])
def test_sampled_density(sparsity: float, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_SAMPLE", 1 << 18)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(256, 256, 3, 3, generator=generator), torch.randn(1024, 512, generator=generator)]
    weights += [torch.randn(64, 32, 3, 3, generator=generator) for _ in range(10)]
    if kind == "layers of other scales":
        weights = [w * 0.5**n for n, w in enumerate(weights)]
    elif kind == "kernels with large centres":
        for w in weights:
            if w.dim() == 4:
                w[..., 1, 1] *= 5
    masks = largest(weights, sparsity, exact=False)
    total = sum(m.numel() for m in masks)
    zeros = total - sum(int(m.sum()) for m in masks)
    assert abs(zeros / total - sparsity) < 4 * math.sqrt(sparsity * (1 - sparsity) / 2**18)  # standard errors
    assert zeros != pruned_count(sparsity, total) or sparsity > 0.9
    # All that stay are larger than all that go.
    kept = min(float(w.abs()[m > 0].min()) for w, m in zip(weights, masks, strict=True) if m.any())
    gone = max(float(w.abs()[m == 0].max()) for w, m in zip(weights, masks, strict=True) if not m.all())
    assert kept > gone


def test_few_values_are_never_sampled() -> None:
    weights = draw("random", 0, torch.float32)
    exact, sampled = largest(weights, 0.5), largest(weights, 0.5, exact=False)
    assert all(torch.equal(a, b) for a, b in zip(exact, sampled, strict=True))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("filters", [False, True])
def test_counts_of_all_layers_add_up(distribution: Distribution, filters: bool) -> None:
    if filters and distribution == "erk":
        with pytest.raises(ValueError, match="says nothing of whole filters: use 'global' or 'layer'"):
            largest([torch.ones(4, 4)], 0.5, distribution, filters)
        return
    random = np.random.default_rng(0)
    for seed in range(20):
        torch.manual_seed(seed)
        weights = [torch.randn(*random.integers(1, 9, size=random.integers(2, 5))) for _ in range(random.integers(1, 6))]
        sparsity = float(random.uniform(0, 1))
        masks = largest(weights, sparsity, distribution, filters)
        if filters:
            assert all(len(set(m[k].reshape(-1).tolist())) == 1 for m in masks for k in range(len(m)))  # whole ones
            zeros, total = sum(int((m.reshape(len(m), -1)[:, 0] == 0).sum()) for m in masks), sum(map(len, weights))
        else:
            zeros, total = sum(int((m == 0).sum()) for m in masks), sum(w.numel() for w in weights)
        assert zeros == math.floor(sparsity * total + 0.5)


def test_layers_lose_the_same_part() -> None:
    sizes = [(3, 7), (16, 16), (1, 1), (64, 9)]
    for sparsity in (0.0, 0.1, 0.5, 0.95, 0.999):
        counts = shares(sizes, sparsity, "layer")
        assert all(abs(n - sparsity * math.prod(shape)) <= 1 for n, shape in zip(counts, sizes, strict=True))


def test_densities_of_erk() -> None:
    """Proportional to the sum of the dimensions over their product, but for layers that stay dense."""
    sizes: list[tuple[int, ...]] = [(16, 3, 3, 3), (64, 64, 3, 3), (128, 64, 3, 3), (256, 256, 1, 1)]
    counts = shares(sizes, 0.9, "erk")
    assert sum(counts) == pruned_count(0.9, sum(map(math.prod, sizes)))
    assert counts[0] == 0  # it would be over 1
    scale = [(1 - n / math.prod(shape)) * math.prod(shape) / sum(shape) for n, shape in zip(counts[1:], sizes[1:], strict=True)]
    assert max(scale) / min(scale) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("distribution", "wanted"),
    [("global", [4, 0]), ("layer", [2, 2])],
)
def test_global_and_layerwise_differ(distribution: Any, wanted: list[int]) -> None:
    small, large = torch.tensor([[0.1, -0.2, 0.3, -0.4]]), torch.tensor([[1.0, -2.0, 3.0, -4.0]])
    masks = largest([small, large], 0.5, distribution)
    assert [int((m == 0).sum()) for m in masks] == wanted
