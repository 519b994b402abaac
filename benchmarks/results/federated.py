"""Federated learning on deformed digits, in the manner of the thesis's tables 8.1, 8.2 and figure 8.4, paired by seed.

    python -m benchmarks.results.federated --tune    # learning rates and factors, on held-out originals; half an hour, 2 cores
    python -m benchmarks.results.federated           # reduced: 5 seeds, 20 clients with 4,000 images, 20 rounds of 10 epochs
    python -m benchmarks.results.federated --full    # all images but 2,000, 100 rounds of 40 epochs, C = 0.2, 0.4 and 0.8

20 clients, of whom a share C takes part in a round, train ResNet-8 on batches of 32: SGD with a constant learning rate, without
momentum and weight decay, as in the thesis. Classes are divided by a Dirichlet distribution of concentration alpha, so sizes
are unequal. FedDF distils for 100 steps (batch 128, Adam from 1e-3 along a cosine) on 2,000 images that no client has, without
their labels. Learning rates were found for FedAvg and for FedDF, then factors of FedProx and FedAvgM with FedAvg's rate, with
alpha = 0.1 (prototypes: 1), on held-out originals, with a seed that the tables don't have.

Counted are the rounds to a target: what FedAvg (BatchNorm) reaches at the end, the mean over seeds, less two points. With
prototypes a third each of 21 clients trains ResNet-8, ResNet-20 and LeNet: FedAvg averages each group by itself, FedDF lets
every group learn from all clients.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L

from benchmarks.results.common import arguments, draw_curves, final, half_width, once, run_grid, write

BATCH, UNLABELLED, STEPS = 32, 2_000, 100
RATES = [0.03, 0.1, 0.3, 0.9]
PROTOTYPE_RATES = [0.03, 0.1, 0.3]
FACTORS = {"FedProx": [0.001, 0.01, 0.1], "FedAvgM": [0.2, 0.4, 0.8]}
ALPHAS = ["1", "0.1"]
METHODS = {"batch": ["FedAvg", "FedProx", "FedAvgM", "FedDF"], "group": ["FedAvg", "FedProx", "FedAvgM"]}
PROTOTYPES = ["FedAvg", "FedDF"]
NETWORKS = {"resnet8": {}, "resnet20": {}, "lenet": {"image_size": 16}}
TUNED = Path(__file__).with_name("federated_tuned.json")


class Cell(NamedTuple):
    """A run; the norm "prototypes" stands for several architectures."""

    method: str
    norm: str
    alpha: str
    fraction: float
    seed: int
    lr: float
    factor: float
    options: dict[str, Any]


class Curve(L.Callback):
    """Keeps all accuracies after every round, and counts clients that were dropped."""

    def __init__(self) -> None:
        self.accuracy: dict[str, list[float]] = {}
        self.dropped = 0

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val_accuracy"):
                self.accuracy.setdefault(name, []).append(value.item())
        self.dropped += len(trainer.strategy.algorithm.dropped)


def run_cell(argument: list[Any]) -> dict[str, Any]:
    """Train one method with one seed."""
    import warnings

    import torch

    from lightning_distopt import Dirichlet, FedAvg, FedAvgM, FedDF, FederatedStrategy, FedProx
    from lightning_distopt.data import DeformedDigitsDataModule
    from lightning_distopt.models import ImageClassifier, PrototypeClassifier, build_model

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cell = Cell(*argument)
    told = cell.options
    images = DeformedDigitsDataModule(num_train=told["num_train"] + UNLABELLED, validation=told["validation"])
    images.prepare_data()
    images.setup()
    assert images.train_set is not None
    unlabelled = torch.stack([images.train_set[k][0] for k in range(told["num_train"], len(images.train_set))])
    aggregators: dict[str, Any] = {
        "FedAvg": FedAvg,
        "FedProx": lambda: FedProx(cell.factor),
        "FedAvgM": lambda: FedAvgM(cell.factor),
        "FedDF": lambda: FedDF(unlabelled, steps=told["steps"], patience=None),
    }
    L.seed_everything(cell.seed, verbose=False)
    recipe: dict[str, Any] = {"lr": cell.lr, "momentum": 0.0, "weight_decay": 0.0}
    several = cell.norm == "prototypes"
    module: Any
    if several:
        networks: Any = {name: build_model(name, in_channels=1, **options) for name, options in NETWORKS.items()}
        module = PrototypeClassifier(networks, **recipe)
    else:
        module = ImageClassifier("resnet8", {"in_channels": 1, "norm": cell.norm}, **recipe)
    strategy = FederatedStrategy(
        aggregators[cell.method](),
        clients=21 if several else 20,
        fraction=cell.fraction,
        local_epochs=told["epochs"],
        partition=Dirichlet(float(cell.alpha), balanced=False, min_samples=5, seed=cell.seed),
        prototypes="even" if several else None,
    )
    curve = Curve()
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_epochs=told["rounds"],
        callbacks=[curve],
        num_sanity_val_steps=0,
        enable_model_summary=False,
        **quiet,
    )
    data = DeformedDigitsDataModule(BATCH, validation=told["validation"], num_train=told["num_train"], num_test=2_000)
    began = time.perf_counter()
    trainer.fit(module.to(memory_format=torch.channels_last), datamodule=data)
    return {
        **cell._asdict(),
        "accuracy": curve.accuracy["val_accuracy"],
        "accuracies": curve.accuracy,
        "diverged": False,
        "dropped": curve.dropped,
        "megabytes": (strategy.traffic.bytes_up + strategy.traffic.bytes_down) / 1e6,
        "seconds": time.perf_counter() - began,
    }


def tune(workers: int, options: dict[str, Any]) -> None:
    """Find learning rates, then the factors of others with FedAvg's, and write them down."""
    options = {**options, "validation": "holdout"}
    best: dict[str, dict[str, float]] = {}

    def choose(name: str, cells: list[Cell]) -> None:
        grid = [list(cell) for cell in cells]
        for cell in run_grid(run_cell, grid, workers, Path(f"federated_tune_{name}.partial.json")):
            accuracy = statistics.mean(cell["accuracy"][-3:])  # it jumps from round to round
            if accuracy > best.get(name, {}).get("accuracy", -1.0):
                best[name] = {"accuracy": accuracy, "lr": cell["lr"], "factor": cell["factor"]}

    for method in ("FedAvg", "FedDF"):
        choose(method, [Cell(method, "batch", "0.1", 0.4, 1000, lr, 0.0, options) for lr in RATES])
        cells = [Cell(method, "prototypes", "1", 0.4, 1000, lr, 0.0, options) for lr in PROTOTYPE_RATES]
        choose(f"{method}, prototypes", cells)
    rate = best["FedAvg"]["lr"]
    for method, factors in FACTORS.items():
        choose(method, [Cell(method, "batch", "0.1", 0.4, 1000, rate, factor, options) for factor in factors])
    TUNED.write_text(json.dumps(best, indent=1))


def rounds_to(cell: dict[str, Any], target: float) -> int | None:
    """Return the first round with the accuracy, if any."""
    return next((k + 1 for k, accuracy in enumerate(cell["accuracy"]) if accuracy >= target), None)


def tables(cells: list[dict[str, Any]], fractions: list[float]) -> list[str]:
    """Return the lines of the tables."""

    def of(method: str, norm: str, alpha: str, fraction: float) -> list[dict[str, Any]]:
        key = (method, norm, alpha, fraction)
        group = [c for c in cells if (c["method"], c["norm"], c["alpha"], c["fraction"]) == key]
        return sorted(group, key=lambda c: int(c["seed"]))

    lines = []
    for fraction in fractions:
        targets = {
            alpha: round(statistics.mean(c["accuracy"][-1] for c in of("FedAvg", "batch", alpha, fraction)) - 0.02, 2)
            for alpha in ALPHAS
        }
        heads = [f"alpha = {alpha}, to {100 * targets[alpha]:.0f} % | accuracy % | against FedAvg" for alpha in ALPHAS]
        lines += [f"| C = {fraction}, BatchNorm | {' | '.join(heads)} | MB |", f"|---|{'---|' * (3 * len(ALPHAS) + 1)}"]
        for method in METHODS["batch"]:
            parts = []
            for alpha in ALPHAS:
                group, reference = of(method, "batch", alpha, fraction), of("FedAvg", "batch", alpha, fraction)
                reached = [rounds_to(c, targets[alpha]) for c in group]
                gaps = [100 * (a["accuracy"][-1] - b["accuracy"][-1]) for a, b in zip(group, reference, strict=True)]
                gap = f"{statistics.mean(gaps):+.2f} ± {half_width(gaps):.2f}" if len(gaps) > 1 and method != "FedAvg" else ""
                parts.append(f"{', '.join('-' if r is None else str(r) for r in reached)} | {final(group)} | {gap}")
            sent = statistics.mean(c["megabytes"] for c in of(method, "batch", ALPHAS[0], fraction))
            lines.append(f"| {method} | {' | '.join(parts)} | {sent:.0f} |")
        lines.append("")
    fraction = fractions[len(fractions) // 2]
    names = [(method, norm) for norm in ("batch", "group") for method in METHODS[norm]]
    lines += [f"| accuracy %, C = {fraction} | {' | '.join(f'{method}, {norm} norm' for method, norm in names)} |"]
    lines += [f"|---|{'---|' * len(names)}"]
    for alpha in ALPHAS:
        texts = [final(of(method, norm, alpha, fraction)) for method, norm in names]
        lines.append(f"| alpha = {alpha} | {' | '.join(texts)} |")
    lines += [
        "",
        f"| prototypes, alpha = 1, C = {fraction}, accuracy % | {' | '.join(NETWORKS)} | ensemble |",
        "|---|---|---|---|---|",
    ]
    for method in PROTOTYPES:
        group = of(method, "prototypes", "1", fraction)
        texts = [
            final([{**c, "accuracy": c["accuracies"][f"val_accuracy{ending}"]} for c in group])
            for ending in (*(f"_{name}" for name in NETWORKS), "")
        ]
        lines.append(f"| {method} | {' | '.join(texts)} |")
    return lines


def main() -> None:
    told = arguments(__doc__, tunes=True, settings=True)
    options = {
        "epochs": told.epochs or (40 if told.full else 10),
        "num_train": told.num_train or (48_000 if told.full else 4_000),
        "rounds": 100 if told.full else 20,
        "steps": 10_000 if told.full else STEPS,
        "validation": "test",
    }
    if told.tune:
        return tune(told.workers, options)
    tuned = json.loads(TUNED.read_text())
    fractions = [0.2, 0.4, 0.8] if told.full else [0.4]
    names = [(m, norm, alpha) for norm in METHODS for m in METHODS[norm] for alpha in ALPHAS]
    names += [(m, "prototypes", "1") for m in PROTOTYPES]
    grid = [
        list(Cell(method, norm, alpha, fraction, seed, found["lr"], found["factor"], options))
        for seed in range(1 if told.once else told.seeds or 5)
        for fraction in fractions
        for method, norm, alpha in names
        for found in [tuned[f"{method}, prototypes" if norm == "prototypes" else method]]
    ]
    cells = run_grid(run_cell, once(grid, names=2) if told.once else grid, told.workers, Path("federated.partial.json"))
    write(cells, told.output / "federated.json")
    if told.once:
        return None
    groups = {
        f"{method}, alpha = {alpha}": [
            c for c in cells if (c["method"], c["norm"], c["alpha"], c["fraction"]) == (method, "batch", alpha, 0.4)
        ]
        for alpha in ALPHAS
        for method in METHODS["batch"]
    }
    styles = {
        f"{method}, alpha = {alpha}": {"ls": style, "color": f"C{k}"}
        for alpha, style in zip(ALPHAS, ("-", "--"), strict=True)
        for k, method in enumerate(METHODS["batch"])
    }
    draw_curves(groups, "ResNet-8, deformed digits, 20 clients, C = 0.4", told.output / "federated.png", styles, "round")
    print("\n".join(tables(cells, fractions)))
    return None


if __name__ == "__main__":
    sys.exit(main())
