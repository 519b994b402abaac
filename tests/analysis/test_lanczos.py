from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightning_distopt.analysis import CurvatureOperator, Objective, lanczos, lobpcg
from lightning_distopt.analysis.lanczos import KrylovBasis
from tests.analysis.matrices import Matrix, classified, dense, ends, entropy, networks, perceptron, symmetric
from tests.oracles.curvature import krylov_eigenvalues

TOL = 1e-3


@pytest.mark.parametrize("which", ["LA", "SA", "BE", "LM"])
def test_stops_within_the_tolerance(which: Any) -> None:
    """In 99 % of all runs, and after few products: false convergence is rare, not impossible."""
    errors, products = [], []
    for seed in range(12):
        for name, eigenvalues in networks(seed).items():
            if which in ("SA", "BE") and name == "decay":  # its lower end takes all products there are
                continue
            found = lanczos(Matrix(eigenvalues), 5, which, TOL, seed=seed, progress=False)
            assert found.converged
            expected = ends(eigenvalues, 5, which)
            errors.append(np.max(np.abs(found.values - expected) / np.abs(expected)))
            products.append(found.products)
    assert np.mean(np.array(errors) <= TOL) >= 0.99 - 1 / len(errors)
    assert np.median(products) < {"LA": 18, "SA": 50, "BE": 35, "LM": 20}[which]


@pytest.mark.parametrize("tol", [1e-2, 1e-5, 1e-8])
def test_tolerance(tol: float) -> None:
    eigenvalues = networks(3)["early"]
    errors = []
    for seed in range(10):
        found = lanczos(Matrix(symmetric(eigenvalues, seed)), 5, tol=tol, seed=seed, progress=False)
        errors.append(np.max(np.abs(found.values - ends(eigenvalues, 5, "LA")) / found.values))
    assert max(errors) <= tol


def test_a_small_network() -> None:
    f = classified(perceptron(), (4,), size=30)
    H = dense(f)
    for which in ("LA", "SA", "BE", "LM"):
        found = lanczos(CurvatureOperator(f), 4, which, 1e-6, vectors=True, progress=False)
        np.testing.assert_allclose(found.values, ends(np.linalg.eigvalsh(H), 4, which), rtol=1e-6)
        y = found.vectors.numpy()
        np.testing.assert_allclose(y @ y.T, np.eye(4), atol=1e-12)
        np.testing.assert_allclose(np.linalg.norm(y @ H - found.values[:, None] * y, axis=1), found.residuals, atol=1e-12)


def test_basis_equals_the_krylov_space() -> None:
    H, v = symmetric(networks(1, 60)["early"]), np.random.default_rng(1).normal(size=60)
    values, weights = krylov_eigenvalues(H, v, 12)
    for reorthogonalize in (True, False):
        basis = KrylovBasis(Matrix(H), torch.Generator(), torch.from_numpy(v), reorthogonalize)
        for _ in range(12):
            basis.step()
        theta, s = basis.ritz()
        np.testing.assert_allclose(theta, values, atol=1e-10 if reorthogonalize else 1e-3)
        if reorthogonalize:
            np.testing.assert_allclose(s[0] ** 2, weights, atol=1e-10)


def test_stays_orthogonal() -> None:
    basis = KrylovBasis(Matrix(networks(2)["wide"]), torch.Generator().manual_seed(0))
    for _ in range(80):
        basis.step()
    V = basis.combine(np.eye(80)).numpy()
    np.testing.assert_allclose(V @ V.T, np.eye(80), atol=1e-13)


@pytest.mark.parametrize("which", ["LA", "SA", "BE", "LM"])
@pytest.mark.parametrize(
    "eigenvalues",
    [[3, 3, 3, 1, 1, 1, 1, 1], [0] * 6, [2] * 7, [5, *[0] * 30], [-5, 2, *[0] * 30], [1, 2], [-3, -2, 7, 7, 1], [4]],
    ids=str,
)
def test_invariant_subspaces(eigenvalues: list[float], which: Any) -> None:
    """Multiplicities too, for then the vectors run into an invariant subspace."""
    values = np.array(eigenvalues, dtype=float)
    found = lanczos(Matrix(symmetric(values)), 3, which, progress=False)
    np.testing.assert_allclose(found.values, ends(values, min(3, len(values)), which), atol=1e-12)
    assert found.converged and found.products <= len(values)


def test_single_precision() -> None:
    eigenvalues = networks(4)["early"]
    found = lanczos(Matrix(eigenvalues, torch.float32), 5, progress=False)
    np.testing.assert_allclose(found.values, ends(eigenvalues, 5, "LA"), rtol=TOL)
    flat = lanczos(Matrix(1e-12 * eigenvalues, torch.float32), 5, progress=False)
    np.testing.assert_allclose(flat.values, 1e-12 * found.values, rtol=1e-5)
    assert flat.products == found.products


def test_gives_up_with_a_sentence() -> None:
    with pytest.warns(UserWarning, match=r"^9 products were not enough to be sure of 5 eigenvalues within 0.001"):
        found = lanczos(Matrix(networks(0)["early"]), 5, max_products=9, progress=False)
    assert not found.converged and found.products == 9
    with pytest.warns(UserWarning, match="products were not enough"):
        assert not lobpcg(Matrix(networks(0)["decay"]), 5, max_products=30, progress=False).converged


def test_does_not_touch_the_random_streams() -> None:
    before = torch.get_rng_state()
    one, two = (lanczos(Matrix(networks(0)["early"]), 3, seed=7, progress=False) for _ in range(2))
    assert torch.get_rng_state().equal(before)
    assert one.values.tolist() == two.values.tolist()


@pytest.mark.parametrize("which", ["LA", "SA"])
def test_lobpcg(which: Any) -> None:
    pytest.importorskip("scipy")
    eigenvalues = np.concatenate([[9, 9, 9, 5, -4, -4, -3, -0.5], np.linspace(-0.1, 0.1, 150)])
    operator = Matrix(symmetric(eigenvalues))
    found = lobpcg(operator, 4, which, 1e-8, progress=False)
    np.testing.assert_allclose(found.values, ends(eigenvalues, 4, which), rtol=1e-8, atol=1e-9)
    assert found.products == operator.products and found.converged
    again = lobpcg(operator, 4, which, 1e-8, start=found.vectors, progress=False)
    np.testing.assert_allclose(again.values, found.values, rtol=1e-7, atol=1e-9)
    assert again.products <= found.products
    whole = lobpcg(Matrix(symmetric(np.arange(5.0))), 2, which, progress=False)
    np.testing.assert_allclose(whole.values, ends(np.arange(5.0), 2, which), atol=1e-12)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"k": 0}, "`k` must be"),
        ({"k": 2.0}, "`k` must be"),
        ({"which": "top"}, "`which` must be"),
        ({"tol": 0}, "`tol` must be"),
        ({"max_products": 5}, "`max_products` must be more"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], sentence: str) -> None:
    for solver in (lanczos, lobpcg):
        with pytest.raises(ValueError, match=sentence):
            solver(Matrix(np.ones(9)), **options)
    with pytest.raises(ValueError, match="LOBPCG finds one end"):
        lobpcg(Matrix(np.ones(9)), which="BE")  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [2, 4])  # the fourth rank has no batch
def test_ranks(ranks: Any, world: int) -> None:
    torch.manual_seed(1)
    net = perceptron()
    f = classified(net, (4,))

    def values(rank: int, world_size: int) -> list[np.ndarray]:
        operator = CurvatureOperator(Objective(net, entropy, f.batches[rank::world_size], reduce=dist.all_reduce))
        return [solver(operator, 3, tol=1e-6, progress=False).values for solver in (lanczos, lobpcg)]

    expected = [solver(CurvatureOperator(f), 3, tol=1e-6, progress=False).values for solver in (lanczos, lobpcg)]
    for found in ranks.run(world, values):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)
