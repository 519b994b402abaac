"""Mixing with neighbours: who hears whom in one gossip step, as far as one rank has to know it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

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
        incoming: edges on which replicas here hear replicas of other ranks.
        outgoing: edges on which replicas of other ranks hear those here.
        messages: for each replica here, to how many replicas it sends, wherever they are.
    """

    first: int
    weights: Tensor
    incoming: tuple[Edge, ...]
    outgoing: tuple[Edge, ...]
    messages: tuple[int, ...]
    _places: dict[torch.device, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

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
        m, heard = len(local), {i: weights(i) for i in local}
        outgoing = tuple((j, i) for j in local for i in sorted(listeners(j)) if i != j)
        incoming = tuple((j, i) for i in local for j in sorted(heard[i]) if j not in local)
        matrix = torch.zeros(m, m + len(incoming), dtype=torch.float64)
        for i, row in heard.items():
            for j, weight in row.items():
                if j in local:
                    matrix[i - local.start, j - local.start] = weight
        for k, (j, i) in enumerate(incoming):
            matrix[i - local.start, m + k] = heard[i][j]
        messages = tuple(sum(source == j for source, _ in outgoing) for j in local)
        return cls(local.start, matrix, incoming, tuple(edge for edge in outgoing if edge[1] not in local), messages)

    @classmethod
    def of_matrix(cls, local: range, matrix: Tensor) -> Neighbourhood:
        """Look up what the replicas `local` need in a matrix `[n, n]`: row `i` holds what replica `i` makes of the others."""

        def weights(i: int) -> dict[int, float]:
            return {j: float(matrix[i, j]) for j in matrix[i].nonzero().flatten().tolist()}

        return cls.of(local, weights, lambda j: matrix[:, j].nonzero().flatten().tolist())

    @property
    def shift(self) -> Tensor:
        """`W - I`, in the layout of `weights`."""
        shift = self.weights.clone()
        shift.diagonal().sub_(1)
        return shift

    @property
    def order(self) -> list[int]:
        """Return the columns of `weights` in the order of the replicas' numbers."""
        m = len(self.weights)
        columns = [(self.first + r, r) for r in range(m)] + [(j, m + k) for k, (j, _) in enumerate(self.incoming)]
        return [k for _, k in sorted(columns)]

    def places(self, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Return, for each row, the column of the first replica it hears, the second, and so on, in the order of numbers.

        Returns:
            For each of these: the columns `[m]`, and `[m]` ones, or zeros where a row hears no more (its own column stands there).
        """
        if device not in self._places:
            m = len(self.weights)
            heard = [[k for k in self.order if self.weights[r, k] != 0 or k == r] for r in range(m)]
            self._places[device] = [
                (
                    torch.tensor([row[k] if k < len(row) else r for r, row in enumerate(heard)], device=device),
                    torch.tensor([float(k < len(row)) for row in heard], device=device),
                )
                for k in range(max(map(len, heard)))
            ]
        return self._places[device]


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
    shift = hood.shift.to(out.device, dtype)
    factors = [shift.gather(1, places[:, None]) * real[:, None] for places, real in hood.places(out.device)]
    indices = [places.tolist() for places, _ in hood.places(torch.device("cpu"))]
    dense = m > 8 and 4 * len(indices) > m and not received  # a graph with many edges is a matrix product
    length = max(_PIECE // m, 2**10)
    for start in range(0, columns, length):
        piece = slice(start, start + length)
        if dense:
            delta = shift @ rows[:, piece].to(dtype)
        else:
            delta = torch.zeros((), dtype=dtype, device=out.device)
            for index, weight in zip(indices, factors, strict=True):
                delta = torch.stack([sources[k][piece] for k in index]).to(dtype).mul_(weight).add_(delta)
        if moved is not None:
            moved += torch.linalg.vector_norm(delta, dim=1, dtype=torch.float64).square()
        out[:, piece].add_(delta, alpha=factor)
    return moved
