"""What the benchmarks train: ordinary modules and loaders, the same under every strategy."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distopt.models import ImageClassifier


class Toy(pl.LightningModule):
    """A linear layer on single samples: all of a step's time is the framework's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 2)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self.layer(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def toy_data(samples: int) -> DataLoader[Any]:
    """Return a shuffled loader of single random samples."""
    return DataLoader(TensorDataset(torch.randn(samples, 32), torch.randn(samples, 2)), batch_size=1, shuffle=True)


def resnet8(channels: int = 3) -> ImageClassifier:
    """Return ResNet-8 with momentum SGD, which logs its loss at every step."""
    return ImageClassifier("resnet8", model_options={"in_channels": channels}, lr=0.01)


def images(samples: int, side: int, channels: int = 3) -> DataLoader[Any]:
    """Return a shuffled loader of random images in batches of 32."""
    dataset = TensorDataset(torch.randn(samples, channels, side, side), torch.randint(10, (samples,)))
    return DataLoader(dataset, batch_size=32, shuffle=True)
