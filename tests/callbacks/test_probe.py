"""`Probe`: training does not notice it, its numbers are the same on any number of ranks, and what it says when it can't."""

from __future__ import annotations

import csv
import gc
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.image
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_distopt import DynamicPruning, FederatedStrategy, GossipStrategy, LocalSGDStrategy
from lightning_distopt.analysis import History
from lightning_distopt.analysis.batch_norm import batch_norm_statistics
from lightning_distopt.analysis.objective import Objective
from lightning_distopt.callbacks.series import SeriesProbe
from tests.conformance.problems import Augmented
from tests.probes import MOMENTS, EveryBatch, Net, Numbers, SmallProbe, WithoutMetrics, difference, disturbance, fit, images

QUIETLY: dict[str, Any] = {"save": [], "progress": False}


def probe(every: Any = "epoch", kind: type[SmallProbe] = SmallProbe, **options: Any) -> SmallProbe:
    return kind(every, **{**QUIETLY, **options})


# ----------------------------------------------------------------------------------------------------- nothing is changed
def federated(m: int = 1) -> FederatedStrategy:
    return FederatedStrategy(clients=4, fraction=0.5, partition="iid", replicas_per_device=m)


SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "accumulation": (1, {"accumulate_grad_batches": 3}),
    "bf16": (1, {"precision": "bf16-mixed"}),
    "workers": (1, {"workers": 1, "max_epochs": 1}),
    "ddp": (2, {"strategy": "ddp_find_unused_parameters_true"}),
    "local": (2, {"strategy": lambda: LocalSGDStrategy(2)}),
    "local_accumulation": (1, {"strategy": lambda: LocalSGDStrategy(2, replicas_per_device=2), "accumulate_grad_batches": 2}),
    "gossip": (2, {"strategy": lambda: GossipStrategy("choco", topology="ring")}),
    "gossip_here": (1, {"strategy": lambda: GossipStrategy("dsgd", replicas_per_device=2)}),
    "recalibrated": (
        1,
        {"strategy": lambda: LocalSGDStrategy(2, replicas_per_device=2, buffers="recalibrate")},
    ),
    "federated": (2, {"strategy": federated, "val_check_interval": 1.0}),
    "federated_here": (1, {"strategy": lambda: federated(2), "val_check_interval": 1.0, "module": WithoutMetrics}),
    "pruned": (1, {"callbacks": lambda: [DynamicPruning(0.5, period=2, layers=["conv"])]}),
}


def twice(rank: int, world: int, folder: Path, setting: str, model: str = "average") -> tuple[str, int, int]:
    """Train without probes and with, and return where they differ, and how often was measured after how many batches."""
    options = dict(SETTINGS[setting][1])
    callbacks = options.pop("callbacks", list)
    moments = [moment for moment in MOMENTS if moment != "validation"] if model == "local" else MOMENTS
    without = fit(rank, world, folder=folder, callbacks=callbacks(), **options)
    attached = probe(moments, EveryBatch, data=["train", "val"], samples=5, check=False, model=model)
    watched = fit(rank, world, probes=[attached], folder=folder, callbacks=callbacks(), **options)
    return disturbance(without, watched), len(attached.history), len(without["states"])


@pytest.mark.parametrize("setting", SETTINGS)
def test_training_does_not_notice_it(ranks, tmp_path, setting):
    for found, measured, batches in ranks.run(SETTINGS[setting][0], twice, tmp_path, setting, timeout=120):
        assert found == ""
        assert measured >= batches + 4 > 4


@pytest.mark.parametrize("setting", ["local", "gossip_here"])
def test_training_does_not_notice_it_on_local_models(ranks, tmp_path, setting):
    for found, measured, batches in ranks.run(SETTINGS[setting][0], twice, tmp_path, setting, "local", timeout=120):
        assert found == ""
        assert measured >= batches + 3 > 3


def test_the_comparison_sees_what_changes():
    """A probe that draws a random number, counts, or leaves a gradient behind."""

    class Clumsy(SmallProbe):
        def __init__(self, harm: str) -> None:
            super().__init__("1 step", **QUIETLY, check=False)
            self.harm = harm

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            if self.harm == "draw":
                torch.rand(1)
            elif self.harm == "count":
                pl_module.calls += 1
            elif self.harm == "gradient":
                pl_module.head.bias.grad[0] += 1e-12
            else:
                pl_module.resting.train()

    without = fit(max_epochs=1)
    for harm, found in {"draw": "states/0/torch", "count": "states/0/attributes", "mode": "states/0/modes"}.items():
        assert found in disturbance(without, fit(max_epochs=1, probes=[Clumsy(harm)]))
    assert "states/0/grad" in disturbance(without, fit(max_epochs=1, probes=[Clumsy("gradient")]))


class Statistics(SmallProbe):
    """Notes running statistics as they are, and as they are measured with."""

    def __init__(self) -> None:
        super().__init__("1 step", **QUIETLY, samples=4)
        self.seen: list[tuple[torch.Tensor, ...]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.own = {name: buffer.clone() for name, buffer in pl_module.named_buffers() if buffer.is_floating_point()}
        super().on_train_batch_end(trainer, pl_module, *args)

    def measure(self, trainer: L.Trainer, objectives: Any) -> Numbers:
        self.seen += [(own, dict(trainer.lightning_module.named_buffers())[k].clone()) for k, own in self.own.items()]
        return super().measure(trainer, objectives)


def statistics(rank: int, world: int) -> list[tuple[torch.Tensor, ...]]:
    attached = Statistics()
    fit(rank, world, "ddp_find_unused_parameters_true", probes=[attached], max_epochs=1, data=DataLoader(images(), 3))
    return attached.seen


def test_all_ranks_measure_with_the_running_statistics_of_the_first(ranks):
    first, second = ranks.run(2, statistics, timeout=120)
    assert any(not own.equal(other) for (own, _), (other, _) in zip(first, second, strict=True))
    for (own, measured), (_, other) in zip(first, second, strict=True):
        assert measured.equal(own) and other.equal(own)


class Split(Net):
    """Draws its validation data from the global stream when Lightning asks for it, and counts its calls of hooks."""

    def val_dataloader(self) -> Any:
        order = torch.randperm(12)[:5]
        x, y = images().tensors
        return DataLoader(TensorDataset(x[order], y[order]), 5)


def test_validation_data_that_are_drawn_are_drawn_when_they_were():
    data = DataLoader(images(), 3, shuffle=True)
    options = {"module": Split, "data": data, "validation": []}
    attached = probe(data="val")
    assert disturbance(fit(**options), fit(probes=[attached], **options)) == ""
    assert len(attached.history) == 2


# ---------------------------------------------------------------------------------------------------------------- numbers
def numbers(rank: int, world: int, strategy: Any = "auto", **options: Any) -> list[dict[str, float]]:
    """Measure before training: there all layouts have the same weights."""
    module = options.pop("module", Net)
    attached = probe("start", **{"data": ["train", "val"], "samples": None, **options})
    settings = {"max_steps": 1, "limit_val_batches": 1, "val_check_interval": 1.0, "module": module}
    fit(rank, world, strategy, probes=[attached], data=DataLoader(images(13), 3), **settings)
    return attached.history


def close(entry: dict[str, float]) -> Any:
    """Expect the numbers to 1e-10; torchmetrics computes in single precision."""
    return {key: pytest.approx(value, rel=1e-6 if key == "accuracy" else 1e-10) for key, value in entry.items()}


LAYOUTS = {
    "ddp": "ddp_find_unused_parameters_true",
    "local": lambda: LocalSGDStrategy(2),
    "gossip": lambda: GossipStrategy("dsgd"),
}


@pytest.mark.parametrize(("name", "world"), [("ddp", 2), ("local", 2), ("gossip", 4), ("ddp", 4)])
def test_ranks_give_the_numbers_of_one(ranks, name, world):
    (one,) = numbers(0, 1)
    assert set(one) == {"step", "epoch", "loss", "accuracy", "gradient", "product", "val_loss"}
    for (history,) in ranks.run(world, numbers, LAYOUTS[name]):
        assert history == close(one)


def test_numbers_are_those_of_the_data():
    (entry,) = numbers(0, 1)
    torch.manual_seed(1)
    module, (x, y) = Net().double().eval(), images(13).tensors
    loss = nn.functional.cross_entropy(module(x), y)
    gradient = torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])
    assert entry["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert entry["gradient"] == pytest.approx(sum(float(g.pow(2).sum()) for g in gradient) ** 0.5, rel=1e-10)
    x, y = images(7).tensors
    assert entry["val_loss"] == pytest.approx(nn.functional.cross_entropy(module(x), y).item(), rel=1e-12)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_without_samples_takes_part(ranks, name):
    (one,) = numbers(0, 1, samples=1)
    for (history,) in ranks.run(2, numbers, LAYOUTS[name], samples=1, timeout=30):
        assert history == close(one)


def averaged(rank: int, world: int, model: str) -> tuple[list[dict[str, float]], list[Any], torch.Tensor]:
    attached = probe("2 steps", model=model, samples=None)
    strategy = LocalSGDStrategy(4, replicas_per_device=2 // world)
    result = fit(rank, world, strategy, probes=[attached], data=DataLoader(images(), 3), max_steps=2, validation=[])
    return attached.history, result["states"], result["final"]


def test_average_and_local_models(ranks):
    """The average model has another loss than replicas, whose mean is logged."""
    (average, states, final), (local, _, _) = averaged(0, 1, "average"), averaged(0, 1, "local")
    assert (states[-1]["rows"][0] - states[-1]["rows"][1]).abs().max() > 1e-4
    module, (x, y) = Net().double().eval(), images().tensors
    module.load_state_dict(final)
    assert average[0]["loss"] == pytest.approx(nn.functional.cross_entropy(module(x), y).item(), rel=1e-10)
    pairs = ranks.run(2, averaged, "average"), ranks.run(2, averaged, "local")
    for (history, _, _), (own, _, _) in zip(*pairs, strict=True):
        assert history[0] == close(average[0])
        assert own[0]["loss"] == pytest.approx(pairs[1][0][0][0]["loss"], rel=1e-14)
    assert abs(local[0]["loss"] - average[0]["loss"]) > 1e-5
    assert abs(pairs[1][0][0][0]["loss"] - local[0]["loss"]) > 1e-5  # of the first replica alone


# ---------------------------------------------------------------------------------------------------------------- moments
def steps(every: Any, **options: Any) -> list[int]:
    attached = probe(every, samples=3)
    fit(probes=[attached], data=DataLoader(images(), 3), **options)
    return [entry["step"] for entry in attached.history]


@pytest.mark.parametrize(
    ("every", "options", "expected"),
    [
        ("start", {}, [0]),
        ("end", {}, [8]),
        (["start", "end"], {}, [0, 8]),
        ("epoch", {}, [4, 8]),
        ("2 epochs", {"max_epochs": 3}, [8]),
        ("3 steps", {}, [3, 6]),
        (["3 steps", "4 steps"], {}, [3, 4, 6, 8]),
        ("1 step", {"accumulate_grad_batches": 3}, [1, 2, 3, 4]),
        ("validation", {}, [2, 4, 6, 8]),
        ("validation", {"num_sanity_val_steps": 1, "val_check_interval": 1.0}, [4, 8]),
        (["epoch", "end"], {}, [4, 8]),
        (["3 steps", "end"], {}, [3, 6, 8]),
        ("lr_decay", {"module": lambda: Decay([0.1, 0.1, 0.1, 0.05, 0.04, 0.01])}, [3, 5]),
        ("lr_decay", {"module": lambda: Decay([0.0, 0.1, 0.06, 0.04, 0.0, 0.0])}, [3, 4]),
    ],
)
def test_moments(every, options, expected):
    if "module" in options:
        options = {**options, "module": options["module"]().double()}
    assert steps(every, **options) == expected


class Decay(Net):
    """Trains with given learning rates, the last one for ever."""

    def __init__(self, rates: list[float]) -> None:
        super().__init__()
        self.rates = rates

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: self.rates[min(t, len(self.rates) - 1)])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_history_goes_on_after_a_resume(tmp_path, stop):
    """From inside an epoch, and from its last batch, where Lightning does not end the epoch again."""

    def train(every: list[str], **options: Any) -> SmallProbe:
        torch.manual_seed(1)
        module, attached = Decay([0.1, 0.1, 0.1, 0.1, 0.1, 0.02]).double(), probe(every, samples=3)
        strategy = LocalSGDStrategy(2, replicas_per_device=2)  # whose resumes are exact
        fit(strategy=strategy, probes=[attached], module=module, data=DataLoader(images(24), 3), **options)
        return attached

    every = ["start", "2 steps", "epoch", "lr_decay"]
    whole = train(every).history
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=stop, save_top_k=-1)
    train(every, callbacks=[saving], enable_checkpointing=True, max_steps=stop)
    path = tmp_path / f"step={stop}.ckpt"
    assert [entry["step"] for entry in whole] == [0, 2, 4, 4, 5, 6, 8, 8]
    if stop == 4:
        del whole[3]
    assert difference(train(every, ckpt_path=path).history, whole) == ""


def test_a_second_fit_begins_anew():
    attached = probe()
    fit(probes=[attached], data=DataLoader(images(), 3), max_epochs=1)
    first = attached.history
    fit(probes=[attached], data=DataLoader(images(), 3), max_epochs=1)
    assert len(attached.history) == 1
    assert attached.history is not first


# ------------------------------------------------------------------------------------------------- files, loggers, memory
def test_files_pictures_and_numbers(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="run")
    attached = SmallProbe("epoch", save=["npz", "json", "png"], progress=False)
    result = fit(probes=[attached], data=DataLoader(images(), 3), logger=logger)
    folder = tmp_path / "run" / "small"
    names = {path.name for path in folder.iterdir()}
    assert names == {f"step={step:06d}.{kind}" for step in (4, 8) for kind in ("npz", "json", "png")}
    assert Numbers.load(folder / "step=000008.npz").numbers() == attached.result.numbers()
    assert Numbers.load(folder / "step=000008.json").numbers() == attached.result.numbers()
    assert matplotlib.image.imread(folder / "step=000004.png").shape[:2] == (300, 300)
    with open(tmp_path / "run" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["small/loss"]]
    assert [int(row["step"]) for row in rows] == [4, 8]
    assert [float(row["small/loss"]) for row in rows] == [entry["loss"] for entry in attached.history]
    assert result["metrics"]["small/loss"] == attached.history[-1]["loss"]


def test_tensorboard_gets_numbers_and_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="run")
    attached = SmallProbe("epoch", progress=False)
    fit(probes=[attached], data=DataLoader(images(), 3), logger=logger)
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [event.step for event in events.Images("small")] == [4, 8]
    found = [event.value for event in events.Scalars("small/loss")]
    assert found == pytest.approx([entry["loss"] for entry in attached.history], rel=1e-6)


class Pictures(CSVLogger):
    """Takes pictures as the logger of Weights & Biases does."""

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        self.pictures = [*getattr(self, "pictures", []), (key, Path(images[0]).name, step)]


def test_a_logger_that_takes_files_gets_pictures(tmp_path):
    logger = Pictures(tmp_path)
    fit(probes=[SmallProbe("end", progress=False)], data=DataLoader(images(), 3), logger=logger, max_epochs=1)
    assert logger.pictures == [("small", "step=000004.png", 4)]


def test_without_a_logger_and_without_matplotlib(tmp_path, monkeypatch):
    options = {"data": DataLoader(images(), 3), "max_epochs": 1}
    monkeypatch.chdir(tmp_path)
    attached = SmallProbe("epoch", progress=False)
    fit(probes=[attached], logger=False, **options)
    assert list(tmp_path.iterdir()) == []
    assert attached.history
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    fit(probes=[SmallProbe("epoch", progress=False)], logger=CSVLogger(tmp_path), **options)
    assert len(list(tmp_path.rglob("*.npz"))) == 1
    assert list(tmp_path.rglob("*.png")) == []


def test_what_it_logs_can_be_monitored():
    stop = EarlyStopping("small/loss", patience=0, check_on_train_epoch_end=True, min_delta=10.0)
    attached = probe()
    fit(probes=[attached], callbacks=[], data=DataLoader(images(), 3), max_epochs=5)
    assert len(attached.history) == 5
    options = {"data": DataLoader(images(), 3), "max_epochs": 5}
    attached = probe()
    fit(probes=[attached, stop], **options)
    assert len(attached.history) == 2


def test_two_probes_side_by_side(tmp_path):
    first, second = probe("epoch"), probe("epoch", data="val", name="of_val")
    result = fit(probes=[first, second], data=DataLoader(images(), 3), folder=tmp_path)
    for name, attached in (("small", first), ("of_val", second)):
        assert result["metrics"][f"{name}/loss"] == attached.history[-1]["loss"]
    assert first.history[-1]["loss"] != second.history[-1]["loss"]
    assert first.state_key != second.state_key
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["callbacks"]
    assert saved[first.state_key]["history"] == first.history
    assert saved[second.state_key]["history"] == second.history


class Twin(SmallProbe):
    """Another kind of the same name."""


@pytest.mark.parametrize("kind", [SmallProbe, Twin])
def test_two_probes_of_one_name_are_refused(kind):
    with pytest.raises(MisconfigurationException, match="Two probes are called 'small': give one of them a `name=`"):
        fit(probes=[probe(), probe("2 epochs", kind=kind, data="val")], data=DataLoader(images(), 3))


class FailsEarly(L.Callback):
    """Fails before training starts, when callbacks have been restored."""

    def __init__(self) -> None:
        self.cleaned = False

    def on_fit_start(self, *args: Any) -> None:
        raise RuntimeError("on purpose")

    def on_exception(self, *args: Any) -> None:
        self.cleaned = True


class SmallSeries(SeriesProbe[Numbers]):
    """Writes its history."""

    name = "series"
    measure = SmallProbe.measure


def test_an_error_after_a_resume_and_before_training(tmp_path):
    options = {"data": DataLoader(images(), 3), "folder": tmp_path, "logger": CSVLogger(tmp_path)}
    fit(probes=[SmallSeries(progress=False)], max_epochs=1, **options)
    resumed, failing = SmallSeries(progress=False), FailsEarly()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(probes=[resumed, failing], ckpt_path=tmp_path / "epoch=0.ckpt", **options)
    assert len(resumed.history) == 1 and failing.cleaned


def test_a_history_that_can_not_be_written_after_an_error(tmp_path, monkeypatch):
    def full(*args: Any) -> None:
        raise OSError("No space left on device")

    attached, failing = SmallSeries("1 step", progress=False), FailsEarly()
    failing.on_fit_start = lambda *args: None  # type: ignore[method-assign]
    monkeypatch.setattr(History, "save", full)
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        pytest.warns(UserWarning, match="SmallSeries can't write its history: No space left on device"),
    ):
        fit_with_warnings(probes=[attached, failing, Fails()], data=DataLoader(images(), 3), logger=CSVLogger(tmp_path))
    assert failing.cleaned


class Fails(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 2:
            raise RuntimeError("on purpose")


class Ear(SmallProbe):
    """Keeps a weak reference to a batch."""

    def measure(self, trainer: L.Trainer, objectives: Any) -> Numbers:
        (objective,) = objectives.values()
        self.batch = weakref.ref(objective.batches[0][0])
        return super().measure(trainer, objectives)


@pytest.mark.parametrize("fails", [False, True])
def test_data_are_let_go_of(fails):
    attached = probe("1 step", Ear)
    options = {"probes": [attached], "data": DataLoader(images(), 3), "max_epochs": 1}
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            fit(callbacks=[Fails()], **options)
    else:
        fit(**options)
    assert len(attached.history) == (1 if fails else 4)
    gc.collect()
    assert attached.batch() is None


# ------------------------------------------------------------------------------------------------------ numbers that fail
class Diverges(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)["loss"]
        return loss * float("nan") if self.trainer.global_step > 5 else loss


def test_a_loss_that_is_not_finite_is_not_measured():
    attached = probe(["2 steps"])
    with pytest.warns(UserWarning, match="SmallProbe measures nothing at step 6: the loss of the train data is nan") as caught:
        result = fit_with_warnings(probes=[attached], data=DataLoader(images(), 3), module=Diverges)
    assert len([w for w in caught if "measures nothing" in str(w.message)]) == 2
    assert result["step"] == 8
    assert [entry["step"] for entry in attached.history] == [2, 4]


def fit_with_warnings(**options: Any) -> dict[str, Any]:
    """Train without the filter of `fit`."""
    import warnings

    keep = warnings.filterwarnings
    warnings.filterwarnings = lambda *args, **kwargs: None  # type: ignore[assignment]
    try:
        return fit(**options)
    finally:
        warnings.filterwarnings = keep


# ---------------------------------------------------------------------------------------------------------------- refusal
def refused(attached: SmallProbe, match: str, error: type[Exception] = MisconfigurationException, **options: Any) -> None:
    """Train, and look that it is refused before the first step."""
    diary = {"data": DataLoader(images(), 3), **options}
    states: list[int] = []

    class Steps(L.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            states.append(1)

    with pytest.raises(error, match=match):
        fit(probes=[attached], callbacks=[Steps()], **diary)
    assert states == []


def test_random_augmentation():
    data = DataLoader(Augmented(12), 3)
    refused(probe(), r"samples of the train data are different .*`check=False`", data=data)
    attached = probe(check=False)
    fit(probes=[attached], data=data, max_epochs=1)
    assert len(attached.history) == 1


def augmented(rank: int, world: int) -> None:
    """Only the samples of the second rank are augmented."""

    class Odd(Augmented):
        def __getitem__(self, k: int) -> Any:
            return super().__getitem__(k) if k % 2 else (self.x[k], self.y[k])

    refused(
        probe(),
        "are different" if rank else "Another rank can't load",
        strategy="ddp",
        world=world,
        rank=rank,
        data=DataLoader(Odd(12), 3),
    )


def test_augmentation_on_one_rank_is_refused_on_all(ranks):
    ranks.run(2, augmented, timeout=30)


class OnDevice(Net):
    """Changes batches where they are on the device: by noise while it trains, and always by a factor."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return 2 * batch[0], batch[1]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch[0] + torch.randn(()) * self.trainer.training, batch[1])


def test_hooks_of_batches_run_as_in_validation():
    attached, data = probe("start", samples=None), DataLoader(images(), 3)
    fit(probes=[attached], module=OnDevice, data=data, max_epochs=1)
    torch.manual_seed(1)
    module, (x, y) = Net().double().eval(), images().tensors
    assert attached.history[0]["loss"] == pytest.approx(nn.functional.cross_entropy(module(2 * x), y).item(), rel=1e-12)


class AlwaysNoisy(OnDevice):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch[0] + torch.randn(()), batch[1])


def test_noise_on_the_device():
    refused(probe(), "are different when they are loaded again", module=AlwaysNoisy)


class Manual(Net):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def test_manual_optimization():
    refused(probe(), r"pass `loss_fn=lambda module, batch: \.\.\.`", module=Manual)
    attached = probe(
        "start", loss_fn=lambda module, batch: nn.functional.cross_entropy(module(batch[0]), batch[1]), samples=None
    )
    fit(probes=[attached], module=Manual, data=DataLoader(images(), 3), max_epochs=1)
    derived = probe("start", samples=None)
    fit(probes=[derived], data=DataLoader(images(), 3), max_epochs=1)
    assert attached.history == derived.history


class Sharded(SingleDeviceStrategy):
    restore_checkpoint_after_setup = True


def test_sharded_weights():
    refused(probe(), "Sharded shards weights, which SmallProbe needs whole", strategy=Sharded("cpu"))


class Step(Net):
    """Returns something from `training_step`."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.change(super().training_step(batch, batch_idx)["loss"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda loss: None, "one element; got a NoneType"),
        (lambda loss: {"value": loss}, "one element; got a NoneType"),
        (lambda loss: loss.expand(2), r"got a tensor of shape \[2\]"),
        (lambda loss: loss * float("nan"), "The loss is nan at the weights as they are"),
        (lambda loss: loss * torch.rand(()), "something in the module is random"),
    ],
)
def test_losses_that_are_none(change, sentence):
    refused(probe(), sentence, ValueError, module=Step(change).double())


def none_on_one_rank(rank: int, world: int) -> str:
    """Only the first rank has a sample, and sees what the step returns."""
    with pytest.raises(ValueError) as caught:
        numbers(rank, world, LAYOUTS["local"], samples=1, module=Step(lambda loss: None).double())
    return str(caught.value)


def test_a_rank_without_samples_does_not_wait_for_one_that_fails(ranks):
    found = ranks.run(2, none_on_one_rank, timeout=30)
    assert "one element; got a NoneType" in found[0]
    assert found[1] != ""


class Fetches(Net):
    def training_step(self, dataloader_iter: Any) -> Any:
        return super().training_step(next(dataloader_iter)[0], 0)


def test_a_step_that_fetches_its_batches():
    refused(probe(), "A step that takes `dataloader_iter` can't be called", module=Fetches)


def test_empty_data():
    refused(probe(data="val"), "There is no validation data to measure on", limit_val_batches=0)
    refused(probe(data="val"), "There is no validation data to measure on", validation=[])
    refused(
        probe(data="val"), "the data is empty", ValueError, validation=DataLoader(TensorDataset(torch.empty(0, 1, 6, 6)), 1)
    )


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(images())

    def __len__(self) -> int:
        return 12


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(images())


class Batches:
    """A loader that is none of torch's."""

    def __iter__(self) -> Any:
        return iter(DataLoader(images(), 3))


@pytest.mark.parametrize(
    "data",
    [
        DataLoader(Stream(), 3),
        DataLoader(Endless(), 3),
        DataLoader(
            TensorDataset(torch.stack(list(images().tensors[0].split(3))), images().tensors[1].view(4, 3)), batch_size=None
        ),
        Batches(),
    ],
    ids=["sized", "endless", "whole batches", "own loader"],
)
def test_data_that_nothing_can_be_drawn_from(data):
    options = {"data": data, "val_check_interval": 1.0}
    refused(probe(), "A probe draws its samples from a map-style dataset in one torch `DataLoader`", **options)
    attached = probe(data=DataLoader(images(), 3))
    fit(probes=[attached], max_epochs=1, **options)
    assert attached.history[0]["loss"] > 0


def test_several_loaders():
    both = {"a": DataLoader(images(), 3), "b": DataLoader(images(), 3)}

    class Several(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch["a"], batch_idx) if isinstance(batch, dict) else super().training_step(batch, 0)

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    refused(probe(), "in one torch `DataLoader`, which the train loader is not", data=both, module=Several)
    attached = probe(data="val")
    fit(
        probes=[attached],
        data=both,
        module=Several,
        validation=[DataLoader(images(5), 3), DataLoader(images(7), 3)],
        max_epochs=1,
    )
    assert len(attached.history) == 1  # on the first of them


def test_given_batches(ranks):
    """Their number need not be a multiple of that of ranks, and a loader may shuffle."""
    batches = [tuple(t[k : k + 2] for t in images(9).tensors) for k in range(0, 9, 2)]
    (one,) = numbers(0, 1, data=batches)
    for history in ranks.run(2, numbers, LAYOUTS["ddp"], data=batches):
        assert history == [close(one)]
    (whole,) = numbers(0, 1, data=[images(9).tensors])
    assert one == close(whole)
    shuffled = DataLoader(images(9), 2, shuffle=True)
    for history in ranks.run(2, numbers, LAYOUTS["local"], data=shuffled):
        assert history == [close(whole)]
    (some,) = numbers(0, 1, data=batches, samples=3)
    (first,) = numbers(0, 1, data=batches[:2])
    assert some == first


def test_a_loader_of_a_stream_is_batches():
    """It has a length by its class, which it may not be asked for."""
    (whole,) = numbers(0, 1, data=[images().tensors])
    (found,) = numbers(0, 1, data=DataLoader(Endless(), 3))
    assert found == close(whole)


def test_targets_that_are_missing_are_the_same_twice():
    class First(WithoutMetrics):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch[:2], batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch[:2], batch_idx)

    x, y = images().tensors
    holes = torch.full((12, 2), float("nan"), dtype=torch.float64)
    attached = probe("start")
    fit(probes=[attached], data=DataLoader(TensorDataset(x, y, holes), 3), max_epochs=1, validation=[], module=First)
    assert len(attached.history) == 1


@pytest.mark.parametrize(("samples", "sizes"), [(9, [4, 5]), (10, [5, 5]), (16, [8, 8]), (17, [5, 6, 6]), (5, [5]), (1, [1])])
def test_no_sample_is_left_over(samples, sizes):
    """Of one alone batch norm would have no statistics."""
    found: list[int] = []

    class Sizes(SmallProbe):
        def measure(self, trainer: L.Trainer, objectives: Any) -> Numbers:
            found.extend(objectives["train"].sizes)
            batch_norm_statistics(objectives["train"])
            return Numbers(np.zeros(1), 0.0, 0.0, 0.0)

    fit(probes=[probe("start", Sizes, samples=samples)], data=DataLoader(images(24), 8), max_epochs=1)
    assert found == sizes


def test_samples_are_drawn_once_and_by_the_seed():
    losses = {seed: numbers(0, 1, samples=5, seed=seed)[0]["loss"] for seed in (0, 1)}
    assert losses[0] == numbers(0, 1, samples=5)[0]["loss"] != losses[1]


def test_data_that_a_sampler_leaves_out_are_not_measured():
    sampler = torch.utils.data.SubsetRandomSampler([0, 2, 3, 7])
    attached = probe("start", samples=None)
    fit(probes=[attached], data=DataLoader(images(), 2, sampler=sampler), max_epochs=1)
    torch.manual_seed(1)
    module, (x, y) = Net().double().eval(), images().tensors
    loss = nn.functional.cross_entropy(module(x[[0, 2, 3, 7]]), y[[0, 2, 3, 7]])
    assert attached.history[0]["loss"] == pytest.approx(loss.item(), rel=1e-12)


def test_local_models_inside_validation():
    refused(probe("validation", model="local"), "Validation sees the average of the replicas")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"data": "test"}, "`data` must be 'train', 'val', both as a list, or batches; got 'test'."),
        ({"data": ["train", "train"]}, "got ['train', 'train']"),
        ({"data": []}, "that can be gone through again and again; got []."),
        ({"data": iter([1])}, "again and again; got <list_iterator"),
        ({"data": None}, "again and again; got None."),
        ({"samples": 0}, "`samples` must be a whole number, at least 1, or None for all; got 0."),
        ({"samples": True}, "got True"),
        ({"samples": 0.5}, "got 0.5"),
        ({"model": "mean"}, "`model` must be one of 'average', 'local'; got 'mean'."),
        ({"save": "png"}, "`save` must be a list of 'npz', 'json', 'png'; got 'png'."),
        ({"save": ["pdf"]}, "got ['pdf']"),
        ({"every": "sometimes"}, "`every` does not understand 'sometimes'"),
    ],
)
def test_options(options, sentence):
    with pytest.raises(ValueError) as caught:
        SmallProbe(**options)
    assert sentence in str(caught.value)


def test_parameters():
    attached = probe("start", parameters="head.*")
    fit(probes=[attached], data=DataLoader(images(), 3), max_epochs=1)
    refused(probe(parameters="tail.*"), "matches none of the trainable ones", ValueError)


def test_an_objective_has_no_samples_of_other_ranks():
    with pytest.raises(ValueError, match="the data is empty"):
        Objective(Net(), lambda module, batch: torch.zeros(()), [])


class Constants(Net):
    """Makes numbers of the default type, which are as precise as training only in its context."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) @ torch.eye(3)


def test_true_double_precision_holds_in_steps():
    attached = probe("start")
    fit(probes=[attached], module=Constants, data=DataLoader(images(), 3), max_epochs=1)
    plain = probe("start")
    fit(probes=[plain], data=DataLoader(images(), 3), max_epochs=1)
    assert attached.history == plain.history


def test_traffic_of_probes_is_no_training(ranks):
    def sent(rank: int, world: int, *probes: SmallProbe) -> tuple[int, int]:
        result = fit(rank, world, LocalSGDStrategy(2), probes=probes, data=DataLoader(images(), 3), validation=[])
        return result["traffic"]["bytes_sent"], result["traffic"]["evaluation_bytes"]

    (without, own), (with_probe, more) = ranks.run(2, sent)[0], ranks.run(2, sent, probe("1 step"))[0]
    assert without == with_probe > 0
    assert more > own


def test_progress_bars_are_shown_on_the_first_rank_alone():
    shown = []

    class Asks(SmallProbe):
        def measure(self, trainer: L.Trainer, objectives: Any) -> Numbers:
            shown.append(self.shows_progress(trainer))
            return Numbers(np.zeros(1), 0.0, 0.0, 0.0)

    for progress, bar in [(True, True), (True, False), (False, True)]:
        options = {"enable_progress_bar": bar, "max_epochs": 1}
        fit(probes=[Asks(save=[], progress=progress)], data=DataLoader(images(), 3), **options)
    assert shown == [True, False, False]
