"""Numbers that tell how training goes: gradient noise, differences between replicas, distances, effective step sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_distopt.analysis.batch_norm import BatchNormPolicy
from lightning_distopt.analysis.objective import Objective
from lightning_distopt.analysis.points import Place, measure_points
from lightning_distopt.analysis.result import Result
from lightning_distopt.communication.tensors import squared_distances
from lightning_distopt.options import check_choice


@dataclass
class GradientNoise(Result):
    r"""How much the gradients of batches differ.

    Example:
        >>> found = GradientNoise(3.0, batch_gradient_norm=3.0, signal=8.0, variance=4.0, batch_size=2.0, samples=4)
        >>> found.noise_scale
        0.5

    Args:
        gradient_norm: of the gradient over all batches.
        batch_gradient_norm: mean over the batches, of any size.
        signal: the estimate of `|G|^2`, the squared norm of the gradient without noise; less than zero if that drowns in it.
        variance: the estimate of `tr(Sigma)`, the trace of the covariance of the gradients of single samples.
        batch_size: the harmonic mean of the sizes of batches.
        samples: in all batches.
    """

    gradient_norm: float
    batch_gradient_norm: float
    signal: float
    variance: float
    batch_size: float
    samples: int

    @property
    def noise_scale(self) -> float:
        """`tr(Sigma) / |G|^2`, in samples; infinite if the signal drowns in the noise."""
        return self.variance / self.signal if self.signal > 0 else math.inf

    def numbers(self) -> dict[str, float]:
        """Return norms, the variance of samples and of batches, and the noise scale."""
        norms = {"gradient_norm": self.gradient_norm, "batch_gradient_norm": self.batch_gradient_norm}
        variances = {"variance": self.variance, "batch_variance": self.variance / self.batch_size}
        return {**norms, **variances, "noise_scale": self.noise_scale}


def gradient_noise(objective: Objective, at: Tensor | None = None) -> GradientNoise:
    r"""Return how much the gradients of batches differ, from one pass over all of them.

    $$ |G|^2 \approx \frac{N |\bar g|^2 - b \, \overline{|g|^2}}{N - b}, \qquad
       \operatorname{tr} \Sigma \approx \frac{\overline{|g|^2} - |\bar g|^2}{1/b - 1/N}, \qquad
       B_\text{simple} = \frac{\operatorname{tr} \Sigma}{|G|^2} $$

    `g` are the gradients of batches and the bar over `|g|^2` is their plain mean; `g-bar` is the gradient over all `N` samples,
    and `b` the harmonic mean of the sizes of batches, so that both estimates are unbiased for uneven batches too: the squared
    norm of the gradient of `n` samples is `|G|^2 + tr(Sigma) / n` on average.

    Example:
        >>> net = torch.nn.Linear(1, 1, bias=False).double()
        >>> batches = [torch.tensor([1.0, 3.0]).double(), torch.tensor([3.0, 5.0]).double()]
        >>> f = Objective(net, lambda net, x: (net.weight * x).mean(), batches)  # the gradients are 2 and 4
        >>> gradient_noise(f).variance, gradient_noise(f).signal
        (4.0, 8.0)

    Args:
        objective: with two batches or more, over all ranks.
        at: `[d]`; None: the weights as they are.

    Raises:
        ValueError: if there is one batch only.

    Reference:
        McCandlish et al.: An empirical model of large-batch training. 2018, appendix A.1.
    """
    problem: Exception | None = None
    with objective.session():
        total = torch.zeros(objective.dim, dtype=torch.float64, device=objective.device)
        sums = torch.zeros(4, dtype=torch.float64, device=objective.device)
        try:
            for size, _, gradient in objective.batch_gradients(at):
                g = gradient.double()
                total.add_(g, alpha=size)
                sums += sums.new_tensor([1.0, 1.0 / size, float(g.norm()), float(g @ g)])
        except Exception as error:
            problem = error
        message = objective.total(torch.cat([total, sums]), problem)
    count, inverse, norms, squares = message[-4:].tolist()
    check_noise(count)
    N, b = objective.samples, count / inverse
    of_all, mean = float((message[:-4] / N).square().sum()), squares / count
    signal = (N * of_all - b * mean) / (N - b)
    variance = (mean - of_all) / (1 / b - 1 / N)
    return GradientNoise(math.sqrt(of_all), norms / count, signal, variance, b, N)


def check_noise(batches: float) -> None:
    """Raise a `ValueError` if there are too few batches, over all ranks, for the noise of their gradients."""
    if batches < 2:
        raise ValueError("The noise of gradients takes two batches at least: measure on more samples, or in smaller batches.")


@dataclass
class GradientDiversity(Result):
    """How much the gradients of replicas' own losses differ, at one point.

    Example:
        >>> GradientDiversity(zeta_squared=4.0, gradient_norm=3.0, local_gradient_norm=3.5, replicas=2).numbers()
        {'zeta': 2.0, 'global_gradient_norm': 3.0, 'local_gradient_norm': 3.5}

    Args:
        zeta_squared: the mean of the squared distances to their mean.
        gradient_norm: of their mean.
        local_gradient_norm: the mean of their norms.
        replicas: how many there are.
    """

    zeta_squared: float
    gradient_norm: float
    local_gradient_norm: float
    replicas: int

    def numbers(self) -> dict[str, float]:
        """Return zeta and both norms."""
        norms = {"global_gradient_norm": self.gradient_norm, "local_gradient_norm": self.local_gradient_norm}
        return {"zeta": math.sqrt(self.zeta_squared), **norms}


def gradient_diversity(own: Sequence[Objective], at: Tensor | None = None) -> GradientDiversity:
    r"""Return how much the gradients of replicas' own losses differ, at one point for all.

    $$ \zeta^2 = \frac1n \sum_{i=1}^n \| \nabla f_i(x) - \nabla f(x) \|^2, \qquad f = \frac1n \sum_{i=1}^n f_i $$

    It is zero where all have the same data. From some samples of each, `m` say, it is too large by about `tr(Sigma) / m`.

    Example:
        >>> net = torch.nn.Linear(1, 1, bias=False).double()
        >>> own = [Objective(net, lambda net, x: (net.weight * x).mean(), [torch.tensor([x]).double()]) for x in (1.0, 5.0)]
        >>> gradient_diversity(own).zeta_squared
        4.0

    Args:
        own: `f_i` of the replicas of this rank, each on that replica's own batches. Over several ranks the objectives of one
            know how to sum over all, and every rank has as many.
        at: `x`, `[d]`; None: the weights as they are, the same on every rank.

    Raises:
        ValueError: if there is no replica, or one has no data.

    Reference:
        Koloskova et al.: A unified theory of decentralized SGD with changing topology and local updates. ICML 2020,
        assumption 3.
    """
    if not own:
        raise ValueError("There is no replica whose gradient could differ from that of others.")
    first = own[0]
    problem: Exception | None = None
    with torch.inference_mode(False), torch.no_grad():
        local = torch.zeros(len(own), first.dim, dtype=torch.float64, device=first.device)
        try:
            for row, objective in zip(local, own, strict=True):
                row.copy_(_own_gradient(objective, at))
        except Exception as error:
            problem = error
        total = first.total(torch.cat([local.sum(dim=0), local.new_tensor([float(len(own))])]), problem)
        n, mean = float(total[-1]), total[:-1] / total[-1]
        # (1/n) sum_i |grad f_i - grad f|^2, and (1/n) sum_i |grad f_i|
        sums = torch.stack([(local - mean).square().sum(), local.norm(dim=1).sum()])
        zeta_squared, norm = (first.sum_over_ranks(sums) / n).tolist()
    return GradientDiversity(zeta_squared, float(mean.norm()), norm, round(n))


@dataclass
class ReplicaLosses(Result):
    """Losses and metrics of replicas and of their average, on the same data.

    Example:
        >>> ReplicaLosses(["loss"], replicas=np.array([[1.0, 3.0]]), average=np.array([0.5])).numbers()
        {'loss_average': 0.5, 'loss_replicas': 2.0, 'loss_replicas_min': 1.0, 'loss_replicas_max': 3.0}

    Args:
        metrics: their names; the first is "loss".
        replicas: `[metrics, n]`.
        average: `[metrics]`, of the average model.
    """

    metrics: list[str]
    replicas: np.ndarray
    average: np.ndarray

    def numbers(self) -> dict[str, float]:
        """Return, for each metric, that of the average, and the mean, the least and the largest over replicas."""
        found: dict[str, float] = {}
        for metric, own, average in zip(self.metrics, self.replicas, self.average, strict=True):
            kinds = {"average": average, "replicas": own.mean(), "replicas_min": own.min(), "replicas_max": own.max()}
            found |= {f"{metric}_{kind}": float(value) for kind, value in kinds.items()}
        return found


def replica_losses(
    objective: Objective,
    rows: Tensor,
    first: int = 0,
    count: int | None = None,
    average: Tensor | None = None,
    batch_norm: BatchNormPolicy = "reestimate",
) -> ReplicaLosses:
    r"""Return losses and metrics of every replica and of the average model, all on the objective's data.

    $$ f(x_1), \dots, f(x_n), \qquad f(\bar x), \quad \bar x = \frac1n \sum_i x_i $$

    Over several ranks each replica's weights go to all of them in turn, one message `[d]` each.

    Example:
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> f = Objective(net, lambda net, x: (net.weight**2).mean(), [torch.zeros(1)])
        >>> losses = replica_losses(f, torch.tensor([[-1.0], [1.0]]))
        >>> losses.replicas, losses.average
        (array([[1., 1.]]), array([0.]))

    Args:
        objective: that measures them.
        rows: `[m, d]`, the replicas of this rank.
        first: number of the replica in row 0.
        count: `n`, over all ranks; None: `m`, where there is one rank.
        average: `[d]`, the average model, the same on every rank; None: the mean of the replicas.
        batch_norm: whether running statistics are estimated anew for each ("reestimate"), or the module's are kept ("keep").

    Raises:
        ValueError: if `batch_norm` is neither.
    """
    check_choice("batch_norm", batch_norm, get_args(BatchNormPolicy))
    n = len(rows) if count is None else count
    rows = rows.detach().to(objective.device, objective.dtype)
    mean = objective.sum_over_ranks(rows.sum(dim=0)) / n if average is None else average

    def place(k: int) -> Place:
        if k == n:
            return Place(mean)
        here = first <= k < first + len(rows)
        return Place(objective.sum_over_ranks(rows[k - first].clone() if here else torch.zeros_like(rows[0])))

    values, metrics = measure_points({"": objective}, place, n + 1, batch_norm == "reestimate", progress=False)
    return ReplicaLosses(metrics, values[0, :, :n], values[0, :, n])


def distances(
    rows: Tensor, references: Mapping[str, Tensor], reduce: Callable[[Tensor], Any] | None = None
) -> dict[str, float]:
    r"""Return how far replicas are from some points: the root mean square over all of them.

    $$ D = \Big( \frac1n \sum_{i=1}^n \| x_i - r_i \|^2 \Big)^{1/2} $$

    With the start of training for `r` it is the distance travelled; with the replicas' mean, the consensus distance.

    Example:
        >>> rows = torch.tensor([[0.0, 0.0], [6.0, 8.0]])
        >>> distances(rows, {"consensus": rows.mean(dim=0)})
        {'consensus': 5.0}

    Args:
        rows: `[m, d]`, the replicas of this rank.
        references: `r` by name, `[d]`, or `[m, d]` with one for each replica; the same names on every rank.
        reduce: sums a tensor over all ranks in place; None where there is one.
    """
    squares = [squared_distances([rows], [reference.to(rows)]).sum() for reference in references.values()]
    message = torch.stack([*squares, torch.tensor(float(len(rows)), dtype=torch.float64, device=rows.device)])
    if reduce is not None:
        reduce(message)
    return dict(zip(references, (message[:-1] / message[-1]).sqrt().tolist(), strict=True))


def effective_step_size(lr: float, weights: Tensor) -> float:
    r"""Return the step size that counts for weights whose scale does not, as those before a normalization layer.

    $$ \eta_\text{eff} = \eta / \|x\|^2 $$

    Example:
        >>> effective_step_size(0.1, torch.tensor([3.0, 4.0]))
        0.004

    Args:
        lr: `eta`.
        weights: `x`.

    Returns:
        The size; infinite if all weights are zero.

    Reference:
        Lin: Optimization for deep learning in distributed and heterogeneous systems, figure 18.10, under a label without the
        square that its text has. van Laarhoven: L2 regularization versus batch and weight normalization. 2017.
    """
    squared = float(weights.double().square().sum())
    return lr / squared if squared > 0 else math.inf


def _own_gradient(objective: Objective, at: Tensor | None) -> Tensor:
    """Return the gradient `[d]` of the mean loss over this rank's batches, in float64."""
    if not objective.batches:
        raise ValueError("A replica has no data of its own, so it has no gradient either.")
    with objective.session():
        g = torch.zeros(objective.dim, dtype=torch.float64, device=objective.device)
        for size, _, of_batch in objective.batch_gradients(at):
            g.add_(of_batch, alpha=size / sum(objective.sizes))
    return g
