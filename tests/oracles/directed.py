"""Push-sum, RelaySum and PowerGossip in matrix form: row `i` of `X` is replica `i`."""

from __future__ import annotations

import numpy as np

from tests.oracles.heterogeneous import all_gradients


def push_sum(x0, gradients, etas, n, optimizer, limit=None, *, A, H=1, k=1):
    """SGP (Assran et al. 2019, algorithm 1): `X` are the numerators, what is shown is z = x / w. `A(s)` is that of step s."""
    X, w, s, history = np.tile(x0, (n, 1)), np.ones((n, 1)), 0, []
    for t, eta in enumerate(etas):
        # x_i^{t+1/2} = x_i - eta grad f_i(z_i)
        X = optimizer.step(X, all_gradients(gradients, t, X / w, limit), eta)
        if (t + 1) % H == 0:
            for _ in range(k):
                # x <- A x, w <- A w
                X, w, s = A(s) @ X, A(s) @ w, s + 1
        history.append(X / w)
    return np.array(history)


def out_degrees(n, edges):
    """a_ij = 1 / (1 + out-degree of j) for j = i and edges (j, i)."""
    A = np.eye(n)
    for j, i in edges:
        A[i, j] = 1
    return A / A.sum(axis=0)


def hops(n, edges):
    """Lengths of shortest paths, by powers of the adjacency matrix."""
    step = np.eye(n, dtype=int)
    for i, j in edges:
        step[i, j] = step[j, i] = 1
    reached, distance = np.eye(n, dtype=int), np.zeros((n, n), dtype=int)
    for _ in range(n):
        distance += reached == 0
        reached = np.minimum(1, reached @ step)
    return distance


def relay_sum(x0, gradients, etas, n, optimizer, limit=None, *, edges, H=1):
    """RelaySGD (Vogels et al. 2021): x_i^{t+1} = 1/n sum_j x_j^{(t - tau_ij) + 1/2}, and x^0 before the start."""
    tau = np.maximum(0, hops(n, edges) - 1)
    X, halves, history = np.tile(x0, (n, 1)), [], []
    for t, eta in enumerate(etas):
        X = optimizer.step(X, all_gradients(gradients, t, X, limit), eta)
        if (t + 1) % H == 0:
            halves.append(X)
            r = len(halves) - 1
            X = np.array([np.mean([halves[r - d][j] if d <= r else x0 for j, d in enumerate(row)], axis=0) for row in tau])
        history.append(X)
    return np.array(history)


def relay_messages(tree, start, rounds):
    """The messages of the paper's algorithm 1 with counts: yields what x^{t+1/2} -> x^{t+1} does, given as a list of rows."""
    n = len(start)
    neighbours = {i: [j for edge in tree for j in edge if i in edge and j != i] for i in range(n)}
    m = {(i, j): np.zeros_like(start[0]) for i in range(n) for j in neighbours[i]}
    c = dict.fromkeys(m, 0)
    for half in rounds:
        m = {(i, j): half[i] + sum(m[k, i] for k in neighbours[i] if k != j) for i, j in m}
        c = {(i, j): 1 + sum(c[k, i] for k in neighbours[i] if k != j) for i, j in c}
        counts = [1 + sum(c[j, i] for j in neighbours[i]) for i in range(n)]
        sums = [half[i] + sum(m[j, i] for j in neighbours[i]) for i in range(n)]
        yield np.array([(sums[i] + (n - counts[i]) * start[i]) / n for i in range(n)])


def power_gossip(x0, gradients, etas, n, optimizer, limit=None, *, W, shapes, start, rank=1, H=1, k=1):
    """PowerGossip (Vogels et al. 2020), a multiplication in each gossip step, from the left first.

    `shapes` are those of the tensors in a row, `start(i, j)` lists the vectors (p, q) of each matrix and the edge i < j.
    """
    X, s, vectors, history = np.tile(x0, (n, 1)), 0, {}, []
    edges = [(i, j) for i in range(n) for j in range(i + 1, n) if W[i, j]]
    for i, j in edges:
        vectors[i, j] = [list(pair) for pair in start(i, j)]
    for t, eta in enumerate(etas):
        X = optimizer.step(X, all_gradients(gradients, t, X, limit), eta)
        if (t + 1) % H == 0:
            for _ in range(k):
                X, s = power_step(X, W, edges, shapes, vectors, rank, left=s % 2 == 0), s + 1
        history.append(X)
    return np.array(history)


def power_step(X, W, edges, shapes, vectors, rank, left):
    offsets, new = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)]), X.copy()
    number = 0
    for place, shape in enumerate(shapes):
        part = slice(offsets[place], offsets[place + 1])
        compressed = len(shape) == 2 and min(shape) > rank
        for i, j in edges:
            D = X[i, part] - X[j, part]
            if compressed:
                pair, D = vectors[i, j][number], D.reshape(shape)
                if left:
                    U = np.linalg.svd(pair[0], full_matrices=False)[0]
                    pair[1] = D.T @ U
                    D = U @ U.T @ D
                else:
                    V = np.linalg.svd(pair[1], full_matrices=False)[0]
                    pair[0] = D @ V
                    D = D @ V @ V.T
            new[i, part] -= W[i, j] * D.ravel()
            new[j, part] += W[i, j] * D.ravel()
        number += compressed
    return new
