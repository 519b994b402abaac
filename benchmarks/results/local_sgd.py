"""Mini-batch, local, post-local and hierarchical local SGD on deformed digits, paired by seed.

    python -m benchmarks.results.local_sgd            # reduced: 5 seeds, 6 epochs, about half an hour on two cores
    python -m benchmarks.results.local_sgd --full     # 10 seeds, 20 epochs, more values of H

Every cell trains ResNet-8 with four replicas, batch 32 each, on the same number of samples. All methods share the recipe of
the thesis: learning rate scaled linearly with the global batch, an epoch of warm-up, a tenth of the rate after 50 % and 75 % of
training. It was set once for mini-batch SGD and is not tuned for the others. A seed fixes the start and the order of the
data; methods are compared within seeds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

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


def run_cell(cell: tuple[str, int, int, int]) -> dict[str, Any]:
    """Train one method with one seed; returns its figures."""
    import lightning as L
    import torch

    from lightning_distopt import LocalSGDStrategy, PostLocalSwitch
    from lightning_distopt.data import DeformedDigitsDataModule
    from lightning_distopt.models import ImageClassifier

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    method, seed, epochs, num_train = cell
    options, switch = {**METHODS, **FULL_METHODS}[method]

    class Curve(L.Callback):
        def __init__(self) -> None:
            self.accuracy: list[float] = []

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            self.accuracy.append(trainer.callback_metrics["val_accuracy"].item())

    L.seed_everything(seed, verbose=False)
    curve, strategy = Curve(), LocalSGDStrategy(replicas_per_device=REPLICAS, **options)
    callbacks = [curve, *([PostLocalSwitch(**switch)] if switch is not None else [])]
    module = ImageClassifier(
        "resnet8",
        {"in_channels": 1},
        lr=BASE_LR * REPLICAS,
        weight_decay=5e-4,
        schedule=[epochs // 2, epochs * 3 // 4],
        warmup_epochs=1,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    began = time.perf_counter()
    trainer.fit(module, datamodule=DeformedDigitsDataModule(batch_size=BATCH, num_train=num_train))
    return {
        "method": method,
        "seed": seed,
        "accuracy": curve.accuracy,
        "rounds": strategy.traffic.rounds,
        "megabytes": strategy.traffic.bytes_sent / 1e6,
        "seconds": time.perf_counter() - began,
    }


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
        gap = "" if method == methods[0] else f"{statistics.mean(gaps):+.2f} ± {_half_width(gaps):.2f}"
        lines.append(
            f"| {method} | {statistics.mean(final):.2f} ± {statistics.stdev(final):.2f} | {gap} | {to_85} "
            f"| {mine[0]['rounds']} | {mine[0]['megabytes']:.0f} |"
        )
    return lines


def _half_width(values: list[float]) -> float:
    """Return the half width of the 95 % interval of the mean (Student's t)."""
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}[len(values)]
    return t * statistics.stdev(values) / len(values) ** 0.5


def draw(cells: list[dict[str, Any]], methods: list[str], path: Path) -> None:
    """Draw the mean curves, with the range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2), dpi=150)
    for method in reversed(methods):  # the first, which others cover where they are equal to it, last and dashed
        curves = [[100 * a for a in cell["accuracy"]] for cell in cells if cell["method"] == method]
        epochs = range(1, len(curves[0]) + 1)
        mean, low, high = ([f(c) for c in zip(*curves, strict=True)] for f in (statistics.mean, min, max))
        style = {"color": "black", "ls": "--"} if method == methods[0] else {}
        (line,) = axis.plot(epochs, mean, marker="o", ms=3, label=method, **style)
        axis.fill_between(epochs, low, high, alpha=0.12, color=line.get_color())
    axis.set(xlabel="epoch", ylabel="test accuracy of the average model, %", title="ResNet-8, deformed digits, 4 replicas")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--num-train", type=int, default=50_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    arguments = parser.parse_args()
    epochs = arguments.epochs or (20 if arguments.full else 6)
    seeds = range(arguments.seeds or (10 if arguments.full else 5))
    methods = [*METHODS, *(FULL_METHODS if arguments.full else {})]

    from lightning_distopt.data import DeformedDigitsDataModule

    DeformedDigitsDataModule().prepare_data()
    grid = [(method, seed, epochs, arguments.num_train) for seed in seeds for method in methods]
    cells = []
    with mp.get_context("spawn").Pool(min(arguments.workers, len(grid))) as pool:
        for done, cell in enumerate(pool.imap_unordered(run_cell, grid), start=1):
            cells.append(cell)
            accuracy, seconds = 100 * cell["accuracy"][-1], cell["seconds"]
            print(
                f"{done}/{len(grid)} {cell['method']}, seed {cell['seed']}: {accuracy:.2f} % in {seconds:.0f} s",
                flush=True,
            )
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "local_sgd.json").write_text(json.dumps(cells, indent=1))
    draw(cells, methods, arguments.output / "local_sgd.png")
    print("\n".join(summary(cells, methods)))


if __name__ == "__main__":
    sys.exit(main())
