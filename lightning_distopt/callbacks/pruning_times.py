"""When masks change while a network is pruned, and how sparse it is then."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_distopt.callbacks.phases import Stretch
from lightning_distopt.models.schedules import training_steps
from lightning_distopt.options import is_whole
from lightning_distopt.sparsity.method import PruningMethod
from lightning_distopt.sparsity.schedule import cubic_sparsity

RAMP = 0.75
"""The part of training after which the sparsity is what it is to be, unless the user says otherwise."""


class PruningTimes:
    """The times of a method, and those that the user gives.

    Example:
        >>> from lightning_distopt.sparsity.dpf import DPF
        >>> times = PruningTimes(DPF(), sparsity=0.9, period=None, ramp=RAMP, fine_tune=None)
        >>> times.total = 400.0
        >>> [step for step in range(50) if times.due(step)], times.sparsity(300)
        ([0, 16, 32, 48], 0.9)

    Args:
        method: whose times they are.
        sparsity: in the end.
        period: optimizer steps between two updates of the masks, or "epoch". None: the method's own.
        ramp: when the sparsity rises.
        fine_tune: when masks stay fixed.

    Attributes:
        total: optimizer steps of training, inf if that is unknown.
        epoch: optimizer steps of an epoch, inf if that is unknown.
        fixed_from: the step after which masks change for the last time, inf if there is none.

    Raises:
        ValueError: for options that are out of range, or that the method has no use for.
    """

    def __init__(self, method: PruningMethod, sparsity: float, period: Any, ramp: Any, fine_tune: Any) -> None:
        name = type(method).__name__
        if period is not None and method.period is None:
            raise ValueError(f"{name} updates masks at steps of its own: leave `period` out.")
        if period is not None and period != "epoch" and not is_whole(period, least=1):
            raise ValueError(f"`period` must be a whole number of optimizer steps, at least 1, or 'epoch'; got {period!r}.")
        if not method.ramp and ramp != RAMP:
            raise ValueError(f"{name} has no sparsity that rises with `ramp`: leave it out.")
        if method.settles and fine_tune is not None:
            raise ValueError(f"{name} says itself when masks change: leave `fine_tune` out.")
        self.method, self.final = method, sparsity
        self.period: int | str | None = method.period if period is None else period
        self.ramp, self.fine_tune = ramp, fine_tune
        self._ramp = Stretch("ramp", ramp, until=True)
        self._fixed = None if fine_tune is None else Stretch("fine_tune", fine_tune, until=False)
        self.total = self.epoch = self.fixed_from = math.inf

    def begin(self, trainer: pl.Trainer) -> None:
        """Learn how long training is, once its data has been loaded.

        Raises:
            MisconfigurationException: if that is not known where it has to be, or it does not go with `ramp` and `fine_tune`.
            ValueError: if it is too short for the method.
        """
        self.total = training_steps(trainer)
        batches = trainer.num_training_batches / trainer.accumulate_grad_batches
        self.epoch = float(max(1, math.ceil(batches))) if math.isfinite(batches) else math.inf
        for stretch in (self._ramp if self.method.ramp else None, self._fixed):
            if stretch is not None:
                stretch.check(self.total, self.epoch)
        self.fixed_from = self._fixed.first_step(self.total, self.epoch) if self._fixed else math.inf
        if self.method.ramp and self._ramp.progress(self.whole, self.total, self.epoch) < 1:
            raise MisconfigurationException(
                f"Training has {self.total:g} optimizer steps, and `ramp={self.ramp!r}` ends after "
                f"{self._ramp.last_step(self.total, self.epoch):g}: train longer, or let `ramp` end sooner."
            )
        if self.method.ramp and self._ramp.progress(int(min(self.fixed_from, self.whole)), self.total, self.epoch) < 1:
            raise MisconfigurationException(
                f"`fine_tune={self.fine_tune!r}` keeps masks as they are before `ramp={self.ramp!r}` has brought them to the "
                "sparsity: let `ramp` end sooner, or `fine_tune` begin later."
            )
        if self.period == "epoch" and math.isinf(self.epoch):
            raise MisconfigurationException(
                "`period='epoch'` needs to know how long an epoch is, which the data does not say: give a number of steps."
            )
        self.method.check(self.total)

    def check_start(self, step: int) -> None:
        """Refuse to begin, without masks, at a step when it is too late for the method.

        Raises:
            MisconfigurationException: if it is so.
        """
        begins = min(self.method.steps(self.whole)) if self.method.period is None else self.fixed_from
        if self.method.rewind_to is not None:
            begins = min(begins, self.method.rewind_to)
        if step > begins:
            raise MisconfigurationException(
                f"The checkpoint of step {step} has no masks, and after step {begins:g} it is too late for "
                f"{type(self.method).__name__} to begin: start from the weights alone, with `load_from_checkpoint`."
            )

    @property
    def whole(self) -> int:
        """The steps of training; a very large number if they are unknown."""
        return int(self.total) if math.isfinite(self.total) else 2**62

    def due(self, step: int) -> bool:
        """Return whether masks change after so many optimizer steps."""
        period = max(1, round(self.epoch)) if self.period == "epoch" else int(self.period or 1)
        if step >= self.fixed_from:
            return self.final > 0 and step == self.fixed_from
        before = (self.whole - 1) // period * period
        # The end is too late for weights to come back, so masks change there only if they are not sparse enough yet.
        lacks = step == self.whole and self.method.ramp and self.sparsity(before) < self.final
        return self.final > 0 and (self.method.due(step, self.whole, period) or lacks)

    def begins(self, step: int) -> bool:
        """Return whether a training without masks, which starts or goes on after so many steps, gets its first ones there.

        That is where masks change; and at any step for a method that trains with the full sparsity from its start.
        """
        return self.due(step) or (not self.method.ramp and self.due(0))

    def sparsity(self, step: int) -> float:
        """Return the sparsity of the masks that are made after so many steps."""
        if not self.method.ramp:
            return self.final
        return cubic_sparsity(self._ramp.progress(step, self.total, self.epoch), self.final)

    def over(self, step: int) -> bool:
        """Return whether no update is due any more, where the method says when that is so."""
        return self.method.period is None and step >= max(self.method.steps(self.whole))
