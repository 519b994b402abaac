from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightning_distopt.analysis import CurvatureOperator, Objective, spectral_density
from tests.analysis.matrices import Matrix, classified, entropy, networks, perceptron, symmetric
from tests.oracles.curvature import krylov_eigenvalues

A = symmetric(networks(2, 90)["early"])


def integral(found: Any, order: int = 0) -> float:
    return float((found.values * found.grid**order).sum() * (found.grid[1] - found.grid[0]))


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_moments(reorthogonalize: bool) -> None:
    found = spectral_density(Matrix(A), 30, 3, reorthogonalize=reorthogonalize, progress=False)
    generator = torch.Generator().manual_seed(0)
    probes = [(torch.randint(0, 2, (90,), generator=generator) * 2.0 - 1).double().numpy() / 90**0.5 for _ in range(3)]
    for order in (0, 1, 2, 3):
        exact = np.mean([v @ np.linalg.matrix_power(A, order) @ v for v in probes])
        assert found.moment(order) == pytest.approx(exact, rel=1e-10)
    assert found.products == 90
    # of the picture: the second moment of the Gaussians comes on top
    assert integral(found) == pytest.approx(1, abs=1e-8)
    assert integral(found, 1) == pytest.approx(found.moment(1), abs=1e-7)
    assert integral(found, 2) == pytest.approx(found.moment(2) + found.width**2, abs=1e-6)
    assert found.values.min() >= 0


def test_traces_in_expectation() -> None:
    found = spectral_density(Matrix(A), 3, 400, progress=False)
    assert found.moment(1) == pytest.approx(np.trace(A) / 90, rel=0.1)
    assert found.moment(2) == pytest.approx(np.trace(A @ A) / 90, rel=0.1)


def test_quadrature_equals_the_oracle() -> None:
    found = spectral_density(Matrix(A), 10, 1, progress=False)
    v = (torch.randint(0, 2, (90,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1).double().numpy()
    nodes, weights = krylov_eigenvalues(A, v, 10)
    np.testing.assert_allclose(found.nodes, nodes, atol=1e-10)
    np.testing.assert_allclose(found.weights, weights, atol=1e-10)
    gaussians = np.exp(-((found.grid[:, None] - nodes) ** 2) / (2 * found.width**2)) / (found.width * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(found.values, gaussians @ weights, atol=1e-9)


def test_ends_with_an_invariant_subspace() -> None:
    found = spectral_density(Matrix(np.array([2.0, 2.0, 2.0, -1.0])), 20, 2, progress=False)
    np.testing.assert_allclose(found.nodes, [-1, 2, -1, 2], atol=1e-12)
    np.testing.assert_allclose(found.weights, np.array([0.25, 0.75, 0.25, 0.75]) / 2, atol=1e-12)
    for constant in (0.0, 3.0):
        flat = spectral_density(Matrix(np.full(6, constant)), 5, 1, progress=False)
        assert flat.products == 1 and integral(flat) == pytest.approx(1, abs=1e-8)


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the vectors, `steps` are kept with reorthogonalisation, and else none beside the last ones."""
    from lightning_distopt.analysis.lanczos import KrylovBasis

    kept: list[int] = []
    step = KrylovBasis.step
    monkeypatch.setattr(KrylovBasis, "step", lambda self: (step(self), kept.append(sum(len(b) for b in self._blocks)))[0])
    spectral_density(Matrix(A), 32, 2, progress=False)
    assert max(kept) == 32
    kept.clear()
    spectral_density(Matrix(A), 32, 2, reorthogonalize=False, progress=False)
    assert max(kept) == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 0}, "`steps` must be"),
        ({"steps": 10.5}, "`steps` must be"),
        ({"probes": 0}, "`probes` must be"),
        ({"width": 0}, "`width` must be"),
        ({"points": 50}, "must resolve"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        spectral_density(Matrix(A), **options)


def test_ranks(ranks: Any) -> None:
    torch.manual_seed(1)
    net = perceptron()
    f = classified(net, (4,))

    def values(rank: int, world_size: int) -> np.ndarray:
        operator = CurvatureOperator(Objective(net, entropy, f.batches[rank::world_size], reduce=dist.all_reduce))
        return spectral_density(operator, 10, 2, progress=False).values

    expected = spectral_density(CurvatureOperator(f), 10, 2, progress=False).values
    for found in ranks.run(4, values):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
