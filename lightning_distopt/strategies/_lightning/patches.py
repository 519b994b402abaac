"""Methods of a `Trainer` and its parts that are replaced while it fits."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.trainer.states import RunningStage, TrainerFn

from lightning_distopt.strategies._lightning.logs import Metrics, note_metrics


class Patches:
    """Replaces methods of single objects, and puts everything back on `undo`."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def replace(self, owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> bool:
        """Let `owner.name` be `wrap(original)`; returns False where `owner` has no such method."""
        original = getattr(owner, name, None)
        if original is None:
            return False
        own = name in vars(owner)

        def undo() -> None:
            if own:
                setattr(owner, name, original)
            else:
                vars(owner).pop(name, None)

        setattr(owner, name, wrap(original))
        self._undo.append(undo)
        return True

    def undo(self) -> None:
        """Put all originals back."""
        while self._undo:
            self._undo.pop()()

    # ------------------------------------------------------------------------------------------------ what is replaced
    def shard_training_data(self, trainer: pl.Trainer, prepare: Callable[[Any], Any]) -> None:
        """Let `prepare(loader)` divide training data; Lightning's own sampler shuffles whatever the user said."""

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def prepared(dataloader: Any, shuffle: bool, mode: RunningStage) -> Any:
                if mode == RunningStage.TRAINING and trainer.state.fn == TrainerFn.FITTING:
                    return prepare(dataloader)
                if trainer.world_size == 1 and mode != RunningStage.PREDICTING:
                    return dataloader
                return original(dataloader, shuffle, mode)

            return prepared

        # Without the name Lightning's own distributed sampler divides the data.
        self.replace(trainer._data_connector, "_prepare_dataloader", wrap)

    def run_inside(self, owner: Any, name: str, context: Callable[[], AbstractContextManager[None]]) -> None:
        """Run a method inside `context()`, also when it raises."""

        def wrap(run: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(run)
            def running(*args: Any, **kwargs: Any) -> Any:
                with context():
                    return run(*args, **kwargs)

            return running

        self.replace(owner, name, wrap)

    def validate_inside(
        self,
        trainer: pl.Trainer,
        context: Callable[[], AbstractContextManager[None]],
        isolated: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Run every validation of `fit` inside `context()`, also the sanity check, and what a resume does for one `isolated`.

        Where validation is due right after a checkpoint, a resume makes its iterators, which draw from the random streams.
        """
        validation = trainer.fit_loop.epoch_loop.val_loop
        self.run_inside(validation, "run", context)
        self.run_inside(validation, "increment_progress_to_evaluation_end", isolated)

    def add_validation_metrics(self, trainer: pl.Trainer, metrics: Callable[[], Metrics | None]) -> None:
        """Let `metrics()` be logged with what validation logs, with `_local` after the names; None: what it logs, again."""
        connector = trainer._logger_connector

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def updated() -> dict[str, Any]:
                own: Metrics = {}
                note_metrics(connector, own)
                logged: dict[str, Any] = original()
                given = metrics()
                if trainer.sanity_checking:
                    return logged
                for name, (value, in_logger, in_bar) in (own if given is None else given).items():
                    start, several, index = name.partition("/dataloader_idx_")
                    local = f"{start}_local{several}{index}"
                    connector._callback_metrics[local] = torch.tensor(value, device=trainer.strategy.root_device)
                    if in_logger:
                        logged[local] = connector._logged_metrics[local] = connector._callback_metrics[local]
                    if in_bar:
                        connector._progress_bar_metrics[local] = value
                return logged

            return updated

        self.replace(connector, "update_eval_epoch_metrics", wrap)

    def flags_only_at_rounds(self, trainer: pl.Trainer, at_round: Callable[[], bool]) -> None:
        """Let time flags travel only in batches that ended in a round.

        Lightning broadcasts them at every batch, which couples the ranks: one slow rank would slow all.
        """

        def only_at_rounds(method: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(method)
            def gated(*args: Any, **kwargs: Any) -> Any:
                return method(*args, **kwargs) if at_round() else None

            return gated

        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Timer) or (
                isinstance(callback, ModelCheckpoint) and getattr(callback, "_train_time_interval", None) is not None
            ):
                self.replace(callback, "on_train_batch_end", only_at_rounds)

    def defer_sigterm(self, trainer: pl.Trainer, note: Callable[[], None]) -> None:
        """Let a SIGTERM be noted, not acted upon: the strategy lets all ranks stop at the same round.

        Lightning would broadcast it at every batch, and stop the rank that was signalled in the middle of a round, where the
        others would wait for it.
        """
        connector = trainer._signal_connector

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def noted(signum: int, frame: Any) -> None:
                launcher = trainer.strategy.launcher
                if launcher is not None:
                    launcher.kill(signum)
                note()

            return noted

        self.replace(connector, "_sigterm_notifier_fn", wrap)
        self.replace(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor", lambda original: lambda: None)

    def defer_requeue(self, trainer: pl.Trainer, note: Callable[[], None]) -> None:
        """Let SLURM's requeue signal be noted; Lightning would save a checkpoint wherever the signal hits, in mid-round."""

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def noted(signum: int, frame: Any) -> None:
                note()

            return noted

        self.replace(trainer._signal_connector, "_slurm_sigusr_handler_fn", wrap)

    def after_batch(self, trainer: pl.Trainer, settle: Callable[[pl.Trainer], None]) -> None:
        """Call `settle` after every training batch and its hooks; a checkpoint there is like one of `on_train_batch_end`."""

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def ended(*args: Any, **kwargs: Any) -> Any:
                if trainer.training:
                    settle(trainer)
                return original(*args, **kwargs)

            return ended

        self.replace(trainer._logger_connector, "on_batch_end", wrap)

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Let `owner.name` be `value`."""
        original = getattr(owner, name)
        setattr(owner, name, value)
        self._undo.append(lambda: setattr(owner, name, original))

    def steps_at_rounds(self, trainer: pl.Trainer, passed: Callable[[int], bool]) -> None:
        """Let checkpoints that are due every `n` steps be saved where `passed(n)`, as steps are counted at rounds."""

        class Every(int):
            def __rmod__(self, step: int) -> int:
                return 0 if passed(int(self)) else 1

        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint) and getattr(callback, "_every_n_train_steps", 0) > 0:
                self.set_attribute(callback, "_every_n_train_steps", Every(callback._every_n_train_steps))

    def leave_turns_alone(self, module: pl.LightningModule, is_turn: Callable[[Any], bool]) -> None:
        """Keep the user's `on_before_batch_transfer` away from batches that are none, but turns of a round."""

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def before_transfer(batch: Any, *args: Any, **kwargs: Any) -> Any:
                return batch if is_turn(batch) else original(batch, *args, **kwargs)

            return before_transfer

        self.replace(module, "_on_before_batch_transfer", wrap)

    def handle_signal(self, signum: int, handler: Callable[..., None]) -> None:
        """Handle a signal until `undo`."""
        previous = signal.getsignal(signum)
        signal.signal(signum, handler)
        self._undo.append(functools.partial(signal.signal, signum, previous))

    def agree_on_monitored_values(self, trainer: pl.Trainer, mean: Callable[[Any], Any]) -> None:
        """Let plateau schedulers see the mean of the monitored value, so that learning rates stay equal."""

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def agreed(key: str) -> Any:
                value = original(key)
                return value if value is None else mean(torch.as_tensor(value))

            return agreed

        self.replace(trainer.fit_loop.epoch_loop, "_get_monitor_value", wrap)

    def after_clipping(self, precision_plugin: Any, hook: Callable[[], None]) -> None:
        """Call `hook` between gradient clipping and the optimizer's own mathematics."""

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def clipped(*args: Any, **kwargs: Any) -> None:
                original(*args, **kwargs)
                hook()

            return clipped

        self.replace(precision_plugin, "_after_closure", wrap)

    def around_update(self, precision_plugin: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
        """Call `before` where the optimizer is about to step, and `after` when it has, or has failed."""

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def stepped(*args: Any, **kwargs: Any) -> Any:
                try:
                    return original(*args, **kwargs)
                finally:
                    after()

            return stepped

        self.after_clipping(precision_plugin, before)
        self.replace(precision_plugin, "optimizer_step", wrap)
