"""Compressed gossip on deformed digits, in the manner of the thesis's table 4.1: compressors x algorithms, paired by seed.

    python -m benchmarks.results.gossip_compression --tune    # which learning rate and gamma, on held-out originals, 5 epochs
    python -m benchmarks.results.gossip_compression           # reduced: 5 compressors, 5 seeds, 6 epochs, 70 minutes, two cores
    python -m benchmarks.results.gossip_compression --full    # all 11 compressors of the thesis, all images, 20 epochs

Every cell trains ResNet-8 with eight replicas on a ring, batch 16 each, momentum 0.9. The learning rate, and the consensus step
size of the algorithms that have one, are those of the grid below with the best accuracy on held-out training originals, for one
seed that the table does not have.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.results.common import arguments, draw_curves, final, half_width, run_grid, train, write

REPLICAS, BATCH = 8, 16
COMPRESSORS = ["qsgd:8", "qsgd:2", "random_k:0.1", "top_k:0.01", "sign"]
FULL_COMPRESSORS = ["qsgd:16", "qsgd:8", "qsgd:4", "qsgd:2"]
FULL_COMPRESSORS += [f"{kind}_k:{ratio}" for kind in ("random", "top") for ratio in (0.5, 0.1, 0.01)] + ["sign"]
ALGORITHMS = ["DCD", "ECD", "DeepSqueeze", "CHOCO"]
RATES = [0.1, 0.2]
GAMMAS = {"CHOCO": [1.0, 2.0, 4.0], "DeepSqueeze": [0.02, 0.1, 0.4]}
"""For CHOCO multiples of what the thesis tuned for the compressor, at most 1."""

TUNED = Path(__file__).with_name("gossip_compression_tuned.json")
REFERENCES = ["all-reduce", "D-PSGD", "D-SGD"]


def make_strategy(method: str, gamma: float | None) -> Any:
    """Return the strategy of a row and column."""
    from lightning_distopt import CHOCO, DCD, ECD, DeepSqueeze, GossipStrategy, LocalSGDStrategy
    from lightning_distopt.compression import make

    if method == "all-reduce":
        return LocalSGDStrategy(1, replicas_per_device=REPLICAS)
    if method in REFERENCES:
        return GossipStrategy({"D-PSGD": "dpsgd", "D-SGD": "dsgd"}[method], topology="ring", replicas_per_device=REPLICAS)
    algorithm, compressor = method.split()
    made: Any
    if algorithm == "CHOCO":
        assert gamma is not None
        made = CHOCO(gamma=min(1.0, gamma * float(make(compressor).tuned_gamma or 1)), compressor=compressor)
    elif algorithm == "DeepSqueeze":
        made = DeepSqueeze(gamma=gamma or 0.01, compressor=compressor)
    else:
        made = {"DCD": DCD, "ECD": ECD}[algorithm](compressor)
    return GossipStrategy(made, topology="ring", replicas_per_device=REPLICAS)


def run_cell(cell: tuple[str, int, float, float | None, dict[str, Any]]) -> dict[str, Any]:
    """Train one method with one seed, learning rate and gamma."""
    method, seed, lr, gamma, options = cell
    figures = train(make_strategy(method, gamma), seed, batch_size=BATCH, lr=lr, num_test=5_000, **options)
    return {"method": method, "lr": lr, "gamma": gamma, **figures}


def tune(methods: list[str], workers: int, options: dict[str, Any]) -> None:
    """Find the best learning rate and gamma of each method, and write them down."""
    options = {**options, "validation": "holdout"}
    grid = [
        (method, 1000, lr, gamma, options)
        for method in methods
        for lr, gamma in itertools.product(RATES, GAMMAS.get(method.split()[0], [None]))
    ]
    cells = run_grid(run_cell, grid, workers, Path("gossip_compression_tune.partial.json"))
    best: dict[str, dict[str, Any]] = {}
    for cell in cells:
        accuracy = 0.0 if cell["diverged"] else cell["accuracy"][-1]
        if accuracy > best.get(cell["method"], {}).get("accuracy", -1.0):
            best[cell["method"]] = {"accuracy": accuracy, "lr": cell["lr"], "gamma": cell["gamma"]}
    TUNED.write_text(json.dumps({method: best[method] for method in methods}, indent=1))


def table(cells: list[dict[str, Any]], compressors: list[str]) -> list[str]:
    """Return the lines of the table."""
    by = {method: [cell for cell in cells if cell["method"] == method] for method in {cell["method"] for cell in cells}}
    sent = [f"{by[f'CHOCO {compressor}'][0]['megabytes']:.1f}" for compressor in compressors]
    lines = [
        f"| algorithm | {' | '.join(compressors)} |",
        f"|---{'|---' * len(compressors)}|",
        f"| MB sent by a replica | {' | '.join(sent)} |",
    ]
    for algorithm in ALGORITHMS:
        lines.append(f"| {algorithm} | {' | '.join(final(by[f'{algorithm} {c}']) for c in compressors)} |")
    lines += [
        "",
        "| without compression | accuracy % | against all-reduce, points | MB sent by a replica |",
        "|---|---|---|---|",
    ]
    for method in REFERENCES:
        pairs = zip(sorted(by[method], key=_seed), sorted(by["all-reduce"], key=_seed), strict=True)
        gaps = [100 * (a["accuracy"][-1] - b["accuracy"][-1]) for a, b in pairs]
        gap = "" if method == "all-reduce" else f"{sum(gaps) / len(gaps):+.2f} ± {half_width(gaps):.2f}"
        lines.append(f"| {method} | {final(by[method])} | {gap} | {by[method][0]['megabytes']:.1f} |")
    return lines


def _seed(cell: dict[str, Any]) -> int:
    return int(cell["seed"])


def main() -> None:
    told = arguments(__doc__, tunes=True)
    compressors = FULL_COMPRESSORS if told.full else COMPRESSORS
    methods = [*REFERENCES, *(f"{algorithm} {compressor}" for algorithm in ALGORITHMS for compressor in compressors)]
    options = {
        "epochs": told.epochs or (5 if told.tune else 20 if told.full else 6),
        "num_train": told.num_train or (None if told.full else 12_800),
    }
    if told.tune:
        return tune(methods, told.workers, options)
    tuned = json.loads(TUNED.read_text())
    grid = [
        (method, seed, tuned[method]["lr"], tuned[method]["gamma"], options)
        for seed in range(told.seeds or 5)
        for method in methods
    ]
    cells = run_grid(run_cell, grid, told.workers, Path("gossip_compression.partial.json"))
    write(cells, told.output / "gossip_compression.json")
    shown = ["all-reduce", "D-PSGD", *(f"{algorithm} sign" for algorithm in ALGORITHMS), "CHOCO top_k:0.01"]
    groups = {method: [c for c in cells if c["method"] == method and not c["diverged"]] for method in shown}
    draw_curves(
        {method: group for method, group in groups.items() if group},
        "ResNet-8, deformed digits, ring of 8 replicas",
        told.output / "gossip_compression.png",
    )
    print("\n".join(table(cells, compressors)))
    return None


if __name__ == "__main__":
    sys.exit(main())
