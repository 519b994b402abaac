"""From `ddp` to gossip: each process sends to one other at a time, and nobody waits for all.

    -  trainer = L.Trainer(strategy="ddp", devices=4, ...)
    +  trainer = L.Trainer(strategy=GossipStrategy(), devices=4, ...)

The default is decentralized SGD on the one-peer exponential graph: in round `t` replica `i` sends to `i + 2^(t mod 2)`. Run it
with `python examples/gossip.py`: four processes on the CPU.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # the replicas share the cores

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_distopt import GossipStrategy


class Classifier(L.LightningModule):
    """An ordinary LightningModule: nothing in it knows about replicas."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_accuracy", (self.net(x).argmax(dim=1) == y).float().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class ShowTraffic(L.Callback):
    """The strategy counts what it sends."""

    def on_train_end(self, trainer, pl_module):
        if isinstance(trainer.strategy, GossipStrategy) and trainer.is_global_zero:
            traffic, graph = trainer.strategy.traffic, trainer.strategy.algorithm.topology
            print(f"  {graph}: {traffic.rounds} rounds, {traffic.bytes_sent / 1e6:.2f} MB sent by each replica")
            row = trainer.strategy.replicas.parameters[0].nbytes
            assert traffic.bytes_sent == traffic.rounds * row  # one message of the model's size in each round


def train(strategy):
    L.seed_everything(0, verbose=False)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
    train_set, val_set = random_split(data, [1437, 360])
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=4,
        max_epochs=10,
        callbacks=[ShowTraffic()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), DataLoader(train_set, batch_size=16, shuffle=True), DataLoader(val_set, batch_size=90))
    return float(trainer.callback_metrics["val_accuracy"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    accuracy = {"ddp": train("ddp_fork"), "gossip": train(GossipStrategy(start_method="fork"))}
    for strategy, value in accuracy.items():
        print(f"{strategy}: {100 * value:.1f} % of the validation digits are right")
    assert min(accuracy.values()) > 0.9
