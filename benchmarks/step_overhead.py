"""Time of a training step in which no round is due, against Lightning's single-device strategy.

The same `Trainer`, module and shuffled loader run under `LocalSGDStrategy` and under the single-device strategy, so
the ratio is what the strategy itself costs: its hooks, its parameters as views of a block, its loaders. `sync_period`
is too long for a round to come.

- `n = 1`: one process each, on the same core in turn; Lightning's `DDPStrategy` at world size 1 for reference.
- `n = 2`: two ranks, each pinned to a core, against two independent single-device processes pinned likewise: here the
  loaders are sharded, the streams of random numbers separate and the flags gated, which one replica does without. The
  data set is twice as large, so that an epoch has as many steps.

Time is the process's own (see the harness): other jobs on the machine leave it alone, waiting for a peer would show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from benchmarks import workloads
from benchmarks.harness import TakeTurns, Team, Turns, interleave, own_seconds, trainer
from benchmarks.report import Report, estimate, main, ratio
from benchmarks.surroundings import cores
from lightning_distopt import LocalSGDStrategy

LIMIT = 1.03
NEVER = 10**9


@dataclass(frozen=True)
class Workload:
    """A module, its loader for `n` replicas, and the steps of a turn."""

    name: str
    module: Callable[[], pl.LightningModule]
    loader: Callable[[int], DataLoader[Any]]
    steps: int


@dataclass(frozen=True)
class Settings:
    """How long to measure: pairs, and the length of a turn as a share of the full one."""

    pairs: int
    share: float


FULL = Settings(pairs=40, share=1.0)
QUICK = Settings(pairs=8, share=0.3)

WORKLOADS = (
    Workload("linear toy", workloads.Toy, lambda n: workloads.toy_data(n * 20_000), 300),
    Workload("ResNet-8, 8x8", workloads.resnet8, lambda n: workloads.images(n * 8192, 8), 24),
    Workload("ResNet-8, 32x32", workloads.resnet8, lambda n: workloads.images(n * 4096, 32), 4),
)


def single(workload: Workload, steps: int) -> Callable[[Turns], None]:
    """Return a process that trains on a single device."""
    loader = workload.loader(1)

    def body(turns: Turns) -> None:
        trainer("auto", callbacks=[TakeTurns(turns, steps)]).fit(workload.module(), loader)

    return body


def ours(workload: Workload, steps: int, n: int) -> Callable[[Turns], None]:
    """Return a process that is one of `n` ranks of local SGD."""
    loader = workload.loader(n)

    def body(turns: Turns) -> None:
        if n > 1:
            turns.connect()
        strategy = LocalSGDStrategy(sync_period=NEVER)
        trainer(strategy, n, callbacks=[TakeTurns(turns, steps)]).fit(workload.module(), loader)

    return body


def ddp(workload: Workload, steps: int) -> Callable[[Turns], None]:
    """Return a process that is the only rank of Lightning's DDP."""
    loader = workload.loader(1)

    def body(turns: Turns) -> None:
        turns.connect()
        strategy = DDPStrategy(process_group_backend="gloo")
        trainer(strategy, callbacks=[TakeTurns(turns, steps)]).fit(workload.module(), loader)

    return body


def run(report: Report, settings: Settings, chosen: Sequence[Workload] = WORKLOADS) -> None:
    """Measure all workloads."""
    for workload in chosen:
        steps = max(1, round(workload.steps * settings.share))
        one = cores()[-1:]
        laps = interleave(
            f"{workload.name}, n = 1",
            {
                "single": Team("single device", single(workload, steps), on=one),
                "ours": Team("local SGD", ours(workload, steps, 1), on=one),
                "ddp": Team("DDP", ddp(workload, steps), on=one),
            },
            settings.pairs,
        )
        alone = own_seconds(laps["single"])
        report.figure(f"{workload.name}, single device", estimate([1e6 * t / steps for t in alone]), "us/step")
        report.figure(f"{workload.name}, DDP at world size 1", ratio(own_seconds(laps["ddp"]), alone))
        _note(report, f"{workload.name}, n = 1", own_seconds(laps["ours"]), alone, steps)

        laps = interleave(
            f"{workload.name}, n = 2",
            {
                "single": Team("two single devices", single(workload, steps), size=2),
                "ours": Team("local SGD on two ranks", ours(workload, steps, 2), size=2),
            },
            settings.pairs,
        )
        _note(report, f"{workload.name}, n = 2", own_seconds(laps["ours"]), own_seconds(laps["single"]), steps)


def _note(report: Report, name: str, times: list[float], alone: list[float], steps: int) -> None:
    added = [1e6 * (x - y) / steps for x, y in zip(times, alone, strict=True)]
    report.figure(f"{name}, added by local SGD", estimate(added), "us/step")
    report.bar(f"step_overhead: {name}", ratio(times, alone), LIMIT)


def cli(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    main("step_overhead", run, FULL, QUICK, argv)


if __name__ == "__main__":
    cli()
