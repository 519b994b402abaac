"""Random numbers that follow from a seed alone, whatever else is drawn beside them.

Seeds are whole numbers of 64 bits. `hash64` turns one into another (the finalizer of SplitMix64: Steele, Lea and Flood, *Fast
splittable pseudorandom number generators*, OOPSLA 2014), and so gives every tensor, and every piece of it, a seed of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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


def generators(seeds: Sequence[int], device: torch.device) -> list[torch.Generator]:
    """Return a generator for each seed."""
    return [torch.Generator(device).manual_seed(hash64(seed)) for seed in seeds]


def random_bytes(sources: Sequence[torch.Generator], n: int, device: torch.device) -> Tensor:
    """Return `[rows, n]` random bytes; the streams go on in units of eight bytes."""
    words = torch.empty(len(sources), -(-n // 8), dtype=torch.int64, device=device)
    for row, source in zip(words, sources, strict=True):
        row.random_(-(2**63), None, generator=source)
    return words.view(torch.uint8)[:, :n]


def positions(seeds: Sequence[int], n: int, k: int, device: torch.device) -> Tensor:
    r"""Return `k` different places out of `n`, the same on all devices.

    The numbers `0 ... 2^b - 1` are mixed (multiplications by random odd numbers and additions modulo `2^b`, and shifts), and
    the first `k` that come out below `n` taken, rotated by a random number below `n`. So every place is drawn with probability
    `k / n`.

    Example:
        >>> positions([1, 2], 10, 3, torch.device("cpu")).shape
        torch.Size([2, 3])

    Args:
        seeds: one for each row.
        n: places there are, at most `2^30`.
        k: how many are drawn.
        device: where the result is wanted.

    Returns:
        `[rows, k]`, 64-bit integers in no order.
    """
    bits = (n - 1).bit_length()
    size, mask, shift = 1 << bits, (1 << bits) - 1, max(1, (bits + 1) // 2)
    keys = torch.tensor([[hash64(seed, i) & mask for i in range(8)] for seed in seeds], dtype=torch.int32, device=device)
    turn = torch.tensor([[hash64(seed, 8) % n] for seed in seeds], device=device)
    needed = k * size / n  # in the mean
    for length in (int(needed + 6 * needed**0.5 + 8) if n < size else k, size):
        # Products overflow, which leaves their lower bits right.
        x = torch.arange(min(length, size), dtype=torch.int32, device=device).expand(len(seeds), -1)
        for i in range(0, 8, 2):
            x = (x * (keys[:, i : i + 1] | 1)).add_(keys[:, i + 1 : i + 2]).bitwise_and_(mask)
            x ^= x >> shift
        if n == size:
            return (x + turn) % n
        inside = x < n
        count = inside.cumsum(1)
        if bool((count[:, -1] >= k).all()):
            break
    return (x[inside & (count <= k)].view(len(seeds), k) + turn) % n
