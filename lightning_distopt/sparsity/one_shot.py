"""Pruning once, after dense training."""

from __future__ import annotations

from torch import Tensor

from lightning_distopt.options import check_part
from lightning_distopt.sparsity.method import Layers, PruningMethod
from lightning_distopt.sparsity.selection import Distribution, largest, rounded


class OneShot(PruningMethod):
    r"""Train densely, prune by magnitude once, and fine-tune what is left.

    $$ x_{t+1} = x_t - \gamma_t \, g(x_t) \;\; (t < T_0), \qquad m = \text{the largest } |x_{T_0}|, \qquad
       x_{t+1} = x_t - \gamma_t \, m \odot g(m \odot x_t) \;\; (t \ge T_0) $$

    Han et al. prune each layer at its own threshold, which they choose by hand; this is one threshold for all, as in the
    thesis, unless `distribution` says otherwise. The optimizer and its learning rate go on as they are.

    Example:
        >>> OneShot(at=0.5).due(step=50, total=100, period=1)
        True

    Args:
        at: the part of training after which weights are pruned, `T_0 / T`, between 0 and 1.
        distribution: "global", "layer" or "erk", see `largest`.

    Raises:
        ValueError: if `at` is not between 0 and 1.

    Reference: Han, Pool, Tran, Dally: Learning both weights and connections for efficient neural networks. NeurIPS 2015.
    """

    ramp = False
    period = None

    def __init__(self, at: float = 0.8, distribution: Distribution | None = None) -> None:
        super().__init__(distribution)
        self.at = check_part("at", at)

    def check(self, total: float) -> None:
        """Raise an error if training has no known length, or no step before and after."""
        self._known(total, least=2)

    def steps(self, total: int) -> list[int]:
        """Once."""
        return [min(total - 1, max(1, rounded(self.at * total)))]

    def update(self, layers: Layers) -> list[Tensor]:
        """Keep the largest weights."""
        return largest(layers.weights, layers.sparsity, self.distribution)
