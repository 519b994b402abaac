"""The loss around models: along random lines, and over planes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np
from torch import Tensor

from lightning_distopt.analysis.batch_norm import BatchNormPolicy
from lightning_distopt.analysis.directions import OneDimensional, random_direction
from lightning_distopt.analysis.planes import Plane, random_plane
from lightning_distopt.analysis.points import Objectives, Place, Point, Shard, by_name, measure_points, read_point
from lightning_distopt.analysis.result import Result
from lightning_distopt.figures import COLORS, draw_curves, dress
from lightning_distopt.options import check_choice, check_positive, check_whole, is_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.contour import ContourSet
    from matplotlib.figure import Figure


@dataclass
class Landscape1D(Result):
    """Losses and metrics of models along lines through them.

    Example:
        >>> positions, losses = np.array([-1.0, 0.0, 1.0]), np.array([3.0, 1.0, 2.0])
        >>> found = Landscape1D(positions, losses.reshape(1, 1, 1, 1, 3), models=[""], data=[""], metrics=["loss"])
        >>> found.numbers()
        {'loss': 1.0, 'rise': 1.5}

    Attributes:
        positions: `[points]`, of which the middle one is 0, the model itself.
        values: `[models, data, metrics, directions, points]`.
        models, data, metrics: names of the first three dimensions.
    """

    positions: np.ndarray
    values: np.ndarray
    models: list[str]
    data: list[str]
    metrics: list[str]

    def curves(self, model: str = "", data: str = "", metric: str = "loss") -> np.ndarray:
        """Return `[directions, points]` of a model, of the first data or model if there is no name."""
        i, j = (names.index(name) if name else 0 for names, name in ((self.models, model), (self.data, data)))
        return np.asarray(self.values[i, j, self.metrics.index(metric)])

    def numbers(self) -> dict[str, float]:
        """Return losses at the models, and by how much they have risen at the ends of the lines, as means over directions."""
        found: dict[str, float] = {}
        for model in self.models:
            for data in self.data:
                curves = self.curves(model, data)
                loss = curves[0, len(self.positions) // 2]
                name = "/".join(part for part in (model, data) if part)
                found |= {f"{name}/loss".lstrip("/"): float(loss)}
                found |= {f"{name}/rise".lstrip("/"): float(curves[:, [0, -1]].mean() - loss)}
        return found

    def figure(self) -> Figure:
        """Draw means over directions, in bands from the least to the largest; crosses at the top are values without number."""
        from matplotlib.figure import Figure

        rows, columns = len(self.metrics), len(self.data)
        figure = Figure(figsize=(4.4 * columns, 3.2 * rows), layout="constrained")
        for row, metric in zip(figure.subplots(rows, columns, squeeze=False), self.metrics, strict=True):
            for axes, data in zip(row, self.data, strict=True):
                for k, model in enumerate(self.models):
                    draw_curves(axes, self.positions, self.curves(model, data, metric), COLORS[k % len(COLORS)], model)
                dress(axes, "position along the direction", f"{data} {metric}".strip(), metric == "loss")
                if any(self.models):
                    axes.legend(frameon=False)
        return figure


@dataclass
class Landscape2D(Result):
    """Losses and metrics over a part of a plane.

    Example:
        >>> x, y, losses = np.array([-1.0, 0.0, 1.0]), np.array([0.0, 1.0]), np.array([[3.0, 1.0, 2.0], [5.0, 4.0, 6.0]])
        >>> origin, no_trajectory = np.zeros((1, 2)), np.zeros(0)
        >>> found = Landscape2D(x, y, losses[None, None], [""], ["loss"], origin, ["model"], no_trajectory)
        >>> found.grid().shape, found.numbers()
        ((2, 3), {'min': 1.0, 'max': 6.0})

    Attributes:
        x, y: `[columns]` and `[rows]`, coordinates.
        values: `[data, metrics, rows, columns]`.
        data, metrics: names of the first two dimensions.
        marks: `[models, 2]`, where models or the points of a trajectory are.
        labels: of the marks; none for a trajectory.
        explained: the parts of a trajectory's variance along both axes; empty where there is none.
    """

    x: np.ndarray
    y: np.ndarray
    values: np.ndarray
    data: list[str]
    metrics: list[str]
    marks: np.ndarray
    labels: list[str]
    explained: np.ndarray

    def grid(self, data: str = "", metric: str = "loss") -> np.ndarray:
        """Return `[rows, columns]`, of the first data if there is no name."""
        return np.asarray(self.values[self.data.index(data) if data else 0, self.metrics.index(metric)])

    def numbers(self) -> dict[str, float]:
        """Return the least and the largest loss, and what a plane explains of a trajectory."""
        found: dict[str, float] = {}
        for data in self.data:
            name = f"{data}/" if data else ""
            found |= {f"{name}min": float(np.nanmin(self.grid(data))), f"{name}max": float(np.nanmax(self.grid(data)))}
        return found | ({"explained": float(self.explained.sum())} if len(self.explained) else {})

    def figure(self) -> Figure:
        """Draw the losses as contours, in logarithmic levels where all are positive; grey is where they are no numbers."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.8 * len(self.data), 4.0), layout="constrained")
        for axes, data in zip(figure.subplots(1, len(self.data), squeeze=False)[0], self.data, strict=True):
            axes.set_facecolor("0.8")
            losses = np.ma.masked_invalid(self.grid(data))
            if losses.count():
                filled = _contours(axes, self.x, self.y, losses)
                ticks = np.asarray(filled.levels)[::4]
                figure.colorbar(filled, ax=axes, label=f"{data} loss".strip(), ticks=ticks, format="%.3g").minorticks_off()
            if self.labels:
                axes.plot(*self.marks.T, "o", color="white", markeredgecolor="black")
                for label, mark in zip(self.labels, self.marks, strict=True):
                    axes.annotate(label, tuple(mark), xytext=(5, 5), textcoords="offset points")
            else:
                axes.plot(*self.marks.T, color="white", marker=".", markersize=4, linewidth=1)
                axes.plot(*self.marks[-1], "o", color="white", markeredgecolor="black")
            share = [f" ({100 * part:.1f} % of the variance)" for part in self.explained] or ["", ""]
            axes.set(xlabel=f"first direction{share[0]}", ylabel=f"second direction{share[1]}")
        return figure


def landscape_1d(
    objective: Objectives,
    models: Mapping[str, Point] | None = None,
    directions: int | Sequence[Tensor] = 10,
    radius: float = 1.0,
    points: int = 21,
    one_dimensional: OneDimensional = "ignore",
    batch_norm: BatchNormPolicy = "keep",
    shard: Shard = "data",
    seed: int = 0,
    progress: bool = True,
) -> Landscape1D:
    r"""Measure the loss along random lines through one model, or several that are compared.

    $$ f(w + \lambda d), \qquad -r \le \lambda \le r, \qquad \lVert d_{i,j} \rVert = \lVert w_{i,j} \rVert
       \text{ for every filter } j \text{ of every layer } i $$

    All models share the random draws of their directions, each normalised by its own filters, see `random_direction`.

    Example:
        >>> import torch
        >>> from lightning_distopt.analysis import Objective
        >>> f = Objective(torch.nn.Linear(3, 1), lambda net, x: net(x).square().mean(), [torch.eye(3)])
        >>> found = landscape_1d(f, directions=2, points=5, progress=False)
        >>> found.positions, found.curves().shape, bool((found.curves()[:, 2] == f.loss()).all())
        (array([-1. , -0.5,  0. ,  0.5,  1. ]), (2, 5), True)

    Args:
        objective: what is measured; several by name, such as those on training and test data.
        models: by name, as vectors, state dicts, checkpoints or their paths; None: the module as it is.
        directions: how many random ones; or the directions themselves, `[d]` each, which are taken as they are for all models.
        radius: `r`, in lengths of the direction; 1 changes every filter by its own length.
        points: on each line; an odd number, so that the model itself is one of them.
        one_dimensional: "ignore" leaves biases and the parameters of norms as they are, "whole" changes them too.
        batch_norm: "keep" the running statistics of each model, or "reestimate" them at every point, on the first objective.
        shard: whether ranks share the "data" or, if all have the same data, the "points".
        seed: of the random directions.
        progress: whether to show a progress bar.

    Returns:
        The result, the same on every rank. Collective over several.

    Raises:
        ValueError: for options that are unknown or make no sense, or models of another architecture.

    Reference:
        Li et al.: Visualizing the loss landscape of neural nets. NeurIPS 2018.
        Lin et al.: Don't use large mini-batches, use local SGD. ICLR 2020 (ten shared directions).
    """
    count = len(directions) if isinstance(directions, Sequence | Tensor) else directions
    check_landscape(radius, points, count, one_dimensional, batch_norm)
    named = by_name(objective)
    f = next(iter(named.values()))
    places = {name: read_point(f, point, f"model {name!r}") for name, point in (models or {}).items()}
    places = places or {"": Place(f.vector())}
    given = None if isinstance(directions, int) else [read_point(f, d, "a direction").vector for d in directions]
    positions = symmetric(radius, points)
    origins = list(places.values())
    line, d = (-1, -1), origins[0].vector

    def place(k: int) -> Place:
        nonlocal line, d
        (model, index), at = divmod(k // points, count), k % points
        if line != (model, index):  # one direction is held at a time
            w = origins[model].vector
            d = given[index] if given is not None else random_direction(f, seed, index, w, one_dimensional)
            line = model, index
        # w + lambda d
        return Place(origins[model].vector + positions[at] * d, origins[model].rest)

    total = len(origins) * count * points
    values, metrics = measure_points(named, place, total, batch_norm == "reestimate", shard, progress, "Landscape")
    shaped = values.reshape(len(named), len(metrics), len(origins), count, points)
    return Landscape1D(positions, np.moveaxis(shaped, 2, 0), list(places), list(named), metrics)


def landscape_2d(
    objective: Objectives,
    plane: Plane | None = None,
    radius: float | None = None,
    points: int = 21,
    batch_norm: BatchNormPolicy = "keep",
    shard: Shard = "data",
    seed: int = 0,
    progress: bool = True,
) -> Landscape2D:
    r"""Measure the loss over a plane: `f(w_0 + x u + y v)`.

    Example:
        >>> import torch
        >>> from lightning_distopt.analysis import Objective
        >>> f = Objective(torch.nn.Linear(3, 1), lambda net, x: net(x).square().mean(), [torch.eye(3)])
        >>> found = landscape_2d(f, points=5, progress=False)
        >>> found.grid().shape, bool(found.grid()[2, 2] == f.loss())
        ((5, 5), True)

    Args:
        objective: what is measured; several by name, such as those on training and test data.
        plane: from `random_plane`, `trajectory_plane` or `plane_of_three`; None: a random one through the module as it is.
        radius: half the side of the square that is measured, in lengths of `u` and `v`; None: see `Plane.window`.
        points: on each side; an odd number.
        batch_norm: "keep" the running statistics of the plane's origin, or "reestimate" them at every point.
        shard: whether ranks share the "data" or, if all have the same data, the "points".
        seed: of the plane, where there is none.
        progress: whether to show a progress bar.

    Returns:
        The result, the same on every rank. Collective over several.

    Raises:
        ValueError: for options that are unknown or make no sense.
    """
    check_landscape(radius, points, batch_norm=batch_norm)
    named = by_name(objective)
    plane = plane or random_plane(next(iter(named.values())), seed=seed)
    left, right, bottom, top = plane.window(radius)
    x, y = (symmetric((b - a) / 2, points) + (a + b) / 2 for a, b in ((left, right), (bottom, top)))
    values, metrics = measure_points(
        named,
        lambda k: plane.at(float(x[k % points]), float(y[k // points])),
        points**2,
        batch_norm == "reestimate",
        shard,
        progress,
        "Landscape",
    )
    shaped = values.reshape(len(named), len(metrics), points, points)
    return Landscape2D(x, y, shaped, list(named), metrics, plane.marks, list(plane.labels), plane.explained)


def symmetric(radius: float, points: int) -> np.ndarray:
    """Return numbers from `-radius` to `radius` whose middle one is 0 exactly."""
    half = points // 2
    return radius * np.arange(-half, half + 1) / half


def check_landscape(
    radius: float | None, points: int, directions: int = 1, one_dimensional: str = "ignore", batch_norm: str = "keep"
) -> None:
    """Raise a `ValueError` for options of a landscape that make no sense."""
    if not is_whole(points, least=3) or points % 2 == 0:
        raise ValueError(f"`points` must be an odd number from 3 on, so that the middle is one of them; got {points!r}.")
    if radius is not None:
        check_positive("radius", radius)
    check_whole("directions", directions)
    check_choice("one_dimensional", one_dimensional, get_args(OneDimensional))
    check_choice("batch_norm", batch_norm, get_args(BatchNormPolicy))


def _contours(axes: Axes, x: np.ndarray, y: np.ndarray, losses: np.ma.MaskedArray) -> ContourSet:
    from matplotlib.colors import LogNorm

    low, high = float(losses.min()), float(losses.max())
    if not low < high:
        low, high = low - 0.5, high + 0.5
    levels = np.geomspace(low, high, 25) if low > 0 else np.linspace(low, high, 25)
    norm = LogNorm(low, high) if low > 0 else None
    filled = axes.contourf(x, y, losses, levels, cmap="viridis", norm=norm, extend="both")
    axes.contour(x, y, losses, levels[::2], colors="black", linewidths=0.4, alpha=0.5)
    return filled
