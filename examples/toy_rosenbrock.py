"""Two trajectories through a curved valley, of heavy-ball and of quasi-global momentum, by a single replica.

    f(x, y) = (y - x^2)^2 + 100 (x - 1)^2,   least at (1, 1);   eta = 0.001

It is steep along x and flat along y. How much do they swing across x = 1, and how soon are they at the bottom? A single replica
has nobody to gossip with, and is trained by the algorithm alone. Run it with `python examples/toy_rosenbrock.py`.
"""

import argparse
import logging
import warnings
from pathlib import Path

import lightning as L
import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from lightning_distopt import GossipStrategy, QuasiGlobal

STARTS = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]], dtype=torch.float64)
STEPS = {0.9: 1000, 0.99: 3000}  # by beta
HEAVY_BALL, QUASI_GLOBAL = "heavy ball", "quasi-global"
COLORS = {HEAVY_BALL: "#0072B2", QUASI_GLOBAL: "#D55E00"}


def function(points):
    x, y = points.unbind(dim=-1)
    return (y - x**2) ** 2 + 100 * (x - 1) ** 2


class Valley(L.LightningModule):
    """Four points, which do not touch each other."""

    def __init__(self, momentum):
        super().__init__()
        self.momentum = momentum
        self.points = torch.nn.Parameter(STARTS.clone())

    def training_step(self, batch, batch_idx):
        return function(self.points).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.001, momentum=self.momentum)


class Trajectory(L.Callback):
    def __init__(self):
        self.points = [STARTS]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.points.append(trainer.strategy.replica_parameters().view(4, 2))


def run(method, beta):
    """Return the trajectories from the four starts, `[steps + 1, 4, 2]`."""
    trajectory = Trajectory()
    own = method == QUASI_GLOBAL
    trainer = L.Trainer(
        strategy=GossipStrategy(QuasiGlobal(beta=beta) if own else "dsgd"),
        accelerator="cpu",
        devices=1,
        precision="64-true",
        max_epochs=1,
        callbacks=[trajectory],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Valley(0 if own else beta), DataLoader(range(STEPS[beta])))
    return torch.stack(trajectory.points)


def path_length(points):
    """Return the sum of |dx| + |dy| of each trajectory."""
    return points.diff(dim=0).abs().sum(dim=(0, 2))


def crossings(points, wider=1e-3):
    """Return how often each trajectory crosses x = 1, counting positions only that are farther from it than `wider`."""
    x = points[:, :, 0] - 1
    sides = [column[column.abs() > wider].sign() for column in x.unbind(dim=1)]
    return [int((side[1:] != side[:-1]).sum()) for side in sides]


def settled(points, within=0.1):
    """Return the step from which on each trajectory stays near x = 1."""
    outside = (points[:, :, 0] - 1).abs() > within
    return [int(column.nonzero()[-1]) + 1 for column in outside.unbind(dim=1)]


def draw(runs, path):
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2, width_ratios=(1, 1.1))
    xs, ys = torch.meshgrid(torch.linspace(-0.1, 2.1, 200), torch.linspace(-0.1, 3.1, 200), indexing="xy")
    for (left, right), beta in zip(panels, (0.9, 0.99), strict=True):
        left.contour(xs, ys, function(torch.stack([xs, ys], dim=2)), (0.1, 1, 4, 16, 64), colors="#aaaaaa", linewidths=0.9)
        for method in (HEAVY_BALL, QUASI_GLOBAL):
            points, color = runs[method, beta], COLORS[method]
            left.plot(*points[:, 0].T, color=color, linewidth=1.3, marker=".", markersize=3, label=method)
            right.plot(function(points[:1001, 0]), color=color, linewidth=1.4, label=method)
        left.plot(1, 1, "*", color="black", markersize=11)
        left.set(title=rf"trajectory, $\beta = {beta}$", xlabel="x", ylabel="y", xlim=(-0.1, 2.1), ylim=(-0.1, 3.1))
        right.set(
            title=rf"$\beta = {beta}$",
            xlabel="step",
            ylabel="f(x, y)",
            yscale="log",
            ylim=({0.9: 1e-10, 0.99: 1e-5}[beta], 300),
        )
        left.legend(fontsize=9, loc="upper left")
        right.legend(fontsize=9, loc="lower left")
        for axes in (left, right):
            axes.grid(alpha=0.3, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder for the picture")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers")

    runs = {(method, beta): run(method, beta) for beta in (0.9, 0.99) for method in (HEAVY_BALL, QUASI_GLOBAL)}
    print(
        f"{'':13} {'beta':>5} {'start':>7} {'path':>6} {'crossings':>10} {'settled':>8} {'f, step 200':>12} {'step 1000':>10}"
    )
    for (method, beta), points in runs.items():
        rows = zip(STARTS.tolist(), path_length(points), crossings(points), settled(points), strict=True)
        for k, ((x, y), length, crossed, step) in enumerate(rows):
            print(
                f"{method:13} {beta:>5} {f'({x:.0f}, {y:.0f})':>7} {length:>6.2f} {crossed:>10} {step:>8} "
                f"{function(points[200, k]):>12.1e} {function(points[1000, k]):>10.1e}"
            )
    path = options.output / "toy_rosenbrock.png"
    draw(runs, path)
    print(f"Trajectories are drawn in {path}.")

    expected = {  # |dx| + |dy| from each of the four starts; by NumPy, from the equations
        (HEAVY_BALL, 0.9): (6.68, 7.14, 6.80, 6.85),
        (QUASI_GLOBAL, 0.9): (3.03, 3.07, 3.06, 3.06),
        (HEAVY_BALL, 0.99): (65.8, 70.7, 62.5, 62.8),
        (QUASI_GLOBAL, 0.99): (3.99, 3.99, 3.99, 4.01),
    }
    for key, lengths in expected.items():
        assert torch.allclose(path_length(runs[key]), torch.tensor(lengths, dtype=torch.float64), rtol=0.005)
    assert crossings(runs[HEAVY_BALL, 0.9]) == [18, 17, 17, 16] and crossings(runs[QUASI_GLOBAL, 0.9]) == [4, 3, 3, 4]
    assert crossings(runs[HEAVY_BALL, 0.99]) == [201, 202, 202, 202] and crossings(runs[QUASI_GLOBAL, 0.99]) == [6, 5, 5, 6]
    early = {method: float(function(runs[method, 0.9][200, 0])) for method in (HEAVY_BALL, QUASI_GLOBAL)}
    assert early[HEAVY_BALL] < 1e-4 < 3e-2 < early[QUASI_GLOBAL]  # it swings less, and is later
    ratio = early[QUASI_GLOBAL] / early[HEAVY_BALL]
    print(f"Quasi-global momentum swings less, and is later: at beta = 0.9, f is {ratio:.0f} times as large after 200 steps")
