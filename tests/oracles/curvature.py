"""Second derivatives of linear, logistic and softmax regression in closed form, and of what is measured on them."""

from __future__ import annotations

import numpy as np


def linear(X):
    """Hessian of `1/(2 n) sum_i (x_i^T w - y_i)^2`: `X^T X / n`."""
    return X.T @ X / len(X)


def logistic(X, y, w):
    """Gradient and Hessian of `1/n sum_i log(1 + exp(-y_i x_i^T w))`, `y_i` in {-1, 1}."""
    p = 1 / (1 + np.exp(-(X @ w)))
    return X.T @ (p - (y + 1) / 2) / len(X), (X * (p * (1 - p))[:, None]).T @ X / len(X)


def softmax(X, labels, W, b):
    """Gradient and Hessian by `(W, b)`, `W` row by row, of the mean cross entropy of `softmax(W x + b)`.

    With `a = (x, 1)`: `1/n sum_i (diag(p_i) - p_i p_i^T) (x) a_i a_i^T`, in the order (class, input), brought into that of the
    parameters.
    """
    n, k, d = len(X), len(W), X.shape[1]
    Z = X @ W.T + b
    P = np.exp(Z - Z.max(axis=1, keepdims=True))
    P /= P.sum(axis=1, keepdims=True)
    A = np.hstack([X, np.ones((n, 1))])
    H = np.zeros((k * (d + 1), k * (d + 1)))
    g = np.zeros(k * (d + 1))
    for p, a, label in zip(P, A, labels, strict=True):
        H += np.kron(np.diag(p) - np.outer(p, p), np.outer(a, a)) / n
        g += np.kron(p - np.eye(k)[label], a) / n
    order = [c * (d + 1) + j for c in range(k) for j in range(d)] + [c * (d + 1) + d for c in range(k)]
    return g[order], H[np.ix_(order, order)]


def krylov_eigenvalues(H, v, steps):
    """Eigenvalues of `H` projected onto `v, Hv, ..., H^(steps-1) v`, by Gram and Schmidt; with each the weight of `v` in it."""
    basis = [v / np.linalg.norm(v)]
    while len(basis) < steps:
        w = H @ basis[-1]
        for _ in range(3):
            for u in basis:
                w = w - (u @ w) * u
        basis.append(w / np.linalg.norm(w))
    V = np.array(basis)
    values, vectors = np.linalg.eigh(V @ H @ V.T)
    return values, vectors[0] ** 2
