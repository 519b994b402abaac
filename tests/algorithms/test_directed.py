"""Closed forms of push-sum, RelaySum and PowerGossip."""

from __future__ import annotations

import itertools
import math

import networkx as nx
import numpy as np
import pytest
import torch
from torch import nn

from lightning_distopt.algorithms import DSGD, PowerGossip, PushSum, RelaySum, relay_sum
from lightning_distopt.algorithms.gossip import GossipAlgorithm
from lightning_distopt.algorithms.power_gossip import orthonormal
from lightning_distopt.communication import Communicator, Replicas
from lightning_distopt.topologies import Chain, Complete, Custom, Ring, Topology, make
from tests.algorithms.driver import Quadratics, run
from tests.oracles import directed

UNEVEN = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 0), (0, 2), (0, 3), (1, 4)]


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=0, atol=atol)


def prepared(algorithm: GossipAlgorithm, topology: Topology, rows: torch.Tensor) -> Replicas:
    """Replicas that start at these rows, `[n, ...]`; for algorithms whose memory does not depend on a common start."""
    module = nn.Module()
    module.x = nn.Parameter(torch.zeros_like(rows[0]))
    replicas = Replicas(module, len(rows))
    for row, values in enumerate(rows):
        replicas.slots[0].view(replicas.parameters[0][row]).copy_(values)
    algorithm.connect(topology).setup(replicas, Communicator(len(rows)))
    return replicas


def gossip(algorithm: GossipAlgorithm, steps: int) -> None:
    for t in range(steps):
        algorithm.before_step(t)
        algorithm.after_step(t)


# -------------------------------------------------------------------------------------------------------------- push-sum
@pytest.mark.parametrize("seed", range(5))
def test_the_weights_sum_to_n_and_tend_to_the_stationary_distribution(seed):
    rng, n = np.random.default_rng(seed), 7
    A = rng.uniform(0, 1, (n, n)) * (rng.uniform(0, 1, (n, n)) < 0.4) + np.eye(n) + np.roll(np.eye(n), 1, axis=0)
    push_sum, expected = PushSum(), np.ones(n)
    prepared(push_sum, Custom(n, A / A.sum(axis=0), column_stochastic=True), torch.zeros(n, 3, dtype=torch.float64))
    for _ in range(200):
        gossip(push_sum, 1)
        expected = A / A.sum(axis=0) @ expected
        assert push_sum.push_weights.sum() == pytest.approx(n, abs=1e-12)
        close(push_sum.push_weights, expected)
    values, vectors = np.linalg.eig(A / A.sum(axis=0))
    perron = np.real(vectors[:, np.argmax(np.abs(values))])
    close(push_sum.push_weights, n * perron / perron.sum(), atol=1e-8)
    assert push_sum.push_weights.std() > 0.1


def test_without_gradients_push_sum_reaches_the_mean_and_row_stochastic_gossip_does_not():
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    push_sum = PushSum()
    replicas = prepared(push_sum, make(UNEVEN, 5, column_stochastic=True), start)
    gossip(push_sum, 200)
    close(replicas.matrix(), start.mean(dim=0).expand(5, 3))
    close(replicas.matrix(push_sum.models()).mean(dim=0), start.mean(dim=0))
    rows = torch.as_tensor(directed.out_degrees(5, UNEVEN)).T.contiguous()  # each hears in equal shares whom it would send to
    biased = torch.linalg.matrix_power(rows, 200) @ start
    assert biased.std(dim=0).max() < 1e-12
    assert (biased - start.mean(dim=0)).abs().max() > 0.1


def test_the_sum_of_the_numerators_is_preserved_where_nobody_agrees_yet():
    start = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    push_sum = PushSum()
    replicas = prepared(push_sum, make(nx.DiGraph(UNEVEN), 5, column_stochastic=True), start)
    for _ in range(4):
        gossip(push_sum, 1)
        assert replicas.matrix().std(dim=0).max() > 1e-2
        assert (replicas.matrix().mean(dim=0) - start.mean(dim=0)).abs().max() > 1e-3
        close(replicas.matrix(push_sum.models()).mean(dim=0), start.mean(dim=0))


def test_equal_replicas_stay_equal_to_the_last_bit():
    for dtype in (torch.float32, torch.bfloat16):
        start = torch.randn(100, generator=torch.Generator().manual_seed(3)).to(dtype).expand(5, 100)
        push_sum = PushSum()
        replicas = prepared(push_sum, make(UNEVEN, 5, column_stochastic=True), start)
        gossip(push_sum, 50)
        assert torch.equal(replicas.matrix(), start)


@pytest.mark.parametrize("topology", ["one_peer_exponential", "ring", Ring(6).matrix(), nx.cycle_graph(6)], ids=type)
def test_with_doubly_stochastic_matrices_push_sum_is_dsgd_to_the_last_bit(topology):
    problem = Quadratics(6, noise=0.3)
    push_sum = PushSum()
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=1.0, momentum=0.9, weight_decay=0.01)  # noqa: E731
    pushed, plain = (run(one, topology, problem, 30, optimizer=optimizer) for one in (push_sum, DSGD()))
    assert torch.equal(pushed, plain)
    assert push_sum.push_weights.tolist() == [1.0] * 6


def test_the_fixed_point_of_push_sum():
    """x = A (x - eta g(x / w)) with the stationary w = A w; its bias is of the order of eta."""
    problem, errors = Quadratics(5), []
    for eta in (0.04, 0.02):
        A = torch.as_tensor(directed.out_degrees(5, UNEVEN))
        w = torch.linalg.matrix_power(A, 500) @ torch.ones(5, dtype=torch.float64)
        last = run(PushSum(), UNEVEN, problem, 2000, eta=eta)[-1]
        x = w[:, None] * last
        gradients = torch.stack([problem.gradient(i, 0, z) for i, z in enumerate(last)])
        close(A @ (x - eta * gradients), x, atol=1e-10)
        close(gradients.mean(dim=0), torch.zeros(3, dtype=torch.float64), atol=1e-10)  # columns of A sum to 1
        errors.append(float((last - problem.optimum).norm()))
    assert errors[0] == pytest.approx(2 * errors[1], rel=0.1)


def test_an_exact_average_starts_weights_anew():
    class Average:
        def mode(self, step):
            return "average" if step == 3 else "gossip"

        def another(self, done):
            return done < 1

    start = torch.randn(5, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    push_sum = PushSum()
    push_sum.control = Average()
    replicas = prepared(push_sum, make(UNEVEN, 5, column_stochastic=True), start)
    gossip(push_sum, 3)
    assert push_sum.push_weights.std() > 0.1
    gossip(push_sum, 4)  # of which the last is step 3
    assert push_sum.push_weights.tolist() == [1.0] * 5
    close(replicas.matrix(), start.mean(dim=0).expand(5, 3))


# -------------------------------------------------------------------------------------------------------------- RelaySum
TREES = {"chain": 7, "star": 5, "binary_tree": 10}


class Held(Quadratics):
    """f_i(x) = 1/2 |x - c_i|^2: a step with eta = 1 leads to c_i, wherever it starts."""

    def __init__(self, n):
        super().__init__(n)
        self.a = torch.ones_like(self.a)


@pytest.mark.parametrize(("name", "n"), TREES.items())
def test_relay_sum_averages_exactly_after_as_many_steps_as_the_diameter(name, n):
    graph = nx.Graph([(i, j) for i in range(n) for j in make(name, n).neighbors(i)])
    problem, diameter = Held(n), nx.diameter(graph)
    history = run(RelaySum(), name, problem, diameter + 3, eta=1.0)
    mean = problem.c.mean(dim=0).expand(n, 3)
    close(history[diameter:], mean.expand(4, n, 3))
    assert (history[diameter - 1] - mean).abs().max() > 1e-2  # and not before
    assert (run(DSGD(), name, problem, diameter + 3, eta=1.0)[-1] - mean).abs().max() > 1e-2


def test_after_that_mixing_is_the_same_on_every_tree():
    """What has rested for long enough is mixed as on the complete graph."""
    problem = Held(8)
    results = [run(RelaySum(), name, problem, 9, eta=1.0)[-1] for name in ("chain", "star", "binary_tree")]
    complete = run(DSGD(), Complete(8), problem, 9, eta=1.0)[-1]
    for result in results:
        close(result, complete)


def test_a_tree_of_ones_own_is_that_of_the_messages_with_counts():
    """The listing of the paper, sums and counts; weights of a matrix do not matter."""
    n, edges, rng = 7, [(0, 3), (3, 1), (3, 5), (5, 2), (5, 4), (4, 6)], np.random.default_rng(6)
    problem, rounds = Quadratics(n), 12
    relayed = run(RelaySum(), edges, problem, rounds, eta=0.1)
    halves = [
        np.stack([(x - 0.1 * problem.gradient(i, t, x)).numpy() for i, x in enumerate(relayed[t])]) for t in range(rounds)
    ]
    for t, expected in enumerate(directed.relay_messages(edges, np.ones((n, 3)), halves)):
        close(relayed[t + 1], expected)
    weights = np.eye(n)
    for i, j in edges:
        w = rng.uniform(0.05, 0.2)
        weights += w * (np.outer(np.eye(n)[i], np.eye(n)[j]) + np.outer(np.eye(n)[j], np.eye(n)[i]))
        weights[i, i] -= w
        weights[j, j] -= w
    assert torch.equal(run(RelaySum(), weights, problem, rounds, eta=0.1), relayed)


@pytest.mark.parametrize(("name", "n"), TREES.items())
def test_relay_sum_reaches_the_optimum_where_dsgd_is_biased(name, n):
    problem = Quadratics(n)
    last = run(RelaySum(), name, problem, 1500, eta=0.05)[-1]
    close(last, problem.optimum.expand(n, 3), atol=1e-6)
    assert (run(DSGD(), name, problem, 1500, eta=0.05)[-1] - problem.optimum).abs().max() > 0.02


@pytest.mark.parametrize(("name", "n"), TREES.items())
def test_progress_is_slower_by_the_mean_delay(name, n):
    """x^{t+1} = (1 - eta) mean_j x^{t - tau_ij}: for small eta, as exp(-eta t / (1 + mean tau))."""
    problem, eta = Held(n), 0.01
    tau = np.maximum(0, directed.hops(n, [(i, j) for i in range(n) for j in make(name, n).neighbors(i)]) - 1)
    errors = (run(RelaySum(), name, problem, 400, eta=eta) - problem.optimum).norm(dim=(1, 2))
    rate = float(torch.log(errors[200] / errors[400])) / 200
    assert rate == pytest.approx(eta / (1 + tau.mean()), rel=0.02)
    assert tau.mean() > 0.4


def test_two_replicas_of_relay_sum_average_at_every_step():
    problem = Quadratics(2, noise=0.3)
    close(run(RelaySum(), "chain", problem, 20), run(DSGD(), "complete", problem, 20))


def test_long_rows_are_summed_in_pieces_to_the_same_bits(monkeypatch):
    problem = Quadratics(5, d=7, noise=0.3)
    whole = run(RelaySum(), "binary_tree", problem, 10)
    monkeypatch.setattr(relay_sum, "_PIECE", 3)
    assert torch.equal(run(RelaySum(), "binary_tree", problem, 10), whole)


# ------------------------------------------------------------------------------------------------------------ PowerGossip
def matrices(n: int, rank: int, seed: int = 0) -> torch.Tensor:
    """`[n, 6, 9]`, whose differences have the given rank."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    left = torch.randn(n, 6, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(9, rank, generator=generator, dtype=torch.float64)
    return common + (left - left[:1]) @ right.T


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_difference_of_rank_r_is_averaged_exactly_by_one_iteration(rank):
    """From the left, then from the right: two gossip steps of two replicas."""
    start, algorithm = matrices(2, rank), PowerGossip(rank)
    replicas = prepared(algorithm, Chain(2), start)
    gossip(algorithm, 1)
    assert (replicas.matrix()[0] - replicas.matrix()[1]).norm() > 0.1
    gossip(algorithm, 1)
    close(replicas.matrix(), start.mean(dim=0).reshape(1, -1).expand(2, -1))


@pytest.mark.parametrize("rank", [6, 8])
def test_full_rank_is_plain_gossip(rank):
    start = torch.randn(5, 6, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    compressed, plain = PowerGossip(rank), DSGD()
    results = []
    for algorithm in (compressed, plain):
        replicas = prepared(algorithm, Ring(5), start)
        gossip(algorithm, 4)
        results.append(replicas.matrix())
    close(*results)


@pytest.mark.parametrize("name", ["ring", "star", "torus"])
def test_power_gossip_preserves_the_mean_and_reaches_consensus(name):
    start = torch.randn(6, 6, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    algorithm, spreads = PowerGossip(), []
    replicas = prepared(algorithm, make(name, 6), start)
    for _ in range(30):
        gossip(algorithm, 10)
        spreads.append(float(replicas.matrix().std(dim=0).norm()))
        close(replicas.matrix().mean(dim=0), start.mean(dim=0).flatten())
    pairs = itertools.pairwise(spreads)
    assert all(new < old or new < 1e-12 for old, new in pairs)  # a projection never adds to what replicas differ in
    assert spreads[-1] < 1e-3 * spreads[0]


def test_warm_vectors_find_the_largest_direction():
    """After a few steps what is left of a difference with a gap in its singular values is not the largest of them."""
    u = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    difference = u @ torch.diag(torch.tensor([10.0, 0.1, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)) @ u.T
    algorithm = PowerGossip()
    replicas = prepared(algorithm, Chain(2), torch.stack([difference, torch.zeros_like(difference)]))
    gossip(algorithm, 2)
    left = (replicas.matrix()[0] - replicas.matrix()[1]).reshape(6, 6)
    assert torch.linalg.matrix_norm(left, ord=2) < 0.5


def test_where_neighbours_agree_their_vectors_stay():
    """Also in a part of the matrix that comes to differ later, which vectors at zero would never find."""
    start, algorithm = torch.zeros(2, 6, 9, dtype=torch.float64), PowerGossip()
    replicas = prepared(algorithm, Chain(2), start)
    before = [block.clone() for block in (*algorithm.blocks()["p"], *algorithm.blocks()["q"])]
    gossip(algorithm, 4)
    assert torch.equal(replicas.matrix(), start.flatten(1))
    for old, new in zip(before, (*algorithm.blocks()["p"], *algorithm.blocks()["q"]), strict=True):
        assert new.abs().min() > 0
        close((new * old).sum(dim=1) / old.norm(dim=1) / new.norm(dim=1), torch.ones(2, dtype=torch.float64))
    replicas.slots[0].view(replicas.parameters[0][0])[3, 4] = 1.0
    gossip(algorithm, 2)
    close(replicas.matrix()[0], replicas.matrix()[1])


@pytest.mark.parametrize("shape", [(7, 1), (7, 3), (3, 3)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-300])
def test_orthonormal_vectors_of_any_size(shape, scale):
    vectors = scale * torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    basis = orthonormal(vectors.clone())
    close(basis.T @ basis, torch.eye(shape[1], dtype=torch.float64))
    close(basis @ (basis.T @ (vectors / scale)), vectors / scale)


@pytest.mark.parametrize("rank", [1, 2])
def test_bytes_of_power_gossip(rank):
    """r (rows + columns) / 2 of a matrix and all of a vector, to each neighbour, in the mean over two steps."""
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(20, 10), nn.Linear(20, 1, bias=False))
    replicas, communicator = Replicas(module, 4), Communicator(4)
    algorithm = PowerGossip(rank)
    algorithm.connect(Ring(4)).setup(replicas, communicator)
    plain = 8 + 10 + 20  # biases, and a matrix of one row
    for steps, sides in ((1, 27 + 20), (2, 27 + 20 + 8 + 10)):
        gossip(algorithm, 1)
        assert communicator.traffic.bytes_sent == 2 * 4 * (rank * sides + steps * plain)
    full = math.prod((8, 3, 3, 3)) + 200 + plain
    assert communicator.traffic.bytes_sent < 2 * 2 * 4 * full / 2


# -------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("rank", [0, -1, 1.5, "2", True, None])
def test_ranks_that_are_refused(rank):
    with pytest.raises(ValueError, match="`rank` must be a whole number, at least 1"):
        PowerGossip(rank)


@pytest.mark.parametrize(
    ("algorithm", "topology", "sentence"),
    [
        (RelaySum(), Ring(4), "relays sums along a tree, and .* has a cycle: use 'chain', .*minimum_spanning_tree"),
        (RelaySum(), Complete(5), "has a cycle"),
        (RelaySum(), make("one_peer_exponential", 4), "RelaySum needs a symmetric and static mixing matrix"),
        (PowerGossip(), make("exponential", 8), "PowerGossip needs a symmetric mixing matrix"),
        (
            DSGD(),
            Custom(5, UNEVEN, column_stochastic=True),
            "DSGD needs a doubly stochastic .* only the columns .* use PushSum",
        ),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_graphs_that_are_refused(algorithm, topology, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        algorithm.connect(topology)
    assert "\n" not in str(error.value)


def test_lbfgs_steps_from_where_it_evaluates():
    optimizers = [torch.optim.LBFGS([torch.ones(1)])]
    with pytest.raises(ValueError, match="LBFGS takes gradients at the point that it steps from"):
        PushSum().connect(make(UNEVEN, 5, column_stochastic=True)).check_optimizers(optimizers)
    PushSum().connect(Ring(5)).check_optimizers(optimizers)
