"""Whole blocks as payloads: which part of a row is compressed together, and where its bytes go."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distopt.compression.compressor import Compressor, VectorCompressor
from lightning_distopt.compression.identity import Identity
from lightning_distopt.compression.randomness import hash64
from lightning_distopt.compression.vectors import PIECE, Segments, Vectors, groups
from lightning_distopt.options import check_choice, check_whole, is_whole

Piece = tuple[int, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class _Part:
    """What is compressed together: vectors in a row, or a tensor of a shape, and its bytes in the payload."""

    compressor: Compressor
    number: int
    segments: Segments
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    where: slice

    def view(self, block: Tensor) -> Tensor:
        """Return the tensor `[rows, *shape]` of all rows of a block, as a copy if it is scattered."""
        if self.stride is None:
            return Vectors(block, self.segments).read(0, self.segments.d)
        place = block.storage_offset() + self.segments.runs[0][1]
        return block.as_strided((len(block), *self.shape), (block.stride(0), *self.stride), place)


class Codec:
    r"""Compresses rows of a block `[m, d]` that holds tensors, one after the other, with gaps that stay as they are.

    Compressors for which a tensor is a vector take its values in the order in which they lie in memory. Tensors of up to
    262,144 values, as many as make that number, go through such a compressor together if it can (`VectorCompressor.unit`).

    Example:
        >>> from lightning_distopt.compression import Sign
        >>> codec = Codec(Sign(), [(0, (2,), (1,)), (4, (1, 2), (2, 1))], torch.float32)
        >>> block = torch.tensor([[1.0, 3.0, 0.0, 0.0, -2.0, 4.0]])
        >>> codec.nbytes, codec.decode(codec.encode(block, seeds=[0]), torch.zeros(1, 6))
        (10, tensor([[ 2.,  2.,  0.,  0., -3.,  3.]]))

    Args:
        compressor: what compresses each part.
        pieces: offset in a row, shape and strides of each tensor, which fills its part of the row without gaps.
        dtype: of the block.
        scope: `"tensor"` compresses each tensor, `"row"` all values of a row as one vector.
        min_numel: tensors of fewer values are sent as they are.

    Attributes:
        nbytes: bytes of a row's payload.

    Raises:
        ValueError: if `scope` is none of the two, `min_numel` is negative, or `scope` is "row" and the compressor for matrices;
            here and in its methods, if what a compressor returns has not the shape and the type that `Compressor` says.
    """

    def __init__(
        self,
        compressor: Compressor,
        pieces: Sequence[Piece],
        dtype: torch.dtype,
        scope: Literal["tensor", "row"] = "tensor",
        min_numel: int = 0,
    ) -> None:
        check_scope(compressor, scope, min_numel)
        self.compressor, self.dtype = compressor, dtype
        self._parts: list[_Part] = []
        self.nbytes = 0
        unit = compressor.unit if isinstance(compressor, VectorCompressor) else None
        large, short, small = [], [], []
        for number, (offset, shape, stride) in enumerate(pieces):
            numel = math.prod(shape)
            if numel == 0:
                continue
            if numel < min_numel:
                small.append((offset, numel))
            elif scope == "row":
                large.append((offset, numel))
            elif unit and numel <= PIECE:
                short.append((number, (offset, numel)))
            else:
                self._add(compressor, number, Segments([(offset, numel)]), shape, stride)
        for number, segments in _together(short, unit or 1):
            self._add(compressor, number, segments)
        for what, slices in ((compressor, large), (Identity(), small)):
            if slices:
                self._add(what, len(pieces), Segments(slices))

    def _add(
        self,
        compressor: Compressor,
        number: int,
        segments: Segments,
        shape: tuple[int, ...] | None = None,
        stride: tuple[int, ...] | None = None,
    ) -> None:
        shapes = [(length,) for length in segments.lengths] if shape is None else [shape]
        size = sum(_checked_size(compressor, each, self.dtype) for each in shapes)
        where = slice(self.nbytes, self.nbytes + size)
        self._parts.append(_Part(compressor, number, segments, shapes[0], stride, where))
        self.nbytes += size

    def encode(self, block: Tensor, seeds: Sequence[int]) -> Tensor:
        """Compress rows.

        Args:
            block: `[rows, d]`.
            seeds: one for each row, on which alone its randomness depends.

        Returns:
            Bytes `[rows, nbytes]`.
        """
        return self._encode(block, None, seeds)

    def encode_difference(self, x: Tensor, x_hat: Tensor, seeds: Sequence[int]) -> Tensor:
        r"""Compress `q = Q(x - x_hat)` and add `q` to `x_hat` in place, without a copy of a row where the compressor allows.

        Args:
            x: `[rows, d]`.
            x_hat: the same, changed in place.
            seeds: as for `encode`.

        Returns:
            Bytes `[rows, nbytes]`.
        """
        return self._encode(x, x_hat, seeds)

    def decode(self, payload: Tensor, out: Tensor) -> Tensor:
        """Write what a payload stands for into `out`, `[rows, d]`, gaps untouched; returns `out`."""
        for part in self._parts:
            for _, offset, length in part.segments.runs:
                out[:, offset : offset + length] = 0
        self._add_each(payload, out)
        return out

    def decode_add(self, payload: Tensor | Sequence[Tensor], weights: Tensor, out: Tensor) -> Tensor:
        r"""Add weighted sums of what payloads stand for: `out[r] += sum_k weights[r, k] Q_k`.

        Terms of weight zero are left out, whatever their payload holds.

        Args:
            payload: `[K, nbytes]`, or its rows one by one.
            weights: `[R, K]`.
            out: `[R, d]`, changed in place and returned.
        """
        table = weights.tolist()
        for part in self._parts:
            rows = [row[part.where] for row in payload]
            if isinstance(part.compressor, VectorCompressor):
                # Large ones one by one, as they would be decoded anyway: so there is no second copy of all payloads.
                for sources in groups(len(rows), part.segments.d):
                    data = torch.stack(rows[sources]) if len(rows[sources]) > 1 else rows[sources][0][None]
                    part.compressor.add_weighted(data, [row[sources] for row in table], Vectors(out, part.segments))
                continue
            data = [row[None] for row in rows]
            for k in range(len(data)):
                if any(row[k] for row in table):
                    values = self._decompressed(part, data[k])
                    for row in range(len(out)):
                        if table[row][k]:
                            self._add_values(part, out[row : row + 1], values, table[row][k])
        return out

    def _encode(self, x: Tensor, x_hat: Tensor | None, seeds: Sequence[int]) -> Tensor:
        if x.dtype != self.dtype:
            raise ValueError(f"This codec was made for blocks of {self.dtype}, but the block is of {x.dtype}.")
        payload = torch.empty(len(x), self.nbytes, dtype=torch.uint8, device=x.device)
        for part in self._parts:
            own = [hash64(seed, part.number) for seed in seeds]
            data = payload[:, part.where]
            if isinstance(part.compressor, VectorCompressor):
                part.compressor.encode_all(Vectors(x, part.segments, minus=x_hat), own, data)
            else:
                values = part.view(x)
                compressed = part.compressor.compress(values if x_hat is None else values - part.view(x_hat), own)
                if not (_has_shape(compressed, data.shape) and compressed.dtype == torch.uint8):
                    raise ValueError(
                        f"{type(part.compressor).__name__}.compress must return bytes (torch.uint8) of the shape "
                        f"{[*data.shape]}, a row for each replica and {data.shape[1]} bytes as `nbytes` says, from a tensor of "
                        f"the shape {[*values.shape]}; it has returned {_described(compressed)}."
                    )
                data.copy_(compressed)
        if x_hat is not None:
            self._add_each(payload, x_hat)
        return payload

    def _add_each(self, payload: Tensor, out: Tensor) -> None:
        for part in self._parts:
            data = payload[:, part.where]
            if isinstance(part.compressor, VectorCompressor):
                part.compressor.add_each(data, Vectors(out, part.segments))
            else:
                self._add_values(part, out, self._decompressed(part, data), 1.0)

    def _decompressed(self, part: _Part, data: Tensor) -> Tensor:
        values = part.compressor.decompress(data, part.shape, self.dtype)
        if not _has_shape(values, (len(data), *part.shape)):
            raise ValueError(
                f"{type(part.compressor).__name__}.decompress must return values of the shape {[len(data), *part.shape]}, a "
                f"row for each row of the payload; it has returned {_described(values)}."
            )
        return values

    @staticmethod
    def _add_values(part: _Part, out: Tensor, values: Tensor, weight: float) -> None:
        if part.stride is not None:
            part.view(out).add_(values, alpha=weight)
        else:
            for row, source in enumerate(values):
                Vectors(out, part.segments).add(row, 0, part.segments.d, source, weight)


def check_scope(compressor: Compressor, scope: Literal["tensor", "row"], min_numel: int) -> None:
    """Raise a `ValueError` for options of a codec that do not go together."""
    check_choice("scope", scope, ("tensor", "row"))
    check_whole("min_numel", min_numel, least=0)
    if scope == "row" and compressor.matrices:
        raise ValueError(f'{compressor!r} compresses matrices, and a whole row is none: use `scope="tensor"`.')


def _checked_size(compressor: Compressor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    size = compressor.nbytes(shape, dtype)
    if not is_whole(size, least=0):
        raise ValueError(
            f"{type(compressor).__name__}.nbytes must return a whole number of bytes for a tensor of the shape {[*shape]}; it "
            f"has returned {size!r}."
        )
    return int(size)


def _has_shape(values: Any, shape: Sequence[int]) -> bool:
    return isinstance(values, Tensor) and values.shape == tuple(shape)


def _described(values: Any) -> str:
    return f"{values.dtype} of the shape {[*values.shape]}" if isinstance(values, Tensor) else repr(values)


def _together(vectors: list[tuple[int, tuple[int, int]]], unit: int) -> Iterator[tuple[int, Segments]]:
    """Group short vectors, given by number and slice, so that each group makes at most a piece; give its first number."""
    groups: list[list[tuple[int, tuple[int, int]]]] = []
    room = 0
    for number, (offset, length) in vectors:
        size = -(-length // unit) * unit
        if not groups or room + size > PIECE:
            groups.append([])
            room = 0
        groups[-1].append((number, (offset, length)))
        room += size
    for group in groups:
        yield group[0][0], Segments([where for _, where in group], unit)
