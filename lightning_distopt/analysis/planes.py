"""Planes in the space of parameters: random ones, that of three models, and that in which a training moved most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lightning_distopt.analysis.directions import OneDimensional, random_direction
from lightning_distopt.analysis.objective import Objective
from lightning_distopt.analysis.points import Place, Point, read_point


@dataclass
class Plane:
    r"""The points `w_0 + x u + y v` for numbers `x` and `y`.

    Example:
        >>> u, v = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0])
        >>> plane = Plane(Place(torch.ones(3)), u, v)
        >>> plane.at(0.5, -1.0).vector, plane.window()
        (tensor([ 1.5000, -1.0000,  1.0000]), (-1.0, 1.0, -1.0, 1.0))

    Attributes:
        origin: `w_0`, with the buffers that belong to it.
        u, v: `[d]`.
        marks: `[models, 2]`, the coordinates of models in the plane, or of the points next to them.
        labels: of the marks; none for those of a trajectory.
        explained: the parts of a trajectory's variance along `u` and `v`; empty for other planes.
    """

    origin: Place
    u: Tensor
    v: Tensor
    marks: np.ndarray = field(default_factory=lambda: np.zeros((1, 2)))
    labels: list[str] = field(default_factory=list)
    explained: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def at(self, x: float, y: float) -> Place:
        """Return the point with these coordinates."""
        # w_0 + x u + y v
        return Place(self.origin.vector + x * self.u + y * self.v, self.origin.rest)

    def window(self, radius: float | None = None) -> tuple[float, float, float, float]:
        """Return `(x_min, x_max, y_min, y_max)` of a part to look at.

        Args:
            radius: half the sides of a square around the origin; None: what holds all marks and a fifth more on each side,
                or 1 if there is only the origin.
        """
        low, high = self.marks.min(axis=0), self.marks.max(axis=0)
        margin = float((high - low).max()) / 5
        if radius is None and margin > 0:
            return float(low[0] - margin), float(high[0] + margin), float(low[1] - margin), float(high[1] + margin)
        radius = 1.0 if radius is None else radius
        return -radius, radius, -radius, radius


def random_plane(
    objective: Objective, model: Point | None = None, seed: int = 0, one_dimensional: OneDimensional = "ignore"
) -> Plane:
    """Return the plane of two random filter-normalised directions through a model.

    In a space of many dimensions the two are all but orthogonal, and are left as they are.

    Example:
        >>> f = Objective(torch.nn.Linear(3, 2), lambda net, x: net(x).mean(), [torch.ones(4, 3)])
        >>> random_plane(f).at(0, 0).vector.equal(f.vector())
        True

    Args:
        objective: whose parameters span the space.
        model: the origin; None: the module as it is.
        seed: of the directions, the first two of those of lines.
        one_dimensional: "ignore" or "whole", see `filter_normalized`.

    Reference:
        Li et al.: Visualizing the loss landscape of neural nets. NeurIPS 2018.
    """
    origin = Place(objective.vector()) if model is None else read_point(objective, model)
    u, v = (random_direction(objective, seed, k, origin.vector, one_dimensional) for k in (0, 1))
    return Plane(origin, u, v)


def trajectory_plane(objective: Objective, models: Sequence[Point]) -> Plane:
    r"""Return the plane through the last model in which a trajectory varies most, and the trajectory in it.

    $$ M = [w_0 - w_n; \dots; w_n - w_n], \qquad M - \bar M = U \, \mathrm{diag}(s) \, [u, v, \dots]^\top, \qquad
       \text{explained}_k = s_k^2 \Big/ \sum_j s_j^2 $$

    The coordinates of `w_i` are those of `w_i - w_n` along the unit vectors `u` and `v`. Trajectories that are random walks
    explain themselves well in two dimensions too: the share says how much is seen, not that training is simple.

    Example:
        >>> f = Objective(torch.nn.Linear(3, 2), lambda net, x: net(x).mean(), [torch.ones(4, 3)])
        >>> a, b = torch.eye(8)[:2]
        >>> plane = trajectory_plane(f, [0 * a, 3 * a, 3 * a + b])
        >>> plane.marks[-1], float(plane.explained.sum().round(6))
        (array([0., 0.]), 1.0)

    Args:
        objective: whose parameters span the space.
        models: from the first to the last; three at least. They are held in the CPU's memory, about three times in float64.

    Raises:
        ValueError: for fewer than three, or such as lie on one line.

    Reference:
        Li et al.: Visualizing the loss landscape of neural nets. NeurIPS 2018, section 7.
    """
    if len(models) < 3:
        raise ValueError(f"A trajectory needs three models at least to lie in a plane; got {len(models)}.")
    places = [read_point(objective, model, f"model {k} of the trajectory") for k, model in enumerate(models)]
    w = torch.stack([place.vector.to("cpu", torch.float64) for place in places])
    M = w - w[-1]
    _, singular, basis = torch.linalg.svd(M - M.mean(dim=0), full_matrices=False)
    s = singular.numpy()
    if not s[1] > 1e-12 * s[0]:
        raise ValueError("The models of the trajectory lie on one line: draw it by `interpolate`.")
    u, v = (_signed(direction) for direction in basis[:2])
    marks = (M @ torch.stack([u, v]).T).numpy()
    u, v = (direction.to(objective.device, objective.dtype) for direction in (u, v))
    return Plane(places[-1], u, v, marks, explained=s[:2] ** 2 / (s**2).sum())


def plane_of_three(objective: Objective, models: Sequence[Point], labels: Sequence[str] = ("1", "2", "3")) -> Plane:
    r"""Return the plane that three models lie in, with unit vectors, so that coordinates are distances.

    $$ u = w_2 - w_1, \qquad v = (w_3 - w_1) - \frac{\langle w_3 - w_1, u \rangle}{\lVert u \rVert^2} \, u, \qquad
       \hat u = u / \lVert u \rVert, \quad \hat v = v / \lVert v \rVert $$

    Example:
        >>> f = Objective(torch.nn.Linear(3, 2), lambda net, x: net(x).mean(), [torch.ones(4, 3)])
        >>> a, b = torch.eye(8)[:2]
        >>> plane_of_three(f, [0 * a, 3 * a, a + b]).marks
        array([[0., 0.],
               [3., 0.],
               [1., 1.]])

    Args:
        objective: whose parameters span the space.
        models: three. Buffers are those of the first.
        labels: their names.

    Raises:
        ValueError: if there are more or fewer, or they lie on one line.

    Reference:
        Garipov et al.: Loss surfaces, mode connectivity, and fast ensembling of DNNs. NeurIPS 2018.
    """
    if len(models) != 3 or len(labels) != 3:
        raise ValueError(f"A plane takes three models with a label each; got {len(models)} and {len(labels)}.")
    first, *others = (read_point(objective, model, f"model {label}") for model, label in zip(models, labels, strict=True))
    u, w = (place.vector.double() - first.vector.double() for place in others)
    if not u.any():
        raise ValueError("The first two models are the same: they span no plane with the third.")
    # v = (w_3 - w_1) - <w_3 - w_1, u> / |u|^2 u
    v = w - (w @ u) / (u @ u) * u
    if v.norm() <= 1e-12 * w.norm():
        raise ValueError("The three models lie on one line: draw it by `interpolate`.")
    u_hat, v_hat = u / u.norm(), v / v.norm()
    marks = np.array([[0, 0], [float(u.norm()), 0], [float(w @ u_hat), float(w @ v_hat)]])
    return Plane(first, u_hat.to(objective.dtype), v_hat.to(objective.dtype), marks, list(labels))


def _signed(direction: Tensor) -> Tensor:
    """Return the one of the two unit vectors whose largest entry is positive, since either is a singular vector."""
    return direction * direction[direction.abs().argmax()].sign()
