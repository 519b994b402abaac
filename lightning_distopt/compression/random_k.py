"""Some values, drawn at random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_distopt.compression.compressor import VectorCompressor, bytes_of, interpolate, values_of, working_type
from lightning_distopt.compression.randomness import MASK, hash64, hashes, positions
from lightning_distopt.compression.top_k import kept
from lightning_distopt.compression.vectors import PIECE, Segments, Vectors, spread, windows
from lightning_distopt.options import check_share


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

    fine = False
    sparse = True
    unit = 1

    def __init__(self, ratio: float, unbiased: bool = False) -> None:
        self.ratio, self.unbiased = check_share("ratio", ratio), unbiased

    def as_unbiased(self) -> RandomK:
        """Return the form that scales the values."""
        return RandomK(self.ratio, unbiased=True)

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
        """Write the values, then a seed for each vector."""
        size, count = x.dtype.itemsize, x.segments.count
        own = np.array([[seed & MASK] for seed in seeds], dtype=np.uint64)
        if count > 1:
            own = hashes(own[:, 0], count)
        for start, index in self._places(own, x.segments, x.device):
            payload[:, start * size : (start + index.shape[1]) * size] = bytes_of(x.gather(index))
        payload[:, -8 * count :] = torch.from_numpy(own.view(np.uint8)).to(x.device)

    def entries(self, payload: Tensor, of: Segments, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """Give places and values."""
        size, k = dtype.itemsize, [kept(self.ratio, d) for d in of.lengths]
        own = payload[:, -8 * of.count :].cpu().contiguous().numpy().view(np.uint64)
        scale = torch.tensor([[d / n for d, n in zip(of.lengths, k, strict=True)]], dtype=working_type(dtype))
        scale = spread(scale.to(payload.device), k)
        for start, index in self._places(own, of, payload.device):
            values = values_of(payload[:, start * size : (start + index.shape[1]) * size], dtype)
            yield index, values.mul_(scale) if self.unbiased else values

    def _places(self, seeds: np.ndarray, of: Segments, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """Give places `[rows, ...]`, and how many came before; vectors, or pieces of a long one, are drawn from together."""
        k = [kept(self.ratio, d) for d in of.lengths]
        starts, lengths, together = of.places, of.lengths, of.count
        if of.count > 1:
            own = hashes(seeds, 2)[:, :, 1]
        else:
            # With u uniform on 0 ... d - 1, a piece [a, b) gives floor((u + b k) / d) - floor((u + a k) / d) values,
            # (b - a) k / d in the mean.
            u = hash64(int(seeds[0, 0]), 0) % of.d
            pieces = list(windows(of.d))
            k = [(u + b * k[0]) // of.d - (u + a * k[0]) // of.d for a, b in pieces]
            starts, lengths = [a for a, _ in pieces], [b - a for a, b in pieces]
            own = hashes(seeds[:, 0], 1 + len(pieces))[:, 1:]
            together = max(1, PIECE // 8 // max(k))
        before = 0
        for i in range(0, len(k), together):
            some = slice(i, i + together)
            if not any(k[some]):
                continue
            index = positions(own[:, some], lengths[some], k[some], device)
            yield before, index.long().add_(spread(torch.tensor([starts[some]], device=device), k[some]))
            before += sum(k[some])
