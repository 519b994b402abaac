"""Landscapes and sharpness as their papers have them, on `f(x) = mean_i (a_i^T x - y_i)^2 / 2`, with lists of arrays."""

from __future__ import annotations

import math

import numpy as np


def loss(a, y, x):
    return np.mean((a @ x - y) ** 2) / 2


def gradient(a, y, x):
    return a.T @ (a @ x - y) / len(y)


def filter_normalise(d, w):
    """Li et al. 2018, section 4: each filter of the direction gets the norm of the weights' filter; the rest is zero."""
    out = []
    for d_i, w_i in zip(d, w, strict=True):
        scaled = np.zeros_like(d_i)
        if d_i.ndim >= 2:
            for j in range(len(d_i)):
                length = math.sqrt(np.sum(d_i[j] ** 2))
                scaled[j] = d_i[j] / length * math.sqrt(np.sum(w_i[j] ** 2))
        out.append(scaled)
    return out


def principal_plane(points):
    """Li et al. 2018, section 7: leading eigenvectors, coordinates from the last point, shares of variance."""
    M = np.array([p - points[-1] for p in points])
    values, vectors = np.linalg.eigh(np.cov(M.T))
    u, v = vectors[:, -1], vectors[:, -2]
    return u, v, M @ u, M @ v, values[[-1, -2]] / values.sum()


def three_points(w1, w2, w3):
    """Garipov et al. 2018, appendix A.2: the orthonormal basis, and where the three models are in it."""
    u = w2 - w1
    v = (w3 - w1) - np.dot(w3 - w1, w2 - w1) / np.dot(w2 - w1, w2 - w1) * (w2 - w1)
    u, v = u / np.linalg.norm(u), v / np.linalg.norm(v)
    return u, v, [(np.dot(w - w1, u), np.dot(w - w1, v)) for w in (w1, w2, w3)]


def sam(a, y, x, rho):
    """Foret et al. 2021, equation 2 (p = 2): the rise at `rho g / |g|`."""
    g = gradient(a, y, x)
    return loss(a, y, x + rho * g / np.sqrt(np.sum(g**2))) - loss(a, y, x)


def trust_region(a, y, x, rho):
    """The largest rise in the ball: `(nu I - H) delta = g` with `nu` above the largest eigenvalue and `|delta| = rho`."""
    H, g = a.T @ a / len(y), gradient(a, y, x)
    values, vectors = np.linalg.eigh(H)
    c = vectors.T @ g
    low, high = values[-1], values[-1] + np.linalg.norm(g) / rho + 1.0
    for _ in range(200):
        nu = (low + high) / 2
        low, high = (nu, high) if np.sum((c / (nu - values)) ** 2) > rho**2 else (low, nu)
    delta = vectors @ (c / (high - values))
    return loss(a, y, x + delta) - loss(a, y, x)


def keskar(a, y, x, epsilon, A=None):
    """Keskar et al. 2017, equations 3 and 4, by trying all corners of the box, where a convex function is largest."""
    A = np.eye(len(x)) if A is None else A
    edges = epsilon * (np.abs(np.linalg.pinv(A) @ x) + 1)
    corners = (np.array([(-1) ** (k >> i & 1) for i in range(len(edges))]) * edges for k in range(2 ** len(edges)))
    return (max(loss(a, y, x + A @ z) for z in corners) - loss(a, y, x)) / (1 + loss(a, y, x)) * 100


def average_under_filter_noise(a, y, x, filters, rho):
    """The expected rise: a filter of `n` weights is uniform on a sphere, so its covariance is `|w|^2 / n I`."""
    H = a.T @ a / len(y)
    return sum(rho**2 / 2 * np.sum(x[own] ** 2) / len(own) * np.trace(H[np.ix_(own, own)]) for own in filters)
