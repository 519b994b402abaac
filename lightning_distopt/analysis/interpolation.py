"""The loss along the straight line between two models."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_distopt.analysis.batch_norm import Statistics
from lightning_distopt.analysis.points import Objectives, Place, Point, Shard, by_name, measure_points, own_rest, read_point
from lightning_distopt.analysis.result import Result
from lightning_distopt.figures import COLORS, between_models, draw_curves, dress
from lightning_distopt.options import check_choice, check_whole, is_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLES = ("-", "--", ":")


@dataclass
class Interpolation(Result):
    """Losses and metrics along the line from one model to another, or along those to several.

    Example:
        >>> positions, losses = np.array([0.0, 0.5, 1.0]), np.array([1.0, 4.0, 3.0])
        >>> found = Interpolation(positions, losses.reshape(1, 1, 1, 3), np.array([2.5]), data=[""], metrics=["loss"])
        >>> found.numbers()
        {'distance': 2.5, 'loss_0': 1.0, 'loss_1': 3.0, 'barrier': 2.0}

    Attributes:
        positions: `[points]`, 0 at the first model and 1 at the other, both exactly.
        values: `[data, metrics, lines, points]`.
        distances: `[lines]`, Euclidean, between the models' parameters.
        data, metrics: names of the first two dimensions of the values.
        models: names of the model at 0 and of those at 1, if they have any. With a name for each of several, every line is
            drawn and told by itself; otherwise lines are those to replicas of one kind, of which means are told.
    """

    positions: np.ndarray
    values: np.ndarray
    distances: np.ndarray
    data: list[str]
    metrics: list[str]
    models: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """The names of several lines, those of the models at 1; empty if there is one line, or they have no names."""
        return self.models[1:] if 1 < len(self.distances) == len(self.models) - 1 else []

    def line(self, name: str) -> Interpolation:
        """Return one of several lines by itself."""
        k = self.lines.index(name)
        values, distances, models = self.values[:, :, k : k + 1], self.distances[k : k + 1], [self.models[0], name]
        return dataclasses.replace(self, values=values, distances=distances, models=models)

    def curves(self, data: str = "", metric: str = "loss") -> np.ndarray:
        """Return `[lines, points]`, of the first data if there is no name."""
        return np.asarray(self.values[self.data.index(data) if data else 0, self.metrics.index(metric)])

    def barriers(self, data: str = "") -> np.ndarray:
        r"""Return by how much the loss rises on each line between the models, above the mean of theirs that it could keep to.

        $$ \max_{0 \le \lambda \le 1} \; f(x(\lambda)) - \lambda f(x_1) - (1 - \lambda) f(x_0) $$

        Reference:
            Frankle et al.: Linear mode connectivity and the lottery ticket hypothesis. ICML 2020 (where the mean of both losses
            stands for the line between them).
        """
        within = (self.positions >= 0) & (self.positions <= 1)
        return barrier(self.positions[within], self.curves(data)[:, within])

    def numbers(self) -> dict[str, float]:
        """Return the distance, and for each data losses at both ends and the barrier; of lines without names their means."""
        if self.lines:
            return {f"{name}/{key}": value for name in self.lines for key, value in self.line(name).numbers().items()}
        found = {"distance": float(self.distances.mean())}
        ends = [int(np.flatnonzero(self.positions == end)[0]) for end in (0, 1)]
        for data in self.data:
            name = f"{data}/" if data else ""
            found |= {f"{name}loss_{end}": float(self.curves(data)[:, at].mean()) for end, at in enumerate(ends)}
            found |= {f"{name}barrier": float(self.barriers(data).mean())}
        return found

    def figure(self) -> Figure:
        """Draw losses and metrics along the lines, all data in one panel; of lines without names their mean and spread."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.4 * len(self.metrics), 3.2), layout="constrained")
        for axes, metric in zip(figure.subplots(1, len(self.metrics), squeeze=False)[0], self.metrics, strict=True):
            shown = [(self.line(name), name) for name in self.lines] or [(self, "")]
            for k, ((line, name), (i, data)) in enumerate(itertools.product(shown, enumerate(self.data))):
                color, style = (k // len(self.data), _STYLES[i % len(_STYLES)]) if name else (i, "-")
                label = ", ".join(filter(None, (name, data)))
                draw_curves(axes, self.positions, line.curves(data, metric), COLORS[color % len(COLORS)], label, style)
            dress(axes, between_models("position", self.models), metric, metric == "loss")
            for end in (0, 1):
                axes.axvline(end, color="grey", linewidth=0.8, linestyle="--")
            if self.lines or any(self.data):
                axes.legend(frameon=False)
        return figure


def interpolate(
    objective: Objectives,
    x_0: Point,
    x_1: Point | Sequence[Point],
    points: int = 21,
    margin: float = 0.2,
    batch_norm: Statistics = "interpolate",
    shard: Shard = "data",
    progress: bool = True,
) -> Interpolation:
    r"""Measure the loss along the straight line between two models, and a little beyond both.

    $$ x(\lambda) = \lambda x_1 + (1 - \lambda) x_0 $$

    Interpolated are all parameters and, where models are state dicts or checkpoints, buffers of real numbers, so that at 0 and
    1 it is exactly the two models that are measured. Statistics of batch norm that lie between those of two models belong to
    neither: "reestimate" has them taken anew at every point, both ends included.

    Example:
        >>> import torch
        >>> from lightning_distopt.analysis import Objective
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> f = Objective(net, lambda net, x: net(x).square().mean(), [torch.eye(2)])
        >>> found = interpolate(f, torch.tensor([1.0, 1.0]), torch.tensor([-1.0, 1.0]), points=3, margin=0, progress=False)
        >>> found.positions, found.curves(), found.barriers()
        (array([0. , 0.5, 1. ]), array([[1. , 0.5, 1. ]]), array([0.]))

    Args:
        objective: what is measured; several by name, such as those on training and test data.
        x_0: vector `[d]`, place, state dict, checkpoint or the path of one; without buffers in it, those of the module count.
        x_1: the other; or several, as a list or a matrix `[lines, d]`, with a line to each.
        points: from one model to the other, both included.
        margin: how far to go on beyond both, with points as far from each other, so cut to a multiple of their distance.
        batch_norm: "interpolate" running statistics like all else (a variance below zero beyond the ends is zero), or
            "reestimate" them at every point, on the data of the first objective.
        shard: whether ranks share the "data" or, if all have the same data, the "points".
        progress: whether to show a progress bar.

    Returns:
        The result, the same on every rank. Collective over several.

    Raises:
        ValueError: for options that make no sense, or models of another architecture, with the first mismatch.

    Reference:
        Goodfellow et al.: Qualitatively characterizing neural network optimization problems. ICLR 2015. Lin et al.: Don't use
        large mini-batches, use local SGD. ICLR 2020 (between minima of large batches and of post-local SGD).
    """
    check_line(points, margin, batch_norm)
    named = by_name(objective)
    f = next(iter(named.values()))
    several = not isinstance(x_1, Mapping | Place | str | os.PathLike) and not (isinstance(x_1, Tensor) and x_1.dim() == 1)
    others: Sequence[Any] = list(x_1) if several else [x_1]  # type: ignore[arg-type]
    if not others:
        raise ValueError("There is no model `x_1` to go to.")
    start = read_point(f, x_0, "`x_0`")
    ends = [read_point(f, x, f"`x_1[{k}]`" if several else "`x_1`") for k, x in enumerate(others)]
    if len({tuple(end.rest) for end in (start, *ends)}) > 1:
        start, *ends = (Place(end.vector, {**own_rest(f), **end.rest}) for end in (start, *ends))
    step = 1 / (points - 1)
    beyond = int(margin / step + 1e-9)
    positions = np.arange(-beyond, points + beyond) / (points - 1)

    def place(k: int) -> Place:
        return between(start, ends[k // len(positions)], float(positions[k % len(positions)]))

    count = len(ends) * len(positions)
    values, metrics = measure_points(named, place, count, batch_norm == "reestimate", shard, progress, "Interpolation")
    values = values.reshape(len(named), len(metrics), len(ends), len(positions))
    distances = np.array([float((end.vector.double() - start.vector.double()).norm()) for end in ends])
    return Interpolation(positions, values, distances, list(named), metrics)


def check_line(points: int, margin: float, batch_norm: str) -> None:
    """Raise a `ValueError` for options of a line that make no sense."""
    check_whole("points", points, least=2)  # the two ends
    if not (is_number(margin) and 0 <= margin < float("inf")):
        raise ValueError(f"`margin` must be a number that is not negative; got {margin!r}.")
    check_choice("batch_norm", batch_norm, get_args(Statistics))


def between(x_0: Place, x_1: Place, position: float) -> Place:
    """Return the point between two models, or beyond them; at 0 and 1 exactly one of them.

    Example:
        >>> import torch
        >>> between(Place(torch.tensor([0.0, 2.0])), Place(torch.tensor([1.0, 4.0])), 0.5).vector
        tensor([0.5000, 3.0000])

    Args:
        x_0: at position 0.
        x_1: at position 1.
        position: lambda.
    """
    rest = between_buffers(x_0.rest, x_1.rest, position)
    if position in (0, 1):
        return Place((x_1 if position else x_0).vector, rest)
    # lambda x_1 + (1 - lambda) x_0
    return Place(torch.lerp(x_0.vector, x_1.vector, position), rest)


def between_buffers(x_0: Mapping[str, Tensor], x_1: Mapping[str, Tensor], position: float) -> dict[str, Tensor]:
    """Return new buffers (and frozen parameters) between those of two models, or beyond them.

    Real numbers are mixed, a variance below zero is zero; others, such as counters, are those of the model that is nearer.
    """
    mixed = {}
    for name, a in x_0.items():
        whole = position in (0, 1) or not a.is_floating_point()
        # lambda x_1 + (1 - lambda) x_0
        mixed[name] = (a if position < 0.5 else x_1[name]).clone() if whole else torch.lerp(a, x_1[name], position)
        if name.endswith("running_var") and not whole:
            mixed[name].clamp_(min=0)
    return mixed


def barrier(positions: np.ndarray, values: np.ndarray) -> np.ndarray:
    r"""Return by how much values `[..., points]` on the way between two models rise above the line between its ends.

    $$ \max_{0 \le \lambda \le 1} \; f(\lambda) - \lambda f(1) - (1 - \lambda) f(0) $$

    Example:
        >>> barrier(np.array([0.0, 0.5, 1.0]), np.array([1.0, 4.0, 3.0]))
        array(2.)

    Args:
        positions: `[points]`, from 0 to 1.
        values: there.
    """
    # f(lambda) - lambda f(1) - (1 - lambda) f(0)
    with np.errstate(invalid="ignore"):  # what is no number stays so
        return np.asarray((values - positions * values[..., -1:] - (1 - positions) * values[..., :1]).max(axis=-1))
