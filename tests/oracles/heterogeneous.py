"""Algorithms for heterogeneous data in matrix form: row `i` of `X` is replica `i`, `W` mixes rows.

Where an algorithm owns its momentum, weight decay is part of the gradient, at the point where that is taken.
"""

from __future__ import annotations

import numpy as np

from tests.oracles.local_sgd import clip


def all_gradients(gradients, t, X, limit=None):
    return clip(np.array([gradients(i, t, x) for i, x in enumerate(X)]), limit)


def quasi_global(x0, gradients, etas, n, wd, limit=None, *, W, beta, mu, nesterov=False, period=1):
    """QG-DSGDm (thesis algorithm 6), QG-DSGDm-N in form A, multi-step (algorithm 20). `W(t)` is the matrix of step t."""
    X, M, history = np.tile(x0, (n, 1)), np.zeros((n, x0.size)), []
    for t, eta in enumerate(etas):
        # y = x - eta beta mhat (form A), or y = x
        Y = X - eta * beta * M if nesterov else X
        G = all_gradients(gradients, t, Y, limit) + wd * Y
        # m = beta mhat + g; x^{t+1/2} = x - eta m; x^{t+1} = W x^{t+1/2}
        new = W(t) @ (X - eta * (beta * M + G))
        if t % period == 0 and eta > 0:
            # d = (x^t - x^{t+1}) / eta; mhat <- mu mhat + (1 - mu) d
            M = mu * M + (1 - mu) * (X - new) / eta
        X = new
        history.append(X)
    return np.array(history)


def quasi_global_adam(x0, gradients, etas, n, wd, limit=None, *, W, b1=0.9, b2=0.999, eps=1e-8, decoupled=False):
    """QG-DAdam (thesis algorithm 19, with g for the g-hat that it prints, and sqrt(v) + eps)."""
    X, history = np.tile(x0, (n, 1)), []
    M = V = np.zeros((n, x0.size))
    for t, eta in enumerate(etas):
        G = all_gradients(gradients, t, X, limit)
        start = X
        if decoupled:
            X = X - eta * wd * X
        else:
            G = G + wd * X
        m = b1 * M + (1 - b1) * G
        v = b2 * V + (1 - b2) * G**2
        X = W(t) @ (X - eta * m / (np.sqrt(v) + eps))
        D = start - X
        norms = np.linalg.norm(D, axis=1, keepdims=True)
        D = np.divide(D, norms, out=np.zeros_like(D), where=norms > 0)
        M = b1 * M + (1 - b1) * D
        V = b2 * V + (1 - b2) * D**2
        history.append(X)
    return np.array(history)


def dmsgd(x0, gradients, etas, n, wd, limit=None, *, W, option, beta, mu):
    """DMSGD (Balu et al., thesis algorithm 23)."""
    X, history = np.tile(x0, (n, 1)), []
    before, V_before = X, W @ X
    for t, eta in enumerate(etas):
        V = W @ X
        M = mu * (X - before) + (1 - mu) * (V - V_before) if t else 0 * X
        G = all_gradients(gradients, t, X, limit) + wd * X
        before, V_before = X, V
        X = (V if option == 1 else X) - eta * G + beta * M
        history.append(X)
    return np.array(history)


def d2(x0, gradients, etas, n, wd, limit=None, *, W, plus=False):
    """D2 (thesis L2748) and D2+ (L2750), plain SGD; a zero learning rate mixes alone and remembers nothing."""
    X, E, last_G, last_eta, history = np.tile(x0, (n, 1)), None, None, None, []
    for t, eta in enumerate(etas):
        G = all_gradients(gradients, t, X, limit) + wd * X
        if eta == 0:
            X = W @ X
        else:
            # e = x^{t-1} - x^t; the first step is D-SGD's
            if last_G is None:
                new = W @ (X - eta * G)
            elif plus:
                new = W @ (X - eta * (E / last_eta + G - last_G))
            else:
                new = W @ (X - E - eta * (G - last_G))
            X, E, last_G, last_eta = new, X - new, G, eta
        history.append(X)
    return np.array(history)


def gradient_tracking(x0, gradients, etas, n, optimizer, limit=None, *, W):
    """y^{t+1} = W y^t + g^{t+1} - g^t, x^{t+1} = W (x^t - eta y^t), the step by any optimizer."""
    X, Y, last, history = np.tile(x0, (n, 1)), None, None, []
    for t, eta in enumerate(etas):
        G = all_gradients(gradients, t, X, limit)
        Y = G if Y is None else W(t - 1) @ Y + G - last
        last = G
        X = W(t) @ optimizer.step(X, Y, eta)
        history.append(X)
    return np.array(history)
