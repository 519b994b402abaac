"""The table: what of Lightning works with `LocalSGDStrategy`, and what is refused with which sentence.

A row is data: options of the `Trainer`, of the module and of the loader (those of `tests.compatibility.problem`), so that rows
can be combined. `python -m tests.compatibility` writes the page in `docs`, `test_matrix.py` proves every cell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch import callbacks as cb
from lightning.pytorch.plugins.precision import MixedPrecision

LAYOUTS = {"simulation": (2, 1), "processes": (1, 2)}
"""Columns of the page, as (replicas per rank, ranks); n = 2 in both, so that they can be compared."""
PERIODS = (3, 1)
"""Local SGD, and averaging of gradients."""
FINDER_RESTORES = tuple(int(part) for part in L.__version__.split(".")[:2]) >= (2, 6)
"""Earlier versions of Lightning lose an epoch to the `LearningRateFinder`, and what it suggests; on a single device, too."""


@dataclass(frozen=True, eq=False)
class Row:
    """A feature.

    Args:
        group: heading on the page.
        key: short name, unique.
        name: how users write it, in Markdown.
        trainer, module, loader, strategy: options of the `Trainer`, of `problem.Net`, of `problem.train_loader` and of the
            strategy.
        callbacks: makes the callbacks; takes a folder for their files.
        plugins: makes the plugins.
        entry: method of the `Trainer`.
        datamodule: whether the data is in a datamodule.
        refused: sentence with which a column ("simulation", "processes") is refused, or one of its periods ("processes 1").
        refused_late: whether that happens in training, as torch's and Lightning's own refusals may.
        single: what replicas that see equal data have in common with a single device: its "numbers", its "loop" (steps,
            learning rates, validations) or "nothing".
        plain: whether the feature has no effect on the numbers.
        validates_alike: whether validation sees the same data in all layouts.
        tolerance: of parameters, absolute. Sums of two are the same in any order, so it is that of float64 in nearly all rows.
        metric_tolerance: of metrics, absolute. They are means over several batches, in another order on several ranks.
        note: what users should know.
    """

    group: str
    key: str
    name: str
    trainer: dict[str, Any] = field(default_factory=dict)
    module: dict[str, Any] = field(default_factory=dict)
    loader: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[str], list[Any]] = lambda folder: []
    plugins: Callable[[], list[Any]] = list
    entry: Literal["fit", "validate", "test", "predict"] = "fit"
    datamodule: bool = False
    refused: dict[str, str] = field(default_factory=dict)
    refused_late: bool = False
    single: Literal["numbers", "loop", "nothing"] = "numbers"
    plain: bool = False
    validates_alike: bool = True
    tolerance: float = 1e-12
    metric_tolerance: float = 1e-12
    note: str = ""

    def __str__(self) -> str:
        return self.key

    def sentence(self, layout: str, period: int) -> str:
        """Return the sentence with which a cell is refused, or nothing."""
        return self.refused.get(f"{layout} {period}", self.refused.get(layout, ""))


def combine(rows: Sequence[Row]) -> Row:
    """Return a row with the options of all `rows`.

    Raises:
        ValueError: if two rows set the same option to different values, or are not about `fit`.
    """
    merged: dict[str, dict[str, Any]] = {name: {} for name in ("trainer", "module", "loader", "strategy", "refused")}
    for row in rows:
        if row.entry != "fit":
            raise ValueError(f"{row.key} is not about training, so it can't be combined.")
        for name, options in merged.items():
            for key, value in getattr(row, name).items():
                if name != "refused" and options.get(key, value) != value:
                    raise ValueError(f"{row.key} sets `{key}` to {value!r}, another row to {options[key]!r}.")
                options[key] = value
    plugged = [row for row in rows if row.plugins is not list]
    if len(plugged) > 1 or (plugged and "precision" in merged["trainer"]):
        raise ValueError("Several rows set the precision.")
    weakest = max((row.single for row in rows), key=("numbers", "loop", "nothing").index, default="numbers")
    return Row(
        group="Combinations",
        key="+".join(row.key for row in rows),
        name=", ".join(row.name for row in rows),
        callbacks=lambda folder: [callback for row in rows for callback in row.callbacks(folder)],
        plugins=plugged[0].plugins if plugged else list,
        datamodule=any(row.datamodule for row in rows),
        refused_late=any(row.refused_late for row in rows),
        single=weakest,
        plain=all(row.plain for row in rows),
        validates_alike=all(row.validates_alike for row in rows),
        tolerance=max((row.tolerance for row in rows), default=Row.tolerance),
        metric_tolerance=max((row.metric_tolerance for row in rows), default=Row.metric_tolerance),
        **merged,
    )


def _checkpoints(**options: Any) -> Callable[[str], list[Any]]:
    return lambda folder: [cb.ModelCheckpoint(folder, **options)]


def _scaled() -> list[Any]:
    """fp16 as on a GPU. The scale is too large for the first steps, which are skipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**19)
    return [MixedPrecision("16-mixed", "cpu", scaler)]


SEVERAL_NEED_OWN_DATA = (
    "With `replicas_per_device > 1` the strategy divides the training data itself: use a `DataLoader` over a map-style "
    "dataset, without a `DistributedSampler`, and leave `use_distributed_sampler` on."
)
MANUAL = (
    "Manual optimization steps inside `training_step`, where only one replica is present: use `replicas_per_device=1`, or "
    "automatic optimization."
)
SYNC_BATCH_NORM = (
    "SyncBatchNorm makes every forward pass wait for all replicas, which are meant to train independently: use "
    "`sync_batchnorm=False` and plain BatchNorm or GroupNorm; `buffers='average'` averages the statistics at rounds."
)


def _both(sentence: str) -> dict[str, str]:
    return {"simulation": sentence, "processes": sentence}


def _average_of_one(name: str) -> dict[str, str]:
    sentence = (
        f"The callback {name} would average the weights of one of 2 replicas only: remove it; validation, checkpoints and the "
        "trained module already use the average of all replicas."
    )
    return _both(sentence)


# fmt: off
PLAIN = Row("Precision", "precision_64", '`precision="64-true"`', plain=True)

ROWS = [
    PLAIN,
    Row("Precision", "precision_32", '`precision="32-true"`', trainer={"precision": "32-true"}, metric_tolerance=1e-6),
    Row("Precision", "bf16_mixed", '`precision="bf16-mixed"`', trainer={"precision": "bf16-mixed"}, metric_tolerance=1e-5),
    Row("Precision", "bf16_true", '`precision="bf16-true"`', trainer={"precision": "bf16-true"}, metric_tolerance=1e-2,
        note="replicas are averaged in bf16, too"),
    Row("Precision", "fp16_true", '`precision="16-true"`', trainer={"precision": "16-true"}, tolerance=1e-3,
        metric_tolerance=1e-2, note="replicas are averaged in fp16, too"),
    Row("Precision", "fp16_mixed", '`precision="16-mixed"`', plugins=_scaled, metric_tolerance=1e-5,
        refused={"simulation": "`precision='16-mixed'` scales the loss of each replica by itself, which needs "
                 "`replicas_per_device=1`: use that, or `precision='bf16-mixed'`."},
        note="a step that the scaler skips counts as a step"),
    Row("Precision", "fp16_mixed_on_cpu", '`precision="16-mixed"`, on a CPU', trainer={"precision": "16-mixed"},
        metric_tolerance=1e-5,
        note="where Lightning takes bf16 instead"),

    Row("Optimization", "accumulate", "`accumulate_grad_batches=3`, with a remainder", trainer={"accumulate_grad_batches": 3},
        note="`H` counts optimizer steps, the flush at the end of an epoch included"),
    Row("Optimization", "accumulation_scheduler", "`GradientAccumulationScheduler`",
        callbacks=lambda folder: [cb.GradientAccumulationScheduler({0: 2, 1: 3})]),
    Row("Optimization", "clip_norm", "`gradient_clip_val=0.1`", trainer={"gradient_clip_val": 0.1},
        note="each replica's own gradient; at `H = 1` the averaged one, as with DDP"),
    Row("Optimization", "clip_value", '`gradient_clip_algorithm="value"`',
        trainer={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    Row("Optimization", "adamw", "`AdamW`", module={"optimizer": "adamw"}),
    Row("Optimization", "lbfgs", "`LBFGS`", module={"optimizer": "lbfgs", "schedule": ()},
        refused={"simulation": "LBFGS evaluates the loss several times inside a step, which needs `replicas_per_device=1`."}),
    Row("Optimization", "epoch_scheduler", "a scheduler per epoch", module={"schedule": ("epoch",)}),
    Row("Optimization", "schedulers", "several schedulers, per step and per epoch", module={"schedule": ("step", "epoch")}),
    Row("Optimization", "one_cycle", "`OneCycleLR` with `estimated_stepping_batches`", module={"schedule": ("one_cycle",)}),
    Row("Optimization", "plateau_epoch", '`ReduceLROnPlateau`, `interval="epoch"`', module={"schedule": ("plateau_epoch",)},
        note="it sees the mean over all replicas"),
    Row("Optimization", "plateau_step", '`ReduceLROnPlateau`, `interval="step"`', module={"schedule": ("plateau_step",)},
        refused=_both("A plateau scheduler with `interval='step'` would make all ranks agree on its metric at every step: use "
                      "`interval='epoch'`.")),
    Row("Optimization", "manual", "manual optimization", module={"manual": 1}, refused={"simulation": MANUAL},
        note="every `training_step` counts as a step"),
    Row("Optimization", "manual_several", "several optimizers (manual optimization)", module={"manual": 2},
        strategy={"ddp_kwargs": {"find_unused_parameters": True}}, refused={"simulation": MANUAL},
        note="every `training_step` counts as a step; at `H = 1` with `ddp_kwargs={\"find_unused_parameters\": True}`"),
    Row("Optimization", "skipped_steps", "`training_step` that returns None", module={"skip_every": 4},
        refused={"processes": "Skipping the `training_step` by returning None in distributed training is not supported. It is "
                 "recommended that you rewrite your training logic to avoid having to skip the step in the first place."},
        refused_late=True, note="a replica that skips a step stays where it is"),

    Row("Trainer", "limit_train_int", "`limit_train_batches=5`", trainer={"limit_train_batches": 5}),
    Row("Trainer", "limit_train_float", "`limit_train_batches=0.5`", trainer={"limit_train_batches": 0.5}),
    Row("Trainer", "limit_val", "`limit_val_batches=1`", trainer={"limit_val_batches": 1}, validates_alike=False,
        note="one batch of each rank, as with DDP"),
    Row("Trainer", "no_validation", "`limit_val_batches=0`", trainer={"limit_val_batches": 0}, plain=True),
    Row("Trainer", "max_steps", "`max_steps=11`", trainer={"max_steps": 11, "max_epochs": -1}),
    Row("Trainer", "min_epochs", "`min_epochs=2`, with `EarlyStopping`", trainer={"min_epochs": 2, "max_epochs": 3},
        callbacks=lambda folder: [cb.EarlyStopping("val_loss", min_delta=100.0, patience=0, check_on_train_epoch_end=False)]),
    Row("Trainer", "max_time", '`max_time="00:12:00:00"`', trainer={"max_time": timedelta(microseconds=1)}, single="nothing",
        note="several processes stop after the same round, by the clock of rank 0"),
    Row("Trainer", "overfit", "`overfit_batches=2`", trainer={"overfit_batches": 2}, single="loop",
        validates_alike=False, note="two batches of each replica"),
    Row("Trainer", "val_check_int", "`val_check_interval=3`", trainer={"val_check_interval": 3}),
    Row("Trainer", "val_check_float", "`val_check_interval=0.5`", trainer={"val_check_interval": 0.5}),
    Row("Trainer", "val_check_steps", "`check_val_every_n_epoch=None`",
        trainer={"val_check_interval": 5, "check_val_every_n_epoch": None}),
    Row("Trainer", "sanity", "`num_sanity_val_steps=2`", trainer={"num_sanity_val_steps": 2}, plain=True),
    Row("Trainer", "fast_dev_run", "`fast_dev_run=2`", trainer={"fast_dev_run": 2}, validates_alike=False),
    Row("Trainer", "detect_anomaly", "`detect_anomaly=True`", trainer={"detect_anomaly": True}, plain=True),
    Row("Trainer", "deterministic", "`deterministic=True`", trainer={"deterministic": True}, plain=True),
    Row("Trainer", "barebones", "`barebones=True`",
        trainer={"barebones": True, "logger": None, "enable_progress_bar": None, "enable_model_summary": None,
                 "num_sanity_val_steps": None, "enable_checkpointing": None}, plain=True),
    Row("Trainer", "profiler", '`profiler="simple"`', trainer={"profiler": "simple"}, plain=True),
    Row("Trainer", "reload", "`reload_dataloaders_every_n_epochs=1`", trainer={"reload_dataloaders_every_n_epochs": 1},
        plain=True),
    Row("Trainer", "sync_batchnorm", "`sync_batchnorm=True`", module={"layer": "batch_norm"}, trainer={"sync_batchnorm": True},
        refused=_both(SYNC_BATCH_NORM)),

    Row("Callbacks", "early_stopping", "`EarlyStopping`", trainer={"max_epochs": 3},
        callbacks=lambda folder: [cb.EarlyStopping("own", patience=1, mode="max")],
        note="all ranks stop when one of them wants to, as with DDP"),
    Row("Callbacks", "checkpoint_monitor", "`ModelCheckpoint(monitor=...)`", trainer={"enable_checkpointing": True},
        callbacks=_checkpoints(filename="best", monitor="val_loss"), note="what is saved is the average model"),
    Row("Callbacks", "checkpoint_steps", "`ModelCheckpoint(every_n_train_steps=5)`", trainer={"enable_checkpointing": True},
        callbacks=_checkpoints(filename="{step}", every_n_train_steps=5, save_top_k=-1), plain=True,
        note="also in the middle of a round"),
    Row("Callbacks", "checkpoint_last", "`ModelCheckpoint(save_last=True)`", trainer={"enable_checkpointing": True},
        callbacks=_checkpoints(filename="{epoch}", save_last=True), plain=True),
    Row("Callbacks", "checkpoint_time", "`ModelCheckpoint(train_time_interval=...)`", trainer={"enable_checkpointing": True},
        callbacks=_checkpoints(filename="{step}", train_time_interval=timedelta(microseconds=1), save_top_k=-1), plain=True,
        note="several processes save after rounds, by the clock of rank 0"),
    Row("Callbacks", "rate_monitor", "`LearningRateMonitor`", trainer={"logger": True},
        callbacks=lambda folder: [cb.LearningRateMonitor()], plain=True),
    Row("Callbacks", "rate_finder", "`LearningRateFinder`",
        callbacks=lambda folder: [cb.LearningRateFinder(1e-4, 0.3, num_training_steps=20)],
        note="by the loss of replica 0"),
    Row("Callbacks", "rate_finder_only", "`LearningRateFinder(update_attr=False)`",
        callbacks=lambda folder: [cb.LearningRateFinder(1e-4, 0.3, num_training_steps=20, update_attr=False)],
        plain=FINDER_RESTORES,
        note="leaves replicas as they were"),
    Row("Callbacks", "backbone_finetuning", "`BackboneFinetuning`, `BaseFinetuning`",
        
        callbacks=lambda folder: [cb.BackboneFinetuning(unfreeze_backbone_at_epoch=1)],
        refused=_both("The callback BackboneFinetuning changes which parameters are trained, which are settled when training "
                      "starts: remove it, and train in several calls of `trainer.fit`.")),
    Row("Callbacks", "pruning", "`ModelPruning`",
        callbacks=lambda folder: [cb.ModelPruning("l1_unstructured", amount=0.5)],
        refused=_both("The callback ModelPruning would choose another mask on every rank, from weights of its own: prune "
                      "before training, or after it.")),
    Row("Callbacks", "weight_averaging", "`WeightAveraging`, `EMAWeightAveraging`",
        callbacks=lambda folder: [cb.WeightAveraging()],
        refused=_average_of_one("WeightAveraging")),
    Row("Callbacks", "stochastic_weight_averaging", "`StochasticWeightAveraging`",
        callbacks=lambda folder: [cb.StochasticWeightAveraging(swa_lrs=0.1)],
        refused=_average_of_one("StochasticWeightAveraging")),
    Row("Callbacks", "batch_size_finder", "`BatchSizeFinder`", callbacks=lambda folder: [cb.BatchSizeFinder()],
        refused=_both("The Batch size finder is not supported with distributed strategies.")),

    Row("Modules", "compile", "`torch.compile(module)`", module={"compiled": "module"},
        trainer={"limit_val_batches": 0}, plain=True,
        note="followed from replica to replica without compiling again"),
    Row("Modules", "compile_layer", "`torch.compile` of a layer", module={"compiled": "layer"}, plain=True),
    Row("Modules", "channels_last", "`channels_last`", module={"channels_last": True}, plain=True),
    Row("Modules", "checkpointing", "gradient checkpointing, `use_reentrant=False`", module={"checkpointing": "not_reentrant"},
        plain=True),
    Row("Modules", "checkpointing_reentrant", "gradient checkpointing, `use_reentrant=True`",
        module={"checkpointing": "reentrant"}, plain=True),
    Row("Modules", "tied", "tied parameters", module={"tied": True}),
    Row("Modules", "frozen", "frozen parameters", module={"frozen": True}),
    Row("Modules", "unfrozen", "parameters that are unfrozen during training", module={"unfreeze": True},
        refused=_both("The parameter `second.weight` was frozen when training started, so it has no replicas: train in several "
                      "calls of `trainer.fit`, or give it a learning rate of zero until then."), refused_late=True),
    Row("Modules", "unused", "unused parameters", module={"unused": True},
        refused={"processes 1": "The loss of a step doesn't depend on all parameters. Where gradients are averaged, torch's "
                 "DDP has to look for the unused ones: pass `ddp_kwargs={'find_unused_parameters': True}` to the strategy."},
        refused_late=True),
    Row("Modules", "unused_found", '`ddp_kwargs={"find_unused_parameters": True}`', module={"unused": True},
        strategy={"ddp_kwargs": {"find_unused_parameters": True}}),
    Row("Modules", "branching", "parameters that some batches use", module={"branching": True},
        strategy={"ddp_kwargs": {"find_unused_parameters": True}}),
    Row("Modules", "batch_norm", "`BatchNorm2d`", module={"layer": "batch_norm"},
        note="statistics of each replica, averaged for evaluation and checkpoints; option `buffers`"),
    Row("Modules", "sync_batch_norm_layer", "`SyncBatchNorm`", module={"layer": "sync_batch_norm"},
        refused=_both(SYNC_BATCH_NORM)),
    Row("Modules", "parametrized", "parametrizations (`weight_norm`)", module={"layer": "weight_norm"}),
    Row("Modules", "lazy", "lazy layers that have seen no batch", module={"layer": "lazy"},
        refused=_both("The parameter `layer.weight` is lazy and has no shape yet: run one batch through the module before "
                      "training.")),
    Row("Modules", "metric", "a metric of torchmetrics", module={"metric": True}, note="it accumulates over all replicas"),

    Row("Data", "uneven", "a dataset that `n` does not divide", note="shorter shards start over, so no sample is left out"),
    Row("Data", "shuffle", "`shuffle=True`", loader={"shuffle": True}, single="loop",
        note="a global permutation each epoch; option `partition`"),
    Row("Data", "drop_last", "`drop_last=True`", loader={"drop_last": True, "batch_size": 5}),
    Row("Data", "workers", "`num_workers=1`", loader={"num_workers": 1}, plain=True),
    Row("Data", "weighted", "`WeightedRandomSampler`", loader={"kind": "weighted"}, single="nothing",
        note="what it draws is dealt out"),
    Row("Data", "sampler", "a sampler of your own", loader={"kind": "sampler"}, single="nothing",
        note="what it yields is dealt out"),
    Row("Data", "batch_sampler", "a batch sampler of your own", loader={"kind": "batch_sampler"}, single="nothing",
        note="its batches are dealt out"),
    Row("Data", "distributed_sampler", "a `DistributedSampler` of your own", loader={"kind": "distributed"}, single="nothing",
        refused={"simulation": SEVERAL_NEED_OWN_DATA}),
    Row("Data", "own_division", "`use_distributed_sampler=False`", trainer={"use_distributed_sampler": False},
        loader={"kind": "own_part"}, single="nothing", refused={"simulation": SEVERAL_NEED_OWN_DATA},
        note="then every rank sees what its loader yields"),
    Row("Data", "iterable", "iterable datasets, of any length on each rank", loader={"kind": "iterable"}, single="nothing",
        refused={"simulation": SEVERAL_NEED_OWN_DATA},
        note="the dataset divides itself; the epoch ends on all ranks after the round in which one has run out, which starts "
        "over until then"),
    Row("Data", "sized_iterable", "iterable datasets with a length", loader={"kind": "sized_iterable"}, single="nothing",
        refused={"simulation": SEVERAL_NEED_OWN_DATA}, note="the shortest rank ends the epoch"),
    Row("Data", "several_loaders", "several loaders (`CombinedLoader`)", loader={"kind": "several"}, single="loop"),
    Row("Data", "subclass", "a subclass of `DataLoader`", loader={"kind": "subclass"}, plain=True),
    Row("Data", "stateful", "`StatefulDataLoader`", loader={"kind": "stateful"}, plain=True),
    Row("Data", "datamodule", "`LightningDataModule`", datamodule=True, plain=True),
    Row("Data", "dataloader_iter", "`training_step(dataloader_iter)`", module={"fetching": True, "schedule": ()}, single="loop",
        refused={"simulation": "A `training_step` that takes a `dataloader_iter` fetches its data itself, which needs "
                 "`replicas_per_device=1`."}),

    Row("Entry points", "validate", "`trainer.validate` by itself", entry="validate"),
    Row("Entry points", "test", "`trainer.test` by itself", entry="test"),
    Row("Entry points", "predict", "`trainer.predict` by itself", entry="predict",
        note="each rank returns the predictions of its part of the data, as with DDP"),
]

def _no_notebook(name: str) -> dict[str, str]:
    return {"processes": f"`Trainer(strategy={name!r})` is not compatible with an interactive environment."}


NOTEBOOKS = [
    Row("Notebooks", "local_sgd", '`strategy="local_sgd"`', refused=_no_notebook("local_sgd")),
    Row("Notebooks", "local_sgd_spawn", '`strategy="local_sgd_spawn"`', refused=_no_notebook("local_sgd_spawn")),
    Row("Notebooks", "local_sgd_notebook", '`strategy="local_sgd_notebook"`'),
    Row("Notebooks", "local_sgd_fork", '`strategy="local_sgd_fork"`'),
]
"""Rows of processes of their own."""
# fmt: on

assert len({row.key for row in ROWS}) == len(ROWS)
