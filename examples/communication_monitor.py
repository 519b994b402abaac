"""What does communication cost, and is it worth communicating less? Add `CommunicationMonitor` and see.

Two processes on the CPU. The numbers go to the logger and the progress bar; at the end of training there is a summary, and
one sentence of advice for this machine.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # the replicas share the cores

import lightning as L
import torch

from lightning_distopt import CommunicationMonitor, LocalSGDStrategy
from lightning_distopt.data import DigitsDataModule
from lightning_distopt.models import ImageClassifier

if __name__ == "__main__":
    L.seed_everything(0)
    torch.set_num_threads(1)
    trainer = L.Trainer(
        strategy=LocalSGDStrategy(sync_period=8, start_method="fork"),
        callbacks=[CommunicationMonitor(consensus_every=1)],
        accelerator="cpu",
        devices=2,
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=16,
    )
    module = ImageClassifier("lenet", model_options={"in_channels": 1, "image_size": 8}, lr=0.05)
    trainer.fit(module, DigitsDataModule(batch_size=16))

    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("comm/")}
    for name, value in logged.items():
        print(f"{name:<32}{value:.4g}")
    rounds, sent, share = logged["comm/rounds"], logged["comm/bytes_sent"] / 1e6, logged["comm/share_blocked"]
    print(f"{rounds:.0f} rounds sent {sent:.1f} MB from each replica; {100 * share:.0f} % of the time went into waiting")
    assert rounds == 4 * 45 // 8  # four epochs of 45 steps
    assert logged["comm/consensus_distance"] > 0
    assert 0 < share < 1
