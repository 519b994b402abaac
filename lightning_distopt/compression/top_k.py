"""The largest values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_distopt.compression.compressor import VectorCompressor, below, bytes_of, interpolate, values_of
from lightning_distopt.compression.randomness import generators
from lightning_distopt.compression.vectors import PIECE, Segments, Vectors, windows
from lightning_distopt.options import check_choice, check_share

_SAMPLE = 2**14


def kept(ratio: float, d: int) -> int:
    """Return `k = max(1, floor(ratio d))`."""
    return max(1, int(ratio * d))


class TopK(VectorCompressor):
    r"""The `k = max(1, floor(ratio d))` values of largest magnitude, each with its place.

    The same values are sent with either method; of equal magnitudes, those that come first. Values that are not numbers count
    as infinite.

    Example:
        >>> top, x = TopK(0.5), torch.tensor([[1.0, -4.0, 0.5, 2.0]])
        >>> top.decompress(top.compress(x, seeds=[0]), (4,), torch.float32)
        tensor([[ 0., -4.,  0.,  2.]])
        >>> top.bits(1000) == 500 * (32 + 32), top.delta(1000)
        (True, 0.5)

    Args:
        ratio: the share of values that are kept, above 0 and at most 1.
        method: `"sampled"` estimates from 16,384 values which magnitude the k-th largest has, and sorts out the few above a bit
            less than that; should they be too few after all, it starts again without an estimate. `"exact"` selects among all
            values, which takes several times as long for long tensors, and four times their memory.

    Raises:
        ValueError: if an argument is outside its range.

    Reference: S. U. Stich, J.-B. Cordonnier and M. Jaggi, *Sparsified SGD with memory*, NeurIPS 2018. The threshold from a
    sample: Y. Lin et al., *Deep gradient compression*, ICLR 2018.
    """

    fine = False
    sparse = True
    unit = 1

    def __init__(self, ratio: float, method: Literal["exact", "sampled"] = "sampled") -> None:
        check_choice("method", method, ("exact", "sampled"))
        self.ratio, self.method = check_share("ratio", ratio), method

    @property
    def tuned_gamma(self) -> float:  # type: ignore[override]
        """CHOCO's consensus step size (Lin, table 13.1), interpolated."""
        return interpolate({0.01: 0.0375, 0.1: 0.15, 0.5: 0.45}, self.ratio)

    def size(self, d: int, dtype: torch.dtype) -> int:
        """Return four bytes for each place and the bytes of the values."""
        return kept(self.ratio, d) * (4 + dtype.itemsize)

    def delta(self, d: int) -> float:
        """Return `k / d`."""
        return kept(self.ratio, d) / d

    def encode(self, x: Vectors, seeds: Sequence[int], payload: Tensor) -> None:
        """Write the places in what is read, in ascending order, then the values."""
        if x.d >= 2**31:
            raise ValueError(f"`top_k` numbers places by 32 bits, which is too few for {x.d:,} values in one vector.")
        if x.d <= PIECE or self.method == "exact":
            values = x.read(0, x.d)
            vectors = zip(x.segments.places, _magnitudes(values).split(x.segments.lengths, dim=1), strict=True)
            index = torch.cat([place + _largest(part, kept(self.ratio, part.shape[1])) for place, part in vectors], dim=1)
            values = values.gather(1, index)
        else:
            index, values = _select(x, kept(self.ratio, x.d), seeds[0])
        places = 4 * index.shape[1]
        payload[:, :places] = bytes_of(index.to(torch.int32))
        payload[:, places:] = bytes_of(values)

    def entries(self, payload: Tensor, of: Segments, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """Give places and values."""
        k, size = sum(kept(self.ratio, d) for d in of.lengths), dtype.itemsize
        for start, stop in windows(k):
            index = values_of(payload[:, 4 * start : 4 * stop], torch.int32)
            yield index, values_of(payload[:, 4 * k + start * size : 4 * k + stop * size], dtype)


def _largest(magnitudes: Tensor, k: int) -> Tensor:
    """Return the places `[rows, k]` of the `k` largest in `[rows, n]`, ascending; the first ones among equals."""
    least = _kth_largest(magnitudes.clone(), k)
    places = _where(magnitudes >= least)
    if len(places) > k * len(magnitudes):
        above, equal = magnitudes > least, magnitudes == least
        places = _where(above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True))))
    return places.view(-1, k)


def _magnitudes(x: Tensor) -> Tensor:
    magnitudes = x.abs()
    return magnitudes.masked_fill_(magnitudes.isnan(), torch.inf)


def _kth_largest(magnitudes: Tensor, k: int) -> Tensor:
    """Return the k-th largest of each row, `[rows, 1]`; reorders rows. On CPU by NumPy, which takes no memory for it."""
    if magnitudes.device.type != "cpu" or magnitudes.dtype == torch.bfloat16:
        return magnitudes.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    place = magnitudes.shape[1] - k
    magnitudes.numpy().partition(place, axis=1)
    return magnitudes[:, place : place + 1].clone()


class _Candidates:
    """Places and values that may be among the `k` largest, in the order in which they were found; room is taken as used."""

    def __init__(self, k: int, like: Vectors) -> None:
        self.k, self.count = k, 0
        self.places = torch.empty(2 * k + 2 * PIECE, dtype=torch.int32, device=like.device)
        self.values = torch.empty(2 * k + 2 * PIECE, dtype=like.dtype, device=like.device)

    def add(self, places: Tensor, values: Tensor) -> None:
        end = self.count + len(places)
        self.places[self.count : end], self.values[self.count : end] = places, values
        self.count = end

    def prune(self) -> float:
        """Keep the `k` largest, the first ones among equals; returns the least magnitude of them."""
        least = float(_kth_largest(_magnitudes(self.values[None, : self.count]), self.k))
        pieces = list(windows(self.count))
        room = self.k - sum(int((_magnitudes(self.values[a:b]) > least).sum()) for a, b in pieces)
        self.count = 0
        for start, stop in pieces:
            magnitudes = _magnitudes(self.values[start:stop])
            equal = magnitudes == least
            chosen = _where((magnitudes > least) | (equal & (equal.cumsum(0) <= room))) + start
            room -= int(equal.sum())
            self.add(self.places[chosen], self.values[chosen])  # what is overwritten has been looked at
        return least


def _where(mask: Tensor) -> Tensor:
    """Return the places of what is true in `[n]`, or in each row `[rows, n]`; on CPU by NumPy, several times as fast."""
    found = torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.device.type == "cpu" else mask.flatten().nonzero()[:, 0]
    return found if mask.ndim == 1 else found.remainder_(mask.shape[1])


def _select(x: Vectors, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return places and values `[1, k]` of the `k` largest, from one pass over the vector."""
    drawn = torch.randint(x.d, (1, _SAMPLE), device=x.device, generator=generators([seed], x.device)[0])
    expected = k / x.d * _SAMPLE
    rank = int(expected + 4 * expected**0.5 + 4)
    threshold = float(_kth_largest(_magnitudes(x.gather(drawn)), rank)) if rank < _SAMPLE else 0.0
    found = _above(x, k, threshold)
    if found.count < k:
        found = _above(x, k, 0.0)
    found.prune()
    return found.places[None, :k], found.values[None, :k]


def _above(x: Vectors, k: int, threshold: float) -> _Candidates:
    """Return what is at least `threshold`, or, if that is much more than `k`, the larger ones."""
    found = _Candidates(k, x)
    for start, stop in windows(x.d):
        values = x.read(start, stop)[0]
        places = _where(~below(values.abs(), threshold))  # what is no number is not below
        found.add(places + start, values[places])
        if found.count > 2 * k + PIECE:
            threshold = found.prune()
    return found
