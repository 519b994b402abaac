"""ImageClassifier: learning, schedules, logging, checkpoints, YAML."""

import doctest
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_distopt.models import ImageClassifier, LeNet, classifier, resnet8

torch.set_num_threads(1)
TINY: dict[str, Any] = {"in_channels": 1, "width": 0.25}


def _trainer(**options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**(defaults | options))


def _loader(count: int = 32, batch_size: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(count) % 10), batch_size=batch_size)


class _Rates(Callback):
    """Records the learning rate that every optimizer step uses."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def _rates(
    epochs: int = 4, loader: DataLoader[Any] | None = None, fit: dict[str, Any] | None = None, **options: Any
) -> list[float]:
    record = _Rates()
    module = ImageClassifier(LeNet(image_size=8), lr=1.0, **options)
    # gradients vanish, only the schedule is looked at
    for parameter in module.parameters():
        parameter.data.zero_()
    _trainer(callbacks=[record], **({"max_epochs": epochs} | (fit or {}))).fit(module, _loader() if loader is None else loader)
    return record.rates


@pytest.mark.filterwarnings("ignore::UserWarning")
class TestSchedule:
    """Learning rates of every step, at 4 steps per epoch."""

    def test_constant_needs_no_scheduler(self) -> None:
        assert isinstance(ImageClassifier("lenet").configure_optimizers(), torch.optim.SGD)
        assert _rates(epochs=1) == [1.0] * 4

    def test_cosine(self) -> None:
        expected = [(1 + math.cos(math.pi * t / 16)) / 2 for t in range(16)]
        assert _rates(schedule="cosine") == pytest.approx(expected)

    def test_cosine_up_to_max_steps(self) -> None:
        expected = [(1 + math.cos(math.pi * t / 6)) / 2 for t in range(6)]
        assert _rates(schedule="cosine", fit={"max_epochs": -1, "max_steps": 6}) == pytest.approx(expected)

    def test_milestones(self) -> None:
        assert _rates(schedule=[1, 3]) == pytest.approx([1.0] * 4 + [0.1] * 8 + [0.01] * 4)

    def test_milestones_when_max_steps_ends_training_first(self) -> None:
        rates = _rates(schedule=[1, 3], fit={"max_epochs": -1, "max_steps": 6})
        assert rates == pytest.approx([1.0] * 4 + [0.1] * 2)

    def test_milestones_count_optimizer_steps_under_accumulation(self) -> None:
        rates = _rates(schedule=[1], epochs=2, fit={"accumulate_grad_batches": 2})
        assert rates == pytest.approx([1.0] * 2 + [0.1] * 2)

    def test_warmup_then_cosine(self) -> None:
        expected = [0.25, 0.5, 0.75, 1.0] + [(1 + math.cos(math.pi * t / 12)) / 2 for t in range(12)]
        assert _rates(schedule="cosine", warmup_epochs=1) == pytest.approx(expected)

    def test_warmup_of_half_an_epoch(self) -> None:
        assert _rates(epochs=1, warmup_epochs=0.5) == pytest.approx([0.5, 1.0, 1.0, 1.0])

    def test_endless_cosine_is_refused(self) -> None:
        with pytest.raises(ValueError, match="set max_epochs or max_steps"):
            _rates(schedule="cosine", fit={"max_epochs": -1})

    def test_data_of_unknown_length_is_refused(self) -> None:
        class Endless(IterableDataset[Any]):
            def __iter__(self) -> Any:
                while True:
                    yield torch.zeros(1, 8, 8), torch.tensor(0)

        with pytest.raises(ValueError, match="needs a length"):
            _rates(loader=DataLoader(Endless(), batch_size=2), schedule=[1], fit={"max_epochs": -1, "max_steps": 4})
        with pytest.raises(ValueError, match="set max_epochs or max_steps"):
            _rates(loader=DataLoader(Endless(), batch_size=2), schedule="cosine")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"schedule": "linear"}, "schedule"),
        ({"warmup_epochs": -1}, "warmup_epochs"),
        ({"model": nn.Linear(2, 2), "model_options": {"width": 2}}, "model_options"),
        ({"model": "alexnet"}, "alexnet"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ImageClassifier(**options)


@pytest.mark.parametrize("norm", ["batch", "group", "evonorm"])
def test_weight_decay_spares_norms_and_biases(norm: str) -> None:
    module = ImageClassifier("resnet8", TINY | {"norm": norm}, weight_decay=0.1)
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in module.named_parameters()}
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in spared["params"])
    assert sorted(names[id(p)] for group in optimizer.param_groups for p in group["params"]) == sorted(names.values())


def test_weight_decay_spares_a_layer_norm_over_several_axes_and_counts_tied_weights_once() -> None:
    net = nn.Sequential(nn.LayerNorm((1, 8, 8)), nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10))
    net[3].weight = net[2].weight
    optimizer = ImageClassifier(net).configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    decayed, spared = (group["params"] for group in optimizer.param_groups)
    assert len(decayed) == 2 and len(spared) == 2 + 3


def test_optimizer_options_arrive() -> None:
    optimizer = ImageClassifier("lenet", lr=0.3, momentum=0.8, nesterov=True).configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.3, 0.8, True)


def test_metrics_are_logged() -> None:
    module = ImageClassifier("lenet", {"image_size": 8}, lr=0.0)
    trainer = _trainer(max_epochs=1)
    trainer.fit(module, _loader(), _loader(30))
    assert {"train_loss", "val_loss", "val_accuracy"} <= set(trainer.callback_metrics)
    fit_metrics = dict(trainer.callback_metrics)
    tested = trainer.test(module, _loader(30), verbose=False)[0]
    assert set(tested) == {"test_loss", "test_accuracy"}
    assert tested["test_loss"] == pytest.approx(fit_metrics["val_loss"].item())
    images, labels = next(iter(_loader(30, batch_size=30)))
    logits = module(images)
    # 30 images in batches of 8: the means weigh images, not batches
    assert tested["test_loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert tested["test_accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_predicts_classes() -> None:
    module = ImageClassifier("lenet", {"image_size": 8})
    predictions = _trainer().predict(module, _loader(16))
    assert predictions is not None
    images, _ = next(iter(_loader(16, batch_size=16)))
    assert torch.equal(torch.cat(predictions), module(images).argmax(1))  # type: ignore[arg-type]


def test_checkpoint_of_a_named_model_needs_nothing_else(tmp_path: Path) -> None:
    module = ImageClassifier("resnet8", TINY, lr=0.02, schedule=[3], num_classes=12)
    trainer = _trainer(max_epochs=1)
    trainer.fit(module, _loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (loaded.lr, loaded.schedule, loaded.hparams["num_classes"]) == (0.02, [3], 12)
    for (name, a), b in zip(module.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_checkpoint_of_a_model_object_takes_the_object(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    module = ImageClassifier(resnet8(in_channels=1, width=0.25), lr=0.02)
    assert "model" not in module.hparams
    assert not any("nn.Module" in str(warning.message) for warning in recwarn)
    trainer = _trainer(max_epochs=1)
    trainer.fit(module, _loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt", model=resnet8(in_channels=1, width=0.25))
    assert loaded.lr == 0.02
    assert torch.equal(loaded.model.linear.weight, module.model.linear.weight)  # type: ignore[arg-type, union-attr]


CONFIGS = {
    "name": "{model: resnet8, model_options: {in_channels: 1, width: 0.25}, schedule: cosine, warmup_epochs: 1}",
    "evonorm": "{model: resnet8, model_options: {in_channels: 1, width: 0.25, norm: evonorm}}",
    "class": "{model: {class_path: lightning_distopt.models.LeNet, init_args: {image_size: 8}}, schedule: [1, 2]}",
    "function": "{model: {class_path: lightning_distopt.models.resnet8, init_args: {in_channels: 1, width: 0.25}}}",
    "class with groups": "{model: {class_path: lightning_distopt.models.CifarResNet, "
    "init_args: {depth: 8, in_channels: 1, norm: evonorm, groups: 2}}}",
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_yaml(kind: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {CONFIGS[kind]}\n"
        "trainer: {accelerator: cpu, devices: 1, logger: false, enable_progress_bar: false, "
        "enable_checkpointing: false, enable_model_summary: false, max_steps: 2, limit_val_batches: 1}\n"
        "data: {class_path: lightning_distopt.data.DigitsDataModule, init_args: {num_train: 64, validation: holdout}}\n"
    )
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    cli = LightningCLI(
        ImageClassifier, subclass_mode_data=True, args=["fit", "--config", str(config)], save_config_callback=None
    )
    assert cli.trainer.global_step == 2
    cli.trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    assert type(loaded.model) is type(cli.model.model)


def test_knows_nothing_of_strategies() -> None:
    assert "strateg" not in inspect.getsource(classifier).replace("under any strategy", "")


def test_lenet_learns_the_digits() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    from lightning_distopt.data import DigitsDataModule

    seed_everything(0, verbose=False)
    module = ImageClassifier("lenet", {"image_size": 8}, lr=0.05, schedule="cosine")
    trainer = _trainer(max_epochs=5)
    data = DigitsDataModule(batch_size=32)
    trainer.fit(module, data)
    assert trainer.test(module, data, verbose=False)[0]["test_accuracy"] > 0.9


def test_examples() -> None:
    assert doctest.testmod(classifier).failed == 0
