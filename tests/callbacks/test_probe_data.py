"""What is measured: the loss and the metrics that are derived from a module's own steps."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_distopt.callbacks.probe_data import DerivedLoss, derive_metrics


class Module(L.LightningModule):
    """Logs in all the ways that there are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.collection = MetricCollection({"own": MulticlassAccuracy(3, average="micro")}, prefix="val_")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
        self.log("loss", loss)
        self.log_dict({"twice": 2 * loss})
        return {"loss": loss, "more": 1}

    def validation_step(self, batch: Any) -> None:
        outputs = self.layer(batch[0])
        self.accuracy.update(outputs, batch[1])
        self.collection.update(outputs, batch[1])
        self.log("val_loss", 7.0)
        self.log("val_accuracy", self.accuracy, on_epoch=True)
        self.log_dict(self.collection)
        self.log_dict({"valid/half": 0.5, "validation.one": torch.ones(1), "vector": torch.ones(2), "word": "no number"})


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])


def test_the_loss_of_the_training_step(batch):
    """It is not attached to a trainer, so that logging would fail."""
    module = Module()
    loss = DerivedLoss(module)(module, batch)
    assert torch.equal(loss, nn.functional.cross_entropy(module.layer(batch[0]), batch[1]))
    assert loss.requires_grad
    assert "log" not in vars(module)


def test_logging_of_one_s_own_stays(batch):
    module, seen = Module(), []
    vars(module)["log"] = lambda *args, **kwargs: seen.append(args)
    own = vars(module)["log"]
    DerivedLoss(module)(module, batch)
    assert (vars(module)["log"], seen) == (own, [])


def test_the_metrics_of_the_validation_step(batch):
    module = Module()
    module.accuracy.update(torch.eye(3), torch.tensor([1, 2, 0]))  # of another batch, which counts for nothing
    metrics = derive_metrics(module)
    assert metrics is not None
    right = float((module.layer(batch[0]).argmax(dim=1) == batch[1]).double().mean())
    values = {name: float(value) for name, value in metrics(module, batch).items()}
    assert values == pytest.approx({"accuracy": right, "own": right, "half": 0.5, "one": 1.0})


def test_no_metrics_without_a_validation_step():
    assert derive_metrics(L.LightningModule()) is None


def test_manual_optimization():
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="takes steps by itself"):
        DerivedLoss(module)
