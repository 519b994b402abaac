"""What a compressor is."""

from __future__ import annotations

import inspect
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_distopt.compression.vectors import Segments, Vectors, groups

__all__ = ["Compressor", "VectorCompressor", "bytes_of", "values_of"]


class Compressor(ABC):
    r"""Base of all compressors: turns a tensor into bytes for the wire, and these into `Q(x)`.

    A class of your own needs three methods: `compress`, `decompress` and `nbytes`. `Codec` checks what they return.

    Example:
        >>> class Half(Compressor):
        ...     def compress(self, x, seeds):
        ...         return bytes_of(x.half().reshape(len(x), -1))
        ...
        ...     def decompress(self, payload, shape, dtype):
        ...         return values_of(payload, torch.half).to(dtype).view(-1, *shape)
        ...
        ...     def nbytes(self, shape, dtype):
        ...         return 2 * math.prod(shape)
        >>> half, x = Half(), torch.tensor([[1.0, 1 / 3]])
        >>> payload = half.compress(x, seeds=[0])
        >>> payload.shape, half.decompress(payload, (2,), torch.float32)
        (torch.Size([1, 4]), tensor([[1.0000, 0.3333]]))
        >>> half(torch.tensor([2 / 3]))  # both at once, for a single tensor
        tensor([0.6665])
    """

    unbiased: bool = False
    """Whether `E Q(x) = x`."""

    tuned_gamma: float | None = None
    """CHOCO's consensus step size that was tuned for this compressor, where there is one (Lin, table 13.1)."""

    fine: bool = True
    """Whether algorithms without error feedback can use it, as the error is small beside the values."""

    matrices: bool = False
    """Whether it compresses matrices, and so not a whole row."""

    @abstractmethod
    def compress(self, x: Tensor, seeds: Sequence[int]) -> Tensor:
        """Compress each row of `x`.

        Args:
            x: `[rows, *shape]`, floating point: the same tensor of several replicas, or one that differs as they do.
            seeds: one for each row, on which alone the row's randomness depends.

        Returns:
            Bytes `[rows, nbytes(shape, x.dtype)]`.
        """

    @abstractmethod
    def decompress(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return `Q(x)`, `[rows, *shape]`, from the bytes of `compress`.

        Args:
            payload: bytes `[rows, nbytes(shape, dtype)]`, of one row or several; usually a part of a longer one, that has to be
                copied before it is viewed as another type, as `values_of` does.
            shape: of a row's tensor.
            dtype: of the values.
        """

    @abstractmethod
    def nbytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        """Return the bytes that a tensor takes on the wire."""

    def __call__(self, x: Tensor, seed: int = 0) -> Tensor:
        """Return `Q(x)`, what a receiver of the tensor `x` gets."""
        return self.decompress(self.compress(x[None], [seed]), x.shape, x.dtype)[0]

    def as_unbiased(self) -> Compressor:
        """Return the unbiased form, where there are two; otherwise the compressor as it is."""
        return self

    def bits(self, d: int) -> int:
        """Return the bits that `d` values of 32 bits take on the wire, those that fill the last byte among them."""
        return 8 * self.nbytes((d,), torch.float32)

    def delta(self, d: int) -> float | None:
        r"""Return the contraction that holds for all `x` of `d` values, if any is guaranteed.

        $$ E \| Q(x) - x \|^2 \le (1 - \delta) \, \| x \|^2 $$
        """
        return None

    def __repr__(self) -> str:
        names = inspect.signature(type(self)).parameters
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


class VectorCompressor(Compressor):
    """Base of compressors for which a tensor is a vector, whatever its shape; they work in pieces.

    A class of your own needs `size`, `encode` and either `pieces` or, if few values are sent, `entries`. If it sets `unit`,
    these get several short vectors of a row at once; otherwise a row has one.

    Example:
        >>> from lightning_distopt.compression.vectors import windows
        >>> class Half(VectorCompressor):
        ...     def size(self, d, dtype):
        ...         return 2 * d
        ...
        ...     def encode(self, x, seeds, payload):
        ...         for start, stop in windows(x.d):
        ...             payload[:, 2 * start : 2 * stop] = bytes_of(x.read(start, stop).half())
        ...
        ...     def pieces(self, payload, of, dtype):
        ...         for start, stop in windows(of.d):
        ...             yield start, stop, values_of(payload[:, 2 * start : 2 * stop], torch.half).to(dtype)
        >>> half = Half()
        >>> half(torch.tensor([[1.0, 2 / 3]])), half.bits(1000)
        (tensor([[1.0000, 0.6665]]), 16000)
    """

    unit: int | None = None
    """The number of values that take whole bytes: each vector's values are filled up with zeros to a multiple of that."""

    @abstractmethod
    def size(self, d: int, dtype: torch.dtype) -> int:
        """Return the bytes that `d` values take."""

    @abstractmethod
    def encode(self, x: Vectors, seeds: Sequence[int], payload: Tensor) -> None:
        """Write the bytes of the vectors `x` into `payload`, `[rows, bytes]`, as many as `size` says for each vector.

        The rows together are no longer than a piece, or there is a single one; several vectors in a row are no longer than a
        piece.
        """

    def pieces(self, payload: Tensor, of: Segments, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """Give, for each of `windows(of.d)`, its ends and the values `[rows, ...]` that the payload stands for."""
        raise NotImplementedError

    def entries(self, payload: Tensor, of: Segments, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """Give places `[rows, k]` and values `[rows, k]` of the vectors that the payload stands for, piece by piece."""
        raise NotImplementedError

    sparse: bool = False
    """Whether `entries` is there, rather than `pieces`."""

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        """Return the bytes that a tensor takes on the wire."""
        return self.size(math.prod(shape), dtype)

    def compress(self, x: Tensor, seeds: Sequence[int]) -> Tensor:
        """Compress each row of `x`, see `Compressor.compress`."""
        vectors = Vectors(x.reshape(len(x), -1))
        payload = torch.empty(len(x), self.size(vectors.d, x.dtype), dtype=torch.uint8, device=x.device)
        self.encode_all(vectors, seeds, payload)
        return payload

    def decompress(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return `Q(x)`, `[rows, *shape]`, from the bytes of `compress`."""
        values = torch.zeros(len(payload), math.prod(shape), dtype=dtype, device=payload.device)
        self.add_each(payload, Vectors(values))
        return values.view(-1, *shape)

    def encode_all(self, x: Vectors, seeds: Sequence[int], payload: Tensor) -> None:
        """Encode any number of rows."""
        for rows in groups(x.rows, x.d):
            self.encode(x.of(rows), seeds[rows], payload[rows])

    def add_each(self, payload: Tensor, out: Vectors) -> None:
        """Add what row `r` of `payload` stands for to row `r` of `out`."""
        for rows in groups(out.rows, out.d):
            part, target = payload[rows], out.of(rows)
            if self.sparse:
                for index, values in self.entries(part, out.segments, out.dtype):
                    for row in range(target.rows):
                        target.add_at(row, index[row], values[row])
            else:
                for start, stop, values in self.pieces(part, out.segments, out.dtype):
                    target.add_to_all(start, stop, values)

    def add_weighted(self, payload: Tensor, weights: Sequence[Sequence[float]], out: Vectors) -> None:
        """Add `sum_k weights[r][k] Q_k` to row `r` of `out`, where row `k` of `payload` stands for `Q_k`."""
        for sources in groups(len(payload), out.d):
            part = payload[sources]
            uses = [(row, k, w) for row in range(out.rows) for k, w in enumerate(weights[row][sources]) if w]
            if not uses:
                continue
            if self.sparse:
                for index, values in self.entries(part, out.segments, out.dtype):
                    for row, k, weight in uses:
                        out.add_at(row, index[k], values[k], weight)
            else:
                for start, stop, values in self.pieces(part, out.segments, out.dtype):
                    for row, k, weight in uses:
                        out.add(row, start, stop, values[k], weight)


def bytes_of(values: Tensor) -> Tensor:
    """Return the bytes of `[rows, k]` values as `[rows, bytes]`.

    Example:
        >>> bytes_of(torch.tensor([[1.0], [2.0]])).shape
        torch.Size([2, 4])
    """
    return values.contiguous().view(torch.uint8)


def values_of(payload: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values `[rows, k]` that bytes `[rows, bytes]` are, wherever these lie.

    Example:
        >>> payload = bytes_of(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> values_of(payload[:, 4:], torch.float32)
        tensor([[2.],
                [4.]])
    """
    return payload.clone(memory_format=torch.contiguous_format).view(dtype)


def working_type(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to calculate in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def below(values: Tensor, bound: float) -> Tensor:
    """Return where `values < bound`; on CPU by NumPy, which is several times as fast."""
    if values.device.type != "cpu" or values.dtype == torch.bfloat16:
        return values < bound
    return torch.from_numpy(values.numpy() < bound)


def interpolate(points: dict[float, float], x: Any) -> float:
    """Interpolate linearly between logarithms of both; outside, the nearest point counts."""
    known = sorted(points)
    x = min(max(x, known[0]), known[-1])
    for a, b in itertools.pairwise(known):
        if a <= x <= b:
            share = math.log(x / a) / math.log(b / a)
            return math.exp((1 - share) * math.log(points[a]) + share * math.log(points[b]))
    raise AssertionError("unreachable")
