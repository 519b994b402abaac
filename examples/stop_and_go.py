"""A SIGTERM, as a cluster sends it before it takes a machine away, ends training with a checkpoint that goes on bit for bit.

Several processes stop together, after the round that follows the signal, whichever of them receives it; a single process
stops after the step under way. Ctrl-C does the same; pressed twice, it ends training at once.
"""

import os
import signal
import tempfile
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_distopt import LocalSGDStrategy
from lightning_distopt.data import DigitsDataModule
from lightning_distopt.models import ImageClassifier

SIGNAL_AT = 50


class ReceiveSignal(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == SIGNAL_AT - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def train(folder, *callbacks, ckpt_path=None):
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        strategy=LocalSGDStrategy(sync_period=8, replicas_per_device=4),
        callbacks=[ModelCheckpoint(folder), *callbacks],
        accelerator="cpu",
        devices=1,
        max_epochs=6,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    options = {"in_channels": 1, "image_size": 8}
    module = ImageClassifier("lenet", model_options=options, lr=0.1, schedule="cosine", warmup_epochs=1)
    data = DigitsDataModule(batch_size=16)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, trainer.validate(module, data, verbose=False)[0]["val_accuracy"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        uninterrupted, _ = train(f"{folder}/a")
        try:
            train(f"{folder}/b", ReceiveSignal())
        except SystemExit:  # the process would end here
            interrupted = Path(folder, "b", "interrupted.ckpt")
        step = torch.load(interrupted, weights_only=True)["global_step"]
        resumed, accuracy = train(f"{folder}/b", ckpt_path=interrupted)

    print(f"SIGTERM in step {SIGNAL_AT}: training ended after step {step} with {interrupted.name}")
    same = all(torch.equal(a, b) for a, b in zip(uninterrupted.parameters(), resumed.parameters(), strict=True))
    print(f"{100 * accuracy:.1f} % of the test digits are right; bit-identical to a run without a signal: {same}")
    assert step == SIGNAL_AT
    assert same
    assert accuracy > 0.9
