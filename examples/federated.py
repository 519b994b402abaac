"""Federated learning: twenty clients keep their digits, and eight of them train in each round.

Run it with `python examples/federated.py`. Clients have few classes each, so the longer they train by themselves the farther
apart they drift; FedProx holds them near the server's model.
"""

import lightning as L
import torch

from lightning_distopt import ClientMonitor, FederatedStrategy, FedProx
from lightning_distopt.data import DigitsDataModule
from lightning_distopt.models import ImageClassifier

ROUNDS = 12


def train(aggregator):
    L.seed_everything(0, verbose=False)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    monitor = ClientMonitor(every_n_rounds=ROUNDS, target=0.8)
    trainer = L.Trainer(
        strategy=FederatedStrategy(aggregator, clients=20, fraction=0.4, local_epochs=5, partition="dirichlet:0.1"),
        callbacks=[monitor],
        accelerator="cpu",
        devices=1,
        max_epochs=ROUNDS,  # an epoch of the Trainer is a round
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(ImageClassifier(net, lr=0.1, momentum=0), datamodule=DigitsDataModule(batch_size=16))
    return monitor


if __name__ == "__main__":
    torch.set_num_threads(1)
    monitors = {"FedAvg": train("fedavg"), "FedProx": train(FedProx(mu=0.1))}
    for name, monitor in monitors.items():
        last = monitor.history[-1]
        print(
            f"{name:<8} 80 % in round {monitor.rounds_to_target}; after {last['round']} rounds "
            f"{100 * last['client_accuracy']:.1f} % of clients' digits ({100 * last['client_accuracy_worst_decile']:.1f} % of "
            f"the worst tenth's) and {100 * last['val_accuracy']:.1f} % of the test digits are right"
        )
    assert all(monitor.rounds_to_target < ROUNDS for monitor in monitors.values())
    # A client that is held near the server's model fits its own data less well.
    assert monitors["FedProx"].history[-1]["train_loss"] > monitors["FedAvg"].history[-1]["train_loss"]
