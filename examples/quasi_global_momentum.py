"""Quasi-global momentum: replicas that hold different data share a momentum, without sending more.

    -  optimizer = torch.optim.SGD(self.parameters(), lr=1.0, momentum=0.9)
    +  optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
    -  strategy = GossipStrategy(topology="ring", partition="dirichlet:0.1")
    +  strategy = GossipStrategy(QuasiGlobal(nesterov=True), topology="ring", partition="dirichlet:0.1")

Run it with `python examples/quasi_global_momentum.py`: sixteen replicas on a ring, each with a few of the ten digits, simulated
in one process. A local momentum follows what a replica sees by itself, and carries it away from its neighbours. A quasi-global
momentum follows where replicas have gone after mixing. With a learning rate of 0.3 both end level here; with 1.0, as below,
local momentum breaks down, and quasi-global momentum is at its best.
"""

import warnings

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_distopt import GossipStrategy, QuasiGlobal


class Classifier(L.LightningModule):
    def __init__(self, momentum):
        super().__init__()
        self.momentum = momentum
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_accuracy", (self.net(x).argmax(dim=1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0, momentum=self.momentum, nesterov=self.momentum > 0)


def train(algorithm, momentum):
    L.seed_everything(0, verbose=False)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
    train_set, val_set = random_split(data, [1437, 360])
    strategy = GossipStrategy(algorithm, topology="ring", partition="dirichlet:0.1", evaluate="both", replicas_per_device=16)
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_epochs=15,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(momentum), DataLoader(train_set, batch_size=16, shuffle=True), DataLoader(val_set, batch_size=90))
    metrics = trainer.callback_metrics
    return float(metrics["val_accuracy"]), float(metrics["val_accuracy_local"]), strategy.traffic.bytes_sent


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*num_workers.*")
    results = {
        "local momentum (DSGDm-N)": train("dsgd", momentum=0.9),
        "quasi-global momentum (QG-DSGDm-N)": train(QuasiGlobal(nesterov=True), momentum=0.0),
    }
    for name, (average, local, sent) in results.items():
        print(
            f"{name}: of the validation digits the average model has {100 * average:.1f} % right, replicas by themselves "
            f"{100 * local:.1f} %; {sent / 1e6:.1f} MB sent by each"
        )
    (_, local, sent), (accuracy, quasi_global, same) = results.values()
    assert sent == same
    assert accuracy > 0.9 and quasi_global > local + 0.05
