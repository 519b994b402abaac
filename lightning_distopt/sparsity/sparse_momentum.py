"""Sparse momentum."""

from __future__ import annotations

from torch import Tensor

from lightning_distopt.options import check_part
from lightning_distopt.sparsity.method import Layers, PruningMethod
from lightning_distopt.sparsity.regrowth import alive_counts, cosine, drop, grow, random_masks, shared_out
from lightning_distopt.sparsity.selection import Distribution, rounded


class SparseMomentum(PruningMethod):
    r"""Each epoch, prune the smallest weights of each layer and let others grow where the momentum is largest.

    Masks are random at first, equally sparse everywhere. At each update layer `l` loses a part `p_l = min(p, s_l)` of its
    weights, the smallest, where `s_l` is its sparsity and `p` falls to zero along a cosine. As many weights as all layers have
    lost come back: layers get them in proportion to the mean momentum of their weights,

    $$ \operatorname{mean} \{ |M_{l,i}| : m_{l,i} = 1 \}, $$

    and in each of them the pruned weights with the largest `|M|` are chosen. What a layer has no room for goes to the others
    in equal parts. So the number of weights stays the same in all.

    `M` is the optimizer's: the momentum of SGD, or Adam's mean of the gradients (the authors' code divides that by the root of
    the mean square). Gradients reach the momentum of pruned weights, whose values are zero after every step. Replicas take the
    masks that replica 0 computes from its momentum.

    Example:
        >>> import torch
        >>> weights, masks = [torch.tensor([3.0, 1.0, 0.0, 0.0])], [torch.tensor([1.0, 1.0, 0.0, 0.0])]
        >>> moments = [torch.tensor([0.0, 0.1, -0.2, 0.1])]
        >>> SparseMomentum(drop=0.5).update(Layers(weights, masks, 0.5, step=1, total=100, moments=moments))
        [tensor([1., 0., 1., 0.])]

    Args:
        drop: `p` at first, between 0 and 1.
        distribution: of the first masks: "layer", or "erk".

    Raises:
        ValueError: if `drop` is not between 0 and 1.

    Reference: Dettmers, Zettlemoyer: Sparse networks from scratch: faster training without losing performance. 2019,
    algorithm 1.
    """

    ramp = False
    period = "epoch"
    distributions = ("layer", "erk")
    pruned = "zero"
    needs = ("moments",)

    def __init__(self, drop: float = 0.5, distribution: Distribution | None = None) -> None:
        super().__init__(distribution)
        self.drop = check_part("drop", drop)

    def check(self, total: float) -> None:
        """Raise an error if training has no known length."""
        self._known(total)

    def update(self, layers: Layers) -> list[Tensor]:
        """Prune, redistribute and grow.

        Raises:
            ValueError: if there is no momentum.
        """
        if layers.dense:
            return random_masks(layers, self.distribution)
        if not layers.moments:
            raise ValueError("SparseMomentum looks at the optimizer's momentum: pass it as `moments`.")
        p = cosine(layers.step, layers.total, self.drop)
        pull = [m.abs() for m in layers.moments]
        # mean |M_l| over the weights that are alive
        parts = [float(m[mask != 0].mean()) if mask.any() else 0.0 for m, mask in zip(pull, layers.masks, strict=True)]
        kept, lost = [], 0
        for w, mask, alive in zip(layers.weights, layers.masks, alive_counts(layers.masks), strict=True):
            # p_l = min(p, s_l)
            count = rounded(min(p, 1 - alive / mask.numel()) * alive)
            kept.append(drop(mask, w.abs(), count))
            lost += count
        counts = shared_out(parts, kept, lost)
        return [grow(mask, scores, count) for mask, scores, count in zip(kept, pull, counts, strict=True)]
