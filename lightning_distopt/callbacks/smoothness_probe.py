"""How smooth the loss is along the updates of training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_distopt.analysis.objective import LossFn, Objective
from lightning_distopt.analysis.parameters import Parameters, select_parameters
from lightning_distopt.analysis.smoothness import Smoothness, check_steps, estimate_smoothness
from lightning_distopt.analysis.undisturbed import Mode
from lightning_distopt.callbacks.probe import File, not_training
from lightning_distopt.callbacks.series import SeriesProbe
from lightning_distopt.options import check_choice
from lightning_distopt.strategies import FederatedStrategy


class SmoothnessProbe(SeriesProbe[Smoothness]):
    r"""Estimate the Lipschitz constant of the gradient along updates, while training goes on as without it, to the bit.

    $$ \hat L = \max_{k = 1, \dots, K} \frac{\| \nabla f(x + s_k) - \nabla f(x) \|}{\| s_k \|}, \qquad
       s_k = k \, c \, (x^+ - x) $$

    `x` are the weights before an optimizer step, and `x+` those after it: at every so many steps, `K` further ones are tried
    from `x` in the direction that training has taken, each a part `c` of what it was. Logged are `smoothness/lipschitz`,
    `smoothness/gradient_norm` at `x`, and `smoothness/loss_change` at the end of the way. A step of length zero is left out,
    as where the learning rate is zero.

    Example:
        >>> probe = SmoothnessProbe(every="8 steps")
        >>> trainer = pl.Trainer(callbacks=[probe], accelerator="cpu", devices=1)

    Args:
        every: "100 steps", or another number of them.
        steps: `K`.
        size: `c`.
        data: `f` is the mean loss over: "batch", the mini-batch of the step (of each rank's first replica); or what other
            probes take: "train", "val", or batches.
        samples: of the data in all, where it is not the mini-batch; None: all.
        model: "average" of all replicas, or "local": every rank measures its first replica; see `Probe`.
        mode: "train", the function that training sees, with batch norm by the statistics of each batch, and the same units
            dropped wherever the gradient is taken; or "eval".
        loss_fn: `loss_fn(module, batch)`; by default what `training_step` returns.
        parameters: those along which the update is looked at, by patterns or a predicate; None: all that are trainable.
        seed: of all that is drawn.
        save: what is written when training ends, "npz", "json", "png", of the whole history. None: "npz" and "png", if there
            is a logger.
        progress: whether bars show how far a measurement is.
        name: of the logged values, the folder and the state, see `Probe`.

    Attributes:
        history: a dictionary for each measurement, with `step` and `epoch`.
        result: the last one, with the ratios of all its steps.

    Raises:
        ValueError: for options that make no sense.
        MisconfigurationException: when training starts, with clients, whose steps are counted by rounds; see also `Probe`.

    Reference:
        Lin: Optimization for deep learning in distributed and heterogeneous systems (eight steps of 0.3 in chapter 3; of 0.2,
        every eight steps, in chapter 5).
    """

    name, several = "smoothness", False

    def __init__(
        self,
        every: str = "100 steps",
        steps: int = 8,
        size: float = 0.2,
        data: Literal["batch", "train", "val"] | Iterable[Any] = "batch",
        samples: int | None = 2048,
        model: Literal["average", "local"] = "average",
        mode: Mode = "train",
        loss_fn: LossFn | None = None,
        parameters: Parameters | None = None,
        seed: int = 0,
        save: Sequence[File] | None = None,
        progress: bool = True,
        name: str | None = None,
    ) -> None:
        check_steps(steps, size)
        check_choice("mode", mode, get_args(Mode))
        of_batch = isinstance(data, str) and data == "batch"
        super().__init__(
            every,
            "train" if of_batch else data,  # type: ignore[arg-type]
            samples,
            model,
            loss_fn,
            parameters=parameters,
            seed=seed,
            save=save,
            progress=progress,
            name=name,
        )
        if not all(moment.rstrip("s").endswith("step") for moment in self.every.moments):
            raise ValueError(f"SmoothnessProbe looks at updates, so `every` must be a number of steps; got {every!r}.")
        if of_batch:
            self.data = {}
        self.steps, self.size, self.mode = steps, size, mode
        self._before: Tensor | None = None
        self._update: Tensor | None = None

    def check_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse clients."""
        if isinstance(trainer.strategy, FederatedStrategy):
            raise MisconfigurationException(
                "SmoothnessProbe looks at single steps, but those of clients are counted when their round ends: leave it "
                "out, or use another strategy."
            )

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the weights before a step that will be looked at. Collective, where replicas differ."""
        last = self._step + max(1, len(trainer.optimizers))  # each of which may step in one batch
        if self._before is None and self.every.due("step", self._step, last):
            with self._shown(trainer):
                self._before = self._weights(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure along the step, if there was one."""
        stepped = trainer.global_step > self._step
        if not self.data:
            self._batches = {"batch": [batch]}
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if stepped:
            self._before = self._update = None
        if not self.data:
            self._batches = {}

    def let_go(self) -> None:
        """Let go of the data and of weights."""
        super().let_go()
        self._before = self._update = None

    def measure(self, trainer: pl.Trainer, objectives: Mapping[str, Objective]) -> Smoothness:
        """Return the estimate along the last update. Collective."""
        (objective,) = objectives.values()
        objective.mode = self.mode
        assert self._update is not None
        return estimate_smoothness(objective, self._update, self._before, self.steps, self.size, self.shows_progress(trainer))

    def _measure(self, trainer: pl.Trainer, **log_options: bool) -> None:
        if self._before is None:
            return
        assert trainer.lightning_module is not None
        with not_training(trainer.strategy), self._shown(trainer):
            after = self._weights(trainer.lightning_module)
            # x+ - x; a schedule that has set parameters free meanwhile has changed what there is to compare
            self._update = after - self._before if after.shape == self._before.shape else torch.zeros_like(after)
            length = float(self._update.double().norm())
            if not self._on_any_rank(trainer, not 0 < length < math.inf):
                super()._measure(trainer, **log_options)

    def _weights(self, module: pl.LightningModule) -> Tensor:
        chosen = select_parameters(module, self.parameters).values()
        return torch.cat([parameter.detach().reshape(-1) for parameter in chosen])
