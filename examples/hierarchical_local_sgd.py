"""Hierarchical local SGD: replicas of a block, such as a machine, average often; all replicas average seldom.

Eight replicas in two blocks, simulated in one process. On a cluster blocks are the nodes by default: `block_period` is
then all there is to say.
"""

import lightning as L
import torch

from lightning_distopt import LocalSGDStrategy
from lightning_distopt.data import DigitsDataModule
from lightning_distopt.models import ImageClassifier


class CountAgreements(L.Callback):
    """Count after which steps the replicas are equal inside their blocks, and over all blocks."""

    def __init__(self):
        self.in_blocks = self.over_all = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        replicas = trainer.strategy.replica_parameters()
        blocks = replicas.view(2, 4, -1)
        self.in_blocks += int(all(torch.equal(replica, block[0]) for block in blocks for replica in block))
        self.over_all += int(all(torch.equal(replica, replicas[0]) for replica in replicas))


if __name__ == "__main__":
    L.seed_everything(0)
    torch.set_num_threads(1)
    # Two steps to the average of a block of four, and every third of these rounds is over all eight replicas.
    strategy = LocalSGDStrategy(sync_period=2, block_size=4, block_period=3, replicas_per_device=8)
    agreements = CountAgreements()
    trainer = L.Trainer(
        strategy=strategy,
        callbacks=[agreements],
        accelerator="cpu",
        devices=1,
        max_epochs=10,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    module = ImageClassifier("lenet", model_options={"in_channels": 1, "image_size": 8}, lr=0.05)
    data = DigitsDataModule(batch_size=15)
    trainer.fit(module, data)
    accuracy = trainer.validate(module, data, verbose=False)[0]["val_accuracy"]

    steps = trainer.global_step
    print(f"{steps} steps, {agreements.in_blocks} rounds, {agreements.over_all} of them over all replicas")
    print(f"{100 * accuracy:.1f} % of the test digits are right")
    assert agreements.in_blocks == strategy.traffic.rounds == steps // 2
    assert agreements.over_all == steps // 6
    assert accuracy > 0.9
