"""What methods have in common that keep the number of weights and change which they are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_distopt.sparsity.method import Layers
from lightning_distopt.sparsity.selection import Distribution, allot, largest, smallest


def cosine(step: int, end: float, start: float) -> float:
    r"""Return the value of a cosine that falls from `start` at step 0 to zero at step `end`.

    $$ \frac{\alpha}{2} \Big( 1 + \cos \frac{t \pi}{T_\text{end}} \Big) $$

    Example:
        >>> round(cosine(50, 100, 0.3), 6)
        0.15
    """
    # alpha / 2 (1 + cos(t pi / T_end))
    return start / 2 * (1 + math.cos(min(step, end) * math.pi / end))


def random_scores(layers: Layers) -> list[Tensor]:
    """Return a random number for each weight, uniform in [0, 1) and the same on all ranks."""
    return [torch.rand(w.shape, generator=layers.generator, dtype=torch.float32).to(w.device) for w in layers.weights]


def random_masks(layers: Layers, distribution: Distribution) -> list[Tensor]:
    """Return masks of the sparsity that is wanted, by chance.

    Example:
        >>> weights = [torch.ones(4, 4), torch.ones(2, 2)]
        >>> [int(m.sum()) for m in random_masks(Layers(weights, weights, sparsity=0.75), "layer")]
        [4, 1]
    """
    chosen = largest(random_scores(layers), layers.sparsity, distribution)
    return [mask.to(w.dtype) for mask, w in zip(chosen, layers.weights, strict=True)]


def drop(mask: Tensor, scores: Tensor, count: int) -> Tensor:
    """Return the mask without the `count` weights that have the smallest scores among those that are alive.

    Example:
        >>> drop(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([3.0, 1.0, 2.0]), 1)
        tensor([1., 0., 0.])
    """
    alive, new = mask != 0, mask.clone()
    new[alive] = smallest([scores[alive]], count)[0].to(new.dtype)
    return new


def grow(mask: Tensor, scores: Tensor, count: int) -> Tensor:
    """Return the mask with `count` more weights, those with the largest scores among the pruned ones.

    Example:
        >>> grow(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([3.0, 1.0, 2.0]), 1)
        tensor([1., 0., 1.])
    """
    pruned, new = mask == 0, mask.clone()
    candidates = scores[pruned]
    new[pruned] = smallest([candidates], candidates.numel() - count)[0].to(new.dtype)
    return new


def alive_counts(masks: Sequence[Tensor]) -> list[int]:
    """Return how many weights each layer has that are not pruned."""
    return [int(mask.count_nonzero()) for mask in masks]


def shared_out(parts: Sequence[float], masks: Sequence[Tensor], total: int) -> list[int]:
    """Divide `total` weights that come back among layers, in proportion to `parts`.

    What a layer has no room for is divided equally among those that have.

    Example:
        >>> shared_out([3, 1, 0], [torch.zeros(4), torch.zeros(8), torch.zeros(8)], total=8)
        [4, 3, 1]

    Args:
        parts: of the layers; all the same if they are all zero.
        masks: zeros are room.
        total: weights in all.
    """
    room = [mask.numel() - alive for mask, alive in zip(masks, alive_counts(masks), strict=True)]
    whole = math.fsum(parts)
    wanted = [total * part / whole if whole > 0 else total / len(parts) for part in parts]
    while True:
        excess = math.fsum(max(0.0, w - r) for w, r in zip(wanted, room, strict=True))
        free = [w < r for w, r in zip(wanted, room, strict=True)]
        if excess <= 1e-9 or not any(free):
            return allot(wanted, room, total)
        each = excess / sum(free)
        wanted = [w + each if f else float(r) for w, r, f in zip(wanted, room, free, strict=True)]
