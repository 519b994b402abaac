"""Where a `Trainer` is in its loops, its loaders, and other questions that it has no public answer to."""

from __future__ import annotations

import functools
import inspect
import signal
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, SequentialSampler


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


def take_loader_states(trainer: pl.Trainer, checkpoint: dict[str, Any], ours: Callable[[Any], Any]) -> list[Any]:
    """Take the positions of training loaders out of a checkpoint where all that have one are `ours`, and return them."""
    loader: Any = getattr(trainer.fit_loop, "_combined_loader", None)
    if loader is None or not all(ours(one) for one in loader.flattened if hasattr(one, "load_state_dict")):
        return []
    states: list[Any] = checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", [])
    return states


def put_loader_states(checkpoint: dict[str, Any], states: list[Any]) -> None:
    """Put positions of training loaders where Lightning looks for them in a checkpoint."""
    checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = states


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


def peek_validation_loaders(trainer: pl.Trainer) -> Any:
    """Return the validation loaders, asked of the user apart if Lightning has not yet, so that it still asks when it would."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    combined, source = getattr(loop, "_combined_loader", None), getattr(loop, "_data_source", None)
    if combined is not None or source is None:
        return combined.flattened if combined is not None else []
    return source.dataloader()


def to_device(trainer: pl.Trainer, batch: Any) -> Any:
    """Return a batch as the steps of the module get it: after the user's hooks around its transfer, on the device."""
    batch = trainer.precision_plugin.convert_input(batch)
    before = getattr(trainer.lightning_module, "_on_before_batch_transfer", None)
    batch = batch if before is None else before(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


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
