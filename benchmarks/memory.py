"""Training memory of plain local SGD over single-device training, in multiples of the parameters.

Both fit the same multilayer perceptron of about 100 MB with plain SGD, in processes forked from the same state: one,
and two ranks with a replica each. Counted is the peak of resident memory (`VmHWM`): unlike a count of live tensors it
sees what gloo and the allocator hold. Large blocks are mapped (`mallopt`), so that resident memory follows live
tensors closely. The peak is reset where a phase starts:

- training: steps with gradients, two rounds among them, without set-up;
- evaluation: a validation in the middle of training, on the average of the replicas (which needs room: 1 is allowed);
- end: what comes after the last batch, where the average becomes the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import Team, Turns, fix_malloc, memory, reset_peak, trainer
from benchmarks.report import Report, estimate, main, progress
from lightning_distopt import LocalSGDStrategy

LIMIT = 0.05
PERIOD = 4
WARM_UP, STEPS = 2, 10
PHASES = ("training", "evaluation", "end")


@dataclass(frozen=True)
class Settings:
    """Pairs, and the width of the perceptron's six square layers."""

    pairs: int
    width: int = 2048


FULL = Settings(pairs=20)
QUICK = Settings(pairs=3)


class Perceptron(pl.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(width, width) for _ in range(6)])

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        return self.layers(batch[0]).square().mean()

    def validation_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        self.layers(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Peaks(pl.Callback):
    """Notes the peak of memory in each phase."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == WARM_UP:
            reset_peak()
        if trainer.global_step == STEPS:
            self.note("training")

    def on_validation_start(self, *_: Any) -> None:
        reset_peak()  # Lightning has freed the gradients

    def on_validation_end(self, *_: Any) -> None:
        self.note("evaluation")

    def note(self, phase: str) -> None:
        self.peaks[phase] = memory()
        reset_peak()


def fit(turns: Turns, settings: Settings, ours: bool) -> None:
    """Train, and report the peaks in multiples of the parameters."""
    fix_malloc()
    if ours:
        turns.connect()
    turns.wait()
    before = memory(peak=False)
    module, peaks = Perceptron(settings.width), Peaks()
    size = sum(p.numel() * p.element_size() for p in module.parameters()) / 2**20
    loader = DataLoader(TensorDataset(torch.randn(4 * STEPS * turns.size, settings.width)), batch_size=2)
    validation = DataLoader(TensorDataset(torch.randn(4, settings.width)), batch_size=2)
    options: dict[str, Any] = {"max_steps": STEPS, "val_check_interval": STEPS, "limit_val_batches": 1.0}
    strategy = LocalSGDStrategy(sync_period=PERIOD) if ours else "auto"
    trainer(strategy, turns.size, callbacks=[peaks], **options).fit(module, loader, validation)
    peaks.note("end")
    turns.report_value({phase: (peaks.peaks[phase] - before) / size for phase in PHASES})
    turns.wait()


def run(report: Report, settings: Settings) -> None:
    """Measure all phases."""
    peaks: dict[str, list[tuple[float, float]]] = {phase: [] for phase in PHASES}
    for k in range(settings.pairs):
        progress("memory", k + 1, settings.pairs)
        with Team("single device", partial(fit, settings=settings, ours=False)) as team:
            single = team.turn()[0].value
        with Team("local SGD", partial(fit, settings=settings, ours=True), size=2) as team:
            ranks = [lap.value for lap in team.turn()]
        for phase in PHASES:
            peaks[phase].append((single[phase], max(rank[phase] for rank in ranks)))
    extra = {}
    for phase in PHASES:
        extra[phase] = estimate([ours - single for single, ours in peaks[phase]])
        report.figure(f"{phase}, single device", estimate([single for single, _ in peaks[phase]]), "x parameters")
    report.figure("end of training, local SGD over single device", extra["end"], "x parameters")
    report.bar("memory: training", extra["training"], LIMIT)
    report.bar("memory: evaluation", extra["evaluation"], 1 + LIMIT)


def cli(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    main("memory", run, FULL, QUICK, argv)


if __name__ == "__main__":
    cli()
