"""Vectors that lie in rows of a block, read and changed in pieces that fit a processor's cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

PIECE = 2**18
"""Values in a piece; the boundaries of pieces depend on nothing else, and so no result depends on what is done together."""


def windows(d: int) -> Iterator[tuple[int, int]]:
    """Cut `0 ... d` into pieces."""
    for start in range(0, d, PIECE):
        yield start, min(start + PIECE, d)


def groups(rows: int, d: int) -> Iterator[slice]:
    """Group rows of short vectors, so that each group makes about one piece; long vectors stay alone."""
    size = max(1, PIECE // max(d, 1))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


class Vectors:
    """Vectors `[rows, d]`, one in each row of a block, or their differences from those of another block.

    A vector may be scattered over several slices of its row; it is the concatenation of these.

    Example:
        >>> block = torch.tensor([[1.0, 2.0, 0.0, 3.0], [4.0, 5.0, 0.0, 6.0]])
        >>> vectors = Vectors(block, [(0, 2), (3, 1)])
        >>> vectors.read(1, 3)
        tensor([[2., 3.],
                [5., 6.]])
        >>> vectors.add(0, 2, 2, torch.ones(1))
        >>> block[0]
        tensor([1., 2., 0., 4.])

    Args:
        block: `[rows, width]`, its rows contiguous.
        slices: offset and length of each slice, in the order of the vector's values; the whole rows by default.
        minus: a block of the same layout, which is subtracted from what is read.
    """

    def __init__(self, block: Tensor, slices: Sequence[tuple[int, int]] | None = None, minus: Tensor | None = None) -> None:
        self.block, self.minus = block.detach(), None if minus is None else minus.detach()
        self.slices = [(0, block.shape[1])] if slices is None else slices
        self.rows, self.d = block.shape[0], sum(length for _, length in self.slices)
        self.dtype, self.device = block.dtype, block.device
        self._scratch: Tensor | None = None

    def of(self, rows: slice) -> Vectors:
        """Return the vectors of some rows."""
        if rows.start == 0 and rows.stop == self.rows:
            return self
        return Vectors(self.block[rows], self.slices, None if self.minus is None else self.minus[rows])

    def read(self, start: int, stop: int) -> Tensor:
        """Return values `start` to `stop` as a tensor `[rows, stop - start]` to work in, until the next call."""
        shape = (self.rows, stop - start)
        if self._scratch is None or self._scratch.numel() < shape[0] * shape[1]:
            self._scratch = torch.empty(shape[0] * shape[1], dtype=self.dtype, device=self.device)
        values = self._scratch[: shape[0] * shape[1]].view(shape)
        for there, here in self._within(start, stop):
            if self.minus is None:
                values[:, here].copy_(self.block[:, there])
            else:
                torch.sub(self.block[:, there], self.minus[:, there], out=values[:, here])
        return values

    def gather(self, index: Tensor) -> Tensor:
        """Return the values at the places `index`, `[rows, k]` or `[1, k]`."""
        index = self._places(index).expand(self.rows, -1)
        values, *minus = (_gather(block, index) for block in (self.block, self.minus) if block is not None)
        return values - minus[0] if minus else values

    def add(self, row: int, start: int, stop: int, values: Tensor, weight: float = 1.0) -> None:
        """Add `weight * values`, `[stop - start]`, to the values from `start` to `stop` of a row."""
        target = self.block[row]
        for there, here in self._within(start, stop):
            target[there].add_(values[here], alpha=weight)

    def add_to_all(self, start: int, stop: int, values: Tensor) -> None:
        """Add `values`, `[rows, stop - start]`, to the values from `start` to `stop` of all rows."""
        for there, here in self._within(start, stop):
            self.block[:, there].add_(values[:, here])

    def add_at(self, row: int, index: Tensor, values: Tensor, weight: float = 1.0) -> None:
        """Add `weight * values`, `[k]`, at the places `index` of a row, which all differ."""
        self.block[row].index_add_(0, self._places(index), values, alpha=weight)

    def _within(self, start: int, stop: int) -> Iterator[tuple[slice, slice]]:
        if len(self.slices) == 1:
            offset = self.slices[0][0]
            yield slice(offset + start, offset + stop), slice(0, stop - start)
            return
        begin = 0
        for offset, length in self.slices:
            a, b = max(start, begin), min(stop, begin + length)
            if a < b:
                yield slice(offset + a - begin, offset + b - begin), slice(a - start, b - start)
            begin += length

    def _places(self, index: Tensor) -> Tensor:
        if len(self.slices) == 1:
            offset = self.slices[0][0]
            return index + offset if offset else index
        offsets, lengths = torch.tensor(self.slices, device=index.device).T
        ends = lengths.cumsum(0)
        number = torch.searchsorted(ends, index.long().contiguous(), right=True)
        return index + (offsets - (ends - lengths))[number]


def _gather(block: Tensor, index: Tensor) -> Tensor:
    if len(block) == 1:  # several times as fast
        return block[0].index_select(0, index[0])[None]
    return block.gather(1, index)
