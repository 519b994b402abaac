"""Some values, drawn at random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_distopt.compression.compressor import VectorCompressor, bytes_of, interpolate, values_of
from lightning_distopt.compression.randomness import MASK, hash64, positions
from lightning_distopt.compression.top_k import check_ratio, kept
from lightning_distopt.compression.vectors import Segments, Vectors, windows


class RandomK(VectorCompressor):
    r"""`k = max(1, floor(ratio d))` values at random places, which both ends derive from a seed that is sent along.

    Each place is drawn with probability `k / d`; unbiased values are multiplied by `d / k`. Tensors of up to 262,144 values are
    drawn from at once; longer ones piece by piece, each piece giving its share of `k`, rounded at random.
    A value that is no number is sent when its place is drawn.

    Example:
        >>> random, x = RandomK(0.5), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        >>> int(random.decompress(random.compress(x, seeds=[0]), (4,), torch.float32).count_nonzero())
        2
        >>> random.bits(1000) == 500 * 32 + 64, random.delta(1000), RandomK(0.5, unbiased=True).delta(1000)
        (True, 0.5, None)

    Args:
        ratio: the share of values that are kept, above 0 and at most 1.
        unbiased: whether to scale them.

    Raises:
        ValueError: if `ratio` is outside its range.

    Reference: S. U. Stich, J.-B. Cordonnier and M. Jaggi, *Sparsified SGD with memory*, NeurIPS 2018.
    """

    sparse = True

    def __init__(self, ratio: float, unbiased: bool = False) -> None:
        check_ratio("random_k", ratio)
        self.ratio, self.unbiased = float(ratio), unbiased

    @property
    def tuned_gamma(self) -> float | None:  # type: ignore[override]
        """CHOCO's consensus step size (Lin, table 13.1), interpolated; none is known for the unbiased form."""
        return None if self.unbiased else interpolate({0.01: 0.00625, 0.1: 0.075, 0.5: 0.45}, self.ratio)

    def size(self, d: int, dtype: torch.dtype) -> int:
        """Return the bytes of the values and eight for the seed."""
        return kept(self.ratio, d) * dtype.itemsize + 8

    def delta(self, d: int) -> float | None:
        """Return `k / d`, or None for the unbiased form."""
        return None if self.unbiased else kept(self.ratio, d) / d

    def encode(self, x: Vectors, seeds: Sequence[int], payload: Tensor) -> None:
        """Write the values, then the seed."""
        size = x.dtype.itemsize
        seeds = [seed & MASK for seed in seeds]
        for start, index in self._places(seeds, x.d, x.device):
            payload[:, start * size : (start + index.shape[1]) * size] = bytes_of(x.gather(index))
        signed = [seed - (seed >> 63 << 64) for seed in seeds]
        payload[:, -8:] = bytes_of(torch.tensor(signed, device=x.device)[:, None])

    def entries(self, payload: Tensor, of: Segments, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """Give places and values."""
        size, d, k = dtype.itemsize, of.d, kept(self.ratio, of.d)
        seeds = [seed & MASK for seed in values_of(payload[:, -8:], torch.int64)[:, 0].tolist()]
        for start, index in self._places(seeds, d, payload.device):
            values = values_of(payload[:, start * size : (start + index.shape[1]) * size], dtype)
            yield index, values.mul_(d / k) if self.unbiased else values

    def _places(self, seeds: Sequence[int], d: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """Give, for each piece, how many places came before, and its own `[rows, ...]`."""
        k = kept(self.ratio, d)
        # With u uniform on 0 ... d - 1, a piece [a, b) gives floor((u + b k) / d) - floor((u + a k) / d) values,
        # (b - a) k / d in the mean.
        u = hash64(seeds[0], 0) % d
        for number, (a, b) in enumerate(windows(d)):
            first, last = (u + a * k) // d, (u + b * k) // d
            if first < last:
                yield first, positions([hash64(seed, 1 + number) for seed in seeds], b - a, last - first, device) + a
