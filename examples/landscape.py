"""How flat is the minimum, and what lies between two of them? Large batches against local SGD, on the digits.

While local SGD trains, one callback measures the line from the replicas' average to each replica before a round, and another
the plane in which the weights moved most, with their way in it. Afterwards functions compare both models: along random
directions that they share, on the line between them, and by how much the loss rises at most nearby. One seed on few data: a
look at the tools, not a result.
"""

import lightning as L
import torch
from torch.nn import functional as F

from lightning_distopt import LinearInterpolation, LocalSGDStrategy, LossLandscape
from lightning_distopt.analysis import Objective, interpolate, landscape_1d, worst_case_sharpness
from lightning_distopt.data import DigitsDataModule
from lightning_distopt.models import ImageClassifier

FOLDER = "outputs/landscape"


def train(batch_size, epochs, **options):
    L.seed_everything(0)
    module = ImageClassifier("lenet", model_options={"in_channels": 1, "image_size": 8}, lr=0.1, schedule="cosine")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **options,
    )
    trainer.fit(module, DigitsDataModule(batch_size=batch_size))
    return module


def batches(loader):
    return [tuple(batch) for batch in loader]


if __name__ == "__main__":
    torch.set_num_threads(1)
    replicas = LinearInterpolation("replicas", every="127 steps", points=9, samples=200, progress=False)
    landscape = LossLandscape("end", dimensions=2, trajectory=1, points=9, samples=200, progress=False)
    strategy = LocalSGDStrategy(sync_period=8, replicas_per_device=4)
    local = train(16, 6, strategy=strategy, callbacks=[replicas, landscape])
    large = train(256, 30)

    found = replicas.result.numbers()
    print(f"Replicas have a loss of {found['train/loss_1']:.3f}, their average one of {found['train/loss_0']:.3f}")
    path = landscape.result.save(f"{FOLDER}/way.png")
    share = 100 * landscape.result.explained.sum()
    print(f"{path}: the way of the average, {share:.0f} % of its variance in the plane")

    data = DigitsDataModule(batch_size=512)
    data.setup()
    loss = lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])  # noqa: E731
    objectives = {
        "train": Objective(large, loss, batches(data.train_dataloader())),
        "test": Objective(large, loss, batches(data.test_dataloader())),
    }
    models = {"large batches": large.state_dict(), "local SGD": local.state_dict()}
    lines = landscape_1d(objectives, models, directions=5, points=11, radius=0.5, progress=False)
    print(f"{lines.save(f'{FOLDER}/lines.png')}: both along five directions that they share")
    for name, module in (("large batches", large), ("local SGD", local)):
        rise = lines.numbers()[f"{name}/train/rise"]
        around = Objective(module, loss, objectives["train"].batches)
        worst = worst_case_sharpness(around, steps=10, progress=False).value
        print(f"{name}: the loss rises by {rise:.2f} along random directions, by {worst:.3f} at most within 0.05")

    between = interpolate(objectives, models["large batches"], models["local SGD"], points=11, progress=False)
    print(f"{between.save(f'{FOLDER}/between.png')}: from one to the other")
    at = between.positions.tolist().index(1)
    exact = between.curves("test")[0, at] == Objective(local, loss, objectives["test"].batches).loss()
    barrier = between.barriers("train")[0]
    print(f"Between the two the train loss rises by {barrier:.2f}; at the end it is the model itself: {exact}")
    assert exact
    assert found["train/loss_0"] < found["train/loss_1"]
    assert barrier > 0.1
