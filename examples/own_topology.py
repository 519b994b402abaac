"""A graph of your own: two sites with fast links inside, and one slow link between them.

Any networkx graph, list of edges or mixing matrix is a topology. Run it with `python examples/own_topology.py`: eight
replicas, simulated in one process.
"""

import lightning as L
import networkx as nx
import torch

from lightning_distopt import GossipStrategy
from lightning_distopt.data import DigitsDataModule
from lightning_distopt.models import ImageClassifier
from lightning_distopt.topologies import make


def two_sites(size):
    """Two complete graphs, and one edge between them."""
    graph = nx.disjoint_union(nx.complete_graph(size), nx.complete_graph(size))
    graph.add_edge(0, size)
    return graph


def train(topology):
    L.seed_everything(0, verbose=False)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    module = ImageClassifier(net, lr=0.1)
    trainer = L.Trainer(
        strategy=GossipStrategy("dsgd", topology=topology, replicas_per_device=8),
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
    return trainer.test(module, datamodule=data, verbose=False)[0]["test_accuracy"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    graphs = {"two sites": two_sites(4), "ring": "ring", "edges": [(i, (i + 1) % 8) for i in range(8)]}
    accuracy = {}
    for name, graph in graphs.items():
        topology = make(graph, 8)
        accuracy[name] = train(graph)
        print(
            f"{name:<10} at most {topology.max_degree} messages per round, contraction {topology.contraction:.3f}: "
            f"{100 * accuracy[name]:.1f} % of the test digits are right"
        )
    assert accuracy["edges"] == accuracy["ring"]  # the same graph
    assert min(accuracy.values()) > 0.9
