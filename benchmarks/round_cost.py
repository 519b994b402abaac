"""Cost of averaging ResNet-50's 25.6 M parameters (161 tensors) over four gloo ranks on loopback.

The yardstick is the least that any implementation must do: one `all_reduce` of one flat buffer of the same length and
an in-place division. Against it: `Communicator.mean` on the block that holds the parameters, the whole of
`LocalSGD`'s `after_step` at a round, torch's `PeriodicModelAverager`, and a loop over parameters. All run in the same
four processes in turn, behind a barrier; a sample is the time on the wall until the last rank is done. Time on cores
stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

from benchmarks.harness import Lap, Team, Turns, cpu_seconds, makespan, now
from benchmarks.report import Report, estimate, main, progress, ratio
from lightning_distopt.algorithms import LocalSGD
from lightning_distopt.communication import Communicator, Replicas

RANKS = 4
LIMIT, INTERVAL_BELOW = 1.05, 1.10


@dataclass(frozen=True)
class Settings:
    """Pairs of the comparisons with a bar, and every how many the slow references run too."""

    pairs: int
    references_every: int
    model: Callable[[], nn.Module] = torchvision.models.resnet50


FULL = Settings(pairs=60, references_every=4)
QUICK = Settings(pairs=12, references_every=4)


def methods(model: nn.Module) -> dict[str, Callable[[], None]]:
    """Return what is compared; each has tensors of its own."""
    loop = [p.detach().clone() for p in model.parameters()]
    averaged = [nn.Parameter(p.clone()) for p in loop]
    for p in averaged:
        p.grad = torch.zeros_like(p)  # the averager leaves parameters without a gradient out
    flat = torch.cat([p.reshape(-1) for p in loop])
    averager = PeriodicModelAverager(period=1)

    communicator = Communicator()
    replicas = Replicas(model)
    algorithm = LocalSGD(sync_period=1, average="parameters")  # a round at every step
    algorithm.setup(replicas, communicator)

    def bare() -> None:
        dist.all_reduce(flat)
        flat.div_(RANKS)

    def mean() -> None:
        for block in replicas.parameters:
            communicator.mean(block)

    def round_() -> None:
        algorithm.before_step(0)
        algorithm.after_step(0)

    def per_parameter() -> None:
        for p in loop:
            dist.all_reduce(p)
            p.div_(RANKS)

    return {
        "bare": bare,
        "mean": mean,
        "round": round_,
        "averager": lambda: averager.average_parameters(averaged),
        "loop": per_parameter,
    }


def run(report: Report, settings: Settings) -> None:
    """Measure all methods."""
    model = settings.model()
    sizes = [p.numel() for p in model.parameters()]
    text = f"{sum(sizes):,} parameters in {len(sizes)} tensors"
    # The processes are told no names: turn k runs whatever this list says.
    order: list[str] = []
    for k in range(settings.pairs + 1):
        order += ["bare", "mean", "round"]
        if k % settings.references_every == 0:
            order += ["averager", "loop"]

    def body(turns: Turns) -> None:
        turns.connect()
        table = methods(model)
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
            progress(text, k + 1, len(order))
            laps[name].append(team.turn())
    laps = {name: turns[1:] for name, turns in laps.items()}
    times = {name: makespan(turns) for name, turns in laps.items()}
    bare, sometimes = times["bare"], times["bare"][settings.references_every - 1 :: settings.references_every]
    core_time = {name: cpu_seconds(laps[name]) for name in ("bare", "mean", "round")}

    report.figure("one bare all_reduce and division", estimate([1e3 * t for t in bare]), "ms")
    report.figure("torch's PeriodicModelAverager", ratio(times["averager"], sometimes))
    report.figure("loop over parameters", ratio(times["loop"], sometimes))
    report.figure("Communicator.mean, time on cores", ratio(core_time["mean"], core_time["bare"]))
    report.figure("LocalSGD.after_step, time on cores", ratio(core_time["round"], core_time["bare"]))
    report.bar("round_cost: Communicator.mean", ratio(times["mean"], bare), LIMIT, interval_below=INTERVAL_BELOW)
    report.bar("round_cost: LocalSGD.after_step", ratio(times["round"], bare), LIMIT, interval_below=INTERVAL_BELOW)


def cli(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    main("round_cost", run, FULL, QUICK, argv)


if __name__ == "__main__":
    cli()
