"""The loss on the straight line between the model and others, at moments of its training."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_distopt.analysis.batch_norm import Statistics
from lightning_distopt.analysis.interpolation import Interpolation, check_line, interpolate
from lightning_distopt.analysis.objective import Objective
from lightning_distopt.analysis.points import Place, called, own_rest, read_state
from lightning_distopt.callbacks.everywhere import replicas_differ, sum_over_ranks
from lightning_distopt.callbacks.probe import Probe
from lightning_distopt.communication.tensors import named_buffers
from lightning_distopt.strategies.base import ReplicaStrategy


class LinearInterpolation(Probe[Interpolation]):
    r"""Measure the loss and the validation metrics on the line between the model as it is and another one.

    $$ x(\lambda) = \lambda x_1 + (1 - \lambda) x_0 $$

    `x_0` is the model that training started with, or one from a checkpoint, and `x_1` the model as it is. With "replicas",
    `x_0` is the average of all replicas and `x_1` each of them in turn, with buffers of its own.

    It logs `interpolation/distance`, and for each data `interpolation/train/loss_0` and `loss_1` at both ends, and `barrier`,
    by how much the loss rises between them; with "replicas" their means. Training is bit-identical to training without it.

    Example:
        >>> trainer = pl.Trainer(callbacks=[LinearInterpolation("start", every="10 epochs", data=["train", "val"])])

    Args:
        other: "start", "replicas", the path of a checkpoint, or a state dict. The start is a part of checkpoints, so it stays
            the same when training is resumed.
        every: moments to measure at, see `Probe`.
        points: from one model to the other, both included.
        margin: how far to go on beyond both, cut to a multiple of the distance between points.
        batch_norm: "interpolate" running statistics like the weights, or "reestimate" them at every point, on the first data.
        **options: see `Probe`: `data`, `samples`, `model`, `loss_fn`, `metrics`, `parameters`, `seed`, `save`, `check`,
            `progress`, `name`.

    Raises:
        ValueError: for options that are unknown or make no sense; when training starts, if the architecture of the other model
            is another one, with the first mismatch, or there is no such checkpoint.
        MisconfigurationException: when training starts, if there are no replicas; see also `Probe`.

    Reference:
        Lin: Optimization for deep learning in distributed and heterogeneous systems, figures 2.5(b) and 11.11.
    """

    name = "interpolation"

    def __init__(
        self,
        other: str | os.PathLike[str] | Mapping[str, Any] = "start",
        every: str | Sequence[str] = "end",
        points: int = 21,
        margin: float = 0.2,
        batch_norm: Statistics = "interpolate",
        **options: Any,
    ) -> None:
        super().__init__(every, **options)
        check_line(points, margin, batch_norm)
        if not isinstance(other, str | os.PathLike | Mapping) or not other:
            raise ValueError(f"`other` must be 'start', 'replicas', the path of a checkpoint or a state dict; got {other!r}.")
        if other == "replicas" and self.model == "local":
            raise ValueError("Replicas are compared with their average: leave `model='local'` out, or use another `other`.")
        self.other, self.points, self.margin, self.batch_norm = other, points, margin, batch_norm
        self._other: dict[str, Tensor] | None = None

    def check_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to look for replicas where there are none."""
        self._other = None
        if self.other == "replicas" and not replicas_differ(trainer.strategy):
            raise MisconfigurationException(
                f"{type(trainer.strategy).__name__} has no replicas that differ: use a strategy such as `LocalSGDStrategy` on "
                "several devices or with `replicas_per_device`, or interpolate from 'start' or a checkpoint."
            )

    def check_objectives(self, trainer: pl.Trainer, objectives: Mapping[str, Objective]) -> None:
        """Load the other model or keep the start, unless that came with a checkpoint."""
        module = next(iter(objectives.values())).module
        if self.other == "start":
            self._other = self._other or {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
        if self.other in ("start", "replicas"):
            return
        problem: Exception | None = None
        try:
            self._other = read_state(self.other, module)
        except ValueError as error:
            problem = error
        if self._on_any_rank(trainer, problem is not None):
            raise problem or MisconfigurationException("Another rank can't read the model to interpolate from.")

    def let_go(self) -> None:
        """Let go of the data and of the other model; the start stays, for checkpoints that are yet to be written."""
        super().let_go()
        if self.other != "start":
            self._other = None

    def state_dict(self) -> dict[str, Any]:
        """Return what has been measured, and the start."""
        start = {"start": self._other} if self.other == "start" and self._other is not None else {}
        return {**super().state_dict(), **start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        super().load_state_dict(state_dict)
        self._other = state_dict.get("start")

    def measure(self, trainer: pl.Trainer, objectives: Mapping[str, Objective]) -> Interpolation:
        """Return what is on the line to the weights that the module has now."""
        options: dict[str, Any] = {"points": self.points, "margin": self.margin, "batch_norm": self.batch_norm}
        options["progress"] = self.shows_progress(trainer)
        f = next(iter(objectives.values()))
        with torch.inference_mode(False):
            now = Place(f.vector(), own_rest(f))
            if self.other != "replicas":
                assert self._other is not None
                line = interpolate(objectives, self._other, now, **options)
                other = "start of training" if self.other == "start" else called(self.other)
                return dataclasses.replace(line, models=[other, f"step {trainer.global_step}"])
            lines = [interpolate(objectives, now, replica, **options) for replica in _replicas(trainer, f, now)]
        values = np.concatenate([line.values for line in lines], axis=2)
        distances = np.concatenate([line.distances for line in lines])
        return dataclasses.replace(lines[0], values=values, distances=distances, models=["average", "replicas"])


def _replicas(trainer: pl.Trainer, f: Objective, average: Place) -> Iterator[Place]:
    """Give all replicas of all ranks to every rank, one after the other. Collective."""
    strategy = trainer.strategy
    assert isinstance(strategy, ReplicaStrategy) and strategy.replicas is not None
    rows = strategy.replica_parameters()
    trainable = {name: p.numel() for name, p in f.module.named_parameters() if p.requires_grad}
    names = [name for name, _, _ in named_buffers(f.module)]
    for replica in range(strategy.num_replicas):
        rank, row = divmod(replica, strategy.replicas_per_device)
        own = rank == strategy.global_rank
        k = row if own else 0
        pieces = dict(zip(trainable, rows[k].split(list(trainable.values())), strict=True))
        buffers = dict(zip(names, strategy.replicas.buffers(k), strict=True))
        sent = {name: pieces[name] for name in f.parameters}
        sent |= {name: b for name, b in buffers.items() if name in average.rest and b.is_floating_point()}
        message = torch.cat([value.reshape(-1) for value in sent.values()])
        message = sum_over_ranks(strategy, message if own else torch.zeros_like(message))
        received = dict(zip(sent, message.split([value.numel() for value in sent.values()]), strict=True))
        vector = f.flatten([received.pop(name) for name in f.parameters])
        yield Place(
            vector, average.rest | {name: value.view_as(sent[name]).to(sent[name].dtype) for name, value in received.items()}
        )
