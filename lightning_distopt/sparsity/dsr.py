"""Dynamic sparse reparameterization."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_distopt.options import check_part, check_positive
from lightning_distopt.sparsity.method import Layers, PruningMethod
from lightning_distopt.sparsity.regrowth import alive_counts, grow, random_masks, random_scores, shared_out
from lightning_distopt.sparsity.selection import Distribution


class DSR(PruningMethod):
    r"""Prune what is below one threshold for all layers, and let as many weights grow at random where most are left.

    Masks are random at first, equally sparse everywhere. At each update weights with `|x| < H` are pruned, `K` of them in all,
    so that layer `l` is left with `L_l`. As many come back, chosen at random,

    $$ \frac{L_l}{\sum_j L_j} K \;\text{ of them in layer } l, \qquad
       H \leftarrow \begin{cases} 2 H & K < (1 - \delta) N_p \\ H / 2 & K > (1 + \delta) N_p \\ H & \text{else} \end{cases} $$

    What a layer has no room for goes to the others in equal parts. So the number of weights stays the same in all.

    What differs from the paper: `N_p` is a part of all weights rather than a number, the defaults are those of the authors'
    code, and the period, which the paper lets grow with training, is constant.

    Example:
        >>> import torch
        >>> dsr = DSR(threshold=0.5, drop=0.25)
        >>> weights, masks = [torch.tensor([3.0, 0.1, 0.0, 0.0])], [torch.tensor([1.0, 1.0, 0.0, 0.0])]
        >>> dsr.update(Layers(weights, masks, sparsity=0.5, step=1))[0].sum(), dsr.state_dict()
        (tensor(2.), {'threshold': 0.5})

    Args:
        drop: `N_p` as a part of all weights, between 0 and 1.
        threshold: `H` at first, above 0.
        tolerance: `delta`, between 0 and 1.
        distribution: of the first masks: "layer", or "erk".

    Raises:
        ValueError: for options out of range.

    Reference: Mostafa, Wang: Parameter efficient training of deep convolutional neural networks by dynamic sparse
    reparameterization. ICML 2019, algorithm 1.
    """

    ramp = False
    period = 100
    distributions = ("layer", "erk")

    def __init__(
        self,
        drop: float = 0.01,
        threshold: float = 0.001,
        tolerance: float = 0.1,
        distribution: Distribution | None = None,
    ) -> None:
        super().__init__(distribution)
        self.drop = check_part("drop", drop)
        self.tolerance = check_part("tolerance", tolerance)
        self.threshold = check_positive("threshold", threshold)
        self._now = self.threshold

    def update(self, layers: Layers) -> list[Tensor]:
        """Prune, redistribute and grow."""
        if layers.dense:
            self._now = self.threshold
            return random_masks(layers, self.distribution)
        kept = [mask * (w.abs() >= self._now) for w, mask in zip(layers.weights, layers.masks, strict=True)]
        left = alive_counts(kept)
        lost = sum(alive_counts(layers.masks)) - sum(left)
        wanted = self.drop * sum(w.numel() for w in layers.weights)
        # H <- 2 H if K < (1 - delta) N_p, H / 2 if K > (1 + delta) N_p
        if lost < (1 - self.tolerance) * wanted:
            self._now *= 2
        elif lost > (1 + self.tolerance) * wanted:
            self._now /= 2
        counts = shared_out(left, kept, lost)
        chance = random_scores(layers)
        return [grow(mask, scores, count) for mask, scores, count in zip(kept, chance, counts, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Return the threshold."""
        return {"threshold": self._now}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with its threshold."""
        self._now = float(state["threshold"])
