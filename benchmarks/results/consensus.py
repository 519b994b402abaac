"""Consensus control on deformed digits, in the manner of the thesis's tables 5.2, 14.1 and 14.2: phases x targets.

    python -m benchmarks.results.consensus          # reduced: 5 seeds, 12,800 images, 8 epochs, about an hour on two cores
    python -m benchmarks.results.consensus --full   # all images, 20 epochs, also n = 64

Every cell trains ResNet-8 with 32 replicas on a ring, batch 8 each, Nesterov momentum 0.9. The learning rate decays after half
and three quarters of training; the phases are those between the decays. Where one phase is decentralized, replicas average
exactly in the others, and `Xi_max` is the distance of the run with the same seed that gossips in that phase without control.
With "efficient" replicas gossip without control after phase 1. Methods are compared within seeds.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.results.common import arguments, final, half_width, run_grid, train, write

BATCH, BASE_LR = 8, 0.05
PHASES = ["lr_decay:1", "lr_decay:2", "lr_decay:3"]
FACTORS = {"1": 1.0, "1/2": 0.5, "1/4": 0.25}
Q = [1e-1, 1e-2, 1e-3]


def methods() -> list[str]:
    """Return the names of the cells."""
    constant = [f"phase {k + 1}, {factor}" for k in range(3) for factor in FACTORS]
    return ["all-reduce", "no control", *constant, *(f"efficient, q = {q:g}" for q in Q)]


def records(method: str) -> bool:
    """Return whether a cell is the reference of others."""
    return method == "no control" or method.endswith(", 1")


def make(method: str, n: int, folder: Path, seed: int) -> tuple[Any, list[Any]]:
    """Return the strategy and the callbacks of a cell; wait for the run that it refers to."""
    from lightning_distopt import ConsensusControl, GossipStrategy, LocalSGDStrategy

    if method == "all-reduce":
        return LocalSGDStrategy(1, average="parameters", replicas_per_device=n), []
    control: ConsensusControl
    if method == "no control":
        control = ConsensusControl("record", phases=PHASES)
    elif method.startswith("efficient"):
        control = ConsensusControl("efficient", float(method.split("q = ")[1]), phases=PHASES[0])
    else:
        phase, factor = method.removeprefix("phase ").split(", ")
        reference = folder / f"xi_max-{n}-{seed}-{phase}.json"
        where: dict[str, Any] = {"phases": PHASES[int(phase) - 1], "outside": "average", "reference": str(reference)}
        if records(method):
            control = ConsensusControl("record", **where)
        else:
            _wait_for(reference)
            control = ConsensusControl("constant", FACTORS[factor], **where)
    return GossipStrategy("dsgd", topology="ring", replicas_per_device=n), [control]


def _wait_for(reference: Path) -> None:
    patience = time.monotonic() + 3600
    while not reference.exists():
        if time.monotonic() > patience:
            raise TimeoutError(f"The run that records {reference.name} has not ended within an hour.")
        time.sleep(1)


def run_cell(cell: tuple[str, int, int, dict[str, Any], str]) -> dict[str, Any]:
    """Train one method with one seed."""
    method, seed, n, options, folder = cell
    strategy, callbacks = make(method, n, Path(folder), seed)
    figures = train(
        strategy,
        seed,
        batch_size=BATCH,
        lr=BASE_LR * n * BATCH / 32,
        num_test=5_000,
        callbacks=callbacks,
        nesterov=True,
        **options,
    )
    control = callbacks[0] if callbacks else None
    spent = control.steps_spent / control.rounds if control is not None and control.rounds else None
    xi_max = control.xi_max if control is not None and records(method) else None
    return {"method": method, "n": n, "steps_per_round": spent, "xi_max": xi_max, **figures}


def table(cells: list[dict[str, Any]], n: int) -> list[str]:
    """Return the lines of the tables."""
    by = {
        name: sorted((c for c in cells if c["method"] == name and c["n"] == n), key=lambda c: int(c["seed"]))
        for name in methods()
    }

    def against(name: str) -> str:
        gaps = [100 * (a["accuracy"][-1] - b["accuracy"][-1]) for a, b in zip(by[name], by["all-reduce"], strict=True)]
        return f"{statistics.mean(gaps):+.2f} ± {half_width(gaps):.2f}" if len(gaps) > 1 else f"{gaps[0]:+.2f}"

    def spent(name: str) -> str:
        steps = [c["steps_per_round"] for c in by[name] if c["steps_per_round"] is not None]
        return f"{statistics.mean(steps):.1f}" if steps else ""

    lines = [
        f"| n = {n} | accuracy % | against all-reduce, points | gossip steps per controlled round | MB sent by a replica |",
        "|---|---|---|---|---|",
    ]
    for name in methods():
        sent = statistics.mean(c["megabytes"] for c in by[name])
        gap = "" if name == "all-reduce" else against(name)
        lines.append(f"| {name} | {final(by[name])} | {gap} | {spent(name)} | {sent:.0f} |")
    return lines


def draw(cells: list[dict[str, Any]], path: Path) -> None:
    """Draw what control of each phase is worth, and what it costs in the first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    by: dict[str, list[dict[str, Any]]] = {}
    for cell in sorted((c for c in cells if c["n"] == 32), key=lambda c: int(c["seed"])):
        by.setdefault(cell["method"], []).append(cell)

    def gap(name: str) -> tuple[float, float]:
        gaps = [100 * (a["accuracy"][-1] - b["accuracy"][-1]) for a, b in zip(by[name], by["all-reduce"], strict=True)]
        return statistics.mean(gaps), half_width(gaps) if len(gaps) > 1 else 0.0

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.4), dpi=150, sharey=True)
    for k, color in enumerate(("#D55E00", "#0072B2", "#009E73")):
        means, widths = zip(*(gap(f"phase {k + 1}, {factor}") for factor in FACTORS), strict=True)
        places = [i + 0.08 * (k - 1) for i in range(len(FACTORS))]
        left.errorbar(places, means, widths, fmt="o-", ms=4, capsize=3, color=color, label=f"gossip in phase {k + 1} alone")
    left.set(xticks=range(len(FACTORS)), xticklabels=FACTORS, xlabel="target, of the uncontrolled distance")
    left.set(ylabel="against all-reduce, points")
    for names, color, label, (right_of, above) in (
        ([f"phase 1, {factor}" for factor in FACTORS], "#D55E00", "constant target in phase 1, all-reduce after it", (-15, 4)),
        (
            ["no control", *(f"efficient, q = {q:g}" for q in Q)],
            "#CC79A7",
            "efficient in phase 1, plain gossip after it",
            (5, -10),
        ),
    ):
        means, widths = zip(*map(gap, names), strict=True)
        sent = [statistics.mean(c["megabytes"] for c in by[name]) for name in names]
        right.errorbar(sent, means, widths, fmt="o-", ms=4, capsize=3, color=color, label=label)
        for name, x, y in zip(names, sent, means, strict=True):
            text = name.split(", ")[-1].removeprefix("q = ")
            right.annotate(text, (x, y), (right_of, above), textcoords="offset points", fontsize=7, color=color)
    right.plot(statistics.mean(c["megabytes"] for c in by["all-reduce"]), 0, "*", color="black", ms=9, label="all-reduce")
    right.set(xscale="log", xlabel="MB sent by a replica")
    right.margins(x=0.13)
    for axis in (left, right):
        axis.axhline(0, color="black", lw=0.8, ls=":")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.suptitle("ResNet-8, deformed digits, ring of 32 replicas: final accuracy", fontsize=10)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    told = arguments(__doc__)
    options = {
        "epochs": told.epochs or (20 if told.full else 8),
        "num_train": told.num_train or (None if told.full else 12_800),
    }
    sizes = [32, 64] if told.full else [32]
    folder = Path("consensus_references")
    folder.mkdir(exist_ok=True)
    grid = [(method, seed, n, options, str(folder)) for seed in range(told.seeds or 5) for n in sizes for method in methods()]
    grid.sort(key=lambda cell: (cell[1], not records(cell[0])))  # others need those
    cells = run_grid(run_cell, grid, told.workers, Path("consensus.partial.json"))
    shutil.rmtree(folder)
    write(cells, told.output / "consensus.json")
    draw(cells, told.output / "consensus.png")
    for n in sizes:
        print("\n".join(table(cells, n)))
        for method in filter(records, methods()):
            found = [c["xi_max"] for c in cells if c["method"] == method and c["n"] == n]
            mean = {phase: round(statistics.mean(x[phase] for x in found), 4) for phase in found[0]}
            print(f"Xi_max of {method}: {json.dumps(mean)}")


if __name__ == "__main__":
    sys.exit(main())
