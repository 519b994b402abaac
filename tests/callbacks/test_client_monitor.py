"""`ClientMonitor`: what it logs, measures, keeps, writes and refuses, and that training does not notice it."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.image
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_distopt import ClientMonitor, FederatedStrategy, LocalSGDStrategy
from lightning_distopt.federated import cohorts
from tests.conformance.problems import QUIET, Augmented, SmallNet
from tests.federated.problem import fit_net, fit_quadratic, run
from tests.federated.test_strategy import SaveAndFail, Stop


def images(size: int = 46) -> tuple[torch.Tensor, torch.Tensor]:
    data = Augmented(size)
    return data.x, data.y


SIZES = [7, 3, 9, 4, 5, 8, 2, 8]
PARTS = [list(range(sum(SIZES[:k]), sum(SIZES[: k + 1]))) for k in range(len(SIZES))]


class Net(SmallNet):
    """Logs metrics of training and of validation that accumulate."""

    def __init__(self) -> None:
        super().__init__("plain")
        self.train_accuracy, self.val_accuracy = MulticlassAccuracy(3), MulticlassAccuracy(3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.train_accuracy(self(batch[0]), batch[1])
        self.log("train_accuracy", self.train_accuracy, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.val_accuracy(self(batch[0]), batch[1])
        self.log("val_accuracy", self.val_accuracy)


def fit(rank: int, world_size: int, monitor: ClientMonitor | None, rounds: int = 4, **options: Any) -> dict[str, Any]:
    torch.manual_seed(3)
    module = Net().double()
    x, y = images()
    x = options.pop("change", lambda x: x)(x)
    train, validation = DataLoader(TensorDataset(x, y), 3, shuffle=True), DataLoader(TensorDataset(*images(30)), 5)
    strategy = {"clients": len(SIZES), "fraction": 0.5, "partition": PARTS, "downlink": "qsgd:8"}  # fewer bytes down than up
    callbacks = [*([] if monitor is None else [monitor]), *options.pop("callbacks", [])]
    result = run(rank, world_size, module, train, strategy, rounds, callbacks, validation=validation, **options)
    module.eval()
    with torch.no_grad():
        right = module(x).argmax(dim=1) == y
        losses = torch.nn.functional.cross_entropy(module(x), y, reduction="none")
    result["accuracy"] = [right[own].double().mean().item() for own in PARTS]
    result["loss"] = [losses[own].mean().item() for own in PARTS]
    return {**result, "history": monitor and monitor.history, "to_target": monitor and monitor.rounds_to_target}


# -------------------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("measure", ["accuracy", "loss"])
def test_training_does_not_notice_it(ranks, world_size, measure):
    plain = ranks.run(world_size, fit, None)
    watched = ranks.run(world_size, fit, ClientMonitor(1, measure, target=0.4))
    for a, b in zip(plain, watched, strict=True):
        assert torch.equal(a["models"], b["models"])
        assert all(torch.equal(x, y) for x, y in zip(a["buffers"], b["buffers"], strict=True))
        assert (a["losses"], a["up"], a["down"], a["global_step"]) == (b["losses"], b["up"], b["down"], b["global_step"])
        assert a["metrics"].items() <= b["metrics"].items()


@pytest.mark.parametrize("workers", [0, 1])
def test_augmented_data_are_the_same_for_any_number_of_ranks(ranks, workers):
    plain = ranks.run(1, fit_net, num_workers=workers)[0]

    def watched(rank: int, world_size: int) -> tuple[dict[str, Any], list[Any]]:
        monitor = ClientMonitor(2)
        result = fit_net(rank, world_size, callbacks=[monitor], num_workers=workers)
        return result, [entry.get("on_clients") for entry in monitor.history]

    (one, values), *_ = ranks.run(1, watched)
    assert torch.equal(one["models"], plain["models"])
    assert [value is None for value in values] == [True, False, True]
    assert len(set(values[1].values())) > 3
    for _, of_rank in ranks.run(2, watched):
        assert of_rank == values


# --------------------------------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_numbers(ranks, world_size):
    for measure in ("accuracy", "loss"):
        results = ranks.run(world_size, fit, ClientMonitor(2, measure))
        for result in results:
            history = result["history"]
            assert [entry["round"] for entry in history] == [1, 2, 3, 4]
            assert [f"client_{measure}" in entry for entry in history] == [False, True, False, True]
            for entry, losses in zip(history, result["losses"], strict=True):
                own = list(losses.values())
                assert entry["losses"] == losses
                assert entry["train_loss"] == pytest.approx(sum(own) / 4, rel=1e-14)
                assert entry["train_loss_std"] == pytest.approx(statistics.pstdev(own), rel=1e-12)
                assert (entry["train_loss_min"], entry["train_loss_max"]) == (min(own), max(own))
                assert (entry["clients"], entry["dropped"]) == (4, 0)
            last, expected = history[-1], result[measure]
            assert list(last["on_clients"]) == list(range(len(SIZES)))
            assert list(last["on_clients"].values()) == pytest.approx(expected, rel=1e-12)
            assert last[f"client_{measure}"] == pytest.approx(sum(expected) / len(SIZES), rel=1e-12)
            assert last[f"client_{measure}_std"] == pytest.approx(statistics.pstdev(expected), rel=1e-10)
            worst = min(expected) if measure == "accuracy" else max(expected)  # the worst of eight
            assert last[f"client_{measure}_worst_decile"] == pytest.approx(worst, rel=1e-12)
            assert (last["bytes_up"], last["bytes_down"]) == (result["up"], result["down"])
            assert history[0]["bytes_up"] == result["up"] / 4
            assert result["up"] > result["down"] > history[0]["bytes_down"]
            assert last["step"] == result["global_step"]
            for name, value in last.items():
                if name not in ("round", "step", "losses", "on_clients", "val_accuracy"):
                    assert result["metrics"][f"federated/{name}"] == value
            assert last["val_accuracy"] == result["metrics"]["val_accuracy"]


class Two(L.LightningModule):
    """Clients with even numbers have another network than the others."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.nn.Flatten()
        self.prototypes = torch.nn.ModuleDict({name: torch.nn.Sequential(flat, torch.nn.Linear(36, 3)) for name in "ab"})
        self.prototype = "a"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.prototypes[self.prototype](x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_each_client_is_measured_with_its_own_prototype(ranks):
    def trained(rank: int, world_size: int) -> tuple[Any, Any, Any]:
        torch.manual_seed(3)
        module, monitor, (x, y) = Two().double(), ClientMonitor(1), images()
        strategy = {"clients": len(SIZES), "fraction": 0.5, "partition": PARTS, "prototypes": "even"}
        result = run(rank, world_size, module, DataLoader(TensorDataset(x, y), 3), strategy, 3, [monitor])
        right = {name: (module.prototypes[name](x).argmax(dim=1) == y).double() for name in "ab"}
        return result, monitor.history, [right["ab"[k % 2]][own].mean().item() for k, own in enumerate(PARTS)]

    for result, history, expected in [*ranks.run(1, trained), *ranks.run(2, trained)]:
        assert list(history[-1]["on_clients"].values()) == pytest.approx(expected, rel=1e-12)
        assert result["metrics"]["federated/client_accuracy"] == pytest.approx(sum(expected) / len(SIZES), rel=1e-12)


def test_a_client_that_fails_is_counted(ranks):
    def spoil(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[PARTS[0] + PARTS[1]] = float("nan")
        return x

    history = ranks.run(1, fit, ClientMonitor(), 5, change=spoil)[0]["history"]
    assert [entry["clients"] + entry["dropped"] for entry in history] == [4] * 5
    assert sum(entry["dropped"] for entry in history) > 0
    assert all(torch.tensor(entry["train_loss_max"]).isfinite() for entry in history)


def test_without_any_good_client_there_is_no_loss(ranks):
    result = ranks.run(1, fit, ClientMonitor(), 1, change=lambda x: x * float("nan"))[0]
    assert "train_loss" not in result["history"][0]
    assert result["metrics"]["federated/dropped"] == 4


# ---------------------------------------------------------------------------------------------------------------- target
@pytest.mark.parametrize(("monitor", "mode"), [("val_accuracy", "max"), ("val_loss", "min"), ("val_loss", "max")])
def test_rounds_to_target(ranks, monitor, mode):
    values = [entry[monitor] for entry in ranks.run(1, fit, ClientMonitor(monitor=monitor))[0]["history"]]
    good = sorted(values, reverse=mode == "max")
    for target in good[:3]:
        came = [k for k, value in enumerate(values, 1) if (value >= target if mode == "max" else value <= target)]
        near = target * (1 - 1e-9 if mode == "max" else 1 + 1e-9)  # two ranks sum up in another order
        for result in ranks.run(2, fit, ClientMonitor(monitor=monitor, mode=mode, target=near)):
            assert result["to_target"] == came[0]
            assert result["metrics"]["federated/rounds_to_target"] == came[0]
    beyond = good[0] + (1 if mode == "max" else -1)
    result = ranks.run(1, fit, ClientMonitor(monitor=monitor, mode=mode, target=beyond))[0]
    assert result["to_target"] is None
    assert "federated/rounds_to_target" not in result["metrics"]


def test_what_it_logs_can_be_monitored():
    stop = EarlyStopping("federated/train_loss", mode="max", patience=1, check_on_train_epoch_end=True)
    assert len(fit(0, 1, ClientMonitor(), 8, callbacks=[stop])["history"]) < 8  # losses fall


# --------------------------------------------------------------------------------------------------------------- resumes
@pytest.mark.parametrize("turns", [2, 6, 9])
def test_history_goes_on_after_a_resume(tmp_path, monkeypatch, turns):
    """From a checkpoint inside a round of six turns, or at its end, before validation."""
    monkeypatch.setattr(cohorts, "STEPS_PER_TURN", 1)
    path = str(tmp_path / "stopped.ckpt")
    whole, resumed = ClientMonitor(1), ClientMonitor(1)
    fit_net(0, 1, callbacks=[whole])
    with pytest.raises(Stop):
        fit_net(0, 1, callbacks=[ClientMonitor(1), SaveAndFail(turns, path)])
    fit_net(0, 1, callbacks=[resumed], ckpt_path=path)
    assert resumed.history == whole.history


# --------------------------------------------------------------------------------------------------------------- writing
def test_files_and_picture(tmp_path):
    monitor = ClientMonitor(2, target=0.3, save=["png", "csv", "json"])
    fit(0, 1, monitor, logger=CSVLogger(tmp_path, name="", version="run"))
    folder = tmp_path / "run"
    height, width, _ = matplotlib.image.imread(folder / "clients.png").shape
    assert width > 3 * height > 900  # four panels
    with open(folder / "clients.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["round"]) for row in rows] == [1, 2, 3, 4]
    assert [float(row["train_loss"]) for row in rows] == [entry["train_loss"] for entry in monitor.history]
    assert [bool(row["client_accuracy"]) for row in rows] == [False, True, False, True]
    content = json.loads((folder / "clients.json").read_text())
    assert (content["target"], content["rounds_to_target"]) == (0.3, monitor.rounds_to_target)
    assert {int(k): v for k, v in content["history"][-1]["on_clients"].items()} == monitor.history[-1]["on_clients"]
    with open(folder / "metrics.csv") as file:
        logged = [float(row["federated/bytes_up"]) for row in csv.DictReader(file) if row["federated/bytes_up"]]
    assert logged == [entry["bytes_up"] for entry in monitor.history]


def test_writes_nothing_unasked_where_there_is_no_logger(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monitor = ClientMonitor()
    fit(0, 1, monitor, 1)
    assert list(Path().iterdir()) == []
    monitor.plot("pictures/clients.png")
    monitor.write("tables/clients.csv")
    assert len(list(Path().rglob("*.*"))) == 2


def test_no_picture_without_matplotlib(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    fit(0, 1, ClientMonitor(), 1, logger=CSVLogger(tmp_path))
    assert not list(tmp_path.rglob("*.png"))


# --------------------------------------------------------------------------------------------------------------- refusal
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"every_n_rounds": -1}, "`every_n_rounds` must be a whole number of rounds, or 0 for never to measure; got -1."),
        ({"every_n_rounds": True}, "got True"),
        ({"measure": "f1"}, "`measure` must be one of 'accuracy', 'loss'; got 'f1'."),
        ({"mode": "up"}, "`mode` must be one of 'max', 'min'; got 'up'."),
        ({"monitor": ""}, "`monitor` must be the name of a validation metric"),
        ({"target": "80%"}, "`target` must be a number that `val_accuracy` is to come to; got '80%'."),
        ({"target": float("nan")}, "got nan"),
        ({"save": "png"}, "`save` must be a list of 'png', 'csv', 'json'; got 'png'."),
        ({"save": ["pdf"]}, "got ['pdf']"),
    ],
)
def test_options(options, sentence):
    with pytest.raises(ValueError) as caught:
        ClientMonitor(**options)
    assert sentence in str(caught.value)


def test_another_strategy():
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_checkpointing": False, **QUIET}
    trainer = L.Trainer(strategy=LocalSGDStrategy(), callbacks=[ClientMonitor()], **options)
    with pytest.raises(MisconfigurationException, match="the strategy is LocalSGDStrategy: use `Trainer"):
        trainer.fit(Net(), DataLoader(TensorDataset(*images()), 3))


def test_a_target_without_validation():
    with pytest.raises(MisconfigurationException, match="there is no validation"):
        fit_net(0, 1, callbacks=[ClientMonitor(target=0.5)])


def test_a_target_for_a_metric_that_nobody_logs():
    with pytest.raises(MisconfigurationException, match=r"let `monitor` be one that is \(.*`val_accuracy`"):
        fit(0, 1, ClientMonitor(monitor="val_acuracy", target=0.5))


def test_data_without_classes_are_refused_before_training():
    monitor = ClientMonitor(every_n_rounds=5)
    with pytest.raises(MisconfigurationException, match="can't tell the accuracy on this data"):
        fit_quadratic(0, 1, callbacks=[monitor])
    assert monitor.history == []


def test_evaluation_with_a_checkpoint_leaves_the_history_of_training(tmp_path: Path) -> None:
    monitor, saver = ClientMonitor(), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    strategy = FederatedStrategy(clients=4, fraction=0.5)
    trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=1, max_epochs=3, callbacks=[monitor, saver], **QUIET)
    module, data = Net(), DataLoader(TensorDataset(*(t.float() if t.is_floating_point() else t for t in images())), 3)
    trainer.fit(module, data, data)
    assert len(monitor.history) == 3
    trainer.validate(module, data, ckpt_path=str(tmp_path / "epoch=0.ckpt"), verbose=False)
    assert len(monitor.history) == 3
