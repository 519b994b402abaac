"""Whole blocks as payloads: which part of a row is compressed together, and where its bytes go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_distopt.compression.compressor import Compressor, VectorCompressor
from lightning_distopt.compression.identity import Identity
from lightning_distopt.compression.randomness import hash64
from lightning_distopt.compression.vectors import Vectors, groups

Piece = tuple[int, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class _Part:
    """What is compressed together: slices of a row, or a tensor of a shape, and its bytes in the payload."""

    compressor: Compressor
    number: int
    slices: list[tuple[int, int]]
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    where: slice

    def view(self, block: Tensor) -> Tensor:
        """Return the tensor `[rows, *shape]` of all rows of a block, as a copy if it is scattered."""
        if self.stride is None:
            return Vectors(block, self.slices).read(0, self.shape[0])
        place = block.storage_offset() + self.slices[0][0]
        return block.as_strided((len(block), *self.shape), (block.stride(0), *self.stride), place)


class Codec:
    r"""Compresses rows of a block `[m, d]` that holds tensors, one after the other, with gaps that stay as they are.

    Compressors for which a tensor is a vector take its values in the order in which they lie in memory.

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

    Raises:
        ValueError: if `scope` is none of the two, `min_numel` is negative, or `scope` is "row" and the compressor for matrices.

    Attributes:
        nbytes: bytes of a row's payload.
    """

    def __init__(
        self,
        compressor: Compressor,
        pieces: Sequence[Piece],
        dtype: torch.dtype,
        scope: Literal["tensor", "row"] = "tensor",
        min_numel: int = 0,
    ) -> None:
        if scope not in ("tensor", "row"):
            raise ValueError(f'`scope` is "tensor" or "row"; got {scope!r}.')
        if min_numel < 0:
            raise ValueError(f"`min_numel` is a number of values, 0 or more; got {min_numel!r}.")
        if scope == "row" and compressor.matrices:
            raise ValueError(f'{compressor!r} compresses matrices, and a whole row is none: use `scope="tensor"`.')
        self.compressor, self.dtype = compressor, dtype
        self._parts: list[_Part] = []
        self.nbytes = 0
        large, small = [], []
        for number, (offset, shape, stride) in enumerate(pieces):
            numel = math.prod(shape)
            if numel == 0:
                continue
            if numel < min_numel:
                small.append((offset, numel))
            elif scope == "row":
                large.append((offset, numel))
            else:
                self._add(compressor, number, [(offset, numel)], shape, stride)
        for what, slices in ((compressor, large), (Identity(), small)):
            if slices:
                self._add(what, len(pieces), _merged(slices), (sum(length for _, length in slices),), None)

    def _add(
        self,
        compressor: Compressor,
        number: int,
        slices: list[tuple[int, int]],
        shape: tuple[int, ...],
        stride: tuple[int, ...] | None,
    ) -> None:
        size = compressor.nbytes(shape, self.dtype)
        self._parts.append(_Part(compressor, number, slices, shape, stride, slice(self.nbytes, self.nbytes + size)))
        self.nbytes += size

    def encode(self, block: Tensor, seeds: Sequence[int]) -> Tensor:
        """Compress rows.

        Args:
            block: `[rows, d]`.
            seeds: one for each row; the randomness of a row's tensor depends on it and the tensor's number alone.

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
            for offset, length in part.slices:
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
                for sources in groups(len(rows), math.prod(part.shape)):
                    data = torch.stack(rows[sources]) if len(rows[sources]) > 1 else rows[sources][0][None]
                    part.compressor.add_weighted(data, [row[sources] for row in table], Vectors(out, part.slices))
                continue
            data = [row[None] for row in rows]
            for k in range(len(data)):
                if any(row[k] for row in table):
                    values = part.compressor.decompress(data[k], part.shape, self.dtype)
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
                part.compressor.encode_all(Vectors(x, part.slices, minus=x_hat), own, data)
            else:
                values = part.view(x)
                data.copy_(part.compressor.compress(values if x_hat is None else values - part.view(x_hat), own))
        if x_hat is not None:
            self._add_each(payload, x_hat)
        return payload

    def _add_each(self, payload: Tensor, out: Tensor) -> None:
        for part in self._parts:
            data = payload[:, part.where]
            if isinstance(part.compressor, VectorCompressor):
                part.compressor.add_each(data, Vectors(out, part.slices))
            else:
                self._add_values(part, out, part.compressor.decompress(data, part.shape, self.dtype), 1.0)

    @staticmethod
    def _add_values(part: _Part, out: Tensor, values: Tensor, weight: float) -> None:
        if part.stride is not None:
            part.view(out).add_(values, alpha=weight)
        else:
            for row, source in enumerate(values):
                Vectors(out, part.slices).add(row, 0, part.shape[0], source, weight)


def _merged(slices: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join slices that touch."""
    merged: list[tuple[int, int]] = []
    for offset, length in slices:
        if merged and sum(merged[-1]) == offset:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((offset, length))
    return merged
