"""Sixteen replicas in one process: try an algorithm for a cluster on a laptop.

Each replica has its own parameters, optimizer state, batch-norm statistics, random numbers and share of the data, as it
would have in a process of its own; traffic is counted as if they were.
"""

import lightning as L
import torch

from lightning_distopt import LocalSGDStrategy
from lightning_distopt.data import DigitsDataModule
from lightning_distopt.models import ImageClassifier


class WatchReplicas(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        replicas = trainer.strategy.replica_parameters()  # one row for each replica
        distance = (replicas - replicas.mean(dim=0)).norm(dim=1).mean()
        if batch_idx == 0:
            print(f"  epoch {trainer.current_epoch}: {len(replicas)} replicas, distance to their mean {distance:.3f}")
        if trainer.global_step == 1:
            assert replicas.shape == (16, sum(p.numel() for p in pl_module.parameters()))
            assert distance > 0


if __name__ == "__main__":
    L.seed_everything(0)
    torch.set_num_threads(1)
    strategy = LocalSGDStrategy(sync_period=4, replicas_per_device=16)
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_epochs=12,
        callbacks=[WatchReplicas()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    module = ImageClassifier("lenet", model_options={"in_channels": 1, "image_size": 8}, lr=0.05)
    data = DigitsDataModule(batch_size=8)
    trainer.fit(module, data)
    accuracy = trainer.validate(module, data, verbose=False)[0]["val_accuracy"]

    rounds = strategy.traffic.rounds
    print(f"The average of 16 replicas gets {100 * accuracy:.1f} % of the test digits right after {rounds} rounds")
    assert strategy.num_replicas == 16
    assert accuracy > 0.9
