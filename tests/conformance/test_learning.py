"""Battery 7: every algorithm learns the embedded digits, from a fixed seed and with a wide margin."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch

from lightning_distopt.data import DigitsDataModule
from lightning_distopt.models import ImageClassifier
from tests.conformance.cases import CASES
from tests.conformance.problems import QUIET


class AdamClassifier(ImageClassifier):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_learns_digits(case):
    warnings.filterwarnings("ignore")
    L.seed_everything(3, verbose=False)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=case.strategy(replicas_per_device=4),
        callbacks=case.callbacks(),
        max_epochs=6,
        enable_checkpointing=False,
        **QUIET,
    )
    data = DigitsDataModule(batch_size=16)
    module = (AdamClassifier if case.takes == "adam" else ImageClassifier)(
        model, lr=0.1, schedule=[4] if case.decays else "constant", momentum=0.0 if case.takes == "sgd" else 0.9
    )
    trainer.fit(module, datamodule=data)
    validated = trainer.callback_metrics["val_accuracy"].item()
    tested = trainer.test(module, datamodule=data, verbose=False)[0]["test_accuracy"]
    assert validated == pytest.approx(tested, abs=1e-6)  # the module that is left is the average that was validated
    assert tested > case.learns
