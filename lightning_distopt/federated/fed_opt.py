"""FedAdagrad, FedAdam and FedYogi: servers that scale each parameter's step by what its steps were so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_distopt.federated.aggregator import Aggregator, Vector
from lightning_distopt.options import check_factor, check_positive


class FedOpt(Aggregator):
    r"""What adaptive servers share; subclasses say how `v` follows the squares of the steps.

    $$ \Delta_t = \sum_{k \in S_t} p_k \, \hat x^k_t - x_{t-1}, \qquad m_t = \beta_1 m_{t-1} + (1 - \beta_1) \, \Delta_t,
       \qquad x_t = x_{t-1} + \eta \, \frac{m_t}{\sqrt{v_t} + \tau} $$

    from `m_0 = 0` and `v_0 = tau^2`, without bias correction, as in the paper.

    Example:
        >>> class Signs(FedOpt):
        ...     '''Steps that are equally long for all parameters: `v` is the last square.'''
        ...
        ...     server_lr, beta1, tau = 0.01, 0.0, 1e-8
        ...
        ...     def follow(self, v, square):
        ...         v.copy_(square)
        >>> v = torch.zeros(2)
        >>> Signs().follow(v, torch.tensor([4.0, 9.0]))
        >>> v
        tensor([4., 9.])
    """

    server_lr: float
    beta1: float
    tau: float
    kept = ("m", "v")

    def setup(self, server: Any) -> None:
        """Start with `m_0` and `v_0`."""
        super().setup(server)
        self._m = [torch.zeros_like(x) for x in server.model]
        self._v = [torch.full_like(x, self.tau**2) for x in server.model]

    def follow(self, v: Tensor, square: Tensor) -> None:
        """Bring `v` up to date, in place; `square` is that of a round's step."""
        raise NotImplementedError

    def finish_round(self, average: Vector) -> None:
        """Make an adaptive step."""
        for x, m, v, mean in zip(self.server.model, self._m, self._v, average, strict=True):
            delta = mean - x
            m.mul_(self.beta1).add_(delta, alpha=1 - self.beta1)  # m <- beta1 m + (1 - beta1) Delta
            self.follow(v, delta.square_())
            x.addcdiv_(m, v.sqrt().add_(self.tau), value=self.server_lr)  # x <- x + eta m / (sqrt(v) + tau)


class FedAdagrad(FedOpt):
    r"""A server that makes steps of Adagrad.

    $$ v_t = v_{t-1} + \Delta_t^2, \qquad x_t = x_{t-1} + \eta \, \frac{m_t}{\sqrt{v_t} + \tau} $$

    with the average step `Delta` of the clients, which takes the place of the gradient, and
    `m_t = beta1 m_{t-1} + (1 - beta1) Delta_t`; `v_0 = tau^2`, and there is no bias correction.

    Example:
        >>> FedAdagrad(server_lr=0.1)
        FedAdagrad(server_lr=0.1, beta1=0.0, tau=0.001)

    Args:
        server_lr: `eta` of the server, in units of the parameters; above 0.
        beta1: momentum, at least 0 and below 1; the paper's experiments have none in this method.
        tau: how much it adapts, the less the larger; in units of the clients' steps, above 0.

    Memory: both moments.

    Raises:
        ValueError: for options out of range.

    Reference: Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan: Adaptive federated optimization. ICLR 2021,
    algorithm 2.
    """

    def __init__(self, server_lr: float = 0.01, beta1: float = 0.0, tau: float = 1e-3) -> None:
        self.server_lr, self.tau = check_positive("server_lr", server_lr), check_positive("tau", tau)
        self.beta1 = check_factor("beta1", beta1)

    def follow(self, v: Tensor, square: Tensor) -> None:
        """Sum squares up."""
        v.add_(square)  # v <- v + Delta^2


class FedAdam(FedOpt):
    r"""A server that makes steps of Adam.

    $$ v_t = \beta_2 v_{t-1} + (1 - \beta_2) \, \Delta_t^2, \qquad x_t = x_{t-1} + \eta \, \frac{m_t}{\sqrt{v_t} + \tau} $$

    with the average step `Delta` of the clients, which takes the place of the gradient, and
    `m_t = beta1 m_{t-1} + (1 - beta1) Delta_t`; `v_0 = tau^2`, and there is no bias correction.

    Example:
        >>> FedAdam(server_lr=0.1)
        FedAdam(server_lr=0.1, beta1=0.9, beta2=0.99, tau=0.001)

    Args:
        server_lr: `eta` of the server, in units of the parameters; above 0.
        beta1: momentum, at least 0 and below 1.
        beta2: how long squares are remembered, at least 0 and below 1.
        tau: how much it adapts, the less the larger; in units of the clients' steps, above 0.

    Memory: both moments.

    Raises:
        ValueError: for options out of range.

    Reference: Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan: Adaptive federated optimization. ICLR 2021,
    algorithm 2.
    """

    def __init__(self, server_lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> None:
        self.server_lr, self.tau = check_positive("server_lr", server_lr), check_positive("tau", tau)
        self.beta1, self.beta2 = check_factor("beta1", beta1), check_factor("beta2", beta2)

    def follow(self, v: Tensor, square: Tensor) -> None:
        """Average squares."""
        v.mul_(self.beta2).add_(square, alpha=1 - self.beta2)  # v <- beta2 v + (1 - beta2) Delta^2


class FedYogi(FedAdam):
    r"""A server that makes steps of Yogi, whose `v` changes by no more than the square of a step.

    $$ v_t = v_{t-1} - (1 - \beta_2) \, \Delta_t^2 \, \text{sign}(v_{t-1} - \Delta_t^2), \qquad
       x_t = x_{t-1} + \eta \, \frac{m_t}{\sqrt{v_t} + \tau} $$

    Everything else is as in `FedAdam`.

    Example:
        >>> FedYogi(server_lr=0.1)
        FedYogi(server_lr=0.1, beta1=0.9, beta2=0.99, tau=0.001)

    Args:
        server_lr: `eta` of the server, in units of the parameters; above 0.
        beta1: momentum, at least 0 and below 1.
        beta2: how slowly `v` follows the squares, at least 0 and below 1.
        tau: how much it adapts, the less the larger; in units of the clients' steps, above 0.

    Memory: both moments.

    Raises:
        ValueError: for options out of range.

    Reference: the same as that of `FedAdam`.
    """

    def follow(self, v: Tensor, square: Tensor) -> None:
        """Go towards the square."""
        # v <- v - (1 - beta2) Delta^2 sign(v - Delta^2)
        v.addcmul_(square, (v - square).sign_(), value=self.beta2 - 1)
