"""One pretrained transformer, several tasks: each learns which weights to use, and is a file of one bit for each.

Run it with `python examples/weight_masking.py`. A small transformer reads digits row by row. It is pretrained to tell ten
digits apart; then two other tasks are learned by masks over its second block, whose weights stay as they are: is the digit
odd, is it a five or more? With a model of `transformers` the layers need not be named.
"""

import os

import lightning as L
import torch
from torch import nn

from lightning_distopt import MaskedTasks, WeightMasking
from lightning_distopt.data import DigitsDataModule

FOLDER = "outputs/weight_masking"
TASKS = {"odd": lambda digit: digit % 2, "large": lambda digit: (digit >= 5).long()}
LAYERS = ["encoder.layers.1.linear?", "encoder.layers.1.self_attn.out_proj", "classifier"]


class Reader(nn.Module):
    """Reads the eight rows of a digit."""

    def __init__(self, classes):
        super().__init__()
        self.embedding = nn.Linear(8, 64)
        self.positions = nn.Parameter(0.1 * torch.randn(8, 64))
        layer = nn.TransformerEncoderLayer(64, nhead=4, dim_feedforward=256, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.classifier = nn.Linear(64, classes)

    def forward(self, images):
        return self.classifier(self.encoder(self.embedding(images.squeeze(1)) + self.positions).mean(dim=1))


class Task(L.LightningModule):
    """Any task with labels that are made from digits; it knows nothing of masks."""

    def __init__(self, model, label, lr):
        super().__init__()
        self.model, self.label, self.lr = model, label, lr

    def training_step(self, batch, batch_idx):
        images, digits = batch
        return nn.functional.cross_entropy(self.model(images), self.label(digits))

    def validation_step(self, batch, batch_idx):
        images, digits = batch
        self.log("accuracy", (self.model(images).argmax(dim=1) == self.label(digits)).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def fit(task, epochs, callbacks=()):
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, datamodule=DigitsDataModule(batch_size=32))
    return float(trainer.callback_metrics["accuracy"])


def new_head(model, classes):
    """Give the pretrained model a random classifier, as a task begins with."""
    task = Reader(classes)
    task.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("classifier.")}, strict=False)
    return task


def kilobytes(name):
    return f"{os.path.getsize(f'{FOLDER}/{name}.pt') / 1000:.1f} kB"


if __name__ == "__main__":
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    pretrained = Reader(10)
    accuracy = fit(Task(pretrained, lambda digit: digit, lr=2e-3), epochs=4)
    print(f"pretrained: {100 * accuracy:.1f} % of the digits are right")
    os.makedirs(FOLDER, exist_ok=True)
    torch.save(pretrained.state_dict(), f"{FOLDER}/pretrained.pt")
    images = torch.rand(16, 1, 8, 8)
    accuracies, logits = {}, {}
    for name, label in TASKS.items():
        model = new_head(pretrained, classes=2)
        masking = WeightMasking([f"model.{layer}" for layer in LAYERS], head=["model.classifier.*"])
        accuracies[name] = fit(Task(model, label, lr=1e-3), epochs=3, callbacks=[masking])
        masking.masks.relative_to("model").save(f"{FOLDER}/{name}.pt")
        logits[name] = model.eval()(images)
        print(
            f"{name}: {100 * accuracies[name]:.1f} % are right with {100 * masking.masks.sparsity:.1f} % of the weights masked "
            f"in {kilobytes(name)} instead of {kilobytes('pretrained')}"
        )

    tasks = MaskedTasks(pretrained.eval())
    for name in TASKS:
        tasks.add(name, f"{FOLDER}/{name}.pt")
    same = []
    for name in TASKS:
        with tasks.using(name) as model:
            same.append(torch.equal(model(images), logits[name]))
    assert min(accuracies.values()) > 0.9
    print(f"one model serves {' and '.join(TASKS)} by their masks, with the same logits to the bit: {all(same)}")
