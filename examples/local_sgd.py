"""From `ddp` to local SGD: the module and the data stay as they are, one argument of the Trainer changes.

    -  trainer = L.Trainer(strategy="ddp", devices=4, ...)
    +  trainer = L.Trainer(strategy="local_sgd", devices=4, ...)

Run it with `python examples/local_sgd.py`: both trainings run on the CPU, one process for each replica.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # the replicas share the cores

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split

import lightning_distopt  # registers "local_sgd"


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
        if isinstance(trainer.strategy, lightning_distopt.LocalSGDStrategy) and trainer.is_global_zero:
            traffic = trainer.strategy.traffic
            steps = trainer.global_step
            print(f"  {traffic.rounds} rounds in {steps} steps, {traffic.bytes_sent / 1e6:.2f} MB sent by each replica")
            assert traffic.rounds == steps // 8


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
    # "ddp" and "local_sgd" start processes that run this script again; "_fork" starts them within it, which suits an
    # example that trains twice.
    accuracy = {strategy: train(strategy) for strategy in ("ddp_fork", "local_sgd_fork")}
    for strategy, value in accuracy.items():
        print(f"{strategy}: {100 * value:.1f} % of the validation digits are right")
    assert min(accuracy.values()) > 0.9
