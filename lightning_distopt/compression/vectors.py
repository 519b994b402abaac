"""Vectors that lie in rows of a block, read and changed in pieces that fit a processor's cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
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


def row_sums(values: Tensor) -> Tensor:
    """Return the sums of rows `[rows, n]`, `n` at most a piece, whatever the number of rows and threads: `[rows, 1]`."""
    n = values.shape[1]
    blocks = n // 4096
    total = values[:, : 4096 * blocks].unflatten(1, (blocks, 4096)).sum(2).sum(1, keepdim=True)
    return total if 4096 * blocks == n else total + values[:, 4096 * blocks :].sum(1, keepdim=True)


def spread(numbers: Tensor, times: Sequence[int]) -> Tensor:
    """Repeat each of the numbers `[rows, count]` so many times; a single one stays as it is, to be broadcast.

    Example:
        >>> spread(torch.tensor([[1, 2]]), [3, 1])
        tensor([[1, 1, 1, 2]])
    """
    if len(times) == 1:
        return numbers
    if numbers.device.type == "cpu":  # more than ten times as fast
        return torch.from_numpy(np.repeat(numbers.numpy(), times, axis=1))
    return numbers.repeat_interleave(torch.tensor(times, device=numbers.device), dim=1, output_size=sum(times))


class Segments:
    """The vectors of a row that are compressed together, and where their values lie.

    What is read of them is a single vector of `d` values: all of them, one after the other.

    Example:
        >>> segments = Segments([(0, 2), (3, 1)], unit=8)
        >>> segments.lengths, segments.places, segments.d
        ([2, 1], [0, 8], 16)
        >>> Segments([(0, 2), (3, 1)]).lengths
        [3]

    Args:
        slices: offset and length in the row, one for each vector.
        unit: each vector takes room for a multiple of so many values in what is read; zeros fill it up. None: the slices make
            a single vector, their concatenation.
    """

    def __init__(self, slices: Sequence[tuple[int, int]], unit: int | None = None) -> None:
        self.lengths = [length for _, length in slices]
        if len(slices) == 1:
            unit = None
        rooms = [-(-length // (unit or 1)) * (unit or 1) for length in self.lengths]
        *places, self.d = itertools.accumulate(rooms, initial=0)
        self.padded = sum(self.lengths) < self.d
        self.runs: list[tuple[int, int, int]] = []
        """Place in what is read, offset in the row, and length."""
        for place, (offset, length) in zip(places, slices, strict=True):
            if self.runs and place - self.runs[-1][0] == offset - self.runs[-1][1] == self.runs[-1][2]:
                place, offset, before = self.runs.pop()
                length += before
            self.runs.append((place, offset, length))
        if unit is None:
            self.lengths, rooms, places = [self.d], [self.d], [0]
        self.rooms, self.places = rooms, places

    @property
    def count(self) -> int:
        """The number of vectors."""
        return len(self.lengths)

    def sums(self, values: Tensor) -> Tensor:
        """Return the sums of each vector `[rows, count]` of what was read, whatever the number of rows and threads.

        A single vector is read in pieces, and then it is the piece that is summed up.
        """
        if self.count == 1:
            return row_sums(values)
        if values.device.type == "cpu":  # adds in pairs, which torch's sums of segments do not
            return torch.from_numpy(np.add.reduceat(values.numpy(), self.places, axis=1))
        rooms = torch.tensor(self.rooms * len(values), device=values.device)
        return torch.segment_reduce(values.flatten(), "sum", lengths=rooms, unsafe=True).view(len(values), -1)

    def spread(self, numbers: Tensor) -> Tensor:
        """Give each value of what is read the number of its vector: `[rows, count]` becomes `[rows, d]`, see `spread`."""
        return spread(numbers, self.rooms)


class Vectors:
    """Vectors in the rows of a block, or their differences from those of another block; the same ones in each row.

    Example:
        >>> block = torch.tensor([[1.0, 2.0, 0.0, 3.0], [4.0, 5.0, 0.0, 6.0]])
        >>> vectors = Vectors(block, Segments([(0, 2), (3, 1)]))
        >>> vectors.read(1, 3)
        tensor([[2., 3.],
                [5., 6.]])
        >>> vectors.add(0, 2, 3, torch.ones(1))
        >>> block[0]
        tensor([1., 2., 0., 4.])

    Args:
        block: `[rows, width]`, its rows contiguous.
        segments: what of a row counts; all of it by default.
        minus: a block of the same layout, which is subtracted from what is read.
    """

    def __init__(self, block: Tensor, segments: Segments | None = None, minus: Tensor | None = None) -> None:
        self.block, self.minus = block.detach(), None if minus is None else minus.detach()
        self.segments = Segments([(0, block.shape[1])]) if segments is None else segments
        self.rows, self.d = block.shape[0], self.segments.d
        self.dtype, self.device = block.dtype, block.device
        self._scratch: Tensor | None = None

    def of(self, rows: slice) -> Vectors:
        """Return the vectors of some rows."""
        if rows.start == 0 and rows.stop == self.rows:
            return self
        return Vectors(self.block[rows], self.segments, None if self.minus is None else self.minus[rows])

    def read(self, start: int, stop: int) -> Tensor:
        """Return values `start` to `stop` as a tensor `[rows, stop - start]` to work in, until the next call."""
        shape = (self.rows, stop - start)
        if self._scratch is None or self._scratch.numel() < shape[0] * shape[1]:
            self._scratch = torch.empty(shape[0] * shape[1], dtype=self.dtype, device=self.device)
        values = self._scratch[: shape[0] * shape[1]].view(shape)
        if self.segments.padded:
            values.zero_()
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
        for place, offset, length in self.segments.runs:
            a, b = max(start, place), min(stop, place + length)
            if a < b:
                yield slice(offset + a - place, offset + b - place), slice(a - start, b - start)

    def _places(self, index: Tensor) -> Tensor:
        runs = self.segments.runs
        if len(runs) == 1:
            offset = runs[0][1]
            return index + offset if offset else index
        places, offsets, _ = torch.tensor(runs, device=index.device).T.contiguous()
        number = torch.searchsorted(places, index.long().contiguous(), right=True) - 1
        return index + (offsets - places)[number]


def _gather(block: Tensor, index: Tensor) -> Tensor:
    if len(block) == 1:  # several times as fast
        return block[0].index_select(0, index[0])[None]
    return block.gather(1, index)


assert PIECE % 4096 == 0
