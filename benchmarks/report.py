"""Statistics of paired samples, the report of a benchmark, and its command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.surroundings import surroundings


# ----------------------------------------------------------------------------------------------------------- statistics
class Estimate(NamedTuple):
    """A median with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def estimate(samples: Sequence[float], resamples: int = 5000) -> Estimate:
    """Return the median of `samples` with the percentile interval of its bootstrap; deterministic."""
    values = np.asarray(samples, dtype=float)
    draws = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(np.median(values[draws], axis=1), [2.5, 97.5])
    return Estimate(float(np.median(values)), float(low), float(high))


def ratio(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Return the estimate of `a / b` over pairs."""
    return estimate([x / y for x, y in zip(a, b, strict=True)])


# --------------------------------------------------------------------------------------------------------------- report
class Report:
    """Collects figures and bars, prints them as a table and writes them as JSON.

    Args:
        name: of the benchmark.
        quick: whether it is the short form, whose intervals are wide.
    """

    def __init__(self, name: str, quick: bool = False) -> None:
        self.name, self.quick = name, quick
        self.bars: list[dict[str, Any]] = []
        self.figures: list[dict[str, Any]] = []
        self._load = os.getloadavg()
        self._begin = time.perf_counter()

    def figure(self, name: str, value: Estimate, unit: str = "x") -> None:
        """Note a figure that has no bar."""
        self.figures.append({"name": name, "value": value.value, "interval": [value.low, value.high], "unit": unit})

    def bar(
        self, name: str, value: Estimate, limit: float, at_least: bool = False, interval_below: float = float("inf")
    ) -> None:
        """Note a figure that shall be at most `limit` (or at least), its interval's upper end below another."""
        holds = (value.value >= limit if at_least else value.value <= limit) and value.high < interval_below
        interval = [value.low, value.high]
        self.bars.append({"name": name, "value": value.value, "interval": interval, "limit": limit, "holds": holds})

    def as_dict(self) -> dict[str, Any]:
        """Return everything, with the machine and the versions."""
        return {
            "benchmark": self.name,
            "quick": self.quick,
            "seconds": round(time.perf_counter() - self._begin, 1),
            **surroundings(),
            "load": {"before": self._load, "after": os.getloadavg()},
            "bars": self.bars,
            "figures": self.figures,
        }

    def table(self) -> str:
        """Return the figures and bars as text."""
        rows = [(f["name"], f["value"], f["interval"], f["unit"]) for f in self.figures]
        for bar in self.bars:
            verdict = "holds" if bar["holds"] else "MISSED"
            rows.append((bar["name"], bar["value"], bar["interval"], f"bar {bar['limit']:g}: {verdict}"))
        width = max((len(row[0]) for row in rows), default=0)
        return "\n".join(
            f"{name:<{width}}  {value:10.3f}  [{low:.3f}, {high:.3f}]  {note}" for name, value, (low, high), note in rows
        )


def main(name: str, run: Callable[[Report, Any], None], full: Any, quick: Any, argv: Sequence[str] | None) -> None:
    """Run a benchmark from the command line.

    Args:
        name: of the benchmark.
        run: called with the report to fill and the settings.
        full, quick: settings without and with `--quick`.
        argv: arguments, by default those of the command line.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter turns: within a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    report = Report(name, options.quick)
    run(report, quick if options.quick else full)
    print(report.table())
    if options.json:
        options.json.write_text(json.dumps(report.as_dict(), indent=2) + "\n")


def progress(text: str, done: int, total: int) -> None:
    """Show how far a measurement is."""
    if sys.stderr.isatty():
        print(f"\r{text}: {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done in (0, total):
        print(f"{text}: {done}/{total}", file=sys.stderr, flush=True)
