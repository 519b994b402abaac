"""Replicas that see different data: decentralized SGD on a ring, with classes divided by a Dirichlet distribution.

Run it with `python examples/heterogeneous_data.py`: sixteen replicas, simulated in one process. The smaller alpha, the fewer
classes a replica has, and the less it can do by itself.
"""

import lightning as L
import torch

from lightning_distopt import GossipStrategy
from lightning_distopt.data import DigitsDataModule, class_counts, make_partitioner, total_variation
from lightning_distopt.models import ImageClassifier

REPLICAS = 16


def train(partition):
    L.seed_everything(0, verbose=False)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    trainer = L.Trainer(
        strategy=GossipStrategy("dsgd", topology="ring", replicas_per_device=REPLICAS, partition=partition, evaluate="both"),
        accelerator="cpu",
        devices=1,
        max_epochs=10,
        check_val_every_n_epoch=10,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(ImageClassifier(net, lr=0.1, momentum=0), datamodule=DigitsDataModule(batch_size=8))
    metrics = trainer.callback_metrics
    return float(metrics["val_accuracy"]), float(metrics["val_accuracy_local"])


def distance(partition):
    """How far classes of a replica are from those of all, in the mean: 0 is the same, 0.9 another class for each."""
    data = DigitsDataModule()
    data.setup()
    parts = make_partitioner(partition)(data.train_set, REPLICAS)
    return total_variation(class_counts(data.train_set, parts)).mean()


if __name__ == "__main__":
    torch.set_num_threads(1)
    average, local = {}, {}
    for partition in ("iid", "dirichlet:1", "dirichlet:0.1"):
        average[partition], local[partition] = train(partition)
        print(
            f"{partition:<13} distance {distance(partition):.2f}: of a replica {100 * local[partition]:.1f} %, "
            f"of their average {100 * average[partition]:.1f} % of the test digits are right"
        )
    assert distance("iid") < distance("dirichlet:1") < distance("dirichlet:0.1")
    assert local["iid"] > local["dirichlet:1"] > local["dirichlet:0.1"]
    assert min(average.values()) > 0.8
