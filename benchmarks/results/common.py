"""What the tables of results share: a training run on deformed digits, a grid of them, means over paired seeds."""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.surroundings import surroundings

FOLDERS = {"--output", "--data", "--encoder"}
"""Options that are followed by one."""


def arguments(doc: str | None, tunes: bool = False, settings: bool = False) -> argparse.Namespace:
    """Read the command line of a script.

    Args:
        doc: of the script, for its help.
        tunes: whether it has `--tune`.
        settings: whether methods have several settings each, so it has `--once`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the full grid")
    if tunes:
        parser.add_argument("--tune", action="store_true", help="find the hyper-parameters of the table")
    if settings:
        parser.add_argument("--once", action="store_true", help="a run of each method, no page")
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--num-train", type=int, default=None, help="images; all by default in the full grid")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, each with one thread")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    return parser.parse_args()


def train(
    strategy: Any,
    seed: int,
    epochs: int,
    batch_size: int,
    lr: float,
    num_train: int | None = None,
    num_test: int | None = None,
    validation: str = "test",
    schedule: list[int] | None = None,
    callbacks: Sequence[Any] = (),
    model_options: dict[str, Any] | None = None,
    adam: bool = False,
    **model: Any,
) -> dict[str, Any]:
    """Train ResNet-8 with one strategy and one seed, by SGD or by Adam (betas 0.9 and 0.99).

    The learning rate has an epoch of warm-up and falls to a tenth after 50 % and 75 % of training. Returns the accuracy after
    every epoch, and what was sent; a run that diverges has `diverged` and the accuracy of guessing from there on.
    """
    import lightning as L
    import torch

    from lightning_distopt import NonFiniteError
    from lightning_distopt.data import DeformedDigitsDataModule
    from lightning_distopt.models import ImageClassifier

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    class Curve(L.Callback):
        def __init__(self) -> None:
            self.accuracy: list[float] = []

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            self.accuracy.append(trainer.callback_metrics["val_accuracy"].item())

    class AdamClassifier(ImageClassifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, betas=(0.9, 0.99), weight_decay=self.weight_decay)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor())
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    L.seed_everything(seed, verbose=False)
    curve, diverged = Curve(), False
    module = (AdamClassifier if adam else ImageClassifier)(
        "resnet8",
        model_options or {"in_channels": 1},
        lr=lr,
        weight_decay=5e-4,
        schedule=schedule or [epochs // 2, epochs * 3 // 4],
        warmup_epochs=1,
        **model,
    ).to(memory_format=torch.channels_last)  # a tenth faster on CPU
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_epochs=epochs,
        callbacks=[curve, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    data = DeformedDigitsDataModule(batch_size=batch_size, num_train=num_train, num_test=num_test, validation=validation)
    began = time.perf_counter()
    try:
        trainer.fit(module, datamodule=data)
    except NonFiniteError:
        diverged = True
        curve.accuracy += [0.1] * (epochs - len(curve.accuracy))
    return {
        "seed": seed,
        "accuracy": curve.accuracy,
        "diverged": diverged,
        "rounds": strategy.traffic.rounds,
        "megabytes": strategy.traffic.bytes_sent / 1e6,
        "seconds": time.perf_counter() - began,
    }


def run_grid(
    run_cell: Callable[[Any], dict[str, Any]], grid: Sequence[Any], workers: int, partial: Path | None = None
) -> list[dict[str, Any]]:
    """Run all cells in processes of their own, and show progress.

    What is done stands in the file `partial`, so that a grid that was interrupted goes on; it goes when all is done.
    """
    from lightning_distopt.data import DeformedDigitsDataModule

    DeformedDigitsDataModule().prepare_data()
    before = json.loads(partial.read_text()) if partial is not None and partial.exists() else {}
    done = {key: cell for cell in grid if (key := json.dumps(cell)) in before}
    cells = [before[key] for key in done]
    todo = [cell for cell in grid if json.dumps(cell) not in done]
    if todo:
        with mp.get_context("spawn").Pool(min(workers, len(todo))) as pool:
            for argument, cell in pool.imap_unordered(_Keyed(run_cell), todo):
                cells.append(cell)
                before[json.dumps(argument)] = cell
                if partial is not None:
                    partial.write_text(json.dumps(before))
                accuracy = "diverged" if cell["diverged"] else f"{100 * cell['accuracy'][-1]:.2f} %"
                of = f"{len(cells)}/{len(done) + len(todo)}"
                print(f"{of} {cell['method']}, seed {cell['seed']}: {accuracy} in {cell['seconds']:.0f} s", flush=True)
    if partial is not None:
        partial.unlink(missing_ok=True)
    return cells


def once(grid: Sequence[Any], names: int = 1) -> list[Any]:
    """Return a cell for each method: the middle one of its settings.

    Args:
        grid: cells of one seed.
        names: by how many of a cell's first entries methods are told apart.
    """
    groups: dict[Any, list[Any]] = {}
    for cell in grid:
        groups.setdefault(tuple(cell[:names]), []).append(cell)
    return [cells[len(cells) // 2] for cells in groups.values()]


class _Keyed:
    """Returns the argument beside the result."""

    def __init__(self, function: Callable[[Any], dict[str, Any]]) -> None:
        self.function = function

    def __call__(self, argument: Any) -> tuple[Any, dict[str, Any]]:
        return argument, self.function(argument)


def half_width(values: Sequence[float]) -> float:
    """Return the half width of the 95 % interval of the mean (Student's t); NaN for a single value."""
    if len(values) == 1:
        return float("nan")
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}[len(values)]
    return t * statistics.stdev(values) / len(values) ** 0.5


def final(cells: Sequence[dict[str, Any]]) -> str:
    """Return mean and standard deviation of the final accuracy in percent, or how many runs diverged."""
    good = [100 * cell["accuracy"][-1] for cell in cells if not cell["diverged"]]
    if not good:
        return "diverges"
    mean = f"{statistics.mean(good):.2f} ± {statistics.stdev(good) if len(good) > 1 else 0:.2f}"
    return mean if len(good) == len(cells) else f"{mean} ({len(cells) - len(good)} of {len(cells)} diverge)"


def draw_curves(
    groups: dict[str, list[dict[str, Any]]], title: str, path: Path, styles: dict[str, Any] | None = None, unit: str = "epoch"
) -> None:
    """Draw the mean accuracy over epochs of each group of cells, with the range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axis = plt.subplots(figsize=(9, 4.2), dpi=150)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for name, cells in groups.items():
        curves = [[100 * a for a in cell["accuracy"]] for cell in cells]
        epochs = range(1, len(curves[0]) + 1)
        mean, low, high = ([f(c) for c in zip(*curves, strict=True)] for f in (statistics.mean, min, max))
        (line,) = axis.plot(epochs, mean, marker="o", ms=3, label=name, **(styles or {}).get(name, {}))
        axis.fill_between(epochs, low, high, alpha=0.12, color=line.get_color())
    axis.set(xlabel=unit, ylabel="test accuracy of the average model, %", title=title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    figure.savefig(path)


def write(cells: list[dict[str, Any]], path: Path) -> None:
    """Write the cells of a table beside it, with where and how they were made, but for folders of the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    words = sys.argv[1:]
    told = [word for before, word in zip(["", *words], words, strict=False) if not {before, word.partition("=")[0]} & FOLDERS]
    path.write_text(json.dumps({**surroundings(), "arguments": told, "cells": cells}, indent=1) + "\n")
