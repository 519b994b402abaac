"""When `PostLocalSwitch` switches: steps, epochs, fractions, and the first decay of many schedules."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, IterableDataset

from lightning_distopt import LocalSGDStrategy, PostLocalSwitch
from tests.conformance.problems import QUIET, Augmented, SmallNet

STEPS_PER_EPOCH = 6


class Scheduled(SmallNet):
    def __init__(self, schedule, interval="step"):
        super().__init__()
        self.schedule, self.interval = schedule, interval

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        if self.schedule is None:
            return optimizer
        config = {"scheduler": self.schedule(optimizer), "interval": self.interval}
        return {"optimizer": optimizer, "lr_scheduler": config}


class Rates(L.Callback):
    def __init__(self):
        self.rates, self.periods = [], []

    def on_train_batch_end(self, trainer, *args):
        self.periods.append(trainer.strategy.algorithm._period)

    def on_train_batch_start(self, trainer, *args):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def train(switch, schedule=None, interval="step", sync_period=3, **options):
    rates = Rates()
    strategy = options.pop("strategy", None) or LocalSGDStrategy(sync_period, replicas_per_device=2)
    options = {"max_epochs": 3, "enable_checkpointing": False, **options}
    callbacks = [rates, *([switch] if switch else []), *options.pop("callbacks", [])]
    path = options.pop("ckpt_path", None)
    trainer = L.Trainer(accelerator="cpu", devices=1, strategy=strategy, callbacks=callbacks, **QUIET, **options)
    data = Augmented(36, torch.float32)
    trainer.fit(Scheduled(schedule, interval), DataLoader(data, batch_size=3), ckpt_path=path)
    return rates


@pytest.mark.parametrize(
    ("at", "step"),
    [(5, 5), ("step:5", 5), ("epoch:2", 12), (0.5, 9), (0.0, 0), (1.0, 18), (0, 0), ("epoch:0", 0)],
)
def test_moments(at, step):
    switch = PostLocalSwitch(at=at, sync_period=4)
    rates = train(switch)
    assert switch.switched_at == step
    assert rates.periods == [1] * step + [4] * (18 - step)


def warmup_then_cosine(optimizer):
    warmup = schedulers.LinearLR(optimizer, start_factor=0.1, total_iters=4)
    return schedulers.SequentialLR(optimizer, [warmup, schedulers.CosineAnnealingLR(optimizer, 14)], milestones=[4])


@pytest.mark.parametrize(
    ("schedule", "interval"),
    [
        (lambda o: schedulers.StepLR(o, 7), "step"),
        (lambda o: schedulers.StepLR(o, 2), "epoch"),
        (lambda o: schedulers.MultiStepLR(o, [8, 12]), "step"),
        (lambda o: schedulers.MultiStepLR(o, [1]), "epoch"),
        (lambda o: schedulers.CosineAnnealingLR(o, 18), "step"),
        (lambda o: schedulers.CosineAnnealingLR(o, 3), "epoch"),
        (warmup_then_cosine, "step"),
        (lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=19, pct_start=0.3), "step"),
        (lambda o: schedulers.LambdaLR(o, lambda t: min(1, (t + 1) / 5) * (1.0 if t < 11 else 0.1)), "step"),
    ],
)
def test_first_decay_to_half_of_the_maximum(schedule, interval):
    switch = PostLocalSwitch()
    rates = train(switch, schedule, interval)
    largest = rates.rates.index(max(rates.rates))
    expected = next(t for t in range(largest, 18) if rates.rates[t] <= rates.rates[largest] / 2)
    assert switch.switched_at == expected
    assert rates.periods == [1] * expected + [3] * (18 - expected)


def test_a_cosine_decays_half_way():
    switch = PostLocalSwitch()
    train(switch, lambda o: schedulers.CosineAnnealingLR(o, 18))
    assert switch.switched_at in (9, 10)  # at 9 the rate is half, but for rounding


@pytest.mark.parametrize("schedule", [None, lambda o: schedulers.LinearLR(o, 0.1, total_iters=100)])
def test_a_rate_that_never_decays_never_switches(schedule):
    switch = PostLocalSwitch()
    assert set(train(switch, schedule).periods) == {1}
    assert switch.switched_at is None


def warned(switch, schedule=None, **options):
    """Train, and return what the switch warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(switch, schedule, **options)
    return [str(one.message) for one in caught if str(one.message).startswith("PostLocalSwitch")]


@pytest.mark.parametrize(
    ("at", "remedy"),
    [
        ("first_lr_decay", "The learning rate has never fallen to half of the largest: use a scheduler that does so"),
        (1000, "Let the switch come earlier, or train longer."),
        (18, "Let the switch come earlier, or train longer."),
        ("epoch:3", "Let the switch come earlier, or train longer."),
        (1.0, "Let the switch come earlier, or train longer."),
    ],
)
def test_training_that_ends_before_the_switch_warns(at, remedy):
    (sentence,) = warned(PostLocalSwitch(at=at))
    assert f"PostLocalSwitch(at={at!r}) has not switched: training has ended after step 18, " in sentence
    assert remedy in sentence


@pytest.mark.parametrize("at", [0, 17, "epoch:2", 0.5])
def test_training_that_switches_does_not_warn(at):
    assert warned(PostLocalSwitch(at=at)) == []


def test_training_that_goes_on_from_after_the_switch_does_not_warn(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, filename="at", every_n_train_steps=8)
    train(PostLocalSwitch(at=6), callbacks=[saver], enable_checkpointing=True, max_steps=8)
    assert warned(PostLocalSwitch(at="epoch:7"), ckpt_path=str(tmp_path / "at.ckpt")) == []


def test_nothing_to_switch_to():
    for switch, period in ((PostLocalSwitch(at=5), 1), (PostLocalSwitch(at=5, sync_period=1), 4), (PostLocalSwitch(), 1)):
        (sentence,) = warned(switch, sync_period=period)  # and not a second one when training ends
        assert "has nothing to switch to, as H = 1 after the switch too" in sentence
    assert warned(PostLocalSwitch(at=5, sync_period=lambda step: 2), sync_period=1) == []


def test_blocks_are_something_to_switch_to():
    strategy = LocalSGDStrategy(1, block_size=2, block_period=3, replicas_per_device=4)
    assert warned(PostLocalSwitch(at=5), strategy=strategy) == []


def test_a_failure_is_not_the_end_of_training():
    class Fails(L.Callback):
        def on_train_batch_end(self, *args):
            raise ZeroDivisionError

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "PostLocalSwitch")
        with pytest.raises(ZeroDivisionError):
            train(PostLocalSwitch(), callbacks=[Fails()])


def test_accumulation_switches_between_steps_not_inside_one():
    switch = PostLocalSwitch(at="epoch:1", sync_period=2)
    rates = train(switch, accumulate_grad_batches=4)  # steps of 4 and 2 batches in each epoch
    assert switch.switched_at == 2
    assert rates.periods == [1] * 6 + [2] * 12


def test_the_moment_is_in_the_checkpoint(tmp_path):
    def schedule(optimizer):
        return schedulers.MultiStepLR(optimizer, [8])

    saver = ModelCheckpoint(dirpath=tmp_path, filename="at", every_n_train_steps=10)
    train(PostLocalSwitch(), schedule, callbacks=[saver], enable_checkpointing=True, max_steps=10)
    switch = PostLocalSwitch()
    rates = train(switch, schedule, ckpt_path=str(tmp_path / "at.ckpt"))
    assert switch.switched_at == 8
    assert rates.periods == [3] * 8


@pytest.mark.parametrize(("at", "switched_at", "periods"), [(4, 4, [1, 3]), (2, 3, [3, 3]), (0.25, 4, [1, 3])])
def test_a_moment_that_has_not_come_is_not_in_the_checkpoint(at, switched_at, periods, tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, filename="at", every_n_train_steps=3)
    train(PostLocalSwitch(at=6), callbacks=[saver], enable_checkpointing=True, max_steps=3)
    switch = PostLocalSwitch(at=at)
    rates = train(switch, ckpt_path=str(tmp_path / "at.ckpt"))
    assert switch.switched_at == switched_at
    assert rates.periods[:2] == periods


def test_a_moment_that_has_come_stays(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, filename="at", every_n_train_steps=8)
    train(PostLocalSwitch(at=6), callbacks=[saver], enable_checkpointing=True, max_steps=8)
    switch = PostLocalSwitch(at=16)
    assert set(train(switch, ckpt_path=str(tmp_path / "at.ckpt")).periods) == {3}
    assert switch.switched_at == 6


class Evaluated(SmallNet):
    def validation_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx))


def test_evaluation_with_a_checkpoint(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, filename="at", every_n_train_steps=8)
    train(PostLocalSwitch(at=6), callbacks=[saver], enable_checkpointing=True, max_steps=8)
    trainer = L.Trainer(accelerator="cpu", callbacks=[switch := PostLocalSwitch(at=3)], enable_checkpointing=False, **QUIET)
    loader = DataLoader(Augmented(6, torch.float32), batch_size=3)
    trainer.validate(Evaluated(), loader, ckpt_path=str(tmp_path / "at.ckpt"), verbose=False)
    assert switch.switched_at is None


def test_a_second_fit_starts_anew():
    switch = PostLocalSwitch(at="epoch:1")
    for _ in range(2):
        rates = train(switch)
        assert rates.periods == [1] * 6 + [3] * 12


@pytest.mark.parametrize("fails", [False, True])
def test_the_strategy_gets_its_period_back(fails):
    class Fails(SmallNet):
        def training_step(self, batch, batch_idx):
            assert strategy.sync_period.sync_period == 4
            if fails and batch_idx == 3:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    strategy = LocalSGDStrategy(3, replicas_per_device=2)
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_checkpointing": False}
    trainer = L.Trainer(strategy=strategy, callbacks=[PostLocalSwitch(2, sync_period=4)], **options, **QUIET)
    loader = DataLoader(Augmented(36, torch.float32), batch_size=3)
    if fails:
        with pytest.raises(ZeroDivisionError):
            trainer.fit(Fails(), loader)
    else:
        trainer.fit(Fails(), loader)
    assert strategy.sync_period == 3


@pytest.mark.parametrize("at", ["later", "epoch:x", -1, 1.5, True, None, "epoch:-1"])
def test_bad_moments(at):
    with pytest.raises(ValueError, match="is no moment to switch"):
        PostLocalSwitch(at=at)


def test_bad_periods():
    with pytest.raises(ValueError, match="at least 1"):
        PostLocalSwitch(at=3, sync_period=0)


def test_needs_local_sgd():
    trainer = L.Trainer(accelerator="cpu", callbacks=[PostLocalSwitch()], max_steps=1, enable_checkpointing=False, **QUIET)
    with pytest.raises(MisconfigurationException, match="LocalSGDStrategy"):
        trainer.fit(SmallNet(), DataLoader(Augmented(), batch_size=3))


def test_a_fraction_of_endless_training_is_refused():
    with pytest.raises(MisconfigurationException, match="how long training is"):
        train(PostLocalSwitch(at=0.5), max_epochs=-1)


def test_a_fraction_of_data_without_a_length_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([Augmented()[k] for k in range(6)])

    trainer = L.Trainer(
        strategy=LocalSGDStrategy(replicas_per_device=1),
        accelerator="cpu",
        devices=1,
        callbacks=[PostLocalSwitch(at=0.5)],
        max_epochs=2,
        enable_checkpointing=False,
        **QUIET,
    )
    with pytest.raises(MisconfigurationException, match="how long training is"):
        trainer.fit(SmallNet(), DataLoader(Stream(), batch_size=3))
