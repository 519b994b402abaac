"""What all probes have in common: when they measure, on which data, on whose weights, and where results go."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_distopt.analysis.objective import LossFn, Metrics, Objective
from lightning_distopt.analysis.parameters import Parameters
from lightning_distopt.analysis.result import Result, Results
from lightning_distopt.callbacks.every import Every
from lightning_distopt.callbacks.everywhere import buffers_of_rank_zero, replicas_differ, shards_weights, sum_over_ranks
from lightning_distopt.callbacks.fit_callback import FitCallback
from lightning_distopt.callbacks.lr_decays import LearningRateDecays
from lightning_distopt.callbacks.probe_data import DerivedLoss, derive_metrics, in_precision, load_batches
from lightning_distopt.callbacks.values import log_doubles
from lightning_distopt.figures import lacking
from lightning_distopt.options import check_choice, is_whole
from lightning_distopt.strategies.base import ReplicaStrategy

R = TypeVar("R", bound="Result | Results[Any]")
File = Literal["npz", "json", "png"]

_DATA = ("train", "val")


class Probe(FitCallback, Generic[R]):
    """Base of callbacks that measure something of the model now and then, and leave training as it is, to the bit.

    A probe draws its samples once, when training starts, and keeps them on the device. Over several ranks each goes through
    its part of them, and messages of the size of the result's vectors sum up. While replicas differ, the module is their
    average, or each rank's first replica.

    Subclasses have a `name` and implement `measure`. What it returns is logged by its `numbers` as `<name>/...`, kept in
    `history`, and written into the log folder, below `<name>/`. Several probes of one kind each take a name of their own.

    Args:
        every: moments to measure at, see `Every`.
        data: "train", "val", both as a list, or batches: any iterable of them, the same whenever it is gone through.
        samples: number of samples, over all ranks; None: all.
        model: "average" of all replicas, or "local": every rank measures its first replica by itself, on all samples; what is
            logged is the mean over ranks.
        loss_fn: `loss_fn(module, batch)`, the mean loss over the samples of a batch; by default what `training_step` returns,
            which is called in evaluation mode with `self.log` silent.
        metrics: `metrics(module, batch)`, further means by name; by default what `validation_step` logs.
        parameters: those that count, by patterns of their names or a predicate; None: all that are trainable.
        seed: of all that is drawn.
        save: what is written for each result: "npz", "json", "png". None: "npz" and "png", if there is a logger.
        check: whether data and losses that are not the same twice are refused.
        progress: whether bars show how far a measurement is.
        name: of the logged values, of the folder, and of the state in checkpoints; None: that of the kind of probe.

    Attributes:
        history: a dictionary for each measurement: `step`, `epoch`, and its numbers.
        result: the last one, whole; None before the first.

    Raises:
        ValueError: for options that are unknown.
        MisconfigurationException: when training starts, if the data or the module can't be measured on, or another probe has
            the same name.
    """

    name: str
    several: ClassVar[bool] = True
    """Whether it measures on several data."""

    def __init__(
        self,
        every: str | Sequence[str] = "epoch",
        data: Literal["train", "val"] | Sequence[str] | Iterable[Any] = "train",
        samples: int | None = 2048,
        model: Literal["average", "local"] = "average",
        loss_fn: LossFn | None = None,
        metrics: Metrics | None = None,
        parameters: Parameters | None = None,
        seed: int = 0,
        save: Sequence[File] | None = None,
        check: bool = True,
        progress: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.every = Every(every)
        self.data = _named(data)
        if len(self.data) > 1 and not self.several:
            raise ValueError(
                f"`data` must be 'train', 'val' or batches: {type(self).__name__} measures on one kind of data; got {data!r}."
            )
        if samples is not None and not is_whole(samples, least=1):
            raise ValueError(f"`samples` must be a whole number, at least 1, or None for all; got {samples!r}.")
        check_choice("model", model, ("average", "local"))
        if save is not None and (isinstance(save, str) or not all(kind in get_args(File) for kind in save)):
            raise ValueError(f"`save` must be a list of {', '.join(map(repr, get_args(File)))}; got {save!r}.")
        if name is not None and not (isinstance(name, str) and name):
            raise ValueError(f"`name` must be a text, such as 'head'; got {name!r}.")
        self.name = name or self.name
        self.samples, self.model, self.loss_fn, self.metrics = samples, model, loss_fn, metrics
        self.parameters, self.seed, self.save, self.check, self.progress = parameters, seed, save, check, progress
        self.history: list[dict[str, Any]] = []
        self.result: R | None = None
        self._batches: dict[str, list[Any]] = {}
        self._decays, self._step = LearningRateDecays(), 0
        self._folder: str | None = None
        self._started = False  # whether training has
        self._alone = False  # whether no other probe is known to have its name

    @property
    def state_key(self) -> str:
        """Of kind and name; of this object alone until `setup` has refused twins, of which Lightning's error says less."""
        return self._generate_state_key(name=self.name, **({} if self._alone else {"id": id(self)}))

    # ------------------------------------------------------------------------------------------------------ to implement
    @abstractmethod
    def measure(self, trainer: pl.Trainer, objectives: Mapping[str, Objective]) -> R:
        """Return the result for the weights that the module has now. Collective.

        Args:
            trainer: which is fitting.
            objectives: by the name of their data; the first is the main one.
        """

    def check_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise an error if the probe can't be used in this fit."""

    def check_objectives(self, trainer: pl.Trainer, objectives: Mapping[str, Objective]) -> None:
        """Raise an error if what is to be measured can't be, when training starts. Collective."""

    # ------------------------------------------------------------------------------------------------------- life cycle
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse two probes of one name."""
        self._alone = [probe.name for probe in trainer.callbacks if isinstance(probe, Probe)].count(self.name) == 1  # type: ignore[attr-defined]
        if not self._alone:
            raise MisconfigurationException(f"Two probes are called {self.name!r}: give one of them a `name=`.")
        super().setup(trainer, pl_module, stage)

    def setup_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what can't be measured, and begin anew."""
        self.history, self.result, self._decays, self._folder = [], None, LearningRateDecays(), None
        strategy = trainer.strategy
        if shards_weights(strategy):
            raise MisconfigurationException(
                f"{type(strategy).__name__} shards weights, which {type(self).__name__} needs whole: use DDP or a strategy of "
                "this package, or analyse a checkpoint with `lightning-distopt analyze`."
            )
        if self.model == "local" and "validation" in self.every:
            raise MisconfigurationException(
                "Validation sees the average of the replicas: use `model='average'`, or measure every so many steps or epochs."
            )
        if self.loss_fn is None:
            DerivedLoss(pl_module)
        self.check_fit(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Load the data, and see whether its loss can be measured."""
        self._folder = trainer.log_dir or trainer.default_root_dir  # asks the other ranks
        self._step = trainer.global_step
        with not_training(trainer.strategy):
            self._batches = self._load(trainer)
            with self._shown(trainer):
                self.check_objectives(trainer, self._objectives(trainer, self.check))
        self._started = True
        if "start" in self.every and trainer.global_step == 0:
            self._measure(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure before the first step after a decay of the learning rate."""
        if "lr_decay" in self.every and self._decays.see(trainer):
            self._measure(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure every so many optimizer steps."""
        before, self._step = self._step, trainer.global_step
        if self.every.due("step", before, self._step):
            self._measure(trainer, on_step=True, on_epoch=False)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure inside validation."""
        if "validation" in self.every and self._started and not trainer.sanity_checking:
            self._measure(trainer, on_step=False, on_epoch=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure every so many epochs."""
        if self.every.due("epoch", trainer.current_epoch, trainer.current_epoch + 1):
            self._measure(trainer, on_step=False, on_epoch=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure at the end, if that has not just been done."""
        if "end" in self.every and (not self.history or self.history[-1]["step"] != trainer.global_step):
            self._measure(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of what it holds."""
        self.let_go()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of what it holds: after an error there is no `teardown`."""
        self.let_go()

    def let_go(self) -> None:
        """Let go of the data."""
        self._batches, self._started = {}, False

    def state_dict(self) -> dict[str, Any]:
        """Return what has been measured."""
        return {"history": self.history, "decays": self._decays.state_dict()}

    def resume(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.history = [dict(entry) for entry in state_dict["history"]]
        self._decays.load_state_dict(state_dict["decays"])

    # ------------------------------------------------------------------------------------------------------ measurement
    def shows_progress(self, trainer: pl.Trainer) -> bool:
        """Return whether this rank draws bars."""
        return self.progress and trainer.is_global_zero and trainer.progress_bar_callback is not None  # type: ignore[attr-defined]

    def _load(self, trainer: pl.Trainer) -> dict[str, list[Any]]:
        shard = (trainer.global_rank, trainer.world_size) if self._sums(trainer) else (0, 1)
        batches: dict[str, list[Any]] = {}
        problem: MisconfigurationException | None = None
        for name, data in self.data.items():
            try:
                batches[name] = load_batches(trainer, data, self.samples, self.seed, shard, self.check)
            except MisconfigurationException as error:
                problem = problem or error
        if self._on_any_rank(trainer, problem is not None):
            raise problem or MisconfigurationException(f"Another rank can't load the data of {type(self).__name__}.")
        return batches

    def _on_any_rank(self, trainer: pl.Trainer, condition: bool) -> bool:
        flag = torch.tensor([float(condition)], device=trainer.strategy.root_device)
        return bool(sum_over_ranks(trainer.strategy, flag).item() > 0)

    def _measure(self, trainer: pl.Trainer, **log_options: bool) -> None:
        with not_training(trainer.strategy), self._shown(trainer):
            objectives = self._objectives(trainer, check=False)
            losses = {name: objective.loss() for name, objective in objectives.items()}
            infinite = [name for name, loss in losses.items() if not math.isfinite(loss)]
            if self._on_any_rank(trainer, bool(infinite)):
                what = f"of the {infinite[0]} data is {losses[infinite[0]]}" if infinite else "is not finite on another rank"
                rank_zero_warn(f"{type(self).__name__} measures nothing at step {trainer.global_step}: the loss {what}.")
                return
            result = self.measure(trainer, objectives)
            numbers = {key: float(value) for key, value in result.numbers().items()}
            if trainer.world_size > 1 and not self._sums(trainer):
                values = torch.tensor(list(numbers.values()), dtype=torch.float64).to(trainer.strategy.root_device)
                mean = sum_over_ranks(trainer.strategy, values) / trainer.world_size
                numbers = dict(zip(numbers, mean.tolist(), strict=True))
        self.result = result
        self.history.append({"step": trainer.global_step, "epoch": trainer.current_epoch, **numbers})
        logged = {f"{self.name}/{key}": value for key, value in numbers.items()}
        if log_options:
            assert trainer.lightning_module is not None
            log_doubles(trainer.lightning_module, logged, logger=False, **log_options)
        for logger in trainer.loggers:  # not by `self.log`, which leaves most steps out
            logger.log_metrics(logged, step=trainer.global_step)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._write(trainer, result)

    def _write(self, trainer: pl.Trainer, result: Result | Results[Any]) -> None:
        """Write a result, on the first rank."""
        results = result if isinstance(result, Results) else {"": result}
        for name, one in results.items():
            self._save(trainer, one, name if len(results) > 1 else "")

    def _save(self, trainer: pl.Trainer, result: Result, label: str = "") -> None:
        """Write the files of a result, with a label where there are several at this step."""
        kinds = self.save if self.save is not None else ("npz", "png") if trainer.loggers else ()
        assert self._folder is not None
        for kind in kinds:
            path = Path(self._folder, self.name, f"step={trainer.global_step:06d}{label and f'_{label}'}.{kind}")
            try:
                result.save(path)
            except ModuleNotFoundError as error:
                rank_zero_info(lacking(error, f"{type(self).__name__} draws no picture"))
                continue
            if kind == "png":
                _log_picture(trainer, f"{self.name}{label and f'/{label}'}", result, path)

    def _sums(self, trainer: pl.Trainer) -> bool:
        """Return whether all ranks measure the same weights, each on its part of the samples."""
        return trainer.world_size > 1 and (self.model == "average" or not replicas_differ(trainer.strategy))

    def _shown(self, trainer: pl.Trainer) -> AbstractContextManager[None]:
        """Let the module be what is measured."""
        strategy: Any = trainer.strategy
        if replicas_differ(strategy):
            return strategy.average_parameters() if self.model == "average" else nullcontext()  # type: ignore[no-any-return]
        return buffers_of_rank_zero(strategy) if trainer.world_size > 1 else nullcontext()

    def _objectives(self, trainer: pl.Trainer, check: bool) -> dict[str, Objective]:
        module = trainer.lightning_module
        loss_fn, metrics = self.loss_fn or DerivedLoss(module), self.metrics or derive_metrics(module)
        options: dict[str, Any] = {
            "loss_fn": in_precision(trainer, loss_fn),
            "metrics": in_precision(trainer, metrics) if metrics is not None else None,
            "parameters": self.parameters,
            "seed": self.seed,
            "reduce": partial(sum_over_ranks, trainer.strategy) if self._sums(trainer) else None,
        }
        return {name: Objective(module, batches=batches, check=check, **options) for name, batches in self._batches.items()}


def _named(data: Any) -> dict[str, Any]:
    """Return what is measured on, by name."""
    names = [data] if isinstance(data, str) else data
    if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
        wrong = [name for name in names if name not in _DATA]
        if wrong or len(set(names)) < len(names):
            raise ValueError(f"`data` must be 'train', 'val', both as a list, or batches; got {data!r}.")
        return {name: name for name in names}
    if isinstance(data, Iterator) or not isinstance(data, Iterable) or (isinstance(data, list | tuple) and not data):
        raise ValueError(
            f"`data` must be 'train', 'val', both as a list, or batches that can be gone through again and again; got {data!r}."
        )
    return {"data": data}


@contextmanager
def not_training(strategy: Strategy) -> Iterator[None]:
    """Charge what the body sends to evaluation: `traffic` tells what training costs."""
    if not isinstance(strategy, ReplicaStrategy):
        yield
        return
    traffic = strategy.traffic
    sent, seconds = traffic.bytes_sent, traffic.seconds_blocked
    try:
        yield
    finally:
        traffic.evaluation_bytes += traffic.bytes_sent - sent
        traffic.bytes_sent = sent
        traffic.add_interval(traffic.seconds_blocked, seconds)  # backwards, so that the body counts for nothing


def _log_picture(trainer: pl.Trainer, name: str, result: Result, path: Path) -> None:
    """Give a picture to those loggers that take pictures."""
    logger: Any
    for logger in trainer.loggers:
        if hasattr(getattr(logger, "experiment", None), "add_figure"):  # TensorBoard
            logger.experiment.add_figure(name, result.figure(), trainer.global_step)
        elif hasattr(logger, "log_image"):  # Weights & Biases
            logger.log_image(key=name, images=[str(path)], step=trainer.global_step)
