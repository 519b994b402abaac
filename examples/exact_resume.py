"""A run that breaks off in the middle of a round goes on from its last checkpoint as if nothing had happened.

Between rounds the replicas differ. The checkpoint itself holds their average, an ordinary model; the folder beside it holds
every replica with its optimizer state, its random numbers, its place in the data and in the round.
"""

import tempfile
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_distopt import LocalSGDStrategy
from lightning_distopt.data import DigitsDataModule
from lightning_distopt.models import ImageClassifier

H, EVERY, FAILS_AT = 8, 30, 100  # the last checkpoint is that of step 90, two steps into a round


class PowerCut(Exception):
    pass


class CutPower(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == FAILS_AT:
            raise PowerCut


class KeepReplicas(L.Callback):
    """Keep all parameters of all replicas, as they are after every step."""

    def __init__(self):
        self.after = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after[trainer.global_step] = trainer.strategy.replica_parameters()


def train(folder, *callbacks, ckpt_path=None):
    L.seed_everything(0, verbose=False)
    replicas = KeepReplicas()
    trainer = L.Trainer(
        strategy=LocalSGDStrategy(sync_period=H, replicas_per_device=4),
        callbacks=[replicas, ModelCheckpoint(folder, filename="{step}", every_n_train_steps=EVERY), *callbacks],
        accelerator="cpu",
        devices=1,
        max_epochs=6,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    module = ImageClassifier("lenet", model_options={"in_channels": 1, "image_size": 8}, lr=0.05, schedule="cosine")
    trainer.fit(module, DigitsDataModule(batch_size=16, augment=True), ckpt_path=ckpt_path)
    return replicas.after


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        never_stopped = train(f"{folder}/a")
        try:
            train(f"{folder}/b", CutPower())
        except PowerCut:
            (checkpoint,) = Path(folder, "b").glob("*.ckpt")
        resumed = train(f"{folder}/b", ckpt_path=checkpoint)

    first, last = min(resumed), max(resumed)
    print(f"Resumed from {checkpoint.name}, {(first - 1) % H} steps into a round of {H}, up to step {last}")
    same = all(torch.equal(rows, never_stopped[step]) for step, rows in resumed.items())
    rows, numbers = never_stopped[last].shape
    print(f"All {numbers} parameters of each of {rows} replicas are bit-identical after every step: {same}")
    assert (first - 1, last) == (90, max(never_stopped))
    assert not torch.equal(never_stopped[first - 1][0], never_stopped[first - 1][1])  # it was in the middle of a round
    assert same
