"""What a replica pays for a one-peer gossip round, as the number of replicas grows.

Bytes are those the package counts for a replica that mixes on the one-peer exponential graph, simulated in one process
for up to 1,024 replicas, and counted by real processes for 2, 4 and 8. They are a fact, not a measurement: the same
for all numbers, or wrong. A ring's and an all-reduce's stand beside them.

Time is that on cores of all threads and processes together, for a replica and a round: a few cores are shared by more
processes, so the wall would show how many there are. The yardstick is `isend` and `irecv` of the same messages
between the same processes, as in `gossip_round`. How the cost grows from 2 replicas to 8 is shown for both: the
messages of more processes push one another out of the cache, whoever sends them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn

from benchmarks.gossip_round import methods
from benchmarks.harness import Lap, Team, Turns, cpu_seconds, now
from benchmarks.report import Estimate, Report, estimate, main, progress, ratio
from lightning_distopt.algorithms import DSGD
from lightning_distopt.communication import Communicator, Replicas, all_reduce_bytes
from lightning_distopt.topologies import make

GRAPH = "one_peer_exponential"
SIMULATED = (2, 3, 4, 7, 8, 16, 32, 64, 100, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Settings:
    """Pairs for each number of processes, rounds of a turn, values of a row, numbers of processes."""

    pairs: int
    rounds: int = 3
    numel: int = 2**22
    processes: Sequence[int] = (2, 4, 8)


FULL = Settings(pairs=30)
QUICK = Settings(pairs=5)


def row(numel: int) -> nn.Module:
    """Return a module with a single parameter."""
    return nn.Linear(numel, 1, bias=False)


def simulated_bytes(graph: str, n: int, numel: int) -> int:
    """Return the bytes that the busiest of `n` replicas sends in a round, the mean over a period."""
    topology, communicator = make(graph, n), Communicator(n)
    algorithm = DSGD().connect(topology)
    algorithm.setup(Replicas(row(numel), n), communicator)
    rounds = topology.period or 1
    for step in range(rounds):
        algorithm.before_step(step)
        algorithm.after_step(step)
    return communicator.traffic.bytes_sent_max // rounds


def run(report: Report, settings: Settings) -> None:
    """Count bytes, and measure time."""
    numel = 64  # no padding in a row of a block
    for n in (8, 1024):
        all_reduce = all_reduce_bytes(numel, 4, n) / (4 * numel)
        ring = simulated_bytes("ring", n, numel) / (4 * numel)
        report.figure(f"all-reduce, n = {n}: bytes sent by a replica", Estimate(*[all_reduce] * 3), "x row")
        report.figure(f"ring, n = {n}: bytes sent by a replica", Estimate(*[ring] * 3), "x row")
    sent = [simulated_bytes(GRAPH, n, numel) / (4 * numel) for n in SIMULATED]

    rounds = settings.rounds

    def body(turns: Turns) -> None:
        turns.connect()
        table = methods(GRAPH, turns.index, row(settings.numel), turns.size)
        for _ in range(settings.pairs + 1):
            for name in ("bare", "round"):
                turns.wait()
                dist.barrier()
                start = now()
                for _ in range(rounds):
                    table[name]()
                turns.report(start, now())
        turns.wait()
        algorithm = DSGD().connect(make(GRAPH, turns.size))
        communicator = Communicator()
        algorithm.setup(Replicas(row(numel)), communicator)
        algorithm.before_step(0)
        algorithm.after_step(0)
        turns.report_value(communicator.traffic.bytes_sent / (4 * numel))
        turns.wait()

    costs: dict[str, dict[int, list[float]]] = {"bare": {}, "round": {}}
    for n in settings.processes:
        laps: dict[str, list[list[Lap]]] = {name: [] for name in costs}
        with Team("ranks", body, size=n) as team:
            for k in range(settings.pairs + 1):
                progress(f"{n} processes", k, settings.pairs)
                for name in laps:
                    laps[name].append(team.turn())
            sent += [lap.value for lap in team.turn()]
        for name, turns in laps.items():
            costs[name][n] = [t / n / rounds for t in cpu_seconds(turns[1:])]
        report.figure(f"n = {n}: time on cores, bare messages", estimate([1e3 * t for t in costs["bare"][n]]), "ms/replica")
        report.figure(f"n = {n}: time on cores, round", estimate([1e3 * t for t in costs["round"][n]]), "ms/replica")
        report.figure(f"n = {n}: time on cores, round over bare", ratio(costs["round"][n], costs["bare"][n]))
    few, many = settings.processes[0], settings.processes[-1]
    for name in costs:
        report.figure(f"n = {many} over n = {few}: time on cores, {name}", ratio(costs[name][many], costs[name][few]))
    most, least = max(sent), min(sent)
    report.figure(f"{GRAPH}: bytes sent by a replica", Estimate(sent[-1], least, most), "x row")
    name = f"gossip_scaling: bytes of a replica, most over least of n = 2 ... {max(SIMULATED)}"
    report.bar(name, Estimate(*[most / least] * 3), 1.0)


def cli(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    main("gossip_scaling", run, FULL, QUICK, argv)


if __name__ == "__main__":
    cli()
