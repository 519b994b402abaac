"""Time and bytes to an accuracy over slow links, for what people use today and for this package.

    python -m benchmarks.time_to_accuracy --json FILE --figure FILE --partial FILE    # hours; goes on after a stop
    python -m benchmarks.time_to_accuracy --ranks 8 --json FILE
    python -m benchmarks.time_to_accuracy --quick

All contenders train the same network on deformed digits, from the same start, on the same batches, with the same optimizer:
SGD with Nesterov momentum 0.9, weight decay 5e-4, a learning rate that rises for a while, stays, and is a tenth in the
last quarter; gloo, one thread for each rank. The learning rate was found for DDP. Settings of contenders stand in
`contenders`.

What a method has learned after so many steps does not depend on how fast the links are. So each is trained without
limits, for its accuracy over steps, and measured on every link for the time of a step; the product is the time to an
accuracy. That is what makes the slowest ones measurable at all: a step of DDP with 25 MB takes half a minute at 10 Mbit/s.
One link is trained over directly as well, to check the product.

- Contenders that learn exactly the same, which a test shows, are trained once: local SGD of three packages, D-PSGD with and
  without overlap.
- Accuracy is that on the test images of the average of all ranks' networks, in every `every` steps. The clock stands still.
- The accuracy to reach is that of DDP at the end, less half a point; all are means over seeds. Who misses it in as many steps
  as DDP takes is trained once more with twice as many, on a schedule as long: the choice of somebody whose steps take less
  time.
- Time of a step: contenders take turns, several times, each in new processes; computation alone before every fifth. Measured
  are whole cycles of rounds, after a few steps for which the links have no limit. The first dense steps of PowerSGD, and those
  before post-local training becomes local, count as DDP's.
- Bytes are those a rank's network interface has sent, less protocol headers; the mean over ranks.
- Expected of this package is `max(computation, communication)` where messages travel during computation, otherwise the sum:
  computation is that of `Trainer`s which train alone at the same time, communication that of the same messages by bare gloo.
- Computation and communication take equally long on one more link, whose rate is found for it.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import network
from benchmarks.contenders import ALONE, DDP, LOCAL, ONE_PEER, ONE_PEER_OVERLAPPED, OURS, PEERS, POWER_SGD, Contender
from benchmarks.contenders.case import MARGIN, Case, Store
from benchmarks.contenders.measure import Link, speed
from benchmarks.contenders.task import Workload, small_network, wide_network
from benchmarks.report import Estimate, Report, estimate
from benchmarks.surroundings import cores

RESNET = Workload("ResNet-8", small_network, batch=32, lr=0.2, steps=200, warmup=20, every=20)
WIDE = Workload("25 MB", wide_network, batch=16, lr=0.05, steps=240, warmup=24, every=24)
SLOW, MIDDLE, FAST = (Link(f"{rate}mbit") for rate in (10, 100, 1000))
CLUSTERS = Link("1000mbit", across="100mbit")


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        workloads: to train.
        ranks: numbers of them.
        links: between them.
        contenders: who takes part; those for two clusters do where there are two.
        seeds: of each training.
        repeats: of each measurement of a speed.
        window: seconds of one.
        direct: where trainings are run over a limited link too, and by whom.
        equal: the workload on whose additional link communication takes as long as computation.
        timeout: seconds for a turn.
    """

    workloads: tuple[Workload, ...] = (RESNET, WIDE)
    ranks: tuple[int, ...] = (4,)
    links: tuple[Link, ...] = (SLOW, MIDDLE, FAST, CLUSTERS)
    contenders: tuple[Contender, ...] = (*PEERS, *OURS)
    seeds: int = 2
    repeats: int = 2
    window: float = 4.0
    direct: tuple[tuple[Link, tuple[str, ...]], ...] = ((MIDDLE, ("local SGD, H = 8", "CHOCO sign, H = 8")),)
    equal: tuple[Workload, ...] = (RESNET,)
    timeout: float = 900.0


FULL = Settings()
QUICK = Settings(
    workloads=(
        replace(WIDE, name="2.5 MB", network=functools.partial(wide_network, 300), steps=96, warmup=8, every=48, num_test=1000),
    ),
    ranks=(4,),
    links=(MIDDLE,),
    contenders=tuple(c for c in (*PEERS, *OURS) if c.name in (DDP.name, POWER_SGD.name, LOCAL.name, "CHOCO sign, H = 8")),
    seeds=1,
    repeats=2,
    window=0.5,
    direct=(),
    equal=(),
)


# ---------------------------------------------------------------------------------------------------------- measurements
def measure(settings: Settings, store: Store) -> list[Case]:
    """Measure everything. Returns a case for each workload, number of ranks and link."""
    for contender in settings.contenders:
        if contender.needs and contender.installed:
            importlib.import_module(contender.needs)  # once here, not in every process
    cases = []
    for workload, n in itertools.product(settings.workloads, settings.ranks):
        workload.data()
        links = list(settings.links)
        for link in links:
            cases.append(Case(workload, n, link, settings.contenders, settings.repeats))
            cases[-1].measure(store, settings.window, settings.timeout)
        for case in cases[-len(links) :]:  # the first trains, the others find what is stored
            case.train(store, settings.contenders, settings.seeds, settings.timeout)
    for workload in settings.equal:
        cases.append(equal(workload, settings, store))
    for link, names in settings.direct:
        for case in cases:
            if case.link == link and case.workload.name != RESNET.name and case.n == settings.ranks[0]:
                case.train_directly(store, names, settings.timeout)
    return cases


def equal(workload: Workload, settings: Settings, store: Store) -> Case:
    """Return a case in which a one-peer message takes as long as the computation of a step."""
    n = settings.ranks[0]
    alone = functools.partial(speed, None, workload, n, ALONE, settings.window, settings.timeout)
    seconds = store.get(("equal", workload.name, n), alone)["seconds"]
    link = Link(f"{max(1, round(8 * 4 * workload.parameters() / seconds / 1e6))}mbit")
    contenders = tuple(c for c in OURS if c.topology == ONE_PEER and c.sync_period == 1)
    case = Case(workload, n, link, contenders, settings.repeats, is_equal=True)
    case.measure(store, settings.window, settings.timeout)
    return case


# --------------------------------------------------------------------------------------------------------------- results
def ratios(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Return the estimate of `a / b` over pairs."""
    return estimate([x / y for x, y in zip(a, b, strict=True)])


NEVER = Estimate(0.0, 0.0, 0.0)
"""The speed of what does not get there."""


def sooner(case: Case, report: Report) -> None:
    """Note how much sooner the best of this package is at the accuracy than DDP, and than the best of all others."""
    mine, others = case.running(ours=True), case.running(ours=False)
    best, peer = case.fastest(mine) if mine else LOCAL, case.fastest(others)
    for other, limit in ((DDP, 8.0), (peer, 1.0)):
        faster = ratios(case.times(other) or [], case.times(best) or []) if mine else NEVER
        report.bar(f"time_to_accuracy: {case}: time of {other.name} over {best.name}", faster, limit, at_least=True)


def bars(cases: Sequence[Case], report: Report) -> None:
    """Note figures and bars of all cases in the report."""
    for case in cases:
        ours = [c for c in case.contenders if c.ours]
        for c in ours:
            name = "overlap where both take as long" if case.is_equal and c.overlap else "step over expected"
            report.bar(f"time_to_accuracy: {case}: {c.name}, {name}", estimate(case.over_expected(c)), 1.15)
            counted = [(x["traffic"], x["sent"]) for x in case.speeds[c.name] if x["sent"]]
            if counted:
                report.figure(f"{case}: {c.name}, counted over sent", estimate([t / s for t, s in counted]))
        if case.is_equal:
            continue
        for c in (c for c in case.contenders if c.name in case.direct):
            steps, seconds = case.direct[c.name]
            calculated = [seconds / case.axis(c, steps, k) for k in range(case.repeats)]
            report.figure(f"{case}: {c.name}, trained directly over calculated", estimate(calculated))
        if case.workload.name != RESNET.name and case.link == MIDDLE:
            sooner(case, report)
        if case.workload.name != RESNET.name and case.link == SLOW and case.failure(POWER_SGD) is None:
            least = np.mean(case.finals[POWER_SGD.name]) - MARGIN  # after as many steps
            as_good = [c for c in ours if np.mean(case.finals[c.name]) >= least]
            best = min(as_good or ours, key=lambda c: float(np.median(case.seconds(c))))
            faster = ratios(case.seconds(POWER_SGD), case.seconds(best)) if as_good else NEVER
            report.bar(f"time_to_accuracy: {case}: steps of {best.name} over {POWER_SGD.name}", faster, 1.0, at_least=True)
        if case.link == FAST:
            for c in (LOCAL, ONE_PEER_OVERLAPPED):
                slower = ratios(case.seconds(c), case.seconds(DDP))
                report.bar(f"time_to_accuracy: {case}: step of {c.name} over DDP", slower, 1.0)


def table(case: Case) -> str:
    """Return the case's contenders as a table in Markdown."""
    goal, trained = f"{100 * case.target:.1f} %", case.workload.steps
    lines = [
        f"**{case}** ({case.parameters:,} parameters)",
        "",
        f"| | ms a step | MB a step | % after {trained} steps | steps to {goal} | time | MB | of DDP's time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in case.contenders:
        if reason := case.failure(c):
            lines.append(f"| {c.name} | {reason} | | | | | | |")
            continue
        sent, steps, times, total = case.sent(c), case.steps(c), case.times(c), case.bytes_to_target(c)
        final = [100 * a for a in case.finals[c.name]]
        cells = [
            f"**{c.name}**" if c.ours else c.name,
            _interval([1e3 * s for s in case.seconds(c)]),
            "" if sent is None else _number(sent / 1e6),
            f"{np.mean(final):.1f} ({min(final):.1f} - {max(final):.1f})",
            str(steps or "not reached"),
            _duration(float(np.median(times))) if times else "",
            "" if total is None else _number(total / 1e6),
            f"1 / {1 / share:.1f}" if times and (share := _share(case, times)) else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(case: Case, times: Sequence[float]) -> float:
    ddp = case.times(DDP)
    return float(np.median(times) / np.median(ddp)) if ddp else 0.0


def _interval(values: Sequence[float]) -> str:
    value, low, high = estimate(values)
    return f"{_number(value)} ({_number(low)} - {_number(high)})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


def records(cases: Iterable[Case]) -> list[dict[str, Any]]:
    """Return what a cost model is fitted on: a record for each of this package's contenders, and for DDP, in every case."""
    found = []
    for case in cases:
        rates = [None if rate is None else float(rate.removesuffix("mbit")) for rate in (case.link.rate, case.link.across)]
        for c in case.contenders:
            if not (c.ours or c is DDP):
                continue
            found.append(
                {
                    "strategy": f"{c.algorithm}: {c.name}",
                    "replicas": case.n,
                    "rate_mbit": rates[0],
                    "across_mbit": rates[1],
                    "parameters": case.parameters,
                    "compute_ms": 1e3 * float(np.median(case.compute[c.name])),
                    "sync_period": c.sync_period,
                    "block_period": c.blocks if c.blocks > 1 else None,
                    "overlap": c.overlap,
                    "compressor": c.compressor,
                    "topology": None if c.topology in ("", "all", "gather") else c.topology,
                    "step_ms": 1e3 * float(np.median(case.seconds(c))),
                    "bytes_per_step": case.sent(c),
                    "cores": len(cores()),
                }
            )
    return found


def draw(cases: Sequence[Case], path: Path) -> None:
    """Draw accuracy over seconds: a row for each network and number of ranks, a column for each link."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = list(dict.fromkeys((case.workload.name, case.n) for case in cases))
    columns = list(dict.fromkeys(case.link for case in cases))
    size = (1.0 + 3.6 * len(columns), 1.6 + 2.8 * len(rows))
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, dpi=150, squeeze=False, sharey="row")
    everybody = list(dict.fromkeys(c for case in cases for c in case.contenders))
    mine = [c for c in everybody if c.ours]
    colors = dict(zip(mine, plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(mine))), strict=True))
    greys = dict(
        zip(
            (c for c in everybody if not c.ours),
            itertools.cycle(["-", "--", ":", "-.", (0, (8, 2)), (0, (1, 3)), (0, (6, 1, 1, 1))]),
            strict=False,
        )
    )
    handles = {}
    for case in cases:
        axis = axes[rows.index((case.workload.name, case.n))][columns.index(case.link)]
        for c in case.contenders:
            if case.failure(c) is not None:
                continue
            repeats = range(case.repeats)
            seconds = [np.median([case.axis(c, s, k) for k in repeats]) for s in case.curves[c.name][0]["steps"]]
            style = {"color": colors[c], "lw": 1.4} if c.ours else {"color": "0.45", "ls": greys[c], "lw": 1.6}
            style |= {"color": "black"} if c is DDP else {}
            handles[c.name] = axis.plot(seconds, [100 * a for a in case.accuracy(c)], **style)[0]
        axis.axhline(100 * case.target, color="0.8", lw=0.8, zorder=0)
        axis.set(xscale="log", title=str(case))
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.25)
    for row in axes:
        row[0].set_ylabel("test accuracy, %")
        for axis in row:
            axis.set_xlabel("seconds")
    figure.tight_layout(rect=(0, (0.2 + 0.16 * math.ceil(len(handles) / 4)) / size[1], 1, 1))
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncol=4, fontsize=8, frameon=False, handlelength=4)
    figure.savefig(path, format="png")


def cli(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.time_to_accuracy")
    parser.add_argument("--quick", action="store_true", help="a small form of it: within a minute")
    helps: Mapping[str, str] = {
        "json": "write all results there too",
        "records": "write what a cost model is fitted on",
        "figure": "draw accuracy over seconds (PNG)",
        "partial": "keep there what has been measured, and go on from it",
    }
    for name, text in helps.items():
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=text)
    parser.add_argument("--ranks", type=int, nargs="+", metavar="N", help="numbers of ranks, powers of two; 4 by default")
    told = parser.parse_args(argv)
    if wrong := [n for n in told.ranks or () if n < 2 or n & (n - 1)]:
        parser.error(f"--ranks: {wrong[0]} is no power of two, which a hypercube of ranks needs: use 2, 4 or 8.")
    settings = QUICK if told.quick else FULL
    settings = replace(settings, ranks=tuple(told.ranks or settings.ranks))
    if any(link.rate for link in settings.links) and (reason := network.unavailable()):
        sys.exit(reason)
    torch.set_num_threads(1)
    report = Report("time_to_accuracy", told.quick)
    cases = measure(settings, Store(told.partial))
    bars(cases, report)
    trained = [case for case in cases if not case.is_equal]
    print("\n\n".join(map(table, trained)), "\n")
    print(report.table())
    if told.json:
        told.json.write_text(json.dumps({**report.as_dict(), "cases": [case.as_dict() for case in cases]}, indent=1) + "\n")
    if told.records:
        told.records.write_text(json.dumps(records(cases), indent=1) + "\n")
    if told.figure:
        draw(trained, told.figure)


if __name__ == "__main__":
    cli()
