"""Whether a curve of low loss leads from another model to the one that training ends with."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_distopt.analysis.connectivity import Curve, Path, Statistics, check_options, connect, read_ends, sgd
from lightning_distopt.analysis.objective import LossFn, Metrics, Objective
from lightning_distopt.analysis.parameters import Parameters
from lightning_distopt.callbacks.probe import Probe


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
        other: a checkpoint of the same architecture, or a file with a state dict.
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

    Attributes:
        history: a dictionary with the numbers.
        result: the `Path`.

    Raises:
        ValueError: for options that make no sense.
        MisconfigurationException: when training starts, if the file can't be read or holds another architecture.

    References:
        Garipov et al.: Loss surfaces, mode connectivity, and fast ensembling of DNNs. NeurIPS 2018.
    """

    name = "connectivity"

    def __init__(
        self,
        other: str | os.PathLike[str],
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
        save: Sequence[Literal["npz", "json", "png"]] | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__("end", data, samples, "average", loss_fn, metrics, parameters, seed, save, progress=progress)
        check_options(bends, curve, steps, lr, points, batch_norm)
        self.other = os.fspath(other)
        self.options: dict[str, Any] = {"bends": bends, "curve": curve, "steps": steps, "lr": lr, "optimizer": optimizer}
        self.options |= {"points": points, "batch_norm": batch_norm, "seed": seed}

    @property
    def state_key(self) -> str:
        """Several curves may be attached."""
        return f"{super().state_key} from {self.other}: {self.options['curve']} with {self.options['bends']}"

    def check_objectives(self, trainer: pl.Trainer, objectives: Mapping[str, Objective]) -> None:
        """Read the other model, and see whether a curve can lead from it to this one."""
        super().check_objectives(trainer, objectives)
        problem = ""
        try:
            objective = next(iter(objectives.values()))
            read_ends(objective, self._read(), objective.module.state_dict())
        except (ValueError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            problem = f"ModeConnectivity can't start from {self.other!r}: {error}"
        if self._on_any_rank(trainer, bool(problem)):
            raise MisconfigurationException(problem or f"Another rank can't read {self.other!r}.")

    def measure(self, trainer: pl.Trainer, objectives: Mapping[str, Objective]) -> Path:
        """Return the curve to the module as it is now. Collective."""
        module = next(iter(objectives.values())).module
        return connect(objectives, self._read(), module.state_dict(), progress=self.shows_progress(trainer), **self.options)

    def _read(self) -> Mapping[str, Any]:
        found = torch.load(self.other, map_location="cpu", weights_only=True)
        if not isinstance(found, Mapping):
            raise ValueError("It is neither a checkpoint nor a state dict.")
        return found
