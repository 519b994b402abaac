"""Gossip more while it matters: consensus control in the first phase of training, on a ring of eight replicas.

The callback repeats gossip steps until replicas are close, measured by one number that a gossip step yields anyway; from the
first decay of the learning rate on, gossip goes on without it. Every replica is also validated by itself, which shows how far
it lags behind the average of all.
"""

import lightning as L
import torch

from lightning_distopt import CommunicationMonitor, ConsensusControl, GossipStrategy
from lightning_distopt.data import DigitsDataModule
from lightning_distopt.models import ImageClassifier


class FirstPhase(L.Callback):
    """Keeps the distances between replicas up to the decay of the learning rate, after two epochs."""

    def __init__(self):
        self.distances = []

    def on_train_batch_end(self, trainer, *args):
        if trainer.current_epoch < 2:
            self.distances.append(float(trainer.callback_metrics["comm/consensus_distance"]))


def train(*callbacks):
    L.seed_everything(0)
    phase, monitor = FirstPhase(), CommunicationMonitor(consensus_every=1)
    trainer = L.Trainer(
        strategy=GossipStrategy(topology="ring", replicas_per_device=8, evaluate="both"),
        accelerator="cpu",
        devices=1,
        max_epochs=4,
        callbacks=[*callbacks, monitor, phase],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        check_val_every_n_epoch=4,
        log_every_n_steps=1,
    )
    module = ImageClassifier("lenet", model_options={"in_channels": 1, "image_size": 8}, lr=0.15, schedule=[2])
    trainer.fit(module, DigitsDataModule(batch_size=8))
    average, local = (100 * trainer.callback_metrics[name] for name in ("val_accuracy", "val_accuracy_local"))
    megabytes = monitor.summary["bytes_sent"] / 1e6
    print(f"  {megabytes:.1f} MB sent by each replica; {average:.1f} % right, replicas by themselves {local:.1f} %")
    return max(phase.distances), average


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("Plain gossip:")
    free, _ = train()
    control = ConsensusControl("efficient", factor=0.03, phases="lr_decay:1")
    print("With consensus control in the first phase:")
    close, accuracy = train(control)

    steps = control.steps_spent / control.rounds
    print(f"{steps:.1f} gossip steps in each round of that phase kept replicas {free / close:.1f} times closer together")
    assert control.rounds == 2 * 23  # of four epochs with 23 steps, those before the decay
    assert control.rounds_missed == 0
    assert close < free / 2
    assert accuracy > 80
