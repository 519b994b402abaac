"""Cost of a gossip round of ResNet-50's 25.6 M parameters over four gloo ranks on loopback.

The yardstick is the least that has to cross the wire: `isend` and `irecv` of the same messages between the same ranks,
into buffers that exist already, with no arithmetic. Against it stands all that a round of `DSGD` does: buffers,
messages, notices beside them, waiting, mixing, counting. On a ring every rank sends its row to two others, on the
one-peer exponential graph to one, another in each round. All run in the same four processes in turn, behind a barrier;
a sample is the time on the wall until the last rank is done. Time on cores stands beside it.

Shown too, without a bar: the same messages followed by the mixing, written as one expression of whole rows, which is what
one would program by hand; and that expression alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn

from benchmarks.harness import Lap, Team, Turns, cpu_seconds, makespan, now
from benchmarks.report import Report, estimate, main, progress, ratio
from lightning_distopt.algorithms import DSGD
from lightning_distopt.communication import Communicator, Replicas
from lightning_distopt.topologies import Topology, make

RANKS = 4
GRAPHS = ("ring", "one_peer_exponential")
LIMIT = 1.15


@dataclass(frozen=True)
class Settings:
    """Pairs for each graph, and every how many the other references run too."""

    pairs: int
    references_every: int
    model: Callable[[], nn.Module] = torchvision.models.resnet50


FULL = Settings(pairs=40, references_every=2)
QUICK = Settings(pairs=10, references_every=5)


class Bare:
    """A row that neighbours send one another, and what they need for it.

    Args:
        topology: the graph.
        rank: of this process, a replica.
        row: what it sends.
    """

    def __init__(self, topology: Topology, rank: int, row: Tensor) -> None:
        self.topology, self.rank, self.t = topology, rank, 0
        degree = max(len(topology.neighbors(rank, t)) for t in range(topology.period or 1))
        self.row, self.received = row, row.new_zeros(degree, len(row))

    def exchange(self) -> None:
        """Send the row to the listeners of the next step, and receive those of the neighbours."""
        senders, listeners = self.topology.neighbors(self.rank, self.t), self.topology.listeners(self.rank, self.t)
        operations = [dist.P2POp(dist.irecv, row, j) for j, row in zip(senders, self.received, strict=False)]
        operations += [dist.P2POp(dist.isend, self.row, i) for i in listeners]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        self.t += 1

    def mix(self) -> None:
        """Replace the row by the weighted sum that it and those received last make."""
        weights = self.topology.weights(self.rank, self.t - 1)
        self.row.mul_(weights.pop(self.rank))
        for weight, row in zip(weights.values(), self.received, strict=False):
            self.row.add_(row, alpha=weight)


def methods(graph: str, rank: int, model: nn.Module, ranks: int = RANKS) -> dict[str, Callable[[], None]]:
    """Return what is compared on a graph."""
    topology, replicas = make(graph, ranks), Replicas(model)
    algorithm = DSGD().connect(topology)
    algorithm.setup(replicas, Communicator())
    bare = Bare(topology, rank, torch.randn(sum(block.numel() for block in replicas.parameters)))

    def round_() -> None:
        algorithm.before_step(0)
        algorithm.after_step(0)

    def by_hand() -> None:
        bare.exchange()
        bare.mix()

    return {"bare": bare.exchange, "round": round_, "by hand": by_hand, "mixing": bare.mix}


def run(report: Report, settings: Settings) -> None:
    """Measure all methods on both graphs."""
    numel = sum(p.numel() for p in settings.model().parameters())
    # The processes are told no names: turn k runs whatever this list says.
    order: list[str] = []
    for k in range(settings.pairs + 1):
        order += ["bare", "round"]
        if k % settings.references_every == 0:
            order += ["by hand", "mixing"]

    for graph in GRAPHS:

        def body(turns: Turns, graph: str = graph) -> None:
            turns.connect()
            table = methods(graph, turns.index, settings.model())
            for name in order:
                turns.wait()
                dist.barrier()
                start = now()
                table[name]()
                turns.report(start, now())
            turns.wait()

        laps: dict[str, list[list[Lap]]] = {name: [] for name in order}
        with Team("ranks", body, size=RANKS) as team:
            for k, name in enumerate(order):
                progress(f"{numel:,} parameters, {graph}", k + 1, len(order))
                laps[name].append(team.turn())
        laps = {name: turns[1:] for name, turns in laps.items()}
        times = {name: makespan(turns) for name, turns in laps.items()}
        sometimes = slice(settings.references_every - 1, None, settings.references_every)
        report.figure(f"{graph}: bare messages", estimate([1e3 * t for t in times["bare"]]), "ms")
        report.figure(f"{graph}: messages and mixing by hand", ratio(times["by hand"], times["bare"][sometimes]))
        report.figure(f"{graph}: mixing by hand, of a round", ratio(times["mixing"], times["round"][sometimes]))
        core_time = cpu_seconds(laps["round"]), cpu_seconds(laps["bare"])
        report.figure(f"{graph}: round, time on cores", ratio(*core_time))
        report.bar(f"gossip_round: {graph}", ratio(times["round"], times["bare"]), LIMIT)


def cli(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    main("gossip_round", run, FULL, QUICK, argv)


if __name__ == "__main__":
    cli()
