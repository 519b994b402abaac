"""No compression."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_distopt.compression.compressor import VectorCompressor, bytes_of, values_of
from lightning_distopt.compression.vectors import Segments, Vectors, windows


class Identity(VectorCompressor):
    """Sends every value as it is.

    Example:
        >>> Identity().bits(10), Identity().delta(10)
        (320, 1.0)
    """

    unbiased = True
    tuned_gamma = 1.0
    unit = 1

    def size(self, d: int, dtype: torch.dtype) -> int:
        """Return the bytes of `d` values."""
        return d * dtype.itemsize

    def delta(self, d: int) -> float:
        """Return 1: nothing is lost."""
        return 1.0

    def encode(self, x: Vectors, seeds: Sequence[int], payload: Tensor) -> None:
        """Copy the values."""
        size = x.dtype.itemsize
        for start, stop in windows(x.d):
            payload[:, start * size : stop * size] = bytes_of(x.read(start, stop))

    def pieces(self, payload: Tensor, of: Segments, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """Give the values."""
        size = dtype.itemsize
        for start, stop in windows(of.d):
            yield start, stop, values_of(payload[:, start * size : stop * size], dtype)
