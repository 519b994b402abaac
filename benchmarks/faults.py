"""Do the other ranks end when one fails, in time, naming the right one, and is every checkpoint whole?

Each run trains a small module on 2 to 4 processes with a checkpoint after every second round, and injects one fault
(`tests/faults.py`) at a random place of a random round on a random rank: the rank raises, is killed, stops answering, or is
slower than the timeout. Counted is what went wrong: a rank that does not end within the timeout and the time of the diagnosis,
an error that does not name the right rank and a round, a checkpoint that is not whole or does not resume.

    python -m benchmarks.faults --runs 200
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import Estimate, Report, progress
from tests.faults import KINDS, PLACES, Fault, inject
from tests.pool import RankError, RankPool


def draw(number: int) -> tuple[int, Fault]:
    """Return the number of ranks and the fault of a run; the same for the same number."""
    rng = random.Random(number)
    world_size = rng.choice((2, 3, 4))
    sync_period = rng.choice((3, 3, 1))
    fault = Fault(rng.choice(KINDS), rng.choice(PLACES), rng.randrange(world_size), rng.randint(1, 3), sync_period)
    return world_size, fault


def run(report: Report, numbers: Sequence[int]) -> None:
    """Inject the faults of these numbers."""
    ranks = RankPool(size=4)
    failed: list[str] = []
    seconds = []
    try:
        for done, number in enumerate(numbers):
            progress("faults", done, len(numbers))
            world_size, fault = draw(number)
            with tempfile.TemporaryDirectory() as folder:
                try:
                    problems, latest = inject(ranks, world_size, fault, Path(folder))
                    seconds.append(latest)
                except RankError as error:  # a rank hung, or something else than the fault happened to it
                    problems = [str(error).strip().splitlines()[-1]]
            if problems:
                failed.append(f"run {number}, {world_size} ranks, {fault}: {'; '.join(problems)}")
                print(failed[-1], flush=True)
        progress("faults", len(numbers), len(numbers))
    finally:
        ranks.stop(kill=True)
    count = float(len(failed))
    report.figure("faults: injected", Estimate(*[float(len(numbers))] * 3), "")
    report.figure(
        "faults: last rank ended after",
        Estimate(max(seconds, default=0.0), min(seconds, default=0.0), max(seconds, default=0.0)),
        "s",
    )
    report.bar("faults: runs that ended wrongly", Estimate(count, count, count), 0.0)


def cli(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults")
    parser.add_argument("--runs", type=int, default=200, help="faults to inject")
    parser.add_argument("--only", type=int, metavar="K", help="only the run with this number")
    parser.add_argument("--quick", action="store_true", help="six runs: within a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args(argv)
    report = Report("faults", options.quick)
    numbers = range(6 if options.quick else options.runs) if options.only is None else [options.only]
    run(report, numbers)
    print(report.table())
    if options.json:
        options.json.write_text(json.dumps(report.as_dict(), indent=2) + "\n")


if __name__ == "__main__":
    cli()
