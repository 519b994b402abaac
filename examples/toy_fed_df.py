"""What becomes of two local models in two dimensions: their average, their ensemble, and FedDF, which learns from the latter.

Three classes are the arms of a spiral. Client 1 has hardly a point of the third class, client 2 hardly one of the first. Both
start from the same network with three layers and train it for 20 epochs, then the server has one round: `FedAvg` averages the
two, and `FedDF` distils the mean of their logits, on 60 unlabelled points drawn uniformly from (-3, 3)^2, into the average.

`python examples/toy_fed_df.py` prints accuracies for five seeds, and draws decision regions for one of them.
"""

import argparse
import logging
import warnings
from pathlib import Path

import lightning as L
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distopt import FedDF, FederatedStrategy

SEEDS = range(5)
SHOWN = 0
SHARES = torch.tensor([0.95, 0.5, 0.05])  # of each class, that client 1 has
COLORS = ("#0072B2", "#E69F00", "#009E73")
LOCAL_1, LOCAL_2, AVERAGE, FED_DF, ENSEMBLE = "local model 1", "local model 2", "FedAvg", "FedDF", "ensemble"


class Points(L.LightningModule):
    """A network that tells three classes of points apart."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Watched(FedDF):
    """FedDF that notes what the models of the clients and their average say of some points, before it distils."""

    def __init__(self, data, points):
        super().__init__(data, steps=500, patience=None, lr=0.01)
        self.points, self.logits = points, {}

    def finish_round(self, average):
        (first, _), (second, _) = (self.server.received[k] for k in (0, 1))
        for name, model in {LOCAL_1: first, LOCAL_2: second, AVERAGE: average}.items():
            with self.server.showing(model, self.server.buffers) as module:
                self.logits[name] = module(self.points)
        super().finish_round(average)


def spiral(count, generator):
    """Return points in three arms, and their classes."""
    y = torch.arange(count) % 3
    radius = torch.rand(count, generator=generator).sqrt()
    angle = 2 * torch.pi * (y / 3 + 0.55 * radius) + 0.12 * torch.randn(count, generator=generator) / (radius + 0.3)
    return 2.5 * torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), y


def run(seed, points):
    """Return the logits of each model for points, the points of the clients with their classes, and those of distillation."""
    generator = torch.Generator().manual_seed(seed)
    x, y = spiral(300, generator)
    has_first = torch.rand(300, generator=generator) < SHARES[y]
    clients = [has_first.nonzero().flatten().tolist(), (~has_first).nonzero().flatten().tolist()]
    unlabelled = 6 * torch.rand(60, 2, generator=generator) - 3
    aggregator = Watched(unlabelled, points)
    L.seed_everything(seed, verbose=False)
    module = Points()
    trainer = L.Trainer(
        strategy=FederatedStrategy(aggregator, clients=2, fraction=1.0, local_epochs=20, partition=clients),
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=10, shuffle=True))
    with torch.no_grad():
        logits = {**aggregator.logits, FED_DF: module(points)}
    logits[ENSEMBLE] = (logits[LOCAL_1] + logits[LOCAL_2]) / 2
    return logits, [(x[own], y[own]) for own in clients], unlabelled


def draw(path):
    axis = torch.linspace(-3, 3, 241)
    xs, ys = torch.meshgrid(axis, axis, indexing="xy")
    logits, clients, unlabelled = run(SHOWN, torch.stack([xs.flatten(), ys.flatten()], dim=1))
    figure = Figure(figsize=(15, 3.4), layout="constrained")
    order = (LOCAL_1, LOCAL_2, AVERAGE, FED_DF, ENSEMBLE)
    for axes, name in zip(figure.subplots(1, 5, sharey=True), order, strict=True):
        regions = logits[name].argmax(dim=1).view(xs.shape)
        axes.pcolormesh(xs, ys, regions, cmap=ListedColormap(COLORS), vmin=0, vmax=2, alpha=0.35, linewidth=0, rasterized=True)
        shown = {LOCAL_1: clients[:1], LOCAL_2: clients[1:]}.get(name, clients)
        for x, y in shown:
            axes.scatter(*x.T, c=[COLORS[label] for label in y], s=9, linewidth=0.3, edgecolor="white")
        if name == FED_DF:
            axes.scatter(*unlabelled.T, c="black", marker="x", s=16, linewidth=0.9)
        axes.set(title=name, xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=range(-3, 4, 1))
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder for the picture")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers")

    x, y = spiral(3000, torch.Generator().manual_seed(99))
    names = (LOCAL_1, LOCAL_2, AVERAGE, FED_DF, ENSEMBLE)
    rows = {}
    print("Accuracy on 3,000 points, in %, after one round")
    print(f"{'seed':>6}" + "".join(f"{name:>15}" for name in names))
    for seed in SEEDS:
        logits, _, _ = run(seed, x)
        rows[seed] = [100 * (logits[name].argmax(dim=1) == y).float().mean().item() for name in names]
        print(f"{seed:>6}" + "".join(f"{accuracy:>15.1f}" for accuracy in rows[seed]))
    means = dict(zip(names, torch.tensor(list(rows.values())).mean(dim=0).tolist(), strict=True))
    print(f"{'mean':>6}" + "".join(f"{means[name]:>15.1f}" for name in names))
    path = options.output / "toy_fed_df.png"
    draw(path)
    print(f"Decision regions for seed {SHOWN} are drawn in {path}.")

    gain = means[FED_DF] - means[AVERAGE]
    assert gain > 2
    print(f"Of all points, FedDF gets {gain:.1f} % more right than FedAvg, whose average it starts from")
