"""Graphs, edges and matrices of a user, names, and what is refused."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import torch

from lightning_distopt.topologies import (
    Custom,
    ErdosRenyi,
    Grid,
    OnePeerExponential,
    RandomMatching,
    Ring,
    SocialNetwork,
    Topology,
    Torus,
    make,
)
from tests.topologies.cases import Alternating

MATRIX = [[0.5, 0.25, 0.25], [0.25, 0.75, 0.0], [0.25, 0.0, 0.75]]
DIRECTED = [[0.5, 0.0, 0.5], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]


@pytest.mark.parametrize(
    "graph", [MATRIX, np.array(MATRIX), torch.tensor(MATRIX), torch.tensor(MATRIX, dtype=torch.float16)], ids=type
)
def test_matrices(graph):
    topology = make(graph, 3)
    assert topology.weights(0) == {0: 0.5, 1: 0.25, 2: 0.25}
    assert topology.listeners(1) == [0]
    assert topology.symmetric
    assert topology.static


def test_a_directed_matrix():
    topology = make(DIRECTED, 3)
    assert not topology.symmetric
    assert (topology.neighbors(0), topology.listeners(0)) == ([2], [1])
    assert topology.steps_to_reach_all(0) == 2


def test_rounding_of_a_matrix_does_not_add_up():
    third = torch.tensor(1 / 3, dtype=torch.float32)
    topology = make((Ring(5).matrix() > 0) * third, 5)
    power = torch.linalg.matrix_power(topology.matrix(), 100_000)
    torch.testing.assert_close(power, torch.full((5, 5), 0.2, dtype=torch.float64), rtol=0, atol=1e-9)


def test_an_argument_is_left_as_it_was():
    matrix = torch.tensor(MATRIX, dtype=torch.float64) + 1e-8
    before = matrix.clone()
    make(matrix, 3)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("edges", [[(0, 1), (1, 2), (2, 3), (3, 0)], [[0, 1], [1, 2], [2, 3], [3, 0], [1, 0], [2, 2]]])
def test_edges(edges):
    assert torch.equal(make(edges, 4).matrix(), Ring(4).matrix())


def test_pairs_of_whole_numbers_are_edges_also_for_two_replicas():
    assert make([[0, 1], [1, 0]], 2).weights(0) == {0: 0.5, 1: 0.5}
    assert make([[0.25, 0.75], [0.75, 0.25]], 2).weights(0) == {0: 0.25, 1: 0.75}
    assert make([], 1).weights(0) == make([[1.0]], 1).weights(0) == {0: 1.0}


def test_graphs_of_networkx():
    assert torch.equal(make(nx.cycle_graph(6), 6).matrix(), Ring(6).matrix())
    shuffled = nx.Graph([(2, 3), (3, 0), (0, 1), (1, 2)])  # numbers are kept, whatever their order
    assert torch.equal(make(shuffled, 4).matrix(), Ring(4).matrix())
    named = nx.Graph([("a", "b"), ("b", "c")])
    assert make(named, 3).neighbors(1) == [0, 2]
    assert torch.equal(make(nx.MultiGraph([(0, 1), (0, 1), (1, 1), (1, 2)]), 3).matrix(), make([(0, 1), (1, 2)], 3).matrix())


def test_directed_graphs_of_networkx():
    circle = make(nx.DiGraph([(0, 1), (1, 2), (2, 0)]), 3)
    assert torch.equal(circle.matrix(), torch.tensor(DIRECTED, dtype=torch.float64))
    assert circle.listeners(0) == [1]
    uneven = nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2)])
    with pytest.raises(ValueError, match="Replica 0 sends to 2 replicas and receives from 1"):
        make(uneven, 3)


def test_column_stochastic_for_push_sum():
    uneven = nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2)])
    for graph in (uneven, [[1 / 3, 0, 1 / 2], [1 / 3, 1 / 2, 0], [1 / 3, 1 / 2, 1 / 2]]):
        topology = Custom(3, graph, column_stochastic=True)
        torch.testing.assert_close(topology.matrix().sum(dim=0), torch.ones(3, dtype=torch.float64))
        assert topology.matrix()[:, 0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3])
        assert topology.listeners(0) == [1, 2]
        topology.require(doubly_stochastic=False)
        with pytest.raises(ValueError, match="DSGD needs a doubly stochastic mixing matrix"):
            topology.require(by="DSGD")
        with pytest.raises(ValueError, match="no contraction"):
            _ = topology.contraction
    torch.testing.assert_close(Custom(4, nx.cycle_graph(4), column_stochastic=True).matrix(), Ring(4).matrix())


def test_pairs_lead_from_the_first_to_the_second_for_push_sum():
    pairs = [(0, 1), (1, 2), (2, 0), (0, 2)]
    assert torch.equal(make(pairs, 3, column_stochastic=True).matrix(), Custom(3, nx.DiGraph(pairs), True).matrix())
    assert make(pairs, 3).symmetric


def test_for_push_sum_it_is_known_whether_rows_sum_to_one_as_well():
    for graph in (DIRECTED, MATRIX, nx.cycle_graph(3), [(0, 1), (1, 2), (2, 0)]):
        assert make(graph, 3, column_stochastic=True).doubly_stochastic
    assert not make([(0, 1), (1, 2), (2, 0), (0, 2)], 3, column_stochastic=True).doubly_stochastic
    assert not make([[0.5, 0.5001], [0.5, 0.4999]], 2, column_stochastic=True).doubly_stochastic


def test_a_matrix_that_sums_to_one_in_the_other_direction():
    rows = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
    with pytest.raises(ValueError, match=r"each row must sum to 1, but those of row 1 sum to 1.25. .* push-sum alone can"):
        make(rows.T, 3)
    with pytest.raises(ValueError, match=r"each column must sum to 1, but those of column 1 sum to 1.25. .* Transpose it"):
        make(rows, 3, column_stochastic=True)
    make(rows.T, 3, column_stochastic=True)


@pytest.mark.parametrize(
    ("graph", "n", "sentence"),
    [
        ([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1.0]], 3, "not connected: there is no path from replica 0 to 2"),
        ([(0, 1), (2, 3)], 4, "not connected: there is no path from replica 0 to 2"),
        (nx.empty_graph(2), 2, "not connected"),
        ([[0.5, 0.4], [0.5, 0.6]], 2, "each row must sum to 1, but those of row 0 sum to 0.9"),
        ([[0.5, 0.5], [0.4, 0.6]], 2, "each column must sum to 1, but those of column 0 sum to 0.9"),
        ([[1.5, -0.5], [-0.5, 1.5]], 2, "not negative, but that of 1 for 0 is -0.5"),
        ([[float("nan"), 0.5], [0.5, 0.5]], 2, "finite and not negative, but that of 0 for 0 is nan"),
        ([[float("inf"), 0.5], [0.5, 0.5]], 2, "finite and not negative, but that of 0 for 0 is inf"),
        ([[0.0, 1.0], [1.0, 0.0]], 2, r"swap values for ever and never agree: .* \(W \+ I\) / 2"),
        (MATRIX, 4, r"has the shape \[4, 4\], but this one has \[3, 3\]"),
        ([(0, 1), (1, 4)], 4, r"The edge \(1, 4\) leads to a replica that does not exist: there are 0 to 3"),
        (nx.cycle_graph(5), 4, "The graph has 5 nodes, but there are 4 replicas"),
        (None, 4, "a name, a networkx graph, a list of edges, a matrix of numbers or an object of a class .* got None"),
        ([["a", "b"]], 2, "a name, a networkx graph, a list of edges, a matrix"),
        ([[0.5, 0.5], [0.5]], 2, "a name, a networkx graph, a list of edges, a matrix"),
        (lambda n: Ring(n), 4, "or an object of a class derived from `Topology`; got <function"),
        (Alternating, 4, "Alternating is a class: give an object of it, made for 4 replicas."),
        (nx.Graph, 4, "Graph is a class: give an object of it"),
    ],
)
def test_graphs_that_are_refused(graph, n, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(graph, n)


def test_one_way_streets_are_not_connected():
    with pytest.raises(ValueError, match="no path from replica 1 to 0"):
        Custom(3, [[0.5, 0, 0], [0.5, 0.5, 0], [0, 0.5, 1]], column_stochastic=True)


# ---------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "n", "expected"),
    [
        ("ring", 5, Ring(5)),
        ("torus:4", 32, Torus(32, rows=4)),
        ("torus:2", 8, Torus(8, rows=2)),
        ("grid:1", 6, Grid(6, rows=1)),
        ("random_matching:7", 6, RandomMatching(6, seed=7)),
        ("erdos_renyi:0.3", 30, ErdosRenyi(30, probability=0.3)),
        ("social_network", 32, SocialNetwork()),
    ],
)
def test_names(name, n, expected):
    made = make(name, n)
    assert type(made) is type(expected)
    assert repr(made) == repr(expected)
    assert torch.equal(made.matrix(3), expected.matrix(3))


@pytest.mark.parametrize(
    ("name", "n", "sentence"),
    [
        ("rign", 4, "There is no topology 'rign' \\(did you mean 'ring'\\?\\); the names are ring, torus, .*, erdos_renyi\\."),
        ("xyz", 4, "There is no topology 'xyz'; the names are ring"),
        ("ring:3", 4, "The topology 'ring' takes nothing after a colon; got 'ring:3'"),
        ("torus:x", 4, "After the colon of 'torus' stands its `rows`, as in 'torus:2'; got 'torus:x'"),
        ("torus:3", 8, "rows=3 does not divide 8"),
        ("torus:1", 8, "with rows=1 of 8 it is a ring: use 'ring'"),
        ("torus", 7, "two sides of at least 2, but 7 is prime: use 'ring' or 'grid'"),
        ("grid:5", 6, "rows=5 does not divide 6"),
        ("hypercube", 6, "has 2, 4, 8, ... replicas, but there are 6: use 'exponential' or 'torus'"),
        ("bipartite_exponential", 5, "can't be paired if there are 5: use 'random_matching'"),
        ("social_network", 8, "has 32 nodes, but there are 8 replicas"),
        ("random_matching:-1", 4, "seed of a random matching is a whole number from 0"),
        ("erdos_renyi:1.5", 4, "above 0 and at most 1; got 1.5"),
        ("erdos_renyi:0.01", 16, r"None of 100 random graphs .* well above log\(n\)/n = 0.17"),
        ("ring", 0, "a whole number of replicas, at least 1; got 0"),
        ("complete", 2.5, "a whole number of replicas, at least 1; got 2.5"),
        ("star", True, "a whole number of replicas, at least 1; got True"),
    ],
)
def test_names_that_are_refused(name, n, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(name, n)


def test_instances_are_taken_if_they_fit():
    ring = Ring(8)
    assert make(ring, 8) is ring
    with pytest.raises(ValueError, match=r"Ring\(8\) has 8 replicas, but there are 4 here"):
        make(ring, 4)


def test_classes_of_a_user_are_validated():
    class Greedy(Topology):
        def weights(self, i: int, t: int = 0) -> dict[int, float]:
            return {0: 0.75, 1: 0.25}

    with pytest.raises(ValueError, match=r"each column must sum to 1, but those of column 0 sum to 1\.5"):
        make(Greedy(2), 2)
    with pytest.raises(ValueError, match="not connected: there is no path from replica 0 to 2"):
        make(Alternating(4, period=1), 4)


class Circle(Topology):
    """Each hears the next one."""

    def weights(self, i: int, t: int = 0) -> dict[int, float]:
        return {i: 0.5, (i + 1) % 3: 0.5}


def test_replicas_agree_on_who_sends_to_whom():
    """Otherwise one waits for a message that another never sends."""

    class Deaf(Circle):
        def listeners(self, i: int, t: int = 0) -> list[int]:
            return [(i + 1) % 3]

    class Beyond(Circle):
        def weights(self, i: int, t: int = 0) -> dict[int, float]:
            return {i: 0.5, i + 1: 0.5}

    make(Circle(3), 3)
    with pytest.raises(
        ValueError, match=r"says that it is symmetric, but the weight of 1 for 0 is 0\.5 and that of 0 for 1 is 0:"
    ):
        make(Circle(3, symmetric=True), 3)
    with pytest.raises(ValueError, match=r"\[2\] receive from replica 0 in step 0, but its `listeners` are \[1\]"):
        make(Deaf(3), 3)
    with pytest.raises(ValueError, match=r"are 0 to 2, but 2 receives from \[2, 3\]"):
        make(Beyond(3), 3)


@pytest.mark.parametrize(
    ("needs", "sentence"),
    [
        (
            {"symmetric": True, "static": True},
            "CHOCO needs a symmetric and static mixing matrix, and that of OnePeerExponential(8) is not: use 'ring' or",
        ),
        ({"symmetric": True}, "a symmetric mixing matrix, and that of OnePeerExponential(8) is not: use 'random_matching' or"),
        ({"static": True}, "a static mixing matrix, and that of OnePeerExponential(8) is not: use 'ring' or 'exponential'."),
    ],
)
def test_requirements(needs, sentence):
    with pytest.raises(ValueError) as error:
        OnePeerExponential(8).require(**needs, by="CHOCO")
    assert sentence in str(error.value)
    OnePeerExponential(8).require(by="CHOCO")
    Ring(8).require(**needs, by="CHOCO")
