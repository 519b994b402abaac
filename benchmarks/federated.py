"""Rounds of 100 clients that train LeNet on 28x28 images in batches of 10: client steps per second, and memory.

Ways to train a round on one core, in turn, with the same network, data, batch size and SGD; all of a contestant's
processes are pinned to that core. A turn is a whole round: sending, training and averaging.

- `FederatedStrategy` in one endless `Trainer.fit`, one client after the other; and 20 clients at once, a figure;
- a hand-written loop in plain torch, with a `DataLoader` over a `Subset` for each client, as people write it;
- the leanest loop, which cuts batches out of tensors by hand: a figure;
- a new `Trainer` for each client, a figure;
- Flower's simulation, if `flwr[simulation]` is installed, with one actor.

What counts is own time (see `harness`), and against Flower, whose clients train in another process, time on the wall.

Memory is the peak of resident memory in a fit of three rounds, above that of the process with all imports, the module
and the data. For very many clients it is compared to that of 100, as a whole, on images that are made when they are
loaded, 14 of them for each client, so that the data does not grow; a round has 100 clients in both cases.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from benchmarks.harness import Team, Turns, fix_malloc, interleave, makespan, memory, now, own_seconds, reset_peak, trainer
from benchmarks.report import Report, estimate, main, progress, ratio
from benchmarks.surroundings import cores
from lightning_distopt import FederatedStrategy
from lightning_distopt.models import LeNet

BATCH, LR = 10, 0.01
OVER_LOOP = 0.9
OVER_FLOWER = {14: 4.0, 120: 1.8}
AT_ONCE = 20


@dataclass(frozen=True)
class Settings:
    """Pairs of rounds, and for memory; clients, samples of each, many clients, and whether Flower takes part."""

    pairs: int
    memory_pairs: int
    clients: int = 100
    samples: tuple[int, ...] = (14, 120)
    many: int = 10_000
    flower: bool = True


FULL = Settings(pairs=20, memory_pairs=10)
QUICK = Settings(pairs=3, memory_pairs=1)


# ------------------------------------------------------------------------------------------------------ what is trained
class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = LeNet(image_size=28)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR)


def images(size: int) -> TensorDataset:
    """Return random images."""
    return TensorDataset(torch.randn(size, 1, 28, 28), torch.randint(10, (size,)))


class Made(Dataset[Any]):
    """Images that are made when they are loaded."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, k: int) -> tuple[Tensor, int]:
        return torch.full((1, 28, 28), k / self.size), k % 10


def parts(clients: int, samples: int) -> list[range]:
    """Return the samples of every client."""
    return [range(k * samples, (k + 1) * samples) for k in range(clients)]


# --------------------------------------------------------------------------------------------------------- contestants
class TakeRounds(pl.Callback):
    """Lets a `Trainer` train one round in every turn."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.start = now()

    def on_train_start(self, *_: Any) -> None:
        self.turns.wait()
        self.start = now()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.turns.report(self.start, now())
        self.on_train_start()


def strategy(turns: Turns, clients: int, samples: int, m: int = 1) -> None:
    """Train rounds in one fit."""
    made = FederatedStrategy(clients=clients, fraction=1.0, partition=parts(clients, samples), replicas_per_device=m)
    loader = DataLoader(images(clients * samples), BATCH, shuffle=True)
    trainer(made, callbacks=[TakeRounds(turns)]).fit(Classifier(), loader)


def rounds(turns: Turns, clients: int, train: Callable[[nn.Module, int], None]) -> None:
    """Train rounds by hand: every client from the server's network, and the average of what they have learned."""
    network = LeNet(image_size=28)
    server = {name: value.clone() for name, value in network.state_dict().items()}
    while True:
        turns.wait()
        start = now()
        total = {name: torch.zeros_like(value) for name, value in server.items()}
        for k in range(clients):
            network.load_state_dict(server)
            train(network, k)
            for name, value in network.state_dict().items():
                total[name].add_(value, alpha=1 / clients)
        server = total
        turns.report(start, now())


def train_by_hand(network: nn.Module, batches: Any) -> None:
    """Train a client."""
    optimizer = torch.optim.SGD(network.parameters(), lr=LR)
    for inputs, targets in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), targets).backward()
        optimizer.step()


def loop(turns: Turns, clients: int, samples: int) -> None:
    """Train as people write it."""
    data = images(clients * samples)
    loaders = [DataLoader(Subset(data, own), BATCH, shuffle=True) for own in parts(clients, samples)]
    rounds(turns, clients, lambda network, k: train_by_hand(network, loaders[k]))


def lean_loop(turns: Turns, clients: int, samples: int) -> None:
    """Train without loaders."""
    inputs, targets = images(clients * samples).tensors

    def batches(k: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = k * samples + torch.randperm(samples)
        return ((inputs[own], targets[own]) for own in order.split(BATCH))

    rounds(turns, clients, lambda network, k: train_by_hand(network, batches(k)))


def trainer_each(turns: Turns, clients: int, samples: int) -> None:
    """Train every client by a `Trainer` of its own."""
    data, module = images(clients * samples), Classifier()

    def train(network: nn.Module, k: int) -> None:
        module.network.load_state_dict(network.state_dict())
        loader = DataLoader(Subset(data, parts(clients, samples)[k]), BATCH, shuffle=True)
        trainer("auto", max_epochs=1).fit(module, loader)
        network.load_state_dict(module.network.state_dict())

    rounds(turns, clients, train)


def flower(turns: Turns, clients: int, samples: int) -> None:
    """Train in Flower's simulation."""
    os.environ.update(FLWR_TELEMETRY_ENABLED="0", RAY_USAGE_STATS_ENABLED="0")
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    client, server = ClientApp(), ServerApp()
    loaded: dict[int, Any] = {}  # of the actor

    @client.train()
    def train(message: Message, context: Context) -> Message:
        k = int(context.node_config["partition-id"])
        if k not in loaded:
            loaded[k] = DataLoader(images(samples), BATCH, shuffle=True)
        network = LeNet(image_size=28)
        network.load_state_dict(message.content["arrays"].to_torch_state_dict())
        train_by_hand(network, loaded[k])
        content = {"arrays": ArrayRecord(network.state_dict()), "metrics": MetricRecord({"num-examples": samples})}
        return Message(content=RecordDict(content), reply_to=message)

    @server.main()
    def take_turns(grid: Grid, context: Context) -> None:
        arrays = ArrayRecord(LeNet(image_size=28).state_dict())
        while True:
            turns.wait()
            start = now()
            average = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
            arrays = average.start(grid=grid, initial_arrays=arrays, num_rounds=1, train_config=ConfigRecord()).arrays
            turns.report(start, now())

    resources: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 1}}
    run_simulation(server, client, num_supernodes=clients, backend_config=resources)


# ----------------------------------------------------------------------------------------------------------------- run
def run(report: Report, settings: Settings) -> None:
    """Measure time and memory."""
    with_flower = settings.flower and all(importlib.util.find_spec(name) for name in ("flwr", "ray"))
    if settings.flower and not with_flower:
        print("Flower's simulation is not installed: there are no figures of it (`pip install 'flwr[simulation]'`).")
    for samples in settings.samples:
        speed(report, settings, samples, with_flower)
    extra_memory(report, settings)
    memory_of_many(report, settings)


def speed(report: Report, settings: Settings, samples: int, with_flower: bool) -> None:
    """Compare client steps per second."""
    bodies: dict[str, Callable[..., None]] = {
        "FederatedStrategy": strategy,
        "FederatedStrategy, clients at once": partial(strategy, m=min(AT_ONCE, settings.clients)),
        "loop": loop,
        "leanest loop": lean_loop,
        "Trainer for each client": trainer_each,
    }
    if with_flower:
        bodies["Flower"] = flower
    on, clients = cores()[-1:], settings.clients
    teams = {name: Team(name, partial(body, clients=clients, samples=samples), on=on) for name, body in bodies.items()}
    if with_flower:
        teams["Flower"].turn(timeout=600)  # Ray starts, and its actor imports everything
    laps = interleave(f"{samples} samples", teams, settings.pairs)
    seconds = {name: own_seconds(of) for name, of in laps.items()}
    steps = clients * -(-samples // BATCH)
    for name in bodies:
        times = makespan(laps[name]) if name == "Flower" else seconds[name]
        report.figure(f"{samples} samples: {name}", estimate([steps / t for t in times]), "client steps/s")
    ours = seconds["FederatedStrategy"]
    for name in ("FederatedStrategy, clients at once", "leanest loop", "Trainer for each client"):
        report.figure(f"{samples} samples: FederatedStrategy over {name}", ratio(seconds[name], ours))
    report.bar(
        f"federated: {samples} samples, over a hand-written loop", ratio(seconds["loop"], ours), OVER_LOOP, at_least=True
    )
    if with_flower:
        wall = ratio(makespan(laps["Flower"]), makespan(laps["FederatedStrategy"]))
        report.bar(f"federated: {samples} samples, over Flower", wall, OVER_FLOWER[samples], at_least=True)


def peak(turns: Turns, clients: int, fraction: float, samples: int, made: bool) -> None:
    """Report the peak of memory in a fit, and what the process had before."""
    fix_malloc()
    module, data = Classifier(), Made(clients * samples) if made else images(clients * samples)
    turns.wait()
    reset_peak()
    before = memory(peak=False)
    federated = FederatedStrategy(clients=clients, fraction=fraction, partition=parts(clients, samples))
    trainer(federated, max_epochs=3).fit(module, DataLoader(data, BATCH, shuffle=True))
    turns.report_value((memory(), before))
    turns.wait()


def extra_memory(report: Report, settings: Settings) -> None:
    """Compare the peak with the process before."""
    samples = max(settings.samples)
    extra = []
    for k in range(settings.memory_pairs):
        progress("memory", k + 1, settings.memory_pairs)
        body = partial(peak, clients=settings.clients, fraction=1.0, samples=samples, made=False)
        with Team("memory", body, on=cores()[-1:]) as team:
            highest, before = team.turn()[0].value
            extra.append(highest - before)
    report.bar("federated: memory above the base process (MiB)", estimate(extra), 100)


def memory_of_many(report: Report, settings: Settings) -> None:
    """Compare the peaks with few and many clients."""
    few, many = settings.clients, settings.many
    peaks: dict[int, list[float]] = {few: [], many: []}
    for k in range(settings.memory_pairs):
        progress("memory of many clients", k + 1, settings.memory_pairs)
        for clients in (few, many):
            body = partial(peak, clients=clients, fraction=few / clients, samples=min(settings.samples), made=True)
            with Team("memory", body, on=cores()[-1:]) as team:
                peaks[clients].append(team.turn()[0].value[0])
    more = estimate([b - a for a, b in zip(peaks[few], peaks[many], strict=True)])
    report.figure(f"memory of {many} clients, above that of {few}", more, "MiB")
    report.bar(f"federated: memory of {many} clients over {few}", ratio(peaks[many], peaks[few]), 1.05)


def cli(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    main("federated", run, FULL, QUICK, argv)


if __name__ == "__main__":
    cli()
