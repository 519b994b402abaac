"""`buffers="recalibrate"`: the statistics of the average model are those of the last training batches of all replicas."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_distopt import LocalSGDStrategy
from lightning_distopt.strategies.recalibration import BATCHES, Recalibration
from tests.conformance.problems import QUIET

N, STEPS, SIZE = 2, 12, 5


class Normed(L.LightningModule):
    """The first layer is the norm, so its statistics do not depend on any weight."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer = torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)
        self.seen, self.logged = [], 0

    def training_step(self, batch, batch_idx):
        loss = self.layer(self.norm(batch[0])).pow(2).mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.seen.append((self.norm.running_mean.clone(), self.norm.running_var.clone(), self.norm.training))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_statistics_are_those_of_the_last_batches():
    torch.manual_seed(0)
    x = torch.randn(N * STEPS * SIZE, 3) * torch.tensor([1.0, 2.0, 3.0]) + torch.arange(3.0)
    module = Normed()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=LocalSGDStrategy(4, replicas_per_device=N, buffers="recalibrate", partition="fixed"),
        max_epochs=1,
        enable_checkpointing=False,
        **QUIET,
    )
    data = TensorDataset(x)
    trainer.fit(module, DataLoader(data, batch_size=SIZE), DataLoader(data, batch_size=60))

    batches = torch.stack([x[i::N].view(STEPS, SIZE, 3)[-BATCHES:] for i in range(N)])  # [n, 8, 5, 3]
    for mean, var, training in module.seen:
        torch.testing.assert_close(mean, batches.mean(dim=2).mean(dim=(0, 1)))
        torch.testing.assert_close(var, batches.var(dim=2).mean(dim=(0, 1)))
        assert not training
    # What the module is left with is estimated too; logging was muted, modes and momentum are as before.
    torch.testing.assert_close(module.norm.running_mean, module.seen[-1][0])
    assert module.norm.momentum == 0.1
    assert "log" not in vars(module)
    assert torch.isfinite(trainer.callback_metrics["loss_epoch"])


def train(max_steps, *callbacks, ckpt_path=None, mean=0.0, **options):
    torch.manual_seed(0)
    module, data = Normed(), TensorDataset(torch.randn(N * STEPS * SIZE, 3) + torch.arange(3.0))
    module.norm.running_mean.fill_(mean)
    strategy = LocalSGDStrategy(4, replicas_per_device=N, buffers="recalibrate", partition="fixed")
    settings = {**QUIET, "enable_checkpointing": bool(callbacks), "callbacks": list(callbacks), **options}
    trainer = L.Trainer(accelerator="cpu", devices=1, strategy=strategy, max_steps=max_steps, **settings)
    trainer.fit(module, DataLoader(data, batch_size=SIZE), DataLoader(data, batch_size=60), ckpt_path=ckpt_path)
    return module


def test_a_resume_remembers_the_batches(tmp_path):
    train(6, ModelCheckpoint(tmp_path, "five", every_n_train_steps=5))
    whole, resumed = train(6), train(6, ckpt_path=str(tmp_path / "five.ckpt"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_before_the_first_batch_statistics_stay():
    module = train(1, mean=5.0, num_sanity_val_steps=1)
    assert module.seen[0][0].tolist() == [5.0] * 3


def test_batches_that_a_checkpoint_cannot_hold_are_left_out():
    recalibration = Recalibration()
    recalibration.remember(1, ([{"x": torch.ones(2)}, "text", None], 3), {})
    recalibration.remember(1, (torch.ones(2), object()), {})
    (batch,) = recalibration.state_dict()[1]
    resumed = Recalibration()
    resumed.load_state_dict({1: [batch]}, torch.device("cpu"))
    (args, kwargs) = resumed._batches[1][0]
    assert torch.equal(args[0][0]["x"], torch.ones(2))
    assert (args[0][1:], args[1], kwargs) == (["text", None], 3, {})
