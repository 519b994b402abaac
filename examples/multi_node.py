"""Several nodes: frequent rounds stay inside a node, where links are fast, and few go between nodes.

On two nodes of two processes each, with torchrun (N is 0 on the first node and 1 on the second) or as a SLURM job:

    torchrun --nnodes=2 --node-rank=N --nproc-per-node=2 --master-addr=10.0.0.1 --master-port=29500 multi_node.py
    srun --nodes=2 --ntasks-per-node=2 python multi_node.py

`python examples/multi_node.py`, without a launcher, simulates these four replicas in one process: same code, same numbers.
"""

import os
from collections import Counter

import lightning as L
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from lightning_distopt import LocalSGDStrategy
from lightning_distopt.data import DigitsDataModule
from lightning_distopt.models import ImageClassifier

H, BLOCK_PERIOD = 4, 4  # inside a node every 4 steps, between nodes every 16


def layout():
    """Return nodes and processes of each as the launcher says, or None if there is none."""
    if TorchElasticEnvironment.detect():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        return int(os.environ["WORLD_SIZE"]) // devices, devices
    if SLURMEnvironment.detect():
        return int(os.environ["SLURM_NNODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
    return None


class CountRounds(L.Callback):
    """Count the rounds by the number of replicas that have come to agree in them."""

    def __init__(self):
        self.of_size = Counter()

    def on_after_round(self, trainer, pl_module, group):
        self.of_size[group] += 1


if __name__ == "__main__":
    L.seed_everything(0)
    torch.set_num_threads(1)
    if launched := layout():
        nodes, devices = launched
        strategy = LocalSGDStrategy(sync_period=H, block_period=BLOCK_PERIOD)  # a block is a node
    else:
        nodes, devices = 1, 1
        strategy = LocalSGDStrategy(sync_period=H, block_period=BLOCK_PERIOD, block_size=2, replicas_per_device=4)
    rounds = CountRounds()
    trainer = L.Trainer(
        strategy=strategy,
        callbacks=[rounds],
        accelerator="cpu",
        num_nodes=nodes,
        devices=devices,
        max_epochs=8,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
    )
    module = ImageClassifier("lenet", model_options={"in_channels": 1, "image_size": 8}, lr=0.05)
    data = DigitsDataModule(batch_size=16)
    trainer.fit(module, data)
    accuracy = trainer.validate(module, data, verbose=False)[0]["val_accuracy"]

    n, block, steps = strategy.num_replicas, devices if launched else 2, trainer.global_step
    within, between = rounds.of_size[block], rounds.of_size[n]
    if trainer.is_global_zero:
        print(f"{n} replicas in blocks of {block}, {steps} steps: {within} rounds within blocks, {between} between them")
        print(f"{100 * accuracy:.1f} % of the test digits are right")
    assert between == steps // (H * BLOCK_PERIOD)
    assert within == steps // H - between
    assert accuracy > 0.9
