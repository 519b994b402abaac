"""Random training runs that are stopped somewhere and resumed: what each number stands for, and whether it came out the same.

A run is made of rows of the compatibility table, a layout, options of the strategy and a moment. It is trained to the end;
trained again, with a checkpoint at that moment, where it stops; and resumed in a new `Trainer`. Its images get noise when
they are loaded and lose pixels by dropout, so nothing is the same by accident.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
import torch._dynamo
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from lightning_distopt import LinearWarmup, LocalSGDStrategy, PostLocalSwitch
from tests.compatibility.matrix import ROWS, Row, combine
from tests.compatibility.problem import QUIET, Module, Net, Watch, samples, train_loader
from tests.helpers import PoolEnvironment

LAYOUTS = [(1, 2), (2, 1), (2, 2), (4, 1), (3, 1), (1, 3), (1, 4)]
"""(replicas per rank, ranks)."""
BY_KEY = {row.key: row for row in ROWS}

Moment = Literal["step", "validation", "epoch"]


# ------------------------------------------------------------------------------------------------------ what can be drawn

WITHOUT_RESUME = {
    "max_time": "ends at its first round, by the clock",
    "fast_dev_run": "writes no checkpoints",
    "barebones": "writes no checkpoints",
    "rate_finder": "Lightning starts from the beginning, after its finder has run",
    "rate_finder_only": "Lightning starts from the beginning, after its finder has run",
    "plateau_epoch": "Lightning leaves the scheduler out at the end of the epoch that is resumed",
}
"""Rows that train, but are not resumed exactly: on a single device neither."""
MOMENTS: dict[str, set[Moment]] = {
    "accumulation_scheduler": {"epoch"},  # Lightning applies it where epochs start, so not when one is resumed
    "early_stopping": {"step", "epoch"},  # Lightning looks at the end of an epoch for a metric from before the checkpoint
}
"""Rows for which that is so at some moments only; these are the others."""
OWN_DIVISION = {"distributed_sampler", "own_division", "iterable", "sized_iterable"}
"""Loaders without a state that the user divides: inside an epoch their data starts over, as documented."""
OWN_ORDER = {"weighted", "sampler", "batch_sampler"} | OWN_DIVISION
"""Loaders that can neither be shuffled nor be divided in a fixed way."""
CONTRADICTIONS: list[tuple[set[str], set[str]]] = [
    ({"manual", "manual_several"}, {"lbfgs"}),
    ({"early_stopping", "min_epochs", "checkpoint_monitor"}, {"no_validation", "compile"}),  # which are about a metric
    ({"val_check_int"}, {"overfit"}),  # an interval longer than the epoch
    ({"detect_anomaly"}, {"fp16_mixed"}),  # whose first gradients overflow
]
"""Features that Lightning or torch don't combine, on a single device either."""

DRAWN = [
    row
    for row in ROWS
    if row.entry == "fit"
    and row.key not in WITHOUT_RESUME
    and not (row.sentence("simulation", 3) and row.sentence("processes", 3))
]


@dataclass(frozen=True)
class Run:
    """What a number stands for.

    Args:
        number: of the run.
        rows: keys of rows of the table.
        m, world: replicas per rank, ranks.
        period: `H`, or "warmup".
        strategy: more options of the strategy.
        loader: more options of the loader.
        switch: `at` of a `PostLocalSwitch`, or None.
        moment: what triggers the checkpoint after which training stops.
        position: which of the moments, between 0 and 1.
    """

    number: int
    rows: tuple[str, ...]
    m: int
    world: int
    period: int | str
    strategy: dict[str, Any] = field(default_factory=dict)
    loader: dict[str, Any] = field(default_factory=dict)
    switch: int | str | None = None
    moment: Moment = "step"
    position: float = 0.5

    @property
    def n(self) -> int:
        """Number of replicas."""
        return self.m * self.world

    @property
    def row(self) -> Row:
        """All its rows as one."""
        return combine([BY_KEY[key] for key in self.rows])

    def __str__(self) -> str:
        options = {"H": self.period, **self.strategy, **self.loader}
        if self.switch is not None:
            options["switch"] = self.switch
        words = " ".join(f"{key}={value}" for key, value in options.items())
        return f"#{self.number} {'+'.join(self.rows)}, {self.m} x {self.world}, {words}, {self.moment} at {self.position:.2f}"

    def contradiction(self) -> str:
        """Return why it can't be trained, or nothing."""
        try:
            row = self.row
        except ValueError as error:
            return str(error)
        gradients = self.strategy.get("average") != "parameters" and (self.period in (1, "warmup") or self.switch is not None)
        for layout, present in (("simulation", self.m > 1), ("processes", self.world > 1)):
            if present and row.sentence(layout, 1 if gradients else 3):
                return row.sentence(layout, 1 if gradients else 3)
        keys = set(self.rows)
        if any(self.moment not in MOMENTS[key] for key in keys & MOMENTS.keys()):
            return "Lightning does not resume this exactly"
        for one, other in CONTRADICTIONS:
            if keys & one and keys & other:
                return f"{keys & one} and {keys & other}"
        if keys & OWN_ORDER and (self.strategy.get("partition") or self.loader.get("shuffle") or "shuffle" in keys):
            return "the order is the user's"
        if keys & OWN_DIVISION and ("workers" in keys or "num_workers" in self.loader):
            return "torch seeds the workers of such a loader where it is made, before anything is resumed"
        if row.module.get("manual") and self.strategy.get("buffers") == "recalibrate":
            return "recalibration needs automatic optimization"
        return ""


def draw(number: int) -> Run:
    """Return the run of a number, always the same."""
    rng = random.Random(f"resume {number}")

    def some(probability: float, **options: Any) -> dict[str, Any]:
        return options if rng.random() < probability else {}

    while True:
        m, world = rng.choice(LAYOUTS)
        n = m * world
        strategy = {
            **some(0.25, average="parameters"),
            **some(0.3, optimizer_state=rng.choice(["average", "reset"])),
            **some(0.4, buffers=rng.choice(["average", "recalibrate"])),
            **some(0.25, evaluate="local"),
            **some(0.25, partition="fixed"),
            **(some(0.5, block_size=2, block_period=2) if n == 4 else {}),
        }
        run = Run(
            number,
            rows=tuple(row.key for row in rng.sample(DRAWN, rng.choice([1, 2, 2, 3, 3]))),
            m=m,
            world=world,
            period=rng.choice([1, 2, 2, 3, 3, 4, 4, "warmup"]),
            strategy=strategy,
            loader={**some(0.4, shuffle=True), **some(0.1, num_workers=2)},
            switch=rng.choice([5, "epoch:1", "first_lr_decay"]) if rng.random() < 0.2 else None,
            moment=rng.choice(["step", "step", "validation", "epoch"]),
            position=rng.random(),
        )
        if not run.contradiction():
            return run


# --------------------------------------------------------------------------------------------------------------- training


class Noisy(Net):
    """The module of the table, with dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.2, self.training))


def noisy(batch: Sequence[Any]) -> Any:
    """Collate a batch, with noise from three libraries' streams."""
    x, *others = default_collate(batch)
    return [x + 0.1 * torch.randn(()) + 0.1 * random.gauss(0, 1) + 0.1 * np.random.normal(), *others]


class Diary(Watch):
    """Keeps what happens after how many batches, too."""

    def __init__(self) -> None:
        super().__init__()
        self.global_steps: list[int] = []
        self.moments: dict[str, list[int]] = {"validation": [], "epoch": []}

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        self.global_steps.append(trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_validation_end(trainer, module)
        if not trainer.sanity_checking:
            self.moments["validation"].append(len(self.rows))

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.moments["epoch"].append(len(self.rows))


class Stop(Callback):
    """Ends training after a number of batches, at a moment of some kind."""

    def __init__(self, moment: Moment, batches: int) -> None:
        self.moment, self.batches, self.count = moment, batches, 0

    def _stop(self, trainer: L.Trainer, moment: Moment) -> None:
        if moment == self.moment and self.count == self.batches:
            trainer.fit_loop.min_epochs = 0  # a minimum would let it go on
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.count += 1
        self._stop(trainer, "step")

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._stop(trainer, "validation")

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._stop(trainer, "epoch")


class Saver(ModelCheckpoint):
    """A class of its own, as a row may bring a `ModelCheckpoint` with the same options."""


def train(
    rank: int, world: int, run: Run, folder: str, extra: Sequence[Callback] = (), ckpt_path: str | None = None
) -> dict[str, Any]:
    """Train a run on this rank; returns all that a resumed one has to have in common with it."""
    warnings.simplefilter("ignore")
    L.seed_everything(7, verbose=False)
    row, diary = run.row, Diary()
    if row.module.get("compiled"):
        torch._dynamo.reset()
    module = Noisy(**row.module)
    size = 24 * run.n - 1  # eight batches of three an epoch; replicas can't share it equally
    data = {"collate_fn": noisy, **run.loader, **row.loader}
    loader = train_loader(**{"rank": rank, "world": world, "size": size, **data})
    evaluation = DataLoader(samples(12), batch_size=6)
    period = LinearWarmup(4, steps=12) if run.period == "warmup" else run.period
    strategy = LocalSGDStrategy(period, replicas_per_device=run.m, **{**run.strategy, **row.strategy})
    checkpointing = any(isinstance(callback, ModelCheckpoint) for callback in extra)
    options = {"max_epochs": 3, "precision": "64-true", "enable_checkpointing": False, **QUIET, **row.trainer}
    options["enable_checkpointing"] |= checkpointing
    if row.plugins is not list:
        del options["precision"]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        plugins=[PoolEnvironment(rank, world), *row.plugins()],
        callbacks=[
            *row.callbacks(folder),
            *([] if run.switch is None else [PostLocalSwitch(run.switch)]),
            diary,
            *extra,
        ],
        default_root_dir=folder,
        **options,
    )
    compiled: Any = torch.compile(module, backend="eager") if row.module.get("compiled") == "module" else module
    if row.datamodule:
        trainer.fit(compiled, datamodule=Module(loader, evaluation), ckpt_path=ckpt_path)
    else:
        trainer.fit(compiled, loader, evaluation, ckpt_path=ckpt_path)
    plateaus = [config.scheduler for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
    return {
        "start": diary.start,
        "rows": torch.stack(diary.rows) if diary.rows else torch.empty(0),
        "steps": diary.steps,
        "global_steps": diary.global_steps,
        "rates": diary.rates,
        "validations": diary.validations,
        "moments": diary.moments,
        "seen": dict(module.seen),
        "state": {key: value.clone() for key, value in module.state_dict().items()},
        "traffic": (strategy.traffic.rounds, strategy.traffic.bytes_sent),
        "global_step": trainer.global_step,
        "epochs": trainer.current_epoch,
        "best": [float(scheduler.best) for scheduler in plateaus],
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
    }


def choose(run: Run, whole: dict[str, Any]) -> tuple[Moment, int]:
    """Return after how many batches a run stops, and what triggers its checkpoint: a step where there is nothing else."""
    total, steps = len(whole["rows"]), whole["global_steps"]
    by_step = [k for k, (before, now) in enumerate(zip([0, *steps], steps, strict=False), start=1) if now > before]
    for moment, batches in ((run.moment, whole["moments"].get(run.moment, by_step)), ("step", by_step)):
        first = {steps[k - 1]: k for k in reversed(batches)}  # a `ModelCheckpoint` saves once at a step
        possible = [k for k in sorted(first.values()) if k < total]
        if possible:
            return moment, possible[int(run.position * len(possible))]
    raise AssertionError("There is no moment at which this run could stop.")


def saver(moment: Moment, whole: dict[str, Any], batches: int, folder: str) -> Saver:
    """Return the callback that writes the checkpoint."""
    triggers: dict[str, dict[str, Any]] = {
        "step": {"every_n_train_steps": whole["global_steps"][batches - 1]},
        "validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
        "epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    }
    options = {"filename": "{step}", "auto_insert_metric_name": False, "save_top_k": -1, **triggers[moment]}
    return Saver(folder, **options)


def resume(rank: int, world: int, run: Run, folder: str) -> dict[str, Any]:
    """Train to the end; train again, and stop; resume. Returns the batches of each, and what differs."""
    whole = train(rank, world, run, f"{folder}/whole")
    moment, batches = choose(run, whole)
    stop = [saver(moment, whole, batches, f"{folder}/stopped"), Stop(moment, batches)]
    stopped = train(rank, world, run, f"{folder}/first", stop)  # to the end of the round, where all ranks learn of it
    path = Path(folder, "stopped", f"{whole['global_steps'][batches - 1]}.ckpt")
    rest = train(rank, world, run, f"{folder}/rest", ckpt_path=str(path))
    differences = compare(run, whole, stopped, rest, batches)
    return {"total": len(whole["rows"]), "stopped": batches, "moment": moment, "differences": differences}


# -------------------------------------------------------------------------------------------------------------- comparing


def compare(run: Run, whole: dict[str, Any], stopped: dict[str, Any], rest: dict[str, Any], batches: int) -> list[str]:
    """Return what is different in the resumed run, bit for bit; nothing if all is well."""
    inside = batches not in whole["moments"]["epoch"]
    expected = {"rows before": whole["rows"][:batches], "start": whole["rows"][batches - 1]}
    found = {"rows before": stopped["rows"][:batches], "start": rest["start"]}
    if set(run.rows) & OWN_DIVISION and inside:  # the replicas go on from where they were, with data from the start
        if not set(run.rows) & {"iterable"}:  # which ends when it has run out
            expected["global_step"], found["global_step"] = whole["global_step"], rest["global_step"]
        expected["epochs"], found["epochs"] = whole["epochs"], rest["epochs"]
    else:
        tail = {"validations": sum(k > batches for k in whole["moments"]["validation"])}
        for key in ("rows", "steps", "global_steps", "rates", "validations"):
            length = tail.get(key, len(whole["rows"]) - batches)
            expected[key], found[key] = whole[key][len(whole[key]) - length :], rest[key]
        expected["seen"] = {k: seen[len(seen) - len(rest["seen"].get(k, ())) :] for k, seen in whole["seen"].items()}
        found["seen"] = rest["seen"]
        for key in ("state", "traffic", "global_step", "epochs", "best", "metrics"):
            expected[key], found[key] = whole[key], rest[key]
        if not tail["validations"]:  # then the last metrics of validation are from before
            expected["metrics"] = {key: whole["metrics"][key] for key in rest["metrics"]}
    differences = []
    for key, value in expected.items():
        text = different(value, found[key])
        if text:
            differences.append(f"{key}: {text}")
    return differences


def different(one: Any, other: Any) -> str:
    """Return how two values differ, or nothing."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"{tuple(one.shape)} {one.dtype}, resumed {tuple(other.shape)} {other.dtype}"
        if torch.equal(one, other) or (
            (one.isnan() == other.isnan()).all() and torch.equal(one.nan_to_num(), other.nan_to_num())
        ):
            return ""
        where = (one != other).nonzero()[0].tolist()
        return (
            f"{int((one != other).sum())} of {one.numel()}, first at {where}, by up to {float((one - other).abs().max()):.2g}"
        )
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        texts = {key: different(one.get(key), other.get(key)) for key in keys}
        return "; ".join(f"{key}: {text}" for key, text in texts.items() if text)
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return f"{type(one).__name__}, resumed {type(other).__name__}"
    return "" if one == other or (one != one and other != other) else f"{one}, resumed {other}"
