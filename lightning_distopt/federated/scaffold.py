"""Scaffold: clients that correct their gradients by what they know of the others'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_distopt.federated.aggregator import Aggregator, Client, Vector
from lightning_distopt.federated.checks import check_plain_sgd
from lightning_distopt.options import check_positive


class Scaffold(Aggregator):
    r"""Let each client correct its gradients by a control variate of its own, and by that of the server.

    $$ y_k \leftarrow y_k - \eta \, ( g_k(y_k) - c_k + c ), \qquad
       c_k^+ = \begin{cases} \nabla f_k(x) & \text{option 1} \\
               c_k - c + \frac{1}{\tau_k \eta} (x - y_k) & \text{option 2} \end{cases} $$

    $$ x \leftarrow x + \eta_g \sum_{k \in S_t} p_k \, (y_k - x), \qquad
       c \leftarrow c + \frac 1 K \sum_{k \in S_t} (c_k^+ - c_k) $$

    All control variates start at zero, and `c` stays the mean of the `c_k` of all `K` clients. In the paper clients weigh the
    same in both sums; here those of `x` follow the strategy's `weighting`, so use "uniform" for the paper's. Gradients are
    corrected after clipping.

    Option 2 takes the mean of a client's gradients from how far it has come, so its steps must be those of SGD without
    momentum; where the learning rate is 0, `c_k` stays what it is. Option 1 takes another pass over the client's data, and any
    optimizer.

    Example:
        >>> Scaffold()
        Scaffold(option=2, server_lr=1.0)

    Args:
        option: how control variates are made, 1 or 2.
        server_lr: `eta_g` of the server, above 0.

    Memory: `c`, its change, and a `c_k` for every client that has taken part.

    Raises:
        ValueError: for options out of range; when fitting starts, in option 2, for an optimizer that is not SGD without
            momentum.

    Reference: Karimireddy, Kale, Mohri, Reddi, Stich, Suresh: SCAFFOLD, stochastic controlled averaging for federated learning.
    ICML 2020, algorithm 1.
    """

    stateful = True
    transforms_gradients = True
    vectors_up = 2
    vectors_down = 2
    kept = ("c",)

    def __init__(self, option: int = 2, server_lr: float = 1.0) -> None:
        if isinstance(option, bool) or option not in (1, 2):
            raise ValueError(
                f"`option` is 1, control variates from all of a client's data, or 2, from its steps; got {option!r}."
            )
        self.option, self.server_lr = option, check_positive("server_lr", server_lr)
        self.needs_full_gradient = option == 1

    def check_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Refuse optimizers whose steps don't tell the gradients."""
        if self.option == 2:
            check_plain_sgd(optimizers, "Scaffold takes gradients from the steps of SGD", "`Scaffold(option=1)`")

    def setup(self, server: Any) -> None:
        """Start with control variates of zero."""
        super().setup(server)
        self._c = [torch.zeros_like(x) for x in server.model]

    def weights(self, shares: Sequence[float], steps: Sequence[int]) -> list[float]:
        """Return `eta_g p_k`."""
        return [self.server_lr * p for p in shares]

    def begin_round(self) -> None:
        """Start with no change of `c`."""
        self.sums["c"] = tuple(torch.zeros_like(c) for c in self._c)

    def begin_client(self, client: Client) -> None:
        """Give a client the control variate that it has left the last time."""
        before = client.state.get("c", [torch.zeros_like(c) for c in self._c])
        client.state["c"] = [c_k.to(c.device) for c_k, c in zip(before, self._c, strict=True)]

    def transform_gradients(self, client: Client) -> None:
        """Correct a gradient."""
        for g, c_k, c in zip(client.gradients, client.state["c"], self._c, strict=True):
            g.sub_(c_k).add_(c)  # g <- g - c_k + c

    def end_client(self, client: Client) -> None:
        """Make the client's next control variate, and send its change."""
        replicas = self.server.replicas
        for b, columns, eta in replicas.parts(replicas.learning_rates()):
            c_k = client.state["c"][b][columns]
            if self.option == 1:
                change = client.full_gradient[b][columns] - c_k
            elif eta:
                # c_k^+ - c_k = (x - y_k) / (tau_k eta) - c
                change = self.server.sent[b][columns] - client.model[b][columns]
                change = change.div_(client.step * eta).sub_(self._c[b][columns])
            else:
                continue
            c_k.add_(change)
            self.sums["c"][b][columns].add_(change, alpha=1 / self.server.clients)

    def finish_round(self, average: Vector) -> None:
        """Let `c` be the mean of the `c_k` again."""
        super().finish_round(average)
        for c, change in zip(self._c, self.sums["c"], strict=True):
            c.add_(change)  # c <- c + 1/K sum_k (c_k^+ - c_k)
