"""Battery 1: every algorithm equals the papers' equations; 5: its invariants; its traffic is what the formula says."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from tests.conformance.cases import CASES
from tests.conformance.problems import LAYOUTS, Quadratic, all_rows, fit_quadratic, quadratic_gradients
from tests.oracles import local_sgd as oracle

STEPS = 14
ETAS = [0.2] * 5 + [0.1] * 4 + [0.0] + [0.05] * 4  # a decay, and a zero


def start() -> np.ndarray:
    module = Quadratic(ETAS).double()
    return np.concatenate([p.detach().numpy().ravel() for p in module.parameters()])


def runs() -> list:
    return [(case, n, layout) for case in CASES for n in case.sizes for layout in LAYOUTS[n]]


@functools.cache
def simulated_bytes(name: str, n: int) -> list[int]:
    """Return what each replica sends where all are in one process."""
    (case,) = (case for case in CASES if case.name == name)
    return fit_quadratic(0, 1, n, case, ETAS)["traffic"]["bytes_by_row"]


@pytest.mark.parametrize(("case", "n", "layout"), runs(), ids=lambda value: str(value).replace(" ", ""))
def test_equals_the_equations(ranks, case, n, layout):
    m, world_size = layout
    results = ranks.run(world_size, fit_quadratic, m, case, ETAS)
    expected = case.oracle(start(), quadratic_gradients(n, STEPS, 2), ETAS, n, oracle.SGD(0.9, 0.01), None)
    np.testing.assert_allclose(all_rows(results).numpy(), expected, rtol=0, atol=1e-10)
    assert all(result["traffic"]["rounds"] == case.rounds(STEPS) for result in results)
    sent = [one for result in results for one in result["traffic"]["bytes_by_row"]]
    assert sent == simulated_bytes(case.name, n)
    assert all(one > 0 for one in sent)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", [(2, 2), (1, 4)], ids=str)
def test_equals_the_equations_with_adam_clipping_and_accumulation(ranks, case, layout):
    """With a replica on each rank, and with several on several; the simulation of all is equal to these elsewhere."""
    m, world_size = layout
    options = {"optimizer": "adam", "gradient_clip_val": 0.7, "accumulate_grad_batches": 2, "batch_size": 1}
    results = ranks.run(world_size, fit_quadratic, m, case, ETAS, **options)
    gradients = quadratic_gradients(4, STEPS, 2)  # two batches of one sample accumulate to one of two
    expected = case.oracle(start(), gradients, ETAS, 4, oracle.Adam(), 0.7)
    np.testing.assert_allclose(all_rows(results)[1::2].numpy(), expected, rtol=0, atol=1e-10)


def test_traffic_of_local_sgd_is_that_of_its_all_reduces(ranks):
    case = next(case for case in CASES if case.name == "local_sgd")
    sent = ranks.run(4, fit_quadratic, 1, case, ETAS)[0]["traffic"]["bytes_sent"]
    d = 16  # 6 + 2 parameters in float64, each padded to 64 bytes
    assert sent == (STEPS // 3) * 2 * 3 * d * 8 // 4


@pytest.mark.parametrize("case", [case for case in CASES if case.preserves_mean], ids=str)
def test_the_mean_of_replicas_moves_by_their_mean_step_alone(case):
    """mean x_{t+1} = mean x_t - eta mean_k g_k(x^k_t): no round, block or schedule moves the mean."""
    n = 4
    rows = all_rows([fit_quadratic(0, 1, n, case, ETAS, optimizer="plain")]).numpy()
    gradient = quadratic_gradients(n, STEPS, 2)
    for t in range(STEPS - 1):
        step = ETAS[t + 1] * np.mean([gradient(k, t + 1, rows[t, k]) for k in range(n)], axis=0)
        np.testing.assert_allclose(rows[t + 1].mean(axis=0), rows[t].mean(axis=0) - step, rtol=0, atol=1e-12)
