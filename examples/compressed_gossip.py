"""Gossip with one bit for each value: CHOCO-SGD on a ring of eight replicas, simulated in one process.

Replicas send the signs of how far they are from what their neighbours know of them, and one number. What is lost is sent
later, so the result is that of uncompressed gossip. Run it with `python examples/compressed_gossip.py`.
"""

import lightning as L
import torch

from lightning_distopt import CHOCO, GossipStrategy
from lightning_distopt.data import DigitsDataModule
from lightning_distopt.models import ImageClassifier


def train(algorithm):
    L.seed_everything(0, verbose=False)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    module = ImageClassifier(net, lr=0.1)
    strategy = GossipStrategy(algorithm, topology="ring", replicas_per_device=8)
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_epochs=8,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DigitsDataModule(batch_size=8)
    trainer.fit(module, datamodule=data)
    accuracy = trainer.test(module, datamodule=data, verbose=False)[0]["test_accuracy"]
    return accuracy, strategy.traffic.bytes_sent / 1e6


if __name__ == "__main__":
    torch.set_num_threads(1)
    algorithms = {
        "uncompressed": "dpsgd",
        "signs": CHOCO(compressor="sign"),
        "4 bits": CHOCO(compressor="qsgd:4"),
        "the largest 10 %": CHOCO(compressor="top_k:0.1"),
    }
    results = {name: train(algorithm) for name, algorithm in algorithms.items()}
    for name, (accuracy, megabytes) in results.items():
        print(f"{name:<18}{megabytes:6.2f} MB sent by each replica, {100 * accuracy:.1f} % of the test digits are right")
    assert min(accuracy for accuracy, _ in results.values()) > 0.9
    assert results["signs"][1] < results["uncompressed"][1] / 25
