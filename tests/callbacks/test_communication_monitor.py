"""`CommunicationMonitor`: what it logs, measures, sums up and advises, and that training does not notice it."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from lightning_distopt import (
    CHOCO,
    DCD,
    CommunicationMonitor,
    ConsensusControl,
    GossipStrategy,
    LocalSGDStrategy,
    PostLocalSwitch,
)
from lightning_distopt.algorithms import Algorithm
from lightning_distopt.callbacks import communication_advice, communication_monitor
from lightning_distopt.communication import Communicator, Replicas, all_reduce_bytes
from lightning_distopt.strategies.base import ReplicaStrategy
from lightning_distopt.topologies import make
from tests.conformance.cases import CASES, Case
from tests.conformance.problems import LAYOUTS, QUIET, Augmented, SmallNet, fit, fit_net
from tests.strategies.test_coupling import Collectives

BY_NAME = {case.name: case for case in CASES}
LOCAL = BY_NAME["local_sgd"]  # H = 3
ROW = Replicas(SmallNet().double()).parameters[0].shape[1]  # values of a replica


class Ring(Algorithm):
    """Every replica mixes with its neighbours after every second step; none agree."""

    def ends_round(self, step):
        return step % 2 == 1

    def after_step(self, step):
        if not self.ends_round(step):
            return 0
        n = self.communicator.num_replicas
        eye = torch.eye(n)
        for block in self.replicas.parameters:
            self.communicator.mix(block, (eye + eye.roll(1, 0) + eye.roll(-1, 0)) / 3)
        self.communicator.traffic.rounds += 1
        return n


RING = Case("ring", lambda **kw: ReplicaStrategy(Ring(), **kw), oracle=None, rounds=lambda steps: steps // 2)


class Notes(L.Callback):
    """Notes every round's iterates before and after it, and after every batch what the monitor has logged."""

    def __init__(self):
        self.before, self.after, self.groups, self.steps, self.logged = [], [], [], [], []

    def on_before_round(self, trainer, pl_module):
        self.before.append(trainer.strategy.replica_parameters())

    def on_after_round(self, trainer, pl_module, group):
        self.after.append(trainer.strategy.replica_parameters())
        self.groups.append(group)
        self.steps.append(trainer.strategy.steps)

    def on_train_batch_end(self, trainer, *args):
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("comm/")})


def noted(rank, world_size, m, case, every=1, more=(), **options):
    notes, monitor = Notes(), CommunicationMonitor(consensus_every=every)
    result = fit_net(rank, world_size, m, case, callbacks=(monitor, notes, *more), log_every_n_steps=1, **options)
    iterates = {name: torch.stack(vars(notes)[name]) for name in ("before", "after") if notes.before}
    return {**result, **vars(notes), **iterates, "monitor": monitor}


# ------------------------------------------------------------------------------------------------- the consensus distance
@pytest.mark.parametrize("layout", LAYOUTS[4], ids=str)
@pytest.mark.parametrize("case", [LOCAL, BY_NAME["hierarchical_local_sgd"], RING], ids=str)
def test_consensus_distance(ranks, case, layout):
    m, world_size = layout
    results = ranks.run(world_size, noted, m, case, max_epochs=2)
    when = "after" if case is RING else "before"  # the round, that is
    x = torch.cat([result[when] for result in results], dim=1).numpy()  # [rounds, n, d]
    expected = np.sqrt(np.mean(np.sum((x - x.mean(axis=1, keepdims=True)) ** 2, axis=2), axis=1))
    assert expected.min() > 0.01
    for result in results:
        over_all = [k for k, group in enumerate(result["groups"]) if group == 4]
        assert len(over_all) == {"local_sgd": 4, "hierarchical_local_sgd": 2, "ring": 6}[case.name]
        for k in over_all:
            logged = result["logged"][result["steps"][k]]["comm/consensus_distance"]
            assert logged == pytest.approx(expected[k], rel=1e-12)  # sums of about 1500 doubles in another order
        assert "comm/consensus_distance" not in result["logged"][result["steps"][over_all[0]] - 1]


GOSSIP = {
    "dsgd": {},
    "dsgd_ring_local_steps": {"topology": "ring", "gossip_steps": 2, "sync_period": 3},
    "dpsgd": {"algorithm": "dpsgd"},
    "choco": {"algorithm": CHOCO(0.4, "sign"), "sync_period": 2},
    "dcd": {"algorithm": DCD("qsgd:8")},
}


def gossip(name):
    return Case(name, lambda **kw: GossipStrategy(**GOSSIP[name], **kw), oracle=None, rounds=None)


@pytest.mark.parametrize("layout", LAYOUTS[4], ids=str)
@pytest.mark.parametrize("name", GOSSIP)
def test_gossip(ranks, name, layout):
    """The distance is that of the iterates that a round leaves, the estimate that of its last gossip step."""
    m, world_size = layout
    without = ranks.run(world_size, fit_net, m, gossip(name), max_epochs=2)
    results = ranks.run(world_size, noted, m, gossip(name), 2, max_epochs=2)
    before, after = (torch.cat([result[key] for result in results], dim=1).numpy() for key in ("before", "after"))
    xi = np.sqrt(np.mean(np.sum((after - after.mean(axis=1, keepdims=True)) ** 2, axis=2), axis=1))
    W, d = make("ring", 4).matrix().numpy(), ROW
    measured = range(0, len(after), 2)
    for result, plain in zip(results, without, strict=True):
        torch.testing.assert_close(result["rows"], plain["rows"], rtol=0, atol=0)
        torch.testing.assert_close(result["state"], plain["state"], rtol=0, atol=0)
        for k in measured:
            logged = result["logged"][result["steps"][k]]
            assert logged["comm/consensus_distance"] == pytest.approx(xi[k], rel=1e-12)
            if name == "dsgd_ring_local_steps":
                theta = np.sqrt(np.mean(np.sum(((W @ W - W) @ before[k]) ** 2, axis=1)))
                assert logged["comm/consensus_estimate"] == pytest.approx(theta, rel=1e-10)
            elif name == "dsgd":
                theta = np.sqrt(np.mean(np.sum((after[k] - before[k]) ** 2, axis=1)))
                assert logged["comm/consensus_estimate"] == pytest.approx(theta, rel=1e-10)
            assert ("comm/consensus_estimate" in logged) == (name != "dcd")
            if k + 1 < len(after):  # not measured: what is logged is that of the one before
                following = result["logged"][result["steps"][k + 1]]
                assert following["comm/consensus_distance"] == logged["comm/consensus_distance"]
        charged = len(measured) * (all_reduce_bytes(d, 8, 4) + (1 if name == "dcd" else 2) * all_reduce_bytes(1, 8, 4))
        if world_size > 1 and len(result["steps"]) < 20:
            charged += 4 * all_reduce_bytes(d, 8, 4)  # to time them, for the advice
        assert result["traffic"]["evaluation_bytes"] - plain["traffic"]["evaluation_bytes"] == charged
        assert result["traffic"]["bytes_sent"] == plain["traffic"]["bytes_sent"]


class Measures(L.Callback):
    """Notes whether the algorithm measures, at the end of every batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *args):
        self.seen.append(trainer.strategy.algorithm.measures)


def test_measuring_ends_with_the_round_also_where_a_control_allows_none():
    for options in ({"phases": "step:5-", "outside": "nothing"}, {"target": "constant", "reference": 1.0}, {}):
        control, measures = ConsensusControl(**options), Measures()
        noted(0, 1, 4, gossip("dsgd"), every=1, more=(control, measures), max_epochs=2)
        efficient = control.target == "efficient"
        waits = control.outside == "nothing"
        assert measures.seen == [True] * 12 if efficient else measures.seen == [False] * 12
        assert control.rounds == (7 if waits else 12)


def test_the_busiest_replica(ranks):
    case = Case("star", lambda **kw: GossipStrategy(topology="star", **kw), oracle=None, rounds=None)
    for m, world_size in LAYOUTS[4]:
        for result in ranks.run(world_size, noted, m, case, 0, max_epochs=1):
            summary = result["monitor"].summary
            # Six gossip steps; the hub sends to three, the others to one.
            assert summary["bytes_sent_max"] == 3 * 6 * 8 * ROW
            assert summary["bytes_sent"] == 6 * 8 * ROW * (3 + 1 + 1 + 1) // 4
            assert result["metrics"]["comm/bytes_sent"] == result["traffic"]["bytes_sent"]


def test_no_distance_where_gradients_are_averaged(ranks):
    for result in ranks.run(2, noted, 2, BY_NAME["post_local_sgd"], max_epochs=2):  # 12 steps, 7 of them before the switch
        distances = [logged["comm/consensus_distance"] for logged in result["logged"]]
        assert distances[:9] == [0.0] * 9
        assert min(distances[9:]) > 0


@pytest.mark.parametrize("layout", [(4, 1), (1, 4)], ids=str)
def test_what_it_sends_is_charged_to_evaluation(ranks, layout):
    m, world_size = layout
    d = Replicas(SmallNet().double()).parameters[0].shape[1]
    without = ranks.run(world_size, fit_net, m, LOCAL, max_epochs=2)[0]["traffic"]
    for every, measurements in ((0, 0), (1, 4), (3, 2)):  # of 4 rounds
        for result in ranks.run(world_size, noted, m, LOCAL, every, max_epochs=2):
            assert ("comm/consensus_distance" in result["logged"][-1]) == (every > 0)
            charged = measurements * all_reduce_bytes(1, 8, 4)
            if world_size > 1:
                charged += 4 * all_reduce_bytes(d, 8, 4)  # to time them, for the advice
            assert result["traffic"]["evaluation_bytes"] - without["evaluation_bytes"] == charged
            assert result["traffic"]["bytes_sent"] == without["bytes_sent"]


# ------------------------------------------------------------------------------------------------ training is not touched
@pytest.mark.parametrize("layout", LAYOUTS[4], ids=str)
@pytest.mark.parametrize("name", ["local_sgd", "minibatch_sgd", "hierarchical_gradients_in_blocks"])
def test_training_is_bit_identical(ranks, name, layout):
    m, world_size = layout
    without = ranks.run(world_size, fit_net, m, BY_NAME[name])
    for one, other in zip(ranks.run(world_size, noted, m, BY_NAME[name]), without, strict=True):
        torch.testing.assert_close(one["rows"], other["rows"], rtol=0, atol=0)
        torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=0)
        assert one["traffic"]["rounds"] == other["traffic"]["rounds"]


def counted(rank, world_size):
    collectives, monitor = Collectives(), CommunicationMonitor(consensus_every=2)
    given = []

    class Given(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            given.append(monitor.advice)

    fit_net(rank, world_size, 1, LOCAL, callbacks=(collectives, monitor, Given()), max_epochs=6, log_every_n_steps=1)
    return [call for call in collectives.calls if call[0] is not None], given


def test_it_communicates_at_rounds_only(ranks):
    for calls, given in ranks.run(2, counted):
        assert {batch for batch, _ in calls} == {2, 5, 8, 11}  # 12 steps an epoch, H = 3
        # 24 rounds with a mean and a flag; the distance in every second one; four all-reduces that are timed.
        assert sum(name == "all_reduce" for _, name in calls) >= 24 * 2 + 12 + 4
        assert [advice is None for advice in given] == [True] * 59 + [False] * 13  # after 20 rounds


# --------------------------------------------------------------------------------------------------------------- logging
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


class Clock(L.Callback):
    """A clock for the monitor that goes by a second for each batch, by a hundred for a validation, and not otherwise.

    In each batch a quarter of a second is waiting.
    """

    now = 0.0

    def on_train_batch_start(self, trainer, *args):
        self.now += 1
        trainer.strategy.traffic.add_interval(0.0, 0.25)

    def on_validation_batch_start(self, *args):
        self.now += 100


def watched(m=2, n_batches=24, strategy=None, callbacks=(), module=None, **options):
    """Train on one rank with that clock, validating after each of two epochs and before the first."""
    clock, lines, monitor = Clock(), Lines(), CommunicationMonitor(consensus_every=1)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy or LocalSGDStrategy(3, replicas_per_device=m),
        callbacks=[clock, monitor, *callbacks],
        max_epochs=2,
        enable_checkpointing=False,
        **{**QUIET, "logger": lines, "num_sanity_val_steps": 1, **options},
    )
    data = Augmented(n_batches // 2 * m * 3, torch.float32)
    with mock.patch.object(communication_monitor, "time", SimpleNamespace(perf_counter=lambda: clock.now)):
        trainer.fit(module or SmallNet(), DataLoader(data, batch_size=3), DataLoader(data, batch_size=12))
    return trainer, [line for line in lines.lines if "comm/rounds" in line], monitor


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_logged_and_when(m, accumulate):
    trainer, lines, monitor = watched(m, accumulate_grad_batches=accumulate, log_every_n_steps=4)
    steps = 24 // accumulate
    per_round = trainer.strategy.traffic.bytes_sent / (steps // 3)
    assert [line["step"] for line in lines] == list(range(3, steps, 4))
    for line in lines:
        done = line["step"] + 1
        assert line["comm/rounds"] == done // 3
        assert line["comm/bytes_sent"] == done // 3 * per_round
        assert line["comm/seconds_blocked"] == 0.25 * done * accumulate
        assert line["comm/share_blocked"] == 0.25
        assert line["comm/replica_steps_per_second"] == m / accumulate
        assert (line.get("comm/consensus_distance", 0) > 0) == (m > 1)
    in_bar = {"comm/share_blocked", "comm/consensus_distance"} if m > 1 else {"comm/share_blocked"}
    assert {key for key in trainer.progress_bar_metrics if "comm" in key} == in_bar
    assert monitor.summary["seconds"] == 24
    assert monitor.summary["share_blocked"] == 0.25
    assert monitor.summary["replica_steps_per_second"] == m / accumulate


def test_large_counts_are_logged_exactly():
    class Much(L.Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.strategy.traffic.bytes_sent += 2**40 + 1

    for m in (1, 2):
        _, lines, _ = watched(m, callbacks=[Much()], log_every_n_steps=2)
        assert lines[0]["comm/bytes_sent"] == 2**40 + 1


class Manual(SmallNet):
    """Steps by itself; ranks beyond the first have nothing to learn."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        if self.global_rank == 0:
            self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def manual(rank, world_size):
    torch.manual_seed(1)
    notes, monitor = Notes(), CommunicationMonitor(consensus_every=1)
    loader = DataLoader(Augmented(), batch_size=3)
    options = {"callbacks": (monitor, notes), "precision": "64-true", "max_epochs": 1, "log_every_n_steps": 1}
    fit(rank, world_size, 1, LOCAL, Manual(), loader, **options)
    return notes.logged, monitor.summary, monitor.advice


def test_manual_optimization_and_a_rank_without_backward_passes(ranks):
    results = ranks.run(2, manual)
    for logged, summary, advice in results:
        assert [line["comm/rounds"] for line in logged] == [k // 3 for k in range(1, 13)]
        assert summary["steps"] == 12
        assert "and a backward pass" in advice
    assert results[0][1:] == results[1][1:]


# --------------------------------------------------------------------------------------------------------------- summary
@pytest.mark.parametrize("layout", LAYOUTS[4], ids=str)
def test_summary(ranks, layout):
    m, world_size = layout
    results = ranks.run(world_size, noted, m, LOCAL, max_epochs=2)
    every_step = ranks.run(world_size, fit_net, m, BY_NAME["minibatch_sgd"], max_epochs=2)[0]["traffic"]
    for result in results:
        summary = result["monitor"].summary
        assert summary == results[0]["monitor"].summary
        assert (summary["steps"], summary["replicas"], summary["rounds"]) == (12, 4, 4)
        assert summary["bytes_sent"] == result["traffic"]["bytes_sent"]
        assert summary["bytes_every_step"] == every_step["bytes_sent"]
        assert summary["consensus_distance"] == result["logged"][-1]["comm/consensus_distance"]
        assert summary["bytes_sent_max"] == summary["bytes_sent"]
        assert summary["consensus_estimate"] is None
        assert 0 <= summary["seconds_blocked"] <= summary["seconds_blocked_max"] < summary["seconds"]
        assert (summary["seconds_blocked"] > 0) == (world_size > 1)


def test_summary_and_advice_are_shown(caplog):
    with caplog.at_level("INFO"):
        _, _, monitor = watched(m=2)
    shown = "\n".join(record.getMessage() for record in caplog.records)
    assert "Communication of 2 replica(s) in 24 steps:" in shown
    assert "25.0% of 24 s" in shown
    assert shown.count(monitor.advice) == 1
    assert "nothing crosses a wire" in monitor.advice


# ---------------------------------------------------------------------------------------------------------------- advice
@pytest.mark.parametrize("all_reduce", [0.001, 0.0079, 0.008, 0.009, 0.013, 0.036, 1.0])
@pytest.mark.parametrize("period", [1, 2, 8, 100])
def test_rule(all_reduce, period):
    backward = 0.008
    text = communication_advice.whether_less_is_worth_it(all_reduce, backward, period)
    assert f"H = {period}," in text
    enough = [h for h in range(1, 1001) if all_reduce * (1 - 1 / h) > backward]
    if period in enough:
        assert text.endswith("Communicating less is worth it on this machine.")
    elif enough:
        assert text.endswith(f"Communicating less is worth it on this machine from H = {enough[0]} on.")
    else:
        assert "not worth it" in text


@pytest.mark.parametrize("all_reduce", [0.001, 0.008, 0.009, 0.036])
def test_rounds_that_are_no_all_reduce_get_no_advice_about_local_steps(all_reduce):
    text = communication_advice.whether_less_is_worth_it(all_reduce, 0.008, None)
    assert "With gradients averaged over all replicas at every step the two take" in text and "H = " not in text
    if all_reduce <= 0.008:
        assert text.endswith("the all-reduce hides behind the backward pass.")
    else:
        assert f"waits for less than {1000 * all_reduce - 8:.3g} ms for each optimizer step" in text
    assert "No backward pass could be timed" in communication_advice.whether_less_is_worth_it(all_reduce, None, None)


def test_figures():
    text = communication_advice.whether_less_is_worth_it(0.036, 0.008, 8)
    assert "takes 36 ms here and a backward pass 8 ms" in text
    assert "36 ms of a step, as they overlap; with H = 8, 12.5 ms" in text  # max(8, 36), 8 + 36 / 8


def advised(rank, world_size, case, seconds, **options):
    monitor = CommunicationMonitor()
    with mock.patch.object(communication_monitor, "time_all_reduce", lambda blocks, communicator: seconds):
        fit_net(rank, world_size, 1, case, callbacks=(monitor,), **options)
    return monitor.advice


@pytest.mark.parametrize(("seconds", "verdict"), [(1000.0, "is worth it on this machine."), (0.0, "is not worth it")])
def test_advice_at_the_end_of_short_training(ranks, seconds, verdict):
    advices = ranks.run(2, advised, LOCAL, seconds, max_epochs=1)
    assert verdict in advices[0] and "with H = 3," in advices[0]
    assert advices[1] == advices[0]


def test_backward_passes_that_average_gradients_say_nothing(ranks):
    assert "none could be timed for itself" in ranks.run(2, advised, BY_NAME["minibatch_sgd"], 1.0, max_epochs=1)[0]
    switched = Case("late", LOCAL.strategy, None, LOCAL.rounds, callbacks=lambda: [PostLocalSwitch(at=9)])
    assert "with H = 3, " in ranks.run(2, advised, switched, 1000.0, max_epochs=1)[0]


@pytest.mark.parametrize("name", ["dsgd_ring_local_steps", "choco"])
def test_advice_for_gossip_does_not_price_its_rounds_as_all_reduces(ranks, name):
    for seconds, verdict in ((1000.0, "Rounds that send something else, as here, take less where"), (0.0, "is not worth it")):
        advice = ranks.run(2, advised, gossip(name), seconds, max_epochs=1)[0]
        assert verdict in advice and "H = " not in advice


def test_blocks_count_rounds_over_all_replicas(ranks):
    # H = 2, every third round is over all replicas.
    assert "with H = 6," in ranks.run(4, advised, BY_NAME["hierarchical_local_sgd"], 1000.0, max_epochs=2)[0]


def timed(rank, world_size, longest):
    communicator = Communicator()
    blocks = [torch.ones(1, 1000, dtype=torch.float64), torch.ones(1, 500)]
    with mock.patch.object(communication_advice, "SCRATCH", longest):
        seconds = communication_advice.time_all_reduce(blocks, communicator)
    assert all((block == 1).all() for block in blocks)
    counts = communicator.traffic.state_dict()
    communicator.close()
    return seconds, counts


@pytest.mark.parametrize(("longest", "values"), [(10**6, 1000), (100, 100)])
def test_timing_an_all_reduce(ranks, longest, values):
    for seconds, counts in ranks.run(2, timed, longest):
        assert seconds > 0
        assert counts == {
            "bytes_sent": 0,
            "bytes_by_row": [0],
            "rounds": 0,
            "seconds_blocked": 0,
            "evaluation_bytes": 4 * values * 8,
            "bytes_up": 0,
            "bytes_down": 0,
        }


class Event:
    """A CUDA event's part that the monitor reads; times are milliseconds."""

    def __init__(self, ms):
        self.ms = ms

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.ms - self.ms


def test_median_of_backward_passes():
    times = [(0.0, 5.0), (5.0, 6.0), (6.0, 8.0)]
    assert communication_advice.median_seconds(times) == 2.0
    assert communication_advice.median_seconds([(Event(a), Event(b)) for a, b in times]) == 0.002
    assert communication_advice.median_seconds([]) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    def train(accelerator):
        L.seed_everything(7, verbose=False)
        module = SmallNet()
        module.dropout = torch.nn.Identity()  # CPU and GPU draw different masks
        monitor, strategy = CommunicationMonitor(consensus_every=1), LocalSGDStrategy(3, replicas_per_device=4)
        options = {"precision": "64-true", "max_epochs": 2, "enable_checkpointing": False, **QUIET}
        trainer = L.Trainer(accelerator=accelerator, devices=1, strategy=strategy, callbacks=[monitor], **options)
        data = Augmented()
        trainer.fit(module, DataLoader(TensorDataset(data.x, data.y), batch_size=3))
        assert communication_advice.median_seconds(monitor._backwards) > 0
        return monitor.summary

    gpu, cpu = train("gpu"), train("cpu")
    assert gpu["consensus_distance"] == pytest.approx(cpu["consensus_distance"], rel=1e-8)
    assert gpu["bytes_sent"] == cpu["bytes_sent"]


# ---------------------------------------------------------------------------------------------------------------- resume
def resumed(rank, world_size, m, folder):
    saver = ModelCheckpoint(dirpath=folder, filename="at", every_n_train_steps=7)
    noted(rank, world_size, m, LOCAL, every=2, more=(saver,), max_steps=7, enable_checkpointing=True)
    return noted(rank, world_size, m, LOCAL, every=2, max_epochs=3, ckpt_path=f"{folder}/at.ckpt")


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=str)
def test_resume(ranks, layout, tmp_path):
    m, world_size = layout
    whole = ranks.run(world_size, noted, m, LOCAL, 2, max_epochs=3)
    for result, expected in zip(ranks.run(world_size, resumed, m, str(tmp_path)), whole, strict=True):
        assert len(result["logged"]) == len(expected["logged"]) - 7 > 7
        for line, other in zip(result["logged"], expected["logged"][7:], strict=True):
            for name in ("comm/consensus_distance", "comm/rounds", "comm/bytes_sent"):
                assert line[name] == other[name]
        assert result["monitor"].summary["bytes_every_step"] == expected["monitor"].summary["bytes_every_step"]


def test_advice_is_given_once():
    monitor = CommunicationMonitor()
    state = {"advice": "given before", "consensus_distance": None, "consensus_estimate": 0.5, "rounds": 100}
    monitor.load_state_dict(state)
    assert monitor.state_dict() == state


# --------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("every", [-1, 1.5, True, None, "often"])
def test_bad_options(every):
    with pytest.raises(ValueError, match="whole number of rounds"):
        CommunicationMonitor(consensus_every=every)


def test_needs_replicas():
    options = {"accelerator": "cpu", "max_steps": 1, "enable_checkpointing": False, **QUIET}
    trainer = L.Trainer(callbacks=[CommunicationMonitor()], **options)
    with pytest.raises(MisconfigurationException, match="SingleDeviceStrategy: use one of them"):
        trainer.fit(SmallNet(), DataLoader(Augmented(dtype=torch.float32), batch_size=3))
    trainer.validate(SmallNet(), DataLoader(Augmented(dtype=torch.float32), batch_size=3), verbose=False)  # there it is idle
