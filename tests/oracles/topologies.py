"""Mixing matrices by loops: entry `[i, j]` weighs what replica `i` receives from replica `j`."""

from __future__ import annotations

import numpy as np


def metropolis(n, edges):
    """w_ij = 1 / (1 + max(deg_i, deg_j)) on the edges, and what is left to one on the diagonal."""
    edges = {frozenset(edge) for edge in edges if len(set(edge)) == 2}
    degree = [sum(i in edge for edge in edges) for i in range(n)]
    W = np.zeros((n, n))
    for i, j in edges:
        W[i, j] = W[j, i] = 1 / (1 + max(degree[i], degree[j]))
    for i in range(n):
        W[i, i] = 1 - W[i].sum()
    return W


def ring(n):
    return metropolis(n, [(i, (i + 1) % n) for i in range(n)])


def chain(n):
    return metropolis(n, [(i, i + 1) for i in range(n - 1)])


def star(n):
    """Replica 0 is the hub."""
    return metropolis(n, [(0, i) for i in range(1, n)])


def complete(n):
    return metropolis(n, [(i, j) for i in range(n) for j in range(i)])


def one_peer_exponential(n):
    """Return W(t) = (I + P) / 2, where replica i sends to i + 2^(t mod p), p = ceil(log2 n)."""
    p = (n - 1).bit_length()

    def W(t):
        M = np.zeros((n, n))
        for i in range(n):
            M[i, i] += 1 / 2
            M[(i + 2 ** (t % p)) % n if n > 1 else i, i] += 1 / 2
        return M

    return W


def matching(n, pairs):
    """Each pair averages; who is in no pair keeps what it has."""
    W = np.eye(n)
    for i, j in pairs:
        W[i, i] = W[j, j] = W[i, j] = W[j, i] = 1 / 2
    return W


def static(W):
    """Return W(t) = W."""
    return lambda t: W
