"""Every topology: matrices, edges, rates, and the closed forms of the thesis and of the literature."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import subprocess
import sys

import networkx as nx
import pytest
import torch

from lightning_distopt.topologies import (
    TOPOLOGIES,
    BipartiteExponential,
    Complete,
    ErdosRenyi,
    Exponential,
    Grid,
    Hypercube,
    OnePeerExponential,
    RandomMatching,
    Ring,
    SocialNetwork,
    Star,
    Topology,
    Torus,
    make,
)
from tests.topologies.cases import CASES, SIZES, Alternating, all_topologies, possible

ALL = pytest.mark.parametrize("topology", all_topologies(), ids=repr)


def steps_of(topology: Topology) -> range:
    return range(2 * topology.period) if topology.period is not None else range(20)


# ------------------------------------------------------------------------------------------------------ what all share


@ALL
def test_matrices_are_doubly_stochastic_and_agree_with_weights_and_edges(topology):
    n = topology.num_replicas
    for t in steps_of(topology):
        matrix = topology.matrix(t)
        assert matrix.shape == (n, n)
        assert matrix.dtype == torch.float64
        assert matrix.min() >= 0
        torch.testing.assert_close(matrix.sum(dim=0), torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(matrix.sum(dim=1), torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-12)
        assert not topology.symmetric or torch.equal(matrix, matrix.T)
        for i in range(n):
            weights = topology.weights(i, t)
            assert list(weights) == sorted({i, *topology.neighbors(i, t)})
            assert all(matrix[i, j] == weight for j, weight in weights.items())
            others = [j for j in range(n) if j != i]
            assert topology.neighbors(i, t) == [j for j in others if matrix[i, j] > 0]
            assert topology.listeners(i, t) == [j for j in others if matrix[j, i] > 0]
            assert topology.degree(i, t) == len(topology.listeners(i, t)) <= topology.max_degree


@ALL
def test_whether_static_and_symmetric_is_what_the_matrices_are(topology):
    matrices = [topology.matrix(t) for t in steps_of(topology)]
    assert topology.static == all(torch.equal(matrix, matrices[0]) for matrix in matrices)
    assert topology.symmetric == all(torch.equal(matrix, matrix.T) for matrix in matrices)
    if topology.period is not None:
        assert all(torch.equal(m, matrices[t % topology.period]) for t, m in enumerate(matrices))
    topology.validate()


@ALL
def test_consensus_distance_falls_at_least_as_the_contraction_says(topology):
    n, period = topology.num_replicas, topology.period or 1
    start = x = torch.randn(n, 200, dtype=torch.float64)
    distance = float((x - x.mean(dim=0)).square().sum())
    for t in range(3 * period):
        x = topology.matrix(t) @ x
    torch.testing.assert_close(x.mean(dim=0), start.mean(dim=0), rtol=0, atol=1e-13)
    after = float((x - x.mean(dim=0)).square().sum())
    expected = (1 - topology.contraction) ** (3 * period) * distance
    slack = 2 if topology.period is None else 1 + 1e-9  # a random one keeps to it in expectation
    assert after <= slack * expected + 1e-20


@pytest.mark.parametrize("topology", [t for t in all_topologies() if t.period is not None], ids=repr)
def test_contraction_is_tight(topology):
    n, period = topology.num_replicas, topology.period
    product = torch.eye(n, dtype=torch.float64)
    for t in range(period):
        product = topology.matrix(t) @ product
    # The worst direction is the first right singular vector of what is left of the product beside the mean.
    worst = torch.linalg.svd(product - 1 / n).Vh[0]
    ratio = float((product @ worst - worst.mean()).square().sum() / (worst - worst.mean()).square().sum()) if n > 1 else 0.0
    assert (1 - topology.contraction) ** period == pytest.approx(ratio, abs=1e-12)
    if topology.static and topology.symmetric:
        assert topology.contraction == pytest.approx(1 - (1 - topology.spectral_gap) ** 2, abs=1e-12)


@ALL
def test_steps_to_reach_all_are_those_of_powers_of_the_graph(topology):
    n = topology.num_replicas
    for first in (0, 1, 5):
        reached, rounds = torch.eye(n, dtype=torch.bool), torch.full((n,), -1)
        for s in range(100):
            rounds[(rounds < 0) & reached.all(dim=0)] = s  # column j: whom information from j has reached
            reached = (topology.matrix(first + s) > 0).double() @ reached.double() > 0
        assert [topology.steps_to_reach_all(j, first) for j in range(n)] == rounds.tolist()


@ALL
def test_bytes_are_messages_times_their_size(topology):
    n = topology.num_replicas
    steps = range(topology.period) if topology.period is not None else range(400)
    messages = [[topology.degree(i, t) for i in range(n)] for t in steps]
    sent = [sum(of_i) / len(steps) for of_i in zip(*messages, strict=True)]
    mean, busiest = topology.bytes_per_step(100)
    assert mean == pytest.approx(100 * sum(sent) / n)
    assert busiest == pytest.approx(100 * max(sent), rel=1e-12 if topology.period is not None else 0.2)


@ALL
def test_copies_and_what_is_returned_do_not_share(topology):
    for copied in (pickle.loads(pickle.dumps(topology)), copy.deepcopy(topology)):
        assert repr(copied) == repr(topology)
        assert torch.equal(copied.matrix(3), topology.matrix(3))
    before = topology.weights(0)
    topology.weights(0).clear()
    topology.listeners(0).append(-1)
    assert topology.weights(0) == before
    assert -1 not in topology.listeners(0)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_impossible_sizes_are_refused_in_a_sentence(name):
    for n in SIZES:
        if not possible(name, n):
            with pytest.raises(ValueError, match=r"use '\w+'"):
                make(name, n)


def test_one_and_two_replicas():
    for name, n in CASES:
        if n <= 2:
            topology = make(name, n)
            assert torch.equal(topology.matrix(), torch.full((n, n), 1 / n, dtype=torch.float64)), name
            assert topology.static
            assert topology.contraction == topology.spectral_gap == 1


# ------------------------------------------------------------------------------------------------------ the thesis


@pytest.mark.parametrize(
    ("n", "ring", "torus"), [(4, "0.67", "0.67"), (16, "0.05", "0.4"), (36, "0.01", "0.2"), (64, "0.003", "0.12")]
)
def test_table_4_2(n, ring, torus):
    def printed(gap: float, like: str) -> str:
        return f"{gap:.{len(like) - 2}f}"

    assert printed(Ring(n).spectral_gap, ring) == ring
    assert printed(Torus(n).spectral_gap, torus) == torus
    assert Complete(n).spectral_gap == 1
    assert (Ring(n).max_degree, Torus(n).max_degree) == (2, 2 if n == 4 else 4)
    assert Complete(n).max_degree == n - 1  # the thesis prints "d"


@pytest.mark.parametrize("n", [3, 4, 5, 16, 31, 64])
def test_gap_of_the_ring(n):
    gap = 2 / 3 * (1 - math.cos(2 * math.pi / n))
    assert Ring(n).spectral_gap == pytest.approx(gap, abs=1e-12)


@pytest.mark.parametrize("side", [4, 6, 8])
def test_gap_of_the_torus(side):
    gap = 2 / 5 * (1 - math.cos(2 * math.pi / side))
    assert Torus(side**2).spectral_gap == pytest.approx(gap, abs=1e-12)


def test_four_replicas_on_a_torus_are_a_ring_with_weights_of_a_third():
    assert Torus(4).weights(0) == pytest.approx({0: 1 / 3, 1: 1 / 3, 2: 1 / 3})
    assert Torus(6).weights(0) == pytest.approx({0: 1 / 4, 1: 1 / 4, 2: 1 / 4, 3: 1 / 4})  # 2 x 3: a prism


def test_the_southern_women():
    network = SocialNetwork(32)
    degrees = [network.degree(i) for i in range(32)]
    assert sum(degrees) == 2 * 89
    assert max(degrees) == network.max_degree == 14
    assert all(j >= 18 for i in range(18) for j in network.neighbors(i))  # women attend events, and events are attended
    assert network.spectral_gap == pytest.approx(0.0821, abs=5e-5)
    assert network.contraction == pytest.approx(0.157, abs=1e-3)


@pytest.mark.parametrize(("n", "left"), [(16, 0.653), (32, 0.641)])
def test_a_cycle_of_the_bipartite_exponential_graph(n, left):
    topology = BipartiteExponential(n)
    assert [topology.neighbors(1, t) for t in range(topology.period)] == [[2**k] for k in range(1, topology.period + 1)]
    assert (1 - topology.contraction) ** (topology.period / 2) == pytest.approx(left, abs=5e-4)
    for t in range(topology.period):
        assert all(topology.neighbors(i, t)[0] % 2 != i % 2 for i in range(n))


# -------------------------------------------------------------------------------------------------- other closed forms


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 32, 64])
def test_one_peer_exponential_averages_powers_of_two_exactly(n):
    topology = OnePeerExponential(n)
    assert topology.period == max(1, int(math.log2(n)))
    for start in range(topology.period):  # from any step on
        product = torch.eye(n, dtype=torch.float64)
        for t in range(start, start + topology.period):
            product = topology.matrix(t) @ product
        assert torch.equal(product, torch.full((n, n), 1 / n, dtype=torch.float64))
    assert topology.contraction == 1


def test_one_peer_exponential_sends_to_powers_of_two():
    topology = OnePeerExponential(11)
    for t, i in itertools.product(range(9), range(11)):
        assert topology.listeners(i, t) == [(i + 2 ** (t % 4)) % 11]
        assert topology.neighbors(i, t) == [(i - 2 ** (t % 4)) % 11]


def test_one_peer_exponential_is_not_exact_for_other_sizes():
    assert all(0 < OnePeerExponential(n).contraction < 0.9 for n in (3, 5, 6, 7, 12, 33))


@pytest.mark.parametrize("n", [4, 6, 8, 12, 16, 32])
def test_gap_of_the_exponential_graph(n):
    assert Exponential(n).spectral_gap == pytest.approx(2 / (1 + math.ceil(math.log2(n))), abs=1e-12)


@pytest.mark.parametrize("n", [4, 8, 16, 32])
def test_gap_of_the_hypercube(n):
    assert Hypercube(n).spectral_gap == pytest.approx(2 / (1 + math.log2(n)), abs=1e-12)
    assert all(bin(i ^ j).count("1") == 1 for i in range(n) for j in Hypercube(n).neighbors(i))


@pytest.mark.parametrize("n", [3, 5, 12])
def test_gap_of_the_star(n):
    assert Star(n).spectral_gap == pytest.approx(1 / n, abs=1e-12)
    assert Star(n).bytes_per_step(1) == (2 * (n - 1) / n, n - 1)


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_contraction_of_random_matchings_by_enumeration(n):
    mean = torch.zeros(n, n, dtype=torch.float64)
    orders = list(itertools.permutations(range(n)))
    for order in orders:
        for i, j in zip(order[::2], order[1::2], strict=False):
            mean[[i, j, i, j], [i, i, j, j]] += 0.5
        if n % 2:
            mean[order[-1], order[-1]] += 1
    # A matching is a projection, W^T W = W, so E||W X - Xbar||^2 contracts by the second eigenvalue of E[W].
    second = torch.linalg.eigvalsh(mean / len(orders))[-2]
    assert 1 - float(second) == pytest.approx(RandomMatching(n).contraction, abs=1e-12)
    assert RandomMatching(n).contraction == (n / (2 * (n - 1)) if n % 2 == 0 else 0.5)


def test_random_matchings_are_uniform():
    topology, counts, steps = RandomMatching(6, seed=3), torch.zeros(6, 6), 3000
    for t in range(steps):
        for i in range(6):
            for j in topology.neighbors(i, t):
                counts[i, j] += 1
    off_diagonal = counts[~torch.eye(6, dtype=torch.bool)]
    # Each of five peers a fifth of the time; 0.04 is above five standard deviations of a frequency.
    torch.testing.assert_close(off_diagonal / steps, torch.full((30,), 0.2), rtol=0, atol=0.04)


def test_random_matchings_follow_from_seed_and_step_alone():
    forward, backward = RandomMatching(9, seed=5), RandomMatching(9, seed=5)
    drawn = [[forward.neighbors(i, t) for i in range(9)] for t in range(30)]
    assert [[backward.neighbors(i, t) for i in range(9)] for t in reversed(range(30))] == drawn[::-1]
    assert all(sum(not peers for peers in step) == 1 for step in drawn)  # one of nine is idle
    other = RandomMatching(9, seed=6)
    assert [[other.neighbors(i, t) for i in range(9)] for t in range(30)] != drawn
    assert [RandomMatching(6).neighbors(0, t) for t in range(4)] == [[4], [5], [5], [4]]  # on any machine


def test_erdos_renyi():
    for seed in range(5):
        graph = ErdosRenyi(40, seed=seed)
        assert graph.probability == pytest.approx(2 * math.log(40) / 40)
        assert torch.equal(graph.matrix(), ErdosRenyi(40, seed=seed).matrix())
        graph.validate()
    assert not torch.equal(ErdosRenyi(40, seed=0).matrix(), ErdosRenyi(40, seed=1).matrix())
    assert torch.equal(ErdosRenyi(7, probability=1).matrix() > 0, torch.ones(7, 7, dtype=torch.bool))


def test_grids_are_as_square_as_can_be():
    assert [(Grid(n).rows, Grid(n).columns) for n in (1, 7, 12, 16, 30)] == [(1, 1), (1, 7), (3, 4), (4, 4), (5, 6)]
    assert Torus(16, rows=2).neighbors(0) == [1, 7, 8]
    assert Grid(6, rows=3).neighbors(0) == [1, 2]


@pytest.mark.parametrize("name", ["ring", "chain", "star", "complete", "binary_tree"])
def test_graphs_are_those_of_their_names(name):
    expected = {
        "ring": nx.cycle_graph,
        "chain": nx.path_graph,
        "star": lambda n: nx.star_graph(n - 1),
        "complete": nx.complete_graph,
        "binary_tree": lambda n: nx.Graph([(i, (i - 1) // 2) for i in range(1, n)]),
    }[name](10)
    topology = make(name, 10)
    assert {frozenset((i, j)) for i in range(10) for j in topology.neighbors(i)} == set(map(frozenset, expected.edges()))


# -------------------------------------------------------------------------------------------------------- other things


def test_a_topology_of_ones_own():
    topology = make(Alternating(6), 6)
    assert topology.period == 2
    assert topology.steps_to_reach_all(0) == 5
    assert topology.steps_to_reach_all(0, t=1) == 6


def test_information_that_never_arrives_is_an_error():
    topology = Alternating(6, period=1)  # the same pairs for ever
    topology.weights = lambda i, t=0: Alternating.weights(topology, i, 0)
    with pytest.raises(ValueError, match=r"What replica 0 sends never reaches replica 2 in Alternating\(6\)\."):
        topology.steps_to_reach_all(0)


def test_random_topology_of_a_user_has_no_contraction():
    class Random(Alternating):
        pass

    with pytest.raises(ValueError, match="no contraction"):
        _ = Random(6, period=None).contraction


def test_what_varies_has_no_spectral_gap():
    with pytest.raises(ValueError, match=r"OnePeerExponential\(8\) varies over time.*`contraction`"):
        _ = OnePeerExponential(8).spectral_gap


def test_importing_topologies_does_not_import_networkx_by_itself():
    # `torch` may have imported it: then nothing here would make a difference.
    program = """if True:
        import sys, torch
        before = "networkx" in sys.modules
        import importlib.util, pathlib, types
        package = types.ModuleType("lightning_distopt")
        package.__path__ = [str(pathlib.Path("lightning_distopt").resolve())]
        sys.modules["lightning_distopt"] = package
        import lightning_distopt.topologies
        from lightning_distopt.topologies import OnePeerExponential
        OnePeerExponential(8).weights(0)
        assert ("networkx" in sys.modules) == before
        assert "lightning" not in sys.modules
        assert "matplotlib" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
