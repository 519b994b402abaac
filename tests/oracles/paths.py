"""Curves between models, smoothness and noise of gradients, as the papers state them."""

from __future__ import annotations

from itertools import pairwise
from math import comb

import numpy as np


def bezier(nodes, t):
    """The curve by de Casteljau's algorithm: repeated linear interpolation."""
    points = np.array(nodes)
    while len(points) > 1:
        points = (1 - t) * points[:-1] + t * points[1:]
    return points[0]


def chain(nodes, t):
    """With one bend: phi(t) = 2 (t theta + (0.5 - t) w_1) for t <= 0.5, and 2 ((t - 0.5) w_2 + (1 - t) theta) beyond."""
    places = np.linspace(0, 1, len(nodes))
    return np.array([np.interp(t, places, values) for values in np.array(nodes).T])


def by_node(curve, count, i, t):
    """d phi(t) / d x_i, a number."""
    if curve == "bezier":
        return comb(count - 1, i) * (1 - t) ** (count - 1 - i) * t**i
    return chain(np.eye(count), t)[i]


def train_curve(x_0, x_1, bends, curve, ts, gradients, lr, momentum=0.9):
    """SGD with momentum on the bends; `gradients[k](x)` is that of the batch of step k, `ts[k]` its place on the curve."""
    phi = bezier if curve == "bezier" else chain
    nodes = [x_0 + (x_1 - x_0) * i / (bends + 1) for i in range(bends + 2)]
    velocity, losses = np.zeros((bends, len(x_0))), []
    for k, (t, gradient) in enumerate(zip(ts, gradients, strict=True)):
        part = k / len(ts)
        factor = 1 if part <= 0.5 else 1 - (part - 0.5) / 0.4 * 0.99 if part <= 0.9 else 0.01
        loss, g = gradient(phi(nodes, t))
        losses.append(loss)
        for i in range(bends):
            velocity[i] = momentum * velocity[i] + by_node(curve, bends + 2, i + 1, t) * g
        for i in range(bends):
            nodes[i + 1] = nodes[i + 1] - lr * factor * velocity[i]
    return np.array(nodes), np.array(losses)


def integral(values, points):
    """int L |phi'| dt / int |phi'| dt by trapezoids over the points of a polygon."""
    lengths = [np.linalg.norm(b - a) for a, b in pairwise(points)]
    areas = [length * (a + b) / 2 for length, (a, b) in zip(lengths, pairwise(values), strict=True)]
    return sum(areas) / sum(lengths)


def noise_of_two(small, big, b_small, b_big):
    """McCandlish et al. (2018), equations A.2 and A.3: |G|^2 and tr Sigma from the squared norms at two batch sizes."""
    signal = (b_big * big - b_small * small) / (b_big - b_small)
    return signal, (small - big) / (1 / b_small - 1 / b_big)


def zeta_squared(gradients):
    """(1/n) sum_i |g_i - g|^2."""
    mean = sum(gradients) / len(gradients)
    return sum(np.sum((g - mean) ** 2) for g in gradients) / len(gradients)
