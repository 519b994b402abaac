"""How training goes: step sizes, distances, and, by extra passes, gradients and the losses of replicas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_distopt.analysis.diagnostics import (
    check_noise,
    distances,
    effective_step_size,
    gradient_diversity,
    gradient_noise,
    replica_losses,
)
from lightning_distopt.analysis.history import History
from lightning_distopt.analysis.objective import LossFn, Metrics, Objective
from lightning_distopt.analysis.parameters import select_parameters
from lightning_distopt.callbacks.everywhere import replicas_differ, sum_over_ranks
from lightning_distopt.callbacks.probe import File
from lightning_distopt.callbacks.probe_data import DerivedLoss, in_precision, load_batches
from lightning_distopt.callbacks.series import SeriesProbe
from lightning_distopt.communication.tensors import squared_distances
from lightning_distopt.strategies.base import ReplicaStrategy
from lightning_distopt.strategies.loaders import batch_samplers, behind

Pass = Literal["noise", "diversity", "losses"]


class TrainingDiagnostics(SeriesProbe[History]):
    r"""Log how training goes, which goes on as without it, to the bit.

    Always, as `diagnostics/...`, from the weights alone, where `x` are those of the average model:

    - `effective_step_size`, `eta / |x|^2` with the learning rate of the next step, and `weight_norm`, `|x|`;
    - `distance_from_start`, the root mean square over replicas of the distance to where this fit began;
    - where replicas differ, `consensus_distance`, that to the average model, and `distance_in_round`, how far they went in the
      last round, before they met.

    And by passes over the data, if they are asked for:

    - "noise": norms of gradients at `x`, their `variance`, and `noise_scale`, the batch size up to which larger ones pay, see
      `analysis.gradient_noise`;
    - "diversity": `zeta`, by how much the gradients of the replicas' own data differ at `x`, where the strategy has a fixed
      `partition`, see `analysis.gradient_diversity`;
    - "losses": `loss_replicas` (mean, `_min`, `_max`) and `loss_average`, of all replicas and of `x`, on the same data, with
      batch-norm statistics estimated anew for each; metrics likewise.

    Example:
        >>> diagnostics = TrainingDiagnostics(every="50 steps", passes=["noise"])
        >>> trainer = pl.Trainer(callbacks=[diagnostics], accelerator="cpu", devices=1)

    Args:
        every: moments to measure at, see `Every`.
        passes: "noise", "diversity", "losses".
        data: of "noise" and "losses": "train", "val", or batches.
        samples: of these data over all ranks, and of the replicas' own data together; None: all.
        loss_fn, metrics: what is measured, see `Probe`.
        seed: of the choice of samples.
        save: what is written when training ends, "npz", "json", "png", of the whole history. None: "npz" and "png", if there
            is a logger.
        check: whether data and losses that are not the same twice are refused.
        progress: whether bars show how far a measurement is.
        name: of the logged values, the folder and the state, see `Probe`.

    Attributes:
        history: a dictionary for each measurement, with `step` and `epoch`.

    Raises:
        ValueError: for unknown options; when training starts, if "noise" has fewer than two batches.
        MisconfigurationException: when training starts, if a pass compares replicas and there are none that differ, or none
            that have data of their own.
    """

    name, several = "diagnostics", False

    def __init__(
        self,
        every: str | Sequence[str] = "100 steps",
        passes: Sequence[Pass] = (),
        data: Literal["train", "val"] | Iterable[Any] = "train",
        samples: int | None = 2048,
        loss_fn: LossFn | None = None,
        metrics: Metrics | None = None,
        seed: int = 0,
        save: Sequence[File] | None = None,
        check: bool = True,
        progress: bool = True,
        name: str | None = None,
    ) -> None:
        if isinstance(passes, str) or not all(one in get_args(Pass) for one in passes):
            raise ValueError(f"`passes` must be a list of {', '.join(map(repr, get_args(Pass)))}; got {passes!r}.")
        super().__init__(every, data, samples, "average", loss_fn, metrics, None, seed, save, check, progress, name)
        self.passes = tuple(passes)
        if not {"noise", "losses"} & set(passes):
            self.data = {}
        if not passes:
            self.loss_fn = _no_loss
        self._own: list[list[Any]] = []  # batches of the data of each replica of this rank
        self._start: Tensor | None = None
        self._met: Tensor | None = None
        self._moved: Tensor | None = None

    # ------------------------------------------------------------------------------------------------------- life cycle
    def check_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to compare replicas where none differ."""
        for one in ("diversity", "losses"):
            if one in self.passes and not replicas_differ(trainer.strategy):
                raise MisconfigurationException(
                    f"The pass {one!r} compares replicas, but {type(trainer.strategy).__name__} keeps none that differ: leave "
                    "it out, or use a strategy of this package with more than one replica."
                )

    def check_objectives(self, trainer: pl.Trainer, objectives: Mapping[str, Objective]) -> None:
        """Refuse to look for noise in a single batch."""
        if "noise" in self.passes:
            objective = next(iter(objectives.values()))
            check_noise(objective.sum_over_ranks(torch.tensor([float(len(objective.batches))])).item())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Load the data; keep where training starts."""
        self._own, self._moved = [], None
        with self._shown(trainer):
            self._start = _weights(pl_module)
        self._met = trainer.strategy.replica_parameters() if replicas_differ(trainer.strategy) else None  # type: ignore[attr-defined]
        super().on_train_start(trainer, pl_module)

    def on_before_round(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note how far replicas have gone since the last round."""
        if self._met is not None:
            now = trainer.strategy.replica_parameters()  # type: ignore[attr-defined]
            self._moved = squared_distances([now], [self._met]).sum()

    def on_after_round(self, trainer: pl.Trainer, pl_module: pl.LightningModule, group: int) -> None:
        """Keep where replicas are."""
        self._met = trainer.strategy.replica_parameters()  # type: ignore[attr-defined]

    def let_go(self) -> None:
        """Let go of weights and data."""
        super().let_go()
        self._start = self._met = self._moved = None
        self._own = []

    # ------------------------------------------------------------------------------------------------------ measurement
    def measure(self, trainer: pl.Trainer, objectives: Mapping[str, Objective]) -> History:
        """Return all values. Collective."""
        strategy: Any = trainer.strategy
        assert trainer.lightning_module is not None
        x = _weights(trainer.lightning_module)
        if self._start is None or self._start.shape != x.shape:  # a callback has set parameters free
            self._start = x
        values = {"effective_step_size": effective_step_size(_learning_rate(trainer), x), "weight_norm": float(x.norm())}
        rows, references, reduce = x[None], {"distance_from_start": self._start}, None
        if replicas_differ(strategy):
            rows, reduce = strategy.replica_parameters(), partial(sum_over_ranks, strategy)
            references["consensus_distance"] = x
        values |= distances(rows, references, reduce)
        if self._moved is not None:
            # ((1/n) sum_i |x_i before the round - x_i after the one before|^2)^(1/2)
            squares = sum_over_ranks(strategy, self._moved.clone())
            values["distance_in_round"] = float((squares / strategy.num_replicas).sqrt())
        objective = next(iter(objectives.values()), None)
        if objective is not None and "noise" in self.passes:
            values |= gradient_noise(objective).numbers()
        if "diversity" in self.passes:
            values |= gradient_diversity(self._own_objectives(trainer)).numbers()
        if objective is not None and "losses" in self.passes:
            first = strategy.communicator.local_replicas[0]
            values |= replica_losses(objective, rows, first, strategy.num_replicas, x).numbers()
        return History(np.array([trainer.global_step]), {name: [value] for name, value in values.items()})

    def _load(self, trainer: pl.Trainer) -> dict[str, list[Any]]:
        if "diversity" in self.passes:
            self._own = self._load_own(trainer)
        return super()._load(trainer)

    def _load_own(self, trainer: pl.Trainer) -> list[list[Any]]:
        """Load samples of each replica's own part of the training data, as many of all."""
        loader, dataset = behind(trainer.train_dataloader)
        samplers = batch_samplers(trainer.train_dataloader)
        lists = samplers[0].shards.lists if samplers else None
        if lists is None:
            raise MisconfigurationException(
                "The pass 'diversity' compares what replicas' own data want, but here replicas keep no data of their own: give "
                "the strategy a fixed `partition`, such as 'dirichlet:0.1' or 'fixed', or leave the pass out."
            )
        own = []
        for sampler in samplers:
            part = lists[sampler.replica]
            count = len(part) if self.samples is None else max(1, self.samples // sampler.shards.n)
            chosen = torch.randperm(len(part), generator=torch.Generator().manual_seed(self.seed))[:count].sort().values
            subset = Subset(dataset, [part[k] for k in chosen.tolist()])
            batches = DataLoader(subset, batch_size=sampler.batch_size or 64, collate_fn=loader.collate_fn)
            own.append(load_batches(trainer, batches, None, self.seed, (0, 1)))
        return own

    def _own_objectives(self, trainer: pl.Trainer) -> list[Objective]:
        module = trainer.lightning_module
        assert module is not None and isinstance(trainer.strategy, ReplicaStrategy)
        loss_fn, reduce = in_precision(trainer, self.loss_fn or DerivedLoss(module)), partial(sum_over_ranks, trainer.strategy)
        return [Objective(module, loss_fn, batches, seed=self.seed, reduce=reduce, check=False) for batches in self._own]


def _weights(module: pl.LightningModule) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in select_parameters(module).values()])


def _learning_rate(trainer: pl.Trainer) -> float:
    """Return the learning rate, the mean over parameters where they have several."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    sizes = [sum(parameter.numel() for parameter in group["params"]) for group in groups]
    return sum(size * float(group["lr"]) for size, group in zip(sizes, groups, strict=True)) / max(1, sum(sizes))


def _no_loss(module: Any, batch: Any) -> Tensor:
    raise AssertionError("No pass goes through the data.")
