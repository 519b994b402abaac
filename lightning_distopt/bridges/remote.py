"""Both ends of a federation whose clients are elsewhere, for any engine that carries messages between them."""

from __future__ import annotations

import copy
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_distopt.communication import Communicator, Replicas, isolated_streams
from lightning_distopt.communication.messages import pack, unpack
from lightning_distopt.communication.tensors import map_tensors
from lightning_distopt.federated import Client, DropWorst, Federation, Vector, cohorts
from lightning_distopt.federated.federation import NOT_FINITE
from lightning_distopt.federated.prototypes import named_buffers
from lightning_distopt.strategies import FederatedStrategy
from lightning_distopt.strategies.clients import Clients, Turn

Message = dict[str, Any]
"""Tensors, numbers and strings, in dictionaries and lists; see `bridges.messages`."""

OPTIONS = ("aggregator", "clients", "fraction", "local_epochs", "local_steps", "weighting", "optimizer_state", "buffers")
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Engine(Protocol):
    """What carries messages to clients, and brings their answers; in place of one that it can't bring, the reason why."""

    def introduce(self, message: Message) -> dict[int, Message]:
        """Ask all clients who they are; returns the answers by the clients' numbers."""

    def exchange(self, messages: Mapping[int, Message]) -> Mapping[int, Message | str]:
        """Send messages to clients, by number, and wait for the answers."""


def check_options(options: Mapping[str, Any]) -> None:
    """Raise an error for options that `FederatedStrategy` would refuse, or that have no meaning for clients elsewhere."""
    if "partition" in options:
        raise TypeError("`partition` divides data among clients, but clients elsewhere have their own: leave it out.")
    if "uplink" in options or "downlink" in options:
        raise TypeError("`uplink` and `downlink` can't be used with clients elsewhere, to whom models are sent as they are.")
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"Clients elsewhere have no option `{name}`: use {', '.join(OPTIONS)}.")
    aggregator: Any = FederatedStrategy(**options).aggregator
    while aggregator is not None:
        if isinstance(aggregator, DropWorst):
            raise ValueError(
                "`DropWorst` evaluates clients where they are trained, on the server's validation data, which is not there if "
                "that is elsewhere: use another aggregator."
            )
        aggregator = getattr(aggregator, "aggregator", None)


# ----------------------------------------------------------------------------------------------------------------- client
class RemoteClient:
    """A client that gets its model from a server elsewhere.

    It trains as a client of `FederatedStrategy` does, in a `Trainer` of its own for each round.

    Args:
        number: `k`, from 0 to `K - 1`.
        module: makes the module; called with the server's seed set, so that frozen parameters are the same everywhere.
        data: makes the client's training loader, or data module, from its number.
        trainer: options of its `Trainer`, such as `accelerator`, `precision` or `gradient_clip_val`.
        options: of `FederatedStrategy`, the same as the server's.
    """

    def __init__(
        self,
        number: int,
        module: Callable[[], pl.LightningModule],
        data: Callable[[int], DataLoader[Any] | pl.LightningDataModule],
        trainer: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.number, self._module, self._data = number, module, data
        self._trainer, self._options = dict(trainer or {}), dict(options or {})
        for name, why in (("strategy", "is made of the other options"), ("max_epochs", "is the server's number of rounds")):
            if name in self._trainer:
                raise ValueError(f"`{name}` {why}: leave it out of the options of the clients' `trainer`.")
        if self._trainer.get("devices", 1) != 1 or self._trainer.get("num_nodes", 1) != 1:
            raise ValueError("A client elsewhere trains on one device: leave `devices` and `num_nodes` out of `trainer`.")

    def introduce(self, message: Message) -> Message:
        """Return what the server has to know of this client before the first round."""
        return self._fit(message, message["rounds"], b"").introduction

    def train(self, message: Message, kept: bytes = b"") -> tuple[Message, bytes]:
        """Train for a round.

        Args:
            message: the server's.
            kept: what the client has kept from its last round, if anything.

        Returns:
            The answer, and what the client keeps for its next round, which nobody else needs to know.
        """
        guest = self._fit(message, message["round"], kept)
        return guest.answer, guest.kept

    def _fit(self, message: Message, first: int, kept: bytes) -> _Guest:
        guest = _Guest(self.number, message, kept, self._options)
        options = {**QUIET, "num_sanity_val_steps": 0, "limit_val_batches": 0, "devices": 1, **self._trainer}
        with isolated_streams(torch.device("cpu")):
            torch.manual_seed(message["seed"])
            module = self._module()
            trainer = pl.Trainer(strategy=guest, max_epochs=message["rounds"], **options)
            progress: Any = trainer.fit_loop.epoch_progress.current
            progress.processed = progress.completed = first  # an epoch is a round; after the last one nothing is trained
            data: Any = self._data(self.number)
            key = "datamodule" if isinstance(data, pl.LightningDataModule) else "train_dataloaders"
            trainer.fit(module, **{key: data})
        return guest


class _OwnData(Clients):
    """The data of one client alone; those with lower numbers have nothing."""

    def __init__(self, number: int, loader: Any, *options: Any) -> None:
        super().__init__(loader, lambda dataset, _: [range(len(dataset))], 1, *options)
        nothing = [0] * number
        self.samples, self.steps = nothing + self.samples, nothing + self.steps
        self._ends, self._epoch = nothing + self._ends, nothing + self._epoch


class _Guest(FederatedStrategy):
    """Trains one client for one round, and keeps its answer.

    Args:
        number: of the client.
        message: of the server.
        kept: what the client has kept.
        options: of `FederatedStrategy`.
    """

    algorithm: _GuestFederation

    def __init__(self, number: int, message: Message, kept: bytes, options: Mapping[str, Any]) -> None:
        super().__init__(**_copies(options))
        self.number, self.message = number, message
        self.introduction: Message = {}
        self.algorithm = _GuestFederation(self.algorithm, number, message, kept)

    @property
    def answer(self) -> Message:
        """What the client tells the server after training."""
        return self.algorithm.answer

    @property
    def kept(self) -> bytes:
        """What it keeps."""
        return self.algorithm.kept

    def _divide(self, loader: Any) -> Clients:
        limit: Any = self._limit
        own = _OwnData(self.number, loader, self.local_epochs, self.local_steps, limit, self._accumulate)
        samples, steps = own.samples[self.number], own.steps[self.number]
        self.introduction = {"samples": samples, "steps": steps, **_signature(self)}
        return own

    def _turns_of_round(self, steps: Sequence[int]) -> int:
        return 1

    def on_train_start(self) -> None:
        """Train with the server's learning rates, which follow its schedulers; here there are none."""
        super().on_train_start()
        self.lr_scheduler_configs = []
        for group, sent in zip(self.optimizers[0].param_groups, self.message["groups"], strict=True):
            group.update(sent)

    def _turns(self) -> Iterator[Turn]:
        federation, clients, k = self.algorithm, self._clients, self.number
        assert clients is not None
        self._require_replicas().check_frozen()
        plan = cohorts.Plan(federation.round, (k,), (((k,),),), clients.steps[k])
        federation.begin_round(plan, clients.samples, clients.steps)
        yield Turn(plan.round, 0, (k,))

    def _finish(self, trainer: pl.Trainer) -> None:
        super()._finish(trainer)
        trainer.should_stop = True

    def on_train_end(self) -> None:
        """Note what the module has logged."""
        super().on_train_end()
        assert self.lightning_module is not None
        logged = self.lightning_module.trainer.callback_metrics
        self.answer["logged"] = {name: value.item() for name, value in logged.items() if value.numel() == 1}


class _GuestFederation(Federation):
    """A server's place on the client's machine: it has the server's model, and takes down what the client sends."""

    def __init__(self, of: Federation, number: int, message: Message, kept: bytes) -> None:
        super().__init__(
            of.aggregator,
            of.clients,
            of.fraction,
            of.weighting,
            keep_optimizers=of.keep_optimizers,
            buffer_policy=of.buffer_policy,
        )
        self.number, self.message, self.kept = number, message, kept
        self.answer: Message = {}

    def setup(self, replicas: Replicas, communicator: Communicator) -> None:
        """Take the model of the server's message, and what the client has kept."""
        super().setup(replicas, communicator)
        if "model" not in self.message:
            return
        for slot in replicas.slots:
            slot.view(self.model[slot.block]).copy_(self.message["model"][slot.name])
        for buffer, sent in zip(self.buffers, self.message["buffers"].values(), strict=True):
            buffer.copy_(sent)
        if "aggregator" in self.message:
            self.aggregator.load_state_dict(map_tensors(self.message["aggregator"], lambda x: x.to(replicas.device)))
        if self.kept:
            self.states.load_state_dict({self.number: unpack(torch.frombuffer(bytearray(self.kept), dtype=torch.uint8))})
        self.show_model()

    def _shares(self, clients: Sequence[int]) -> dict[int, float]:
        return dict.fromkeys(clients, float(self.message["share"]))

    def send(self, client: Client, loss: Tensor, row: int = 0) -> None:
        """Write the answer."""
        super().send(client, loss, row)
        result = self._results[client.number]
        if isinstance(result, str):
            self.answer = {"refused": result}
            return
        model = {slot.name: slot.view(client.model[slot.block]).clone() for slot in self.replicas.slots}
        buffers = {name: buffer.detach().clone() for name, _, buffer in named_buffers(self.module)}
        self.answer = {"loss": result, "model": model, "buffers": buffers}
        if self.aggregator.vectors_up > 1:
            self.answer["sums"] = dict(self.aggregator.sums)
        if self.stateful:
            self.kept = pack(self.states.get(client.number)).numpy().tobytes()

    def finish_round(self) -> None:
        """Nothing to do: the next model is made elsewhere."""


# ----------------------------------------------------------------------------------------------------------------- server
class RemoteStrategy(FederatedStrategy):
    """`FederatedStrategy` on the server's side, for clients elsewhere.

    The `Trainer` gets any training loader, which stays unused. Before the first round the server asks the clients for their
    numbers of samples and steps, with which it chooses cohorts and weights as in one process. In a round it sends its model,
    with the options of its optimizer, so that clients follow its schedulers.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
        >>> class Here:
        ...     '''An engine that carries messages nowhere.'''
        ...
        ...     def __init__(self, clients):
        ...         self.clients = clients
        ...
        ...     def introduce(self, message):
        ...         return {client.number: client.introduce(message) for client in self.clients}
        ...
        ...     def exchange(self, messages):
        ...         return {k: self.clients[k].train(message)[0] for k, message in messages.items()}
        >>> def data(k):
        ...     return DataLoader(RandomDataset(32, 10 + k))
        >>> options = {"aggregator": "fedprox", "clients": 3, "fraction": 0.7}
        >>> engine = Here([RemoteClient(k, BoringModel, data, options=options) for k in range(3)])
        >>> strategy = RemoteStrategy(engine, **options)
        >>> trainer = pl.Trainer(strategy=strategy, accelerator="cpu", max_epochs=4, limit_val_batches=0, **QUIET)
        >>> trainer.fit(BoringModel(), DataLoader([0]))
        >>> strategy.traffic.rounds, len(strategy.algorithm.losses)
        (4, 2)

    Args:
        engine: carries messages.
        **options: of `FederatedStrategy`, the same as the clients'.
    """

    def __init__(self, engine: Engine, **options: Any) -> None:
        check_options(options)
        super().__init__(**_copies(options))
        self.engine = engine
        self._answers: dict[int, Message | str] = {}

    def _divide(self, loader: Any) -> Clients:
        assert self.lightning_module is not None
        if isinstance(self._clients, _Elsewhere):
            return self._clients
        rounds = self.lightning_module.trainer.max_epochs
        answers = self.engine.introduce({"seed": self._seed, "rounds": rounds})
        missing = sorted(set(range(self.clients)) - set(answers))
        if missing or len(answers) != self.clients:
            raise MisconfigurationException(
                f"There are {self.clients} clients, with numbers from 0 to {self.clients - 1}, of whom "
                f"{len(answers) - len(set(answers) - set(range(self.clients)))} have come"
                + (f"; number {missing[0]} is missing." if missing else f": number {max(answers)} is not one of them.")
            )
        for name, value in _signature(self).items():
            for k in sorted(answers):
                if answers[k][name] != value:
                    what = name if name == "options" else f"{name}, or other values of what is not trained,"
                    raise MisconfigurationException(
                        f"Client {k} has other {what} than the server: use the same file, and the same versions, everywhere."
                    )
        return _Elsewhere(*([answers[k][name] for k in range(self.clients)] for name in ("samples", "steps")))

    def _turns_of_round(self, steps: Sequence[int]) -> int:
        return 1

    def on_train_start(self) -> None:
        """Let schedulers work with optimizers that never step here."""
        super().on_train_start()
        for optimizer in self.optimizers:
            vars(optimizer)["_opt_called"] = True  # torch warns of schedulers otherwise

    def training_step(self, turn: Turn, *args: Any) -> Tensor:
        """Let the clients of a round train, all at the same time, wherever they are."""
        shared = self._message()
        shares = self.algorithm._client_shares
        answers = self.engine.exchange({k: {**shared, "share": shares[k]} for k in turn.clients})
        self._answers = {k: answers.get(k, "it has not answered") for k in turn.clients}
        self._log_means()
        return super().training_step(turn, *args)

    def _message(self) -> Message:
        federation, trainer = self.algorithm, self.lightning_module.trainer  # type: ignore[union-attr]
        groups = [
            {name: value for name, value in group.items() if isinstance(value, bool | int | float | tuple | Tensor)}
            for group in self.optimizers[0].param_groups
        ]
        names = [name for name, _, _ in named_buffers(federation.module)]
        message = {
            "seed": federation.seed,
            "round": federation.round,
            "rounds": trainer.max_epochs,
            "groups": groups,
            "model": {slot.name: slot.view(federation.sent[slot.block]) for slot in self._require_replicas().slots},
            "buffers": dict(zip(names, federation.buffers, strict=True)),
        }
        if federation.aggregator.vectors_down > 1:
            message["aggregator"] = federation.aggregator.state_dict()
        return message

    def _log_means(self) -> None:
        """Log what clients have logged: the means, weighted as the clients are."""
        logged = {k: a["logged"] for k, a in self._answers.items() if isinstance(a, dict) and "logged" in a}
        names = [name for name in next(iter(logged.values()), {}) if all(name in own for own in logged.values())]
        shares = self.algorithm._client_shares
        total = sum(shares[k] for k in logged)
        means = {name: sum(shares[k] / total * own[name] for k, own in logged.items()) for name in names}
        self.lightning_module.log_dict(means, on_step=False, on_epoch=True, batch_size=1)  # type: ignore[union-attr]

    def _train(self, number: int, batches: Iterator[Any], takes_number: bool) -> Tensor:
        """Take what a client has answered; returns its loss."""
        federation, answer = self.algorithm, self._answers.pop(number)
        reason = answer if isinstance(answer, str) else answer.get("refused")
        if reason is not None:
            federation._results[number] = reason
            return torch.tensor(float("nan"), device=self.root_device)
        answer = map_tensors(answer, lambda x: x.to(self.root_device))
        model: Vector = tuple(torch.zeros_like(x) for x in federation.model)
        for slot in self._require_replicas().slots:
            slot.view(model[slot.block]).copy_(answer["model"][slot.name])
        if not math.isfinite(answer["loss"]) or not all(x.isfinite().all() for x in model):  # whatever the client says
            federation._results[number] = NOT_FINITE
            return torch.tensor(float("nan"), device=self.root_device)
        for name, vector in answer.get("sums", {}).items():
            for total, own in zip(federation.aggregator.sums[name], vector, strict=True):
                total.add_(own)
        federation.take(number, model, list(answer["buffers"].values()), answer["loss"])
        return torch.tensor(answer["loss"], device=self.root_device)


class _Elsewhere(Clients):
    """Clients whose data is elsewhere; what is known of it are numbers."""

    def __init__(self, samples: list[int], steps: list[int]) -> None:
        self.samples, self.steps = samples, steps

    def iterate(
        self, clients: Sequence[int], round_: int, seed: int, first_all: bool = False, training: bool = True
    ) -> Iterator[Any]:
        """Return no batches."""
        if not training:
            raise RuntimeError("The clients' data is on their machines: evaluate the model there, or on data of the server.")
        return iter(())


# ------------------------------------------------------------------------------------------------------------------- both
def _copies(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of a strategy's own: aggregators are bound to the strategy that has them."""
    return copy.deepcopy(dict(options))


def _signature(strategy: FederatedStrategy) -> dict[str, str]:
    """Return what has to be the same on both sides: the options, and the model but for the values that are sent."""
    replicas = strategy._require_replicas()
    digest = hashlib.sha256(replicas.signature().encode())
    for name, parameter in replicas.module.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    options = re.sub(r" at 0x[0-9a-f]+", "", repr(strategy._options()))
    return {"options": options, "parameters": digest.hexdigest()}
