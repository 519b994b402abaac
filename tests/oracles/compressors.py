"""Compressors (thesis chapters 4 and 13) as formulas: each maps a vector to what its receiver decodes."""

from __future__ import annotations

import math

import numpy as np


def per_tensor(compress, sizes):
    """Return the map of a row of parameters that compresses each of its tensors, of `sizes` values, on its own."""
    ends = np.cumsum(sizes)[:-1]
    return lambda x: np.concatenate([compress(part) for part in np.split(x, ends)])


def identity(x):
    return x.copy()


def sign(x):
    """(|x|_1 / d) sgn(x), with sgn(0) = +1."""
    return np.abs(x).mean() * np.where(x >= 0, 1.0, -1.0)


def top_k(ratio):
    """Keep the k = max(1, floor(ratio d)) values of largest magnitude; zero elsewhere."""

    def compress(x):
        k = max(1, math.floor(ratio * x.size))
        kept = np.argsort(-np.abs(x), kind="stable")[:k]
        result = np.zeros_like(x)
        result[kept] = x[kept]
        return result

    return compress


def qsgd_levels(x, u, s):
    """floor(s |x| / |x|_2 + u): integers from 0 to s, with u uniform on [0, 1) (here given), and 0 for x = 0.

    The papers have s = 2^(b-1) for b bits, whose top level needs one bit more; s = 2^(b-1) - 1 fits beside the sign.
    """
    norm = np.linalg.norm(x)
    return np.floor(s * np.abs(x) / norm + u) if norm > 0 else np.zeros_like(x)


def qsgd_tau(d, s):
    """tau = 1 + min(d / s^2, sqrt(d) / s): the scaled operator contracts with delta = 1 / tau."""
    return 1 + min(d / s**2, math.sqrt(d) / s)


def qsgd(s, u, scaled=False):
    """(|x|_2 / s) sgn(x) floor(s |x| / |x|_2 + u), unbiased over u; divided by tau if `scaled`."""

    def compress(x):
        decoded = np.linalg.norm(x) / s * np.where(x >= 0, 1.0, -1.0) * qsgd_levels(x, u, s)
        return decoded / qsgd_tau(x.size, s) if scaled else decoded

    return compress
