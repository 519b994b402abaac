"""What modules have logged, and values for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger

Metrics = dict[str, tuple[float, bool, bool]]
"""By name: a value, and whether it goes to loggers and to the progress bar."""


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
        return note_metrics(connector, seen)

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


def note_metrics(connector: Any, seen: Metrics) -> dict[str, Any]:
    """Add to `seen` what is logged for the epoch by now, and return the part that goes to loggers."""
    metrics = connector.metrics
    for name, value in metrics["callback"].items():
        seen[name] = float(value), name in metrics["log"], name in metrics["pbar"]
    logged: dict[str, Any] = metrics["log"]
    return logged


def log_batch(trainer: pl.Trainer, batch: Any) -> None:
    """Let `self.log` infer its batch size from `batch`."""
    results = trainer.fit_loop.epoch_loop._results
    results.batch, results.batch_size = batch, None


@contextmanager
def captured_logs(module: Any) -> Iterator[dict[str, Any]]:
    """Let `self.log` of a module do nothing but write into a dictionary, of values by name, inside the body."""
    logged: dict[str, Any] = {}

    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        logged[name] = value

    def log_dict(dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        logged.update(dictionary)

    captured = {"log": log, "log_dict": log_dict}
    own = {name: vars(module)[name] for name in captured if name in vars(module)}
    vars(module).update(captured)
    try:
        yield logged
    finally:
        for name in captured:
            del vars(module)[name]
        vars(module).update(own)


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

    What a rank has not logged counts for nothing there. Where there is no such collective, it gets what the others have: their
    mean, or the largest or smallest of their values, and nothing of a sum.
    """
    results = trainer.fit_loop.epoch_loop._results
    own = {
        key: {
            **{option: getattr(logged.meta, option) for option in ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch")},
            "reduce_fx": logged.meta.reduce_fx.__name__,
            "metric_attribute": logged.meta.metric_attribute,
            "sync_dist": logged.meta.sync.should,
            "dtype": str(logged.value.dtype).removeprefix("torch.") if logged.is_tensor else "",
            "value": logged.value.item() if logged.is_tensor else None,
            "size": int(logged.cumulated_batch_size) if logged.is_tensor and logged.meta.is_mean_reduction else None,
            "last": logged._forward_cache.item() if logged.is_tensor and logged.meta.on_step else None,
        }
        for key, logged in results.valid_items()
        if logged.meta.on_epoch
    }
    everywhere: list[dict[str, dict[str, Any]]] = gather(own)
    known = {key: options for logged in everywhere for key, options in logged.items()}
    if all(list(logged) == list(known) for logged in everywhere):
        return
    for key in set(known) - set(own):
        of_others = [logged[key] for logged in everywhere if key in logged]
        options = {name: value for name, value in known[key].items() if name not in ("dtype", "value", "size", "last")}
        dtype, attribute = known[key]["dtype"], options["metric_attribute"]
        if key not in results:
            value = torch.zeros(()) if attribute is None else trainer.lightning_module.get_submodule(attribute)
            results.log(
                value=value.to(trainer.strategy.root_device), batch_size=0, sync_dist_fn=trainer.strategy.reduce, **options
            )
            if attribute is None:
                results[key].reset()
        if dtype:
            results[key].value = results[key].value.to(getattr(torch, dtype))
            _take_over(results[key], of_others)
        results[key]._computed, results[key].has_reset = None, False
    ordered = {**{key: logged for key, logged in results.items() if key not in known}, **{key: results[key] for key in known}}
    results.clear()
    results.update(ordered)


def _take_over(metric: Any, of_others: list[dict[str, Any]]) -> None:
    """Let a value that this rank has not logged be what others have logged."""
    values, meta = [other["value"] for other in of_others], metric.meta
    if meta.on_step:
        metric._forward_cache = metric.value.new_tensor(sum(other["last"] for other in of_others) / len(of_others))
    if meta.sync.should:
        return
    if meta.is_mean_reduction:
        metric.value.fill_(sum(values))
        metric.cumulated_batch_size = metric.cumulated_batch_size + sum(other["size"] for other in of_others)
    elif meta.is_max_reduction or meta.is_min_reduction:
        metric.value.fill_(max(values) if meta.is_max_reduction else min(values))


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
