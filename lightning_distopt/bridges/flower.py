"""A LightningModule and an aggregator as a Flower app."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_distopt.bridges.messages import decode, encode
from lightning_distopt.bridges.remote import Message, RemoteClient, RemoteStrategy, check_options
from lightning_distopt.options import check_whole

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MessageType, RecordDict
    from flwr.app import Message as FlowerMessage
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "flwr":
        raise
    raise ModuleNotFoundError(
        "The bridge to Flower needs Flower: pip install 'lightning-distopt[flower]'.", name="flwr"
    ) from None

RECORD = "lightning-distopt"
"""The name of our records in Flower's messages and contexts."""


def client_app(
    module: Callable[[], pl.LightningModule],
    data: Callable[[int], DataLoader[Any] | pl.LightningDataModule],
    trainer: Mapping[str, Any] | None = None,
    **options: Any,
) -> ClientApp:
    """Return a Flower app that trains as one client of `FederatedStrategy`.

    Its number is the `partition-id` of its node: `flower-supernode --node-config 'partition-id=0'`. What clients keep from
    round to round (control variates, kept optimizers, local buffers) stays on their machines, in the context of the run.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
        >>> from torch.utils.data import DataLoader
        >>> app = client_app(
        ...     BoringModel, lambda k: DataLoader(RandomDataset(32, 64)), aggregator="fedprox", clients=2, fraction=1
        ... )

    Args:
        module: makes the module, a `LightningModule` class for instance.
        data: makes the client's training loader, or data module, from its number.
        trainer: options of its `Trainer`, such as `accelerator`, `precision` or `gradient_clip_val`.
        **options: of `FederatedStrategy`, the same as the server's: aggregator, clients, fraction, local_epochs, local_steps,
            weighting, optimizer_state and buffers.

    Raises:
        TypeError: for options that have no meaning here, such as `partition`.
        ValueError: for options out of range.
    """
    check_options(options)
    RemoteClient(0, module, data, trainer, options)  # raises what is wrong with `trainer`, before any round
    app = ClientApp()

    def client(context: Context) -> RemoteClient:
        number = context.node_config.get("partition-id")
        if not isinstance(number, int):
            raise ValueError("A client needs a number from 0 to K - 1: `flower-supernode --node-config 'partition-id=0' ...`.")
        return RemoteClient(number, module, data, trainer, options)

    @app.query()
    def introduce(message: FlowerMessage, context: Context) -> FlowerMessage:
        own = client(context)
        return FlowerMessage(_records({"number": own.number, **own.introduce(_tree(message.content))}), reply_to=message)

    @app.train()
    def train(message: FlowerMessage, context: Context) -> FlowerMessage:
        kept = context.state[RECORD]["kept"] if RECORD in context.state else b""
        answer, kept = client(context).train(_tree(message.content), kept)
        context.state[RECORD] = ConfigRecord({"kept": kept})
        return FlowerMessage(_records(answer), reply_to=message)

    return app


def server_app(
    module: Callable[[], pl.LightningModule],
    rounds: int,
    trainer: Mapping[str, Any] | None = None,
    validation: Callable[[], Any] | None = None,
    checkpoint: str | None = None,
    seed: int = 0,
    timeout: float = 3600,
    **options: Any,
) -> ServerApp:
    """Return a Flower app that is the server of `FederatedStrategy`, in a `Trainer` with one epoch for each round.

    It waits until all `K` clients have come, and asks for their numbers of samples. Then cohorts, weights and the next model
    follow from the seed and the aggregator as they do in one process, and so do the results. A client that fails, or does not
    answer in time, drops out of the round with a warning.

    Loggers, callbacks, schedulers of learning rates (clients get the rates of each round) and checkpoints work as they always
    do; what clients log with `self.log` is averaged, weighted as the clients are.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> app = server_app(BoringModel, rounds=10, aggregator="fedprox", clients=2, fraction=1)

    Args:
        module: makes the module, a `LightningModule` class for instance.
        rounds: how many there are.
        trainer: options of the `Trainer`, such as `callbacks` or `logger`.
        validation: makes the loaders of the validation data that the server has. None: those of the module, if it has any.
        checkpoint: the file into which the trained model goes, as a Lightning checkpoint.
        seed: of initial parameters, cohorts, and the batches and random numbers of clients.
        timeout: seconds to wait for clients to come, and for their answers in each round.
        **options: of `FederatedStrategy`, the same as the clients': aggregator, clients, fraction, local_epochs, local_steps,
            weighting, optimizer_state and buffers.

    Raises:
        TypeError: for options that have no meaning here, such as `partition`.
        ValueError: for options out of range.
    """
    check_options(options)
    check_whole("rounds", rounds)
    own = dict(trainer or {})
    for name, why in (("strategy", "is made of the other options"), ("max_epochs", "is `rounds`")):
        if name in own:
            raise ValueError(f"`{name}` {why}: leave it out of the options of the server's `trainer`.")
    if own.get("devices", 1) != 1 or own.get("num_nodes", 1) != 1:
        raise ValueError("The server is one process: leave `devices` and `num_nodes` out of `trainer`.")
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        torch.manual_seed(seed)
        made = module()
        strategy = RemoteStrategy(FlowerEngine(grid, options.get("clients", 100), timeout), **options)
        fitting = pl.Trainer(**{"devices": 1, "accelerator": "cpu", **own, "strategy": strategy, "max_epochs": rounds})
        nothing: Any = [0]  # the clients have the data
        fitting.fit(made, DataLoader(nothing), None if validation is None else validation())
        if checkpoint is not None:
            fitting.save_checkpoint(checkpoint)

    return app


class FlowerEngine:
    """Carries messages to the nodes of a Flower federation; see `bridges.remote.Engine`.

    Args:
        grid: what Flower gives to the main function of a `ServerApp`.
        clients: `K`, how many nodes there have to be.
        timeout: seconds to wait for them to come, and for their answers.
    """

    def __init__(self, grid: Grid, clients: int, timeout: float = 3600) -> None:
        self.grid, self.clients, self.timeout = grid, clients, timeout
        self._nodes: dict[int, int] = {}

    def introduce(self, message: Message) -> dict[int, Message]:
        """Wait for all nodes, and ask who they are.

        Raises:
            RuntimeError: if too few come, one can't answer, or two have the same number.
        """
        end = time.monotonic() + self.timeout
        while len(nodes := sorted(self.grid.get_node_ids())) < self.clients:
            if time.monotonic() > end:
                raise RuntimeError(
                    f"Of {self.clients} clients {len(nodes)} have come within {self.timeout:g} s: start the others."
                )
            time.sleep(0.2)
        introductions: dict[int, Message] = {}
        answers = self._send(MessageType.QUERY, {node: _records(message) for node in nodes})
        for node in nodes:
            answer = answers.get(node, f"it has not answered within {self.timeout:g} s")
            if isinstance(answer, str):
                raise RuntimeError(f"The Flower node {node} can't be a client: {answer}")
            number = answer.pop("number")
            if number in introductions:
                raise RuntimeError(f"Two Flower nodes are client {number}: give each a `partition-id` of its own.")
            introductions[number], self._nodes[number] = answer, node
        return introductions

    def exchange(self, messages: Mapping[int, Message]) -> dict[int, Message | str]:
        """Send messages to clients, and wait for the answers."""
        answers = self._send(MessageType.TRAIN, {self._nodes[k]: _records(message) for k, message in messages.items()})
        late = f"it has not answered within {self.timeout:g} s"
        return {k: answers.get(self._nodes[k], late) for k in messages}

    def _send(self, kind: str, contents: Mapping[int, RecordDict]) -> dict[int, Message | str]:
        """Return answers, or what went wrong, by node."""
        messages = [FlowerMessage(content, node, kind) for node, content in contents.items()]
        answers: dict[int, Message | str] = {}
        for answer in self.grid.send_and_receive(messages, timeout=self.timeout):
            failed = f"it has failed ({' '.join(str(answer.error.reason).split())})" if answer.has_error() else None
            answers[answer.metadata.src_node_id] = failed or _tree(answer.content)
        return answers


def _records(tree: Message) -> RecordDict:
    """Return Flower's form of a message: NumPy arrays and a line of JSON, nothing pickled."""
    text, arrays = encode(tree)
    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    return RecordDict({"arrays": record, RECORD: ConfigRecord({"tree": text})})


def _tree(content: RecordDict) -> Message:
    """Return the message that is in Flower's form."""
    arrays = {name: array.numpy() for name, array in content["arrays"].items()}
    tree: Message = decode(content[RECORD]["tree"], arrays)
    return tree
