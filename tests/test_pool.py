"""The rank pool keeps its promises: results, isolation, and an end to whatever fails, dies or hangs."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import PoolEnvironment
from tests.pool import RankError, RankPool


def _all_reduce(rank: int, world_size: int) -> float:
    x = torch.full((1000,), float(rank))
    dist.all_reduce(x)
    return float(x[0])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_all_reduce(ranks: RankPool, world_size: int) -> None:
    assert ranks.run(world_size, _all_reduce) == [sum(range(world_size))] * world_size


def test_world_size_is_checked(ranks: RankPool) -> None:
    for world_size in (0, ranks.size + 1):
        with pytest.raises(ValueError, match="world_size must be in"):
            ranks.run(world_size, _all_reduce)


def test_closures_arguments_and_tensors(ranks: RankPool) -> None:
    offset = torch.arange(3.0)

    def fn(rank: int, world_size: int, scale: float, *, shift: Tensor) -> tuple[int, Tensor]:
        return world_size, scale * rank + shift + offset

    results = ranks.run(3, fn, 2.0, shift=torch.ones(3))
    for rank, (world_size, tensor) in enumerate(results):
        assert world_size == 3
        assert torch.equal(tensor, 2.0 * rank + 1 + offset)


def test_a_rank_may_leave_early(ranks: RankPool) -> None:
    """A rank that has sent and returns keeps its sockets until the others have returned as well."""

    def fn(rank: int, world_size: int) -> float:
        x = torch.full((1000,), 5.0 - rank)
        if rank == 0:
            dist.send(x, 1)
        else:
            time.sleep(0.3)
            dist.recv(x, 0)
        return float(x.mean())

    assert ranks.run(2, fn) == [5.0, 5.0]


def test_seeds_differ_between_ranks_and_repeat_between_calls(ranks: RankPool) -> None:
    def fn(rank: int, world_size: int) -> tuple[float, float, float]:
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    first, second = ranks.run(3, fn), ranks.run(3, fn)
    assert first == second
    assert all(len(set(draws)) == 3 for draws in zip(*first, strict=True))


def test_state_of_the_interpreter_is_restored(ranks: RankPool) -> None:
    def spoil(rank: int, world_size: int) -> None:
        os.environ["SPOILED"] = "1"
        del os.environ["HOME"]
        os.chdir("/")
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(2)
        torch.set_grad_enabled(False)
        warnings.simplefilter("error")

    def look(rank: int, world_size: int) -> tuple[object, ...]:
        warnings.warn("harmless", UserWarning, stacklevel=1)
        return (
            os.environ.get("SPOILED"),
            os.environ.get("HOME"),
            os.getcwd(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
        )

    before = ranks.run(2, look)
    ranks.run(2, spoil)
    assert ranks.run(2, look) == before
    assert before[0] == (None, os.environ.get("HOME"), os.getcwd(), torch.float32, 1, True)


def test_ranks_work_in_the_folder_of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the pool was forked in the folder of another test, which is gone by now."""
    pool, gone, here = RankPool(2), tmp_path / "gone", tmp_path / "here"
    gone.mkdir()
    here.mkdir()
    try:
        monkeypatch.chdir(gone)
        assert pool.run(2, lambda rank, world_size: os.getcwd()) == [str(gone)] * 2
        monkeypatch.chdir(here)
        gone.rmdir()
        assert pool.run(2, lambda rank, world_size: os.getcwd()) == [str(here)] * 2
    finally:
        pool.stop()


def test_environment_without_process_group(ranks: RankPool) -> None:
    def fn(rank: int, world_size: int) -> tuple[str, ...]:
        assert not dist.is_initialized()
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        values = tuple(os.environ[name] for name in names)
        dist.init_process_group("gloo", timeout=timedelta(seconds=20))  # from these variables
        dist.barrier()
        return values

    results = ranks.run(3, fn, process_group=False)
    assert [values[:4] for values in results] == [(str(r), str(r), "3", "127.0.0.1") for r in range(3)]
    assert len({values[4] for values in results}) == 1
    assert ranks.run(3, lambda rank, world_size: dist.is_initialized(), process_group=False) == [False] * 3


def test_a_process_group_that_cannot_be_initialised(ranks: RankPool) -> None:
    def fn(rank: int, world_size: int) -> None:
        if rank == 0:
            timeout = timedelta(seconds=0.1)
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=2, timeout=timeout)

    ranks.run(2, _all_reduce)
    forks = ranks.forks
    with pytest.raises(RankError, match=r"rank 0(?s:.*)init_process_group"):
        ranks.run(2, fn, process_group=False)
    assert ranks.run(2, _all_reduce) == [1.0] * 2
    assert ranks.forks == forks


def test_a_rank_raises(ranks: RankPool) -> None:
    def fn(rank: int, world_size: int) -> None:
        dist.all_reduce(torch.ones(1))  # now all of them are connected
        if rank == 1:
            raise ValueError("boom")
        dist.all_reduce(torch.ones(1))

    ranks.run(4, _all_reduce)
    forks, start = ranks.forks, time.monotonic()
    with pytest.raises(RankError, match=r"rank 1: Traceback(?s:.*)ValueError: boom") as info:
        ranks.run(4, fn)
    assert next(iter(info.value.errors)) == 1  # the culprit comes first
    assert 0 in info.value.errors and "all_reduce" in info.value.errors[0]  # and its victims tell where they were
    assert time.monotonic() - start < 20  # long before the collectives' timeout
    assert ranks.run(4, _all_reduce) == [6.0] * 4
    assert ranks.forks == forks  # nobody had to be killed


def test_a_result_that_cannot_be_pickled(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="pickle"):
        ranks.run(2, lambda rank, world_size: (x for x in "generator"))
    assert ranks.run(2, _all_reduce) == [1.0] * 2


def test_a_rank_dies(ranks: RankPool) -> None:
    def fn(rank: int, world_size: int) -> None:
        if rank == 1:
            os._exit(9)
        dist.all_reduce(torch.ones(1))

    with pytest.raises(RankError, match="died with exit code 9"):
        ranks.run(3, fn)
    assert ranks.run(3, _all_reduce) == [3.0] * 3


def test_a_rank_is_expected_to_die(ranks: RankPool) -> None:
    def fn(rank: int, world_size: int) -> str:
        dist.all_reduce(torch.ones(1))  # now all of them are connected
        if rank == 1:
            os._exit(9)
        with pytest.raises(RuntimeError):
            dist.all_reduce(torch.ones(1))
        return "survived"

    assert ranks.run(3, fn, expect_dead=[1]) == ["survived", None, "survived"]
    assert ranks.run(3, _all_reduce) == [3.0] * 3
    with pytest.raises(RankError, match="rank 0: was expected to die but returned"):
        ranks.run(3, _all_reduce, expect_dead=[0])
    assert ranks.run(3, _all_reduce) == [3.0] * 3


def test_a_rank_hangs(ranks: RankPool) -> None:
    def oversleep(rank: int, world_size: int) -> int:
        if rank == 1:
            time.sleep(1000)
        return rank

    forks, start = ranks.forks, time.monotonic()
    with pytest.raises(RankError, match="timed out") as info:
        ranks.run(2, oversleep, timeout=1)
    assert time.monotonic() - start < 10
    assert list(info.value.errors) == [1]
    assert "in oversleep" in info.value.errors[1]  # the line it hung in
    assert ranks.run(2, _all_reduce) == [1.0] * 2
    assert ranks.forks == forks + 1


def test_a_collective_without_partner_times_out(ranks: RankPool) -> None:
    def fn(rank: int, world_size: int) -> None:
        if rank == 0:
            dist.all_reduce(torch.ones(1))

    with pytest.raises(RankError, match="all_reduce"):
        ranks.run(2, fn, timeout=2)
    assert ranks.run(2, _all_reduce) == [1.0] * 2


def test_children_of_a_killed_rank_are_killed(ranks: RankPool, tmp_path: Path) -> None:
    def fn(rank: int, world_size: int) -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        (tmp_path / "pid").write_text(str(child.pid))
        time.sleep(1000)

    with pytest.raises(RankError, match="timed out"):
        ranks.run(1, fn, timeout=2, process_group=False)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if " Z " in Path(f"/proc/{pid}/stat").read_text():  # dead, and waiting for a parent that reaps it
            return
        time.sleep(0.05)
    pytest.fail("the child outlived its rank")


def test_no_files_and_no_processes_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pool = RankPool(2)
    pool.run(2, _all_reduce)
    assert [path.name for directory in tmp_path.iterdir() for path in directory.glob("store*")] == []
    processes = list(pool._processes)
    pids = [process.pid for process in processes]
    pool.stop()
    assert list(tmp_path.iterdir()) == []
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid or 0, 0)


class _Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0]).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("process_group", [True, False])
def test_lightning_ddp(ranks: RankPool, process_group: bool) -> None:
    def fit(rank: int, world_size: int) -> tuple[int, int, Tensor]:
        trainer = Trainer(
            accelerator="cpu",
            devices=world_size,
            strategy=DDPStrategy(process_group_backend="gloo"),
            plugins=[PoolEnvironment(rank, world_size)],
            max_steps=5,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        model = _Regression()
        trainer.fit(model, DataLoader(TensorDataset(torch.randn(128, 8)), batch_size=8))
        assert trainer.global_rank == rank
        return trainer.world_size, trainer.global_step, model.layer.weight.detach()

    results = ranks.run(2, fit, process_group=process_group)
    assert [result[:2] for result in results] == [(2, 5), (2, 5)]
    assert torch.equal(results[0][2], results[1][2])


def test_guard_against_process_groups_in_the_parent(tmp_path: Path) -> None:
    """A test that forgets to destroy its process group fails, and the next test is not affected."""
    directory = Path(__file__).parent
    (tmp_path / "test_leak.py").write_text(
        textwrap.dedent(
            """
            import torch.distributed as dist
            from tests.conftest import _isolation

            def test_leak():
                dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

            def test_next():
                assert not dist.is_initialized()
            """
        )
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir=.", "."]
    env = {**os.environ, "PYTHONPATH": str(directory.parent)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120)
    assert "The test left an initialised process group" in result.stdout
    assert "2 passed, 1 error" in result.stdout
