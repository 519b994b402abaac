"""No hidden coupling: between rounds a training run makes no collective at all."""

from __future__ import annotations

import gc
import weakref
from datetime import timedelta
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_distopt import LocalSGDStrategy
from tests.conformance.cases import CASES
from tests.conformance.problems import Augmented, SmallNet, fit, fit_net

LOCAL = next(case for case in CASES if case.name == "local_sgd")
COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_to_all",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "irecv",
    "isend",
    "monitored_barrier",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "send",
)


class Collectives(L.Callback):
    """Notes in which batch each collective of this process happens; None outside of batches."""

    def __init__(self):
        self.calls, self.batch, self.lengths = [], None, []

    def setup(self, trainer, pl_module, stage):
        for name in COLLECTIVES:
            original = getattr(dist, name)

            def counted(*args, original=original, name=name, **kwargs):
                self.calls.append((self.batch, name))
                return original(*args, **kwargs)

            for module in (dist, dist.distributed_c10d):
                if hasattr(module, name):
                    setattr(module, name, counted)
            self.lengths.append((name, original))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batch = batch_idx

    def on_train_epoch_end(self, *args):
        self.batch = None

    def teardown(self, trainer, pl_module, stage):
        for name, original in self.lengths:
            for module in (dist, dist.distributed_c10d):
                setattr(module, name, original)


def count(rank, world_size, folder):
    collectives = Collectives()
    saver = ModelCheckpoint(dirpath=folder, train_time_interval=timedelta(hours=1))
    options = {"max_epochs": 1, "enable_checkpointing": True, "max_time": {"hours": 1}}
    fit_net(rank, world_size, 1, LOCAL, callbacks=(saver, collectives), **options)
    return collectives.calls


def test_collectives_happen_at_rounds_only(ranks, tmp_path):
    for calls in ranks.run(2, count, str(tmp_path)):
        batches = {batch for batch, _ in calls if batch is not None}
        # 12 steps, H = 3: rounds in batches 2, 5, 8, 11; their flags travel before the next batch starts.
        assert batches == {2, 5, 8, 11}
        averages = [name for batch, name in calls if batch in batches and name == "all_reduce"]
        assert len(averages) == 8  # in each round the mean, and a flag whether any rank has to stop


def limited(rank, world_size):
    """Rank 1 is the slow one; rank 0's clock decides, and both stop at the same step, after a round."""
    from lightning.pytorch.callbacks import Timer

    timer = Timer(duration=timedelta(milliseconds=1))
    result = fit_net(rank, world_size, 1, LOCAL, callbacks=(timer,), max_epochs=3)
    return result["global_step"]


def test_time_limit_acts_at_a_round_on_all_ranks(ranks):
    assert ranks.run(2, limited) == [3, 3]


def terminated(rank, world_size):
    import os
    import signal

    from lightning.pytorch.utilities.exceptions import SIGTERMException

    class Terminate(L.Callback):
        reached = 0

        def on_train_batch_end(self, trainer, *args):
            self.reached = trainer.global_step
            if trainer.global_rank == 1 and trainer.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    terminate = Terminate()
    with pytest.raises(SIGTERMException):
        fit_net(rank, world_size, 1, LOCAL, callbacks=(terminate,), max_epochs=3)
    return terminate.reached


def test_sigterm_on_one_rank_stops_all_at_the_next_round(ranks):
    assert ranks.run(3, terminated, timeout=30) == [3, 3, 3]


def slow(rank, world_size, delay):
    """Let the last rank sleep at every step; return which steps the others reach while it is still in its first round."""
    import time

    class Sleep(L.Callback):
        def __init__(self):
            self.steps_while_waiting = 0

        def on_train_batch_end(self, trainer, *args):
            if trainer.global_rank == world_size - 1:
                time.sleep(delay)

    class Row:
        callbacks = list

        @staticmethod
        def strategy(**options):
            from lightning_distopt import LocalSGDStrategy

            return LocalSGDStrategy(6, **options)

    class Progress(L.Callback):
        """Rank 0 writes its step to the store, the slow rank reads it: a point-to-point look, no collective."""

        seen = None

        def on_train_batch_end(self, trainer, *args):
            store = dist.distributed_c10d._get_default_store()
            if trainer.global_rank == 0:
                store.set("step", str(trainer.global_step))
            elif trainer.global_rank == world_size - 1 and trainer.global_step == 2:
                self.seen = int(store.get("step"))

    progress = Progress()
    fit_net(rank, world_size, 1, Row, callbacks=(Sleep(), progress), max_epochs=1)
    return progress.seen


def test_a_slow_rank_does_not_slow_others_between_rounds(ranks):
    # After two of its steps of 0.5 s the slow rank finds the fast one at the end of the round, where it waits.
    seen = ranks.run(2, slow, 0.5)[1]
    assert seen in (5, 6)


def nothing_left(rank, world_size):
    before = {name: getattr(dist, name) for name in COLLECTIVES}
    fit_net(rank, world_size, 1, LOCAL, max_epochs=1)
    return all(getattr(dist, name) is value for name, value in before.items()), torch.is_grad_enabled()


def test_nothing_is_left_behind(ranks):
    assert ranks.run(2, nothing_left) == [(True, True)] * 2


class Averagers(L.Callback):
    """Keeps no hold on torch's DDP modules, and counts those that are alive after a batch."""

    def __init__(self):
        self.made, self.alive = weakref.WeakSet(), []

    def on_train_batch_end(self, trainer, *args):
        if trainer.strategy._ddp is not None:
            self.made.add(trainer.strategy._ddp.module)
        gc.collect()
        self.alive.append(len(self.made))


def switch(rank, world_size):
    """Train with `H = 1` and `H = 2` in turns."""
    averagers, case = Averagers(), SimpleNamespace(strategy=LocalSGDStrategy, callbacks=tuple)
    options = {"callbacks": (averagers,), "strategy": {"sync_period": lambda step: 1 + step // 2 % 2}}
    fit_net(rank, world_size, 1, case, max_steps=8, **options)
    gc.collect()
    return averagers.alive, len(averagers.made)


def test_averaging_of_gradients_leaves_nothing_behind(ranks):
    """DDP keeps buckets as large as the model."""
    assert ranks.run(2, switch) == [([1, 1, 0, 0, 1, 1, 0, 0], 0)] * 2


class Partly(SmallNet):
    """Has a parameter that no loss depends on."""

    def __init__(self):
        super().__init__("plain")
        self.unused = torch.nn.Parameter(torch.ones(3))


def fit_partly(rank, world_size, m, static):
    torch.manual_seed(1)
    case = SimpleNamespace(strategy=LocalSGDStrategy, callbacks=tuple)
    options = {"sync_period": 1, "ddp_kwargs": {"static_graph": True} if static else {}}
    loader = DataLoader(Augmented(), batch_size=3)
    return fit(rank, world_size, m, case, Partly(), loader, precision="64-true", max_steps=4, strategy=options)["rows"]


def test_a_static_graph_is_that_of_the_module(ranks):
    expected = ranks.run(1, fit_partly, 2, False)[0]
    for rank, rows in enumerate(ranks.run(2, fit_partly, 1, True)):
        torch.testing.assert_close(rows[:, 0], expected[:, rank], rtol=0, atol=1e-10)
