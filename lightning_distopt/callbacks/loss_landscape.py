"""The loss around the model, at moments of its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_distopt.analysis.batch_norm import BatchNormPolicy
from lightning_distopt.analysis.directions import OneDimensional
from lightning_distopt.analysis.landscape import Landscape1D, Landscape2D, check_landscape, landscape_1d, landscape_2d
from lightning_distopt.analysis.objective import Objective
from lightning_distopt.analysis.parameters import select_parameters
from lightning_distopt.analysis.planes import Plane, random_plane, trajectory_plane
from lightning_distopt.callbacks.probe import Probe
from lightning_distopt.options import check_choice, check_whole


class LossLandscape(Probe[Landscape1D | Landscape2D]):
    r"""Measure the loss along random lines through the model, or over a plane.

    $$ f(w + \lambda d) \quad \text{or} \quad f(w + x u + y v), \qquad \lVert d_{i,j} \rVert = \lVert w_{i,j} \rVert $$

    for every filter `j` of every layer `i`. Directions depend on `seed` alone, so all moments of a training, and all trainings
    with the same architecture, share them. With `trajectory`, the plane is the one in which the weights moved most so far, and
    their way is drawn into it.

    It logs, for each data, `landscape/train/loss` and `landscape/train/rise`, by how much the loss has risen at the ends of the
    lines; of planes the least and the largest loss, `landscape/train/min` and `/max`, and `landscape/explained`, the part of a
    trajectory's variance that is seen. Training is bit-identical to training without it.

    Example:
        >>> trainer = pl.Trainer(callbacks=[LossLandscape(every=["start", "end"], directions=5)])

    Args:
        every: moments to measure at, see `Probe`.
        dimensions: 1 or 2.
        directions: how many lines; None: 10. A plane has two.
        radius: how far to go, 1 changes every filter by its own length; by default 1, or what a trajectory needs.
        points: on each line or on each side of the plane; an odd number, so that the model itself is one of them.
        trajectory: epochs from one point of the trajectory to the next, for two dimensions. The weights are kept on the CPU; a
            resumed training begins with those that it resumes from.
        one_dimensional: "ignore" leaves biases and the parameters of norms as they are, "whole" changes them too.
        batch_norm: "keep" the running statistics, or "reestimate" them at every point, on the first data.
        **options: see `Probe`: `data`, `samples`, `model`, `loss_fn`, `metrics`, `parameters`, `seed`, `save`, `check`,
            `progress`, `name`.

    Raises:
        ValueError: for options that are unknown or contradict each other.
        MisconfigurationException: when training starts, if there is no direction to go in; see also `Probe`.

    Reference:
        Li et al.: Visualizing the loss landscape of neural nets. NeurIPS 2018.
    """

    name = "landscape"

    def __init__(
        self,
        every: str | Sequence[str] = "end",
        dimensions: Literal[1, 2] = 1,
        directions: int | None = None,
        radius: float | None = None,
        points: int = 21,
        trajectory: int | None = None,
        one_dimensional: OneDimensional = "ignore",
        batch_norm: BatchNormPolicy = "keep",
        **options: Any,
    ) -> None:
        super().__init__(every, **options)
        check_choice("dimensions", dimensions, (1, 2))
        if dimensions == 2 and directions is not None:
            raise ValueError("`directions` are those of lines, and a plane has two: leave it out, or use `dimensions=1`.")
        lines = 10 if directions is None else directions
        check_landscape(radius, points, lines, one_dimensional, batch_norm)
        if trajectory is not None:
            check_whole("trajectory", trajectory)
            if dimensions == 1:
                raise ValueError("A trajectory is drawn into a plane: use `dimensions=2` with `trajectory`.")
        self.dimensions, self.directions, self.radius, self.points = dimensions, lines, radius, points
        self.trajectory, self.one_dimensional, self.batch_norm = trajectory, one_dimensional, batch_norm
        self._way: list[Tensor] = []

    def check_objectives(self, trainer: pl.Trainer, objectives: Mapping[str, Objective]) -> None:
        """Refuse parameters without a direction, and begin the trajectory."""
        f = next(iter(objectives.values()))
        if self.one_dimensional == "ignore" and not any(parameter.dim() > 1 for parameter in f.parameters.values()):
            raise MisconfigurationException(
                f"LossLandscape ignores parameters with one dimension, and {', '.join(list(f.parameters)[:4])} have no more: "
                "use `one_dimensional='whole'`."
            )
        self._way = [f.vector().cpu()]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the trajectory; measure every so many epochs."""
        if self.trajectory is not None and (trainer.current_epoch + 1) % self.trajectory == 0:
            self._keep(trainer)
        super().on_train_epoch_end(trainer, pl_module)

    def let_go(self) -> None:
        """Let go of the data and of the trajectory."""
        super().let_go()
        self._way = []

    def measure(self, trainer: pl.Trainer, objectives: Mapping[str, Objective]) -> Landscape1D | Landscape2D:
        """Return the landscape around the weights that the module has now."""
        options: dict[str, Any] = {"batch_norm": self.batch_norm, "seed": self.seed, "progress": self.shows_progress(trainer)}
        if self.dimensions == 2:
            plane = self._plane(next(iter(objectives.values())))
            return landscape_2d(objectives, plane, self.radius, self.points, **options)
        radius = 1.0 if self.radius is None else self.radius
        options["one_dimensional"] = self.one_dimensional
        return landscape_1d(objectives, None, self.directions, radius, self.points, **options)

    def _plane(self, objective: Objective) -> Plane:
        now = objective.vector()
        if self.trajectory is not None:
            way = self._way if self._way[-1].equal(now.cpu()) else [*self._way, now]
            try:
                return trajectory_plane(objective, way)
            except ValueError as error:
                rank_zero_warn(f"LossLandscape draws a random plane, since there is none of the trajectory: {error}")
        return random_plane(objective, seed=self.seed, one_dimensional=self.one_dimensional)

    def _keep(self, trainer: pl.Trainer) -> None:
        assert trainer.lightning_module is not None
        with self._shown(trainer):
            chosen = select_parameters(trainer.lightning_module, self.parameters).values()
            self._way.append(torch.cat([parameter.detach().reshape(-1).cpu() for parameter in chosen]))
