"""One rank fails: the others end within the timeout with an error that names it, and what is on disk is whole."""

from __future__ import annotations

import os
import re
import signal
import time
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, TensorDataset

from lightning_distopt import LocalSGDStrategy, NonFiniteError
from lightning_distopt.communication import CommunicationError
from lightning_distopt.strategies import faults
from tests.conformance.cases import CASES
from tests.conformance.problems import QUIET, all_rows, fit_net
from tests.faults import Fault, inject
from tests.helpers import PoolEnvironment
from tests.pool import RankPool

LOCAL = next(case for case in CASES if case.name == "local_sgd")  # H = 3, 12 steps an epoch on two replicas
BLOCKS = SimpleNamespace(strategy=LocalSGDStrategy, callbacks=tuple)

FAULTS = [
    Fault("raise", "step", 1, 2),
    Fault("raise", "in_round", 0, 2),
    Fault("raise", "validation", 2, 2),
    Fault("raise", "checkpoint", 1, 3),
    Fault("raise", "step", 2, 2, sync_period=1),
    Fault("kill", "before_round", 2, 2),
    Fault("kill", "in_round", 0, 3),
    Fault("kill", "checkpoint", 0, 3),
    Fault("kill", "checkpoint", 1, 3),
    Fault("kill", "validation", 1, 2),
    Fault("stop", "after_round", 1, 2),
    Fault("slow", "before_round", 0, 2),
    Fault("raise", "step", 3, 2, topology="chain"),  # rank 0 learns of it over two others
    Fault("kill", "before_round", 3, 2, topology="chain"),
    Fault("stop", "after_round", 1, 2, topology="ring"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault(ranks: RankPool, tmp_path: Path, fault: Fault) -> None:
    problems, _ = inject(ranks, 4 if fault.topology else 3, fault, tmp_path)
    assert problems == []


def fails_in_set_up(rank: int, world_size: int) -> str:
    """Rank 1 has a module without parameters to train: only it fails a check."""

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)
            self.layer.requires_grad_(rank != 1)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.layer(batch[0]).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    warnings.filterwarnings("ignore")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world_size,
        plugins=[PoolEnvironment(rank, world_size)],
        strategy=LocalSGDStrategy(2, timeout=timedelta(seconds=20)),
        max_steps=2,
        enable_checkpointing=False,
        **QUIET,
    )
    begin = time.monotonic()
    try:
        trainer.fit(Module(), DataLoader(TensorDataset(torch.randn(8, 2)), batch_size=2))
    except Exception as error:
        if dist.is_initialized():
            dist.destroy_process_group()
        return f"{type(error).__name__}: {error}" if time.monotonic() - begin < 15 else "waited for the timeout"
    return "no error"


def test_a_rank_that_is_refused_in_set_up(ranks: RankPool) -> None:
    first, second, third = ranks.run(3, fails_in_set_up, timeout=60, process_group=False)
    assert "no trainable parameter" in second
    for text in (first, third):
        assert re.search(r"rank 1 raised ValueError: The module has no trainable parameter", text), text


def late_at_start(rank: int, world_size: int) -> str:
    if rank == 1:
        return ""  # never comes
    warnings.filterwarnings("ignore")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world_size,
        plugins=[PoolEnvironment(rank, world_size)],
        strategy=LocalSGDStrategy(2, timeout=timedelta(seconds=2)),
        max_steps=2,
        enable_checkpointing=False,
        **QUIET,
    )
    try:
        trainer.fit(Diverges(), DataLoader(TensorDataset(torch.zeros(8, 1)), batch_size=2))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_rank_that_does_not_start_in_time(ranks: RankPool) -> None:
    text = ranks.run(2, late_at_start, timeout=60, process_group=False)[0]
    start = "CommunicationError: Rank 0: communication with rank(s) 1 failed while connecting (timeout 2 s): not all of them"
    assert text.startswith(start), text
    assert "1/2 clients joined" in text


# ------------------------------------------------------------------------------------------------------ NaN and infinity


class Poison(L.Callback):
    """Makes a parameter of one replica NaN after a step."""

    def __init__(self, replica: int, step: int, value: float = float("nan")) -> None:
        self.replica, self.step, self.value = replica, step, value

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        strategy: Any = trainer.strategy
        row = self.replica - strategy.replicas.first_replica
        if trainer.global_step == self.step and 0 <= row < strategy.replicas_per_device:
            strategy.replicas.parameters[0][row, 5] = self.value


def poisoned(rank: int, world_size: int, m: int, policy: str, value: float) -> Any:
    try:
        callbacks = (Poison(2, 4, value),)
        return fit_net(rank, world_size, m, LOCAL, callbacks=callbacks, max_epochs=1, strategy={"nonfinite": policy})
    except Exception as error:
        if dist.is_initialized():
            dist.destroy_process_group()
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("layout", [(4, 1), (2, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_replica_that_is_not_finite_is_named(ranks: RankPool, layout: tuple[int, int], value: float) -> None:
    m, world_size = layout
    results = ranks.run(world_size, poisoned, m, "raise", value, timeout=60)
    for rank, text in enumerate(results):
        if rank == 2 // m:
            assert text.startswith(f"NonFiniteError: Replica 2 (rank {rank}) is not finite in `conv.weight`, in step 6, before")
            assert "round 2" in text
        else:
            assert f"rank {2 // m} raised NonFiniteError: Replica 2" in text, text


def test_a_replica_that_is_skipped_goes_on_from_the_average_of_the_others(ranks: RankPool) -> None:
    every = [
        all_rows(ranks.run(world_size, poisoned, m, "skip", float("nan"), timeout=60))
        for m, world_size in [(4, 1), (2, 2), (1, 4)]
    ]
    for rows in every:
        assert torch.isnan(rows[4, 2]).any()
        others = [0, 1, 3]
        assert torch.isfinite(rows[4, others]).all()
        assert torch.isfinite(rows[5:]).all()
        assert (rows[5] == rows[5, :1]).all()
        torch.testing.assert_close(rows[5:], every[0][5:], rtol=0, atol=1e-10)


def test_skipping_averages_the_others(ranks: RankPool) -> None:
    """With a learning rate of zero the replicas' mean is known."""

    def fn(rank: int, world_size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        from lightning_distopt.communication import Communicator, Replicas

        module = torch.nn.BatchNorm1d(3)
        communicator = Communicator(2)
        replicas = Replicas(module, 2, first_replica=2 * rank)
        for row in range(2):
            number = float(2 * rank + row)
            replicas.parameters[0][row] = number
            replicas.activate(row)
            module.running_mean.fill_(number)
        replicas.activate(0)
        if rank == 1:
            replicas.parameters[0][0, 1] = float("nan")
        good = replicas.finite_rows()
        replicas.replace_rows(good, 3, communicator)
        return replicas.matrix(), [replicas.buffers(row)[0].clone() for row in range(2)]

    (first, _), (second, buffers) = ranks.run(2, fn)
    mean = (0 + 1 + 3) / 3
    assert first.tolist() == [[0.0] * 6, [1.0] * 6]
    torch.testing.assert_close(second, torch.tensor([[mean] * 6, [3.0] * 6]))
    torch.testing.assert_close(buffers[0], torch.full((3,), mean))
    assert buffers[1].tolist() == [3.0] * 3


@pytest.mark.parametrize("layout", [(4, 1), (1, 4)], ids=str)
def test_gradients_of_a_block_do_not_hide_one_that_is_not_finite(ranks: RankPool, layout: tuple[int, int]) -> None:
    """At `H = 1` gradients are averaged in blocks of two, and parameters over all every second step: there, after a NaN."""
    m, world_size = layout

    def fn(rank: int, world_size: int) -> Any:
        strategy = {"sync_period": 1, "block_size": 2, "block_period": 2, "nonfinite": "skip"}
        return fit_net(rank, world_size, m, BLOCKS, callbacks=(Poison(2, 3),), max_steps=4, strategy=strategy)

    assert torch.isfinite(all_rows(ranks.run(world_size, fn, timeout=60))).all()


def all_poisoned(rank: int, world_size: int) -> str:
    with pytest.raises(NonFiniteError) as caught:
        callbacks = tuple(Poison(replica, 4) for replica in range(world_size))
        fit_net(rank, world_size, 1, LOCAL, callbacks=callbacks, max_epochs=1, strategy={"nonfinite": "skip"})
    return str(caught.value)


def test_there_must_be_one_finite_replica(ranks: RankPool) -> None:
    for text in ranks.run(2, all_poisoned, timeout=60):
        assert "No replica has finite parameters in step 6" in text


def poisoned_at_the_end(rank: int, world_size: int, m: int, policy: str) -> Any:
    """Replica 2 is not finite after the last round: the average that training leaves in the module is of the others."""
    callbacks = (Poison(2, 6),)
    try:
        return fit_net(rank, world_size, m, LOCAL, callbacks=callbacks, max_epochs=1, strategy={"nonfinite": policy})
    except NonFiniteError as error:
        return str(error)
    except CommunicationError as error:
        if dist.is_initialized():
            dist.destroy_process_group()
        return str(error)


@pytest.mark.parametrize("layout", [(4, 1), (2, 2), (1, 4)], ids=str)
def test_the_average_is_of_finite_replicas_or_there_is_none(ranks: RankPool, layout: tuple[int, int]) -> None:
    m, world_size = layout
    for result in ranks.run(world_size, poisoned_at_the_end, m, "skip", timeout=60):
        assert result["global_step"] == 6
        assert all(torch.isfinite(value).all() for value in result["state"].values())
    for text in ranks.run(world_size, poisoned_at_the_end, m, "raise", timeout=60):
        assert "Replica 2 (rank" in text
        assert "after 6 steps, before an evaluation or a checkpoint" in text or "raised NonFiniteError" in text


class Gathers(L.Callback):
    """Counts what is gathered during training."""

    count = 0

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        communicator: Any = trainer.strategy.communicator  # type: ignore[attr-defined]
        gather = communicator.gather

        def counted(value: Any) -> list[Any]:
            self.count += 1
            return gather(value)

        communicator.gather = counted


def gathers(rank: int, world_size: int, step: int) -> int:
    counter = Gathers()
    callbacks = (counter, Poison(2, step))
    fit_net(rank, world_size, 2, LOCAL, callbacks=callbacks, max_epochs=1, strategy={"nonfinite": "skip"})
    return counter.count


def test_replicas_are_listed_only_if_some_are_not_finite(ranks: RankPool) -> None:
    """Else a single flag is sent."""
    assert ranks.run(2, gathers, 100, timeout=60) == [0, 0]
    assert ranks.run(2, gathers, 4, timeout=60) == [1, 1]


class Diverges(L.LightningModule):
    """Its loss on one sample is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def bad_sample(rank: int, world_size: int, m: int, every: int) -> str:
    faults.LOOK_AT_LOSS_EVERY["cpu"] = every
    try:
        return train_on_a_bad_sample(rank, world_size, m)
    finally:
        faults.LOOK_AT_LOSS_EVERY["cpu"] = 1


def train_on_a_bad_sample(rank: int, world_size: int, m: int) -> str:
    warnings.filterwarnings("ignore")
    x = torch.zeros(16, 1)
    x[9] = float("nan")  # with 4 replicas, the third sample of replica 1
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world_size,
        plugins=[PoolEnvironment(rank, world_size)] if world_size > 1 else [],
        strategy=LocalSGDStrategy(1, replicas_per_device=m, partition="fixed", timeout=timedelta(minutes=5)),
        max_epochs=1,
        enable_checkpointing=False,
        **QUIET,
    )
    try:
        trainer.fit(Diverges(), DataLoader(TensorDataset(x), batch_size=1))
    except Exception as error:
        if dist.is_initialized():
            dist.destroy_process_group()
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("layout", [(4, 1), (1, 4)], ids=str)
def test_a_loss_whose_gradient_would_reach_all_replicas(ranks: RankPool, layout: tuple[int, int]) -> None:
    m, world_size = layout
    texts = ranks.run(world_size, bad_sample, m, 1, timeout=60)  # a fifth of that of training
    assert texts[1 // m].startswith("NonFiniteError: The loss of replica 1 is not finite in step 3"), texts
    assert all(
        "rank 1 raised NonFiniteError: The loss of replica 1" in text for rank, text in enumerate(texts) if rank != 1 // m
    )


@pytest.mark.parametrize("layout", [(4, 1), (2, 2), (1, 4)], ids=str)
def test_a_loss_that_is_looked_at_later(ranks: RankPool, layout: tuple[int, int]) -> None:
    """By then the losses of all replicas are NaN: the one that has been so for longest is named."""
    m, world_size = layout
    texts = ranks.run(world_size, bad_sample, m, 3, timeout=60)
    for rank, text in enumerate(texts):
        own = rank == 1 // m
        names = "1" if own else ", ".join(str(replica) for replica in range(rank * m, (rank + 1) * m))
        assert text.startswith(
            f"NonFiniteError: The loss of replica {names} was not finite in one of the last 3 steps "
            f"(batches since then: {2 if own else 1}; "
        ), texts


def test_a_device_that_would_be_stalled_is_asked_rarely() -> None:
    """Simulated by a device without numbers, which could not answer."""
    replicas = SimpleNamespace(active=0, first_replica=0)
    strategy: Any = SimpleNamespace(_loss=None, replicas_per_device=1, replicas=replicas, steps=0)
    asked = []
    for strategy.steps in range(101):
        try:
            faults.FaultsMixin._look_at_loss(strategy, torch.ones((), device="meta"))
        except RuntimeError:
            asked.append(strategy.steps)
    assert asked == [0, 50, 100]


# --------------------------------------------------------------------------------------------------------------- signals


class Signal(L.Callback):
    """Sends a signal to the process of one rank after a step."""

    def __init__(self, number: int, rank: int, step: int) -> None:
        self.number, self.rank, self.step = number, rank, step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


def signalled(rank: int, world_size: int, m: int, folder: str, number: int, *callbacks: Any) -> tuple[Any, str, Any]:
    """Train to the end; train again until a signal; go on from the checkpoint that it has left."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the pool ignores
    whole = fit_net(rank, world_size, m, LOCAL, max_epochs=2)
    saver = ModelCheckpoint(dirpath=folder, every_n_epochs=100)
    error = ""
    try:
        told = Signal(number, world_size - 1, 4)
        fit_net(rank, world_size, m, LOCAL, max_epochs=2, callbacks=(saver, told, *callbacks), enable_checkpointing=True)
    except (SIGTERMException, SystemExit) as raised:
        error = type(raised).__name__
    rest = fit_net(rank, world_size, m, LOCAL, max_epochs=2, ckpt_path=f"{folder}/interrupted.ckpt")
    return whole, error, rest


@pytest.mark.parametrize("layout", [(4, 1), (2, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_all_ranks_with_a_checkpoint_that_resumes_exactly(
    ranks: RankPool, tmp_path: Path, layout: tuple[int, int], number: int
) -> None:
    m, world_size = layout
    results = ranks.run(world_size, signalled, m, str(tmp_path), number, timeout=60)
    assert {error for _, error, _ in results} == {"SIGTERMException" if number == signal.SIGTERM else "SystemExit"}
    whole, rest = [all_rows([result[k] for result in results]) for k in (0, 2)]
    # Told after step 4, several ranks stop after the round of step 6; one rank stops at once.
    assert len(whole) - len(rest) == (6 if world_size > 1 else 4)
    torch.testing.assert_close(rest, whole[-len(rest) :], rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".ckpt"] == ["interrupted.ckpt"]


def test_a_checkpoint_of_the_users_own_at_a_signal_is_exact_too(ranks: RankPool, tmp_path: Path) -> None:
    """`OnExceptionCheckpoint` saves when Lightning leaves training; the ranks are together then."""
    own = OnExceptionCheckpoint(str(tmp_path), "own")
    own.teardown = lambda *args, **kwargs: None  # type: ignore[method-assign]  # which removes the file
    ranks.run(2, signalled, 1, str(tmp_path), signal.SIGTERM, own, timeout=60)
    header = torch.load(tmp_path / "own.ckpt", weights_only=True)["lightning_distopt"]
    assert len(list((tmp_path / "own.ckpt.replicas").glob(f"{header['token']}-rank-*.ckpt"))) == 2


class Twice(L.Callback):
    """Presses Ctrl-C twice in the same step."""

    reached = 0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.reached = trainer.global_step
        if trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)


def pressed_twice(rank: int, world_size: int) -> tuple[str, int]:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    twice = Twice()
    try:
        fit_net(rank, world_size, 2, LOCAL, callbacks=(twice,))
    except BaseException as raised:
        return type(raised).__name__, twice.reached
    return "no error", twice.reached


def test_ctrl_c_pressed_twice_ends_training_at_once(ranks: RankPool) -> None:
    assert ranks.run(1, pressed_twice, timeout=60) == [("SystemExit", 4)]


def handlers_put_back(rank: int, world_size: int) -> bool:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fit_net(rank, world_size, 1, LOCAL, max_epochs=1)
    after = {number: signal.getsignal(number) for number in before}
    return after == {**before, signal.SIGINT: signal.default_int_handler}


def test_signal_handlers_are_put_back(ranks: RankPool) -> None:
    assert ranks.run(2, handlers_put_back, timeout=60) == [True, True]


class Stop(L.Callback):
    """One rank wants to stop."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 4:
            trainer.should_stop = True


def stopped(rank: int, world_size: int) -> int:
    return int(fit_net(rank, world_size, 1, LOCAL, callbacks=(Stop(),))["global_step"])


def test_should_stop_on_one_rank_stops_all_after_the_round(ranks: RankPool) -> None:
    assert ranks.run(3, stopped, timeout=60) == [6, 6, 6]


def requeued(rank: int, world_size: int, folder: str) -> Any:
    """SLURM tells one rank that time is up. The job is asked for again, starts anew, and finds the checkpoint by itself."""
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    commands = Path(folder) / "bin"
    if rank == 0:
        commands.mkdir()
        (commands / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {folder}/requeued\n')
        (commands / "scontrol").chmod(0o755)
    os.environ["PATH"] = f"{commands}:{os.environ['PATH']}"
    variables = {
        "JOB_ID": "42",
        "JOB_NAME": "train",
        "NTASKS": world_size,
        "NTASKS_PER_NODE": world_size,
        "PROCID": rank,
        "LOCALID": rank,
        "NODELIST": "127.0.0.1",
    }
    os.environ.update({f"SLURM_{name}": str(value) for name, value in variables.items()} | {"SLURM_NODEID": "0"})

    def run(*callbacks: Any, root: str) -> Any:
        plugin = SLURMEnvironment(auto_requeue=True, requeue_signal=signal.SIGUSR1)
        return fit_net(rank, world_size, 1, LOCAL, max_epochs=2, callbacks=callbacks, plugins=[plugin], default_root_dir=root)

    return run(root=f"{folder}/whole"), run(Signal(signal.SIGUSR1, 1, 4), root=folder), run(root=folder)


def test_slurms_signal_on_one_rank_saves_on_all_and_requeues(ranks: RankPool, tmp_path: Path) -> None:
    results = ranks.run(2, requeued, str(tmp_path), timeout=60)
    whole, told, again = [all_rows([result[k] for result in results]) for k in range(3)]
    assert (tmp_path / "requeued").read_text() == "requeue 42\n"
    torch.testing.assert_close(told, whole, rtol=0, atol=0)  # SLURM would have ended it
    assert len(again) == len(whole) - 6  # told after step 4, saved after the round of step 6
    torch.testing.assert_close(again, whole[6:], rtol=0, atol=0)
    assert [path.name for path in tmp_path.glob("hpc_ckpt*")] != []
