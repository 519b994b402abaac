"""One replica meets a broken sample and becomes NaN. It must not take the others with it.

By default the next round is refused, with an error that names the replica. With `nonfinite="skip"` training goes on: the
replica starts again from the average of the others.
"""

import warnings

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_distopt import LocalSGDStrategy, NonFiniteError
from lightning_distopt.data import load_digits_tensors
from lightning_distopt.models import ImageClassifier

BROKEN = 602  # with partition="fixed", sample i belongs to replica i mod 4: here replica 2


def train(nonfinite):
    L.seed_everything(0, verbose=False)
    images, targets = load_digits_tensors("train")
    images[BROKEN] = torch.nan
    data = DataLoader(TensorDataset(images, targets), batch_size=15, shuffle=True)  # 24 steps an epoch
    strategy = LocalSGDStrategy(sync_period=8, replicas_per_device=4, partition="fixed", nonfinite=nonfinite)
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_epochs=12,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    module = ImageClassifier("lenet", model_options={"in_channels": 1, "image_size": 8}, lr=0.1)
    trainer.fit(module, data)
    return trainer, module


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        train("raise")
    except NonFiniteError as error:  # a FloatingPointError
        message = str(error)
    print(message)
    assert "Replica 2 (rank 0) is not finite" in message

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer, module = train("skip")
    times = sum("Replica 2 had parameters that are not finite" in str(warning.message) for warning in said)
    test = DataLoader(TensorDataset(*load_digits_tensors("test")), batch_size=360)
    accuracy = trainer.validate(module, test, verbose=False)[0]["val_accuracy"]
    print(f"Replica 2 was replaced {times} times, in {trainer.strategy.traffic.rounds} rounds")
    print(f"{100 * accuracy:.1f} % of the test digits are right")
    assert times == trainer.max_epochs  # it meets the sample once in every epoch
    assert accuracy > 0.9
