"""Resumes at random steps of random configurations: in how many runs is anything different from never having stopped.

Each run has a number, which draws one to three rows of the compatibility table, a layout of replicas over ranks, options of
the strategy and a moment (see `tests/resuming.py`). Compared bit for bit are, from the resume on, all replicas'
parameters after every batch, the samples they have seen, learning rates and validations, and at the end the module, the
steps, the traffic and the metrics.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process that has used two threads can't be forked safely

import torch

from benchmarks.report import Estimate, Report
from tests import resuming
from tests.pool import RankError, RankPool

RUNS, QUICK = 100, 15
TIMEOUT = 120.0
"""Seconds after which a run counts as hung."""


def attempt(pool: RankPool, number: int) -> str:
    """Carry out a run; returns what differs or fails in it, or nothing."""
    run = resuming.draw(number)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            results = pool.run(run.world, resuming.resume, run, folder, timeout=TIMEOUT)
        except RankError as error:
            print(f"FAILED  {run}\n{error}", flush=True)
            return str(error)
    first = results[0]
    where = f"{first['moment']}, batch {first['stopped']} of {first['total']}"
    texts = [f"  rank {k}: {text}" for k, result in enumerate(results) for text in result["differences"]]
    verdict = "DIFFERS" if texts else "equal  "
    print(f"{verdict} {run} ({where}; {time.monotonic() - begin:.1f} s)", *texts, sep="\n", flush=True)
    return "\n".join(texts)


def measure(report: Report, numbers: Sequence[int]) -> None:
    """Carry out the runs."""
    pool = RankPool(max(world for _, world in resuming.LAYOUTS))
    try:
        failed = [number for number in numbers if attempt(pool, number)]
    finally:
        pool.stop()
    if failed:
        print(f"Again, one by one: python -m benchmarks.resume --only {' '.join(map(str, failed))}")
    report.figure("resume: runs", Estimate(*[float(len(numbers))] * 3), "")
    report.bar("resume: runs that differ", Estimate(*[float(len(failed))] * 3), 0.0)


def cli(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resume")
    parser.add_argument("--runs", type=int, metavar="N", help=f"runs 0, ..., N-1; by default {RUNS}, {QUICK} with --quick")
    parser.add_argument("--only", type=int, nargs="+", metavar="K", help="the runs of these numbers")
    parser.add_argument("--quick", action="store_true", help="within a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    report = Report("resume", options.quick)
    measure(report, options.only or range(options.runs or (QUICK if options.quick else RUNS)))
    print(report.table())
    if options.json:
        options.json.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    cli()
