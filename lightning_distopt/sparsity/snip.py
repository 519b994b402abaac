"""Pruning before training."""

from __future__ import annotations

from torch import Tensor

from lightning_distopt.sparsity.method import Layers, PruningMethod
from lightning_distopt.sparsity.selection import largest


class SNIP(PruningMethod):
    r"""Prune once, before training, the weights whose removal changes the loss of one batch least.

    $$ s = | g(x_0) \odot x_0 |, \qquad m = \text{the largest } s, \qquad x_{t+1} = x_t - \gamma_t \, m \odot g(m \odot x_t) $$

    The sensitivity `s` is the derivative of the loss with respect to a mask of ones. It is measured in the first optimizer
    step, over its batches on all replicas; then training goes back to the initial weights, buffers and learning rate. So one
    step of training is spent, and its batches are not seen again in that epoch. Weights start as the module makes them; the
    paper recommends an initialization with scaled variance, which torch's default for convolutions and linear layers is.

    Example:
        >>> import torch
        >>> ones = [torch.ones(4)]
        >>> gradients, first = [torch.tensor([0.1, -2.0, 3.0, 0.0])], [torch.tensor([9.0, 1.0, 1.0, 9.0])]
        >>> SNIP().update(Layers(ones, ones, sparsity=0.5, step=1, gradients=gradients, first=first))
        [tensor([0., 1., 1., 0.])]

    Args:
        distribution: "global" as in the paper, "layer" or "erk", see `largest`.

    Raises:
        ValueError: for a distribution that there is not.

    Reference: Lee, Ajanthan, Torr: SNIP: single-shot network pruning based on connection sensitivity. ICLR 2019, algorithm 1.
    """

    ramp = False
    period = None
    needs = ("gradients", "first")
    waits = False
    rewind_to = 0

    def steps(self, total: int) -> list[int]:
        """After the first optimizer step, which has made the gradients at the initial weights."""
        return [1]

    def update(self, layers: Layers) -> list[Tensor]:
        """Keep the weights with the largest sensitivity.

        Raises:
            ValueError: if there are no gradients, or they say nothing.
        """
        if not layers.gradients or not layers.first:
            raise ValueError(
                "SNIP looks at the gradients of the first batch and at the weights before it: record both, see `Pruner.record`."
            )
        # s = |g(x_0) * x_0|
        scores = [(g * x.to(g.dtype)).abs() for g, x in zip(layers.gradients, layers.first, strict=True)]
        if not all(s.isfinite().all() for s in scores) or not any(s.any() for s in scores):
            raise ValueError(
                "SNIP can't rank weights, since the gradients of the first batch are all zero or not finite; with fp16 lower "
                "the initial scale of the gradients, or use bf16."
            )
        masks = largest(scores, layers.sparsity, self.distribution)
        return [mask.to(w.dtype) for mask, w in zip(masks, layers.weights, strict=True)]
