"""Dynamic pruning with feedback."""

from __future__ import annotations

from torch import Tensor

from lightning_distopt.sparsity.method import Layers, PruningMethod
from lightning_distopt.sparsity.selection import Distribution, check_filters, largest


class DPF(PruningMethod):
    r"""Prune by magnitude, and apply the gradient at the pruned weights to the dense ones.

    $$ x_{t+1} = x_t - \gamma_t \, g(m_t \odot x_t), \qquad m_t = \text{the largest } |x_t| \text{ every } p \text{ steps} $$

    The gradient is not masked: weights that are pruned go on learning, and come back, with the value that they have reached
    by then, once they are large enough. In terms of the pruning error `e_t = m_t x_t - x_t` this is error feedback,
    `x_{t+1} = x_t - gamma g(x_t + e_t)`. The optimizer is the user's, whatever it is, and sees the dense weights; so does
    weight decay.

    As printed, algorithm 16 applies the mask in its update steps alone; this is the corrected form, which the equation states.

    Example:
        >>> DPF(filters=True)
        DPF(distribution='global', filters=True, limit=True)

    Args:
        distribution: "global" compares magnitudes over all layers, as the thesis does; "layer" prunes the same part of each;
            "erk", for single weights, see `shares`.
        filters: prune whole filters, by their norms; the sparsity is a part of all filters then.
        limit: whether the gradient of a filter that has no weights left is held down to the median norm in its layer. It
            matters in front of batch norm, which makes that gradient hundreds of times too large: filters come back huge, and
            others go. False is the equation as it stands. None: where whole filters are pruned, of which the thesis does not
            say how they are treated.

    Raises:
        ValueError: for a distribution that there is not, or that whole filters can't have.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, chapter 6, algorithm 16.
    """

    pruned = "learn"

    def __init__(self, distribution: Distribution | None = None, filters: bool = False, limit: bool | None = None) -> None:
        super().__init__(distribution)
        check_filters(self.distribution, filters)
        self.filters = filters
        self.limit = filters if limit is None else limit

    def update(self, layers: Layers) -> list[Tensor]:
        """Keep the largest of the dense weights."""
        return largest(layers.weights, layers.sparsity, self.distribution, self.filters)
