"""Mixing with neighbours: who hears whom in one gossip step, as far as one rank has to know it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

Edge = tuple[int, int]
"""A message's path: (source replica, destination replica)."""

_ROUNDING = 1e-9  # of sums of weights
_PIECE = 2**18  # values that are mixed at once: they stay in the cache
_PIECE_ON_CARD = 2**24  # on a GPU, where only memory matters


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
        terms: for each row, the columns of those it hears and their weights, in the order of their numbers.
        excess: for each row, by how much its weights sum to more than 1.
        messages: for each replica here, to how many replicas it sends, wherever they are.
    """

    first: int
    weights: Tensor
    columns: tuple[tuple[int, ...], ...]
    incoming: tuple[Edge, ...]
    outgoing: tuple[Edge, ...]
    messages: tuple[int, ...]
    terms: list[list[tuple[int, float]]] = field(init=False)
    excess: list[float] = field(init=False)

    def __post_init__(self) -> None:
        table = self.weights.tolist()
        terms = [[(k, table[r][k]) for k in places if k != r and table[r][k]] for r, places in enumerate(self.columns)]
        excess = [sum(row) - 1 for row in table]
        object.__setattr__(self, "terms", terms)
        object.__setattr__(self, "excess", [e if abs(e) > _ROUNDING else 0.0 for e in excess])

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


def add_weighted(
    out: Tensor,
    hood: Neighbourhood,
    rows: Tensor,
    received: Sequence[Tensor] = (),
    factor: float = 1.0,
    measure: bool = False,
) -> Tensor | None:
    r"""Add what a gossip step changes to `out`, in place.

    $$ x_i \mathrel{+}= \alpha \Bigl( \sum_j w_{ij} \, y_j - y_i \Bigr) = \alpha \sum_j w_{ij} \, ( y_j - y_i ) $$

    (where weights do not sum to 1, with their excess times `y_i`). So replicas that are equal stay so to the last bit, whatever
    the rounding of weights. Sums run in the order of the replicas' numbers, value by value, and are the same to the last bit
    wherever replicas are (but for dense graphs in one process, which are a matrix product). Rows are taken in pieces that stay
    in the cache, and `y` may be `x` itself. Half precision is summed in single precision.

    Example:
        >>> x = torch.tensor([[0.0], [4.0]])
        >>> add_weighted(x, Neighbourhood.of_matrix(range(2), torch.full((2, 2), 0.5)), x)
        >>> x
        tensor([[2.],
                [2.]])

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
    moved = torch.zeros(m, dtype=torch.float64, device=out.device) if measure else None
    dtype = torch.promote_types(out.dtype, torch.float32)
    edges = sum(map(len, hood.terms))
    # A GPU may round single precision to TF32 in a matrix product, more than what replicas that agree differ by.
    exact = torch.float64 if out.device.type == "cuda" else dtype
    dense = hood.shift.to(out.device, exact) if m > 8 and 4 * edges > m * m and not received else None
    length = min(columns, max((_PIECE if out.device.type == "cpu" else _PIECE_ON_CARD) // m, 2**10))
    if not length:
        return moved
    # All differences before any sum, as rows may be `out`; in memory that stays in the cache.
    scratch = torch.empty(0 if dense is not None else edges + 1, length, dtype=dtype, device=out.device)
    for start in range(0, columns, length):
        piece = slice(start, min(start + length, columns))
        x, y = out[:, piece], rows[:, piece].to(dtype)
        total = x.to(dtype)  # `x` itself, but for half precision
        if dense is not None:
            change = dense @ y.to(exact)
            total.add_(change, alpha=factor)
            if moved is not None:
                moved += torch.linalg.vector_norm(change, dim=1, dtype=torch.float64).square()
        else:
            here = y.unbind()
            sources = [*here, *(row[piece].to(dtype) for row in received)]
            room = iter(scratch[:, : piece.stop - start].unbind())
            changes = [
                [torch.sub(sources[k], own, out=next(room)) for k, _ in heard]
                for own, heard in zip(here, hood.terms, strict=True)
            ]
            excess = [own * more if more else None for own, more in zip(here, hood.excess, strict=True)]
            for r, (own, heard) in enumerate(zip(total.unbind(), hood.terms, strict=True)):
                for change, (_, weight) in zip(changes[r], heard, strict=True):
                    own.add_(change, alpha=factor * weight)
                if (more := excess[r]) is not None:
                    own.add_(more, alpha=factor)
                if moved is not None:
                    sums = [change.mul_(weight) for change, (_, weight) in zip(changes[r], heard, strict=True)]
                    sums += [] if more is None else [more]
                    moved[r] += torch.linalg.vector_norm(sum(sums), dtype=torch.float64).square() if sums else 0
        if total.data_ptr() != x.data_ptr():
            x.copy_(total)
    return moved
