"""Flat and sharp minima, in the manner of the thesis's figures 2.5 and 11.9 to 11.11, paired by seed.

    python -m benchmarks.results.flatness --tune    # learning rates of large and small batches, on held-out originals
    python -m benchmarks.results.flatness           # reduced: 8 epochs of all images, 5 seeds
    python -m benchmarks.results.flatness --full    # 20 epochs

Four replicas train ResNet-8 on deformed digits: by mini-batch SGD with large batches (4 x 256) and small ones (4 x 32), and by
post-local SGD, which is large-batch SGD up to the first decay of the learning rate, and then averages every 16th step. Learning
rates have an epoch of warm-up and fall to a tenth after 50 % and 75 % of training; post-local SGD has that of the large batch.

- Largest eigenvalue of the Hessian after every epoch, on training and on test images; at the end the ten largest, on training
  images.
- Loss on the line from the minimum of post-local SGD to the one of large batches.
- Loss along ten random filter-normalised directions, which the minima share; and sharpness by one ascent step (SAM) and in a
  box (Keskar et al.).

Batch norm keeps its running statistics, but on the line, where they are estimated anew.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results.common import arguments, final, half_width, run_grid, train, write

REPLICAS = 4
LARGE, SMALL, POST_LOCAL = "large batch", "small batch", "post-local, H = 16"
BATCH = {LARGE: 256, SMALL: 32, POST_LOCAL: 256}
RATES = {LARGE: [0.2, 0.4, 0.8, 1.6, 3.2], SMALL: [0.1, 0.2, 0.4, 0.8, 1.6]}
TUNED = Path(__file__).with_name("flatness_tuned.json")
COLORS = {LARGE: "#D55E00", SMALL: "#009E73", POST_LOCAL: "#0072B2"}


def run_method(method: str, seed: int, lr: float, options: dict[str, Any], callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Train one method with one seed."""
    from lightning_distopt import LocalSGDStrategy, PostLocalSwitch

    local = [PostLocalSwitch(sync_period=16)] if method == POST_LOCAL else []
    strategy = LocalSGDStrategy(sync_period=1, replicas_per_device=REPLICAS)
    figures = train(strategy, seed, batch_size=BATCH[method], lr=lr, callbacks=[*local, *callbacks], nesterov=True, **options)
    return {"method": method, "lr": lr, **figures}


def tune_cell(argument: list[Any]) -> dict[str, Any]:
    """Train with one learning rate."""
    method, seed, lr, options = argument
    return run_method(method, seed, lr, options)


def run_seed(argument: list[Any]) -> dict[str, Any]:
    """Train all methods with one seed, and analyse their minima."""
    import lightning as L
    import torch
    from torch.nn import functional as F

    from lightning_distopt import HessianProbe
    from lightning_distopt.analysis import (
        Objective,
        average_sharpness,
        hessian_spectrum,
        interpolate,
        keskar_sharpness,
        landscape_1d,
        worst_case_sharpness,
    )
    from lightning_distopt.data import DeformedDigitsDataModule
    from lightning_distopt.models import ImageClassifier

    class Keep(L.Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            with trainer.strategy.average_parameters():
                self.state = {name: value.detach().clone() for name, value in module.state_dict().items()}

    seed, rates, options, samples = argument
    began = time.perf_counter()
    runs, minima = {}, {}
    for method in BATCH:
        keep = Keep()
        probe = HessianProbe("epoch", k=1, data=["train", "val"], samples=samples, tol=1e-2, save=[], progress=False)
        runs[method] = run_method(method, seed, rates[method], options, [probe, keep])
        runs[method]["top"] = {data: [entry[f"{data}/top"] for entry in probe.history] for data in ("train", "val")}
        minima[method] = keep.state

    data = DeformedDigitsDataModule(batch_size=256, num_train=options.get("num_train"), num_test=options.get("num_test"))
    data.prepare_data()
    data.setup("fit")
    module = ImageClassifier("resnet8", {"in_channels": 1})
    batches = {}
    for name, dataset in (("train", data.train_dataloader().dataset), ("test", data.val_dataloader().dataset)):
        chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:samples].tolist()
        images, labels = zip(*(dataset[k] for k in chosen), strict=True)
        pairs = zip(torch.stack(images).split(256), torch.tensor([int(label) for label in labels]).split(256), strict=True)
        batches[name] = list(pairs)

    def loss(module: Any, batch: Any) -> Any:
        return F.cross_entropy(module(batch[0]), batch[1])

    def error(module: Any, batch: Any) -> Any:
        return {"error": (module(batch[0]).argmax(dim=1) != batch[1]).float().mean()}

    functions = {name: Objective(module, loss, these, metrics=error) for name, these in batches.items()}
    quiet: dict[str, Any] = {"progress": False}
    for method, state in minima.items():
        module.load_state_dict(state)
        spectrum = hessian_spectrum(functions["train"], k=10, tol=1e-2, **quiet)
        runs[method] |= {
            "train loss": functions["train"].loss(),
            "test loss": functions["test"].loss(),
            "eigenvalues": spectrum.eigenvalues.tolist(),
            "average": average_sharpness(functions["train"], 0.2, **quiet).value,
            "SAM": worst_case_sharpness(functions["train"], 0.05, **quiet).value,
            "Keskar": keskar_sharpness(functions["train"], 1e-3, **quiet).value,
        }
    line = interpolate(functions, minima[POST_LOCAL], minima[LARGE], points=17, margin=0.5, batch_norm="reestimate", **quiet)
    around = landscape_1d(functions, minima, directions=10, radius=0.5, points=13, **quiet)
    return {
        "method": "all methods",
        "seed": seed,
        "accuracy": runs[POST_LOCAL]["accuracy"],
        "diverged": False,
        "seconds": time.perf_counter() - began,
        "runs": runs,
        "line": {"positions": line.positions.tolist(), **{n: line.curves(n)[0].tolist() for n in functions}},
        "barrier": {name: line.barriers(name).tolist() for name in functions},
        "around": {
            "positions": around.positions.tolist(),
            **{method: around.curves(method, "train").mean(axis=0).tolist() for method in minima},
        },
    }


def table(cells: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the table."""
    lines = [
        "| | test accuracy % | train loss | test loss | largest eigenvalue, train | 10th | SAM | Keskar | average |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method in BATCH:
        runs = [cell["runs"][method] for cell in cells]
        of = {
            "train loss": [run["train loss"] for run in runs],
            "test loss": [run["test loss"] for run in runs],
            "top": [run["eigenvalues"][0] for run in runs],
            "10th": [run["eigenvalues"][-1] for run in runs],
            **{name: [run[name] for run in runs] for name in ("SAM", "Keskar", "average")},
        }
        figures = [f"{statistics.mean(v):.3g} ± {statistics.stdev(v) if len(v) > 1 else 0:.1g}" for v in of.values()]
        lines.append(f"| {method} | {final(runs)} | {' | '.join(figures)} |")
    for name, key in (("accuracy", None), ("largest eigenvalue", "eigenvalues")):
        gaps = [
            (cell["runs"][POST_LOCAL][key][0] - cell["runs"][LARGE][key][0])
            if key
            else 100 * (cell["runs"][POST_LOCAL]["accuracy"][-1] - cell["runs"][LARGE]["accuracy"][-1])
            for cell in cells
        ]
        width = f" ± {half_width(gaps):.2g}" if len(gaps) > 1 else ""
        lines.append(f"\n{name}, {POST_LOCAL} less {LARGE}: {statistics.mean(gaps):+.3g}{width}")
    return lines


def draw(cells: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw eigenvalues over epochs, the line between the minima, and the loss around them, side by side."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for method, color in COLORS.items():
        for data, style in (("train", "-"), ("val", ":")):
            tops = np.array([cell["runs"][method]["top"][data] for cell in cells])
            epochs = range(1, tops.shape[1] + 1)
            left.plot(epochs, tops.mean(axis=0), style, color=color, label=method if data == "train" else None)
            if data == "train":
                left.fill_between(epochs, tops.min(axis=0), tops.max(axis=0), color=color, alpha=0.12, linewidth=0)
        curves = np.array([cell["around"][method] for cell in cells])
        positions = cells[0]["around"]["positions"]
        right.plot(positions, curves.mean(axis=0), color=color, label=method)
        right.fill_between(positions, curves.min(axis=0), curves.max(axis=0), color=color, alpha=0.12, linewidth=0)
    for data, style in (("train", "-"), ("test", ":")):
        curves, positions = np.array([cell["line"][data] for cell in cells]), cells[0]["line"]["positions"]
        middle.plot(positions, curves.mean(axis=0), style, color="black", label=data)
        middle.fill_between(positions, curves.min(axis=0), curves.max(axis=0), color="black", alpha=0.1, linewidth=0)
    left.set(xlabel="epoch", ylabel="largest eigenvalue (dotted: test)", yscale="log")
    middle.set(xlabel=f"0: {POST_LOCAL}, 1: {LARGE}", ylabel="loss")
    right.set(xlabel="along filter-normalised directions", ylabel="training loss", yscale="log")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    for end, color in ((0, COLORS[POST_LOCAL]), (1, COLORS[LARGE])):
        middle.axvline(end, color=color, linewidth=1, linestyle="--")
    figure.savefig(path, dpi=150)


def tune(workers: int, options: dict[str, Any]) -> None:
    """Find learning rates."""
    grid = [[method, 1000, lr, {**options, "validation": "holdout"}] for method, rates in RATES.items() for lr in rates]
    cells = run_grid(tune_cell, grid, workers, TUNED.with_suffix(".partial.json"))
    best = {m: max((c for c in cells if c["method"] == m), key=lambda c: c["accuracy"][-1])["lr"] for m in RATES}
    TUNED.write_text(json.dumps(best, indent=1) + "\n")
    print(best)


def main() -> None:
    told = arguments(__doc__, tunes=True)
    options = {"epochs": told.epochs or (20 if told.full else 8), "num_train": told.num_train}
    if told.tune:
        tune(told.workers, options)
        return
    if not TUNED.exists():
        raise SystemExit("There are no learning rates yet: run this with --tune first.")
    found = json.loads(TUNED.read_text())
    rates = {LARGE: found[LARGE], SMALL: found[SMALL], POST_LOCAL: found[LARGE]}
    told.output.mkdir(parents=True, exist_ok=True)
    samples = 2048 if told.full else 512
    grid = [[seed, rates, options, samples] for seed in range(told.seeds or 5)]
    cells = sorted(run_grid(run_seed, grid, told.workers, Path("flatness.partial.json")), key=lambda c: c["seed"])
    write(cells, told.output / "flatness.json")
    draw(cells, told.output / "flatness.png")
    print("\n".join(table(cells)))


if __name__ == "__main__":
    sys.exit(main())
