"""Post-local SGD: when to go from averaging gradients to local steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_distopt.algorithms.schedules import SwitchedPeriod, check_schedule
from lightning_distopt.callbacks.fit_callback import FitCallback
from lightning_distopt.callbacks.lr_decays import LearningRateDecays
from lightning_distopt.models.schedules import training_steps
from lightning_distopt.options import is_whole
from lightning_distopt.strategies import LocalSGDStrategy


class PostLocalSwitch(FitCallback):
    r"""Average gradients up to a switch, and train locally with `H` steps between rounds from there on.

    $$ H_t = 1 \text{ if } t < T', \quad H \text{ otherwise} $$

    (algorithm 8). The thesis switches at the first decay of the learning rate, which is the default: the large-batch phase
    ends where its noise would start to matter. Rounds are counted from the switch; every replica goes on with a copy of the
    common optimizer state. A switch that has not come when training ends, or that changes nothing, warns.

    Example:
        >>> from lightning_distopt import LocalSGDStrategy, PostLocalSwitch
        >>> strategy, switch = LocalSGDStrategy(sync_period=16), PostLocalSwitch()
        >>> PostLocalSwitch(at=1000, sync_period=8), PostLocalSwitch(at="epoch:5"), PostLocalSwitch(at=0.5)
        (PostLocalSwitch(at=1000, sync_period=8), PostLocalSwitch(at='epoch:5'), PostLocalSwitch(at=0.5))

    Args:
        at: `T'`: a step (a whole number, or "step:1000"), an epoch ("epoch:5": from its first step), a fraction of training
            (a number between 0 and 1), or "first_lr_decay": the first step whose learning rate is at most half of the largest
            so far. So with milestones it is the first one, with a cosine about half way, and warm-up never counts.
        sync_period: `H` after the switch, a number or a schedule; by default that of the strategy.

    Raises:
        ValueError: for an `at` that is none of these, or `H < 1`.
        MisconfigurationException: when fitting starts, if the strategy is not `LocalSGDStrategy`.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, section 2.4, algorithm 8.
    """

    def __init__(self, at: int | float | str = "first_lr_decay", sync_period: int | Callable[[int], int] | None = None) -> None:
        super().__init__()
        self._kind, self._value = _parse(at)
        if sync_period is not None:
            check_schedule(sync_period)
        self.at, self.sync_period = at, sync_period
        self.switched_at: int | None = None
        self._strategy: LocalSGDStrategy | None = None
        self._decays = LearningRateDecays()

    def __repr__(self) -> str:
        period = "" if self.sync_period is None else f", sync_period={self.sync_period!r}"
        return f"PostLocalSwitch(at={self.at!r}{period})"

    def setup_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the two-phase schedule into the strategy's `sync_period`."""
        strategy = trainer.strategy
        if not isinstance(strategy, LocalSGDStrategy):
            raise MisconfigurationException(
                f"PostLocalSwitch changes `sync_period` of LocalSGDStrategy, but the strategy is {type(strategy).__name__}: "
                "use `Trainer(strategy=LocalSGDStrategy(...))`."
            )
        self._strategy, self._own_period = strategy, strategy.sync_period
        self._schedule = SwitchedPeriod(self._own_period if self.sync_period is None else self.sync_period)
        self.switched_at, self._decays = None, LearningRateDecays()
        strategy.sync_period = self._schedule
        if not self._changes_something:
            rank_zero_warn(
                "PostLocalSwitch has nothing to switch to, as H = 1 after the switch too, which averages at every step: give "
                "the strategy, or the callback, a `sync_period` above 1."
            )

    @property
    def _changes_something(self) -> bool:
        """Whether training goes on otherwise after the switch, with local steps or in blocks."""
        assert self._strategy is not None
        return self._schedule.sync_period != 1 or self._strategy.algorithm.block_period is not None  # type: ignore[attr-defined]

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the strategy its own period back."""
        self._give_back()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the strategy its own period back."""
        self._give_back()

    def _give_back(self) -> None:
        if self._strategy is not None:
            self._strategy.sync_period, self._strategy = self._own_period, None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Settle the step of the switch where it is known, unless training has gone past it before the checkpoint."""
        assert self._strategy is not None
        now = self._strategy.steps
        if self.switched_at is not None and self.switched_at > now:  # what the checkpoint was to wait for
            self.switched_at = None
        if self.switched_at is None:
            self.switched_at = self._known_step(trainer, now)
        self._schedule.steps = self.switched_at

    def _known_step(self, trainer: pl.Trainer, now: int) -> int | None:
        """Return the step of the switch, which is not before `now`; None where it shows while training."""
        if self._kind == "step":
            return max(now, int(self._value))
        if self._kind == "fraction":
            steps = training_steps(trainer)
            if math.isinf(steps):
                raise MisconfigurationException(
                    f"PostLocalSwitch(at={self.at!r}) needs to know how long training is: set `max_steps` or `max_epochs`, "
                    "or give a step."
                )
            return max(now, round(self._value * steps))
        return None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch for the epoch, or for the decay."""
        if self.switched_at is not None:
            return
        due = False
        if self._kind == "epoch":
            due = trainer.current_epoch >= self._value
        elif self._kind == "first_lr_decay":
            due = self._decays.see(trainer)
        if due:
            # A step that has begun (gradients accumulate) ends as it began: the schedule is asked when a round starts.
            assert self._strategy is not None
            self.switched_at = self._schedule.steps = self._strategy.steps

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the switch has not come: training was mini-batch SGD."""
        assert self._strategy is not None
        steps = self._strategy.steps
        if not self._changes_something or (self.switched_at is not None and self.switched_at < steps):
            return
        if self._kind == "first_lr_decay":
            remedy = "The learning rate has never fallen to half of the largest: use a scheduler that does so, or another `at`."
        else:
            remedy = "Let the switch come earlier, or train longer."
        rank_zero_warn(
            f"PostLocalSwitch(at={self.at!r}) has not switched: training has ended after step {steps}, and every step has "
            f"averaged, as DDP does. {remedy}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return when the switch happened, and what has been seen before it."""
        return {"switched_at": self.switched_at, "decays": self._decays.state_dict()}

    def resume(self, state_dict: dict[str, Any]) -> None:
        """Continue before or after the switch."""
        self.switched_at = state_dict["switched_at"]
        self._decays.load_state_dict(state_dict["decays"])


def _parse(at: Any) -> tuple[str, float]:
    if isinstance(at, str):
        kind, _, value = at.partition(":")
        if at == "first_lr_decay":
            return "first_lr_decay", 0
        if kind in ("step", "epoch") and value.isdigit():
            return kind, int(value)
    elif is_whole(at, least=0):
        return "step", at
    elif isinstance(at, float) and 0 <= at <= 1:
        return "fraction", at
    raise ValueError(
        f"`at={at!r}` is no moment to switch: use a step (1000), 'epoch:5', a fraction of training (0.5) or 'first_lr_decay'."
    )
