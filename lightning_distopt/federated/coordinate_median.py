"""CoordinateMedian: a server that some bad clients can't mislead."""

from __future__ import annotations

from torch import Tensor

from lightning_distopt.federated.coordinate_wise import CoordinateWise


class CoordinateMedian(CoordinateWise):
    r"""Take the median of the clients' models, coordinate by coordinate.

    $$ x_t[i] = \operatorname{med} \{ \hat x^k_t[i] : k \in S_t \} $$

    The median of an even number of values is the mean of the two in the middle. Clients weigh the same, as in the paper,
    whatever the strategy's `weighting`. The paper takes the median of gradients, which is the same where clients make a
    single step. Floating-point buffers go the same way.

    Each rank keeps the models of the clients that it trains in a round.

    Example:
        >>> import torch
        >>> CoordinateMedian().reduce(torch.tensor([[1.0, -2.0], [2.0, 0.0], [3.0, 1.0], [90.0, 1e9]]))
        tensor([2.5000, 0.5000])

    Reference: Yin, Chen, Ramchandran, Bartlett: Byzantine-robust distributed learning: towards optimal statistical rates.
    ICML 2018, definition 1 and algorithm 1 (option I).
    """

    def reduce(self, ordered: Tensor) -> Tensor:
        """Return the median of each column."""
        n = len(ordered)
        return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
