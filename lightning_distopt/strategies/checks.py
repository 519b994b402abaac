"""What can't be right is refused before training starts, in one sentence that says what to do."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks as pl_callbacks
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn, optim
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS

from lightning_distopt.lookup import closest
from lightning_distopt.options import check_choice, check_whole, is_number

ELEMENTWISE = (
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
    optim.Adagrad,
    optim.Adadelta,
    optim.Rprop,
)
"""Optimizers that treat every value by itself, so that a step of stacked models is a step of each."""

_HOOKS_OF_GRADIENTS = (
    "backward",
    "on_before_backward",
    "on_after_backward",
    "on_before_zero_grad",
    "optimizer_zero_grad",
    "configure_gradient_clipping",
    "on_before_optimizer_step",
)
"""Hooks that look at the gradients of one model."""


def check_options(
    replicas_per_device: Any, evaluate: Any, buffers: Any, optimizer_state: Any, nonfinite: Any, timeout: Any, start_method: Any
) -> None:
    """Raise a `ValueError` for an option of the strategy that is not what it may be."""
    check_whole("replicas_per_device", replicas_per_device)
    if timeout is not None and not (isinstance(timeout, timedelta) and timeout > timedelta(0)):
        raise ValueError(f"`timeout` must be a `datetime.timedelta` above 0, such as `timedelta(minutes=5)`; got {timeout!r}.")
    choices = {
        "start_method": (start_method, ("popen", "spawn", "fork", "forkserver")),
        "evaluate": (evaluate, ("average", "local", "both")),
        "buffers": (buffers, ("local", "average", "recalibrate")),
        "optimizer_state": (optimizer_state, ("keep", "average", "average_all", "reset")),
        "nonfinite": (nonfinite, ("raise", "skip")),
    }
    for name, (value, allowed) in choices.items():
        check_choice(name, value, allowed)


def check_ddp_options(cls: Any, options: dict[str, Any]) -> None:
    """Refuse options of torch's DDP where it is not used, and those that it lacks or that are not the user's to set.

    Args:
        cls: a family of strategies.
        options: `ddp_kwargs`.

    Raises:
        ValueError: if the family has no use for them.
        TypeError: for an unknown one.
    """
    if options and not cls.averages_gradients:
        raise ValueError(f"{cls.__name__} never averages gradients, for which torch's DDP is: leave `ddp_kwargs` out.")
    known = _ddp_option_names()
    for name in options:
        if name not in known:
            close = closest(name, known)
            hint = f"did you mean `{close}`?" if close else f"the options are {', '.join(known)}."
            raise TypeError(f"`ddp_kwargs` has no option `{name}`: {hint}")


def lightning_callbacks(trainer: pl.Trainer, *names: str) -> list[pl.Callback]:
    """Return the Trainer's callbacks of some of Lightning's classes, of which older versions do not have all."""
    kinds = tuple(getattr(pl_callbacks, name) for name in names if hasattr(pl_callbacks, name))
    return [callback for callback in trainer.callbacks if isinstance(callback, kinds)]  # type: ignore[attr-defined]


def check_fit(strategy: Any, trainer: pl.Trainer) -> None:
    """Refuse modules, callbacks and options of the Trainer that independent replicas can't have."""
    module, n, m = trainer.lightning_module, strategy.num_replicas, strategy.replicas_per_device
    algorithm, scaler = strategy.algorithm, getattr(trainer.precision_plugin, "scaler", None)
    if algorithm.transforms_gradients and scaler is not None and (n > 1 or algorithm.acts_alone):
        raise MisconfigurationException(
            f"{type(algorithm).__name__} remembers gradients, and those of `precision='16-mixed'` overflow now and then: use "
            "`precision='bf16-mixed'`."
        )
    if algorithm.transforms_gradients and not module.automatic_optimization:
        raise MisconfigurationException(
            f"{type(algorithm).__name__} changes gradients before the optimizer's step, which manual optimization takes inside "
            "`training_step`: use automatic optimization, or another algorithm."
        )
    if not strategy._has_copies:
        rank_zero_warn(
            "There is one replica, so nothing is communicated: ask for more by `devices`, or by `replicas_per_device` in this "
            "process."
        )
        return
    copies = f"{n} replicas" if not hasattr(strategy, "clients") else f"{strategy.clients} clients"
    if strategy._layer_sync is not None or any(isinstance(layer, nn.SyncBatchNorm) for layer in module.modules()):
        raise MisconfigurationException(
            "SyncBatchNorm makes every forward pass wait for all replicas, which are meant to train independently: use "
            "`sync_batchnorm=False` and plain BatchNorm or GroupNorm; `buffers='average'` averages the statistics at rounds."
        )
    for callback in lightning_callbacks(trainer, "WeightAveraging", "StochasticWeightAveraging"):
        raise MisconfigurationException(
            f"The callback {type(callback).__name__} would average the weights of one of {copies} only: remove it; "
            f"validation, checkpoints and the trained module already use the average of all {copies.split()[1]}."
        )
    for callback in lightning_callbacks(trainer, "ModelPruning"):
        raise MisconfigurationException(
            f"The callback {type(callback).__name__} would choose another mask on every rank, from weights of its own: "
            "prune before training, or after it."
        )
    for callback in lightning_callbacks(trainer, "BaseFinetuning"):
        raise MisconfigurationException(
            f"The callback {type(callback).__name__} changes which parameters are trained, which are settled when training "
            "starts: remove it, and train in several calls of `trainer.fit`."
        )
    if not module.automatic_optimization and strategy.buffers == "recalibrate":
        raise MisconfigurationException(
            "`buffers='recalibrate'` calls `training_step` for its forward pass, which with manual optimization would also "
            "train: use `buffers='average'`."
        )
    if m == 1:
        return
    if isinstance(trainer.precision_plugin, MixedPrecision) and trainer.precision_plugin.scaler is not None:
        raise MisconfigurationException(
            "`precision='16-mixed'` scales the loss of each replica by itself, which needs `replicas_per_device=1`: use that, "
            "or `precision='bf16-mixed'`."
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise MisconfigurationException(
            "A `training_step` that takes a `dataloader_iter` fetches its data itself, which needs `replicas_per_device=1`."
        )
    if not module.automatic_optimization:
        raise MisconfigurationException(
            "Manual optimization steps inside `training_step`, where only one replica is present: use "
            "`replicas_per_device=1`, or automatic optimization."
        )


def check_optimizers(strategy: Any) -> None:
    """Refuse optimizers and schedulers that independent replicas can't have."""
    if strategy.num_replicas == 1:
        return
    for optimizer in strategy.optimizers:
        if strategy.replicas_per_device > 1 and isinstance(optimizer, LBFGS):
            raise MisconfigurationException(
                "LBFGS evaluates the loss several times inside a step, which needs `replicas_per_device=1`."
            )
    for config in strategy.lr_scheduler_configs:
        if config.reduce_on_plateau and config.interval == "step":
            raise MisconfigurationException(
                "A plateau scheduler with `interval='step'` would make all ranks agree on its metric at every step: use "
                "`interval='epoch'`."
            )


def check_federation(
    clients: Any, fraction: Any, local_epochs: Any, local_steps: Any, weighting: Any, optimizer_state: Any, buffers: Any
) -> None:
    """Raise a `ValueError` for an option of a federation that is not what it may be."""
    counts = {"clients": clients, "local_epochs": local_epochs, "local_steps": 1 if local_steps is None else local_steps}
    for name, value in counts.items():
        check_whole(name, value)
    if not (is_number(fraction) and 0 < fraction <= 1):
        raise ValueError(f"`fraction`, the share of the clients in a round, must be above 0 and at most 1; got {fraction!r}.")
    if fraction * clients < 1 - 1e-9:
        raise ValueError(
            f"`fraction={fraction}` of {clients} clients is less than one: nobody would train; use at least {1 / clients:.3g}."
        )
    if local_steps is not None and local_epochs != 1:
        raise ValueError("`local_epochs` and `local_steps` both say how long clients train: give one of them.")
    choices = {
        "weighting": (weighting, ("samples", "uniform")),
        "optimizer_state": (optimizer_state, ("reset", "keep")),
        "buffers": (buffers, ("average", "local")),
    }
    for name, (value, allowed) in choices.items():
        check_choice(name, value, allowed)


def check_same_clients(saved: Sequence[int], samples: Sequence[int], same_division: bool) -> None:
    """Refuse to go on with other clients than those of a checkpoint.

    Args:
        saved: how many samples each has there.
        samples: how many each has now.
        same_division: whether they are the same ones.
    """
    if list(saved) == list(samples) and same_division:
        return
    what = f"{len(saved)} clients, and is resumed with {len(samples)}"
    if list(saved) == list(samples):
        what = "as many samples of each client, but other ones"
    elif len(saved) == len(samples):
        k = next(k for k, (a, b) in enumerate(zip(saved, samples, strict=True)) if a != b)
        what = f"{saved[k]} samples of client {k}, and is resumed with {samples[k]}"
    raise MisconfigurationException(
        f"The federation was saved with {what}: resume with the same data, `clients` and `partition`; to train other clients "
        f"from its model, read that by `load_from_checkpoint`, and fit without `ckpt_path`."
    )


def check_federated_trainer(trainer: pl.Trainer) -> None:
    """Refuse what rounds of clients can't have."""
    module = trainer.lightning_module
    if not module.automatic_optimization:
        raise MisconfigurationException(
            "Clients train inside one of Lightning's steps, which manual optimization can't: use automatic optimization."
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise MisconfigurationException(
            "`precision='16-mixed'` scales losses by what earlier steps have shown, and clients begin anew in every round: use "
            "`precision='bf16-mixed'`."
        )
    if lightning_callbacks(trainer, "GradientAccumulationScheduler"):
        raise MisconfigurationException(
            "GradientAccumulationScheduler changes how many batches make a step, which is settled when training starts: use "
            "`accumulate_grad_batches`."
        )
    if is_overridden("optimizer_step", module):
        raise MisconfigurationException(
            "Lightning calls `optimizer_step` of the module once in a turn, not for each step of its clients: leave it out; "
            "schedules of clients go by round, so use a scheduler."
        )
    # 1.0 is once in an epoch, 1 after every batch.
    if trainer.val_check_interval != 1.0 or isinstance(trainer.val_check_interval, int):
        raise MisconfigurationException(
            f"`val_check_interval={trainer.val_check_interval}` would validate inside a round, where there is no new model: "
            "use `check_val_every_n_epoch`, which counts rounds."
        )


def check_vectorized(strategy: Any, trainer: pl.Trainer) -> None:
    """Refuse what clients that train at once can't have.

    Raises:
        MisconfigurationException: for an optimizer that is not elementwise, or keeps its state; for hooks that look at the
            gradients of one client.
    """
    module, one = trainer.lightning_module, "use `replicas_per_device=1`"
    for optimizer in strategy.optimizers:
        if type(optimizer) not in ELEMENTWISE:
            names = ", ".join(kind.__name__ for kind in ELEMENTWISE)
            raise MisconfigurationException(
                f"`replicas_per_device > 1` trains clients at once, with one step for all, in which {type(optimizer).__name__} "
                f"may mix up what is theirs: {one}, or one of torch's {names}."
            )
    if strategy.algorithm.keep_optimizers:
        raise MisconfigurationException(
            "`optimizer_state='keep'` gives each client an optimizer of its own, and `replicas_per_device > 1` trains clients "
            f"at once, by a single one: {one}, or `optimizer_state='reset'`."
        )
    for name in _HOOKS_OF_GRADIENTS:
        owners = [module, *(c for c in trainer.callbacks if hasattr(pl.Callback, name))]  # type: ignore[attr-defined]
        if any(is_overridden(name, owner) for owner in owners):
            raise MisconfigurationException(
                f"The hook `{name}` sees the gradients of one model, and `replicas_per_device > 1` trains clients at once: "
                f"{one}, or leave the hook out."
            )


def check_keywords(cls: type, family: Any, given: dict[str, Any], part: Any = None) -> None:
    """Raise a `TypeError` for an unknown option, with the nearest known one and the place of those of others.

    Args:
        cls: the class that was called.
        family: the one, it or a base, whose constructor hands on to its base what it does not know itself.
        given: what that is.
        part: the algorithm that was chosen, whose options are its own.
    """
    base = next(base for base in family.__mro__[1:] if "__init__" in vars(base))
    settled = (*family.settled_options, *(() if family.averages_gradients else ("ddp_kwargs",)))
    inherited = [name for name in _option_names(base) if name not in settled]
    known = _option_names(family) + inherited
    for name in given:
        if name in inherited or name == "ddp_kwargs":  # which the base class refuses itself
            continue
        if name in _ddp_option_names():
            to_do = f"so pass `ddp_kwargs={{{name!r}: ...}}`."
            if not family.averages_gradients:
                to_do = "which is not used: leave it out."
            hint = f"it is an option of torch's DDP, {to_do}"
        elif part is not None and name in _option_names(type(part)):
            hint = f"it is one of {type(part).__name__}, so pass `{type(part).__name__}({name}=...)`."
        else:
            close = closest(name, known)
            hint = f"did you mean `{close}`?" if close else f"the options are {', '.join(known)}."
        raise TypeError(f"{cls.__name__} has no option `{name}`: {hint}")


def _ddp_option_names() -> list[str]:
    own = ("self", "module", "device_ids", "output_device", "process_group")
    return [name for name in inspect.signature(DistributedDataParallel.__init__).parameters if name not in own]


def _option_names(cls: Any) -> list[str]:
    return [p.name for p in inspect.signature(cls.__init__).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD][1:]
