"""Fixtures of all tests. The first lines must stay first: see `tests/pool.py`."""

from __future__ import annotations

import os

# A process that has used two OpenMP threads cannot be forked safely: its children hang in their first large operation.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)

import functools  # noqa: E402
import gc  # noqa: E402
import importlib.metadata  # noqa: E402
from collections.abc import Iterator  # noqa: E402

import pytest  # noqa: E402
import torch._dynamo  # noqa: E402  # before the ranks are forked, which would otherwise import it one by one
import torch.distributed as dist  # noqa: E402

from tests.pool import SEED, RankPool, seed_everything  # noqa: E402

POOL_SIZE = 8

# Every `Trainer` reads the files of all installed packages, for callbacks; an eighth of the time of a short training.
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)


def pytest_collection_finish() -> None:
    """What has been imported stays: it need not be looked at in each collection of garbage."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Extensions complain at the end of the process about objects that have never been freed."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Run functions on several ranks: `ranks.run(4, fn)` returns the results of `fn(rank, world_size)`."""
    pool = RankPool(POOL_SIZE)
    yield pool
    pool.stop()


@pytest.fixture(autouse=True)
def _isolation() -> Iterator[None]:
    """Seed every test; fail those that change global state, which the tests after them would inherit."""
    seed_everything(SEED)
    dtype = torch.get_default_dtype()
    yield
    leaks = []
    if dist.is_initialized():
        dist.destroy_process_group()
        leaks.append("an initialised process group (run on the `ranks` fixture instead, or destroy it)")
    if torch.get_default_dtype() != dtype:
        torch.set_default_dtype(dtype)
        leaks.append("another default dtype")
    torch.set_num_threads(1)
    if leaks:
        pytest.fail("The test left " + " and ".join(leaks))
