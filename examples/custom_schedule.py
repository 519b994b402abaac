"""A schedule of H of your own: any callable from the step at which a round starts to the number of local steps.

This one communicates often while the learning rate is large: `H` grows with the inverse square root of what remains of
training.
"""

import lightning as L
import torch

from lightning_distopt import LocalSGDStrategy
from lightning_distopt.data import DigitsDataModule
from lightning_distopt.models import ImageClassifier

EPOCHS, STEPS_PER_EPOCH = 10, 23  # 1,437 images over 4 replicas in batches of 16


def sync_period(step: int) -> int:
    remaining = 1 - step / (EPOCHS * STEPS_PER_EPOCH)
    return max(1, round(remaining**-0.5))


if __name__ == "__main__":
    L.seed_everything(0)
    torch.set_num_threads(1)
    strategy = LocalSGDStrategy(sync_period=sync_period, replicas_per_device=4)
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    module = ImageClassifier(
        "lenet", model_options={"in_channels": 1, "image_size": 8}, lr=0.05, schedule="cosine", warmup_epochs=1
    )
    data = DigitsDataModule(batch_size=16)
    trainer.fit(module, data)
    accuracy = trainer.validate(module, data, verbose=False)[0]["val_accuracy"]

    step, rounds = 0, []
    while step + sync_period(step) <= trainer.global_step:
        rounds.append(sync_period(step))
        step += rounds[-1]
    print(f"{len(rounds)} rounds in {trainer.global_step} steps, from {rounds[0]} to {max(rounds)} steps each")
    print(f"{100 * accuracy:.1f} % of the test digits are right")
    assert strategy.traffic.rounds == len(rounds)
    assert accuracy > 0.9
