"""`evaluate="both"`: the average model is validated as ever, and the mean of the replicas' own metrics stands beside it."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_distopt import LocalSGDStrategy
from lightning_distopt.strategies import _lightning as private
from tests.conformance.cases import CASES
from tests.conformance.problems import LAYOUTS, QUIET, Augmented, SmallNet, fit

BY_NAME = {case.name: case for case in CASES}
LOCAL, GOSSIP = BY_NAME["local_sgd"], BY_NAME["dsgd"]


class Net(SmallNet):
    """Logs in all the ways there are, and draws random numbers while it validates."""

    def __init__(self):
        super().__init__()
        self.accuracies = nn.ModuleList([MulticlassAccuracy(3, average="micro") for _ in range(2)])  # one for each loader
        self.seen, self.outputs, self.own = [], [], []

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        logits = self(x) + 1e-6 * torch.randn(())
        self.accuracies[dataloader_idx](logits, y)
        self.log("val_accuracy", self.accuracies[dataloader_idx], prog_bar=True)
        self.log("val_loss", nn.functional.cross_entropy(logits, y), sync_dist=True, on_step=True, on_epoch=True)
        self.log("quiet", logits.detach().pow(2).mean(), logger=False)
        self.outputs.append(logits.detach())

    def on_validation_epoch_end(self):
        self.log("at_end", torch.cat(self.outputs).mean())
        self.own.append(len(self.outputs))
        self.outputs.clear()


class Lines(Logger):
    """Keeps what is logged."""

    name, version = "lines", 0

    def __init__(self):
        super().__init__()
        self.lines = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.lines.append({"step": step, **metrics})


class Counts(L.Callback):
    """Notes the hooks that validation calls, with what is there to be monitored at its end."""

    def __init__(self):
        self.hooks, self.monitored, self.rows, self.loops = [], [], [], []

    def on_validation_start(self, trainer, *args):
        self.hooks.append("start")
        if not trainer.sanity_checking:
            self.rows.append(trainer.strategy.replica_parameters())

    def on_validation_batch_end(self, *args):
        self.hooks.append("batch")

    def on_validation_epoch_end(self, trainer, *args):
        self.hooks.append("epoch end")

    def on_validation_end(self, trainer, *args):
        self.hooks.append("end")
        self.monitored.append({key: float(value) for key, value in trainer.callback_metrics.items()})
        self.loops.append(trainer.fit_loop.epoch_loop.val_loop.state_dict())


def data(size=70):
    images = Augmented(size)
    return TensorDataset(images.x, images.y)  # always the same


def train(rank, world_size, m, evaluate, case=LOCAL, several=False, shuffle=False, module=Net, **options):
    torch.manual_seed(1)
    counts, lines, net = Counts(), Lines(), module()
    loaders = [DataLoader(data(20), batch_size=5, shuffle=shuffle), DataLoader(data(7), batch_size=4)]
    options = {"max_epochs": 2, "precision": "64-true", "num_sanity_val_steps": 2, "logger": lines, **options}
    callbacks = (counts, *options.pop("callbacks", ()))
    loader = DataLoader(Augmented(), batch_size=3, shuffle=True)
    val = loaders if several else loaders[0]
    strategy = {"evaluate": evaluate, **options.pop("strategy", {})}
    result = fit(rank, world_size, m, case, net, loader, val_loader=val, callbacks=callbacks, strategy=strategy, **options)
    return {**result, **vars(counts), "lines": lines.lines, "own": net.own, "module": net}


def only_average(metrics):
    return {key: value for key, value in metrics.items() if "_local" not in key}


# ----------------------------------------------------------------------------------------------- training does not notice
@pytest.mark.parametrize("layout", [(1, 1), *LAYOUTS[4]], ids=str)
@pytest.mark.parametrize("several", [False, True], ids=["one loader", "two loaders"])
def test_all_else_is_as_without(ranks, layout, several):
    m, world_size = layout
    options = {"several": several, "shuffle": True, "val_check_interval": 2, "log_every_n_steps": 1}
    both = ranks.run(world_size, train, m, "both", **options)
    average = ranks.run(world_size, train, m, "average", **options)
    for one, other in zip(both, average, strict=True):
        torch.testing.assert_close(one["rows"], other["rows"], rtol=0, atol=0)
        torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=0)
        assert one["hooks"] == other["hooks"]
        assert one["loops"] == other["loops"]
        assert one["global_step"] == other["global_step"]
        assert [only_average(line) for line in one["monitored"]] == other["monitored"]
        assert [only_average(line) for line in one["lines"]] == other["lines"]
        assert one["traffic"]["bytes_sent"] == other["traffic"]["bytes_sent"]
        if m * world_size == 4:  # sanity check; then six validations of every row and of the average, and no step left over
            batches = other["own"][-1]
            assert one["own"][1:] == [batches] * 6 * (m + 1)


def expected(module, rows, several):
    """Return the mean over rows of the metrics of each, from the parameters alone."""
    loaders = [data(20), data(7)] if several else [data(20)]
    results = []
    parameters = [p for p in module.parameters() if p.requires_grad]
    module.eval()
    for row in rows:
        nn.utils.vector_to_parameters(row, parameters)
        with torch.no_grad():
            logits = [module(of.tensors[0]) for of in loaders]
        result = {}
        for k, (of, scores) in enumerate(zip(loaders, logits, strict=True)):
            suffix = f"/dataloader_idx_{k}" if several else ""
            y = of.tensors[1]
            result[f"val_accuracy_local{suffix}"] = (scores.argmax(dim=1) == y).double().mean()
            result[f"val_loss_local{suffix}"] = nn.functional.cross_entropy(scores, y)
            result[f"val_loss_epoch_local{suffix}"] = result[f"val_loss_local{suffix}"]
            result[f"quiet_local{suffix}"] = scores.pow(2).mean()
        result["at_end_local"] = torch.cat(logits).mean()
        results.append(result)
    return {key: float(torch.stack([result[key] for result in results]).mean()) for key in results[0]}


class WithoutBatchNorm(Net):
    """Its parameters say all."""

    def __init__(self):
        super().__init__()
        self.norm = nn.Identity()


@pytest.mark.parametrize("case", [LOCAL, GOSSIP], ids=str)
@pytest.mark.parametrize("several", [False, True], ids=["one loader", "two loaders"])
def test_the_mean_over_replicas(case, several):
    """All replicas in one process see all validation data."""
    result = train(0, 1, 4, "both", case, several, module=WithoutBatchNorm, callbacks=(Rows(),))
    for rows, monitored in zip(Rows.seen, result["monitored"][1:], strict=True):
        metrics = expected(result["module"], rows, several)
        assert {key for key in monitored if "_local" in key} == set(metrics)
        for key, value in metrics.items():
            assert monitored[key] == pytest.approx(value, rel=1e-4, abs=1e-5)  # 1e-6 of noise, and single-precision logs
    assert monitored["val_loss_local" + several * "/dataloader_idx_0"] != monitored["val_loss" + several * "/dataloader_idx_0"]


class Rows(L.Callback):
    seen: list[torch.Tensor]

    def on_fit_start(self, *args):
        Rows.seen = []

    def on_validation_start(self, trainer, *args):
        if not trainer.sanity_checking:
            Rows.seen.append(trainer.strategy.replica_parameters())


def test_the_mean_over_ranks(ranks):
    """Each rank validates its replicas on its part of the data, and all ranks log the mean over all."""
    for m, world_size in LAYOUTS[4][1:]:
        both = ranks.run(world_size, train, m, "both")
        for result in both:
            for monitored, first in zip(result["monitored"], both[0]["monitored"], strict=True):
                assert {k: v for k, v in monitored.items() if "_local" in k} == {
                    k: v for k, v in first.items() if "_local" in k
                }
    # One replica on each rank: its metrics are those of evaluate="local".
    local = ranks.run(4, train, 1, "local")
    for k in (1, 2):
        for name in ("quiet", "at_end", "val_loss"):
            mean = sum(result["monitored"][k][name] for result in local) / 4
            assert both[0]["monitored"][k][f"{name}_local"] == pytest.approx(mean, rel=1e-6)


def test_where_it_is_logged():
    result = train(0, 1, 2, "both", log_every_n_steps=100)
    lines = [line for line in result["lines"] if "val_accuracy" in line]
    assert len(lines) == 2
    for line in lines:  # one line for both, at the same step
        assert {key for key in line if "_local" in key} == {"val_accuracy_local", "val_loss_epoch_local", "at_end_local"}
    assert "quiet_local" in result["metrics"]
    assert len([line for line in result["lines"] if "val_loss_step" in line]) == 2 * 4  # of the average alone


def test_the_progress_bar_shows_what_it_shows_of_the_average():
    shown = {}

    class Bar(L.Callback):
        def on_validation_end(self, trainer, *args):
            shown.update(trainer.progress_bar_metrics)

    train(0, 1, 2, "both", callbacks=(Bar(),))
    assert {key for key in shown if "val" in key} == {"val_accuracy", "val_accuracy_local"}
    assert isinstance(shown["val_accuracy_local"], float)


def test_one_replica_is_its_own_average():
    result = train(0, 1, 1, "both", several=True)
    final = result["monitored"][-1]
    for key in ("val_accuracy", "val_loss", "quiet"):
        for k in (0, 1):
            assert final[f"{key}_local/dataloader_idx_{k}"] == pytest.approx(final[f"{key}/dataloader_idx_{k}"], rel=1e-6)
    assert len(result["own"]) == 3  # the sanity check, and two epochs: nothing is done twice


# ------------------------------------------------------------------------------------------------- callbacks that monitor
def test_checkpoints_and_early_stopping_can_monitor_it(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{val_loss_local:.5f}", monitor="val_loss_local", save_top_k=1)
    stopping = EarlyStopping("val_accuracy_local", mode="max", patience=1, min_delta=2.0)  # which nothing reaches
    result = train(0, 1, 2, "both", callbacks=(saver, stopping), max_epochs=5, enable_checkpointing=True)
    values = [line["val_loss_local"] for line in result["monitored"][1:]]
    assert len(values) == 2
    assert float(saver.best_model_score) == pytest.approx(min(values))
    assert [path.name for path in tmp_path.glob("*.ckpt")] == [f"val_loss_local={min(values):.5f}.ckpt"]


def resumed(rank, world_size, m, folder):
    whole = train(rank, world_size, m, "both", GOSSIP, val_check_interval=2, max_epochs=3)
    # It saves right after a validation, in the middle of an epoch.
    saver = ModelCheckpoint(dirpath=folder, filename="at", every_n_train_steps=10)
    options = {"enable_checkpointing": True, "val_check_interval": 2}
    train(rank, world_size, m, "both", GOSSIP, callbacks=(saver,), max_steps=10, **options)
    rest = train(rank, world_size, m, "both", GOSSIP, val_check_interval=2, max_epochs=3, ckpt_path=f"{folder}/at.ckpt", seed=9)
    return whole, rest


@pytest.mark.parametrize("layout", LAYOUTS[4][:2], ids=str)
def test_resume(ranks, tmp_path, layout):
    m, world_size = layout
    for whole, rest in ranks.run(world_size, resumed, m, str(tmp_path), timeout=90):
        torch.testing.assert_close(rest["rows"], whole["rows"][-len(rest["rows"]) :], rtol=0, atol=0)
        torch.testing.assert_close(rest["state"], whole["state"], rtol=0, atol=0)
        assert rest["monitored"][-1] == whole["monitored"][-1]
        assert rest["loops"][-1] == whole["loops"][-1]


# ---------------------------------------------------------------------------------------------------------------- failures
def test_all_is_put_back_when_a_replica_fails():
    class Fails(Net):
        def validation_step(self, batch, batch_idx):
            if not self.trainer.sanity_checking:
                assert self.trainer.callbacks == []
                assert self.logger is not None
                self.logger.experiment.add_image("x", 1)  # goes nowhere
                self.logger.log_image("x", 1)
                raise ZeroDivisionError
            super().validation_step(batch, batch_idx)

    lines, counts = Lines(), Counts()
    strategy = LocalSGDStrategy(2, replicas_per_device=2, evaluate="both")
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_checkpointing": False, "limit_train_batches": 2}
    options |= {**QUIET, "logger": lines, "num_sanity_val_steps": 1, "precision": "64-true"}
    trainer = L.Trainer(strategy=strategy, callbacks=[counts], **options)
    callbacks, connector = list(trainer.callbacks), vars(trainer._logger_connector).keys()
    names = set(connector)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(Fails(), DataLoader(Augmented(), batch_size=3), DataLoader(data(8), batch_size=4))
    assert trainer.callbacks == callbacks
    assert trainer.loggers == [lines]
    assert set(connector) == names  # nothing of ours is left
    assert counts.hooks == ["start", "batch", "epoch end", "end"]  # the sanity check


def test_no_validation():
    for limit in (0, 1.0):
        options = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "enable_checkpointing": False,
            "limit_val_batches": limit,
        }
        strategy = LocalSGDStrategy(2, replicas_per_device=2, evaluate="both")
        trainer = L.Trainer(strategy=strategy, **options, **QUIET)
        trainer.fit(SmallNet(), DataLoader(Augmented(dtype=torch.float32), batch_size=3))
        assert trainer.global_step == 12
        assert not any("_local" in key for key in trainer.callback_metrics)


@pytest.mark.parametrize("name", sorted(private.LOCAL_METRICS))
def test_an_unknown_lightning(monkeypatch, name):
    names = [(path, other) if other != name else (path, f"{name}_renamed") for path, other in private.PRIVATE_NAMES]
    monkeypatch.setattr(private.names, "PRIVATE_NAMES", names)
    monkeypatch.setattr(private.names, "LOCAL_METRICS", {f"{name}_renamed"})
    options = {"accelerator": "cpu", "devices": 1, "max_steps": 1, "enable_checkpointing": False, **QUIET}
    loader = DataLoader(Augmented(dtype=torch.float32), batch_size=3)
    trainer = L.Trainer(strategy=LocalSGDStrategy(2, evaluate="both"), **options)
    with pytest.raises(MisconfigurationException, match=f"lacks `{name}_renamed`, which `evaluate='both'` needs"):
        trainer.fit(SmallNet(), loader)
    trainer = L.Trainer(strategy=LocalSGDStrategy(2), **options)
    trainer.fit(SmallNet(), loader)
    assert trainer.global_step == 1
