"""Pruning more and more weights for good."""

from __future__ import annotations

from torch import Tensor

from lightning_distopt.sparsity.method import Layers, PruningMethod
from lightning_distopt.sparsity.selection import largest


class Incremental(PruningMethod):
    r"""Prune more and more of the smallest weights, which never come back.

    $$ x_{t+1} = x_t - \gamma_t \, m_t \odot g(m_t \odot x_t), \qquad
       m_t = m_{t-1} \odot [\, |x_t| \text{ is among the largest} \,] $$

    The sparsity rises along the cubic schedule. Zhu and Gupta give each layer the same sparsity, and update masks every 100
    to 1000 steps; like the thesis, this compares magnitudes over all layers by default, every 16 steps as in DPF, so that the
    two differ in nothing but the feedback.

    Example:
        >>> import torch
        >>> weights, masks = [torch.tensor([5.0, 1.0, 2.0, 3.0])], [torch.tensor([0.0, 1.0, 1.0, 1.0])]
        >>> Incremental().update(Layers(weights, masks, sparsity=0.5))
        [tensor([0., 0., 1., 1.])]

    Args:
        distribution: "global", "layer" or "erk", see `largest`.

    Raises:
        ValueError: for a distribution that there is not.

    Reference: Zhu, Gupta: To prune, or not to prune: exploring the efficacy of pruning for model compression. 2017.
    """

    def update(self, layers: Layers) -> list[Tensor]:
        """Keep the largest of the weights that are alive."""
        return largest(layers.magnitudes, layers.sparsity, self.distribution)
