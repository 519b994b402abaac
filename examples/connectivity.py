"""Do two minima lie in one valley? A curve of low loss from one network to another, and diagnostics of the second's training.

The first network is trained alone. While the second one trains, from another seed, callbacks log its gradient noise, and how
fast the gradient changes along its steps; when it ends, a third trains a curve from the first to the second, along which the
loss is low, and measures it beside the straight line. One seed on few data: a look at the tools, not a result.
"""

import lightning as L
import torch

from lightning_distopt import ModeConnectivity, SmoothnessProbe, TrainingDiagnostics
from lightning_distopt.data import DigitsDataModule
from lightning_distopt.models import ImageClassifier

FOLDER = "outputs/connectivity"


def train(seed, *callbacks):
    L.seed_everything(seed)
    module = ImageClassifier("lenet", model_options={"in_channels": 1, "image_size": 8}, lr=0.1, schedule="cosine")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=6,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DigitsDataModule(batch_size=32))
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(0).save_checkpoint(f"{FOLDER}/first.ckpt")

    diagnostics = TrainingDiagnostics("45 steps", passes=["noise"], samples=512)
    smoothness = SmoothnessProbe("45 steps", steps=8, size=0.2)
    curve = ModeConnectivity(f"{FOLDER}/first.ckpt", bends=1, steps=400, points=11, data=["train", "val"], samples=1024)
    train(1, diagnostics, smoothness, curve)

    print("step  noise scale  effective step  |grad f(x + s) - grad f(x)| / |s|")
    for of_step, along in zip(diagnostics.history, smoothness.history, strict=True):
        scale, size = of_step["noise_scale"], of_step["effective_step_size"]
        print(f"{of_step['step']:>4}{scale:>13.0f}{size:>16.2e}{along['lipschitz']:>20.1f}")
    print(f"{smoothness.series().save(f'{FOLDER}/smoothness.png')}: all along the training")

    found = curve.result.numbers()
    print(f"{curve.result.save(f'{FOLDER}/curve.png')}: the loss along the curve and the straight line")
    for data in ("train", "val"):
        line, low = found[f"{data}/straight_loss_max"], found[f"{data}/loss_max"]
        print(f"{data}: the loss is at most {line:.2f} on the straight line, and {low:.2f} on the curve")
    low, line = found["train/loss_barrier"], found["train/straight_loss_barrier"]
    print(f"Between the two the train loss rises by {line:.2f} on the straight line, and by {low:.2f} on the curve")
    assert line > 0.5
    assert low < 0.2 * line
