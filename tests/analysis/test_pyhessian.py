from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightning_distopt.analysis import CurvatureOperator, Objective, hessian_spectrum
from tests.analysis.matrices import classified, dense, ends, entropy, perceptron

pytest.importorskip("pyhessian")

from lightning_distopt.analysis._pyhessian import _Trace, hutchinson, power_iteration


def objective(scale: float = 1.0, **options: Any) -> Objective:
    torch.manual_seed(1)
    net = perceptron().double()
    f = classified(net, (4,), size=30)
    return Objective(net, lambda net, batch: scale * entropy(net, batch), f.batches, **options)


def test_eigenvalues() -> None:
    f = objective()
    operator = CurvatureOperator(f)
    found = power_iteration(operator, 3, tol=1e-9, max_products=3000, progress=False)
    expected = ends(np.linalg.eigvalsh(dense(f)), 3, "LM")
    np.testing.assert_allclose(found.values, expected, rtol=1e-6)
    assert found.products == operator.products and found.errors.max() < 1e-8
    np.testing.assert_allclose(found.vectors @ found.vectors.T, np.eye(3), atol=1e-10)


def test_flat_models_have_the_eigenvalues_of_others() -> None:
    """Upstream adds 1e-6 to norms, which shortens the vectors of flat models."""
    one = power_iteration(CurvatureOperator(objective()), 3, progress=False)
    flat = power_iteration(CurvatureOperator(objective(1e-9)), 3, progress=False)
    np.testing.assert_allclose(flat.values, 1e-9 * one.values, rtol=1e-3)
    biased = _Trace(CurvatureOperator(objective(1e-9)))  # whose products are what they are
    _, vectors = biased.eigenvalues(top_n=1)
    assert sum(float((v**2).sum()) for v in vectors[0]) < 1e-3  # of a vector that should have length one


def test_nothing_but_products() -> None:
    f = objective()
    f.module.train()
    entropy(f.module, f.batches[0]).backward()
    gradients = [p.grad.clone() for p in f.module.parameters()]
    before = torch.get_rng_state()
    found = hessian_spectrum(f, k=2, trace=6, engine="pyhessian", per_layer=True, progress=False)
    assert torch.get_rng_state().equal(before) and f.module.training
    assert all(p.grad.equal(g) for p, g in zip(f.module.parameters(), gradients, strict=True))
    assert found.which == "LM" and found.layers.keys() == {"0", "2"}


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_trace_never_stops_early(sign: float) -> None:
    """Upstream returns after the second sample where the running trace is negative."""
    f = objective(sign)
    found = hutchinson(CurvatureOperator(f), 60, progress=False)
    assert len(found.samples) == found.products == 60
    assert abs(found.mean - np.trace(dense(f))) < 4 * found.standard_error


def test_other_ends_are_refused() -> None:
    with pytest.raises(ValueError, match="largest magnitude only"):
        hessian_spectrum(objective(), which="SA", engine="pyhessian")


def test_ranks(ranks: Any) -> None:
    f = objective()

    def values(rank: int, world_size: int) -> np.ndarray:
        operator = CurvatureOperator(Objective(f.module, entropy, f.batches[rank::world_size], reduce=dist.all_reduce))
        return power_iteration(operator, 2, progress=False).values

    expected = power_iteration(CurvatureOperator(f), 2, progress=False).values
    for found in ranks.run(2, values):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)
