"""Post-local SGD: mini-batch SGD up to the first decay of the learning rate, local steps from there on.

The large-batch phase finds the basin at full communication; the second phase, with its small learning rate, needs
little of it. Four replicas, simulated in one process.
"""

import lightning as L
import torch

from lightning_distopt import LocalSGDStrategy, PostLocalSwitch
from lightning_distopt.data import DigitsDataModule
from lightning_distopt.models import ImageClassifier

if __name__ == "__main__":
    L.seed_everything(0)
    torch.set_num_threads(1)
    strategy = LocalSGDStrategy(sync_period=8, replicas_per_device=4)
    switch = PostLocalSwitch(at="first_lr_decay")  # or a step, "epoch:10", or a fraction of training such as 0.5
    trainer = L.Trainer(
        strategy=strategy,
        callbacks=[switch],
        accelerator="cpu",
        devices=1,
        max_epochs=8,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    module = ImageClassifier("lenet", model_options={"in_channels": 1, "image_size": 8}, lr=0.05, schedule=[4], warmup_epochs=1)
    data = DigitsDataModule(batch_size=16)
    trainer.fit(module, data)
    accuracy = trainer.validate(module, data, verbose=False)[0]["val_accuracy"]

    steps = trainer.global_step
    print(f"Switched at step {switch.switched_at} of {steps}: {strategy.traffic.rounds} rounds instead of {steps}")
    print(f"{100 * accuracy:.1f} % of the test digits are right")
    assert switch.switched_at == steps // 2
    assert strategy.traffic.rounds == steps // 2 + steps // 2 // 8
    assert accuracy > 0.9
