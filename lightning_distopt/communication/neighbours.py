"""Mixing with neighbours: who hears whom in one gossip step, as far as one rank has to know it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Edge = tuple[int, int]
"""A message's path: (source replica, destination replica)."""

_PIECE = 2**18  # values that are mixed at once: they stay in the cache


@dataclass(frozen=True)
class Neighbourhood:
    r"""What the replicas of one rank send and hear in one gossip step.

    Rows of the mixing matrix `W` for the `m` replicas of the rank: `weights[:, :m]` belongs to the replicas here,
    `weights[:, m + k]` to what comes along the edge `incoming[k]` from another rank.

    Example:
        >>> ring = {0: {0: 0.5, 1: 0.25, 3: 0.25}, 1: {0: 0.25, 1: 0.5, 2: 0.25}}
        >>> hood = Neighbourhood.of(range(2), ring.__getitem__, lambda i: [(i - 1) % 4, (i + 1) % 4])
        >>> hood.incoming, hood.outgoing
        (((3, 0), (2, 1)), ((0, 3), (1, 2)))
        >>> hood.weights
        tensor([[0.5000, 0.2500, 0.2500, 0.0000],
                [0.2500, 0.5000, 0.0000, 0.2500]], dtype=torch.float64)

    Attributes:
        first: number of the first replica here.
        weights: `[m, m + k]`, in double precision.
        columns: for each row, the columns of the replicas that it hears and its own, in the order of their numbers.
        incoming: edges on which replicas here hear replicas of other ranks.
        outgoing: edges on which replicas of other ranks hear those here.
        messages: for each replica here, to how many replicas it sends, wherever they are.
    """

    first: int
    weights: Tensor
    columns: tuple[tuple[int, ...], ...]
    incoming: tuple[Edge, ...]
    outgoing: tuple[Edge, ...]
    messages: tuple[int, ...]
    _terms: dict[Any, list[tuple[list[int], Tensor]]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, local: range, weights: Callable[[int], Mapping[int, float]], listeners: Callable[[int], Iterable[int]]
    ) -> Neighbourhood:
        """Look up what the replicas `local` of a rank need.

        Args:
            local: numbers of the replicas here.
            weights: of a replica: what it makes of itself and of each it hears, by replica.
            listeners: of a replica: who hears it.
        """
        m, heard = len(local), {i: dict(sorted({i: 0.0, **weights(i)}.items())) for i in local}
        hearers = {j: sorted(i for i in listeners(j) if i != j) for j in local}
        incoming = tuple((j, i) for i in local for j in heard[i] if j not in local)
        column = {(j, i): m + k for k, (j, i) in enumerate(incoming)}
        columns = tuple(tuple(column.get((j, i), j - local.start) for j in heard[i]) for i in local)
        matrix = torch.zeros(m, m + len(incoming), dtype=torch.float64)
        for row, (places, of_row) in enumerate(zip(columns, heard.values(), strict=True)):
            matrix[row, list(places)] = torch.tensor(list(of_row.values()), dtype=torch.float64)
        outgoing = tuple((j, i) for j in local for i in hearers[j] if i not in local)
        return cls(local.start, matrix, columns, incoming, outgoing, tuple(map(len, hearers.values())))

    @classmethod
    def of_matrix(cls, local: range, matrix: Tensor) -> Neighbourhood:
        """Look up what the replicas `local` need in a matrix `[n, n]`: row `i` holds what replica `i` makes of the others."""

        def weights(i: int) -> dict[int, float]:
            return {j: float(matrix[i, j]) for j in matrix[i].nonzero().flatten().tolist()}

        return cls.of(local, weights, lambda j: matrix[:, j].nonzero().flatten().tolist())

    @cached_property
    def shift(self) -> Tensor:
        """`W - I`, in the layout of `weights`."""
        shift = self.weights.clone()
        shift.diagonal().sub_(1)
        return shift

    @cached_property
    def order(self) -> list[int]:
        """The columns of `weights` in the order of the replicas' numbers."""
        m = len(self.weights)
        columns = [(self.first + r, r) for r in range(m)] + [(j, m + k) for k, (j, _) in enumerate(self.incoming)]
        return [k for _, k in sorted(columns)]

    def terms(self, device: torch.device, dtype: torch.dtype) -> list[tuple[list[int], Tensor]]:
        """Return the terms of the sums `(W - I) y` in the order of replicas' numbers: the first of each row, and so on.

        Returns:
            For each term: the column for each row, and the weight `[m, 1]`. A row without a further one has itself, and zero.
        """
        if (device, dtype) not in self._terms:
            most = max(map(len, self.columns))
            filled = torch.tensor([[*places, *[row] * (most - len(places))] for row, places in enumerate(self.columns)])
            real = torch.tensor([[float(k < len(places)) for k in range(most)] for places in self.columns])
            factors = (self.shift.gather(1, filled) * real).to(device, dtype)
            self._terms[device, dtype] = [(filled[:, k].tolist(), factors[:, k : k + 1]) for k in range(most)]
        return self._terms[device, dtype]


def add_weighted(
    out: Tensor,
    hood: Neighbourhood,
    rows: Tensor,
    received: Sequence[Tensor] = (),
    factor: float = 1.0,
    measure: bool = False,
) -> Tensor | None:
    r"""Add what a gossip step changes to `out`, in place.

    $$ x_i \mathrel{+}= \alpha \, \Bigl( \sum_j w_{ij} \, y_j - y_i \Bigr) $$

    Rows are taken in pieces, so no other memory of a row's size is needed, and `y` may be `x` itself. Sums run in the order of
    the replicas' numbers, so that they are the same to the last bit wherever replicas are. Half precision is summed in single
    precision.

    Args:
        out: `x`, `[m, d]`.
        hood: who hears whom.
        rows: `y` of the replicas here, `[m, d]`.
        received: `y` along `hood.incoming`, each `[d]`.
        factor: `alpha`.
        measure: whether to return how far the rows of `out` have moved.

    Returns:
        `[m]` in double precision, the squared Euclidean lengths of what was added, without `alpha`, if `measure`.
    """
    m, columns = out.shape
    dtype = torch.promote_types(out.dtype, torch.float32)
    moved = torch.zeros(m, dtype=torch.float64, device=out.device) if measure else None
    sources = [*rows, *received]
    terms = hood.terms(out.device, dtype)
    dense = m > 8 and 4 * len(terms) > m and not received  # a graph with many edges is a matrix product
    shift = hood.shift.to(out.device, dtype) if dense else None
    length = max(_PIECE // m, 2**10)
    for start in range(0, columns, length):
        piece = slice(start, start + length)
        if shift is not None:
            delta = shift @ rows[:, piece].to(dtype)
        else:
            delta = torch.zeros((), dtype=dtype, device=out.device)
            for index, weight in terms:
                delta = torch.stack([sources[k][piece] for k in index]).to(dtype).mul_(weight).add_(delta)
        if moved is not None:
            moved += torch.linalg.vector_norm(delta, dim=1, dtype=torch.float64).square()
        out[:, piece].add_(delta, alpha=factor)
    return moved
