"""Counting and dealing: Dirichlet shares that become whole numbers of samples, and who gets which."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Indices", "deal", "fill", "log_gamma", "members_of_classes", "scale", "without_splitting"]

Indices = NDArray[np.int64]
_SWEEPS = 100


def log_gamma(a: NDArray[np.float64], random: np.random.RandomState) -> NDArray[np.float64]:
    """Draw logarithms of `Gamma(a)` variables, which for small `a` are mostly below the smallest float themselves.

    `Gamma(a) = Gamma(a + 1) U^(1/a)`; and of independent `g_k ~ Gamma(a_k)`, `g / sum(g) ~ Dir(a)`.

    Example:
        >>> log_gamma(np.array([1e-4, 1e4]), np.random.RandomState(0)).round(1).tolist()
        [-5509.3, 9.2]
    """
    a = np.maximum(a, 1e-300)
    result: NDArray[np.float64] = np.log(random.standard_gamma(a + 1)) + np.log1p(-random.random_sample(a.shape)) / a
    return result


def scale(shares: NDArray[np.float64], rows: Indices, columns: Indices) -> NDArray[np.float64]:
    """Scale rows and columns, given as logarithms, in turns until they add up to `rows` and `columns` (Sinkhorn).

    To half a sample. Where that takes too long, as it does for very small `alpha`, shares stay as they are, and `fill` alone
    gives what is full no more: there replicas have hardly more than a class each in either way.

    Example:
        >>> drawn = np.log([[1.0, 2.0], [3.0, 4.0]])
        >>> np.exp(scale(drawn, np.array([1000, 1000]), np.array([1000, 1000]))).round()
        array([[450., 550.], [550., 450.]])
    """
    scaled = shares
    for _ in range(_SWEEPS):
        scaled = scaled + np.log(columns) - np.logaddexp.reduce(scaled, axis=0)
        sums = np.logaddexp.reduce(scaled, axis=1)
        if abs(np.exp(sums) - rows).max() < 0.5:
            return scaled
        scaled = scaled + (np.log(rows) - sums)[:, None]
    return shares


def fill(size: int, log_shares: NDArray[np.float64], room: Indices, owed: NDArray[np.float64]) -> Indices:
    """Return how `size` samples are divided in the ratio of the shares among those who have room left.

    Rounded such that fractions do not add up from class to class: `owed` holds what each replica is short of, and is updated.

    Example:
        >>> fill(10, np.log([0.5, 0.4, 0.1]), np.array([9, 3, 9]), np.zeros(3))
        array([6, 3, 1])
    """
    counts = np.zeros_like(room)
    while size > 0:
        left = np.where(counts < room, log_shares, -np.inf)
        shares = np.exp(left - left.max())
        wanted = shares / shares.sum() * size
        whole = np.floor(wanted).astype(np.int64)
        fractions = np.where(counts < room, wanted - whole + owed, -np.inf)
        whole[np.argsort(-fractions, kind="stable")[: size - whole.sum()]] += 1
        given = np.minimum(whole, room - counts)
        owed += wanted - given
        counts += given
        size -= int(given.sum())
    return counts


def members_of_classes(labels: NDArray[Any]) -> list[Indices]:
    """Return the samples of each class, the classes in order.

    Example:
        >>> members_of_classes(np.array(["b", "a", "b"]))
        [array([1]), array([0, 2])]
    """
    _, codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    return np.split(np.argsort(codes, kind="stable"), np.cumsum(sizes)[:-1])


def deal(members: Sequence[Indices], counts: Indices, random: np.random.RandomState) -> list[Indices]:
    """Deal the samples of each class out at random, `counts[i, c]` of class `c` to replica `i`.

    Example:
        >>> deal([np.array([1, 3]), np.array([0, 2])], np.array([[2, 0], [0, 2]]), np.random.RandomState(0))
        [array([3, 1]), array([0, 2])]
    """
    dealt = [np.split(random.permutation(m), np.cumsum(counts[:-1, c])) for c, m in enumerate(members)]
    return [np.concatenate([parts[i] for parts in dealt]) for i in range(len(counts))]


def without_splitting(groups: Sequence[Indices], n: int) -> list[Indices]:
    """Give the largest group first, and each to who has least so far.

    Example:
        >>> without_splitting([np.array([0]), np.array([1, 2, 3]), np.array([4])], 2)
        [array([1, 2, 3]), array([0, 4])]
    """
    hands: list[list[Indices]] = [[] for _ in range(n)]
    loads = [(0, i) for i in range(n)]
    for group in sorted(groups, key=len, reverse=True):
        load, i = heapq.heappop(loads)
        hands[i].append(group)
        heapq.heappush(loads, (load + len(group), i))
    return [np.concatenate(hand) for hand in hands]
