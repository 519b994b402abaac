"""Rounds of clients inside one Trainer: layouts over ranks, resumes, counters, clients that fail."""

from __future__ import annotations

import collections
import os
import signal
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_distopt import ClientMonitor, FederatedStrategy, LocalSGDStrategy
from lightning_distopt.federated import FedAdam, FedAvgM, FedDF, OneBit, cohorts
from lightning_distopt.strategies import checkpoint
from tests.conformance.problems import QUIET, Augmented, SmallNet
from tests.federated.problem import BATCH, EPOCHS, SIZES, fit_net, fit_quadratic, problem, run


def same(one, other, atol=1e-10):
    torch.testing.assert_close(one["models"], other["models"], rtol=0, atol=atol)
    torch.testing.assert_close(one["buffers"], other["buffers"], rtol=0, atol=atol)
    torch.testing.assert_close(one["losses"], other["losses"], rtol=0, atol=atol)
    for name in ("up", "down", "rounds", "dropped"):
        assert one[name] == other[name]


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}], ids=str)
def test_does_not_depend_on_the_number_of_ranks(ranks, options):
    one, *others = [ranks.run(world_size, fit_net, **dict(options)) for world_size in (1, 2, 4)]
    for result in [result for results in others for result in results]:
        same(one[0], result)


def test_counts_the_steps_of_the_longest_rank(ranks):
    steps, chosen = problem().steps, problem().cohorts
    alone = ranks.run(1, fit_quadratic)[0]
    assert alone["global_step"] == sum(steps[k] for S in chosen for k in S)
    first, second = ranks.run(2, fit_quadratic)
    assert first["global_step"] == second["global_step"] < alone["global_step"]
    assert EPOCHS * len(SIZES) // 2 < first["global_step"]


class Stop(Exception):
    pass


class SaveAndFail(L.Callback):
    """Saves a checkpoint after so many batches, which are turns, and fails: training has no time to end properly."""

    def __init__(self, turns: int, path: str) -> None:
        self.left, self.path = turns, path

    def on_train_batch_end(self, trainer, module, *args) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)
            raise Stop


def stop_and_resume(rank, world_size, turns, folder, **options):
    """Rounds of six clients, each of whom has a turn of its own."""
    path, before = f"{folder}/stopped.ckpt", cohorts.STEPS_PER_TURN
    cohorts.STEPS_PER_TURN = 1
    try:
        with pytest.raises(Stop):
            fit_net(rank, world_size, callbacks=[SaveAndFail(turns, path)], **options)
        torch.manual_seed(99)
        return fit_net(rank, world_size, ckpt_path=path, **options)
    finally:
        cohorts.STEPS_PER_TURN = before


@pytest.mark.parametrize("policy", [{}, {"optimizer_state": "keep", "buffers": "local", "uplink": "top_k:0.3"}], ids=str)
@pytest.mark.parametrize(("world_size", "turns"), [(1, 2), (1, 6), (1, 11), (2, 3), (2, 4)])
def test_resumes_exactly_after_and_inside_a_round(ranks, tmp_path, world_size, turns, policy):
    whole = ranks.run(world_size, fit_net, strategy=policy)
    rest = ranks.run(world_size, stop_and_resume, turns, str(tmp_path), strategy=policy)
    for a, b in zip(whole, rest, strict=True):
        assert len(b["models"]) == 3 - turns * world_size // 6
        assert torch.equal(a["models"][-1], b["models"][-1])
        assert all(torch.equal(x, y) for x, y in zip(a["buffers"], b["buffers"], strict=True))
        assert a["losses"][-1] == b["losses"][-1]
        assert (a["up"], a["down"], a["global_step"]) == (b["up"], b["down"], b["global_step"])


def save_at(rank, world_size, epoch, folder, **options):
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    fit_net(rank, world_size, callbacks=[saver], enable_checkpointing=True, **options)


def resume_at(rank, world_size, path, **options):
    return fit_net(rank, world_size, ckpt_path=path, **options)


def test_goes_on_with_another_number_of_ranks(ranks, tmp_path):
    whole = ranks.run(1, fit_net)[0]
    ranks.run(2, save_at, 1, str(tmp_path))
    (path,) = tmp_path.glob("epoch=1*.ckpt")
    for world_size in (1, 4):
        for result in ranks.run(world_size, resume_at, str(path)):
            torch.testing.assert_close(result["models"][-1], whole["models"][-1], rtol=0, atol=1e-10)
            torch.testing.assert_close(result["losses"][-1], whole["losses"][-1], rtol=0, atol=1e-10)
            assert result["up"] == whole["up"]


def fit_in_rows(rank, world_size, m, **options):
    """Train `m` clients at once, with an aggregator that has a memory; returns what is warned about as well."""
    warned, before = [], checkpoint.rank_zero_warn
    checkpoint.rank_zero_warn = warned.append
    try:
        return fit_quadratic(rank, world_size, FedAvgM(), strategy={"replicas_per_device": m}, **options), warned
    finally:
        checkpoint.rank_zero_warn = before


@pytest.mark.parametrize("layout", [(2, 1), (2, 2), (1, 4), (1, 1)], ids=str)
def test_goes_on_in_another_layout(ranks, tmp_path, layout):
    """Also in one with as many rows, whose files would not fit."""
    whole, _ = ranks.run(1, fit_in_rows, 4)[0]
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    ranks.run(1, fit_in_rows, 4, callbacks=[saver], enable_checkpointing=True)
    m, world_size = layout
    (path,) = tmp_path.glob("epoch=1*.ckpt")
    for result, warned in ranks.run(world_size, fit_in_rows, m, ckpt_path=str(path)):
        torch.testing.assert_close(result["models"][-1], whole["models"][-1], rtol=0, atol=1e-10)
        assert warned == []


class BeforeZeroing(L.Callback):
    """Counts how often gradients are about to be dropped."""

    count = 0

    def on_before_zero_grad(self, *args):
        self.count += 1


def count_zeroing(rank, world_size, **options):
    callback = BeforeZeroing()
    return fit_net(rank, world_size, callbacks=[callback], **options)["global_step"], callback.count


def test_hooks_before_gradients_are_dropped_run_for_every_step_of_clients(ranks):
    """And once a round for Lightning's own step."""
    ((steps, count),) = ranks.run(1, count_zeroing)
    assert count == steps + 3


@pytest.mark.parametrize("turns", [2, 6])
@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"clients": 9, "fraction": 2 / 3}, "saved with 10 clients, and is resumed with 9: resume with the same data"),
        ({"partition": [list(range(7 + k, 14 + k)) for k in range(9)] + [[0]]}, "of client 9, and is resumed with 1:"),
        (
            {"partition": [range(7 * k, 7 * k + 7) for k in reversed(range(10))]},
            "as many samples of each client, but other ones:",
        ),
    ],
    ids=["clients", "partition", "division"],
)
def test_other_clients_are_refused(ranks, tmp_path, turns, other, says):
    def resume(rank, world_size):
        stop_and_resume(rank, world_size, turns, str(tmp_path))
        with pytest.raises(MisconfigurationException, match=says):
            fit_net(rank, world_size, ckpt_path=f"{tmp_path}/stopped.ckpt", strategy=other)

    ranks.run(1, resume)


class Poisoned(Augmented):
    """Data whose last samples are not finite."""

    def __getitem__(self, k):
        x, y = super().__getitem__(k)
        return (x * float("nan") if k >= 63 else x), y


def fit_poisoned(rank, world_size, parts, **options):
    torch.manual_seed(3)
    strategy = {"clients": 10, "fraction": 1.0, "partition": parts, **options}
    return run(rank, world_size, SmallNet().double(), DataLoader(Poisoned(), 3, shuffle=True), strategy, rounds=2)


@pytest.mark.parametrize("world_size", [1, 2])
def test_drops_clients_that_are_not_finite(ranks, world_size):
    """The ninth client has all the poison: the others are averaged as if it were not there."""
    parts = [list(range(7 * k, 7 * k + 7)) for k in range(10)]
    for result in ranks.run(world_size, fit_poisoned, parts):
        assert result["dropped"] == [[9], [9]]
        assert torch.isfinite(result["models"]).all() and all(torch.isfinite(b).all() for b in result["buffers"])
        assert sorted(result["losses"][1]) == list(range(9))


@pytest.mark.parametrize("world_size", [1, 2])
def test_others_are_averaged_as_if_dropped_clients_were_not_there(ranks, world_size):
    """All clients of the second federation are sound, and the same as the first nine of the first one."""
    parts = [list(range(7 * k, 7 * k + 7)) for k in range(10)]
    poisoned = ranks.run(world_size, fit_poisoned, parts)[0]
    sound = ranks.run(world_size, fit_poisoned, parts[:9], clients=9)[0]
    torch.testing.assert_close(poisoned["models"], sound["models"], rtol=0, atol=1e-12)
    torch.testing.assert_close(poisoned["buffers"], sound["buffers"], rtol=0, atol=1e-12)


def test_all_clients_dropped_leave_the_model_as_it_is(ranks):
    parts = [[63 + k % 7] for k in range(10)]
    models = ranks.run(1, fit_poisoned, parts)[0]["models"]
    assert torch.equal(models[0], models[1])
    assert torch.isfinite(models).all()


class Patient(SmallNet):
    """Skips batches whose loss is not finite, has another norm in front, and a buffer that is infinite on purpose."""

    def __init__(self, optimizer="sgd"):
        super().__init__(optimizer)
        self.first = torch.nn.BatchNorm2d(1, affine=False)
        self.register_buffer("mask", torch.full((3,), float("-inf")))

    def forward(self, x):
        return super().forward(self.first(x))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if loss.isfinite() else None


def fit_patient(rank, world_size, policy):
    torch.manual_seed(3)
    parts = [list(range(7 * k, 7 * k + 7)) for k in range(10)]
    strategy = {"clients": 10, "fraction": 1.0, "partition": parts, "buffers": policy}
    return run(rank, world_size, Patient().double(), DataLoader(Poisoned(), 3), strategy, rounds=2)


@pytest.mark.parametrize("policy", ["average", "local"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_drops_clients_whose_buffers_have_become_not_finite(ranks, world_size, policy):
    for result in ranks.run(world_size, fit_patient, policy):
        assert result["dropped"] == [[9], [9]]
        mask = [b for b in result["buffers"] if b.isinf().any()]
        assert len(mask) == 1 and mask[0].isneginf().all()
        assert not any(b.isnan().any() for b in result["buffers"])


class Collectives(L.Callback):
    """Counts the collectives of training, by name."""

    def on_train_start(self, trainer, module):
        self.counts, communicator = collections.Counter(), trainer.strategy.algorithm.communicator
        for name in ("sum", "broadcast"):
            setattr(communicator, name, partial(self.call, name, getattr(communicator, name)))

    def call(self, name, function, *args, **kwargs):
        self.counts[name] += 1
        return function(*args, **kwargs)


def count_collectives(rank, world_size, aggregator):
    torch.manual_seed(3)
    module, counting = SmallNet().double(), Collectives()
    module.norm = torch.nn.Sequential(*(torch.nn.BatchNorm2d(4) for _ in range(5))).double()
    strategy = {"aggregator": aggregator, "clients": 10, "fraction": 0.6}
    run(rank, world_size, module, DataLoader(Augmented(), BATCH), strategy, 1, callbacks=[counting])
    return dict(counting.counts)


def test_a_round_has_a_collective_for_each_kind_of_tensor(ranks):
    """Parameters, buffers, counts of batches; then the buffers and parameters of the student, and the counts."""
    assert ranks.run(2, count_collectives, "fedavg") == [{"sum": 3}] * 2
    unlabelled = torch.randn(4, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for counts in ranks.run(2, count_collectives, FedDF(unlabelled, steps=1)):
        assert counts["broadcast"] == 2


class Seen(L.Callback):
    """Notes what other callbacks would."""

    def __init__(self) -> None:
        self.rates, self.steps, self.batches = [], [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.steps.append(trainer.global_step)
        self.batches.append(batch)
        assert torch.isfinite(outputs["loss"])

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def fit_seen(rank, world_size, folder, **options):
    seen, before = Seen(), cohorts.STEPS_PER_TURN
    cohorts.STEPS_PER_TURN = 3
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=25, save_top_k=-1)
    try:
        result = fit_net(rank, world_size, callbacks=[seen, saver], enable_checkpointing=True, **options)
    finally:
        cohorts.STEPS_PER_TURN = before
    return result, seen.rates, seen.steps, seen.batches, saver._every_n_train_steps


def test_steps_count_at_ends_of_rounds(ranks, tmp_path):
    """Six clients of seven samples: 18 steps a round, in turns of at least three."""
    result, rates, steps, batches, every = ranks.run(1, fit_seen, str(tmp_path), rounds=7)[0]
    assert sorted(set(steps)) == [18 * t for t in range(8)] and result["global_step"] == 7 * 18
    assert [turn.index for turn in batches[:3]] == [0, 1, 2]
    assert len(rates) == 7 * 18
    assert rates == pytest.approx([0.1] * 5 * 18 + [0.07] * 2 * 18)  # a step of the scheduler is a round
    assert {path.name for path in tmp_path.iterdir()} == {f"step={step}.ckpt" for step in (36, 54, 90, 108, 126)}
    assert type(every) is int


class StepWise(SmallNet):
    """A schedule that need not know how long training is."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def test_schedulers_with_steps_alone_are_warned_of():
    strategy, module = FederatedStrategy(clients=10, fraction=0.6), StepWise().double()
    trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=1, max_steps=20, enable_checkpointing=False, **QUIET)
    with pytest.warns(UserWarning, match="one that needs to know how long training is"):
        trainer.fit(module, DataLoader(Augmented(), BATCH))
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert scheduler.last_epoch == strategy.traffic.rounds == 2  # rounds of 18 steps


def logging_period(rank: int, world_size: int, period: int) -> int:
    class Asks(L.Callback):
        def on_train_start(self, trainer, module) -> None:
            self.found = trainer.log_every_n_steps

    asks = Asks()
    fit_net(rank, world_size, rounds=1, callbacks=[asks], log_every_n_steps=period)
    return asks.found


def test_the_logging_period_is_one_of_rounds(ranks):
    """Of 18 steps here, and never stays never."""
    assert [ranks.run(1, logging_period, period)[0] for period in (0, 1, 18, 54)] == [0, 1, 1, 3]


def test_max_steps_ends_training_at_the_end_of_a_round(ranks, tmp_path):
    result = ranks.run(1, fit_seen, str(tmp_path), rounds=7, max_steps=40)[0][0]
    assert result["global_step"] == 54 and result["rounds"] == 3


def fit_logged(rank, world_size):
    torch.manual_seed(3)
    data = Augmented()
    return fit_net(rank, world_size, validation=DataLoader(TensorDataset(data.x, data.y), 5))


def test_logs_the_mean_over_all_batches_and_validates_the_server(ranks):
    one, two = ranks.run(1, fit_logged)[0], ranks.run(2, fit_logged)[0]
    assert set(one["metrics"]) == {"loss", "val_loss"}
    assert one["metrics"]["val_loss"] == pytest.approx(two["metrics"]["val_loss"], abs=1e-10)


def test_limits_the_batches_of_clients(ranks):
    limited = ranks.run(1, fit_net, limit_train_batches=1)[0]
    assert limited["global_step"] == 3 * 6
    half = ranks.run(1, fit_net, limit_train_batches=0.7)[0]
    assert half["global_step"] == 3 * 6 * 2


def test_local_steps_cross_epochs(ranks):
    assert ranks.run(1, fit_net, strategy={"local_steps": 7})[0]["global_step"] == 3 * 6 * 7


class Logging(SmallNet):
    """Logs what Lightning has to put together over ranks at the end of an epoch."""

    def __init__(self, kind: str) -> None:
        super().__init__("plain")
        self.kind, self.accuracy = kind, MulticlassAccuracy(3, average="micro")

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        loss = torch.nn.functional.cross_entropy(logits, batch[1])
        if self.kind == "metric":
            self.accuracy(logits, batch[1])
            self.log("value", self.accuracy, on_step=False, on_epoch=True)
        else:
            self.log("value", loss, on_step=self.kind == "both", on_epoch=True, sync_dist=True)
        return loss


def fit_logging(rank, world_size, kind, few):
    torch.manual_seed(3)
    data = Augmented()
    strategy = {"clients": 10, "fraction": 0.3 if few else 0.6, "optimizer_state": "keep" if few else "reset"}
    loader = DataLoader(TensorDataset(data.x, data.y), BATCH)
    return run(rank, world_size, Logging(kind).double(), loader, strategy, 3)["metrics"]


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("kind", ["epoch", "both", "metric"])
def test_logs_are_put_together_over_ranks_that_train_different_clients(ranks, kind, few):
    """With few clients, which stay where their state is, some ranks have none, and log nothing by themselves."""
    name = "value_epoch" if kind == "both" else "value"
    one = ranks.run(1, fit_logging, kind, few)[0][name]
    for world_size in (2, 4):
        assert [result[name] for result in ranks.run(world_size, fit_logging, kind, few)] == pytest.approx([one] * world_size)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true"])
def test_works_in_other_precisions(precision):
    loader = DataLoader(Augmented(dtype=torch.float32), BATCH)
    result = run(0, 1, SmallNet(), loader, {"clients": 10, "fraction": 0.5}, 2, precision=precision)
    assert torch.isfinite(result["models"]).all() and (result["models"][0] != result["models"][1]).any()
    assert not any(result["dropped"])


class Counting(SmallNet):
    """Logs how often its training step has run in a round."""

    def training_step(self, batch, batch_idx):
        self.log("steps", torch.ones(()), on_step=False, on_epoch=True, reduce_fx="sum")
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("replicas_per_device", [1, 3])
def test_the_pass_over_all_samples_is_not_logged(replicas_per_device):
    data = Augmented()
    loader = DataLoader(TensorDataset(data.x, data.y), 7)
    strategy = {"aggregator": "mimelite", "clients": 10, "fraction": 0.6, "replicas_per_device": replicas_per_device}
    assert run(0, 1, Counting("plain").double(), loader, strategy, 2)["metrics"]["steps"] == 6


class Signal(L.Callback):
    """Sends SIGTERM to this process in the fourth turn."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def interrupted_and_resumed(rank, world_size, folder):
    before, cohorts.STEPS_PER_TURN = cohorts.STEPS_PER_TURN, 1
    try:
        with pytest.raises(SIGTERMException):
            fit_net(rank, world_size, callbacks=[Signal(), ModelCheckpoint(folder)], enable_checkpointing=True)
        return fit_net(rank, world_size, ckpt_path=f"{folder}/interrupted.ckpt")
    finally:
        cohorts.STEPS_PER_TURN = before


def test_a_signal_inside_a_round_leaves_a_checkpoint_that_goes_on_there(ranks, tmp_path):
    whole, rest = ranks.run(1, fit_net)[0], ranks.run(1, interrupted_and_resumed, str(tmp_path))[0]
    assert len(rest["models"]) == 3
    assert torch.equal(whole["models"][-1], rest["models"][-1]) and whole["losses"][-1] == rest["losses"][-1]


# ------------------------------------------------------------------------------------- what resumes and what does not
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("saved", "resumed", "says"),
    [
        ("fedadam", "fedavgm", "saved with FedAdam, and is resumed with FedAvgM: resume with the same aggregator"),
        ("fedadam", "fedadagrad", "saved with FedAdam, and is resumed with FedAdagrad"),
        ("fedavg", "scaffold", "saved with FedAvg, and is resumed with Scaffold"),
        ("scaffold", "fedavg", "saved with Scaffold, and is resumed with FedAvg"),
        (OneBit("fedavgm"), "fedavgm", r"saved with OneBit\(FedAvgM\), and is resumed with FedAvgM"),
        ("fedavg", "coordinate_median", ""),
        ("fedprox", OneBit("fedavg"), ""),
        ("fedadam", FedAdam(server_lr=0.5), ""),
    ],
    ids=str,
)
def test_another_aggregator_is_refused_where_either_has_a_state(ranks, tmp_path, world_size, saved, resumed, says):
    def resume(rank, world_size):
        save_at(rank, world_size, 1, str(tmp_path), rounds=2, aggregator=saved, optimizer="plain")
        path = str(next(tmp_path.glob("epoch=1*.ckpt")))
        options = {"aggregator": resumed, "optimizer": "plain"}
        if not says:
            return len(resume_at(rank, world_size, path, **options)["models"])
        with pytest.raises(MisconfigurationException, match=says) as caught:
            resume_at(rank, world_size, path, **options)
        assert "\n" not in str(caught.value)
        return 1

    assert ranks.run(world_size, resume) == [1] * world_size


@pytest.mark.parametrize(("resumed", "goes_on"), [("fedadam", True), ("fedadagrad", True), ("fedavgm", False)])
def test_checkpoints_that_do_not_name_the_aggregator_go_by_what_it_keeps(ranks, tmp_path, resumed, goes_on):
    """As those of older versions, which had the state of the round's loader too."""

    def resume(rank, world_size):
        save_at(rank, world_size, 1, str(tmp_path), rounds=2, aggregator="fedadam")
        path = str(next(tmp_path.glob("epoch=1*.ckpt")))
        state = torch.load(path, weights_only=True)
        del state[checkpoint.ALONE]["kind"]
        assert "combined_loader" not in state["loops"]["fit_loop"]["state_dict"]
        state["loops"]["fit_loop"]["state_dict"]["combined_loader"] = [{}]
        torch.save(state, path)
        if goes_on:
            return resume_at(rank, world_size, path, aggregator=resumed)["rounds"]
        with pytest.raises(MisconfigurationException, match="saved with another aggregator, and is resumed with FedAvgM"):
            resume_at(rank, world_size, path, aggregator=resumed)
        return 3

    assert ranks.run(1, resume) == [3]


def fit_and_save(strategy, path, **options):
    """Train, save after `fit`, and return the module."""
    settings = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "max_epochs": 2, **QUIET, **options}
    trainer = L.Trainer(strategy=strategy, **settings)
    module = SmallNet("plain").double()
    trainer.fit(module, DataLoader(Augmented(), BATCH))
    trainer.save_checkpoint(path)
    return module


@pytest.mark.parametrize("saved", ["a federation", "another strategy"])
def test_a_checkpoint_without_the_server_is_warned_of(tmp_path, saved):
    path = tmp_path / "after.ckpt"
    strategy = FederatedStrategy("fedadam", clients=10, fraction=0.6)
    before = fit_and_save(strategy if saved == "a federation" else "auto", path)
    assert checkpoint.ALONE not in torch.load(path, weights_only=True)

    class Start(L.Callback):
        def on_train_start(self, trainer, module):
            assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before.parameters(), strict=True))
            assert trainer.current_epoch == 2

    options = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "max_epochs": 3, **QUIET}
    trainer = L.Trainer(strategy=FederatedStrategy("fedadam", clients=10, fraction=0.6), callbacks=[Start()], **options)
    with pytest.warns(UserWarning, match="has a model and no server .* begin anew; those of `ModelCheckpoint`"):
        trainer.fit(SmallNet("plain").double(), DataLoader(Augmented(), BATCH), ckpt_path=path)
    assert trainer.strategy.algorithm.round == 3


def test_a_checkpoint_with_the_server_is_not_warned_of(tmp_path, recwarn):
    class Saving(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.save_checkpoint(tmp_path / "inside.ckpt")

    for path in (None, tmp_path / "inside.ckpt"):
        strategy = FederatedStrategy("fedadam", clients=10, fraction=0.6)
        options = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "max_epochs": 3 if path else 2, **QUIET}
        trainer = L.Trainer(strategy=strategy, callbacks=[Saving()], **options)
        trainer.fit(SmallNet("plain").double(), DataLoader(Augmented(), BATCH), ckpt_path=path)
    assert not [warning for warning in recwarn if "no server" in str(warning.message)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_plain_trainer_goes_on_from_inside_a_round(ranks, tmp_path, world_size):
    def save(rank, world_size):
        before, cohorts.STEPS_PER_TURN = cohorts.STEPS_PER_TURN, 1
        try:
            with pytest.raises(Stop):
                fit_net(rank, world_size, "fedadam", callbacks=[SaveAndFail(2, f"{tmp_path}/stopped.ckpt")])
        finally:
            cohorts.STEPS_PER_TURN = before

    ranks.run(world_size, save)
    options = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "max_epochs": 2, **QUIET}
    for strategy in ("auto", LocalSGDStrategy(sync_period=2, replicas_per_device=3)):
        trainer, module = L.Trainer(strategy=strategy, **options), SmallNet().double()
        trainer.fit(module, DataLoader(Augmented(), BATCH), ckpt_path=f"{tmp_path}/stopped.ckpt")
        assert trainer.current_epoch == 2


# ------------------------------------------------------------------------------------------------ ranks without clients
class Reduced(SmallNet):
    """Logs its loss without `sync_dist`, in each of the ways that values are put together."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for reduce_fx in ("mean", "max", "min", "sum"):
            self.log(reduce_fx, loss, on_step=False, on_epoch=True, reduce_fx=reduce_fx)
        self.log("both", loss, on_step=True, on_epoch=True)
        return loss


class Watched(EarlyStopping):
    """Keeps what it has looked at."""

    def __init__(self):
        super().__init__("mean", patience=10, check_on_train_epoch_end=True)
        self.seen = []

    def on_train_epoch_end(self, trainer, module):
        super().on_train_epoch_end(trainer, module)
        self.seen.append({name: trainer.callback_metrics[name].item() for name in ("mean", "max", "min", "sum", "both_step")})


def fit_reduced(rank, world_size, fraction):
    torch.manual_seed(3)
    watched, strategy = Watched(), {"clients": 10, "fraction": fraction}
    run(rank, world_size, Reduced("plain").double(), DataLoader(Augmented(), BATCH), strategy, 3, callbacks=[watched])
    return watched.seen


@pytest.mark.parametrize("clients", [1, 2])
def test_ranks_without_clients_log_what_the_others_have(ranks, clients):
    """One or two clients of 7 samples, on three ranks; stopping and saving look at what the rank itself has."""
    alone = ranks.run(1, fit_reduced, clients / 10)[0]
    of_ranks = ranks.run(3, fit_reduced, clients / 10)
    assert [len(seen) for seen in (alone, *of_ranks)] == [3] * 4
    for t, one in enumerate(alone):
        busy, idle = (
            [seen[t] for seen in of_ranks if seen[t]["sum"] != 0],
            [seen[t] for seen in of_ranks if seen[t]["sum"] == 0],
        )
        assert (len(busy), len(idle)) == (clients, 3 - clients)
        for other in idle:
            assert other["mean"] == pytest.approx(one["mean"], abs=1e-12)
            assert (other["max"], other["min"]) == (pytest.approx(one["max"]), pytest.approx(one["min"]))
            assert other["both_step"] == pytest.approx(sum(seen["both_step"] for seen in busy) / clients)


def test_values_of_trials_can_be_watched_as_the_page_says(tmp_path):
    """With trials every third round, callbacks that act on them in every round look for values that are not there yet."""
    name = "federated/client_accuracy"
    saver = ModelCheckpoint(tmp_path, monitor=name, mode="max", save_on_train_epoch_end=True, every_n_epochs=3, save_top_k=-1)
    stopper = EarlyStopping(name, mode="max", check_on_train_epoch_end=True, strict=False, patience=9)
    strategy = FederatedStrategy(clients=10, fraction=0.6)
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": 7, **QUIET}
    trainer = L.Trainer(strategy=strategy, callbacks=[ClientMonitor(every_n_rounds=3), saver, stopper], **options)
    trainer.fit(SmallNet("plain").double(), DataLoader(Augmented(), BATCH))
    assert trainer.current_epoch == 7
    assert len(list(tmp_path.iterdir())) == 2
