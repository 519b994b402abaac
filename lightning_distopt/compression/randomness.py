"""Random numbers that follow from a seed alone, whatever else is drawn beside them.

Seeds are whole numbers of 64 bits. `hash64` turns one into another (the finalizer of SplitMix64: Steele, Lea and Flood, *Fast
splittable pseudorandom number generators*, OOPSLA 2014), and so gives every tensor, and every piece of it, a seed of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_distopt.compression.vectors import spread

MASK = 2**64 - 1


def hash64(seed: int, number: int = 0) -> int:
    """Return the seed of part `number` of what has this seed.

    Example:
        >>> len({hash64(seed, number) for seed in range(100) for number in range(100)})
        10000
    """
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def hashes(seeds: np.ndarray, count: int) -> np.ndarray:
    """Return the seeds of parts `0 ... count - 1` of what has these seeds, `[..., count]`.

    Example:
        >>> hashes(np.array([7], dtype=np.uint64), 2).tolist() == [[hash64(7, 0), hash64(7, 1)]]
        True
    """
    z = seeds[..., None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def generators(seeds: Sequence[int], device: torch.device) -> list[torch.Generator]:
    """Return a generator for each seed."""
    return [torch.Generator(device).manual_seed(hash64(seed)) for seed in seeds]


def random_bytes(sources: Sequence[torch.Generator], n: int, device: torch.device) -> Tensor:
    """Return `[rows, n]` random bytes; the streams go on in units of eight bytes."""
    words = torch.empty(len(sources), -(-n // 8), dtype=torch.int64, device=device)
    for row, source in zip(words, sources, strict=True):
        row.random_(-(2**63), None, generator=source)
    return words.view(torch.uint8)[:, :n]


def positions(seeds: np.ndarray, n: Sequence[int], k: Sequence[int], device: torch.device) -> Tensor:
    r"""Return `k[i]` different places out of `n[i]` for each vector `i`, the same on all devices.

    The numbers `0 ... 2^b - 1` are mixed (multiplications by random odd numbers and additions modulo `2^b`, and shifts), and
    the first `k` that come out below `n` taken, rotated by a random number below `n`. So every place is drawn with probability
    `k / n`.

    Example:
        >>> positions(np.array([[1], [2]], dtype=np.uint64), [10], [3], torch.device("cpu")).shape
        torch.Size([2, 3])

    Args:
        seeds: `[rows, vectors]`, 64 bits without sign.
        n: the places there are in each vector, at most `2^30`.
        k: how many are drawn.
        device: where the result is wanted.

    Returns:
        `[rows, sum(k)]`, 32-bit integers: those of the first vector, in no order, then those of the next.
    """
    sizes = [1 << (places - 1).bit_length() for places in n]
    needed = [a * size / b for a, b, size in zip(k, n, sizes, strict=True)]  # in the mean
    enough = [min(int(a + 6 * a**0.5 + 8), size) for a, size in zip(needed, sizes, strict=True)]
    hashed = hashes(seeds, 9)
    masks, places = (np.array(numbers, dtype=np.uint64) for numbers in ([size - 1 for size in sizes], n))
    keys = torch.from_numpy((hashed[:, :, :8] & masks[:, None]).astype(np.int32)).to(device)
    turn = torch.from_numpy((hashed[:, :, 8] % places).astype(np.int32)).to(device)

    def each(numbers: Sequence[int], times: Sequence[int]) -> Tensor | int:
        return spread(torch.tensor([numbers], dtype=torch.int32, device=device), times) if len(n) > 1 else numbers[0]

    for lengths in (k if sizes == list(n) else enough, sizes):
        *starts, total = itertools.accumulate(lengths, initial=0)
        x = torch.arange(total, dtype=torch.int32, device=device)
        if len(n) > 1:
            x = x - each(starts, lengths)
        mask = each([size - 1 for size in sizes], lengths)
        shift = each([size.bit_length() // 2 or 1 for size in sizes], lengths)
        for i in range(0, 8, 2):  # products overflow, which leaves their lower bits right
            x = (x * spread(keys[:, :, i] | 1, lengths)).add_(spread(keys[:, :, i + 1], lengths)).bitwise_and_(mask)
            x ^= x >> shift
        if sizes == list(n):
            break
        inside = x < each(n, lengths)
        count = inside.cumsum(1)
        ends = count[:, [end - 1 for end in itertools.accumulate(lengths)]]
        wanted = torch.nn.functional.pad(ends[:, :-1], (1, 0)) + torch.tensor(k, device=device)
        if bool((wanted <= ends).all()):
            x = x.masked_select(inside & (count <= spread(wanted, lengths))).view(len(seeds), -1)
            break
    end = each(n, k)
    x = (x + spread(turn, k)).sub_(end)
    return x.add_((x >> 31).bitwise_and_(end))  # back by n where that made it negative: far faster than a remainder
