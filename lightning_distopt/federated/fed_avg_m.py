"""FedAvgM: a server with momentum."""

from __future__ import annotations

from typing import Any

import torch

from lightning_distopt.federated.aggregator import Aggregator, Vector
from lightning_distopt.options import check_factor


class FedAvgM(Aggregator):
    r"""FedAvg, with momentum for the server's steps.

    $$ v_t = \beta v_{t-1} + \Big( x_{t-1} - \sum_{k \in S_t} p_k \, \hat x^k_t \Big), \qquad x_t = x_{t-1} - v_t $$

    A client's update is what was sent minus what comes back, so that `x - v` goes to where the clients are; the thesis leaves
    the sign open (section 17.3.2). As `x_t = average - beta v_{t-1}` it has no rounding error at `beta = 0`.

    Example:
        >>> FedAvgM(beta=0.3)
        FedAvgM(beta=0.3)

    Args:
        beta: momentum, at least 0 and below 1; 0 is FedAvg. The thesis tries 0.1, 0.2, 0.3 and 0.4.

    Memory: the momentum.

    Raises:
        ValueError: for `beta` outside of [0, 1).

    Reference: Hsu, Qi, Brown: Measuring the effects of non-identical data distribution for federated visual classification.
    2019. T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, chapter 17.
    """

    kept = ("v",)

    def __init__(self, beta: float = 0.9) -> None:
        self.beta = check_factor("beta", beta)

    def setup(self, server: Any) -> None:
        """Start without momentum."""
        super().setup(server)
        self._v = [torch.zeros_like(x) for x in server.model]

    def finish_round(self, average: Vector) -> None:
        """Make a step with momentum."""
        for x, v, mean in zip(self.server.model, self._v, average, strict=True):
            update = x - mean
            # x_t = x_{t-1} - v_t = average - beta v_{t-1}
            x.copy_(mean).sub_(v, alpha=self.beta)
            # v_t = beta v_{t-1} + (x_{t-1} - average)
            v.mul_(self.beta).add_(update)
