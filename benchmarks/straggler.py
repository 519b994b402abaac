"""One of four ranks needs 20 ms more for every step: what is left of the others' speed between rounds.

Two teams of four ranks train a linear toy by full Lightning `Trainer`s with a round every 50 steps, one round a turn;
in one of the teams rank 3 is slowed. A sample is the time in which the other three reach step 40 of the round, as
nobody waits for anybody there; at step 50 all wait for the slow one, as local SGD must.

- device-bound: every step waits 5 ms as for an accelerator, the slow rank 25 ms.
- compute-bound: a step is computation only, and the slow rank computes 20 ms more. If it slept, it would leave its
  core to another rank where ranks share cores, and the others would be faster than without it.

Time is the process's own (see the harness): waiting for a peer is in it, waiting for a core is not. Lightning's
`DDPStrategy` with the same slow rank stands beside, which waits for it at every step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from benchmarks import workloads
from benchmarks.harness import TakeTurns, Team, Turns, interleave, own_seconds, trainer
from benchmarks.report import Report, estimate, main, ratio
from lightning_distopt import LocalSGDStrategy

LIMIT = 0.95
RANKS, SLOW = 4, 3
DELAY = 0.020


@dataclass(frozen=True)
class Settings:
    """Pairs, steps of a round, and the step at which the clock is read."""

    pairs: int
    period: int = 50
    mark: int = 40


FULL = Settings(pairs=30)
QUICK = Settings(pairs=4)


class Slowed(workloads.Toy):
    """Waits in every step, and computes uselessly for some more time.

    Args:
        wait: seconds.
        compute: seconds.
    """

    def __init__(self, wait: float, compute: float) -> None:
        super().__init__()
        self.wait, self.compute = wait, compute

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.wait:
            time.sleep(self.wait)
        end = time.perf_counter() + self.compute
        while self.compute and time.perf_counter() < end:
            pass
        return super().training_step(batch, batch_idx)


def rank(turns: Turns, settings: Settings, strategy: str, device: bool, slowed: bool) -> None:
    """Be one rank of a team."""
    turns.connect()
    delay = DELAY if slowed and turns.index == SLOW else 0.0
    module = Slowed(0.005 + delay, 0.0) if device else Slowed(0.0, delay)
    chosen = LocalSGDStrategy(settings.period) if strategy == "local SGD" else DDPStrategy(process_group_backend="gloo")
    callback = TakeTurns(turns, settings.period, settings.mark)
    trainer(chosen, RANKS, callbacks=[callback]).fit(module, workloads.toy_data(RANKS * 5000))


def run(report: Report, settings: Settings) -> None:
    """Measure both kinds of steps."""
    for strategy, device in (("local SGD", True), ("local SGD", False), ("DDP", True)):
        name = f"{strategy}, {'device' if device else 'compute'}-bound"
        body = partial(rank, settings=settings, strategy=strategy, device=device)
        laps = interleave(
            name,
            {
                "even": Team("without the slow rank", partial(body, slowed=False), size=RANKS),
                "slowed": Team("with the slow rank", partial(body, slowed=True), size=RANKS),
            },
            settings.pairs if strategy == "local SGD" else max(2, settings.pairs // 3),
        )
        even, slowed = (own_seconds([turn[:SLOW] for turn in laps[which]]) for which in ("even", "slowed"))
        report.figure(f"{name}, unslowed step", estimate([1e3 * t / settings.mark for t in even]), "ms")
        if strategy == "local SGD":
            report.bar(f"straggler: {name.split(', ')[1]}", ratio(even, slowed), LIMIT, at_least=True)
        else:
            report.figure(f"{name}, speed beside the slow rank", ratio(even, slowed))


def cli(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    main("straggler", run, FULL, QUICK, argv)


if __name__ == "__main__":
    cli()
