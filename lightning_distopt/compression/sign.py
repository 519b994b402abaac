"""Signs and their common magnitude."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_distopt.compression.compressor import VectorCompressor, below, bytes_of, values_of, working_type
from lightning_distopt.compression.packing import LookUp, pack
from lightning_distopt.compression.vectors import Segments, Vectors, windows


class Sign(VectorCompressor):
    r"""One bit for each value, and the mean of their magnitudes.

    $$ Q(x) = \frac{\|x\|_1}{d} \operatorname{sign}(x), \qquad \operatorname{sign}(0) = +1 $$

    A value that is not a number makes all values of its tensor so. An infinite one makes all infinite.

    Example:
        >>> sign, x = Sign(), torch.tensor([[1.0, -2.0, 0.0, 5.0]])
        >>> sign.decompress(sign.compress(x, seeds=[0]), (4,), torch.float32)
        tensor([[ 2., -2.,  2.,  2.]])
        >>> sign.bits(1000)  # 1000 signs and 32 bits for the mean
        1032

    Reference: S. P. Karimireddy et al., *Error feedback fixes SignSGD and other gradient compression schemes*, ICML 2019.
    """

    tuned_gamma = 0.45
    fine = False
    unit = 8

    def size(self, d: int, dtype: torch.dtype) -> int:
        """Return a bit for each value, and the bytes of the mean: four, for float64 eight."""
        return working_type(dtype).itemsize + -(-d // 8)

    def delta(self, d: int) -> float:
        r"""Return `1 / d`, which a vector with a single value other than zero attains; `contraction` knows `x`."""
        return 1 / d

    @staticmethod
    def contraction(x: Tensor) -> float:
        r"""Return the contraction of a tensor `x`, with which the inequality is an equality.

        $$ \delta(x) = \frac{\|x\|_1^2}{d \, \|x\|_2^2}, \qquad \|Q(x) - x\|^2 = (1 - \delta(x)) \, \|x\|^2 $$

        Example:
            >>> Sign.contraction(torch.tensor([1.0, -1.0])), Sign.contraction(torch.tensor([1.0, 0.0]))
            (1.0, 0.5)

        Args:
            x: of any shape; 1 is returned for zeros.
        """
        x = x.double()
        square = x.square().sum()
        return float(x.abs().sum() ** 2 / (x.numel() * square)) if square else 1.0

    def encode(self, x: Vectors, seeds: Sequence[int], payload: Tensor) -> None:
        """Write the mean magnitudes, then the signs (1: negative)."""
        total = torch.zeros(x.rows, x.segments.count, dtype=working_type(x.dtype), device=x.device)
        head = total.element_size() * x.segments.count
        for start, stop in windows(x.d):
            values = x.read(start, stop).to(total.dtype)
            payload[:, head + start // 8 : head + -(-stop // 8)] = pack(below(values, 0.0), bits=1)
            total += x.segments.sums(values.abs_())
        payload[:, :head] = bytes_of(total / torch.tensor(x.segments.lengths, device=x.device))

    def pieces(self, payload: Tensor, of: Segments, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """Give the values."""
        head = of.count * working_type(dtype).itemsize
        mean = values_of(payload[:, :head], working_type(dtype))
        look_up = LookUp(torch.tensor([1.0, -1.0]), mean, of, dtype)
        for start, stop in windows(of.d):
            yield start, stop, look_up(payload[:, head + start // 8 : head + -(-stop // 8)], stop - start)
