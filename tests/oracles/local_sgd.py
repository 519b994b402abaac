"""Local SGD and its relatives (thesis eq. 2.1, 2.2, 11.1) in matrix form: row `k` of `X` is replica `k`."""

from __future__ import annotations

import numpy as np


class SGD:
    """x <- x - eta u, u <- m u + g + wd x: heavy ball, u_0 = g_0."""

    def __init__(self, momentum=0.0, weight_decay=0.0):
        self.m, self.wd, self.U = momentum, weight_decay, None

    def step(self, X, G, eta):
        G = G + self.wd * X
        self.U = G if self.U is None else self.m * self.U + G
        return X - eta * self.U

    def average(self, W):
        self.U = W @ self.U


class Adam:
    """Kingma and Ba, algorithm 1."""

    def __init__(self, b1=0.9, b2=0.999, eps=1e-8):
        self.b1, self.b2, self.eps, self.t = b1, b2, eps, 0
        self.M = self.V = 0.0

    def step(self, X, G, eta):
        self.t += 1
        self.M = self.b1 * self.M + (1 - self.b1) * G
        self.V = self.b2 * self.V + (1 - self.b2) * G**2
        M, V = self.M / (1 - self.b1**self.t), self.V / (1 - self.b2**self.t)
        return X - eta * M / (np.sqrt(V) + self.eps)

    def average(self, W):
        self.M, self.V = W @ self.M, W @ self.V


def averaging(n, block):
    """The matrix that averages over blocks of consecutive replicas."""
    return np.kron(np.eye(n // block), np.ones((block, block)) / block)


def clip(G, limit):
    """Scale each row down to a norm of at most `limit`, with the small constant that torch adds."""
    if limit is None:
        return G
    return G * np.minimum(1.0, limit / (np.linalg.norm(G, axis=1, keepdims=True) + 1e-6))


def minibatch_sgd(x0, gradients, etas, n, optimizer, limit=None):
    """eq. 2.1: x <- x - eta (1/K) sum_k g_k(x); one model, shown n times."""
    X, history = np.tile(x0, (1, 1)), []
    for t, eta in enumerate(etas):
        g = np.mean([gradients(k, t, X[0]) for k in range(n)], axis=0, keepdims=True)
        X = optimizer.step(X, clip(g, limit), eta)
        history.append(np.repeat(X, n, axis=0))
    return np.array(history)


def local_sgd(x0, gradients, etas, n, optimizer, H, limit=None):
    """eq. 2.2: H local steps, then the mean of all; `H` is a list of the lengths of rounds."""
    X, history = np.tile(x0, (n, 1)), []
    t, J = 0, averaging(n, n)
    for length in H:
        for h in range(length):
            if t == len(etas):
                return np.array(history)
            G = np.array([gradients(k, t, X[k]) for k in range(n)])
            X = optimizer.step(X, clip(G, limit), etas[t])
            if h == length - 1:
                X = J @ X
            history.append(X)
            t += 1
    return np.array(history)


def post_local_sgd(x0, gradients, etas, n, optimizer, switch, H, limit=None):
    """Algorithm 8: eq. 2.1 for `switch` steps, then eq. 2.2, each replica with a copy of the common momentum."""
    first = minibatch_sgd(x0, gradients, etas[:switch], n, optimizer, limit)
    X, history, J = first[-1], list(first), averaging(n, n)
    optimizer.average(np.ones((n, 1)))  # a row of its own for every replica
    for t in range(switch, len(etas)):
        G = np.array([gradients(k, t, X[k]) for k in range(n)])
        X = optimizer.step(X, clip(G, limit), etas[t])
        if (t - switch + 1) % H == 0:
            X = J @ X
        history.append(X)
    return np.array(history)


def local_then_minibatch(x0, gradients, etas, n, optimizer, switch, H, limit=None):
    """eq. 2.2 for `switch` steps, the momentum averaged once, then eq. 2.1."""
    X, history, J = np.tile(x0, (n, 1)), [], averaging(n, n)
    for t, eta in enumerate(etas):
        G = np.array([gradients(k, t, X[k]) for k in range(n)])
        if t >= switch:
            G = J @ G
        X = optimizer.step(X, clip(G, limit), eta)
        if t < switch and (t + 1) % H == 0:
            X = J @ X
        if t + 1 == switch:
            optimizer.average(J)
        history.append(X)
    return np.array(history)


def hierarchical(x0, gradients, etas, n, optimizer, H, block, Hb, limit=None):
    """eq. 11.1: every H steps the mean over the block, every H Hb steps the mean over all."""
    X, history = np.tile(x0, (n, 1)), []
    for t, eta in enumerate(etas):
        G = np.array([gradients(k, t, X[k]) for k in range(n)])
        X = optimizer.step(X, clip(G, limit), eta)
        if (t + 1) % (H * Hb) == 0:
            X = averaging(n, n) @ X
        elif (t + 1) % H == 0:
            X = averaging(n, block) @ X
        history.append(X)
    return np.array(history)


def post_local_hierarchical(x0, gradients, etas, n, optimizer, switch, H, block, Hb, limit=None):
    """eq. 2.1 for `switch` steps, then eq. 11.1, its rounds counted from the switch."""
    first = minibatch_sgd(x0, gradients, etas[:switch], n, optimizer, limit)
    X, history = first[-1], list(first)
    optimizer.average(np.ones((n, 1)))
    for t in range(switch, len(etas)):
        G = np.array([gradients(k, t, X[k]) for k in range(n)])
        X = optimizer.step(X, clip(G, limit), etas[t])
        if (t - switch + 1) % (H * Hb) == 0:
            X = averaging(n, n) @ X
        elif (t - switch + 1) % H == 0:
            X = averaging(n, block) @ X
        history.append(X)
    return np.array(history)


def hierarchical_gradients(x0, gradients, etas, n, optimizer, block, Hb, limit=None):
    """Gradients averaged over the block at every step, parameters over all every Hb steps."""
    X, history, B = np.tile(x0, (n, 1)), [], averaging(n, block)
    for t, eta in enumerate(etas):
        G = B @ np.array([gradients(k, t, X[k]) for k in range(n)])
        X = optimizer.step(X, clip(G, limit), eta)
        if (t + 1) % Hb == 0:
            X = averaging(n, n) @ X
        history.append(X)
    return np.array(history)
