from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightning_distopt.analysis import CurvatureOperator, Objective, estimate_trace
from tests.analysis.matrices import Matrix, classified, dense, entropy, networks, perceptron, symmetric

SKEWED = np.array([[1.0, 2.0, 0.0], [2.0, 1.0, 1.0], [0.0, 1.0, 3.0]])


def estimates(method: Any, seeds: int, **options: Any) -> tuple[np.ndarray, np.ndarray, float]:
    A = symmetric(networks(0, 60)["early"])
    found = [estimate_trace(Matrix(A), 30, method, seed=seed, progress=False, **options) for seed in range(seeds)]
    return np.array([t.mean for t in found]), np.array([t.standard_error for t in found]), float(np.trace(A))


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_unbiased_with_the_error_that_it_says(method: Any) -> None:
    means, errors, expected = estimates(method, 400)
    spread = means.std()
    assert abs(means.mean() - expected) < 4 * spread / 20
    np.testing.assert_allclose(np.sqrt((errors**2).mean()), spread, rtol=0.15)


def test_hutch_plus_plus_is_more_precise() -> None:
    assert estimates("hutch++", 40)[1].mean() < 0.3 * estimates("hutchinson", 40)[1].mean()


def test_samples() -> None:
    operator = Matrix(symmetric(networks(1, 40)["early"]))
    for method, products, count in (("hutchinson", 20, 20), ("hutch++", 21, 7), ("hutch++", 20, 8)):
        found = estimate_trace(operator, products, method, progress=False)  # type: ignore[arg-type]
        assert (len(found.samples), found.products) == (count, products)
        assert found.mean == found.samples.mean()
        assert found.standard_error == pytest.approx(found.samples.std(ddof=1) / count**0.5, rel=1e-12)
    assert operator.products == 61
    exact = estimate_trace(operator, 150, progress=False)  # the sketch holds all of it
    np.testing.assert_allclose(exact.samples, np.trace(operator.values), atol=1e-10)


def test_a_stop_at_an_error_is_unbiased() -> None:
    """While stopping as soon as the samples agree is not, as the second half shows."""
    exact, means, naive = np.trace(SKEWED), [], []
    for seed in range(500):
        found = estimate_trace(Matrix(SKEWED), 60, "hutchinson", error=0.3, seed=seed, progress=False)
        assert 2 <= len(found.samples) == found.products - 10
        means.append(found.mean)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (2000, 60, 3))
    for samples in np.einsum("nsi,ij,nsj->ns", signs, SKEWED, signs):
        stops = (n for n in range(2, 61) if samples[:n].std(ddof=1) <= 0.3 * n**0.5 * abs(samples[:n].mean()))
        naive.append(samples[: next(stops, 60)].mean())
    assert abs(np.mean(means) - exact) < 4 * np.std(means) / len(means) ** 0.5
    assert abs(np.mean(naive) - exact) > 8 * np.std(naive) / len(naive) ** 0.5


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_reaches_the_error(method: Any) -> None:
    A = Matrix(symmetric(networks(1, 40)["early"]))
    found = estimate_trace(A, 20000, "hutchinson", error=0.05, progress=False)
    assert found.products < 20000 and found.standard_error < 0.1 * abs(found.mean)
    least = estimate_trace(A, 400, method, error=1e3, progress=False)
    assert len(least.samples) == 2


@pytest.mark.parametrize("products", [16, 17, 20, 30, 33])
def test_few_products_leave_samples_besides_those_that_tell_how_many(products: int) -> None:
    found = estimate_trace(Matrix(symmetric(networks(1, 40)["early"])), products, error=1e-9, progress=False)
    assert found.products == products and len(found.samples) >= 2
    assert found.standard_error == pytest.approx(found.samples.std(ddof=1) / len(found.samples) ** 0.5, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"products": 1, "method": "hutchinson"}, "takes 2 products at least"),
        ({"products": 5}, "takes 6 products at least"),
        ({"products": 15, "error": 0.1}, "takes 16 products at least"),
        ({"products": 30.0}, "`products` must be a whole number"),
        ({"products": 11, "method": "hutchinson", "error": 0.1}, "takes 12 products at least"),
        ({"error": 0}, "`error` must be"),
        ({"method": "hutch"}, "`method` must be"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        estimate_trace(Matrix(SKEWED), **options)


def test_ranks(ranks: Any) -> None:
    torch.manual_seed(1)
    net = perceptron()
    f = classified(net, (4,))

    def samples(rank: int, world_size: int) -> np.ndarray:
        operator = CurvatureOperator(Objective(net, entropy, f.batches[rank::world_size], reduce=dist.all_reduce))
        return estimate_trace(operator, 40, error=0.2, progress=False).samples

    expected = estimate_trace(CurvatureOperator(f), 40, error=0.2, progress=False)
    for found in ranks.run(2, samples):
        np.testing.assert_allclose(found, expected.samples, rtol=0, atol=1e-10)
    assert abs(expected.mean - np.trace(dense(f))) < 5 * expected.standard_error
