"""`replica_parameters`, `average_parameters`, `traffic`, evaluation and what is left after training."""

from __future__ import annotations

import os

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry
from torch.utils.data import DataLoader

import lightning_distopt
from lightning_distopt import LocalSGDStrategy
from tests.conformance.cases import CASES
from tests.conformance.problems import LAYOUTS, QUIET, Augmented, SmallNet, fit_net

LOCAL = next(case for case in CASES if case.name == "local_sgd")


class Look(L.Callback):
    """In the middle of a round: what the public names show."""

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step != 4:
            return
        strategy = trainer.strategy
        rows = strategy.replica_parameters()
        own = torch.cat([p.detach().reshape(-1) for p in module.parameters() if p.requires_grad])
        everyone = strategy.all_gather(rows).reshape(-1, rows.shape[1])
        with strategy.average_parameters():
            shown = torch.cat([p.detach().reshape(-1) for p in module.parameters() if p.requires_grad])
            with strategy.average_parameters():  # entering again changes nothing
                again = module.head.bias.detach().clone()
            inside = strategy.replica_parameters()
            torch.rand(3)  # does not disturb training
        with pytest.raises(ZeroDivisionError), strategy.average_parameters():
            _ = 1 / 0
        self.found = {
            "n": strategy.num_replicas,
            "rows": rows,
            "own": own,
            "mean": everyone.mean(dim=0),
            "shown": shown,
            "again": again,
            "inside": inside,
            "after": torch.cat([p.detach().reshape(-1) for p in module.parameters() if p.requires_grad]),
            "spread": (everyone - everyone.mean(dim=0)).norm().item(),
        }
        rows.zero_()  # a copy: training does not notice


def look(rank, world_size, m):
    look = Look()
    result = fit_net(rank, world_size, m, LOCAL, callbacks=(look,), max_epochs=1)
    return look.found, result["rows"]


@pytest.mark.parametrize("layout", LAYOUTS[4], ids=str)
def test_in_the_middle_of_a_round(ranks, layout):
    m, world_size = layout
    undisturbed = ranks.run(world_size, fit_net, m, LOCAL, max_epochs=1)
    for (found, rows), without in zip(ranks.run(world_size, look, m), undisturbed, strict=True):
        assert found["n"] == 4
        assert found["rows"].shape == (m, sum(p.numel() for p in SmallNet().parameters() if p.requires_grad))
        assert found["spread"] > 0.01
        torch.testing.assert_close(found["own"], found["inside"][0], rtol=0, atol=0)
        torch.testing.assert_close(found["shown"], found["mean"], rtol=0, atol=1e-12)
        torch.testing.assert_close(found["again"], found["shown"][-3:], rtol=0, atol=0)
        torch.testing.assert_close(found["after"], found["own"], rtol=0, atol=0)
        torch.testing.assert_close(rows, without["rows"], rtol=0, atol=0)


def evaluated(rank, world_size, m, evaluate):
    class Shown(L.Callback):
        def on_validation_batch_start(self, trainer, module, *args):
            self.bias = module.head.bias.detach().clone()
            self.rows = trainer.strategy.replica_parameters()[:, -3:]

    shown = Shown()
    data = DataLoader(Augmented(), batch_size=10)
    options = {"max_epochs": 1, "limit_train_batches": 4, "strategy": {"evaluate": evaluate}}
    fit_net(rank, world_size, m, LOCAL, callbacks=(shown,), val_loader=data, **options)
    return shown.bias, shown.rows


@pytest.mark.parametrize("layout", LAYOUTS[4], ids=str)
@pytest.mark.parametrize("evaluate", ["average", "local"])
def test_what_validation_sees(ranks, layout, evaluate):
    m, world_size = layout
    results = ranks.run(world_size, evaluated, m, evaluate)
    rows = torch.cat([rows for _, rows in results])
    for bias, own in results:
        expected = rows.mean(dim=0) if evaluate == "average" else own[0]
        torch.testing.assert_close(bias, expected, rtol=0, atol=1e-12)


def test_validation_does_not_change_training(ranks):
    data = DataLoader(Augmented(), batch_size=10, shuffle=True)
    with_it = fit_net(0, 1, 3, LOCAL, val_loader=data, val_check_interval=2)
    without = fit_net(0, 1, 3, LOCAL)
    torch.testing.assert_close(with_it["rows"], without["rows"], rtol=0, atol=0)


def test_names_that_need_training():
    strategy = LocalSGDStrategy()
    with pytest.raises(RuntimeError, match=r"only while `trainer\.fit` runs"):
        strategy.replica_parameters()
    assert strategy.traffic.bytes_sent == 0


def test_registered_names_and_sorted_exports():
    for ending in ("", "_fork", "_spawn", "_notebook"):
        assert f"local_sgd{ending}" in StrategyRegistry.available_strategies()
    assert lightning_distopt.__all__ == sorted(lightning_distopt.__all__)
    assert all(hasattr(lightning_distopt, name) for name in lightning_distopt.__all__)


def test_after_training_parameters_have_storage_of_their_own():
    torch.manual_seed(0)
    module = SmallNet()
    trainer = L.Trainer(
        accelerator="cpu", strategy=LocalSGDStrategy(3, replicas_per_device=4), max_steps=4, enable_checkpointing=False, **QUIET
    )
    data = DataLoader(Augmented(dtype=torch.float32), batch_size=3)
    trainer.fit(module, data)
    for parameter in module.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4
    assert module.hidden.weight is module.tied.weight
    assert module.conv.weight.is_contiguous(memory_format=torch.channels_last)
    trainer.fit(module, data)  # a strategy can be used again
    assert trainer.strategy.traffic.rounds == 0 or trainer.global_step == 4


def test_a_single_process_leaves_the_environment_alone():
    before = dict(os.environ)
    module = SmallNet()
    trainer = L.Trainer(accelerator="cpu", devices=1, strategy="local_sgd", max_steps=2, enable_checkpointing=False, **QUIET)
    assert trainer.strategy.launcher is None
    trainer.fit(module, DataLoader(Augmented(dtype=torch.float32), batch_size=3))
    ours = {"LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    assert {name for name in os.environ if name in ours and name not in before} == set()


class Manual(SmallNet):
    """A module that steps by itself."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def manual(rank, world_size, case):
    from tests.conformance.problems import fit

    torch.manual_seed(1)
    loader = DataLoader(Augmented(), batch_size=3)
    return fit(rank, world_size, 1, case, Manual(), loader, precision="64-true", max_epochs=1)


@pytest.mark.parametrize("name", ["local_sgd", "minibatch_sgd"])
def test_manual_optimization_averages_after_training_step(ranks, name):
    results = ranks.run(2, manual, next(case for case in CASES if case.name == name))
    rows = torch.cat([result["rows"] for result in results], dim=1)
    spread = (rows[:, 0] - rows[:, 1]).abs().amax(dim=1)
    period = 3 if name == "local_sgd" else 1
    assert [k for k, s in enumerate(spread.tolist()) if s == 0] == list(range(period - 1, len(spread), period))
