"""The fixed samples that a probe measures on, and the loss that is derived from a LightningModule."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler
from torchmetrics import Metric

from lightning_distopt.analysis.objective import batch_size
from lightning_distopt.analysis.undisturbed import undisturbed
from lightning_distopt.strategies import _lightning as private
from lightning_distopt.strategies.loaders import batch_samplers, behind


def load_batches(
    trainer: pl.Trainer, data: str | Iterable[Any], samples: int | None, seed: int, shard: tuple[int, int], check: bool = True
) -> list[Any]:
    """Load this rank's part of the samples to measure on, as validation would, on the module's device.

    Nothing else is changed: random streams and the module are put back, and where the loader has workers, the dataset of this
    process is not used.

    Args:
        trainer: which is fitting.
        data: "train" or "val" for the dataset of the trainer's loader, from which samples are drawn once; or batches.
        samples: how many there are in all; None: all of them.
        seed: with which they are drawn.
        shard: `(k, n)`: this is part `k` of `n`.
        check: whether samples that differ when they are loaded again are refused.

    Raises:
        MisconfigurationException: if there is no such data, it can't be drawn from, or it is not the same twice.
    """
    again = False
    with undisturbed(trainer.lightning_module, seed=seed), _validating(trainer):
        if isinstance(data, str):
            batches, again = _drawn(trainer, data, samples, seed, shard, check)
        else:
            batches = _given(data, samples, shard)
        found = [private.to_device(trainer, batch) for batch in batches]
    if again and not _equal(found[0], found.pop()):
        raise MisconfigurationException(
            f"The same samples of the {data} data are different when they are loaded again, as with random augmentation: pass "
            "batches without it as `data=...`, or `check=False` to measure on one draw."
        )
    return found


def _drawn(
    trainer: pl.Trainer, data: str, samples: int | None, seed: int, shard: tuple[int, int], check: bool
) -> tuple[Iterator[Any], bool]:
    """Return batches, and whether the first is there a second time, at the end."""
    loader, dataset = behind(_loader(trainer, data))
    drawable = isinstance(loader, DataLoader) and (loader.batch_sampler is not None)
    if not drawable or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise MisconfigurationException(
            f"A probe draws its samples from a map-style dataset in one torch `DataLoader`, which the {data} loader is not: "
            "pass batches, such as `data=[batch_1, batch_2]` or a loader that gives the same ones whenever it is gone through."
        )
    among = _samples_of(loader, len(dataset))
    order = torch.randperm(len(among), generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    k, n = shard
    own = [among[index] for index in order[k::n].tolist()]
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 64
    count = -(-len(own) // size)
    # Nearly as large as each other: of a single sample that is left over, batch norm has no statistics.
    lists = [own[len(own) * i // count : len(own) * (i + 1) // count] for i in range(count)]
    again = check and len(lists) > 0
    part = DataLoader(
        dataset,
        batch_sampler=lists + lists[:1] if again else lists,
        collate_fn=loader.collate_fn,
        num_workers=min(loader.num_workers, len(lists)),
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if lists else None,
    )
    return iter(part), again


def _samples_of(loader: DataLoader[Any], size: int) -> Sequence[int]:
    """Return the samples that a loader goes through: all, unless its sampler draws from a list."""
    ours = batch_samplers(loader)
    sampler: Any = ours[0].shards.sampler if ours else loader.sampler
    sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)  # what Lightning wraps for several ranks
    return sampler.indices if isinstance(sampler, SubsetRandomSampler) else range(size)


def _given(data: Iterable[Any], samples: int | None, shard: tuple[int, int]) -> Iterator[Any]:
    seen, (k, n) = 0, shard
    for number, batch in enumerate(data):
        if samples is not None and seen >= samples:
            return
        seen += batch_size(batch)
        if number % n == k:
            yield batch


def _loader(trainer: pl.Trainer, data: str) -> Any:
    if data == "train":
        return trainer.train_dataloader
    loaders = tree_leaves(private.peek_validation_loaders(trainer) if trainer.enable_validation else None)
    if not loaders or loaders[0] is None:
        raise MisconfigurationException("There is no validation data to measure on: use `data='train'`, or pass batches.")
    return loaders[0]


@contextmanager
def _validating(trainer: pl.Trainer) -> Iterator[None]:
    """Let hooks that ask the trainer, such as those that augment batches, see a validation."""
    stage, trainer.validating = trainer.state.stage, True
    try:
        yield
    finally:
        trainer.state.stage = stage


def _equal(first: Any, second: Any) -> bool:
    leaves, others = tree_leaves(first), tree_leaves(second)
    pairs = zip(leaves, others, strict=False)
    return len(leaves) == len(others) and all(_same(a, b) for a, b in pairs if isinstance(a, Tensor))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())  # NaN is, such as that of a missing target


# ------------------------------------------------------------------------------------------------------ what is measured
Step = Callable[[nn.Module, Any], Any]

_STAGE = re.compile(r"^(val|valid|validation)[_/.]")


class DerivedLoss:
    """The loss that `training_step` returns, called without logging anything.

    Raises:
        MisconfigurationException: for manual optimization, where the loss does not come back.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        if not module.automatic_optimization:
            raise MisconfigurationException(
                "With manual optimization `training_step` takes steps by itself, so a probe can't call it for its loss: pass "
                "`loss_fn=lambda module, batch: ...`."
            )

    def __call__(self, module: nn.Module, batch: Any) -> Any:
        """Return the loss of a batch."""
        with private.captured_logs(module):
            output = _call(module.training_step, batch)  # type: ignore[arg-type]
        return output.get("loss") if isinstance(output, Mapping) else output


class DerivedMetrics:
    """What `validation_step` logs, called without logging it: plain values, and metrics of the batch alone.

    Names are those of the log without `val_`. A loss among them is left out, since that of `training_step` is measured.
    """

    def __call__(self, module: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Return the values of a batch by name."""
        metrics = [child for child in module.modules() if isinstance(child, Metric)]
        for metric in metrics:
            metric.reset()
        with private.captured_logs(module) as logged:
            _call(module.validation_step, batch)  # type: ignore[arg-type]
        values = {}
        for name, value in logged.items():
            if isinstance(value, Metric):
                value._to_sync = False  # of this batch, on this rank
                value = value.compute()
            name = _STAGE.sub("", name)
            if name != "loss" and isinstance(value, Tensor | int | float) and torch.as_tensor(value).numel() == 1:
                values[name] = torch.as_tensor(value).reshape(())
        return values


def derive_metrics(module: pl.LightningModule) -> DerivedMetrics | None:
    """Return what measures the module's validation metrics, if it has any."""
    return DerivedMetrics() if is_overridden("validation_step", module) else None


def in_precision(trainer: pl.Trainer, function: Step) -> Step:
    """Let a function of module and batch make numbers of the trainer's true precision; mixed ones are not for measuring."""
    plugin = trainer.precision_plugin
    if not isinstance(plugin, DoublePrecision | HalfPrecision):
        return function

    def inside(module: nn.Module, batch: Any) -> Any:
        with plugin.forward_context():
            return function(module, batch)

    return inside


def _call(step: Callable[..., Any], batch: Any) -> Any:
    names = list(inspect.signature(step).parameters)
    if names and names[0] == "dataloader_iter":
        raise MisconfigurationException(
            "A step that takes `dataloader_iter` can't be called with a batch: pass `loss_fn=lambda module, batch: ...`."
        )
    return step(batch, 0) if len(names) > 1 else step(batch)
