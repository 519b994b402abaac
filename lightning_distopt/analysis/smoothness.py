"""How fast the gradient changes along an update: an estimate of the Lipschitz constant of the gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from lightning_distopt.analysis.objective import Objective
from lightning_distopt.analysis.result import Result
from lightning_distopt.figures import BLUE, ORANGE, tidy
from lightning_distopt.options import check_positive, check_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Smoothness(Result):
    """What was measured at a point and at steps away from it.

    Example:
        >>> distance, ratio, loss = np.array([0.1, 0.2]), np.array([2.0, 3.0]), np.array([1.0, 0.75, 0.5])
        >>> found = Smoothness(distance, ratio, loss, gradient_norm=2.5)
        >>> found.numbers()
        {'lipschitz': 3.0, 'gradient_norm': 2.5, 'loss_change': -0.5}

    Args:
        distance: `[steps]`, the lengths `|s_k|`.
        ratio: `[steps]`, the changes of the gradient over the lengths.
        loss: `[steps + 1]`, at the point and at each step.
        gradient_norm: at the point.
    """

    distance: np.ndarray
    ratio: np.ndarray
    loss: np.ndarray
    gradient_norm: float

    @property
    def lipschitz(self) -> float:
        """The estimate, the largest of the ratios."""
        return float(self.ratio.max())

    def numbers(self) -> dict[str, float]:
        """Return the estimate, the norm of the gradient, and how the loss has changed at the last step."""
        change = float(self.loss[-1] - self.loss[0])
        return {"lipschitz": self.lipschitz, "gradient_norm": self.gradient_norm, "loss_change": change}

    def figure(self) -> Figure:
        """Return a picture of the ratios and the loss by distance."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.2, 2.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(self.distance, self.ratio, color=BLUE, marker="o", markersize=3)
        left.set(ylabel="change of the gradient / distance")
        right.plot([0.0, *self.distance], self.loss, color=ORANGE, marker="o", markersize=3)
        right.set(ylabel="loss")
        for axes in (left, right):
            axes.set_xlabel("distance along the update")
            tidy(axes)
        return figure


def estimate_smoothness(
    objective: Objective,
    update: Tensor,
    at: Tensor | None = None,
    steps: int = 8,
    size: float = 0.2,
    progress: bool = False,
) -> Smoothness:
    r"""Return how much the gradient changes along an update, for the distance.

    $$ \hat L = \max_{k = 1, \dots, K} \frac{\| \nabla f(x + s_k) - \nabla f(x) \|}{\| s_k \|}, \qquad
       s_k = k \, c \, u $$

    On a quadratic it is `|A u| / |u|`, never above the largest eigenvalue. It takes `K + 1` gradients. With
    `Objective(mode="train")` it is that of the function that training sees, with the batch norm of each batch and the same
    dropout at every step; `check=False` lets dropout pass.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1, bias=False).double()
        >>> A = torch.diag(torch.tensor([1.0, 3.0])).double()
        >>> f = Objective(net, lambda net, x: (net.weight @ A @ net.weight.T).squeeze() / 2, [torch.zeros(1)])
        >>> estimate_smoothness(f, torch.tensor([0.0, 0.1])).lipschitz
        3.0

    Args:
        objective: `f`.
        update: `u`, `[d]`, what a step adds to the weights.
        at: `x`, `[d]`; None: the weights as they are.
        steps: `K`.
        size: `c`, each step as a part of the update.
        progress: whether to show a progress bar.

    Raises:
        ValueError: for options that make no sense, or an update of length zero or that is not finite.

    Reference:
        Lin: Optimization for deep learning in distributed and heterogeneous systems (eight steps of 0.2 in figure 14.3, of 0.3
        in figure 3.2). Santurkar et al.: How does batch normalization help optimization? NeurIPS 2018, section 3.
    """
    check_steps(steps, size)
    with objective.session():
        x = objective.vector() if at is None else at.detach().to(objective.device, objective.dtype, copy=True)
        u = update.detach().to(objective.device, objective.dtype, copy=True)
        length = float(u.double().norm())
        if not 0 < length < math.inf:
            raise ValueError(f"The update has the length {length:g}, so there is no direction to measure along.")
        ratio, loss = np.zeros(steps), np.zeros(steps + 1)
        loss[0], g = objective.loss_and_gradient(x)
        for k in tqdm(range(1, steps + 1), desc="Smoothness", leave=False, disable=not progress):
            # |grad f(x + s) - grad f(x)| / |s|
            s = k * size * u
            loss[k], there = objective.loss_and_gradient(x + s)
            ratio[k - 1] = float((there - g).double().norm()) / float(s.double().norm())
        distance = size * length * np.arange(1, steps + 1)
        return Smoothness(distance, ratio, loss, float(g.double().norm()))


def check_steps(steps: int, size: float) -> None:
    """Raise a `ValueError` for options of `estimate_smoothness` that make no sense."""
    check_whole("steps", steps)
    check_positive("size", size)
