"""Sparse evolutionary training."""

from __future__ import annotations

from torch import Tensor

from lightning_distopt.options import check_part
from lightning_distopt.sparsity.method import Layers, PruningMethod
from lightning_distopt.sparsity.regrowth import drop, grow, random_masks, random_scores
from lightning_distopt.sparsity.selection import Distribution, rounded


class SET(PruningMethod):
    r"""Each epoch, prune the weights closest to zero and let as many others of the same layer grow at random.

    Masks are random at first. At each update a layer loses a part `zeta` of its positive weights, the smallest, and the same
    part of its negative ones, the largest; then as many of its pruned weights, chosen uniformly, come back. So every layer
    keeps its number of weights.

    What differs from the paper: weights that come back start from zero, not from a small random value. Zero counts as positive.
    There is no update at the very end, where the paper prunes without growth, so the sparsity stays what it is. Layers get
    sparse by ERK, which is the paper's Erdős-Rényi rule for matrices, with kernel sizes in it.

    Example:
        >>> import torch
        >>> weights, masks = [torch.tensor([[3.0, -2.0, 1.0, -4.0, 9.0]])], [torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0]])]
        >>> SET(drop=0.5).update(Layers(weights, masks, sparsity=0.2, step=1))[0].sum()
        tensor(4.)

    Args:
        drop: `zeta`, between 0 and 1.
        distribution: "erk", or "layer" for the same sparsity everywhere.

    Raises:
        ValueError: if `drop` is not between 0 and 1.

    Reference: Mocanu, Mocanu, Stone, Nguyen, Gibescu, Liotta: Scalable training of artificial neural networks with adaptive
    sparse connectivity inspired by network science. Nature Communications 2018, algorithm 1.
    """

    ramp = False
    period = "epoch"
    distributions = ("erk", "layer")

    def __init__(self, drop: float = 0.3, distribution: Distribution | None = None) -> None:
        super().__init__(distribution)
        self.drop = check_part("drop", drop)

    def update(self, layers: Layers) -> list[Tensor]:
        """Prune and grow."""
        if layers.dense:
            return random_masks(layers, self.distribution)
        masks = []
        for w, old, chance in zip(layers.weights, layers.masks, random_scores(layers), strict=True):
            mask = old
            for side in (w >= 0, w < 0):
                alive = side & (old != 0)
                kept = drop(alive.to(w.dtype), w.abs(), rounded(self.drop * int(alive.sum())))
                mask = mask.where(~alive, kept)
            masks.append(grow(mask, chance, int(old.count_nonzero() - mask.count_nonzero())))
        return masks
