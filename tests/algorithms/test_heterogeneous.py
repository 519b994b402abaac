"""Closed forms of algorithms for heterogeneous data."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import pytest
import torch

from lightning_distopt import D2, DMSGD, DPSGD, DSGD, GossipStrategy, GradientTracking, QuasiGlobal, QuasiGlobalAdam
from lightning_distopt.topologies import Complete, Lazy, Ring, SocialNetwork, make
from tests.algorithms.driver import Quadratics, run
from tests.oracles import heterogeneous

SGD = torch.optim.SGD


def close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=0, atol=atol)


# ----------------------------------------------------------------------------------------------------- stationary points
@pytest.mark.parametrize(
    "algorithm",
    [QuasiGlobal(), QuasiGlobal(nesterov=True), QuasiGlobal(period=2), QuasiGlobal(period=4, mu=0.5)],
    ids=repr,
)
def test_quasi_global_momentum_has_the_stationary_points_of_dsgd(algorithm):
    problem = Quadratics(6)
    expected = problem.fixed_point(Ring(6).matrix(), 0.1)
    close(run(algorithm, "ring", problem, 3000, eta=0.1)[-1], expected, atol=1e-9)
    assert (expected - problem.optimum).abs().max() > 0.2  # which are not the optimum


@pytest.mark.parametrize("nesterov", [False, True])
def test_local_momentum_has_those_of_a_step_size_ten_times_as_large(nesterov):
    problem, optimizer = Quadratics(8), partial(SGD, lr=1.0, momentum=0.9, nesterov=nesterov)
    expected = problem.fixed_point(Ring(8).matrix(), 0.05 / (1 - 0.9))
    last = run(DSGD(), "ring", problem, 1500, optimizer=optimizer)[-1]
    dsgd = problem.fixed_point(Ring(8).matrix(), 0.05)
    close(last, expected)
    spread = [float((x - x.mean(dim=0)).norm()) for x in (last, dsgd)]
    assert spread[0] > 2 * spread[1]


@pytest.mark.parametrize("algorithm", [D2(), D2(plus=True), GradientTracking()], ids=repr)
@pytest.mark.parametrize(("topology", "n", "steps"), [("ring", 6, 1500), ("star", 5, 1500), (SocialNetwork(32), 32, 800)])
def test_d2_and_gradient_tracking_reach_the_optimum(algorithm, topology, n, steps):
    problem = Quadratics(n)
    last = run(algorithm, topology, problem, steps, eta=0.2)[-1]
    close(last, problem.optimum.expand_as(last), atol=1e-6)


def test_gradient_tracking_reaches_it_on_a_directed_graph_that_varies_and_with_momentum():
    problem = Quadratics(8)
    optimizer = partial(SGD, lr=1.0, momentum=0.5)
    last = run(GradientTracking(), "one_peer_exponential", problem, 1500, eta=0.05, optimizer=optimizer)[-1]
    close(last, problem.optimum.expand_as(last), atol=1e-6)


def test_d2_is_thrown_off_where_the_learning_rate_falls_and_d2_plus_is_not():
    problem = Quadratics(6)

    def error(algorithm, when):
        last = run(algorithm, "ring", problem, 2000, eta=lambda t: 0.1 if t < when else 0.02)[-1]
        return float((last - problem.optimum).norm())

    assert error(D2(), 10) > 1 > 1e-4 > error(D2(plus=True), 10)
    assert error(D2(), 1500) < 1e-4 > error(D2(plus=True), 1500)  # nothing is left to be thrown off by


def test_d2_and_d2_plus_are_the_same_for_a_constant_learning_rate():
    problem = Quadratics(5, noise=0.3)
    close(run(D2(), "ring", problem, 50), run(D2(plus=True), "ring", problem, 50))


# ---------------------------------------------------------------------------------------------------- quasi-global momentum
@pytest.mark.parametrize(("beta", "mu"), [(0.9, 0.9), (0.9, 0.5), (0.5, 0.8)])
def test_a_single_replica_is_quasi_hyperbolic_momentum(beta, mu):
    problem, eta, discount = Quadratics(1, noise=0.5), 0.01, mu + (1 - mu) * beta
    x, m, history = torch.ones(3, dtype=torch.float64), 0.0, []
    for t in range(300):
        g = problem.gradient(0, t, x)
        m = discount * m + (1 - discount) * g
        x = x - eta / (1 - beta) * ((1 - beta / discount) * g + beta / discount * m)
        history.append(x)
    close(run(QuasiGlobal(beta=beta, mu=mu), "ring", problem, 300, eta)[1:, 0], torch.stack(history))


def test_a_single_replica_is_nesterovs_momentum_for_one_mu_alone():
    problem, eta, beta = Quadratics(1, noise=0.5), 0.01, 0.9
    mu = (beta**0.5 - beta) / (1 - beta)
    discount = mu + (1 - mu) * beta

    def nesterov(p):
        return SGD(p, lr=1.0, momentum=discount, nesterov=True)

    ours = run(QuasiGlobal(beta=beta, mu=mu), "ring", problem, 300, eta)
    theirs = run(DSGD(), "ring", problem, 300, eta * mu / discount, nesterov)
    close(ours, theirs)
    other = run(QuasiGlobal(beta=beta, mu=beta), "ring", problem, 300, eta)
    assert (other - theirs).abs().max() > 0.1


@pytest.mark.parametrize("topology", ["ring", "one_peer_exponential", "star"])
def test_the_virtual_sequence_and_the_recursion_of_the_momentum(topology):
    n, eta, beta, mu = 6, 0.05, 0.8, 0.7
    problem, algorithm, graph = Quadratics(n, noise=0.4), QuasiGlobal(beta=beta, mu=mu), make(topology, n)
    momenta = [torch.zeros(n, 3, dtype=torch.float64)]
    x = run(algorithm, topology, problem, 60, eta, watch=lambda t: momenta.append(algorithm._m[0][:, :3].clone()))
    virtual = x[0].mean(dim=0)
    for t in range(60):
        gradients = torch.stack([problem.gradient(i, t, x[t, i]) for i in range(n)])
        W = graph.matrix(t)
        # (18.4): M^{t+1} = (mu I + (1 - mu) beta W) M^t + (1 - mu) W G^t + (1 - mu) / eta (I - W) X^t
        M = mu * momenta[t] + (1 - mu) * W @ (beta * momenta[t] + gradients) + (1 - mu) / eta * (x[t] - W @ x[t])
        close(momenta[t + 1], M)
        # (18.6): xhat^{t+1} = xhat^t - eta / (1 - beta) gbar^t, and xhat - xbar = -eta beta / ((1 - beta)(1 - mu)) mbar
        virtual = virtual - eta / (1 - beta) * gradients.mean(dim=0)
        offset = -eta * beta / ((1 - beta) * (1 - mu)) * momenta[t + 1].mean(dim=0)
        close(virtual - x[t + 1].mean(dim=0), offset)


def test_without_momentum_it_is_dsgd():
    problem = Quadratics(5, noise=0.3)
    for algorithm in (QuasiGlobal(beta=0.0, mu=0.6), QuasiGlobal(nesterov=True, beta=0.0, mu=0.6)):
        close(run(algorithm, "ring", problem, 50), run(DSGD(), "ring", problem, 50))


def test_without_memory_it_is_d2_without_the_correction():
    """mu = 0: X^{t+1} = W ((1 + beta r) X^t - beta r X^{t-1} - eta^t G^t), r = eta^t / eta^{t-1} (L5860)."""
    n, beta = 5, 0.6
    problem, W = Quadratics(n, noise=0.3), Ring(n).matrix()

    def eta(t):
        return 0.1 if t < 20 else 0.03

    x = run(QuasiGlobal(beta=beta, mu=0.0), "ring", problem, 40, eta)
    for t in range(1, 40):
        r = eta(t) / eta(t - 1)
        gradients = torch.stack([problem.gradient(i, t, x[t, i]) for i in range(n)])
        close(x[t + 1], W @ ((1 + beta * r) * x[t] - beta * r * x[t - 1] - eta(t) * gradients))


def test_several_gossip_steps_mix_as_often():
    problem, algorithm, W = Quadratics(6, noise=0.3), QuasiGlobal(beta=0.8), Ring(6).matrix().numpy()
    algorithm.gossip_steps = 3
    x0 = np.ones(3)

    def gradients(i, t, x):
        return problem.gradient(i, t, torch.as_tensor(x)).numpy()

    cubed = np.linalg.matrix_power(W, 3)
    expected = heterogeneous.quasi_global(x0, gradients, [0.05] * 30, 6, 0.0, W=lambda t: cubed, beta=0.8, mu=0.8)
    close(run(algorithm, "ring", problem, 30)[1:], expected)


@pytest.mark.parametrize("decoupled", [False, True])
def test_quasi_global_adam_takes_its_options_from_the_optimizer(decoupled):
    problem, W = Quadratics(4, noise=0.3), Ring(4).matrix().numpy()
    cls = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = partial(cls, lr=1.0, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)

    def gradients(i, t, x):
        return problem.gradient(i, t, torch.as_tensor(x)).numpy()

    etas = [0.1] * 10 + [0.0] + [0.02] * 10
    expected = heterogeneous.quasi_global_adam(
        np.ones(3), gradients, etas, 4, 0.1, W=lambda t: W, b1=0.8, b2=0.95, eps=1e-3, decoupled=decoupled
    )
    close(run(QuasiGlobalAdam(), "ring", problem, 21, etas.__getitem__, optimizer)[1:], expected)


# ------------------------------------------------------------------------------------------------------------------ DMSGD
@pytest.mark.parametrize("option", [1, 2])
def test_dmsgd_of_a_single_replica_is_heavy_ball(option):
    problem = Quadratics(1, noise=0.5)
    expected = run(DSGD(), "ring", problem, 100, optimizer=partial(SGD, lr=1.0, momentum=0.8))
    close(run(DMSGD(option, beta=0.8, mu=0.3), "ring", problem, 100), expected)


def test_dmsgd_without_momentum_is_dpsgd_or_alone():
    problem = Quadratics(5, noise=0.5)
    close(run(DMSGD(1, beta=0.0), "ring", problem, 50), run(DPSGD(), "ring", problem, 50))
    alone = run(DMSGD(2, beta=0.0), "ring", problem, 50)
    for t in range(50):
        gradients = torch.stack([problem.gradient(i, t, alone[t, i]) for i in range(5)])
        close(alone[t + 1], alone[t] - 0.05 * gradients)


@pytest.mark.parametrize("option", [1, 2])
def test_dmsgd_is_the_reorganised_form_with_the_division_that_the_listing_lacks(option):
    """Algorithm 24: half steps from x^t (1) or x^{t-1/2} (2), m = [mu (half^- - half) + (1 - mu) (x^- - x)] / eta."""
    n, eta, beta, mu = 5, 0.05, 0.8, 0.6
    problem, W = Quadratics(n, noise=0.4), Ring(n).matrix()
    half = torch.ones(n, 3, dtype=torch.float64)
    x, m, history = W @ half, torch.zeros(n, 3, dtype=torch.float64), []
    for t in range(40):
        gradients = torch.stack([problem.gradient(i, t, half[i]) for i in range(n)])
        new = (x if option == 1 else half) - eta * (beta * m + gradients)
        m = (mu * (half - new) + (1 - mu) * (x - W @ new)) / eta
        half, x = new, W @ new
        history.append(half)
    close(run(DMSGD(option, beta, mu), "ring", problem, 40, eta)[1:], torch.stack(history))


# ------------------------------------------------------------------------------------------------------- gradient tracking
def test_gradient_tracking_on_the_complete_graph_is_minibatch_sgd_from_the_second_step():
    """y_i = gbar + (g_i - g_i^-): on equal replicas' mean it is exact."""
    problem, algorithm = Quadratics(4, noise=0.3), GradientTracking()
    x = run(algorithm, "complete", problem, 40)
    for t in range(40):
        gradients = torch.stack([problem.gradient(i, t, x[t, i]) for i in range(4)])
        close(x[t + 1], (x[t].mean(dim=0) - 0.05 * gradients.mean(dim=0)).expand(4, -1))


def test_the_mean_of_the_estimates_is_that_of_the_gradients_also_past_a_gradient_that_is_not_finite():
    class Bursting(Quadratics):
        def gradient(self, i, t, x):
            return super().gradient(i, t, x) * (float("nan") if (i, t) == (2, 7) else 1.0)

    problem, algorithm = Bursting(5, noise=0.3), GradientTracking()
    means = []

    def before_round():
        means.append(algorithm._y[0][:, :3].mean(dim=0))
        assert algorithm.replicas.finite_rows() == [not (i == 2 and len(means) == 8) for i in range(5)]
        algorithm.replicas.parameters[0].nan_to_num_(0.0)  # as a strategy has it replaced

    x = run(algorithm, "ring", problem, 20, before_round=before_round)
    for t in (6, 8, 15):
        gradients = torch.stack([problem.gradient(i, t, x[t, i]) for i in range(5)])
        close(means[t], gradients.mean(dim=0))
    assert torch.isfinite(means[7]).all()


# ----------------------------------------------------------------------------------------------------------------- refusals
class Lookahead(torch.optim.Optimizer):
    """Wraps another optimizer, whose steps are not all that it does."""

    def __init__(self):
        self.optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        super().__init__(self.optimizer.param_groups, {})


@pytest.mark.parametrize(
    ("make_it", "sentence"),
    [
        (lambda: QuasiGlobal().check_optimizers([Lookahead()]), "and Lookahead is another method"),
        (lambda: QuasiGlobalAdam().check_optimizers([Lookahead()]), "from Adam or AdamW, not from Lookahead"),
        (lambda: QuasiGlobal(beta=1.0), "`beta` must be at least 0 and below 1; got 1.0"),
        (lambda: QuasiGlobal(mu=-0.1), "`mu` must be at least 0 and below 1"),
        (lambda: QuasiGlobal(period=0), "`period` must be a whole number, at least 1"),
        (lambda: DMSGD(3), "`option` must be 1 or 2; got 3"),
        (lambda: DMSGD(mu=1.5), "`mu` must be at least 0 and at most 1"),
        (lambda: DMSGD(beta="x"), "`beta` must be at least 0"),
        (lambda: GossipStrategy("quasi_global", sync_period=2), "QuasiGlobal makes a round at every step"),
        (lambda: GossipStrategy("d2", gossip_steps=2), "D2 makes one gossip step for each gradient step"),
        (lambda: GossipStrategy("gradient_tracking", overlap=True), "GradientTracking needs its neighbours' messages at once"),
        (lambda: GossipStrategy("quasi_globl"), "did you mean 'quasi_global'"),
        (lambda: D2().connect(make("one_peer_exponential", 8)), "D2 needs a symmetric and static mixing matrix"),
        (lambda: D2().connect(make([[0.2, 0.8], [0.8, 0.2]], 2)), "smallest eigenvalue is -0.600 .* use .W . I. / 2"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(make_it, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        make_it()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("algorithm", "optimizer", "sentence"),
    [
        (QuasiGlobal(), partial(SGD, lr=0.1, momentum=0.9), "QuasiGlobal has a momentum of its own.* use `momentum=0`"),
        (DMSGD(), partial(SGD, lr=0.1, momentum=0.9), "DMSGD has a momentum of its own"),
        (QuasiGlobal(), torch.optim.Adam, "QuasiGlobal takes the place of SGD's momentum, and Adam is another method"),
        (QuasiGlobalAdam(), partial(SGD, lr=0.1), "QuasiGlobalAdam takes its options from Adam or AdamW, not from SGD"),
        (QuasiGlobalAdam(), partial(torch.optim.Adam, amsgrad=True), "QuasiGlobalAdam has no `amsgrad`"),
    ],
)
def test_optimizers_that_do_not_go_with_an_algorithm_are_refused(algorithm, optimizer, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        algorithm.check_optimizers([optimizer([torch.nn.Parameter(torch.ones(1))])])
    assert "\n" not in str(error.value)


def test_d2_makes_graphs_lazy_and_warns_at_the_boundary():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert repr(D2().connect(Ring(8)).topology) == "Lazy(Ring(8))"
        assert isinstance(D2().connect(make([(0, 1), (1, 2)], 3)).topology, Lazy)
        own = make(Complete(4).matrix(), 4)
        assert D2().connect(own).topology is own
        assert isinstance(D2().connect(Lazy(Ring(4))).topology.topology, Ring)
    with pytest.warns(UserWarning, match="-1/3, where D2 just does not converge"):
        D2().connect(make(Ring(4).matrix(), 4))


def test_lazy_matrices():
    for graph in (Ring(6), make("one_peer_exponential", 8), make("random_matching:3", 4)):
        lazy = Lazy(graph)
        for t in range(3):
            close(lazy.matrix(t), (graph.matrix(t) + torch.eye(graph.num_replicas)) / 2)
            assert lazy.listeners(0, t) == graph.listeners(0, t)
    assert torch.linalg.eigvalsh(Lazy(Ring(8)).matrix())[0] > 0
