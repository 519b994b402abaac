"""The one place that touches Lightning's private names.

Each function degrades with a warning where a name is missing, so that an unknown Lightning version still trains;
`tests/strategies/test_lightning_names.py` checks that each name exists.
"""

from __future__ import annotations

import copy
import functools
import inspect
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, SequentialSampler

Metrics = dict[str, tuple[float, bool, bool]]
"""By name: a value, and whether it goes to loggers and to the progress bar."""

PRIVATE_NAMES = (
    ("fit_loop.epoch_loop", "_broadcast_sigterm_tensor"),  # 2.6.5 and later; earlier versions have no such collective
    ("fit_loop.epoch_loop", "_num_ready_batches_reached"),
    ("fit_loop.epoch_loop", "_get_monitor_value"),
    ("fit_loop.epoch_loop", "_results"),
    ("fit_loop", "_should_accumulate"),
    ("fit_loop", "_combined_loader_states_to_load"),
    ("fit_loop", "_combined_loader"),
    ("fit_loop", "_data_fetcher"),
    ("_data_connector", "_prepare_dataloader"),
    ("precision_plugin", "_after_closure"),
    ("_signal_connector", "_sigterm_notifier_fn"),
    ("_signal_connector", "received_sigterm"),
    ("_signal_connector", "_slurm_sigusr_handler_fn"),
    ("_logger_connector", "on_batch_end"),
    ("_logger_connector", "update_eval_epoch_metrics"),
    ("_logger_connector", "_callback_metrics"),
    ("_logger_connector", "_logged_metrics"),
    ("_logger_connector", "_progress_bar_metrics"),
    ("fit_loop.epoch_loop.val_loop", "_restarting"),
    ("fit_loop.epoch_loop.val_loop", "_seen_batches_per_dataloader"),
    ("_accelerator_connector", "use_distributed_sampler"),
    ("_checkpoint_connector", "dump_checkpoint"),
)


SEVERAL_ROWS = {
    "_num_ready_batches_reached",
    "_results",
    "_should_accumulate",
    "_prepare_dataloader",
    "_after_closure",
}
"""Names without which a rank can't host several replicas; without the others training goes on, with a warning."""


LOCAL_METRICS = {
    "update_eval_epoch_metrics",
    "_callback_metrics",
    "_logged_metrics",
    "_progress_bar_metrics",
    "_restarting",
    "_seen_batches_per_dataloader",
}
"""Names without which replicas can't be evaluated beside their average; nothing else needs them."""


def check_private_names(
    trainer: pl.Trainer, replicas_per_device: int, transforms_gradients: bool, evaluates_both: bool = False
) -> None:
    """Look for every private name before training starts.

    Raises:
        MisconfigurationException: if one is missing that this training can't do without.
    """
    for path, name in PRIVATE_NAMES:
        owner: Any = trainer
        for part in path.split("."):
            owner = getattr(owner, part, None)
        if hasattr(owner, name) or name == "_broadcast_sigterm_tensor":
            continue
        lacks = f"This Lightning version ({pl.__version__}) is unknown: it lacks `{name}`"
        if transforms_gradients and name == "_after_closure":
            raise MisconfigurationException(f"{lacks}, which this algorithm needs. Install lightning 2.6.")
        if name in LOCAL_METRICS:
            if evaluates_both:
                raise MisconfigurationException(
                    f"{lacks}, which `evaluate='both'` needs. Use `evaluate='average'`, or install lightning 2.6."
                )
            continue
        if replicas_per_device > 1 and name in SEVERAL_ROWS:
            raise MisconfigurationException(
                f"{lacks}, which several replicas in one process need. Use `replicas_per_device=1`, or install lightning 2.6."
            )
        rank_zero_warn(f"{lacks}. Training goes on without what depends on it.")


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
    def shard_training_data(self, trainer: pl.Trainer, prepare: Callable[[Any, Callable[..., Any]], Any]) -> None:
        """Let `prepare(loader, original)` divide training data; Lightning's own sampler shuffles whatever the user said."""

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def prepared(dataloader: Any, shuffle: bool, mode: RunningStage) -> Any:
                if mode == RunningStage.TRAINING and trainer.state.fn == TrainerFn.FITTING:
                    return prepare(dataloader, functools.partial(original, shuffle=shuffle, mode=mode))
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
                _note_metrics(connector, own)
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


def validate_unseen(trainer: pl.Trainer) -> Metrics:
    """Run the validation of `fit` once, so that only the module notices: no callback, no logger, no progress.

    Returns:
        What was logged for the epoch. Nothing, where there is no validation.
    """
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    loop.setup_data()  # loaders stay
    if loop.skip:
        return {}
    before = [(owner, dict(vars(owner))) for owner in (loop, connector)]
    callbacks, loggers = trainer.callbacks, trainer.loggers  # type: ignore[attr-defined]
    seen: Metrics = {}

    def note() -> dict[str, Any]:
        return _note_metrics(connector, seen)

    try:
        loop.batch_progress, loop._restarting = copy.deepcopy(loop.batch_progress), False
        loop._seen_batches_per_dataloader = loop._seen_batches_per_dataloader.copy()
        connector._callback_metrics, connector._logged_metrics = {}, {}
        connector._progress_bar_metrics = {}
        vars(connector)["update_eval_epoch_metrics"] = note
        trainer.callbacks, trainer.loggers = [], [DummyLogger() for _ in loggers]  # type: ignore[attr-defined]
        type(loop).run(loop)
    finally:
        trainer.callbacks, trainer.loggers = callbacks, loggers  # type: ignore[attr-defined]
        for owner, attributes in before:
            vars(owner).clear()
            vars(owner).update(attributes)
    return seen


def _note_metrics(connector: Any, seen: Metrics) -> dict[str, Any]:
    """Add to `seen` what is logged for the epoch by now, and return the part that goes to loggers."""
    metrics = connector.metrics
    for name, value in metrics["callback"].items():
        seen[name] = float(value), name in metrics["log"], name in metrics["pbar"]
    logged: dict[str, Any] = metrics["log"]
    return logged


def broadcast_module(module: torch.nn.Module) -> None:
    """Copy parameters and buffers of rank 0 to all ranks."""
    from lightning.pytorch.overrides.distributed import _sync_module_states

    _sync_module_states(module)


def augment_message(exception: BaseException, pattern: str, message: str) -> None:
    """Replace the message of an exception that matches `pattern`."""
    from lightning.pytorch.utilities.exceptions import _augment_message

    _augment_message(exception, pattern, message)


def stop_for_sigterm(trainer: pl.Trainer) -> None:
    """Let Lightning end training after this batch, as it does when it has received SIGTERM."""
    trainer._signal_connector.received_sigterm = True


def requeue_handler(trainer: pl.Trainer) -> Callable[[], Any]:
    """Return what Lightning does at SLURM's requeue signal, for a rank that has not had it."""
    connector = trainer._signal_connector
    return functools.partial(type(connector)._slurm_sigusr_handler_fn, connector, int(signal.SIGUSR1), None)  # type: ignore[arg-type]


def dump_checkpoint(trainer: pl.Trainer) -> dict[str, Any]:
    """Return what Lightning would write into a checkpoint."""
    return trainer._checkpoint_connector.dump_checkpoint()


def divides_data(trainer: pl.Trainer) -> bool:
    """Return whether the user leaves the division of data to the strategy (`use_distributed_sampler`)."""
    return bool(getattr(trainer._accelerator_connector, "use_distributed_sampler", True))


def move_optimizers(optimizers: list[Any], device: torch.device) -> None:
    """Move the state of optimizers to a device."""
    from lightning.fabric.utilities.optimizer import _optimizers_to_device

    _optimizers_to_device(optimizers, device)


def clip_gradients(strategy: Any, optimizer: Any) -> None:
    """Run the hooks before an optimizer step and clip the active replica's gradients, as Lightning does."""
    strategy.precision_plugin._after_closure(strategy.lightning_module, optimizer)


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Return whether the batch under way only accumulates gradients."""
    return bool(trainer.fit_loop._should_accumulate())


def more_batches_follow(trainer: pl.Trainer) -> bool:
    """Return whether the batch under way is not the last of its epoch."""
    return not trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def resume_loaders(trainer: pl.Trainer, only: Callable[[Any], bool]) -> None:
    """Bring loaders to the position of the checkpoint where Lightning has not done so.

    It has not where they were made before the checkpoint was read (`trainer.estimated_stepping_batches` in
    `configure_optimizers` makes them), nor at the end of an epoch, where a loader begins anew: there `only` says whether all
    the same it has to be told the epoch.
    """
    loop: Any = trainer.fit_loop
    names = ("_combined_loader_states_to_load", "_combined_loader", "_data_fetcher")
    states, loader, fetcher = (getattr(loop, name, None) for name in names)
    if not states or loader is None or fetcher is None:
        return
    stateful = [one for one in loader.flattened if hasattr(one, "load_state_dict")]
    if loop.restarting or all(only(one) for one in stateful):
        if not hasattr(loader, "_load_state_dicts"):
            lacks = f"This Lightning version ({pl.__version__}) is unknown: it lacks `_load_state_dicts`"
            rank_zero_warn(f"{lacks}. Loaders begin anew.")
            return
        loader._load_state_dicts(states)
        loop._combined_loader_states_to_load = []
        iter(fetcher)


def epoch_length(trainer: pl.Trainer) -> float:
    """Return the batches of this epoch, infinite where that is not known."""
    return float(trainer.num_training_batches)


def starts_over(trainer: pl.Trainer) -> bool:
    """Return whether the shorter ones of several loaders start over within an epoch."""
    return getattr(getattr(trainer.fit_loop, "_combined_loader", None), "_mode", "") == "max_size_cycle"


def batches_trained(trainer: pl.Trainer) -> int:
    """Return how many batches of this epoch have been trained."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def batches_trained_in_all(trainer: pl.Trainer) -> int:
    """Return how many batches have been trained in all epochs."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.ready)


def validation_loaders(trainer: pl.Trainer) -> list[DataLoader[Any]]:
    """Return the loaders of all validation data, without what divides it among ranks.

    Raises:
        MisconfigurationException: if there is none, or it can't be gone through as a whole.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    if trainer.enable_validation:
        loop.setup_data()  # loaders stay
    combined = getattr(loop, "_combined_loader", None)
    loaders = [] if combined is None else combined.flattened
    if not loaders or not all(isinstance(one, DataLoader) for one in loaders):
        raise MisconfigurationException(
            "The server has to evaluate models on validation data: give the Trainer validation loaders (of torch's class "
            "`DataLoader`), and a `limit_val_batches` above 0."
        )
    return [
        one
        if trainer.world_size == 1
        else rebuild_dataloader(one, sampler=SequentialSampler(one.dataset), batch_sampler=None, batch_size=one.batch_size)
        for one in loaders
    ]


def log_batch(trainer: pl.Trainer, batch: Any) -> None:
    """Let `self.log` infer its batch size from `batch`."""
    results = trainer.fit_loop.epoch_loop._results
    results.batch, results.batch_size = batch, None


@contextmanager
def logs_apart(trainer: pl.Trainer) -> Iterator[None]:
    """Forget what `self.log` is given inside the body."""
    loop = trainer.fit_loop.epoch_loop
    own = loop._results
    loop._results = type(own)(training=True)
    try:
        yield
    finally:
        loop._results = own


def agree_on_logs(trainer: pl.Trainer, gather: Callable[[Any], list[Any]]) -> None:
    """Let all ranks have logged the same names for this epoch, in the same order, as collectives at its end need it.

    What a rank has not logged counts for nothing there.
    """
    results = trainer.fit_loop.epoch_loop._results
    own = {
        key: {
            **{option: getattr(logged.meta, option) for option in ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch")},
            "reduce_fx": logged.meta.reduce_fx.__name__,
            "metric_attribute": logged.meta.metric_attribute,
            "sync_dist": logged.meta.sync.should,
            "dtype": str(logged.value.dtype).removeprefix("torch.") if logged.is_tensor else "",
        }
        for key, logged in results.valid_items()
        if logged.meta.on_epoch
    }
    everywhere: list[dict[str, dict[str, Any]]] = gather(own)
    known = {key: options for logged in everywhere for key, options in logged.items()}
    if all(list(logged) == list(known) for logged in everywhere):
        return
    for key in set(known) - set(own):
        options = known[key]
        dtype, attribute = options.pop("dtype"), options["metric_attribute"]
        if key not in results:
            value = torch.zeros(()) if attribute is None else trainer.lightning_module.get_submodule(attribute)
            results.log(
                value=value.to(trainer.strategy.root_device), batch_size=0, sync_dist_fn=trainer.strategy.reduce, **options
            )
            if attribute is None:
                results[key].reset()
        if dtype:
            results[key].value = results[key].value.to(getattr(torch, dtype))
        results[key]._computed, results[key].has_reset = None, False
    ordered = {**{key: logged for key, logged in results.items() if key not in known}, **{key: results[key] for key in known}}
    results.clear()
    results.update(ordered)


def step_logs(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the values that `self.log(on_step=True)` has just logged."""
    results = trainer.fit_loop.epoch_loop._results
    return {
        key: metric._forward_cache
        for key, metric in results.items()
        if metric.meta.on_step
        and metric.meta.fx not in ("on_train_batch_start", "on_train_batch_end")  # of an earlier batch
        and isinstance(metric._forward_cache, torch.Tensor)
    }


def set_step_logs(trainer: pl.Trainer, values: dict[str, Any]) -> None:
    """Replace what `self.log(on_step=True)` has logged for this step."""
    results = trainer.fit_loop.epoch_loop._results
    for key, value in values.items():
        results[key]._forward_cache = value
        if results[key].is_tensor and not results[key].meta.on_epoch:
            results[key].value = value


def begin_epoch_anew(trainer: pl.Trainer) -> None:
    """Let an epoch that a checkpoint was saved in begin with its first batch."""
    trainer.fit_loop.epoch_loop.batch_progress.current.reset()


def count_steps(trainer: pl.Trainer, more: int) -> None:
    """Count optimizer steps beside the one that Lightning counts itself, in the middle of that one."""
    step = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
    for progress in (step.total, step.current):
        progress.ready += more
        progress.completed += more


def rebuild_dataloader(loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """Build a loader of the same class and options, with `changes`; a subclass gets those that its constructor takes."""
    if type(loader) is DataLoader:
        names = ["dataset", "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context"]
        names += ["prefetch_factor", "persistent_workers"]
        names += [name for name in ("pin_memory_device", "in_order") if getattr(loader, name, None)]
        return DataLoader(**{**{name: getattr(loader, name) for name in names}, **changes})

    from lightning.fabric.utilities.data import _reinstantiate_wrapped_cls
    from lightning.pytorch.utilities.data import _get_dataloader_init_args_and_kwargs

    args, kwargs = _get_dataloader_init_args_and_kwargs(loader, loader.sampler)
    # What is behind the named arguments went into `*args`, and so to torch's loader in the order of its constructor.
    names = list(getattr(loader, "__pl_saved_arg_names", ()))
    names += [name for name in list(inspect.signature(DataLoader.__init__).parameters)[1:] if name not in names]
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    parameters = inspect.signature(type(loader).__init__).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    kwargs |= {name: value for name, value in changes.items() if takes_all or name in parameters}
    rebuilt: DataLoader[Any] = _reinstantiate_wrapped_cls(loader, **kwargs)
    return rebuilt
