"""Two replicas with different data, in two dimensions: what a local momentum does to them, and what a quasi-global one does.

Replica 0 is drawn to (0, 5) and replica 1 to (4, 0), each by a gradient of length 1; both start at (0, 0) and are averaged
after every step. What is best for both is anywhere on the line between the two points.

Four methods: D-SGD; the user's own momentum under D-SGD, local to each replica; the same with momentum buffers averaged over
replicas, by `optimizer_state="average_all"`; and `QuasiGlobal`. Run it with `python examples/toy_two_replicas.py`.
"""

import argparse
import logging
import math
import warnings
from pathlib import Path

import lightning as L
import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from lightning_distopt import GossipStrategy, QuasiGlobal

POINTS = torch.tensor([[0.0, 5.0], [4.0, 0.0]], dtype=torch.float64)
RATES = (0.05, 0.1, 0.2)
STEPS = 400
D_SGD, LOCAL, AVERAGED, QUASI_GLOBAL = "D-SGD", "local momentum", "averaged momentum", "quasi-global momentum"
SHOWN = 0.1  # the learning rate of the picture


class Drawn(L.LightningModule):
    """Points that are drawn to where the data lies; one for each learning rate, which do not touch each other."""

    def __init__(self, momentum):
        super().__init__()
        self.momentum = momentum
        self.x = torch.nn.ParameterList(torch.zeros(2) for _ in RATES)

    def training_step(self, batch, batch_idx):
        return sum((x - batch[0]).norm() for x in self.x)  # its gradient in x has length 1

    def configure_optimizers(self):
        groups = [{"params": [x], "lr": rate} for x, rate in zip(self.x, RATES, strict=True)]
        return torch.optim.SGD(groups, lr=1.0, momentum=self.momentum)


class Trajectory(L.Callback):
    """Keeps where replicas meet, and where each has been just before."""

    def __init__(self):
        self.met, self.before = [torch.zeros(6, dtype=torch.float64)], []

    def on_before_round(self, trainer, pl_module):
        self.before.append(trainer.strategy.replica_parameters())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        x = trainer.strategy.replica_parameters()
        assert torch.allclose(x[0], x[1], rtol=0, atol=1e-13)  # they have met
        self.met.append(x[0])


def run(method, beta):
    """Return, for each learning rate, where replicas meet, `[STEPS + 1, 2]`, and where they came from, `[STEPS, 2, 2]`."""
    trajectory = Trajectory()
    trainer = L.Trainer(
        strategy=GossipStrategy(
            QuasiGlobal(beta=beta) if method == QUASI_GLOBAL else "dsgd",
            topology="complete",
            replicas_per_device=2,
            partition="fixed",  # replica i has samples i, i + 2, i + 4, ...
            optimizer_state="average_all" if method == AVERAGED else "keep",
        ),
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
    trainer.fit(Drawn(beta if method in (LOCAL, AVERAGED) else 0), DataLoader(POINTS.repeat(STEPS, 1), batch_size=1))
    met, before = torch.stack(trajectory.met), torch.stack(trajectory.before)
    # Quasi-global momentum is added after the hook. It is the same for both replicas, which have always made the same move.
    before += (met[1:] - before.mean(dim=1)).unsqueeze(1)
    return {rate: (met[:, 2 * k : 2 * k + 2], before[:, :, 2 * k : 2 * k + 2]) for k, rate in enumerate(RATES)}


def signed_distance(met):
    """To the line between the two points, 5 x + 4 y = 20; negative on the side of the start."""
    return (met @ torch.tensor([5.0, 4.0], dtype=torch.float64) - 20) / math.sqrt(41)


def crossings(distance, wider=0.0):
    """How often the line is crossed, counting positions only that are farther away than `wider`."""
    side = distance[distance.abs() > wider].sign()
    return int((side[1:] != side[:-1]).sum())


def settled(distance, within=0.01):
    """Return the step from which on replicas stay near the line."""
    outside = (distance.abs() > within).nonzero()
    return f"{int(outside[-1]) + 1}" if outside[-1] < STEPS else f"> {STEPS}"


def apart(met, before, rate):
    """Return the distance of the two replicas before they meet, over that of plain steps from the same place."""
    gradients = torch.nn.functional.normalize(met[:-1, None] - POINTS, dim=2)
    return (before[:, 0] - before[:, 1]).norm(dim=1) / (rate * (gradients[:, 0] - gradients[:, 1]).norm(dim=1))


def draw(runs, path):
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    panels = figure.subplots(2, 2)
    shown = {D_SGD: "#777777", LOCAL: "#0072B2", QUASI_GLOBAL: "#D55E00"}
    for axes, method in zip(panels.flat[:3], shown, strict=True):
        met, before = runs[method, 0.9][SHOWN]
        axes.plot(*POINTS.T, "--", color="#999999", linewidth=1.2, label="best for both")
        for replica, color in enumerate(("#0072B2", "#009E73")):
            label = f"replica {replica}, before averaging"
            axes.scatter(*before[:, replica].T, s=5, color=color, alpha=0.5, linewidths=0, label=label)
        axes.plot(*met.T, color="black", linewidth=1.2, marker=".", markersize=3, label="after averaging")
        axes.plot(*POINTS.T, "*", color="#D55E00", markersize=13, linestyle="", label="drawn to")
        axes.set(title=method if method == D_SGD else rf"{method}, $\beta = 0.9$", xlabel="x", ylabel="y")
        axes.set(xlim=(-1.5, 5.5), ylim=(-1.0, 6.0), aspect="equal")
    panels[0, 0].legend(fontsize=8, loc="upper right", markerscale=1.2)
    axes = panels[1, 1]
    for method, color in shown.items():
        axes.plot(signed_distance(runs[method, 0.9][SHOWN][0])[:301], color=color, linewidth=1.6, label=method)
    axes.axhline(0, color="#999999", linestyle="--", linewidth=1.2)
    axes.set(title=r"$\beta = 0.9$", xlabel="round", ylabel="signed distance to the best line")
    axes.legend(fontsize=8, loc="lower right")
    for axes in panels.flat:
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(rf"Two replicas with different data, $\eta = {SHOWN}$")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder for the picture")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers")

    methods = [(D_SGD, 0.0), (AVERAGED, 0.9)] + [
        (method, beta) for beta in (0.5, 0.9, 0.99) for method in (LOCAL, QUASI_GLOBAL)
    ]
    runs = {(method, beta): run(method, beta) for method, beta in methods}
    runs[D_SGD, 0.9] = runs[D_SGD, 0.0]
    header = f"{'':22} {'beta':>5} {'eta':>5} {'apart':>7} {'crossings':>10} {'wider .01':>10} {'overshoot':>10} {'settled':>8}"
    print(header)
    for method, beta in methods:
        for rate, (met, before) in runs[method, beta].items():
            distance = signed_distance(met)
            print(
                f"{method:22} {beta:>5} {rate:>5} {apart(met, before, rate).mean():>7.2f} {crossings(distance, 1e-9):>10} "
                f"{crossings(distance, 0.01):>10} {max(0.0, float(distance.max())):>10.2f} {settled(distance):>8}"
            )
    path = options.output / "toy_two_replicas.png"
    draw(runs, path)
    print(f"Trajectories are drawn in {path}.")

    for beta, pairs in {0.9: [(15, 5), (22, 7), (32, 9)], 0.99: [(15, 1), (22, 1), (31, 1)]}.items():
        for rate, pair in zip(RATES, pairs, strict=True):
            met = [runs[method, beta][rate][0] for method in (LOCAL, QUASI_GLOBAL)]
            assert tuple(crossings(signed_distance(x)) for x in met) == pair
    for rate in RATES:
        # With quasi-global momentum replicas are as far apart as with D-SGD; with a local one, nearly 1 / (1 - beta) as far.
        assert all(torch.allclose(apart(*runs[QUASI_GLOBAL, b][rate], rate), torch.ones(1).double()) for b in (0.5, 0.9, 0.99))
        assert abs(apart(*runs[LOCAL, 0.9][rate], rate).mean() - 9.74) < 0.02
        # Where they meet does not depend on whether the momentum is local or averaged over replicas.
        assert torch.allclose(runs[LOCAL, 0.9][rate][0], runs[AVERAGED, 0.9][rate][0], rtol=0, atol=1e-10)
    spread = apart(*runs[LOCAL, 0.9][SHOWN], SHOWN).mean()
    print(
        f"A local momentum takes the replicas {spread:.1f} times as far apart; they meet where they would with an averaged one"
    )
