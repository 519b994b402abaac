"""Cost of a round and of a training step as the number of processes and of parameters grows, beside what it must cost.

Averaging by all-reduce (local SGD), D-PSGD on a ring and on the one-peer exponential graph, and CHOCO-SGD with signs on a
ring, each inside a Lightning `Trainer` of gloo processes on one machine. Three things take turns in the same processes,
behind a barrier; a sample is the time on the wall until the last process is done:

- bare gloo: what has to cross the wire and nothing else. For averaging one `all_reduce` of one flat buffer and a division, as
  in `round_cost`; for gossip `isend` and `irecv` of messages of the same sizes between the same processes, as in
  `gossip_round`, which is without any arithmetic. It sends the parameters from where they lie, as a round does;
- a round: all that the algorithm does around a step without gradients;
- a step of the `Trainer` with a round in it, on a model of as many parameters whose step computes next to nothing: sixteen
  of them are trained, the others have no gradient. The least it can take is the step of as many processes that train alone,
  beside one another, and bare gloo: the sum of both, or the longer one for algorithms that talk while gradients are computed.

Bytes are those that the package counts, beside the bounds: `2 (n - 1) / n` times the parameters for an all-reduce, `deg` times
the message for gossip, where a message of signs has a bit for each value and four bytes for each tensor. They are a fact, not
a measurement: equal, but for padding, or wrong.

Most of these processes share cores, and so does bare gloo, so ratios are fair; times are not those of as many machines.
Averaging does no more than bare gloo, so its bar holds for any number of processes. Gossip has the arithmetic of mixing on
top, for which there is a core with time to spare only where each process has one: elsewhere its ratio is shown without a bar.
Signs take more time to make than they save on memory that is copied, so they have none either. Bars begin at a million
values: with fewer, latency is paid for and microseconds of Python are visible.

What would not fit into memory is left out, and the report says what it would take: the parameters, what the algorithm keeps
beside them (measured by `algorithm_memory`), and what bare gloo receives into, of all processes together.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.gossip_round import Bare
from benchmarks.harness import Lap, TakeTurns, Team, Turns, interleave, makespan, now, trainer
from benchmarks.report import Estimate, Report, estimate, progress, ratio
from benchmarks.surroundings import cores
from lightning_distopt import CHOCO, GossipStrategy, LocalSGDStrategy
from lightning_distopt.communication import all_reduce_bytes
from lightning_distopt.topologies import Topology, make

AVERAGING, GOSSIP = 1.05, 1.15
MILLION = 10**6  # values, from which on there are bars
TRAINED = 16
BASE = 128 * 2**20  # bytes of a process that trains next to nothing
KINDS = ("bare", "round", "step")


# ------------------------------------------------------------------------------------------------------- what is compared
@dataclass(frozen=True)
class Method:
    """What is measured.

    Args:
        name: for people.
        key: for the records.
        strategy: makes the strategy.
        topology: its graph; None: all replicas average.
        compressor: of its messages.
        overlap: whether they travel while gradients are computed.
        rows: what it keeps beside the parameters, in rows, but for what it receives.
        limit: of a round over bare gloo.
    """

    name: str
    key: str
    strategy: Callable[[], Any]
    topology: str | None = None
    compressor: str | None = None
    overlap: bool = False
    rows: int = 0
    limit: float | None = None

    def graph(self, n: int) -> Topology | None:
        """Return the graph of `n` replicas."""
        return None if self.topology is None else make(self.topology, n)

    def degree(self, n: int) -> int:
        """Return the messages that a replica sends, and receives, in a round."""
        graph = self.graph(n)
        return 0 if graph is None else len(graph.listeners(0))

    def message(self, d: int) -> int:
        """Return the bytes of a message with `d` values, in the two tensors of `Idle`."""
        return 4 * d if self.compressor is None else sum(-(-values // 8) + 4 for values in (d - TRAINED, TRAINED))

    def bound(self, n: int, d: int) -> int:
        """Return the bytes that a replica has to send in a round."""
        return all_reduce_bytes(d, 4, n) if self.topology is None else self.degree(n) * self.message(d)

    def memory(self, n: int, d: int) -> float:
        """Return what `n` processes take, in GiB."""
        rows = max(2, 1 + self.rows)  # at the start rank 0 sends a copy of its row to all
        messages = 2 * self.degree(n) + (self.compressor is not None)  # received, by the algorithm and bare; what is sent
        return n * (4 * d * rows + messages * self.message(d) + BASE) / 2**30


METHODS = (
    Method("all-reduce", "local_sgd", partial(LocalSGDStrategy, 1, average="parameters"), limit=AVERAGING),
    Method("D-PSGD ring", "dpsgd", partial(GossipStrategy, "dpsgd", "ring"), "ring", None, True, 1, GOSSIP),
    Method(
        "D-PSGD one-peer",
        "dpsgd",
        partial(GossipStrategy, "dpsgd", "one_peer_exponential"),
        "one_peer_exponential",
        None,
        True,
        1,
        GOSSIP,
    ),
    Method("CHOCO-sign ring", "choco", lambda: GossipStrategy(CHOCO(compressor="sign"), "ring"), "ring", "sign", True, 2),
)


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Args:
        pairs: of each combination, if they take less than `seconds`.
        seconds: after which `least` pairs are enough.
        least: pairs in any case.
        processes: numbers of processes.
        values: numbers of parameters.
        steps: most rounds of a turn, where they are short.
        memory: GiB that the processes may take; by default most of what is free.
        methods: what to measure.
    """

    pairs: int = 20
    seconds: float = 10.0
    least: int = 4
    processes: Sequence[int] = (2, 4, 8, 16)
    values: Sequence[int] = (10**5, 10**6, 10**7, 10**8)
    steps: int = 20
    memory: float | None = None
    methods: Sequence[Method] = METHODS


FULL = Settings()
QUICK = Settings(pairs=5, seconds=3, least=2, processes=(2, 4), values=(10**5, 10**6))


def free_memory() -> float:
    """Return four fifths of the memory that is free, in GiB (Linux)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 0.8 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 2**20


# ---------------------------------------------------------------------------------------------------------- in a process
class Idle(pl.LightningModule):
    """A model of `d` parameters whose step computes next to nothing."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.layer = nn.Linear(TRAINED, 1, bias=False)
        self.rest = nn.Parameter(torch.zeros(d - TRAINED))  # zeros take no memory until they are written

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def data(n: int) -> DataLoader[Any]:
    """Return what `n` replicas train on, in single samples."""
    return DataLoader(TensorDataset(torch.randn(4000 * n, TRAINED)), batch_size=1)


def bare(method: Method, rank: int, n: int, block: Tensor) -> Callable[[], None]:
    """Return what sends what a round has to send, from the block, and changes nothing."""
    graph = method.graph(n)
    if graph is None:

        def average() -> None:
            dist.all_reduce(block)
            block.div_(n)

        return average
    row = block[0] if method.compressor is None else torch.zeros(method.message(block.shape[1]), dtype=torch.uint8)
    return Bare(graph, rank, row).exchange


class Cycle(pl.Callback):
    """Lets bare gloo, rounds and steps of the `Trainer` take turns; reports the bytes of a round or step with each.

    Args:
        turns: of this process.
        method: what is compared.
        steps: rounds, or steps, of a turn.
    """

    def __init__(self, turns: Turns, method: Method, steps: int) -> None:
        self.turns, self.method, self.steps = turns, method, steps
        self.kinds: Iterator[str] = itertools.cycle(KINDS)
        self.count = self.sent = 0
        self.start = now()
        self.strategy: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.strategy = trainer.strategy
        (block,) = self.strategy.replicas.parameters
        block.normal_(generator=torch.Generator().manual_seed(0))  # equal replicas stay so
        self.bare = bare(self.method, self.turns.index, self.turns.size, block)
        self._until_next_step()

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += 1
        if self.count == self.steps:
            self._report()
            self._until_next_step()

    def _round(self) -> None:
        self.strategy.algorithm.before_step(self.strategy.steps)
        self.strategy.algorithm.after_step(self.strategy.steps)

    def _until_next_step(self) -> None:
        """Take turns until it is the turn of steps."""
        for kind in self.kinds:
            self.turns.wait()
            dist.barrier()
            self.count, self.sent, self.start = 0, self.strategy.traffic.bytes_sent, now()
            if kind == "step":
                return
            for _ in range(self.steps):
                self.bare() if kind == "bare" else self._round()
            self._report()

    def _report(self) -> None:
        end = now()
        self.turns.report(self.start, end, (self.strategy.traffic.bytes_sent - self.sent) / self.steps)


def together(turns: Turns, method: Method, d: int, steps: int, loader: DataLoader[Any]) -> None:
    """Be one of the processes that train together."""
    turns.connect()
    trainer(method.strategy(), turns.size, callbacks=[Cycle(turns, method, steps)]).fit(Idle(d), loader)


def alone(turns: Turns, d: int, steps: int, loader: DataLoader[Any]) -> None:
    """Be one of as many that train by themselves."""
    trainer("auto", callbacks=[TakeTurns(turns, steps)]).fit(Idle(d), loader)


def team(name: str, body: Callable[[Turns], None], n: int) -> Team:
    """Start processes: the one place where that is done."""
    return Team(name, body, size=n)


# ----------------------------------------------------------------------------------------------------------- measurements
@dataclass(frozen=True)
class Measured:
    """Seconds of each kind by pair, of one round or step each, and the bytes that a replica sends in a round and in a step."""

    method: Method
    n: int
    d: int
    compute: float
    seconds: dict[str, list[float]]
    sent: dict[str, float]

    def least(self, communication: float) -> float:
        """Return the least seconds that a step can take."""
        parts = self.compute, communication
        return max(parts) if self.method.overlap else sum(parts)

    def record(self) -> dict[str, Any]:
        """Return what a model of the cost of steps can be fitted to."""
        return {
            "strategy": self.method.key,
            "replicas": self.n,
            "rate_mbit": None,
            "across_mbit": None,
            "parameters": self.d,
            "compute_ms": 1e3 * self.compute,
            "sync_period": 1,
            "overlap": self.method.overlap,
            "compressor": self.method.compressor,
            "topology": self.method.topology,
            "step_ms": 1e3 * estimate(self.seconds["step"]).value,
            "bytes_per_step": self.sent["step"],
            "cores": len(cores()),
        }


def measure(method: Method, n: int, d: int, compute: float, settings: Settings) -> Measured:
    """Let everything of one combination take turns."""
    steps = max(1, min(settings.steps, 40 * MILLION // (n * d)))
    text = f"{method.name}, n = {n}, d = {d:,}"
    laps: dict[str, list[list[Lap]]] = {kind: [] for kind in KINDS}
    with team(text, partial(together, method=method, d=d, steps=steps, loader=data(n)), n) as ranks:
        begin = time.monotonic()
        for pair in range(settings.pairs + 1):  # the first one warms up
            if pair > settings.least and time.monotonic() - begin > settings.seconds:
                break
            progress(text, pair, settings.pairs)
            for kind in KINDS:
                laps[kind].append(ranks.turn())
    laps = {kind: turns[1:] for kind, turns in laps.items()}
    seconds = {kind: [t / steps for t in makespan(turns)] for kind, turns in laps.items()}
    sent = {kind: max(lap.value for turn in laps[kind] for lap in turn) for kind in ("round", "step")}
    return Measured(method, n, d, compute, seconds, sent)


def note(report: Report, measured: Measured) -> None:
    """Put a combination into the report."""
    text = f"{measured.method.name}, n = {measured.n}, d = {measured.d:,}"
    seconds, limit = measured.seconds, measured.method.limit
    report.figure(f"{text}: bare gloo", estimate([1e3 * t for t in seconds["bare"]]), "ms")
    round_ = ratio(seconds["round"], seconds["bare"])
    if limit and measured.d >= MILLION and (measured.method.topology is None or measured.n <= len(cores())):
        report.bar(f"scaling: {text}: round over bare gloo", round_, limit)
    else:
        report.figure(f"{text}: round over bare gloo", round_)
    least = [measured.least(t) for t in seconds["bare"]]
    report.figure(f"{text}: step over the least", ratio(seconds["step"], least))


def run(report: Report, settings: Settings) -> list[Measured]:
    """Measure all combinations that fit into memory."""
    results = []
    for n in settings.processes:
        single = {"alone": team("alone", partial(alone, d=settings.values[0], steps=settings.steps, loader=data(1)), n)}
        turns = interleave(f"n = {n}, each alone", single, settings.pairs)["alone"]
        compute = estimate([t / settings.steps for t in makespan(turns)])
        report.figure(f"n = {n}: step of each alone", Estimate(*(1e3 * t for t in compute)), "ms")
        for d, method in itertools.product(settings.values, settings.methods):
            needed, there = method.memory(n, d), settings.memory or free_memory()
            if needed > there:
                name = f"{method.name}, n = {n}, d = {d:,}: left out, would take"
                report.figure(name, Estimate(needed, needed, needed), f"GiB of {there:.1f}")
                continue
            results.append(measure(method, n, d, compute.value, settings))
            note(report, results[-1])
    for method in settings.methods:
        off = [abs(sent / r.method.bound(r.n, r.d) - 1) for r in results if r.method is method for sent in r.sent.values()]
        if off:
            report.bar(f"scaling: bytes of {method.name}, off the bound by", Estimate(max(off), min(off), max(off)), 5e-4)
    return results


def draw(results: Sequence[Measured], path: Path) -> None:
    """Draw time and bytes of a round over `d` and over `n`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    counts, lengths = sorted({r.n for r in results}), sorted({r.d for r in results})
    # Where all methods have been measured, the most of it.
    n = max(counts, key=lambda n: (len([r for r in results if r.n == n]), n))
    d = max(lengths, key=lambda d: (len([r for r in results if r.d == d]), d))
    for column, (axis, fixed) in enumerate((("d", ("n", n)), ("n", ("d", d)))):
        chosen = [r for r in results if getattr(r, fixed[0]) == fixed[1]]
        for number, method in enumerate(dict.fromkeys(r.method for r in chosen)):
            own = sorted((r for r in chosen if r.method is method), key=lambda r: (r.n, r.d))
            places, color = [getattr(r, axis) for r in own], f"C{number}"
            times = {kind: [1e3 * estimate(r.seconds[kind]).value for r in own] for kind in ("bare", "round")}
            panels[0, column].plot(places, times["round"], marker="o", ms=4, color=color, label=method.name)
            panels[0, column].plot(places, times["bare"], "--", color=color, lw=1)
            sent = [r.sent["round"] / 2**20 for r in own]
            panels[1, column].plot(places, sent, "o", ms=4, color=color)
            panels[1, column].plot(places, [method.bound(r.n, r.d) / 2**20 for r in own], "--", color=color, lw=1)
        top, bottom = panels[0, column], panels[1, column]
        top.set(title=f"n = {n} processes" if axis == "d" else f"d = {d:,} values")
        bottom.set(xlabel="values, d" if axis == "d" else "processes, n")
        for panel in (top, bottom):
            panel.set(xscale="log", yscale="log")
            panel.grid(alpha=0.3, linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
        if axis == "n":
            bottom.set_xticks(counts, [str(count) for count in counts])
            bottom.minorticks_off()
    panels[0, 0].set(ylabel="ms for a round; dashed: bare gloo")
    panels[1, 0].set(ylabel="MiB that a replica sends; dashed: the bound")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def cli(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling")
    parser.add_argument("--quick", action="store_true", help="few and small combinations: about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--records", type=Path, metavar="FILE", help="write times and bytes of steps, to fit a model to")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw times and bytes of rounds")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    report = Report("scaling", options.quick)
    results = run(report, QUICK if options.quick else FULL)
    print(report.table())
    if options.json:
        options.json.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    if options.records:
        options.records.write_text(json.dumps([result.record() for result in results], indent=1) + "\n")
    if options.figure:
        draw(results, options.figure)


if __name__ == "__main__":
    cli()
