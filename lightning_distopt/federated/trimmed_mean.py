"""TrimmedMean: a server that leaves out the extremes."""

from __future__ import annotations

import math
import warnings
from typing import Any

from torch import Tensor

from lightning_distopt.federated.coordinate_wise import CoordinateWise
from lightning_distopt.options import is_number


class TrimmedMean(CoordinateWise):
    r"""Average the clients' models, without the smallest and the largest values of each coordinate.

    $$ x_t[i] = \frac{1}{m - 2b} \sum_{j=b+1}^{m-b} \hat x^{(j)}_t[i], \qquad m = |S_t|, \quad b = \lfloor \beta m \rfloor $$

    where `(j)` orders the clients by their values of coordinate `i`. Clients weigh the same, as in the paper, whatever
    the strategy's `weighting`. The paper takes `beta m` for a whole number, and the means of gradients, which is the same
    where clients make a single step. Floating-point buffers go the same way.

    Each rank keeps the models of the clients that it trains in a round.

    Example:
        >>> import torch
        >>> TrimmedMean(0.25).reduce(torch.tensor([[1.0, -2.0], [2.0, 0.0], [3.0, 1.0], [90.0, 1e9]]))
        tensor([2.5000, 0.5000])

    Args:
        fraction: `beta`, the share of the values that is left out at either end: at least 0, which is FedAvg with
            `weighting="uniform"`, and below 1/2. It should be no less than the share of clients that may be bad. One below
            `1 / m` leaves out nothing, which is warned about.

    Raises:
        ValueError: for a fraction outside of that range.

    Reference: Yin, Chen, Ramchandran, Bartlett: Byzantine-robust distributed learning: towards optimal statistical rates.
    ICML 2018, definition 2 and algorithm 1 (option II).
    """

    def __init__(self, fraction: float = 0.1) -> None:
        if not (is_number(fraction) and 0 <= fraction < 0.5):
            raise ValueError(
                f"`fraction`, the share of values that is left out at either end, must be at least 0 and below 0.5; got "
                f"{fraction!r}."
            )
        self.fraction = float(fraction)

    def setup(self, server: Any) -> None:
        """Bind to a server, and warn where nothing is left out."""
        super().setup(server)
        m = server.count
        if self.fraction > 0 and self._left_out(m) == 0 and server.communicator.rank == 0:
            cure = f"take at least `TrimmedMean(1 / {m})`, or more clients" if m > 2 else "take at least 3 clients"
            warnings.warn(
                f"{self!r} leaves out nobody of the {m} clients of a round, so that a bad one reaches the model: {cure}.",
                stacklevel=2,
            )

    def _left_out(self, m: int) -> int:
        """Return `b`, how many of `m` values are left out at either end."""
        return math.floor(self.fraction * m + 1e-9)  # 0.29 * 100 is below 29

    def reduce(self, ordered: Tensor) -> Tensor:
        """Return the mean of each column without its ends."""
        m = len(ordered)
        b = self._left_out(m)
        total = ordered[b].clone()
        for values in ordered[b + 1 : m - b]:  # in this order, however many columns there are
            total += values
        return total.div_(m - 2 * b)
