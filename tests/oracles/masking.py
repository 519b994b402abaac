"""Masking instead of fine-tuning (thesis, section 7.1) on a network of two layers, `y = W_2 tanh(W_1 x)`, with plain SGD."""

from __future__ import annotations

import numpy as np


class MaskedNetwork:
    """Frozen matrices `W`, real-valued masks `M` of the same shapes, and the threshold `tau`."""

    def __init__(self, W, M, tau):
        self.W, self.M, self.tau = [w.copy() for w in W], [m.copy() for m in M], tau

    def binary(self):
        """(7.1): 1 where `m_ij >= tau`, else 0."""
        return [np.where(m >= self.tau, 1.0, 0.0) for m in self.M]

    def step(self, X, Y, eta):
        """One step on `1/(2 n) sum_i ||y_i - f(x_i)||^2`; returns the loss before it.

        The derivative by an entry of the binary mask is taken by what that entry does: it multiplies `w_ij`, which
        multiplies the layer's input `j` in its output `i`.
        """
        B1, B2 = self.binary()
        W1, W2 = self.W
        n = len(X)
        H = np.tanh(X @ (W1 * B1).T)
        E = H @ (W2 * B2).T - Y
        D2 = np.zeros_like(B2)
        D1 = np.zeros_like(B1)
        back = (E @ (W2 * B2)) * (1 - H**2)
        for i in range(n):
            D2 += np.outer(E[i], H[i]) * W2 / n
            D1 += np.outer(back[i], X[i]) * W1 / n
        # (7.2): M <- M - eta dL/dM_bin
        self.M = [self.M[0] - eta * D1, self.M[1] - eta * D2]
        return np.sum(E**2) / (2 * n)
