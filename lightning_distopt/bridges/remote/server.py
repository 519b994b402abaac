"""The server of a federation whose clients are elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_distopt.bridges.remote.protocol import Engine, Message, check_options, copies, signature
from lightning_distopt.communication.tensors import finite, map_tensors, named_buffers
from lightning_distopt.federated import Vector
from lightning_distopt.federated.federation import NOT_FINITE
from lightning_distopt.options import is_whole
from lightning_distopt.strategies import FederatedStrategy
from lightning_distopt.strategies.clients import Clients, Turn


class RemoteStrategy(FederatedStrategy):
    """`FederatedStrategy` on the server's side, for clients elsewhere.

    The `Trainer` gets any training loader, which stays unused. Before the first round the server asks the clients for their
    numbers of samples and steps, with which it chooses cohorts and weights as in one process. In a round it sends its model,
    with the options of its optimizer, so that clients follow its schedulers.

    Example:
        >>> import lightning.pytorch as pl
        >>> from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
        >>> from torch.utils.data import DataLoader
        >>> from lightning_distopt.bridges.remote import RemoteClient
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
        >>> quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer = pl.Trainer(strategy=strategy, accelerator="cpu", max_epochs=4, limit_val_batches=0, **quiet)
        >>> trainer.fit(BoringModel(), DataLoader([0]))
        >>> strategy.traffic.rounds, len(strategy.algorithm.losses)
        (4, 2)

    Args:
        engine: carries messages.
        **options: of `FederatedStrategy`, the same as the clients'.

    Raises:
        TypeError: for an option that there is not, or that has no meaning for clients elsewhere.
        ValueError: for one out of range.
    """

    def __init__(self, engine: Engine, **options: Any) -> None:
        check_options(options)
        super().__init__(**copies(options))
        self.engine = engine
        self._answers: dict[int, Message | str] = {}

    def setup(self, trainer: pl.Trainer) -> None:
        """Set up, where there are rounds to tell the clients of."""
        if trainer.state.fn == TrainerFn.FITTING and not is_whole(trainer.max_epochs, 1):
            raise MisconfigurationException(
                "Clients elsewhere have to know the number of rounds: give the Trainer `max_epochs`."
            )
        super().setup(trainer)

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
        for name, value in signature(self).items():
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
        shares, taken = self.algorithm._client_shares, self.algorithm.taken
        messages = {k: {**shared, "share": shares[k], "taken": taken.get(k)} for k in turn.clients}
        answers = self.engine.exchange(messages)
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
        loss = torch.tensor(answer["loss"], device=self.root_device)
        buffers, sums = list(answer["buffers"].values()), answer.get("sums", {})
        watched = federation.watched(buffers, federation.group(number).all_buffers)
        added = [x for vector in sums.values() for x in vector]
        if not all(finite([loss, *model, *watched, *added])):  # whatever the client says
            federation._results[number] = NOT_FINITE
            return torch.full_like(loss, float("nan"))
        for name, vector in sums.items():
            for total, own in zip(federation.aggregator.sums[name], vector, strict=True):
                total.add_(own)
        federation.take(number, model, buffers, answer["loss"])
        return loss


class _Elsewhere(Clients):
    """Clients whose data is elsewhere; what is known of it are numbers."""

    def __init__(self, samples: list[int], steps: list[int]) -> None:
        self.samples, self.steps, self.division = samples, steps, ""

    def iterate(
        self, clients: Sequence[int], round_: int, seed: int, first_all: bool = False, training: bool = True
    ) -> Iterator[Any]:
        """Return no batches."""
        if not training:
            raise RuntimeError("The clients' data is on their machines: evaluate the model there, or on data of the server.")
        return iter(())
