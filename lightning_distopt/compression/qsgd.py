"""Values rounded at random to a few levels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from lightning_distopt.compression.compressor import (
    VectorCompressor,
    bytes_of,
    interpolate,
    values_of,
    working_type,
)
from lightning_distopt.compression.packing import LookUp, pack
from lightning_distopt.compression.randomness import generators, hash64, random_bytes
from lightning_distopt.compression.vectors import Segments, Vectors, windows


class QSGD(VectorCompressor):
    r"""Each value rounded at random to one of `s` levels of the norm, beside the sign: `b` bits.

    $$ Q(x) = \frac{1}{\tau} \, \frac{\|x\|_2}{s} \Bigl\lfloor \frac{s \, x}{\|x\|_2} + u \Bigr\rfloor, \qquad
       s = 2^{b-1} - 1, \quad u \sim U[0, 1)^d $$

    The biased form has `tau = 1 + min(d / s^2, sqrt(d) / s)`, the unbiased one `tau = 1`. The papers round the magnitude and
    put the sign back, which has the same distribution, and have `2^{b-1}` levels: one too many to be packed into `b` bits, as a
    single value other than zero shows. `s`, and `tau` with it, is what fits.

    Each `u_i` is a random byte and a random fraction that values share, so each of them is uniform. Norms are
    float32; sums of squares above 3e38 are infinite. A value that is infinite or no number makes all of its tensor no numbers.

    Example:
        >>> qsgd, x = QSGD(bits=4), torch.randn(1, 1000)
        >>> q = qsgd.decompress(qsgd.compress(x, seeds=[0]), (1000,), torch.float32)
        >>> q.unique().numel() <= 15
        True
        >>> qsgd.nbytes((1000,)), round(qsgd.delta(1000), 3)
        (504, 0.181)

    Args:
        bits: `b`, of each value: 2 to 8, or 16.
        unbiased: whether `E Q(x) = x`; otherwise values are divided by `tau`, which makes a contraction.

    Raises:
        ValueError: if `bits` is outside its range.

    Reference: D. Alistarh et al., *QSGD: communication-efficient SGD via gradient quantization and encoding*, NeurIPS 2017; for
    `tau`, A. Koloskova, S. U. Stich and M. Jaggi, *Decentralized stochastic optimization and gossip algorithms with compressed
    communication*, ICML 2019.
    """

    def __init__(self, bits: int = 4, unbiased: bool = False) -> None:
        if bits not in (2, 3, 4, 5, 6, 7, 8, 16):
            raise ValueError(f"`qsgd` packs a value into 2 to 8 or into 16 `bits`; got {bits!r}.")
        self.unbiased = unbiased
        self.b = int(bits)

    def __repr__(self) -> str:
        return f"QSGD(bits={self.b}, unbiased={self.unbiased})"

    def as_unbiased(self) -> QSGD:
        """Return the form that does not divide by `tau`."""
        return QSGD(self.b, unbiased=True)

    @property
    def fine(self) -> bool:  # type: ignore[override]
        """Whether there are 8 bits or more."""
        return self.b >= 8

    @property
    def tuned_gamma(self) -> float | None:  # type: ignore[override]
        """CHOCO's consensus step size (Lin, table 13.1), interpolated; none is known for the unbiased form."""
        return None if self.unbiased else interpolate({2: 0.025, 4: 0.075, 8: 0.2, 16: 0.2}, self.b)

    @property
    def unit(self) -> int | None:  # type: ignore[override]
        """Values whose codes fill whole bytes, if these are no more bytes than the codes need."""
        return 1 if self.b == 16 else 8 // self.b if 8 % self.b == 0 else None

    @property
    def levels(self) -> int:
        """`s`, the levels beside the sign."""
        return 2 ** (self.b - 1) - 1

    def tau(self, d: int) -> float:
        """Return what values are divided by."""
        return 1.0 if self.unbiased else 1 + min(d / self.levels**2, sqrt(d) / self.levels)

    def size(self, d: int, dtype: torch.dtype) -> int:
        """Return `b` bits for each value and four bytes for the norm."""
        return 4 + -(-d * self.b // 8)

    def delta(self, d: int) -> float | None:
        """Return `1 / tau`, or None for the unbiased form."""
        return None if self.unbiased else 1 / self.tau(d)

    def encode(self, x: Vectors, seeds: Sequence[int], payload: Tensor) -> None:
        """Write the norms, then the levels, counted from `-s` on; those of 16 bits as they are."""
        b, s, head = self.b, self.levels, 4 * x.segments.count
        square = torch.zeros(x.rows, x.segments.count, dtype=working_type(x.dtype), device=x.device)
        for start, stop in windows(x.d):
            square += x.segments.sums(x.read(start, stop).to(square.dtype).square_())
        norm = square.sqrt().float()
        norm = norm.masked_fill(~norm.isfinite(), torch.nan)
        payload[:, :head] = bytes_of(norm)
        scale = 256 * s / norm
        scale = torch.where(scale.isfinite(), scale, 0.0)  # zeros, or no numbers: the norm says it all
        scale = x.segments.spread(scale)
        sources = generators(seeds, x.device)
        fractions = torch.tensor([[(hash64(seed, 1) >> 40) / 2**24] for seed in seeds], dtype=torch.float32, device=x.device)
        for start, stop in windows(x.d):
            noise = random_bytes(sources, stop - start, x.device)
            # floor(y + u) + s, with y + u + s >= 0 as |y| <= s, except for the last bit of s / norm
            y = x.read(start, stop).float().mul_(scale).add_(noise).add_(fractions)
            y.mul_(1 / 256).add_(s).clamp_(0, 2 * s)
            first, last = start * b // 8, -(-stop * b // 8)
            codes = bytes_of(y.to(torch.int32).sub_(s).to(torch.int16)) if b == 16 else pack(_bytes(y), b)
            payload[:, head + first : head + last] = codes

    def pieces(self, payload: Tensor, of: Segments, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """Give the values."""
        b, s, head = self.b, self.levels, 4 * of.count
        norm = values_of(payload[:, :head], torch.float32).to(working_type(dtype))
        unit = norm / torch.tensor([s * self.tau(d) for d in of.lengths], dtype=norm.dtype, device=norm.device)
        if b == 16:
            unit = of.spread(unit)
            for start, stop in windows(of.d):
                codes = values_of(payload[:, head + 2 * start : head + 2 * stop], torch.int16)
                yield start, stop, (codes * unit).to(dtype)
            return
        look_up = LookUp(torch.arange(2.0**b) - s, unit, of, dtype)
        for start, stop in windows(of.d):
            yield start, stop, look_up(payload[:, head + start * b // 8 : head + -(-stop * b // 8)], stop - start)


def _bytes(y: Tensor) -> Tensor:
    if y.device.type != "cpu":
        return y.to(torch.uint8)
    with np.errstate(invalid="ignore"):  # what is no number: the norm says so already
        return torch.from_numpy(y.numpy().astype(np.uint8))
