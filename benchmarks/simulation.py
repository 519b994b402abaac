"""Simulating 16 replicas of ResNet-8 on 16x16 images in one process: time per replica step, and memory.

Three ways to train on one core, in turn, with the same module, batches of 32 and full Lightning `Trainer`s:

- one model on Lightning's single device, the least a replica step can cost;
- 16 replicas in one process: `LocalSGDStrategy(replicas_per_device=16)`;
- 16 gloo processes, a replica each, all pinned to the core: what one does without a simulation.

Turns of the latter two are whole rounds (8 steps and the average), so averaging is in the cost of a replica step; the
same comparison without rounds is shown too, as a figure. What counts is time on the core, of all threads and of all
processes together: all share one core, so this is what it has to give for a replica step. The processes' time on the
wall, shown beside, is longer by whatever they all wait at once, and on a busy machine shorter by the larger share of
the core that sixteen processes get.

Memory is the peak of resident memory of a fit, 16 replicas in one process minus a single model, each in a fresh
process forked from the same state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks import workloads
from benchmarks.harness import TakeTurns, Team, Turns, cpu_seconds, interleave, makespan, memory, trainer
from benchmarks.report import Report, estimate, main, progress, ratio
from benchmarks.surroundings import cores
from lightning_distopt import LocalSGDStrategy

ROUND = 8
NEVER = 10**9


@dataclass(frozen=True)
class Settings:
    """Pairs with and without rounds, and for memory; replicas; steps of the single model in a turn; images."""

    pairs: int
    pairs_without_rounds: int
    memory_pairs: int
    replicas: int = 16
    steps: int = 32
    samples: int = 50_000


FULL = Settings(pairs=20, pairs_without_rounds=8, memory_pairs=20)
QUICK = Settings(pairs=4, pairs_without_rounds=0, memory_pairs=2, steps=16)


def run(report: Report, settings: Settings) -> None:
    """Measure time and memory."""
    n = settings.replicas
    loader = workloads.images(settings.samples, 16, channels=1)
    module = partial(workloads.resnet8, channels=1)

    def single(turns: Turns) -> None:
        trainer("auto", callbacks=[TakeTurns(turns, settings.steps)]).fit(module(), loader)

    def simulated(turns: Turns, period: int) -> None:
        strategy = LocalSGDStrategy(sync_period=period, replicas_per_device=n)
        trainer(strategy, callbacks=[TakeTurns(turns, ROUND)]).fit(module(), loader)

    def process(turns: Turns, period: int) -> None:
        turns.connect()
        trainer(LocalSGDStrategy(sync_period=period), n, callbacks=[TakeTurns(turns, ROUND)]).fit(module(), loader)

    core = cores()[-1:]
    for period, pairs in ((ROUND, settings.pairs), (NEVER, settings.pairs_without_rounds)):
        if not pairs:
            continue
        label = f"a round every {period} steps" if period == ROUND else "no rounds"
        laps = interleave(
            f"{n} replicas, {label}",
            {
                "single": Team("single model", single, on=core),
                "simulated": Team("simulation", partial(simulated, period=period), on=core),
                "processes": Team("processes", partial(process, period=period), size=n, on=core),
            },
            pairs,
        )
        one = [t / settings.steps for t in cpu_seconds(laps["single"])]
        inside = [t / ROUND / n for t in cpu_seconds(laps["simulated"])]
        outside = [t / ROUND / n for t in cpu_seconds(laps["processes"])]
        if period == ROUND:
            report.figure("single model", estimate([1e3 * t for t in one]), "ms/step")
            wall = makespan(laps["processes"]), makespan(laps["simulated"])
            report.figure("speed over processes, on the wall", ratio(*wall))
            report.bar("simulation: replica step over single model", ratio(inside, one), 1.10)
            report.bar("simulation: speed over processes", ratio(outside, inside), 1.2, at_least=True)
        else:
            report.figure("without rounds, replica step over single model", ratio(inside, one))
            report.figure("without rounds, speed over processes", ratio(outside, inside))

    def peak(turns: Turns, strategy: Callable[[], Any]) -> None:
        turns.wait()
        before = memory(peak=False)
        fit(strategy)
        turns.report_value(memory() - before)
        turns.wait()

    def fit(strategy: Callable[[], Any]) -> None:
        trainer(strategy(), max_steps=ROUND + 1).fit(module(), loader)

    strategies: dict[str, Callable[[], Any]] = {
        "single": lambda: "auto",
        "simulated": lambda: LocalSGDStrategy(ROUND, replicas_per_device=n),
    }
    extra = []
    for k in range(settings.memory_pairs):
        progress("memory", k + 1, settings.memory_pairs)
        peaks = {}
        for name, strategy in strategies.items():
            with Team(name, partial(peak, strategy=strategy), on=core) as team:
                peaks[name] = team.turn()[0].value
        extra.append(peaks["simulated"] - peaks["single"])
    report.bar(f"simulation: extra memory of {n} replicas (MiB)", estimate(extra), 60)


def cli(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    main("simulation", run, FULL, QUICK, argv)


if __name__ == "__main__":
    cli()
