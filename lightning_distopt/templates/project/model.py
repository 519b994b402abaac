"""The model. Your own goes here: any LightningModule, as you would train it on one device."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn


class Classifier(L.LightningModule):
    """One hidden layer between images of 8x8 pixels and ten classes. Nothing in it knows about replicas.

    Args:
        hidden: Width of the hidden layer.
        lr: Learning rate.
        momentum: Of the optimizer; every replica has its own.
    """

    def __init__(self, hidden: int = 128, lr: float = 0.05, momentum: float = 0.9) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.momentum = lr, momentum
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Return a value for each class."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the share of images that are classified right."""
        x, y = batch
        self.log("val_accuracy", (self(x).argmax(dim=1) == y).float().mean(), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer that each replica steps with."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)
