"""MimeLite: clients that take the server's momentum along, and leave it as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_distopt.federated.aggregator import Aggregator, Client, Vector
from lightning_distopt.federated.checks import check_plain_sgd
from lightning_distopt.options import check_factor


class MimeLite(Aggregator):
    r"""Give clients a momentum of the server's, made of full gradients, that does not change while they train.

    $$ y_k \leftarrow y_k - \eta \, \big( (1 - \beta) \, g_k(y_k) + \beta s \big), \qquad
       x \leftarrow \sum_{k \in S_t} p_k \, y_k, \qquad
       s \leftarrow (1 - \beta) \sum_{k \in S_t} p_k \, \nabla f_k(x_{\text{sent}}) + \beta s $$

    from `s = 0`. Means over clients follow the strategy's `weighting`; "uniform" is the paper's. The optimizer is SGD without
    momentum; learning rate and schedule are its own, and so is weight decay, which enters apart from the momentum. The momentum
    enters after clipping. Full gradients cost another pass over a client's data in every round.

    The thesis prints the loop over clients twice, and the last formula with `s` as an argument of the loss; this is the form
    of the paper.

    Example:
        >>> MimeLite()
        MimeLite(beta=0.9)

    Args:
        beta: momentum, at least 0 and below 1; 0 is FedAvg.

    Memory: the momentum, and the sum of gradients.

    Raises:
        ValueError: for `beta` outside of [0, 1); when fitting starts, for an optimizer that is not SGD without momentum.

    Reference: Karimireddy, Jaggi, Kale, Mohri, Reddi, Stich, Suresh: Breaking the centralized barrier for cross-device
    federated learning. NeurIPS 2021. T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*,
    algorithm 21.
    """

    kept = ("s",)

    def __init__(self, beta: float = 0.9) -> None:
        self.beta = check_factor("beta", beta)
        self.transforms_gradients = self.needs_full_gradient = self.beta > 0
        self.vectors_up = self.vectors_down = 2 if self.beta > 0 else 1

    def check_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Refuse all but SGD without momentum."""
        check_plain_sgd(optimizers, "MimeLite puts its own momentum into the steps of SGD", "FedAvg")

    def setup(self, server: Any) -> None:
        """Start without momentum."""
        super().setup(server)
        self._s = [torch.zeros_like(x) for x in server.model]

    def begin_round(self) -> None:
        """Start to sum up gradients, and the shares of those who send them."""
        self.sums["gradient"] = tuple(torch.zeros_like(s) for s in self._s)
        self.sums["share"] = (self._s[0].new_zeros(1),)

    def transform_gradients(self, client: Client) -> None:
        """Mix in the momentum."""
        for g, s in zip(client.gradients, self._s, strict=True):
            g.mul_(1 - self.beta).add_(s, alpha=self.beta)  # g <- (1 - beta) g + beta s

    def end_client(self, client: Client) -> None:
        """Send the full gradient."""
        for total, g in zip(self.sums["gradient"], client.full_gradient, strict=False):  # none at beta = 0
            total.add_(g, alpha=client.share)
        self.sums["share"][0].add_(client.share)

    def finish_round(self, average: Vector) -> None:
        """Let the momentum follow the gradients."""
        super().finish_round(average)
        share = self.sums["share"][0].item()  # 1, unless clients have dropped out
        for s, total in zip(self._s, self.sums["gradient"], strict=True):
            # s <- (1 - beta) sum_k p_k grad f_k(x) + beta s
            s.mul_(self.beta).add_(total, alpha=(1 - self.beta) / share)
