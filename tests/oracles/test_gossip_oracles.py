"""Closed forms that the gossip oracles obey, whatever the package does."""

from __future__ import annotations

import numpy as np
import pytest

from tests.oracles import compressors, gossip, topologies
from tests.oracles.local_sgd import SGD, Adam, local_sgd, minibatch_sgd

STEPS, SIZES = 14, (6, 2)
ETAS = [0.2] * 5 + [0.1] * 4 + [0.0] + [0.05] * 4  # a decay, and a zero
X0 = np.random.default_rng(1).normal(size=sum(SIZES))

IDENTITY = compressors.identity
SIGN = compressors.per_tensor(compressors.sign, SIZES)
TOP = compressors.per_tensor(compressors.top_k(0.34), SIZES)
QSGD = compressors.per_tensor(compressors.qsgd(7, 0.5), SIZES)
LOSSY = pytest.mark.parametrize("compress", [SIGN, TOP, QSGD], ids=["sign", "top_k", "qsgd"])
GRAPH = pytest.mark.parametrize(
    "W", [topologies.ring(4), topologies.star(5), topologies.chain(3), topologies.ring(2)], ids=["ring", "star", "chain", "two"]
)


def quadratics(n):
    """Gradients a^2 (x - c), another (a, c) for every replica and step."""
    rng = np.random.default_rng(2)
    a, c = rng.uniform(0.3, 1.2, (n, STEPS, X0.size)), rng.normal(size=(n, STEPS, X0.size))
    return lambda k, t, x: a[k, t] ** 2 * (x - c[k, t])


def run(oracle, n, optimizer=None, limit=None, **options):
    return oracle(X0, quadratics(n), ETAS, n, optimizer or SGD(0.9, 0.01), limit=limit, **options)


def equal(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


def alone(n, **options):
    """Every replica by itself: rounds that never end."""
    return run(local_sgd, n, H=[STEPS + 1], **options)


# ------------------------------------------------------------------------------------------------------------- mixing


@pytest.mark.parametrize(("H", "k"), [(1, 1), (3, 1), (2, 3)])
def test_dsgd_on_the_complete_graph_averages_parameters(H, k):
    n, W = 4, topologies.static(topologies.complete(4))
    for limit, optimizer in ((None, SGD), (0.7, Adam)):
        expected = run(local_sgd, n, optimizer(), limit, H=[H] * STEPS)
        equal(run(gossip.dsgd, n, optimizer(), limit, W=W, H=H, k=k), expected)


def test_dsgd_and_dpsgd_differ_by_one_mixing_of_the_step():
    """With gradients that do not depend on x, D-SGD's X is W times D-PSGD's: both start equal, and W commutes with itself."""
    n, W = 4, topologies.ring(4)
    noise = np.random.default_rng(3).normal(size=(n, STEPS, X0.size))
    dsgd, dpsgd = (
        oracle(X0, lambda k, t, x: noise[k, t], ETAS, n, SGD(0.9), W=topologies.static(W))
        for oracle in (gossip.dsgd, gossip.dpsgd)
    )
    equal(dsgd, W @ dpsgd)
    assert np.abs(dsgd - dpsgd).max() > 0.01


@pytest.mark.parametrize("oracle", [gossip.dsgd, gossip.dpsgd])
def test_gossip_steps_are_powers_of_the_matrix_and_advance_its_count(oracle):
    W, E = topologies.ring(4), topologies.one_peer_exponential(4)
    equal(run(oracle, 4, W=topologies.static(W), k=3), run(oracle, 4, W=topologies.static(W @ W @ W)))
    # Two steps of the one-peer graph of four average exactly; with three, every other round has another matrix.
    equal(run(oracle, 4, W=E, k=2), run(oracle, 4, W=topologies.static(topologies.complete(4))))
    counted = []
    run(oracle, 4, W=lambda s: counted.append(s) or W, H=2, k=3)
    assert counted == list(range(STEPS // 2 * 3))
    E = topologies.one_peer_exponential(3)
    alternating = run(oracle, 3, W=lambda r: E(r) @ E(r + 1) @ E(r), H=2)
    equal(run(oracle, 3, W=E, H=2, k=3), alternating)
    assert np.abs(alternating - run(oracle, 3, W=topologies.static(E(0) @ E(1) @ E(0)), H=2)).max() > 1e-3


def test_delayed_dsgd_moves_its_modes_by_the_recurrence_and_grows_where_an_eigenvalue_is_negative():
    """Without gradients y_{r+1} = y_r - (1 - l) y_{r-1} for the mode of eigenvalue l: |roots|^2 = 1 - l where 1 - l > 1/4."""
    n, W = 4, topologies.ring(4)
    noise = np.random.default_rng(4).normal(size=(n, X0.size))
    etas = [1.0] + [0.0] * 12
    X = gossip.dsgd_delayed(np.zeros_like(X0), lambda k, t, x: noise[k], etas, n, SGD(), W=topologies.static(W))
    eigenvalues, modes = np.linalg.eigh(W)
    equal(eigenvalues, [-1 / 3, 1 / 3, 1 / 3, 1])
    r = np.arange(len(etas))[:, None]
    for index in range(3):
        modulus = np.sqrt(1 - eigenvalues[index])
        angle = np.arccos(1 / (2 * modulus))
        # X_r = Y_{r+1}, and Y_0 = Y_1 = X_0
        shape = modulus ** (r + 1) * (np.cos((r + 1) * angle) + np.sin((r + 1) * angle) / np.tan(angle))
        equal(X.transpose(0, 2, 1) @ modes[:, index], shape * (X[0].T @ modes[:, index]))
    assert np.abs(X[-3:].transpose(0, 2, 1) @ modes[:, 0]).max() > 3 * np.abs(X[0].T @ modes[:, 0]).max()
    assert np.abs(X[-3:].transpose(0, 2, 1) @ modes[:, 1]).max() < 0.3 * np.abs(X[0].T @ modes[:, 1]).max()


def test_delayed_dsgd_arrives_one_round_late():
    """X_1 = Y_0; X_{r+1} = Y_r + (W_{r-1} - I) Y_{r-1}, with the matrix of the round that made the snapshot."""
    n, W, gradient = 3, topologies.one_peer_exponential(3), quadratics(3)
    X = run(gossip.dsgd_delayed, n, SGD(), W=W)
    visible = np.concatenate([np.tile(X0, (1, n, 1)), X])
    Y = [[visible[t, k] - eta * gradient(k, t, visible[t, k]) for k in range(n)] for t, eta in enumerate(ETAS)]
    equal(X[0], Y[0])
    for t in range(1, STEPS):
        for i in range(n):
            equal(X[t, i], Y[t][i] - Y[t - 1][i] + sum(W(t - 1)[i, j] * Y[t - 1][j] for j in range(n)))


# -------------------------------------------------------------------------------------------------------- compression


@GRAPH
@pytest.mark.parametrize("H", [1, 3])
def test_without_compression_choco_dcd_and_ecd_are_dpsgd(W, H):
    n = len(W)
    expected = run(gossip.dpsgd, n, W=topologies.static(W), H=H)
    equal(run(gossip.choco, n, W=W, gamma=1.0, compress=IDENTITY, H=H), expected)
    equal(run(gossip.choco, n, W=W, gamma=1.0, compress=IDENTITY, H=H, x_hat="zero"), expected)
    equal(run(gossip.dcd, n, W=W, compress=IDENTITY, H=H), expected)
    equal(run(gossip.ecd, n, W=W, compress=IDENTITY, H=H), expected)


@GRAPH
@pytest.mark.parametrize("H", [1, 3])
def test_without_compression_deep_squeeze_is_dsgd(W, H):
    n = len(W)
    actual = run(gossip.deep_squeeze, n, W=W, gamma=1.0, compress=IDENTITY, H=H)
    equal(actual, run(gossip.dsgd, n, W=topologies.static(W), H=H))


def test_a_smaller_gamma_is_a_lazier_matrix():
    W, gamma = topologies.ring(4), 0.4
    lazy = topologies.static(gamma * W + (1 - gamma) * np.eye(4))
    equal(run(gossip.choco, 4, W=W, gamma=gamma, compress=IDENTITY), run(gossip.dpsgd, 4, W=lazy))
    equal(run(gossip.deep_squeeze, 4, W=W, gamma=gamma, compress=IDENTITY), run(gossip.dsgd, 4, W=lazy))


def test_without_compression_further_gossip_steps_of_choco_mix_the_stepped_iterate():
    """k = 2: W (W X + Delta), since the second compression sees the gradient step."""
    n, W, previous = 4, topologies.ring(4), np.tile(X0, (4, 1))
    X = run(gossip.choco, n, SGD(), W=W, gamma=1.0, compress=IDENTITY, k=2)
    for t, eta in enumerate(ETAS):
        G = np.array([quadratics(n)(i, t, previous[i]) for i in range(n)])
        equal(X[t], W @ (W @ previous - eta * G))
        previous = X[t]


@LOSSY
@pytest.mark.parametrize("x_hat", ["start", "zero"])
@pytest.mark.parametrize(("H", "k"), [(1, 1), (2, 1), (1, 3)])
def test_choco_equals_its_error_feedback_form(compress, x_hat, H, k):
    options = {"W": topologies.ring(4), "gamma": 0.4, "compress": compress, "x_hat": x_hat, "H": H, "k": k}
    trajectory = run(gossip.choco, 4, **options)
    equal(run(gossip.choco_error_feedback, 4, **options), trajectory)
    assert np.abs(trajectory - run(gossip.choco, 4, **{**options, "compress": IDENTITY})).max() > 0.01


@LOSSY
@GRAPH
def test_the_mean_moves_by_the_mean_step_alone(compress, W):
    n, static = len(W), topologies.static(W)
    runs = [
        run(gossip.dsgd, n, SGD(), W=static, k=2),
        run(gossip.dsgd_delayed, n, SGD(), W=static),
        run(gossip.dpsgd, n, SGD(), W=static),
        run(gossip.choco, n, SGD(), W=W, gamma=0.4, compress=compress, x_hat="zero"),
        run(gossip.choco, n, SGD(), W=W, gamma=0.4, compress=compress, k=3),
        run(gossip.deep_squeeze, n, SGD(), W=W, gamma=0.1, compress=compress),
    ]
    gradient = quadratics(n)
    for X in runs:
        X = np.concatenate([np.tile(X0, (1, n, 1)), X])
        for t, eta in enumerate(ETAS):
            mean_step = eta * np.mean([gradient(i, t, X[t, i]) for i in range(n)], axis=0)
            equal(X[t + 1].mean(axis=0), X[t].mean(axis=0) - mean_step)


@pytest.mark.parametrize("n", [1, 3])
def test_without_mixing_replicas_are_alone(n):
    expected, I = alone(n), np.eye(n)  # noqa: E741
    for oracle in (gossip.dsgd, gossip.dsgd_delayed, gossip.dpsgd):
        equal(run(oracle, n, W=topologies.static(I)), expected)
    equal(run(gossip.choco, n, W=I, gamma=0.4, compress=SIGN, k=2), expected)
    equal(run(gossip.deep_squeeze, n, W=I, gamma=0.4, compress=SIGN), expected)
    equal(run(gossip.dcd, n, W=I, compress=IDENTITY), expected)
    equal(run(gossip.ecd, n, W=I, compress=IDENTITY), expected)


@pytest.mark.parametrize("graph", [topologies.ring, topologies.star, topologies.chain, topologies.complete])
def test_one_replica_is_alone(graph):
    equal(graph(1), [[1.0]])
    equal(topologies.one_peer_exponential(1)(5), [[1.0]])


@LOSSY
def test_dcd_compresses_what_a_lonely_replica_does(compress):
    """W = I: x <- x + C(-eta g), so it is not single-device training unless C is the identity."""
    X, previous = run(gossip.dcd, 1, SGD(), W=np.eye(1), compress=compress), X0
    for t, eta in enumerate(ETAS):
        equal(X[t, 0], previous + compress(-eta * quadratics(1)(0, t, previous)))
        previous = X[t, 0]


def test_ecd_extrapolates_a_constant_error_away():
    """C(z) = z + c leaves xtilde off by 2c after one round and by c after every later one; x then drifts by it."""
    c = 0.01 * np.arange(X0.size)
    X = gossip.ecd(X0, lambda k, t, x: 0 * x, ETAS, 3, SGD(), W=topologies.ring(3), compress=lambda z: z + c)
    equal(X[0], np.tile(X0, (3, 1)))
    for r in range(2, STEPS + 1):
        equal(X[r - 1], np.tile(X0 + r * c, (3, 1)))


@LOSSY
def test_deep_squeeze_replica_by_replica(compress):
    n, W, gamma, gradient = 4, topologies.ring(4), 0.3, quadratics(4)
    X = run(gossip.deep_squeeze, n, SGD(), W=W, gamma=gamma, compress=compress)
    x, e = [X0] * n, [0 * X0] * n
    for t, eta in enumerate(ETAS):
        half = [x[i] - eta * gradient(i, t, x[i]) for i in range(n)]
        sent = [compress(half[i] + e[i]) for i in range(n)]
        e = [half[i] + e[i] - sent[i] for i in range(n)]
        x = [half[i] + gamma * sum(W[i, j] * (sent[j] - sent[i]) for j in range(n)) for i in range(n)]
        equal(X[t], x)


# ------------------------------------------------------------- the forms that keep one weighted sum instead of neighbours


def dcd_weighted_sum(x0, gradients, etas, n, optimizer, limit=None, *, W, compress, H=1):
    S = np.tile(x0, (n, 1))

    def communicate(r, X, Delta):
        nonlocal S
        # s = sum_j w_ij xhat_j: x += C(s + Delta - x), s += sum_j w_ij C(z_j)
        CZ = np.array([compress(z) for z in S + Delta - X])
        S = S + W @ CZ
        return X + CZ

    return gossip.rounds(x0, gradients, etas, n, optimizer, limit, H, communicate)


def ecd_weighted_sum(x0, gradients, etas, n, optimizer, limit=None, *, W, compress, H=1):
    S = np.tile(x0, (n, 1))

    def communicate(r, X, Delta):
        nonlocal S
        # s = sum_j w_ij xtilde_j: s <- (1 - 2/t) s + 2/t sum_j w_ij C(z_j)
        t, new = r + 1, S + Delta
        S = (1 - 2 / t) * S + 2 / t * W @ np.array([compress(z) for z in (1 - t / 2) * X + t / 2 * new])
        return new

    return gossip.rounds(x0, gradients, etas, n, optimizer, limit, H, communicate)


def choco_weighted_sum(x0, gradients, etas, n, optimizer, limit=None, *, W, gamma, compress, x_hat="start", H=1):
    Xhat = np.tile(x0, (n, 1)) * (x_hat == "start")
    S = Xhat

    def communicate(r, X, Delta):
        nonlocal Xhat, S
        # s = sum_j w_ij xhat_j: xhat += q, s += sum_j w_ij q_j, x += gamma (s - xhat)
        q = np.array([compress(x) for x in X - Xhat])
        Xhat, S = Xhat + q, S + W @ q
        return X + Delta + gamma * (S - Xhat)

    return gossip.rounds(x0, gradients, etas, n, optimizer, limit, H, communicate)


@LOSSY
@GRAPH
@pytest.mark.parametrize("H", [1, 2])
def test_weighted_sums_equal_the_copies_of_neighbours(compress, W, H):
    n, options = len(W), {"W": W, "compress": compress, "H": H}
    equal(run(dcd_weighted_sum, n, **options), run(gossip.dcd, n, **options))
    expected = run(gossip.ecd, n, **options)
    np.testing.assert_allclose(run(ecd_weighted_sum, n, **options), expected, rtol=1e-11, atol=1e-11)
    for x_hat in ("start", "zero"):
        options.update(gamma=0.4, x_hat=x_hat)
        equal(run(choco_weighted_sum, n, **options), run(gossip.choco, n, **options))


# ----------------------------------------------------------------------------------------------------- error feedback


def test_error_feedback_without_compression_is_minibatch_sgd():
    equal(run(gossip.ef_sign, 4, compress=IDENTITY), run(minibatch_sgd, 4))
    # Each replica clips its own gradient; for one replica that is what mini-batch SGD does.
    equal(run(gossip.ef_sign, 1, limit=0.7, compress=IDENTITY), run(minibatch_sgd, 1, limit=0.7))


@LOSSY
def test_error_feedback_keeps_the_virtual_iterate_of_sgd(compress):
    """x_t - eta_{t-1} mean e_t is SGD's: for one replica, the trajectory alone then tells e, and e the next step."""
    X = run(gossip.ef_sign, 1, SGD(), compress=compress)[:, 0]
    gradient, previous, virtual, e, last = quadratics(1), X0, X0, 0 * X0, 1.0
    for t, eta in enumerate(ETAS):
        g = gradient(0, t, previous)
        if eta > 0:
            equal(X[t], previous - eta * compress(g + last / eta * e))
            virtual, last = virtual - eta * g, eta
        else:
            equal(X[t], previous)
        e, previous = (X[t] - virtual) / last, X[t]
    assert np.abs(e).max() > 0.01


@LOSSY
def test_error_feedback_replica_by_replica(compress):
    n, limit, gradient = 3, 0.7, quadratics(3)
    X = run(gossip.ef_sign, n, SGD(), limit, compress=compress)
    x, d = X0, [0 * X0] * n  # d_i = eta_{t-1} e_i, of the size of a step
    for t, eta in enumerate(ETAS):
        if eta > 0:
            g = [gradient(i, t, x) for i in range(n)]
            p = [g[i] * min(1, limit / (np.linalg.norm(g[i]) + 1e-6)) + d[i] / eta for i in range(n)]
            x = x - eta * np.mean([compress(v) for v in p], axis=0)
            d = [eta * (v - compress(v)) for v in p]
        equal(X[t], np.tile(x, (n, 1)))


def test_error_feedback_keeps_replicas_equal():
    X = run(gossip.ef_sign, 3, Adam(), 0.7, compress=SIGN)
    assert (X[:, :1] == X).all()


# -------------------------------------------------------------------------------------- topologies and compressors alone


@pytest.mark.parametrize("n", range(1, 10))
def test_matrices_are_doubly_stochastic(n):
    one_peer = topologies.one_peer_exponential(n)
    matrices = [topologies.ring(n), topologies.chain(n), topologies.star(n), topologies.complete(n)]
    matrices.append(topologies.matching(n, [(i, i + 1) for i in range(0, n - 1, 2)]))
    assert all((W == W.T).all() for W in matrices)
    for W in matrices + [one_peer(t) for t in range(5)]:
        assert (W >= 0).all()
        equal(W.sum(axis=0), np.ones(n))
        equal(W.sum(axis=1), np.ones(n))


def test_matrices_of_known_form():
    third = 1 / 3
    equal(
        topologies.ring(4),
        [[third, third, 0, third], [third, third, third, 0], [0, third, third, third], [third, 0, third, third]],
    )
    equal(topologies.ring(2), np.full((2, 2), 1 / 2))
    equal(topologies.chain(3), [[2 / 3, third, 0], [third, third, third], [0, third, 2 / 3]])
    equal(topologies.star(3), [[third, third, third], [third, 2 / 3, 0], [third, 0, 2 / 3]])
    equal(topologies.complete(5), np.full((5, 5), 1 / 5))
    # Replica 0 sends to 1, then to 2: column 0.
    one_peer = topologies.one_peer_exponential(4)
    equal(one_peer(0)[:, 0], [1 / 2, 1 / 2, 0, 0])
    equal(one_peer(1)[:, 0], [1 / 2, 0, 1 / 2, 0])
    equal(one_peer(2), one_peer(0))
    equal(topologies.matching(3, [(0, 2)]), [[1 / 2, 0, 1 / 2], [0, 1, 0], [1 / 2, 0, 1 / 2]])


@pytest.mark.parametrize("n", [4, 16, 36, 64])
def test_spectral_gap_of_the_ring(n):
    """Thesis table 4.2: .67, .05, .01, .003; in closed form 2/3 (1 - cos(2 pi / n))."""
    second = np.sort(np.abs(np.linalg.eigvalsh(topologies.ring(n))))[-2]
    equal(1 - second, 2 / 3 * (1 - np.cos(2 * np.pi / n)))
    assert 1 - second == pytest.approx({4: 0.67, 16: 0.05, 36: 0.01, 64: 0.003}[n], rel=0.08)


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_one_peer_exponential_averages_exactly_in_one_period(p):
    n, product = 2**p, np.eye(2**p)
    for t in range(p):
        product = topologies.one_peer_exponential(n)(t) @ product
    equal(product, np.full((n, n), 1 / n))


def test_compressors_contract_by_their_closed_forms():
    x = np.random.default_rng(6).normal(size=50)
    norm = np.linalg.norm
    equal(norm(compressors.sign(x) - x) ** 2, norm(x) ** 2 - norm(x, 1) ** 2 / 50)
    assert np.count_nonzero(compressors.top_k(0.1)(x)) == 5
    equal(norm(compressors.top_k(0.1)(x) - x) ** 2, np.sum(np.sort(x**2)[:-5]))
    equal(compressors.top_k(0.01)(x[:6]), np.where(np.abs(x[:6]) == np.abs(x[:6]).max(), x[:6], 0))
    equal(compressors.sign(np.array([0.0, -2.0])), [1.0, -1.0])
    for zero in (compressors.sign, compressors.top_k(0.5), compressors.qsgd(7, 0.5)):
        equal(zero(np.zeros(4)), np.zeros(4))


@pytest.mark.parametrize("s", [1, 2, 7, 8, 127])
def test_qsgd_is_unbiased_and_its_scaled_form_contracts(s):
    x = np.random.default_rng(7).normal(size=20)
    u = (np.arange(20_000) + 0.5) / 20_000  # the expectation over u, one coordinate at a time
    levels = np.array([compressors.qsgd_levels(x, value, s) for value in u])
    assert levels.min() >= 0 and levels.max() <= s
    decoded = np.array([compressors.qsgd(s, value)(x) for value in u])
    np.testing.assert_allclose(decoded.mean(axis=0), x, rtol=0, atol=np.linalg.norm(x) / s / 20_000)
    scaled = np.array([compressors.qsgd(s, value, scaled=True)(x) for value in u])
    error = np.sum(np.mean((scaled - x) ** 2, axis=0))
    assert error <= (1 - 1 / compressors.qsgd_tau(20, s)) * np.sum(x**2)


def test_tau_of_qsgd():
    assert compressors.qsgd_tau(16, 8) == 1.25  # 16 / 8^2
    assert compressors.qsgd_tau(400, 2) == 11  # 20 / 2


def test_the_top_level_of_qsgd_is_reached_by_a_vector_of_one_value():
    """Why the papers' 2^(b-1) levels do not fit into b bits with the sign, and 2^(b-1) - 1 do."""
    assert compressors.qsgd_levels(np.array([0.0, -3.0]), 0.0, 8)[1] == 8
    equal(compressors.qsgd(7, 0.99)(np.array([0.0, -3.0])), [0.0, -3.0])


def test_tensors_are_compressed_one_by_one():
    x = np.arange(8.0) - 3
    equal(SIGN(x), np.concatenate([compressors.sign(x[:6]), compressors.sign(x[6:])]))
    assert np.count_nonzero(TOP(x)) == 2 + 1
