"""Do replicas agree sooner with quasi-global momentum? Average consensus: gossip alone, without gradients.

    gossip                   X' = W X
    quasi-global momentum    X' = W (X - beta M),   M' = mu M + (1 - mu) (X - X'),   beta = mu = 0.9

The loss is zero and the learning rate 1, which leaves just this of `DSGD` and `QuasiGlobal`. Replicas are simulated in one
process; a callback lets each start at a random point of its own, before the first step.

`python examples/toy_average_consensus.py` prints how many rounds it takes until replicas are close, for the first time and for
good, and draws their distance. `--full` has larger graphs and more rounds, and takes some minutes.
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
from lightning_distopt.topologies import make

QUICK = {  # rounds
    ("ring", 16): 110,
    ("chain", 10): 140,
    ("torus", 16): 30,
    ("social_network", 32): 55,
    ("exponential", 16): 25,
    ("one_peer_exponential", 16): 30,
}
FULL = {
    ("ring", 16): 270,
    ("ring", 32): 700,
    ("ring", 48): 1400,
    ("chain", 16): 700,
    ("torus", 64): 120,
    ("social_network", 32): 170,
    ("exponential", 16): 70,
    ("one_peer_exponential", 16): 70,
}
# Rounds to 1/100: of gossip, and with momentum, for the first time and for good; by NumPy, from other random numbers.
EXPECTED = {
    ("ring", 16): (69, 65, 105),
    ("ring", 32): (253, 133, 282),
    ("ring", 48): (546, 206, 325),
    ("chain", 10): (104, 81, 133),
    ("chain", 16): (251, 133, 281),
    ("torus", 16): (8, 23, 23),
    ("torus", 64): (27, 41, 41),
    ("social_network", 32): (34, 48, 48),
    ("exponential", 16): (7, 21, 21),
    ("one_peer_exponential", 16): (4, 24, 24),
}
NAMES = {"one_peer_exponential": "one-peer exponential", "social_network": "social network"}


class Nothing(L.LightningModule):
    """A point that no loss moves."""

    def __init__(self):
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(100))

    def training_step(self, batch, batch_idx):
        return 0 * self.x.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Consensus(L.Callback):
    """Lets replicas start at different points, and follows them."""

    def __init__(self, start):
        self.start, self.distances = start, []

    def on_train_start(self, trainer, pl_module):
        replicas = trainer.strategy.replicas
        for row in reversed(range(len(self.start))):
            replicas.activate(row)  # the module's parameters are those of this replica now
            pl_module.x.data.copy_(self.start[row])
        self.measure(trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.measure(trainer)

    def measure(self, trainer):
        x = trainer.strategy.replica_parameters()
        self.distances.append(float((x - x.mean(dim=0)).norm()))
        self.mean = x.mean(dim=0)


def distances(algorithm, graph, n, rounds):
    """Return ||X - mean|| after 0, 1, 2, ... rounds, over that before the first."""
    start = torch.randn(n, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    consensus = Consensus(start)
    trainer = L.Trainer(
        strategy=GossipStrategy(algorithm, topology=graph, replicas_per_device=n),
        accelerator="cpu",
        devices=1,
        precision="64-true",
        max_epochs=1,
        callbacks=[consensus],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Nothing(), DataLoader(torch.zeros(n * rounds), batch_size=1))
    assert torch.allclose(consensus.mean, start.mean(dim=0), rtol=0, atol=1e-11)  # neither moves the mean
    return [distance / consensus.distances[0] for distance in consensus.distances]


def rounds_to(level, curve):
    """Return after how many rounds the distance is that small, for the first time and for good; None: not yet."""
    first = next((t for t, distance in enumerate(curve) if distance <= level), None)
    stays = max((t + 1 for t, distance in enumerate(curve) if distance > level), default=0)
    return first, stays if stays < len(curve) else None


def draw(curves, lowest, path):
    columns = (len(curves) + 1) // 2
    figure = Figure(figsize=(3.3 * columns, 6), layout="constrained")
    panels = figure.subplots(2, columns, sharey=True)
    for axes, ((graph, n), pair) in zip(panels.flat, curves.items(), strict=True):
        for name, curve, color in zip(("gossip", "quasi-global momentum"), pair, ("#0072B2", "#D55E00"), strict=True):
            axes.plot([max(d, lowest / 10) for d in curve], color=color, linewidth=1.8, label=name)  # a logarithm has no zero
        axes.set(title=f"{NAMES.get(graph, graph)}, n = {n}", yscale="log", ylim=(lowest, 1.3))
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("rounds")
    figure.supylabel("distance between replicas / that at the start")
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder for the picture")
    parser.add_argument("--full", action="store_true", help="larger graphs and more rounds; some minutes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers")

    levels = (1e-1, 1e-2, 1e-4) if options.full else (1e-1, 1e-2)
    curves = {}
    print("Rounds of gossip / with momentum, for the first time / for good")
    print(f"{'until the distance is':40}" + "".join(f"{level:>17.0e}" for level in levels))
    for (graph, n), rounds in (FULL if options.full else QUICK).items():
        gossip, momentum = (distances(algorithm, graph, n, rounds) for algorithm in ("dsgd", QuasiGlobal()))
        curves[graph, n] = gossip, momentum
        label = f"{NAMES.get(graph, graph)}, n = {n}"
        if make(graph, n).static:
            label += f", lambda_2 = {torch.linalg.eigvals(make(graph, n).matrix()).real.sort().values[-2]:.4f}"
        counts = [(rounds_to(level, gossip)[1], *rounds_to(level, momentum)) for level in levels]
        print(f"{label:40}" + "".join(f"{' / '.join(map(str, count)):>17}" for count in counts), flush=True)
    path = options.output / "toy_average_consensus.png"
    draw(curves, levels[-1] / 2, path)
    print(f"The distances are drawn in {path}.")

    first, for_good = set(), set()
    for of, (gossip, momentum) in curves.items():
        measured = (rounds_to(1e-2, gossip)[1], *rounds_to(1e-2, momentum))
        assert all(abs(a - b) <= max(2, 0.1 * b) for a, b in zip(measured, EXPECTED[of], strict=True))
        first |= {of} if measured[1] < measured[0] else set()
        for_good |= {of} if measured[2] < measured[0] else set()
    assert first == {of for of in curves if of[0] in ("ring", "chain")}
    assert for_good == {of for of in curves if of == ("ring", 48)}  # lambda_2 > mu + (1 - mu) beta = 0.99
    gossip, momentum = curves["one_peer_exponential", 16]
    assert gossip[4] < 1e-14 and 0.09 < momentum[4] < 0.12  # gossip is exact after log2(16) rounds, which momentum spoils
    print(
        f"Of {len(curves)} graphs, momentum is sooner at 1/100 on {len(first)} for the first time, on {len(for_good)} for good"
    )
