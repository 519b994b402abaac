"""A client of a federation whose server is elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_distopt.bridges.remote.protocol import Message, copies, signature
from lightning_distopt.communication import Communicator, Replicas, isolated_streams
from lightning_distopt.communication.messages import pack, unpack
from lightning_distopt.communication.tensors import map_tensors, named_buffers
from lightning_distopt.federated import Client, Federation, cohorts
from lightning_distopt.strategies import FederatedStrategy
from lightning_distopt.strategies.clients import Clients, Turn

_QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class RemoteClient:
    """A client that gets its model from a server elsewhere.

    It trains as a client of `FederatedStrategy` does, in a `Trainer` of its own for each round.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
        >>> def data(k):
        ...     return DataLoader(RandomDataset(32, 10 + k))
        >>> client = RemoteClient(1, BoringModel, data, options={"clients": 2, "fraction": 0.5})
        >>> client.introduce({"seed": 0, "rounds": 4})["samples"]
        11

    Args:
        number: `k`, from 0 to `K - 1`.
        module: makes the module; called with the server's seed set, so that frozen parameters are the same everywhere.
        data: makes the client's training loader, or data module, from its number.
        trainer: options of its `Trainer`, such as `accelerator`, `precision` or `gradient_clip_val`.
        options: of `FederatedStrategy`, the same as the server's.

    Raises:
        ValueError: for options of the `Trainer` that are not the client's to choose.
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
            kept: what `train` returned the last time, if anything.

        Returns:
            The answer, and what the client keeps for its next round, which nobody else needs to know: its state before this
            round and after it, since only the server knows whether the answer arrives.
        """
        guest = self._fit(message, message["round"], kept)
        return guest.answer, guest.kept

    def _fit(self, message: Message, first: int, kept: bytes) -> _Guest:
        guest = _Guest(self.number, message, kept, self._options)
        options = {**_QUIET, "num_sanity_val_steps": 0, "limit_val_batches": 0, "devices": 1, **self._trainer}
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
        super().__init__(**copies(options))
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
        self.introduction = {"samples": samples, "steps": steps, **signature(self)}
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
            round_, before, after = unpack(torch.frombuffer(bytearray(self.kept), dtype=torch.uint8))
            self.states[self.number] = after if round_ == self.message["taken"] else before
        self.show_model()

    def _shares(self, clients: Sequence[int]) -> dict[int, float]:
        return dict.fromkeys(clients, float(self.message["share"]))

    def send(self, client: Client, loss: Tensor, row: int = 0) -> None:
        """Write the answer."""
        before = self.states.get(client.number)
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
            self.kept = pack((self.message["round"], before, self.states.get(client.number))).numpy().tobytes()

    def finish_round(self) -> None:
        """Nothing to do: the next model is made elsewhere."""
