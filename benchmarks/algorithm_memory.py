"""Memory of the gossip algorithms over single-device training, in multiples of the parameters.

All fit the same multilayer perceptron with plain SGD, as in `memory`: a single process, and as many ranks as a graph
takes, with a replica each. Counted is the peak of resident memory (`VmHWM`) over steps with a round each, after two
that allocate what stays: what gloo and the allocator hold is in it. Pages of files are left out: they are libraries' code,
of which a process that communicates has touched more. Large blocks are mapped (`mallopt`), so that the peak follows
live tensors closely.

Compressed messages are what nobody can do without: a replica's own and one from each neighbour. Their packed size is
subtracted from what has a bar, and shown beside it; whatever else is made of them, such as a second copy, is not.

Bars: D-SGD on the one-peer graph may hold what it receives, a row. CHOCO may hold two, `x_hat` and the weighted sum,
whatever the degree: on a ring of 4 and on a complete graph of 8. DCD-PSGD and ECD-PSGD are printed with a row for each
neighbour beside the replica's own, which makes 3 on a ring; DeepSqueeze with the error. The others have no bar: rows of
D-SGD and D-PSGD that travel while gradients are computed are the price of overlap, and EF-sign keeps an error beside
the average that takes the gradients' place.

Quasi-global momentum may hold its momentum, `x^t`, from which its papers take the difference, and what it receives; DMSGD
`x^t`, what its momentum is measured from, and a row on its way; D2 the last iterate, the last gradient and what it
receives, D2+ one less; gradient tracking `y`, the last gradient, the gradients and what it receives of both. Push-sum may
hold what D-SGD does; RelaySum, for each of two neighbours, what it has relayed last and what is sent to it; PowerGossip a
few vectors for each neighbour, and a matrix of the model at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import Team, Turns, fix_malloc, memory, reset_peak, trainer
from benchmarks.memory import Perceptron
from benchmarks.report import Report, estimate, main, progress
from lightning_distopt import GossipStrategy
from lightning_distopt.algorithms import (
    CHOCO,
    D2,
    DCD,
    DMSGD,
    DPSGD,
    DSGD,
    ECD,
    DeepSqueeze,
    EFSign,
    GossipAlgorithm,
    GradientTracking,
    PowerGossip,
    PushSum,
    QuasiGlobal,
    RelaySum,
)
from lightning_distopt.topologies import make

SLACK = 0.05
WARM_UP, STEPS = 2, 5


@dataclass(frozen=True)
class Case:
    """An algorithm, its graph, the ranks, the compressed messages a rank holds in a round, and the bar in rows."""

    name: str
    algorithm: Callable[[], GossipAlgorithm]
    topology: str
    ranks: int
    messages: int = 0
    limit: float | None = None
    overlap: bool | None = None


CASES = (
    Case("DSGD, one-peer", DSGD, "one_peer_exponential", 4, limit=1),
    Case("DSGD, ring", DSGD, "ring", 4),
    Case("DSGD delayed, one-peer", DSGD, "one_peer_exponential", 4, overlap=True),
    Case("DPSGD, one-peer", DPSGD, "one_peer_exponential", 4),
    Case("DPSGD, ring", DPSGD, "ring", 4),
    Case("CHOCO, ring", partial(CHOCO, compressor="sign"), "ring", 4, 3, limit=2),
    Case("CHOCO, complete", partial(CHOCO, compressor="sign"), "complete", 8, 8, limit=2),
    Case("DCD, ring", partial(DCD, compressor="qsgd:16"), "ring", 4, 3, limit=3),
    Case("ECD, ring", partial(ECD, compressor="qsgd:16"), "ring", 4, 3, limit=3),
    Case("DeepSqueeze, ring", partial(DeepSqueeze, compressor="sign"), "ring", 4, 3, limit=1),
    Case("EFSign", EFSign, "auto", 4, 4),
    Case("QuasiGlobal, one-peer", QuasiGlobal, "one_peer_exponential", 4, limit=3),
    Case("DMSGD, one-peer", DMSGD, "one_peer_exponential", 4, limit=3),
    Case("D2, ring", D2, "ring", 4, limit=3),
    Case("D2+, ring", partial(D2, plus=True), "ring", 4, limit=2),
    Case("GradientTracking, one-peer", GradientTracking, "one_peer_exponential", 4, limit=5),
    Case("PushSum, one-peer", PushSum, "one_peer_exponential", 4, limit=1),
    Case("RelaySum, chain", RelaySum, "chain", 4, limit=4),
    Case("PowerGossip, ring", PowerGossip, "ring", 4, limit=1),
)


@dataclass(frozen=True)
class Settings:
    """Pairs, the width of the perceptron's six square layers, and the cases."""

    pairs: int
    width: int = 2048
    cases: Sequence[Case] = CASES


FULL = Settings(pairs=5)
QUICK = Settings(pairs=1, cases=[case for case in CASES if case.limit is not None])


def of_files() -> float:
    """Return the part of resident memory that is pages of files, in MiB (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile:"))
    return int(line.split()[1]) / 1024


class Peak(pl.Callback):
    """Resets the peak of memory after two steps, and reads it at the end of the last."""

    value = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == WARM_UP:
            reset_peak()
        if trainer.global_step == STEPS:
            self.value = memory() - of_files()


def fit(turns: Turns, width: int, case: Case | None = None) -> None:
    """Train, and report the peak and the packed messages in multiples of the parameters."""
    fix_malloc()
    make("ring", 4)  # imports networkx, whose modules take ten megabytes
    warnings.simplefilter("ignore")  # of compressors too coarse to train with
    if case is not None:
        turns.connect()
    turns.wait()
    before = memory(peak=False) - of_files()
    module, peak = Perceptron(width), Peak()
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    loader = DataLoader(TensorDataset(torch.randn(4 * STEPS * turns.size, width)), batch_size=2)
    strategy: Any = "auto"
    if case is not None:
        topology: dict[str, Any] = {} if case.topology == "auto" else {"topology": case.topology}
        strategy = GossipStrategy(case.algorithm(), overlap=case.overlap, **topology)
    trainer(strategy, turns.size, callbacks=[peak], max_steps=STEPS).fit(module, loader)
    packed = 0
    if case is not None and case.messages:
        packed = case.messages * sum(codec.nbytes for codec in strategy.algorithm.codecs)
    turns.report_value(((peak.value - before) * 2**20 / size, packed / size))
    turns.wait()


def run(report: Report, settings: Settings) -> None:
    """Measure all algorithms."""
    extra: dict[str, list[float]] = {case.name: [] for case in settings.cases}
    packed: dict[str, float] = {}
    single: list[float] = []
    for k in range(settings.pairs):
        with Team("single device", partial(fit, width=settings.width)) as team:
            single.append(team.turn()[0].value[0])
        for number, case in enumerate(settings.cases):
            progress("memory", k * len(settings.cases) + number + 1, settings.pairs * len(settings.cases))
            with Team(case.name, partial(fit, width=settings.width, case=case), size=case.ranks) as team:
                ranks = [lap.value for lap in team.turn()]
            extra[case.name].append(max(peak for peak, _ in ranks) - single[-1])
            packed[case.name] = ranks[0][1]
    report.figure("single device", estimate(single), "x parameters")
    for case in settings.cases:
        peaks = extra[case.name]
        if case.messages:
            report.figure(f"{case.name}: packed messages", estimate([packed[case.name]]), "x parameters")
        beside = estimate([peak - packed[case.name] for peak in peaks])
        if case.limit is None:
            report.figure(f"{case.name}: beside packed messages" if case.messages else case.name, beside, "x parameters")
        else:
            report.bar(f"algorithm_memory: {case.name}", beside, case.limit + SLACK)


def cli(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    main("algorithm_memory", run, FULL, QUICK, argv)


if __name__ == "__main__":
    cli()
