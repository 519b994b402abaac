"""Pruning on deformed digits, in the manner of the thesis's tables 6.1, 6.2 and 15.3, paired by seed.

    python -m benchmarks.results.sparsity --tune    # which learning rate, on held-out originals; twenty minutes
    python -m benchmarks.results.sparsity           # reduced: ResNet-8, 5 seeds, 10,240 images, 10 epochs, two hours, 2 cores
    python -m benchmarks.results.sparsity --full    # ResNet-8 and ResNet-20, all images, 30 epochs

All convolutions are pruned, the last layer is dense. Batches of 128, SGD with Nesterov momentum 0.9, weight decay 1e-4, a
learning rate that falls to a tenth after 50 % and 75 %. Which one is the best of the grid below for each method, on held-out
training originals, at a sparsity of 90 % (30 % of all filters), with one seed that the table does not have; ResNet-20 takes it
over. Sparsity rises over the first 75 % where it does. Methods have their own periods, and the same number of epochs, but for
fine-tuning with a fixed mask, which has a fifth more at a tenth of the first learning rate, and the lottery ticket, which
trains three times, its schedule beginning anew each time. "DPF, limit" holds gradients of filters without weights down, as
"DPF, filters" does by default; "clipped" is with the norm of all gradients held at 1.

Counted are multiply-accumulates of one image in convolutions and the last layer, and parameters that are not zero.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L

from benchmarks.results.common import arguments, final, half_width, once, run_grid, write

BATCH, ROUNDS = 128, 2
RATES = [0.1, 0.2, 0.4, 0.8]
SPARSITIES, PARTS = [0.7, 0.9, 0.95, 0.99], [0.1, 0.2, 0.3, 0.4]
DENSE = "dense"
REFERENCE = "DPF"
STRUCTURED = ["DPF, filters", "soft filter pruning", "soft filter pruning, clipped"]
CLIPPED = STRUCTURED[2]
FINE_TUNED = ["DPF + fine-tuning", "one-shot + fine-tuning"]
TICKET = "lottery ticket"
TUNED = Path(__file__).with_name("sparsity_tuned.json")


def table_of_methods() -> dict[str, Callable[[float], Any]]:
    """Return all methods by name, for a part of training after which masks are fixed."""
    from lightning_distopt.sparsity.dpf import DPF
    from lightning_distopt.sparsity.dsr import DSR
    from lightning_distopt.sparsity.incremental import Incremental
    from lightning_distopt.sparsity.lottery_ticket import LotteryTicket
    from lightning_distopt.sparsity.one_shot import OneShot
    from lightning_distopt.sparsity.rigl import RigL
    from lightning_distopt.sparsity.set import SET
    from lightning_distopt.sparsity.snip import SNIP
    from lightning_distopt.sparsity.soft_filter import SoftFilterPruning
    from lightning_distopt.sparsity.sparse_momentum import SparseMomentum

    return {
        REFERENCE: lambda fixed: DPF(),
        "DPF, limit": lambda fixed: DPF(limit=True),
        FINE_TUNED[0]: lambda fixed: DPF(),
        FINE_TUNED[1]: lambda fixed: OneShot(at=fixed),
        "incremental": lambda fixed: Incremental(),
        "SNIP": lambda fixed: SNIP(),
        TICKET: lambda fixed: LotteryTicket(rounds=ROUNDS),
        "SET": lambda fixed: SET(),
        "RigL": lambda fixed: RigL(),
        "sparse momentum": lambda fixed: SparseMomentum(),
        "DSR": lambda fixed: DSR(),
        STRUCTURED[0]: lambda fixed: DPF(filters=True),
        STRUCTURED[1]: lambda fixed: SoftFilterPruning(),
        CLIPPED: lambda fixed: SoftFilterPruning(),
    }


class Cell(NamedTuple):
    """A run."""

    method: str
    network: str
    sparsity: float
    seed: int
    lr: float
    options: dict[str, Any]


class Flips(L.Callback):
    """Keeps which part of the masks still changes after each update; it comes after the callback that makes these."""

    def __init__(self, pruning: Any) -> None:
        self.pruning = pruning
        self.curve: list[float] = []

    def on_train_start(self, *args: Any) -> None:
        import torch

        from lightning_distopt.sparsity.statistics import LastFlips

        self.flips = LastFlips([torch.ones_like(mask) for mask in self.pruning.pruner.masks])
        self.look()

    def on_train_batch_start(self, *args: Any) -> None:
        self.look()

    def on_train_batch_end(self, *args: Any) -> None:
        self.look()

    def on_train_end(self, *args: Any) -> None:
        from lightning_distopt.sparsity.statistics import flip_curve

        self.look()
        self.curve = flip_curve(self.flips.last, self.flips.updates)

    def look(self) -> None:
        """Note the masks after an update."""
        if self.pruning.pruner.updates > self.flips.updates:
            self.flips.add(self.pruning.pruner.masks)


def run_cell(argument: list[Any]) -> dict[str, Any]:
    """Train one method with one seed."""
    import warnings

    import torch
    from torch import nn

    from lightning_distopt.callbacks.dynamic_pruning import DynamicPruning
    from lightning_distopt.data import DeformedDigitsDataModule
    from lightning_distopt.models import ImageClassifier
    from lightning_distopt.sparsity.macs import count_macs, count_parameters, sparse_macs

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cell = Cell(*argument)
    told, epochs = cell.options, int(cell.options["epochs"])
    more = max(1, epochs // 5) if cell.method in FINE_TUNED else 0
    whole = epochs * (ROUNDS + 1) if cell.method == TICKET else epochs + more

    class Classifier(ImageClassifier):
        def _lr_factor(self) -> Callable[[int], float]:
            factor, first = super()._lr_factor(), self.trainer.estimated_stepping_batches * epochs / whole
            return lambda step: 0.1 if more and step >= first else factor(step)

    callbacks: list[Any] = []
    if cell.method != DENSE:
        method = table_of_methods()[cell.method](epochs / whole)
        pruning: dict[str, Any] = {}
        if cell.method == FINE_TUNED[0]:
            pruning["fine_tune"] = epochs / whole
        if method.ramp:
            pruning["ramp"] = 0.75 * epochs / whole
        callbacks = [DynamicPruning(cell.sparsity, method, **pruning)]
        callbacks.append(Flips(callbacks[0]))
    L.seed_everything(cell.seed, verbose=False)
    module = Classifier(
        cell.network,
        {"in_channels": 1},
        lr=cell.lr,
        nesterov=True,
        schedule=[max(1, epochs // 2), max(1, epochs * 3 // 4)],
    ).to(memory_format=torch.channels_last)
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=whole,
        callbacks=callbacks,
        check_val_every_n_epoch=whole,
        gradient_clip_val=1.0 if cell.method == CLIPPED else None,
        num_sanity_val_steps=0,
        **quiet,
    )
    data = DeformedDigitsDataModule(
        BATCH, validation=told["validation"], num_train=told["num_train"], num_test=told["num_test"]
    )
    began = time.perf_counter()
    trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - began
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    pruned = {name: int((layer.weight == 0).sum()) for name, layer in layers.items()}
    side = data.val_set[0][0].shape[-1] if data.val_set is not None else 16
    dense = count_macs(module.eval(), lambda: module(torch.zeros(1, 1, side, side)))
    return {
        **cell._asdict(),
        "accuracy": [trainer.callback_metrics["val_accuracy"].item()],
        "diverged": not all(bool(p.isfinite().all()) for p in module.parameters()),
        "macs": sparse_macs(dense, {name: 1 - n / layers[name].weight.numel() for name, n in pruned.items()}),
        "parameters": count_parameters(module, sum(pruned.values())),
        "flips": callbacks[1].curve if callbacks else [],
        "seconds": seconds,
    }


def tune(workers: int, options: dict[str, Any]) -> None:
    """Find the best learning rate of each method, and write them down."""
    options = {**options, "validation": "holdout"}
    sparsities = {DENSE: 0.0, **dict.fromkeys(table_of_methods(), 0.9), **dict.fromkeys(STRUCTURED, 0.3)}
    grid = [list(Cell(method, "resnet8", s, 1000, lr, options)) for method, s in sparsities.items() for lr in RATES]
    best: dict[str, dict[str, float]] = {}
    for cell in run_grid(run_cell, grid, workers, Path("sparsity_tune.partial.json")):
        if not cell["diverged"] and cell["accuracy"][-1] > best.get(cell["method"], {}).get("accuracy", -1.0):
            best[cell["method"]] = {"accuracy": cell["accuracy"][-1], "lr": cell["lr"]}
    TUNED.write_text(json.dumps(best, indent=1))


def cells_of_table() -> list[tuple[str, float]]:
    """Return (method, sparsity) of all cells."""
    methods = [m for m in table_of_methods() if m not in STRUCTURED]
    return [(DENSE, 0.0)] + [(m, s) for s in SPARSITIES for m in methods] + [(m, s) for s in PARTS for m in STRUCTURED]


Group = list[dict[str, Any]]


def select(cells: Group, method: str, network: str, sparsity: float) -> Group:
    """Return the runs of one cell of the table, in the order of their seeds."""
    key = (method, network, sparsity)
    return sorted((c for c in cells if (c["method"], c["network"], c["sparsity"]) == key), key=lambda c: int(c["seed"]))


def mean(group: Group, what: str) -> float:
    """Return the mean of a figure."""
    return statistics.mean(float(c[what][-1] if what == "accuracy" else c[what]) for c in group)


def gap(group: Group, reference: Group) -> str:
    """Return the mean difference of accuracies, paired by seed, with its interval, in points."""
    gaps = [100 * (a["accuracy"][-1] - b["accuracy"][-1]) for a, b in zip(group, reference, strict=True)]
    return f"{statistics.mean(gaps):+.2f}" + (f" ± {half_width(gaps):.2f}" if len(gaps) > 1 else "")


def tables(cells: Group, network: str) -> list[str]:
    """Return the lines of the tables of a network."""
    dense = select(cells, DENSE, network, 0.0)
    methods = [m for m in table_of_methods() if m not in STRUCTURED]
    lines = []
    for title, members, sparsities in (("sparsity", methods, SPARSITIES), ("filters pruned", STRUCTURED, PARTS)):
        heads = " | ".join(f"{100 * s:.0f} %" for s in sparsities)
        lines += [f"| {network}, accuracy %, {title} | {heads} |", f"|---|{'---|' * len(sparsities)}"]
        lines.append(f"| {DENSE} | {' | '.join([final(dense)] * len(sparsities))} |")
        rows = {m: [select(cells, m, network, s) for s in sparsities] for m in members}
        lines += [f"| {m} | {' | '.join(final(group) for group in groups)} |" for m, groups in rows.items()]
        lines += ["", f"| against {members[0]}, points | {heads} |", f"|---|{'---|' * len(sparsities)}"]
        for m, groups in rows.items():
            if m != members[0]:
                gaps = [gap(group, reference) for group, reference in zip(groups, rows[members[0]], strict=True)]
                lines.append(f"| {m} | {' | '.join(gaps)} |")
        lines += ["", f"| million MACs / thousand parameters | {heads} |", f"|---|{'---|' * len(sparsities)}"]
        for m, groups in {DENSE: [dense] * len(sparsities), **rows}.items():
            costs = [f"{mean(group, 'macs') / 1e6:.2f} / {mean(group, 'parameters') / 1e3:.1f}" for group in groups]
            lines.append(f"| {m} | {' | '.join(costs)} |")
        lines.append("")
    return lines


def draw(cells: Group, network: str, path: Path) -> None:
    """Draw accuracy against sparsity and against multiply-accumulates, and how masks come to rest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.6), layout="constrained")
    by_sparsity, by_macs, structured, flips = figure.subplots(2, 2).flat
    methods = [m for m in table_of_methods() if m not in STRUCTURED]
    dense = select(cells, DENSE, network, 0.0)
    family = [m for m in methods if m.startswith(REFERENCE)]  # in one colour
    others, best = [m for m in methods if m not in family], 100 * mean(dense, "accuracy")
    for method in methods:
        groups = [select(cells, method, network, s) for s in SPARSITIES]
        accuracy = [100 * mean(group, "accuracy") for group in groups]
        style: dict[str, Any] = {"marker": "o", "markersize": 3, "label": method}
        if method in family:
            style |= {"color": "black", "linestyle": ["-", "--", ":"][family.index(method)], "linewidth": 1.8, "zorder": 3}
        else:
            style |= {"color": f"C{others.index(method)}"}
        by_sparsity.plot(range(len(SPARSITIES)), [best - value for value in accuracy], **style)
        by_macs.plot([mean(group, "macs") / 1e6 for group in groups], accuracy, **style)
    by_sparsity.set_xticks(range(len(SPARSITIES)), [f"{100 * s:.0f} %" for s in SPARSITIES])
    by_sparsity.set_yscale("symlog", linthresh=1)
    by_sparsity.set_yticks([0, 1, 2, 5, 10, 20, 50], ["0", "1", "2", "5", "10", "20", "50"])
    losses = [best - 100 * mean(select(cells, m, network, s), "accuracy") for m in methods for s in SPARSITIES]
    by_sparsity.set_ylim(2 * max(losses), min(0.0, *losses) - 0.1)
    for method in STRUCTURED:
        groups = [select(cells, method, network, s) for s in PARTS]
        accuracy = [100 * mean(group, "accuracy") for group in groups]
        structured.plot([mean(group, "macs") / 1e6 for group in groups], accuracy, marker="o", markersize=3, label=method)
    for method in (REFERENCE, "incremental"):
        curve = select(cells, method, network, 0.95)[0]["flips"]
        flips.plot([k / max(1, len(curve) - 1) for k in range(len(curve))], [100 * v for v in curve], label=f"{method}, 95 %")
    for panel in (by_macs, structured):
        panel.axhline(best, color="grey", linewidth=0.8, linestyle="--", label=DENSE)
        panel.set(ylabel="test accuracy, %")
    by_sparsity.set(xlabel="sparsity", ylabel="points of accuracy less than dense")
    by_macs.set(xlabel="million multiply-accumulates", xscale="log")
    structured.set(xlabel="million multiply-accumulates, filters pruned")
    flips.set(xlabel="part of training", ylabel="% of the mask that changes later")
    for panel in (by_sparsity, by_macs, structured, flips):
        panel.grid(alpha=0.3, linewidth=0.5)
        place: dict[str, Any] = {"loc": "lower left", "ncols": 2} if panel is by_sparsity else {}
        panel.legend(fontsize=7, frameon=False, **place)
    figure.suptitle(f"{network}, deformed digits")
    figure.savefig(path, format="png", dpi=150)


def main() -> None:
    told = arguments(__doc__, tunes=True, settings=True)
    options = {
        "epochs": told.epochs or (30 if told.full else 10),
        "num_train": told.num_train or (None if told.full else 10_240),
        "num_test": None if told.full else 5_000,
        "validation": "test",
    }
    if told.tune:
        return tune(told.workers, options)
    tuned = json.loads(TUNED.read_text())
    networks = ["resnet8", "resnet20"] if told.full else ["resnet8"]
    grid = [
        list(Cell(method, network, sparsity, seed, tuned[method]["lr"], options))
        for network in networks
        for seed in range(1 if told.once else told.seeds or 5)
        for method, sparsity in cells_of_table()
    ]
    cells = run_grid(run_cell, once(grid) if told.once else grid, told.workers, Path("sparsity.partial.json"))
    write(cells, told.output / "sparsity.json")
    if told.once:
        return None
    for network in networks:
        draw(cells, network, told.output / f"sparsity_{network}.png")
        print("\n".join(tables(cells, network)))
    return None


if __name__ == "__main__":
    sys.exit(main())
