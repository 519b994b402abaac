"""Soft filter pruning."""

from __future__ import annotations

from torch import Tensor

from lightning_distopt.sparsity.method import Layers, PruningMethod
from lightning_distopt.sparsity.selection import largest


class SoftFilterPruning(PruningMethod):
    r"""At the end of each epoch set the filters of each layer with the smallest norms to zero, and train all of them on.

    $$ x \leftarrow m \odot x, \qquad m_f = [\, \| x_f \| \text{ is among the largest of its layer} \,], \qquad
       x_{t+1} = x_t - \gamma_t \, g(x_t) \text{ until the next epoch ends} $$

    Pruned filters start from zero and take part in the network until masks are due again, so it is sparse at the ends of epochs
    only, and at the end of training. The same part of the filters of each layer is pruned, `round(s N)` in all, where the paper
    rounds down in each. What comes after a pruned filter, its bias or the shift of its batch norm, is left as it is.

    Example:
        >>> import torch
        >>> weights = [torch.tensor([[3.0, 4.0], [1.0, 1.0]])]
        >>> SoftFilterPruning().update(Layers(weights, [torch.ones(2, 2)], sparsity=0.5))
        [tensor([[1., 1.],
                 [0., 0.]])]

    Reference: He, Kang, Dong, Fu, Yang: Soft filter pruning for accelerating deep convolutional neural networks. IJCAI 2018,
    algorithm 1.
    """

    pruned = "train"
    filters = True
    ramp = False
    period = "epoch"
    distributions = ("layer",)

    def __init__(self) -> None:
        super().__init__()

    def due(self, step: int, total: int, period: int) -> bool:
        """After every `period` steps, and at the end."""
        return step > 0 and (step % period == 0 or step == total)

    def update(self, layers: Layers) -> list[Tensor]:
        """Keep the filters with the largest norms."""
        return largest(layers.weights, layers.sparsity, self.distribution, self.filters)
