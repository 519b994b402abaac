"""Whether a curve of low loss leads from another model to the one that training ends with."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_distopt.analysis.batch_norm import Statistics
from lightning_distopt.analysis.connectivity import Curve, Path, check_options, connect, read_ends, sgd
from lightning_distopt.analysis.objective import LossFn, Metrics, Objective
from lightning_distopt.analysis.parameters import Parameters
from lightning_distopt.analysis.points import called, read_state
from lightning_distopt.callbacks.probe import File, Probe


class ModeConnectivity(Probe[Path]):
    r"""Train a curve from another model to the one that training ends with, along which the loss is low.

    $$ \min_{x_1, \dots, x_n} \; \mathbb{E}_{t \sim U[0, 1]} \, L(\varphi(t)), \qquad
       \varphi(0) = \text{the other}, \quad \varphi(1) = \text{this model} $$

    The curve is trained when training has ended, on the first data; it is measured on all of them, beside the straight line.
    Logged are `connectivity/<data>/loss_max`, `_min`, `_mean`, `_integral` and `_barrier`, the same of metrics, and those of
    the straight line, `<data>/straight_loss_max` and so on; see `analysis.Path`. Both models stay as they are, to the bit.

    Example:
        >>> probe = ModeConnectivity("other.ckpt", bends=3, data=["train", "val"])
        >>> trainer = pl.Trainer(callbacks=[probe], accelerator="cpu", devices=1)

    Args:
        other: a state dict of the same architecture, or the path of a checkpoint, which is read when training starts.
        bends: `n`.
        curve: "bezier" or "chain".
        steps: of the curve's training, each on one batch of every rank.
        lr: its learning rate.
        optimizer: called with `(bends, lr=lr)`; by default SGD with a momentum of 0.9.
        points: at how many `t` the curve is measured.
        batch_norm: "reestimate" for new statistics at every point, from the training data, or "interpolate".
        data: "train", "val", both as a list, or batches: the first ones are trained on.
        samples: of each data, over all ranks; None: all.
        loss_fn, metrics: what is measured, see `Probe`.
        parameters: those that the curve goes through; None: all that are trainable.
        seed: of `t`, the order of batches and the choice of samples.
        save: "npz" (with the models), "json", "png". None: "npz" and "png", if there is a logger.
        progress: whether bars show how far it is.
        name: of the logged values, the folder and the state, see `Probe`.

    Attributes:
        history: a dictionary with the numbers.
        result: the `Path`.

    Raises:
        ValueError: for options that make no sense; when training starts, if there is no such checkpoint, or its architecture
            is another one.
        MisconfigurationException: when training starts, see `Probe`.

    Reference:
        Garipov et al.: Loss surfaces, mode connectivity, and fast ensembling of DNNs. NeurIPS 2018.
    """

    name = "connectivity"

    def __init__(
        self,
        other: str | os.PathLike[str] | Mapping[str, Any],
        bends: int = 1,
        curve: Curve = "bezier",
        steps: int = 1000,
        lr: float = 0.03,
        optimizer: Callable[..., torch.optim.Optimizer] = sgd,
        points: int = 21,
        batch_norm: Statistics = "reestimate",
        data: Literal["train", "val"] | Sequence[str] | Iterable[Any] = "train",
        samples: int | None = 2048,
        loss_fn: LossFn | None = None,
        metrics: Metrics | None = None,
        parameters: Parameters | None = None,
        seed: int = 0,
        save: Sequence[File] | None = None,
        progress: bool = True,
        name: str | None = None,
    ) -> None:
        common: dict[str, Any] = {"progress": progress, "name": name}
        super().__init__("end", data, samples, "average", loss_fn, metrics, parameters, seed, save, **common)
        check_options(bends, curve, steps, lr, points, batch_norm)
        if not isinstance(other, str | os.PathLike | Mapping) or not other:
            raise ValueError(f"`other` must be the path of a checkpoint or a state dict; got {other!r}.")
        self.other = other
        self._other: dict[str, Tensor] | None = None
        self.options: dict[str, Any] = {"bends": bends, "curve": curve, "steps": steps, "lr": lr, "optimizer": optimizer}
        self.options |= {"points": points, "batch_norm": batch_norm, "seed": seed}

    def check_objectives(self, trainer: pl.Trainer, objectives: Mapping[str, Objective]) -> None:
        """Read the other model, and see whether a curve can lead from it to this one."""
        objective = next(iter(objectives.values()))
        problem: Exception | None = None
        try:
            self._other = read_state(self.other, objective.module)
            name = "The state dict" if isinstance(self.other, Mapping) else repr(os.fspath(self.other))
            read_ends(objective, self._other, objective.module.state_dict(), (name, "This model"))
        except ValueError as error:
            problem = error
        if self._on_any_rank(trainer, problem is not None):
            raise problem or MisconfigurationException("Another rank can't read the model that the curve starts from.")

    def let_go(self) -> None:
        """Let go of the data and of the other model."""
        super().let_go()
        self._other = None

    def measure(self, trainer: pl.Trainer, objectives: Mapping[str, Objective]) -> Path:
        """Return the curve to the module as it is now. Collective."""
        module = next(iter(objectives.values())).module
        assert self._other is not None
        path = connect(objectives, self._other, module.state_dict(), progress=self.shows_progress(trainer), **self.options)
        return dataclasses.replace(path, models=[called(self.other), f"step {trainer.global_step}"])
