"""By how much the loss rises around a model: on average, and where it rises most."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_distopt.analysis.directions import OneDimensional, gaussian_direction, random_direction
from lightning_distopt.analysis.objective import Objective
from lightning_distopt.analysis.result import Result
from lightning_distopt.communication.rng import derive_seed
from lightning_distopt.figures import BLUE, dress
from lightning_distopt.options import check_choice, check_positive, check_whole, is_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Sharpness(Result):
    """By how much the loss rises around a model.

    Example:
        >>> found = Sharpness("average", 0.2, standard_error=0.1, loss=1.0, radius=0.05, rises=np.array([0.1, 0.3]))
        >>> found.numbers()
        {'average': 0.2, 'average_error': 0.1}

    Attributes:
        kind: "average", "worst_case" or "keskar".
        value: the rise; of Keskar's measure, `phi`, in percent.
        standard_error: of the value, as a mean over samples; 0 where nothing is random.
        loss: of the model.
        radius: within which the loss was tried.
        rises: `[evaluations]`: of each sample, or the largest that the ascent has come to so far.
    """

    kind: str
    value: float
    standard_error: float
    loss: float
    radius: float
    rises: np.ndarray

    def numbers(self) -> dict[str, float]:
        """Return the value, with its standard error if it is a mean."""
        found = {self.kind: self.value}
        return found | ({f"{self.kind}_error": self.standard_error} if self.kind == "average" else {})

    def figure(self) -> Figure:
        """Draw the rises of all samples in order of size, or those that the ascent has come to."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.4, 3.2), layout="constrained")
        axes = figure.subplots()
        rises = np.sort(self.rises) if self.kind == "average" else self.rises
        axes.plot(np.arange(1, len(rises) + 1), rises, color=BLUE, marker=".")
        dress(axes, "sample, by size" if self.kind == "average" else "evaluation", "rise of the loss")
        return figure


def average_sharpness(
    objective: Objective,
    radius: float = 0.05,
    samples: int = 20,
    noise: Literal["filter", "gaussian"] = "filter",
    one_dimensional: OneDimensional = "ignore",
    seed: int = 0,
    progress: bool = True,
) -> Sharpness:
    r"""Return by how much the loss rises on average under random noise of a size.

    $$ \mathbb{E}_\delta \, f(w + \delta) - f(w), \qquad
       \delta = \rho d \text{ with } \lVert d_{i,j} \rVert = \lVert w_{i,j} \rVert $$

    or Gaussian, `delta ~ N(0, rho^2 / n I)` for `n` parameters, so that `E |delta|^2 = rho^2`. Filter-normalised noise is
    relative to the weights, so it compares networks that compute the same with weights of different sizes; Gaussian noise
    does not.

    Example:
        >>> net = torch.nn.Linear(4, 1, bias=False).double()
        >>> f = Objective(net, lambda net, x: net(x).square().sum(), [torch.eye(4).double()])  # |w|^2
        >>> found = average_sharpness(f, 0.1, 1000, noise="gaussian", progress=False)
        >>> abs(found.value - 0.01) < 3 * found.standard_error
        True

    Args:
        objective: around the module as it is.
        radius: `rho`.
        samples: how many `delta`, at least 2.
        noise: "filter" or "gaussian".
        one_dimensional: "ignore" or "whole", for "filter"; see `filter_normalized`.
        seed: of the noise.
        progress: whether to show a progress bar.

    Returns:
        The result, the same on every rank. Collective over several.

    Raises:
        ValueError: for options that are unknown or make no sense.

    Reference:
        Neyshabur et al.: Exploring generalization in deep learning. NeurIPS 2017 (expected sharpness). Li et al.: Visualizing
        the loss landscape of neural nets. NeurIPS 2018 (filter normalisation).
    """
    check_positive("radius", radius)
    check_whole("samples", samples, least=2)  # to have a standard error
    check_choice("noise", noise, ("filter", "gaussian"))
    check_choice("one_dimensional", one_dimensional, get_args(OneDimensional))
    f, rises = objective, []
    with torch.inference_mode(False):
        w, loss = f.vector(), f.loss()
        for k in tqdm(range(samples), desc="Sharpness", leave=False, disable=not progress):
            if noise == "filter":
                d = random_direction(f, seed, k, one_dimensional=one_dimensional)
            else:
                d = gaussian_direction(f, seed, k) / math.sqrt(f.dim)
            # f(w + rho d) - f(w)
            rises.append(f.loss(w + radius * d) - loss)
    found = np.array(rises)
    with np.errstate(invalid="ignore"):  # what is no number stays so
        error = float(found.std(ddof=1)) / math.sqrt(samples)
    return Sharpness("average", float(found.mean()), error, loss, radius, found)


def worst_case_sharpness(objective: Objective, radius: float = 0.05, steps: int = 1, progress: bool = True) -> Sharpness:
    r"""Return by how much the loss rises at most within a radius, as far as steps along the gradient find out.

    $$ \max_{\lVert \delta \rVert \le \rho} f(w + \delta) - f(w), \qquad
       \delta \leftarrow \Pi_\rho \Big( \delta + \rho \, \frac{g}{\lVert g \rVert} \Big), \quad g = \nabla f(w + \delta) $$

    from `delta = 0`. The first step leads to the point that sharpness-aware minimisation (SAM) takes its gradients at,
    `rho g / |g|`; more steps go on along the sphere. Where the gradient is zero, a random direction takes its place.

    Example:
        >>> net = torch.nn.Linear(2, 1, bias=False).double()
        >>> f = Objective(net, lambda net, x: net(x).square().sum(), [torch.diag(torch.tensor([1.0, 3.0])).double()])
        >>> _ = net.weight.data.fill_(0.1)  # f = w_1^2 + 9 w_2^2
        >>> worst_case_sharpness(f, 0.1, progress=False).value < worst_case_sharpness(f, 0.1, 30, progress=False).value
        True

    Args:
        objective: around the module as it is.
        radius: `rho`.
        steps: of the ascent; 1 is SAM's.
        progress: whether to show a progress bar.

    Returns:
        The largest rise that was found, the same on every rank. Collective over several.

    Raises:
        ValueError: for options that make no sense, or a gradient that is not finite.

    Reference:
        Foret et al.: Sharpness-aware minimization for efficiently improving generalization. ICLR 2021, equation 2.
    """
    check_positive("radius", radius)
    check_whole("steps", steps)
    f, rises = objective, []
    with torch.inference_mode(False):
        w = f.vector()
        loss, g = f.loss_and_gradient()
        if not bool(g.isfinite().all()):
            raise ValueError("The gradient of the model is not finite, so it shows no direction in which the loss rises.")
        delta = torch.zeros_like(w)
        for _ in tqdm(range(steps), desc="Sharpness", leave=False, disable=not progress):
            direction = g if bool(g.any()) else gaussian_direction(f)
            direction = direction / direction.abs().max()  # whose norm does not overflow
            # delta <- Pi_rho(delta + rho g / |g|)
            delta = delta + radius * direction / direction.norm()
            delta *= radius / max(radius, float(delta.norm()))
            value, g = f.loss_and_gradient(w + delta)
            rises.append(value - loss)
            if not (math.isfinite(value) and bool(g.isfinite().all())):
                break
    return _largest("worst_case", rises, loss, radius)


def keskar_sharpness(
    objective: Objective,
    epsilon: float = 1e-3,
    subspace: int | None = None,
    steps: int = 10,
    optimizer: Literal["ascent", "l-bfgs-b"] = "ascent",
    seed: int = 0,
    progress: bool = True,
) -> Sharpness:
    r"""Return the sharpness of Keskar et al.: the largest relative rise in a box around the model, in percent.

    $$ \phi = \frac{\max_{y \in C_\epsilon} f(x + A y) - f(x)}{1 + f(x)} \cdot 100, \qquad
       C_\epsilon = \{ y : |y_i| \le \epsilon \, (|(A^+ x)_i| + 1) \} $$

    `A` is the identity, or has `p` columns of standard normal numbers and the pseudo-inverse `A^+`. Where the gradient is zero,
    the maximisation starts from a random corner of the box.

    Example:
        >>> net = torch.nn.Linear(2, 1, bias=False).double()
        >>> f = Objective(net, lambda net, x: net(x).square().sum(), [torch.eye(2).double()])  # |w|^2
        >>> _ = net.weight.data.fill_(1.0)
        >>> round(keskar_sharpness(f, 0.5, progress=False).value, 6)  # (4 + 4 - 2) / (1 + 2)
        200.0

    Args:
        objective: around the module as it is; its loss is not negative.
        epsilon: size of the box; the paper has 1e-3 and 5e-4.
        subspace: `p`; None: the whole space. `A` takes the memory of `p` models.
        steps: of the maximisation, as many as the paper has by default.
        optimizer: "ascent", by steps of the box's size along the signs of the gradient, clipped to the box and halved where
            the loss does not rise; or "l-bfgs-b", the paper's, which needs SciPy, and for the whole space the memory of about
            forty models on the CPU.
        seed: of the subspace, and of the corner.
        progress: whether to show a progress bar.

    Returns:
        The result, the same on every rank. Collective over several.

    Raises:
        ValueError: for options that are unknown or make no sense.
        ModuleNotFoundError: for "l-bfgs-b" without SciPy.

    Reference:
        Keskar et al.: On large-batch training for deep learning: generalization gap and sharp minima. ICLR 2017, metric 2.1.
    """
    check_positive("epsilon", epsilon)
    check_whole("steps", steps)
    check_choice("optimizer", optimizer, ("ascent", "l-bfgs-b"))
    if subspace is not None and not (is_whole(subspace, least=1) and subspace <= objective.dim):
        raise ValueError(
            f"`subspace` must have from 1 to {objective.dim} dimensions, those of the parameters; got {subspace!r}."
        )
    f = objective
    with torch.inference_mode(False):
        x = f.vector().to(f.wide)
        if subspace is None:
            A, y = None, x
        else:
            columns = [gaussian_direction(f, derive_seed(seed, "subspace"), k) for k in range(subspace)]
            A = torch.stack(columns, dim=1).to(f.wide)
            y = torch.linalg.lstsq(A, x.unsqueeze(1)).solution.squeeze(1)  # A^+ x
        # epsilon (|(A^+ x)_i| + 1)
        box = epsilon * (y.abs() + 1)

        def evaluate(y: Tensor) -> tuple[float, Tensor]:
            value, g = f.loss_and_gradient(x + (y if A is None else A @ y))
            values.append(value)
            bar.update()
            return value, g if A is None else A.T @ g

        values: list[float] = []
        with tqdm(desc="Sharpness", leave=False, disable=not progress) as bar:
            start = torch.zeros_like(box)
            value, g = evaluate(start)
            if not bool(g.any()):
                signs = torch.randn(len(box), generator=torch.Generator().manual_seed(derive_seed(seed, "corner"))).sign()
                start = box * signs.to(box)
                value, g = evaluate(start)
            if optimizer == "ascent":
                _box_ascent(evaluate, box, steps, start, value, g)
            else:
                _l_bfgs_b(evaluate, box, steps, start)
    found = _largest("keskar", [value - values[0] for value in values], values[0], epsilon)
    # (max f - f) / (1 + f) * 100
    found.value = found.value / (1 + found.loss) * 100
    return found


def _box_ascent(
    evaluate: Callable[[Tensor], tuple[float, Tensor]], box: Tensor, steps: int, y: Tensor, value: float, g: Tensor
) -> None:
    size = 1.0
    for _ in range(steps):
        trial = (y + size * box * g.sign()).clamp(-box, box)
        raised, slope = evaluate(trial)
        if not math.isfinite(raised):
            return
        if raised > value:
            y, value, g = trial, raised, slope
        else:
            size /= 2


def _l_bfgs_b(evaluate: Callable[[Tensor], tuple[float, Tensor]], box: Tensor, steps: int, start: Tensor) -> None:
    try:
        from scipy.optimize import Bounds, minimize
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("L-BFGS-B needs SciPy: pip install 'lightning-distopt[hessian]'") from error

    def negated(y: np.ndarray) -> tuple[float, np.ndarray]:
        value, g = evaluate(torch.from_numpy(y).to(box))
        if not math.isfinite(value):
            raise OverflowError
        return -value, -g.double().cpu().numpy()

    edges = box.double().cpu().numpy()
    options = {"maxiter": steps, "ftol": 0.0, "gtol": 0.0}
    try:
        first = start.double().cpu().numpy()
        minimize(negated, first, jac=True, method="L-BFGS-B", bounds=Bounds(-edges, edges), options=options)
    except OverflowError:
        return  # the rise is noted already


def _largest(kind: str, rises: list[float], loss: float, radius: float) -> Sharpness:
    """Return the result of an ascent; where the loss is no number any more, it has risen without bound."""
    best = np.maximum.accumulate([rise if math.isfinite(rise) else math.inf for rise in rises])
    return Sharpness(kind, float(best[-1]), 0.0, loss, radius, best)
