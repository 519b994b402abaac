"""How well the clients of a federation do, what they send, and how soon the model is good enough."""

from __future__ import annotations

import csv
import inspect
import json
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from tqdm.auto import tqdm

from lightning_distopt.analysis.undisturbed import undisturbed
from lightning_distopt.callbacks.client_figure import draw_clients
from lightning_distopt.callbacks.fit_callback import FitCallback
from lightning_distopt.callbacks.values import log_doubles, readable_size
from lightning_distopt.figures import lacking
from lightning_distopt.files import replacing
from lightning_distopt.options import check_choice, is_number, is_whole
from lightning_distopt.strategies import FederatedStrategy
from lightning_distopt.strategies import _lightning as private
from lightning_distopt.strategies.local_updates import loss_of

_MEASURES = ("accuracy", "loss")
_KINDS = ("png", "csv", "json")


class ClientMonitor(FitCallback):
    r"""Log how well clients do and what they send, and draw it after training.

    After each round it logs, from the mean loss that each client had over its batches of the round,

    - `federated/train_loss`, their mean over clients, all weighing the same, and `federated/train_loss_std`, `_min`, `_max`;
    - `federated/clients` whose models were used, and `federated/dropped`, those that were not finite;
    - `federated/bytes_up` and `federated/bytes_down`, of all clients together, so far.

    Every `every_n_rounds` rounds the server's new model (where there are prototypes, each client's own) is tried on all
    training data, client by client. Over all `K` clients it logs the mean `federated/client_accuracy`, its `_std`, and its
    `_worst_decile`, the mean of the worst tenth:

    $$ a_k = \frac{1}{n_k} \sum_{i \in P_k} [\, \arg\max f(x_t, \xi_i) = y_i \,], \qquad \bar a = \frac{1}{K} \sum_k a_k $$

    Once the validation metric `monitor` has come to `target`, it logs `federated/rounds_to_target`. Training is bit-identical
    to training without it.

    Example:
        >>> from lightning_distopt import ClientMonitor, FederatedStrategy
        >>> monitor = ClientMonitor(every_n_rounds=5, target=0.8)
        >>> trainer = pl.Trainer(strategy=FederatedStrategy(clients=20), callbacks=[monitor], accelerator="cpu", devices=1)

    Args:
        every_n_rounds: rounds from one trial of the model on the clients' data to the next; 0: never. One is a forward pass
            over all training data, of which each rank makes its part.
        measure: "accuracy" needs batches of `(inputs, classes)` and a module whose `forward` returns scores of classes; "loss"
            is what `training_step` returns, called in evaluation mode, where `self.log` does nothing.
        monitor: name of the validation metric that is kept, drawn and compared with `target`.
        mode: whether the metric is good when it is large ("max") or small ("min").
        target: value that it is to come to. None: there is no such value.
        save: what is written into the log folder when training ends: a picture `clients.png`, and `history` as `clients.csv` or
            `clients.json`. None: the picture, if there is a logger.

    Attributes:
        history: a dictionary for each round, the same on every rank: what is logged, without `federated/`; `round` (from 1),
            `step`, the `losses` of the round's clients by number, the values `on_clients` of all clients, if they were
            measured, and `monitor` under its name, if there was a validation.
        rounds_to_target: the first round after which the metric had come to the target, or None.

    Raises:
        ValueError: for options that are unknown or contradict each other.
        MisconfigurationException: when fitting starts, if the strategy is another one, there is no validation that could come
            to the target, or the accuracy can't be measured.
    """

    def __init__(
        self,
        every_n_rounds: int = 0,
        measure: Literal["accuracy", "loss"] = "accuracy",
        monitor: str = "val_accuracy",
        mode: Literal["max", "min"] = "max",
        target: float | None = None,
        save: Sequence[Literal["png", "csv", "json"]] | None = None,
    ) -> None:
        super().__init__()
        if not is_whole(every_n_rounds, least=0):
            raise ValueError(
                f"`every_n_rounds` must be a whole number of rounds, or 0 for never to measure; got {every_n_rounds!r}."
            )
        check_choice("measure", measure, _MEASURES)
        check_choice("mode", mode, ("max", "min"))
        if not isinstance(monitor, str) or not monitor:
            raise ValueError(f"`monitor` must be the name of a validation metric, such as 'val_accuracy'; got {monitor!r}.")
        if target is not None and not (is_number(target) and math.isfinite(target)):
            raise ValueError(f"`target` must be a number that `{monitor}` is to come to; got {target!r}.")
        if save is not None and (isinstance(save, str) or not all(kind in _KINDS for kind in save)):
            raise ValueError(f"`save` must be a list of {', '.join(map(repr, _KINDS))}; got {save!r}.")
        self.every_n_rounds, self.measure, self.monitor, self.mode = every_n_rounds, measure, monitor, mode
        self.target, self.save = target, save
        self._reset()

    def _reset(self) -> None:
        self.history: list[dict[str, Any]] = []
        self.rounds_to_target: int | None = None
        self._paths: list[str] = []
        self._logged = 0  # the last round that is in the logger

    # ------------------------------------------------------------------------------------------------------ life cycle
    def setup_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse strategies that have no clients."""
        if not isinstance(trainer.strategy, FederatedStrategy):
            raise MisconfigurationException(
                f"ClientMonitor watches clients, but the strategy is {type(trainer.strategy).__name__}: use "
                "`Trainer(strategy=FederatedStrategy(...))`."
            )
        if self.target is not None and not trainer.enable_validation:
            raise MisconfigurationException(
                f"ClientMonitor waits for `{self.monitor}` to come to {self.target:g}, but there is no validation: give the "
                "Trainer validation data and the module a `validation_step`, or leave `target` out."
            )
        self._reset()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Settle where things are written, and see whether clients can be measured, on one batch."""
        kinds = self.save if self.save is not None else ("png",) if trainer.loggers else ()  # type: ignore[attr-defined]
        folder = trainer.log_dir or trainer.default_root_dir  # collective
        self._paths = [] if trainer.fast_dev_run else [os.path.join(folder, f"clients.{kind}") for kind in kinds]  # type: ignore[attr-defined]
        if self.every_n_rounds:
            strategy = _strategy(trainer)
            with self._trying(trainer):
                client, _, batch = next(strategy.client_batches([0]))
                self._value(strategy, client, batch)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note a round that has just ended. Collective if clients are measured."""
        strategy = _strategy(trainer)
        federation = strategy.algorithm
        if federation.turn > 0:
            return
        losses = list(federation.losses.values())
        entry: dict[str, Any] = {"round": federation.round, "step": trainer.global_step}
        if losses:
            entry |= {"train_loss": statistics.fmean(losses), "train_loss_std": statistics.pstdev(losses)}
            entry |= {"train_loss_min": min(losses), "train_loss_max": max(losses)}
        entry |= {"clients": len(losses), "dropped": len(federation.dropped)}
        entry |= {"bytes_up": strategy.traffic.bytes_up, "bytes_down": strategy.traffic.bytes_down}
        entry["losses"] = dict(federation.losses)
        if self.every_n_rounds and federation.round % self.every_n_rounds == 0:
            values = self._on_clients(trainer)
            own = list(values.values())
            worst = sorted(own, reverse=self.measure == "loss")[: -(-len(own) // 10)]
            entry |= {f"client_{self.measure}": statistics.fmean(own), f"client_{self.measure}_std": statistics.pstdev(own)}
            entry |= {f"client_{self.measure}_worst_decile": statistics.fmean(worst), "on_clients": values}
        self.history.append(entry)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the validation metric after the round, and whether it has come to the target. Collective."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or not self.history:
            return
        communicator = _strategy(trainer).communicator
        assert communicator is not None
        own = trainer.callback_metrics.get(self.monitor)
        values = [value for value in communicator.gather(None if own is None else float(own)) if value is not None]
        if not values:
            if self.target is None:
                return
            known = ", ".join(f"`{name}`" for name in trainer.callback_metrics if not name.startswith("federated/"))
            raise MisconfigurationException(
                f"ClientMonitor waits for `{self.monitor}` to come to {self.target:g}, but no such metric is logged: let "
                f"`monitor` be one that is ({known or 'none is'})."
            )
        entry = self.history[-1]
        value = entry[self.monitor] = statistics.fmean(values)  # where ranks have not agreed on it
        if self.target is None or self.rounds_to_target is not None:
            return
        if value >= self.target if self.mode == "max" else value <= self.target:
            self.rounds_to_target = entry["round"]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what is known of the round."""
        if not self.history or self.history[-1]["round"] == self._logged:
            return
        entry = self.history[-1]
        self._logged = entry["round"]
        others = ("round", "step", "losses", "on_clients", self.monitor)
        values = {f"federated/{name}": value for name, value in entry.items() if name not in others}
        if self.rounds_to_target == entry["round"]:
            values["federated/rounds_to_target"] = entry["round"]
        log_doubles(pl_module, values, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what is to be written."""
        if self.history:
            rank_zero_info(_summary(self))
            self._save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write what there is by now."""
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero or not self.history:
            return
        for path in self._paths:
            try:
                self.plot(path) if path.endswith(".png") else self.write(path)
            except ModuleNotFoundError as error:
                rank_zero_info(lacking(error, "ClientMonitor draws no picture"))

    def state_dict(self) -> dict[str, Any]:
        """Return the history, which goes on after a resume."""
        return {"history": [dict(entry) for entry in self.history], "rounds_to_target": self.rounds_to_target}

    def resume(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.history, self.rounds_to_target = [dict(entry) for entry in state_dict["history"]], state_dict["rounds_to_target"]

    # -------------------------------------------------------------------------------------------------------- on clients
    def _on_clients(self, trainer: pl.Trainer) -> dict[int, float]:
        """Return the server's model's value on the training data of every client. Collective."""
        strategy = _strategy(trainer)
        own = range(strategy.global_rank, strategy.clients, strategy.world_size)
        totals, counts = torch.zeros(2, strategy.clients, dtype=torch.float64)
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None  # type: ignore[attr-defined]
        with self._trying(trainer), tqdm(total=len(own), desc="Clients", leave=False, disable=not shown) as bar:
            for client, samples, batch in strategy.client_batches(own):
                bar.update(own.index(client) - bar.n)
                value = self._value(strategy, client, batch)
                if value is not None:
                    totals[client] += samples * value
                    counts[client] += samples
        assert strategy.communicator is not None
        values: dict[int, float] = {}
        for of_rank in strategy.communicator.gather({k: float(totals[k] / counts[k]) for k in own}):
            values |= of_rank
        return {k: values[k] for k in sorted(values)}

    @contextmanager
    def _trying(self, trainer: pl.Trainer) -> Iterator[None]:
        """Let the module be the server's model in evaluation mode, and put everything back that the body could change."""
        strategy = _strategy(trainer)
        module: Any = strategy.lightning_module
        shown = strategy.algorithm.showing(strategy.algorithm.model, strategy.algorithm.buffers)
        precision = strategy.precision_plugin.val_step_context()
        with undisturbed(module), torch.no_grad(), shown, precision, private.captured_logs(module):
            yield

    def _value(self, strategy: FederatedStrategy, client: int, batch: Any) -> float | None:
        """Return the mean over the samples of a client's batch; None for one that `training_step` skips."""
        module: Any = strategy.lightning_module
        prototype = strategy.algorithm.group(client).name
        if prototype is not None:
            module.prototype = prototype
        if self.measure == "loss":
            numbered = len(inspect.signature(module.training_step).parameters) > 1
            loss = loss_of(module.training_step(batch, 0) if numbered else module.training_step(batch))
            return None if loss is None else float(loss)
        pair = isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[1], Tensor)
        if pair and is_overridden("forward", module):
            scores, classes = module(batch[0]), batch[1]
            fits = isinstance(scores, Tensor) and scores.ndim > 1 and scores[:, 0].shape == classes.shape
            if fits and not classes.is_floating_point():
                return float((scores.argmax(dim=1) == classes).double().mean())
        raise MisconfigurationException(
            "ClientMonitor can't tell the accuracy on this data, which takes batches of `(inputs, classes)`, and a `forward` "
            "that returns scores of classes: use `measure='loss'`, or `every_n_rounds=0`."
        )

    # ----------------------------------------------------------------------------------------------------------- writing
    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the history: to a `.csv` file all but the values of single clients, to any other all of it as JSON.

        Args:
            path: of the file, whose folder is made where there is none.
        """
        with replacing(path) as aside, aside.open("w", newline="") as file:
            if str(path).endswith(".csv"):
                rows = [{k: v for k, v in entry.items() if not isinstance(v, dict)} for entry in self.history]
                writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
                writer.writeheader()
                writer.writerows(rows)
            else:
                about = {"monitor": self.monitor, "target": self.target, "rounds_to_target": self.rounds_to_target}
                json.dump({**about, "history": self.history}, file, indent=1)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the history: train loss, values on the clients' data, and the validation metric by rounds and by bytes.

        Args:
            path: of a PNG file, whose folder is made where there is none.

        Raises:
            ModuleNotFoundError: without matplotlib, which comes with `lightning-distopt[plot]`.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        draw_clients(self.history, self.measure, self.monitor, self.target, self.rounds_to_target, path)


def _strategy(trainer: pl.Trainer) -> FederatedStrategy:
    assert isinstance(trainer.strategy, FederatedStrategy)
    return trainer.strategy


def _summary(monitor: ClientMonitor) -> str:
    last = monitor.history[-1]
    up, down = readable_size(last["bytes_up"]), readable_size(last["bytes_down"])
    text = f"ClientMonitor: {last['round']:,} round(s), {up} from clients and {down} to them"
    dropped = sum(entry["dropped"] for entry in monitor.history)
    if dropped:
        text += f", {dropped:,} times a client was dropped"
    if monitor.target is not None:
        when = "never" if monitor.rounds_to_target is None else f"in round {monitor.rounds_to_target:,}"
        text += f"; `{monitor.monitor}` came to {monitor.target:g} {when}"
    return f"{text}."
