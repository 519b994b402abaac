"""The consensus distance, its estimate, and the bounds of chapter 5: closed forms, and a decentralized run that obeys them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_distopt.algorithms.consensus import (
    consensus_distance,
    consensus_estimate,
    critical_distance,
    squared_distances,
    typical_distance,
)
from lightning_distopt.communication import Communicator, Neighbourhood, add_weighted, all_reduce_bytes
from lightning_distopt.topologies import Chain, Complete, Exponential, Ring, SocialNetwork, Star, Topology, Torus

GRAPHS = [Ring(4), Ring(8), Ring(32), Torus(16), Star(6), Chain(5), Complete(5), SocialNetwork(32), Exponential(16)]


def distance(x: torch.Tensor) -> float:
    return float(consensus_distance([x], Communicator(len(x))))


def estimate(x: torch.Tensor, matrix: torch.Tensor) -> float:
    return float(consensus_estimate((matrix @ x - x).square().sum(dim=1), Communicator(len(x))))


def directions(graph: Topology) -> list[torch.Tensor]:
    """Return iterates of which some are as bad as can be: random ones, and what the matrix contracts least."""
    n = graph.num_replicas
    generator = torch.Generator().manual_seed(1)
    _, vectors = torch.linalg.eigh((graph.matrix() + graph.matrix().T) / 2)
    of_second, of_last = vectors[:, [n - 2]], vectors[:, [0]]
    return [torch.randn(n, 7, generator=generator, dtype=torch.float64), of_second, of_last]


# ------------------------------------------------------------------------------------------------------------ closed forms
def test_distance_of_points_on_a_line():
    # 0, 1, ..., n - 1: the variance of a discrete uniform variable
    for n in (1, 2, 5, 16):
        x = torch.arange(n, dtype=torch.float64)[:, None]
        assert distance(x) == pytest.approx(((n**2 - 1) / 12) ** 0.5, abs=1e-14)


def test_distance_of_half_precision_and_long_rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2**18 + 5, generator=generator)  # more than a piece
    exact = (x.double() - x.mean(dim=0).double()).square().sum(dim=1)
    torch.testing.assert_close(squared_distances([x], [x.mean(dim=0)]), exact, rtol=1e-6, atol=0)  # differences are rounded
    halves = x.bfloat16()
    assert distance(halves) == pytest.approx(distance(halves.double()), rel=1e-2)  # the mean is one of halves


def measured(rank, world_size, m):
    communicator = Communicator(m)
    x = torch.arange(4 * 6, dtype=torch.float64).view(4, 6).square()[list(communicator.local_replicas)]
    blocks = [x[:, :4].contiguous(), x[:, 4:].contiguous()]
    before = [block.clone() for block in blocks]
    moved = torch.tensor([float(i) for i in communicator.local_replicas])
    results = [
        consensus_distance(blocks, communicator),
        consensus_distance(blocks, communicator, [communicator.average(block) for block in blocks]),
        consensus_estimate(moved, communicator),
    ]
    traffic = communicator.traffic.state_dict()
    communicator.close()
    assert all(torch.equal(one, other) for one, other in zip(blocks, before, strict=True))
    return [float(result) for result in results], traffic["evaluation_bytes"], traffic["bytes_sent"]


@pytest.mark.parametrize("layout", [(4, 1), (2, 2), (1, 4)], ids=str)
def test_in_every_layout(ranks, layout):
    m, world_size = layout
    x = np.arange(24.0).reshape(4, 6) ** 2
    xi = np.sqrt(np.mean(np.sum((x - x.mean(axis=0)) ** 2, axis=1)))
    for values, evaluation_bytes, bytes_sent in ranks.run(world_size, measured, m):
        assert values == pytest.approx([xi, xi, 1.5**0.5], rel=1e-13)
        # Twice the mean of 4 + 2 values, and three numbers, in doubles.
        assert evaluation_bytes == 2 * (all_reduce_bytes(4, 8, 4) + all_reduce_bytes(2, 8, 4)) + 3 * all_reduce_bytes(1, 8, 4)
        assert bytes_sent == 0


def test_estimate_is_what_a_gossip_step_measures():
    n, graph = 8, Ring(8)
    x = torch.randn(n, 11, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    hood = Neighbourhood.of_matrix(range(n), graph.matrix())
    expected = estimate(x, graph.matrix())
    moved = add_weighted(x, hood, x, measure=True)
    assert float(consensus_estimate(moved, Communicator(n))) == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------------------------------------------------------ Xi against Theta
@pytest.mark.parametrize("graph", GRAPHS, ids=repr)
def test_bounds_of_the_estimate(graph):
    matrix, p = graph.matrix(), graph.contraction
    for x in directions(graph):
        xi, theta = distance(x), estimate(x, matrix)
        assert xi <= 2 / p * theta * (1 + 1e-12)  # lemma 14.1.1
        assert theta <= 2 * xi * (1 + 1e-12)


@pytest.mark.parametrize("graph", [g for g in GRAPHS if g.symmetric], ids=repr)
def test_the_worst_case_is_the_second_eigenvector(graph):
    values, vectors = torch.linalg.eigh(graph.matrix())
    second = float(values[-2])
    x = vectors[:, [-2]]
    assert distance(x) / estimate(x, graph.matrix()) == pytest.approx(1 / (1 - second), rel=1e-9)
    # Lemma 14.1.3, which the bound rests on: every |1 - lambda_i| >= 1 - (1 - p)^(1/2) >= p/2.
    p = graph.contraction
    assert float((1 - values[:-1]).abs().min()) >= 1 - (1 - p) ** 0.5 - 1e-12 >= p / 2 - 2e-12


# --------------------------------------------------------------------------------------------------------- gossip steps
@pytest.mark.parametrize("graph", [Ring(4), Ring(32), Torus(16), Star(6), Chain(5), SocialNetwork(32)], ids=repr)
def test_repeated_gossip_contracts_by_its_rate(graph):
    # ||W^k X - X_bar||^2 = (1-p)^k ||X - X_bar||^2 for the eigenvector of the largest |lambda|, at most that for others.
    values, vectors = torch.linalg.eigh(graph.matrix())
    largest = max(range(len(values) - 1), key=lambda k: abs(values[k]))
    p = graph.contraction
    worst, other = vectors[:, [largest]], directions(graph)[0]
    start = distance(worst), distance(other)
    for k in range(1, 6):
        worst, other = graph.matrix() @ worst, graph.matrix() @ other
        assert (distance(worst) / start[0]) ** 2 == pytest.approx((1 - p) ** k, rel=1e-9)
        assert (distance(other) / start[1]) ** 2 <= (1 - p) ** k * (1 + 1e-9)


def decentralized(graph: Topology, noise: float, eta: float, steps: int = 200) -> tuple[list[float], list[float]]:
    """Train quadratics with D-SGD from a common start; returns Xi_t^2 and phi_t^2, over independent copies of the noise."""
    n, d, copies = graph.num_replicas, 5, 400
    rng = np.random.default_rng(4)
    W = graph.matrix().numpy()
    A, c = rng.uniform(0.3, 1.0, (n, 1, d)), rng.normal(size=(n, 1, d))
    X = np.zeros((n, copies, d))
    xis, phis = [], []
    for _ in range(steps):
        xis.append(np.mean(np.sum((X - X.mean(axis=0)) ** 2, axis=2)))
        gradient = A * (X - c)
        phis.append(np.mean(np.sum(gradient**2, axis=2)))
        # E ||noise||^2 = sigma^2
        stochastic = gradient + rng.normal(size=X.shape) * noise / d**0.5
        X = np.einsum("ij,jkd->ikd", W, X - eta * stochastic)
    return xis, phis


@pytest.mark.parametrize("noise", [0.0, 3.0])
@pytest.mark.parametrize("graph", [Ring(8), Torus(9), Star(5)], ids=repr)
def test_a_run_obeys_the_recursion_and_the_typical_distance(graph, noise):
    p, eta = graph.contraction, 0.05
    xis, phis = decentralized(graph, noise, eta)
    for xi, phi, following in zip(xis, phis, xis[1:], strict=False):
        # Lemma 14.3.2, with a margin for the 400 copies that stand for the expectation.
        bound = (1 - p / 2) * xi + 3 * (1 - p) * eta**2 / p * (phi + p * noise**2)
        assert following <= bound * 1.05
    assert max(xis) > 0
    assert max(xis) ** 0.5 <= typical_distance(eta, max(phis) ** 0.5, noise, p, steady=True) * 1.05


def test_typical_distance_sums_the_recursion():
    eta, phi, noise, p = 0.3, 2.0, 1.5, 0.2
    xi = 0.0
    for _ in range(1000):
        xi = (1 - p / 2) * xi + 3 * (1 - p) * eta**2 / p * (phi**2 + p * noise**2)
    assert xi**0.5 == pytest.approx(typical_distance(eta, phi, noise, p, steady=True), rel=1e-12)
    # phi_t^2 = (1 + p/4)^-t: at most twice that, in terms of the last phi
    xi, squares = 0.0, [(1 + p / 4) ** (-t) for t in range(400)]
    for square in squares:
        xi = (1 - p / 2) * xi + 3 * (1 - p) * eta**2 / p * (square + p * 0)
    last = squares[-1] ** 0.5
    assert typical_distance(eta, last, 0.0, p, steady=True) < xi**0.5 <= typical_distance(eta, last, 0.0, p)


def test_critical_distance():
    assert critical_distance(0.0, 4.0, 2.0, 1.0, 8) ** 2 == pytest.approx(16 / (8 * 4))
    assert critical_distance(0.1, 0.0, 2.0, 3.0, 8) ** 2 == pytest.approx(0.1 * 9 / (2 * 8))
    both = critical_distance(0.1, 4.0, 2.0, 3.0, 8) ** 2
    assert both == pytest.approx(16 / (8 * 4) + 0.1 * 9 / (2 * 8))


def test_learning_rate_that_keeps_the_noise_below_the_critical_distance():
    n, smoothness, p, noise = 16, 3.0, 1e-6, 2.0  # small p: all but a millionth of 1 - p
    for steady, constant in ((True, 6), (False, 12)):
        eta = p / (n * smoothness * constant)
        typical, critical = typical_distance(eta, 0, noise, p, steady), critical_distance(eta, 0, smoothness, noise, n)
        assert typical == pytest.approx(critical, rel=1e-5)
        printed = 1.5 * eta  # 4C in place of 6C
        assert typical_distance(printed, 0, noise, p, steady) > 1.2 * critical_distance(printed, 0, smoothness, noise, n)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: critical_distance(-0.1, 1, 1, 1, 2), "`lr` must not be negative; got -0.1"),
        (lambda: critical_distance(0.1, 1, 0, 1, 2), "`smoothness` must be above 0"),
        (lambda: critical_distance(0.1, 1, 1, 1, 0), "`replicas` at least 1"),
        (lambda: typical_distance(0.1, 1, float("nan"), 0.5), "`noise` must not be negative; got nan"),
        (lambda: typical_distance(0.1, 1, 1, 0.0), "`contraction` must be above 0 and at most 1; got 0.0"),
        (lambda: typical_distance(0.1, 1, 1, 1.5), "`contraction` must be above 0"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
