"""A LightningModule that is one of several image classifiers."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torchmetrics.classification import MulticlassAccuracy

from lightning_distopt.models.classifier import parameter_groups
from lightning_distopt.models.hyperparameters import keep_hyperparameters
from lightning_distopt.models.registry import build_model

__all__ = ["PrototypeClassifier"]


class PrototypeClassifier(LightningModule):
    """Several networks for the same classes, for clients that do not all have the same one.

    It is the network that `prototype` names, which `FederatedStrategy(prototypes=...)` changes from client to client; training
    is by cross entropy and SGD with a constant learning rate. It logs `train_loss`, and at the end of evaluation epochs
    `val_accuracy_<name>` of every network and `val_accuracy` of their ensemble, by the mean of their logits; in tests
    `test_accuracy_<name>` and `test_accuracy`.

    Example:
        >>> module = PrototypeClassifier({"small": "resnet8", "large": "resnet20"}, {"in_channels": 1}, lr=0.1)
        >>> module.prototype
        'small'
        >>> module.prototype = "large"
        >>> module(torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 10])

    Args:
        networks: by name, each a name that `build_model` knows, or a network mapping `[B, ...]` to logits `[B, num_classes]`.
            The first one is active at first.
        network_options: arguments for the networks given by name, such as `{"in_channels": 1}`.
        num_classes: number of classes.
        lr: learning rate.
        momentum: momentum of SGD.
        weight_decay: L2 coefficient, on every parameter but biases and the parameters of norm layers.

    Attributes:
        prototypes: the networks, an `nn.ModuleDict`.
        prototype: the name of the active one.

    Raises:
        ValueError: if there is no network.
    """

    def __init__(
        self,
        networks: dict[str, str | nn.Module],
        network_options: dict[str, Any] | None = None,
        num_classes: int = 10,
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        if not networks:
            raise ValueError('networks is empty; name at least one, as in {"small": "resnet8"}.')
        keep_hyperparameters(self, ignore=[] if all(isinstance(n, str) for n in networks.values()) else ["networks"])
        options = {"num_classes": num_classes} | (network_options or {})
        made = {name: build_model(n, **options) if isinstance(n, str) else n for name, n in networks.items()}
        self.prototypes = nn.ModuleDict(made)
        self.prototype = next(iter(made))
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        for stage in ("val", "test"):
            for name in ("", *made):
                setattr(self, _metric(stage, name), MulticlassAccuracy(num_classes, average="micro"))

    def forward(self, images: Tensor) -> Tensor:
        """Map images to the logits `[B, num_classes]` of the active network."""
        return cast(Tensor, self.prototypes[self.prototype](images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross entropy of a batch `(images, labels)`."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Update the accuracies of all networks and of their ensemble."""
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Update the accuracies of all networks and of their ensemble."""
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        logits = {name: network(images) for name, network in self.prototypes.items()}
        logits[""] = torch.stack(list(logits.values())).mean(dim=0)
        for name, values in logits.items():
            metric = getattr(self, _metric(stage, name))
            metric(values, labels)
            self.log(_metric(stage, name), metric, batch_size=len(labels), prog_bar=not name)

    def configure_optimizers(self) -> Optimizer:
        """Return SGD for the parameters of all networks."""
        groups = parameter_groups(self.prototypes, self.weight_decay)
        return SGD(groups, lr=self.lr, momentum=self.momentum)


def _metric(stage: str, name: str) -> str:
    return f"{stage}_accuracy_{name}" if name else f"{stage}_accuracy"
