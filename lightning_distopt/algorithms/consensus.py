"""How far replicas are apart: measured, estimated from a gossip step, and what theory says of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from lightning_distopt.communication import Communicator
from lightning_distopt.communication.tensors import squared_distances as squared_distances


def consensus_distance(blocks: Sequence[Tensor], communicator: Communicator, means: Sequence[Tensor] | None = None) -> Tensor:
    r"""Return the consensus distance, the root mean square over all replicas of the distance to their mean.

    $$ \Xi = \Bigl( \frac{1}{n} \sum_{i=1}^{n} \| x_i - \bar x \|^2 \Bigr)^{1/2}, \qquad
       \bar x = \frac{1}{n} \sum_{i=1}^{n} x_i $$

    Collective. It takes an all-reduce of the parameters, unless the mean is known, and one of a single number; both are charged
    to `traffic.evaluation_bytes`.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0, 0.0], [6.0, 8.0]])
        >>> consensus_distance([x], Communicator(replicas_per_rank=2))
        tensor(5., dtype=torch.float64)

    Args:
        blocks: `x` of the replicas here, each `[m, d]`.
        communicator: reaches all replicas.
        means: `x_bar`, each `[d]`; None: it is computed.

    Returns:
        A number in double precision, the same on all ranks.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, section 5.4.
    """
    if means is None:
        means = [communicator.average(block) for block in blocks]
    return communicator.average(squared_distances(blocks, means)[:, None]).sqrt().squeeze()


def consensus_estimate(moved: Tensor, communicator: Communicator) -> Tensor:
    r"""Return the estimate of the consensus distance that a gossip step yields, for one number on the wire.

    $$ \theta_i = \Bigl\| \sum_j w_{ij} x_j - x_i \Bigr\|^2, \qquad
       \Theta = \Bigl( \frac{1}{n} \sum_{i=1}^{n} \theta_i \Bigr)^{1/2}, \qquad
       \tfrac12 \Theta \le \Xi \le \tfrac2p \, \Theta $$

    `x` is what the step mixes, so `Theta` and `Xi` are those before the step; `p` is the contraction of the mixing matrix. The
    bound on the right is lemma 14.1.1. For a symmetric matrix, `1 / (1 - lambda_2)` stands in place of `2/p`, with its second
    largest eigenvalue, whose eigenvector reaches it; for random iterates the ratio is far smaller. Collective; the number is
    charged to `traffic.evaluation_bytes`.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [4.0]])
        >>> moved = (x.mean(dim=0) - x).square().sum(dim=1)  # w_ij = 1/2
        >>> consensus_estimate(moved, Communicator(replicas_per_rank=2))
        tensor(2., dtype=torch.float64)

    Args:
        moved: `theta` of the replicas here, `[m]`.
        communicator: reaches all replicas.

    Returns:
        `Theta` in double precision, the same on all ranks.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, section 5.6 and lemma 14.1.1.
    """
    return communicator.average(moved.double()[:, None]).sqrt().squeeze()


def critical_distance(lr: float, gradient_norm: float, smoothness: float, noise: float, replicas: int) -> float:
    r"""Return the critical consensus distance, below which decentralized SGD converges as fast as the centralized one.

    $$ \Gamma^2 = \frac{\eta \, \sigma^2}{L \, n} + \frac{\| \nabla f(\bar x) \|^2}{8 L^2} $$

    (proposition 5.4.2). It does not depend on the graph. The thesis prints `eta_t^2` for it, the symbol of the learning rate;
    here it is `Gamma`.

    Example:
        >>> round(critical_distance(lr=0.1, gradient_norm=2.0, smoothness=1.0, noise=1.0, replicas=5), 4)  # (0.02 + 0.5)^0.5
        0.7211

    Args:
        lr: `eta`.
        gradient_norm: `||grad f(x_bar)||`, of the full gradient at the mean.
        smoothness: `L`, the Lipschitz constant of the gradient.
        noise: `sigma`, the standard deviation of stochastic gradients.
        replicas: `n`.

    Returns:
        `Gamma`, in units of the parameters.

    Raises:
        ValueError: for a negative number, or where a positive one is needed.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, proposition 5.4.2.
    """
    _check_not_negative(lr=lr, gradient_norm=gradient_norm, noise=noise)
    if smoothness <= 0 or replicas < 1:
        raise ValueError(f"`smoothness` must be above 0 and `replicas` at least 1; got {smoothness!r} and {replicas!r}.")
    return math.sqrt(lr * noise**2 / (smoothness * replicas) + gradient_norm**2 / (8 * smoothness**2))


def typical_distance(lr: float, gradient_norm: float, noise: float, contraction: float, steady: bool = False) -> float:
    r"""Return what the consensus distance of decentralized SGD is at most, between steps that part replicas and gossip.

    $$ \Xi^2 \le C \, (1 - p) \, \eta^2 \Bigl( \frac{\phi^2}{p^2} + \frac{\sigma^2}{p} \Bigr) $$

    (proposition 5.4.3, which hides `C` in `O(...)`). It sums up, from replicas that are equal, the recursion of lemma 14.3.2,

    $$ \Xi_{t+1}^2 \le \Bigl( 1 - \frac p2 \Bigr) \Xi_t^2 + \frac{3 (1-p) \eta^2}{p} \bigl( \phi_t^2 + p \sigma^2 \bigr), $$

    so `C = 6` while `phi` is constant, and `C = 12` where it decays slowly, `phi_t^2 <= (1 + p/4) phi_{t+1}^2`. The noise in it
    is at most that in `critical_distance` if `eta <= p / (n L C)`. The thesis writes `6C` for this constant in equation 14.3,
    but has `4C` in the learning rate that is to follow from it, with which the noise can be half as much again.

    Example:
        >>> round(typical_distance(lr=0.1, gradient_norm=1.0, noise=0.0, contraction=0.5, steady=True), 4)  # 0.12^0.5
        0.3464
        >>> typical_distance(lr=0.1, gradient_norm=1.0, noise=1.0, contraction=1.0)  # each step averages exactly
        0.0

    Args:
        lr: `eta`.
        gradient_norm: `phi`, the root mean square over replicas of `||grad f_i(x_i)||`.
        noise: `sigma`, the standard deviation of stochastic gradients.
        contraction: `p`, above 0 and at most 1, such as `Ring(8).contraction`.
        steady: whether `phi` is constant.

    Returns:
        The bound of `Xi`, in units of the parameters.

    Raises:
        ValueError: for a negative number, or a `p` that is none.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, proposition 5.4.3 and lemma
    14.3.2.
    """
    _check_not_negative(lr=lr, gradient_norm=gradient_norm, noise=noise)
    if not 0 < contraction <= 1:
        raise ValueError(f"`contraction` must be above 0 and at most 1; got {contraction!r}.")
    p, constant = contraction, 6 if steady else 12
    return math.sqrt(constant * (1 - p) * lr**2 * (gradient_norm**2 / p**2 + noise**2 / p))


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"`{name}` must not be negative; got {value!r}.")
