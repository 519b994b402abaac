"""Push-sum: gossip over links that lead one way, where a replica may send to more others than it hears.

    -  strategy=GossipStrategy("dsgd", topology=graph)      # refused: its replicas would not agree on their mean
    +  strategy=GossipStrategy("push_sum", topology=graph)

A weight beside each replica undoes what the graph favours. Run it with `python examples/push_sum.py`: eight replicas, simulated
in one process.
"""

import lightning as L
import networkx as nx
import torch

from lightning_distopt import GossipStrategy
from lightning_distopt.data import DigitsDataModule
from lightning_distopt.models import ImageClassifier

# A circle of eight, in which replica 0 also sends to 2, 3, 4, 5 and 6, and they don't answer.
graph = nx.DiGraph([(i, (i + 1) % 8) for i in range(8)] + [(0, i) for i in range(2, 7)])


class ShowWeights(L.Callback):
    """Looks at the weights when training ends; they follow from the graph alone."""

    def on_train_end(self, trainer, pl_module):
        self.weights = trainer.strategy.algorithm.push_weights


def train(algorithm):
    L.seed_everything(0, verbose=False)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    module, show = ImageClassifier(net, lr=0.1), ShowWeights()
    trainer = L.Trainer(
        strategy=GossipStrategy(algorithm, topology=graph, replicas_per_device=8),
        accelerator="cpu",
        devices=1,
        max_epochs=8,
        callbacks=[show],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DigitsDataModule(batch_size=8)
    trainer.fit(module, datamodule=data)
    return show.weights, trainer.test(module, datamodule=data, verbose=False)[0]["test_accuracy"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        train("dsgd")
    except ValueError as error:
        print(f"D-SGD: {error}")
    weights, accuracy = train("push_sum")
    print(f"push-sum: weights from {weights.min():.2f} to {weights.max():.2f}, which sum to {weights.sum():.10f}")
    print(f"push-sum: {100 * accuracy:.1f} % of the test digits are right")
    assert abs(weights.sum() - 8) < 1e-9
    assert weights.max() > 2 * weights.min()
    assert accuracy > 0.9
