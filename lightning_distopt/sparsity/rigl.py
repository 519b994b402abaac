"""Rigging the lottery."""

from __future__ import annotations

from torch import Tensor

from lightning_distopt.options import check_part
from lightning_distopt.sparsity.method import Layers, PruningMethod
from lightning_distopt.sparsity.regrowth import alive_counts, cosine, drop, grow, random_masks
from lightning_distopt.sparsity.selection import Distribution, rounded


class RigL(PruningMethod):
    r"""Every 100 steps, prune the smallest weights and let those grow that the gradient pulls at most.

    Masks are random at first. At step `t` each layer loses the part

    $$ f(t) = \frac{\alpha}{2} \Big( 1 + \cos \frac{t \pi}{T_\text{end}} \Big) $$

    of its weights, the smallest; then as many of its pruned weights come back, those with the largest gradients. Masks stay
    as they are after `T_end`, which is 75 % of training.

    What differs from the paper: there an update of the masks takes the place of an optimizer step, here it follows one, with
    the gradients of its batch. A weight that is pruned and grows in the same update stays as it is, as in the authors' code.

    Example:
        >>> import torch
        >>> weights, masks = [torch.tensor([3.0, 1.0, 0.0, 0.0])], [torch.tensor([1.0, 1.0, 0.0, 0.0])]
        >>> gradients = [torch.tensor([0.0, 0.1, -0.2, 0.1])]
        >>> RigL(drop=0.5).update(Layers(weights, masks, 0.5, step=1, total=100, gradients=gradients))
        [tensor([1., 0., 1., 0.])]

    Args:
        drop: `alpha`, the part of the weights that is replaced at first, between 0 and 1.
        until: `T_end` as a part of training, between 0 and 1.
        distribution: "erk", or "layer" for the same sparsity everywhere.

    Raises:
        ValueError: if `drop` or `until` is not between 0 and 1.

    Reference: Evci, Gale, Menick, Castro, Elsen: Rigging the lottery: making all tickets winners. ICML 2020, algorithm 1.
    """

    ramp = False
    period = 100
    distributions = ("erk", "layer")
    needs = ("gradients",)

    def __init__(self, drop: float = 0.3, until: float = 0.75, distribution: Distribution | None = None) -> None:
        super().__init__(distribution)
        self.drop = check_part("drop", drop)
        self.until = check_part("until", until)

    def check(self, total: float) -> None:
        """Raise an error if training has no known length."""
        self._known(total)

    def due(self, step: int, total: int, period: int) -> bool:
        """Every `period` steps until `T_end`."""
        return step % period == 0 and step < self.until * total

    def update(self, layers: Layers) -> list[Tensor]:
        """Prune and grow.

        Raises:
            ValueError: if there are no gradients.
        """
        if layers.dense:
            return random_masks(layers, self.distribution)
        if not layers.gradients:
            raise ValueError("RigL looks at the gradients of the step before: record them, see `Pruner.record`.")
        # f(t) = alpha/2 (1 + cos(t pi / T_end))
        f = cosine(layers.step, self.until * layers.total, self.drop)
        masks = []
        for w, mask, gradient, alive in zip(
            layers.weights, layers.masks, layers.gradients, alive_counts(layers.masks), strict=True
        ):
            count = rounded(f * alive)
            pull = gradient.abs().nan_to_num(0.0, 0.0, 0.0)  # mixed precision skips steps whose gradients overflow
            masks.append(grow(drop(mask, w.abs(), count), pull, count))
        return masks
