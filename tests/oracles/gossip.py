"""Gossip algorithms in matrix form: row `i` of `X` is replica `i`, `W` mixes rows.

`Delta` is what the optimizer's H local steps of a round add to the point that the round started from. It takes the place
that `-eta g` has in the papers. `k` counts gossip steps per round, `compress` maps one row to what its receivers decode and
is called for the rows in order.
"""

from __future__ import annotations

import numpy as np

from tests.oracles.local_sgd import clip


def rounds(x0, gradients, etas, n, optimizer, limit, H, communicate):
    """H local steps, then X <- communicate(r, X at the start of the round, Delta), with r = 0, 1, ..."""
    X, history = np.tile(x0, (n, 1)), []
    for t, eta in enumerate(etas):
        if t % H == 0:
            start = X
        G = np.array([gradients(i, t, X[i]) for i in range(n)])
        X = optimizer.step(X, clip(G, limit), eta)
        if (t + 1) % H == 0:
            X = communicate(t // H, start, X - start)
        history.append(X)
    return np.array(history)


def each_row(compress):
    return lambda X: np.array([compress(x) for x in X])


def mixed(X, W, r, k):
    """W(rk + k - 1) ... W(rk + 1) W(rk) X."""
    for s in range(r * k, (r + 1) * k):
        X = W(s) @ X
    return X


def dsgd(x0, gradients, etas, n, optimizer, limit=None, *, W, H=1, k=1):
    """D-SGD (thesis chapter 5), `W(s)` the matrix of gossip step s."""

    def communicate(r, X, Delta):
        # X_{t+1} = W (X_t + Delta)
        return mixed(X + Delta, W, r, k)

    return rounds(x0, gradients, etas, n, optimizer, limit, H, communicate)


def dsgd_delayed(x0, gradients, etas, n, optimizer, limit=None, *, W, H=1):
    """D-SGD where the mixing of a round's snapshot arrives one round later."""
    previous = None

    def communicate(r, X, Delta):
        nonlocal previous
        # Y_r = X_r + Delta
        Y = X + Delta
        # X_{r+1} = Y_r + (W_{r-1} - I) Y_{r-1}
        X = Y if r == 0 else Y + (W(r - 1) - np.eye(n)) @ previous
        previous = Y
        return X

    return rounds(x0, gradients, etas, n, optimizer, limit, H, communicate)


def dpsgd(x0, gradients, etas, n, optimizer, limit=None, *, W, H=1, k=1):
    """D-PSGD (Lian et al. 2017, algorithm 1), `W(s)` the matrix of gossip step s."""

    def communicate(r, X, Delta):
        # X_{t+1} = W X_t + Delta
        return mixed(X, W, r, k) + Delta

    return rounds(x0, gradients, etas, n, optimizer, limit, H, communicate)


def choco(x0, gradients, etas, n, optimizer, limit=None, *, W, gamma, compress, H=1, k=1, x_hat="start"):
    """CHOCO-SGD (thesis algorithm 2), shown after the mix that follows the step."""
    Q = each_row(compress)
    Xhat = np.tile({"start": x0, "zero": 0 * x0}[x_hat], (n, 1))

    def communicate(r, X, Delta):
        nonlocal Xhat
        for s in range(k):
            # q_i = Q(x_i - xhat_i), xhat_j += q_j
            Xhat = Xhat + Q(X - Xhat)
            # x_i += Delta_i (once a round)
            X = X + Delta if s == 0 else X
            # x_i += gamma sum_j w_ij (xhat_j - xhat_i)
            X = X + gamma * (W @ Xhat - Xhat)
        return X

    return rounds(x0, gradients, etas, n, optimizer, limit, H, communicate)


def choco_error_feedback(x0, gradients, etas, n, optimizer, limit=None, *, W, gamma, compress, H=1, k=1, x_hat="start"):
    """CHOCO-SGD in the form with error feedback (thesis algorithm 15, with gamma for the eta that its line 3 prints)."""
    Q = each_row(compress)
    # x^{-1} = xhat^0 and m^0 = x^{-1} - xhat^0 = 0
    before = Xhat = np.tile({"start": x0, "zero": 0 * x0}[x_hat], (n, 1))
    M = np.zeros_like(Xhat)

    def communicate(r, X, Delta):
        nonlocal before, Xhat, M
        for s in range(k):
            # v = x^t - x^{t-1} + m^t
            V = X - before + M
            before = X
            # q = Q(v), m^{t+1} = v - q
            q = Q(V)
            M = V - q
            # xhat_j += q_j
            Xhat = Xhat + q
            # x_i += Delta_i (once a round), x_i += gamma sum_j w_ij (xhat_j - xhat_i)
            X = (X + Delta if s == 0 else X) + gamma * (W @ Xhat - Xhat)
        return X

    return rounds(x0, gradients, etas, n, optimizer, limit, H, communicate)


def dcd(x0, gradients, etas, n, optimizer, limit=None, *, W, compress, H=1):
    """DCD-PSGD (Tang et al. 2018, "Communication Compression for Decentralized Training", difference compression)."""
    C = each_row(compress)
    Xhat = np.tile(x0, (n, 1))

    def communicate(r, X, Delta):
        nonlocal Xhat
        # x_i^{t+1/2} = sum_j w_ij xhat_j^t + Delta_i
        half = W @ Xhat + Delta
        # z_i = x_i^{t+1/2} - x_i^t
        CZ = C(half - X)
        # xhat_j^{t+1} = xhat_j^t + C(z_j)
        Xhat = Xhat + CZ
        # x_i^{t+1} = x_i^t + C(z_i)
        return X + CZ

    return rounds(x0, gradients, etas, n, optimizer, limit, H, communicate)


def ecd(x0, gradients, etas, n, optimizer, limit=None, *, W, compress, H=1):
    """ECD-PSGD (Tang et al. 2018, extrapolation compression); t counts rounds from 1."""
    C = each_row(compress)
    Xtilde = np.tile(x0, (n, 1))

    def communicate(r, X, Delta):
        nonlocal Xtilde
        t = r + 1
        # x_i^{t+1} = sum_j w_ij xtilde_j^t + Delta_i
        new = W @ Xtilde + Delta
        # z_i = (1 - t/2) x_i^t + t/2 x_i^{t+1}
        Z = (1 - t / 2) * X + t / 2 * new
        # xtilde_j^{t+1} = (1 - 2/t) xtilde_j^t + 2/t C(z_j)
        Xtilde = (1 - 2 / t) * Xtilde + 2 / t * C(Z)
        return new

    return rounds(x0, gradients, etas, n, optimizer, limit, H, communicate)


def deep_squeeze(x0, gradients, etas, n, optimizer, limit=None, *, W, gamma, compress, H=1):
    """DeepSqueeze (Tang et al. 2019)."""
    C = each_row(compress)
    E = np.zeros((n, x0.size))

    def communicate(r, X, Delta):
        nonlocal E
        # v_i = x_i + Delta_i + e_i
        V = X + Delta + E
        CV = C(V)
        # e_i <- v_i - C(v_i)
        E = V - CV
        # x_i <- x_i + Delta_i + gamma sum_j (w_ij - delta_ij) C(v_j)
        return X + Delta + gamma * (W @ CV - CV)

    return rounds(x0, gradients, etas, n, optimizer, limit, H, communicate)


def ef_sign(x0, gradients, etas, n, optimizer, limit=None, *, compress):
    """Centralized error feedback on gradients, one way: all replicas gather what all compressed.

    Zheng, Huang and Kwok 2019 (dist-EF-SGD) without the second compression, by a server, and with the optimizer after the
    exchange. Here `etas[t-1]` stands for the last learning rate that was not zero; where `etas[t]` is zero the error stays.
    """
    C = each_row(compress)
    X, E, last, history = np.tile(x0, (n, 1)), np.zeros((n, x0.size)), None, []
    for t, eta in enumerate(etas):
        G = clip(np.array([gradients(i, t, X[i]) for i in range(n)]), limit)
        # p_i = g_i + (eta_{t-1} / eta_t) e_i
        P = G + (last / eta if eta > 0 and last is not None else 1) * E
        # g~_i = C(p_i)
        sent = C(P)
        if eta > 0:
            # e_i = p_i - g~_i
            E, last = P - sent, eta
        # x <- x - eta mean_i g~_i, by the optimizer
        X = optimizer.step(X, np.tile(sent.mean(axis=0), (n, 1)), eta)
        history.append(X)
    return np.array(history)
