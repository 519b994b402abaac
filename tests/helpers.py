"""What several tests need to run Lightning inside of the rank pool."""

from __future__ import annotations

import logging
import multiprocessing as mp
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.environments import ClusterEnvironment

LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def skip_if_workers_may_hang(loader: dict[str, Any]) -> None:
    """Skip a test that forks workers of this loader on ranks, where a fault of Python lets one of them wait for ever.

    It is python/cpython#112275, see docs/faults.md. Python 3.11 before 3.11.10 has it too, but was not seen to hang.
    """
    if loader.get("num_workers") and sys.version_info < (3, 10, 15):
        pytest.skip("python/cpython#112275: workers of a DataLoader may hang when they are forked")


def fresh_environment(root: os.PathLike[str]) -> dict[str, str]:
    """Return the environment for a process that launches ranks itself and imports the package from `root`.

    Trainers of other tests may have left what a launcher sets, which would tell this one that it has launched already.
    """
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    return environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.fspath(root)}


def exhaustive(*values: Any) -> Any:
    """Return a parameter of a test with which only `make test-all` runs it."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


class Forked:
    """`python ARGUMENTS` in a copy of this process, which has imported already what a new one needs seconds for.

    Example:
        >>> with Forked(["train.py"], folder, environment) as process:  # doctest: +SKIP
        ...     said = process.finish(timeout=60)

    Args:
        arguments: a script, or "-m" and a module, and what it is told.
        folder: to run it in.
        environment: its variables.
        name: of the file in `folder` that takes what it writes.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, environment: dict[str, str], name: str = "output") -> None:
        self._arguments, self._folder, self._environment = list(arguments), folder, environment
        self._output = folder / f"{name}.txt"
        self.process = mp.get_context("fork").Process(target=self._run)

    @property
    def said(self) -> str:
        """What it has written."""
        return self._output.read_text()

    def _run(self) -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        output = self._output.open("w", buffering=1)
        sys.stdout = sys.stderr = output
        for number in (1, 2):  # of the processes that it starts
            os.dup2(output.fileno(), number)
        for logger in (logging.root, *map(logging.getLogger, logging.root.manager.loggerDict)):
            for handler in logger.handlers:
                if isinstance(handler, logging.StreamHandler):
                    handler.setStream(output)  # it has kept what was `sys.stderr`
        if not torch.cuda.is_available():  # to have asked for it is enough to forbid more forks
            torch.cuda._is_in_bad_fork = lambda: False
        os.chdir(self._folder)
        os.environ.clear()
        os.environ.update(self._environment)
        is_module = self._arguments[0] == "-m"
        sys.argv = self._arguments[is_module:]
        sys.path[0] = str(self._folder)
        run = runpy.run_module if is_module else runpy.run_path
        run(sys.argv[0], run_name="__main__", **({"alter_sys": True} if is_module else {}))

    def __enter__(self) -> Forked:
        self.process.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.join(10)

    def finish(self, timeout: float) -> str:
        """Wait for its end, which has to be a good one. Returns what it has written."""
        self.process.join(timeout)
        assert self.process.exitcode == 0, f"{self.process.exitcode}: {self.said}"
        return self.said


class PoolEnvironment(ClusterEnvironment):
    """Tells a `Trainer` that it runs on one rank of the pool, whose processes exist already.

    Works with either setting of the pool's `process_group`: Lightning takes a process group that is there as it is, and
    otherwise initialises one from the environment variables that the pool has set.

    Example:
        >>> def fit(rank, world_size):
        ...     env = PoolEnvironment(rank, world_size)
        ...     trainer = Trainer(accelerator="cpu", devices=world_size, strategy="ddp", plugins=[env], max_steps=5)
        ...     trainer.fit(Model())
        >>> ranks.run(2, fit)  # doctest: +SKIP

    Args:
        rank: this process's rank, on the only node.
        world_size: number of ranks.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self._rank = rank
        self._world_size = world_size

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return os.environ["MASTER_ADDR"]

    @property
    def main_port(self) -> int:
        return int(os.environ["MASTER_PORT"])

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._world_size

    def set_world_size(self, size: int) -> None:
        if size != self._world_size:
            raise ValueError(f"The Trainer asks for {size} ranks, but the pool runs {self._world_size}")

    def global_rank(self) -> int:
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        if rank != self._rank:
            raise ValueError(f"The Trainer takes this for rank {rank}, but it is rank {self._rank} of the pool")

    def local_rank(self) -> int:
        return self._rank

    def node_rank(self) -> int:
        return 0
