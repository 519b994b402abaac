"""Mini-batch, local, post-local and hierarchical local SGD on deformed digits, paired by seed.

    python -m benchmarks.results.local_sgd            # reduced: 5 seeds, 6 epochs, about half an hour on two cores
    python -m benchmarks.results.local_sgd --full     # 10 seeds, 20 epochs, more values of H

Every cell trains ResNet-8 with four replicas, batch 32 each, on the same number of samples. All methods share the recipe of
the thesis: learning rate scaled linearly with the global batch, an epoch of warm-up, a tenth of the rate after 50 % and 75 % of
training. It was set once for mini-batch SGD and is not tuned for the others. A seed fixes the start and the order of the
data; methods are compared within seeds.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.results.common import arguments, draw_curves, half_width, run_grid, train, write

REPLICAS, BATCH, BASE_LR = 4, 32, 0.05
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "mini-batch SGD": ({"sync_period": 1}, None),
    "local SGD, H = 8": ({"sync_period": 8}, None),
    "post-local SGD, H = 8": ({"sync_period": 8}, {}),
}
FULL_METHODS = {
    "hierarchical, H = 8 in blocks of 2, all every 4th": ({"sync_period": 8, "block_size": 2, "block_period": 4}, None)
}
FULL_METHODS |= {f"local SGD, H = {H}": ({"sync_period": H}, None) for H in (2, 4, 16)}
FULL_METHODS |= {f"post-local SGD, H = {H}": ({"sync_period": H}, {}) for H in (4, 16)}


def run_cell(cell: tuple[str, int, int, int | None]) -> dict[str, Any]:
    """Train one method with one seed; returns its figures."""
    from lightning_distopt import LocalSGDStrategy, PostLocalSwitch

    method, seed, epochs, num_train = cell
    options, switch = {**METHODS, **FULL_METHODS}[method]
    figures = train(
        LocalSGDStrategy(replicas_per_device=REPLICAS, **options),
        seed,
        epochs,
        BATCH,
        lr=BASE_LR * REPLICAS,
        num_train=num_train,
        callbacks=[PostLocalSwitch(**switch)] if switch is not None else [],
    )
    return {"method": method, **figures}


def summary(cells: list[dict[str, Any]], methods: list[str]) -> list[str]:
    """Return the lines of the table."""
    by = {(cell["method"], cell["seed"]): cell for cell in cells}
    seeds = sorted({cell["seed"] for cell in cells})
    lines = [
        "| method | test accuracy % | against mini-batch SGD, points | epochs to 85 % | rounds | MB sent per replica |",
        "|---|---|---|---|---|---|",
    ]
    for method in methods:
        mine = [by[method, seed] for seed in seeds]
        final = [100 * cell["accuracy"][-1] for cell in mine]
        gaps = [100 * (by[method, s]["accuracy"][-1] - by[methods[0], s]["accuracy"][-1]) for s in seeds]
        reached = [next((k + 1 for k, a in enumerate(cell["accuracy"]) if a >= 0.85), None) for cell in mine]
        to_85 = ", ".join("-" if k is None else str(k) for k in reached)
        gap = "" if method == methods[0] else f"{statistics.mean(gaps):+.2f} ± {half_width(gaps):.2f}"
        spread = statistics.stdev(final) if len(final) > 1 else 0.0
        lines.append(
            f"| {method} | {statistics.mean(final):.2f} ± {spread:.2f} | {gap} | {to_85} "
            f"| {mine[0]['rounds']} | {mine[0]['megabytes']:.0f} |"
        )
    return lines


def main() -> None:
    told = arguments(__doc__)
    epochs = told.epochs or (20 if told.full else 6)
    seeds = range(told.seeds or (10 if told.full else 5))
    methods = [*METHODS, *(FULL_METHODS if told.full else {})]

    grid = [(method, seed, epochs, told.num_train) for seed in seeds for method in methods]
    cells = run_grid(run_cell, grid, told.workers, Path("local_sgd.partial.json"))
    write(cells, told.output / "local_sgd.json")
    # The first, which others cover where they are equal to it, last and dashed.
    groups = {method: [cell for cell in cells if cell["method"] == method] for method in reversed(methods)}
    styles = {methods[0]: {"color": "black", "ls": "--"}}
    draw_curves(groups, "ResNet-8, deformed digits, 4 replicas", told.output / "local_sgd.png", styles)
    print("\n".join(summary(cells, methods)))


if __name__ == "__main__":
    sys.exit(main())
