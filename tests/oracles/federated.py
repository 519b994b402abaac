"""Federated algorithms (thesis chapter 8 and the papers it names), one NumPy transcription each.

`problem` has `samples`, `steps`, `cohorts`, `etas`, `gradient(k, h, x)` and `full_gradient(k, x)`. Every function returns the
server's model after each round, `[rounds, d]`.
"""

from __future__ import annotations

import numpy as np

from tests.oracles.local_sgd import SGD


def shares(problem, S):
    """p_k = n_k / sum_{j in S} n_j."""
    n = np.array([problem.samples[k] for k in S], dtype=float)
    return n / n.sum()


def local_update(problem, k, x, eta, correct=lambda g, y: g, optimizer=None):
    """Algorithm 17: tau_k steps of a new optimizer, from the server's model; `correct` changes the gradient at y."""
    optimizer, y = optimizer or SGD(), x.copy()
    for h in range(problem.steps[k]):
        g = correct(problem.gradient(k, h, y), y)
        y = optimizer.step(y, g, eta)
    return y


def fed_avg(x0, problem, optimizer=SGD, uniform=False):
    """Algorithm 5 without lines 7-10: x_t = sum_k p_k y_k."""
    x, history = x0.copy(), []
    for S, eta in zip(problem.cohorts, problem.etas, strict=True):
        p = np.full(len(S), 1 / len(S)) if uniform else shares(problem, S)
        x = sum(p_k * local_update(problem, k, x, eta, optimizer=optimizer()) for p_k, k in zip(p, S, strict=True))
        history.append(x)
    return np.array(history)


def fed_prox(x0, problem, mu):
    """FedAvg with the gradient of mu/2 ||w - w_0||^2 added."""
    x, history = x0.copy(), []
    for S, eta in zip(problem.cohorts, problem.etas, strict=True):
        w_0 = x.copy()
        y = [local_update(problem, k, w_0, eta, lambda g, w, w_0=w_0: g + mu * (w - w_0)) for k in S]
        x = sum(p_k * y_k for p_k, y_k in zip(shares(problem, S), y, strict=True))
        history.append(x)
    return np.array(history)
