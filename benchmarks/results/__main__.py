"""All tables and benchmarks once more, on one commit, beside what the pages say: `make results`.

    python -m benchmarks.results                              # all, each method of a table once; two hours
    python -m benchmarks.results federated round_cost         # some of them
    python -m benchmarks.results --seeds 2 --output FOLDER    # all runs of the first two seeds

A training depends on its seed alone, so a run with the first seed is that of the table again: what the page has is compared
with what comes out now, run by run. Benchmarks are run in their quick forms, whose intervals are wide; not among them are
`gpu`, which needs a card, and `plan`, which measures nothing. What comes out stands in `once_more.md`, with commit, machine and
versions. The page is written anew after each of them; what was interrupted goes on with the next, as long as the commit is the
same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.surroundings import surroundings

TABLES = (
    "local_sgd",
    "gossip_compression",
    "consensus",
    "heterogeneous",
    "federated",
    "sparsity",
    "masking",
    "flatness",
)
SEVERAL = ("heterogeneous", "federated", "sparsity")
"""Tables whose methods have several settings."""

BENCHMARKS = (
    "step_overhead",
    "round_cost",
    "simulation",
    "memory",
    "straggler",
    "gossip_round",
    "gossip_scaling",
    "compression",
    "algorithm_memory",
    "heterogeneous_step",
    "curvature",
    "federated",
    "sparsity",
    "scaling",
    "time_to_accuracy",
    "faults",
    "resume",
)
IDENTITY = ("method", "norm", "graph", "alpha", "fraction", "network", "sparsity", "task", "n", "checksum", "seed")
"""What tells runs apart; `checksum` is the corpus's, which another Python may have made."""
PAGE = "once_more.md"
PARTIAL = Path("results.partial.json")


def runs(path: Path) -> dict[tuple[Any, ...], float]:
    """Return the accuracy at the end of every run of a table, in percent, by what tells it from the others.

    Args:
        path: the table's file.
    """
    content = json.loads(path.read_text())
    cells = content["cells"] if isinstance(content, dict) else content
    return {
        tuple(cell.get(name) for name in IDENTITY): 100 * cell["accuracy"][-1]
        for cell in _single(cells)
        if cell.get("accuracy") and not cell.get("diverged")
    }


def _single(cells: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for cell in cells:
        if "runs" in cell:  # several methods with one seed
            yield from ({**run, "method": method, "seed": cell["seed"]} for method, run in cell["runs"].items())
        else:
            yield cell


def compare(before: Path, now: Path) -> str:
    """Return a table's row: how far its runs are from those of the page, in points of accuracy, and which is the farthest."""
    if not before.exists():
        return "| no table yet | | | |"
    old, new = runs(before), runs(now)
    gaps = {key: new[key] - old[key] for key in new if key in old}
    if not gaps:
        return f"| {len(new)}, none of which the page has | | | |"
    farthest = max(gaps, key=lambda key: abs(gaps[key]))
    named = [
        str(part)
        for part, name in zip(farthest, IDENTITY, strict=True)
        if part is not None and name not in ("checksum", "seed")
    ]
    which = ", ".join(named) if round(gaps[farthest], 2) else ""
    return f"| {len(gaps)} | {statistics.mean(gaps.values()):+.2f} | {gaps[farthest]:+.2f} | {which} |"


def bars(path: Path) -> list[str]:
    """Return a benchmark's rows: one for each bar."""
    found = json.loads(path.read_text())["bars"]
    return [
        f"| {bar['name']} | {bar['value']:.3f} | {bar['interval'][0]:.3f} - {bar['interval'][1]:.3f} | {bar['limit']:g} "
        f"| {'holds' if bar['holds'] else 'missed'} |"
        for bar in found
    ]


def run(command: Sequence[str]) -> tuple[float, str]:
    """Run a module of Python, and return its seconds and what went wrong, if anything."""
    print("python", *command, flush=True)
    began = time.perf_counter()
    code = subprocess.run([sys.executable, *command], check=False).returncode
    return time.perf_counter() - began, f"exit code {code}" if code else ""


def page(tables: Sequence[str], measured: Sequence[str], seeds: int | None, where: dict[str, Any]) -> str:
    """Return the page.

    Args:
        tables, measured: rows of learning tables, and of benchmarks.
        seeds: of each table; None if each method was run once.
        where: commit, machine and versions.
    """
    machine, versions = where["machine"], where["versions"]
    which = f"all runs with the first {seeds} of their seeds" if seeds else "one run of each method, with the first seed"
    lines = [
        "# Results once more",
        "",
        f"All on commit {where['commit']}; {machine['processor']}, {machine['cores']} cores, {machine['system']}; "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}. Made by `make results`.",
        "",
        f"Learning tables: {which}. How far they end from the same runs on the pages, in points of accuracy:",
        "",
        "| table | runs | mean difference | largest | of | minutes |",
        "|---|---|---|---|---|---|",
        *tables,
        "",
        "Benchmarks, in their quick forms, whose intervals are wide, and which train smaller networks in `curvature` and "
        "`time_to_accuracy`; "
        "[what whole runs gave, and why some bars are missed](../benchmarks.md#results):",
        "",
        "| bar | value | 95 % interval | limit | |",
        "|---|---|---|---|---|",
        *measured,
        "",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    choices = dict.fromkeys((*TABLES, *BENCHMARKS))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to run: {', '.join(choices)}; by default all")
    parser.add_argument("--seeds", type=int, help="all runs of that many seeds; by default one run of each method")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="the folder of the pages")
    told = parser.parse_args(argv)
    if unknown := [name for name in told.names if name not in choices]:
        parser.error(f"there is no table or benchmark {', '.join(unknown)}")
    if told.seeds is not None and told.seeds < 1:
        parser.error(f"--seeds must be at least 1; got {told.seeds}")
    # A name may be that of a table and of a benchmark.
    parts = [(of, name) for of, names in (("table", TABLES), ("benchmark", BENCHMARKS)) for name in names]
    parts = [(of, name) for of, name in parts if name in (told.names or choices)]
    where = surroundings()
    told.output.mkdir(parents=True, exist_ok=True)
    done = begun(where["commit"], told.seeds)
    for of, name in parts:
        if f"{of} {name}" not in done:
            done[f"{of} {name}"] = table(name, told.seeds, told.output) if of == "table" else benchmark(name)
        PARTIAL.write_text(json.dumps({"commit": where["commit"], "seeds": told.seeds, "done": done}))
        rows = {kind: [row for other, n in parts if other == kind for row in done.get(f"{kind} {n}", [])] for kind, _ in parts}
        (told.output / PAGE).write_text(page(rows.get("table", []), rows.get("benchmark", []), told.seeds, where))
    PARTIAL.unlink(missing_ok=True)
    print(f"Written: {told.output / PAGE}")


def begun(commit: str, seeds: int | None) -> dict[str, list[str]]:
    """Return the rows that are there from a run on the same commit that was interrupted, by part."""
    before = json.loads(PARTIAL.read_text()) if PARTIAL.exists() else {}
    done: dict[str, list[str]] = before["done"] if (before.get("commit"), before.get("seeds")) == (commit, seeds) else {}
    return done


def table(name: str, seeds: int | None, published: Path) -> list[str]:
    """Run the first seeds of a table, or each of its methods once, and return its row."""
    which = ["--seeds", str(seeds or 1), *(["--once"] if seeds is None and name in SEVERAL else [])]
    with tempfile.TemporaryDirectory() as folder:
        seconds, wrong = run(["-m", f"benchmarks.results.{name}", *which, "--output", folder])
        row = f"| {wrong} | | | |" if wrong else compare(published / f"{name}.json", Path(folder, f"{name}.json"))
    return [f"| [{name}]({name}.md) {row} {seconds / 60:.0f} |"]


def benchmark(name: str) -> list[str]:
    """Run the quick form of a benchmark, and return its rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.json")
        _, wrong = run(["-m", f"benchmarks.{name}", "--quick", "--json", str(path)])
        return [f"| {name} | {wrong} | | | |"] if wrong else bars(path)


if __name__ == "__main__":
    main()
