"""What all benchmarks measure with: processes that take turns, their clocks and their memory.

The contestants of a comparison are teams of forked processes that exist all the time and run one after the other, A B
A B, for a fraction of a second each: a disturbance of the machine that lasts longer hits both sides of a pair. A
sample is the ratio within a pair. Set-up and the first turn, which warms up, are not measured.

Three clocks are read, as machines are seldom idle. `wall` is time on the wall. `own` is that without the time for
which the process could have run while its core was busy with another: computing and waiting for peers are in it,
other people's jobs are not. `cpu` is the time of all the process's threads on a core. On an idle machine with a core
for each process, a process that computes all the time shows the same on all three.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import lightning.pytorch as pl
import numpy as np
import torch
import torch._dynamo  # the first optimizer of a process imports it: once here, not once in every forked process
import torch.distributed as dist

from benchmarks.report import progress
from benchmarks.surroundings import cores

TIMEOUT = 120.0
"""Seconds after which a turn counts as hung; then all processes are ended."""

GRACE = 1.0
"""Seconds that the others of a team get to end a turn, once one has failed: they tell of it as well."""


# ------------------------------------------------------------------------------------------------------------ processes
class Clocks(NamedTuple):
    """Seconds on the wall (the same for all processes), own seconds and seconds on cores, from some zero on."""

    wall: float
    own: float
    cpu: float


def now() -> Clocks:
    """Read the clocks."""
    before, wall, after = _queued(), time.perf_counter(), _queued()
    for _ in range(100):  # who waited for a core between the readings would count that as work, or as less than none
        if before == after:
            break
        before, wall, after = after, time.perf_counter(), _queued()
    return Clocks(wall, wall - after, time.process_time())


def _queued() -> float:
    """Return the seconds that this process has been ready to run, but not on a core."""
    try:  # nanoseconds on a core, nanoseconds ready to run but not on one, slices
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):  # not Linux, or a kernel without these statistics
        return 0.0


class Lap(NamedTuple):
    """What one process reports of one turn: the clocks at its ends, and any value."""

    start: Clocks
    end: Clocks
    value: Any = None


@dataclass
class Turns:
    """A team's process as its body sees it.

    Args:
        index: of the process in the team, its rank.
        size: processes of the team.
        store: the address of a store through which the team can form a process group.
        pipe: to the conductor.
    """

    index: int
    size: int
    store: str
    pipe: Connection

    def wait(self) -> None:
        """Wait for the next turn; the process ends here when there is none, or nobody left to give it."""
        parent = os.getppid()
        while not self.pipe.poll(5):
            if os.getppid() != parent:
                os._exit(1)
        if self.pipe.recv() == "end":
            os._exit(0)

    def report(self, start: Clocks, end: Clocks, value: Any = None) -> None:
        """End the turn."""
        self.pipe.send(Lap(start, end, value))

    def report_value(self, value: Any) -> None:
        """End a turn of which only a value matters."""
        self.report(now(), now(), value)

    def connect(self) -> None:
        """Form a gloo process group of the team, in which a Lightning `Trainer` then takes part."""
        if self.store.startswith("file:"):  # else whoever has set another one has set these too
            os.environ.update(LOCAL_RANK=str(self.index), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        dist.init_process_group("gloo", init_method=self.store, rank=self.index, world_size=self.size)


class Team:
    """Forked processes that run `body`, one turn at a time.

    Args:
        name: to tell it from others.
        body: called in each process; it takes turns by `Turns.wait` and `Turns.report`.
        size: number of processes.
        on: the core for each, repeated as needed; by default process `i` gets core `i`, as far as there are any.
        enter: called first of all in each process, to take it elsewhere (see `benchmarks.network`).
    """

    def __init__(
        self,
        name: str,
        body: Callable[[Turns], None],
        size: int = 1,
        on: Sequence[int] | None = None,
        enter: Callable[[Turns], None] | None = None,
    ) -> None:
        self.name = name
        self._folder = tempfile.mkdtemp(prefix="benchmark-")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        context = multiprocessing.get_context("fork")
        on = on or cores()
        for index in range(size):
            ours, theirs = context.Pipe()
            turns = Turns(index, size, f"file://{self._folder}/store", theirs)
            process = context.Process(target=_run, args=(turns, body, on[index % len(on)], enter, os.getpid()), daemon=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 about fork: there is one thread only
                process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def turn(self, timeout: float | None = None) -> list[Lap]:
        """Let every process run one turn, at the same time; by default for no longer than `TIMEOUT` seconds.

        Raises:
            RuntimeError: if processes failed; the text has the one that did so first at the top.
            TimeoutError: if one has not ended its turn.
        """
        limit = TIMEOUT if timeout is None else timeout
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):  # a process that is dead is reported below
                pipe.send("go")
        deadline = time.monotonic() + limit
        laps: dict[int, Lap] = {}
        failures: dict[int, _Failure] = {}
        while (pending := set(range(len(self._pipes))) - set(laps) - set(failures)) and time.monotonic() < deadline:
            # A child of a dead process may hold its pipe open, hence the look at the process from time to time.
            ready = wait([self._pipes[index] for index in pending], min(0.25, max(0.0, deadline - time.monotonic())))
            for index in pending:
                pipe, process = self._pipes[index], self._processes[index]
                reply: Lap | _Failure | None = None
                if pipe in ready:
                    with contextlib.suppress(EOFError, ConnectionError):
                        reply = pipe.recv()
                elif process.is_alive() or pipe.poll():
                    continue
                if reply is None:
                    process.join(1)
                    reply = _Failure(0.0, f"died with exit code {process.exitcode}")
                if isinstance(reply, Lap):
                    laps[index] = reply
                else:
                    failures[index] = reply
                    deadline = min(deadline, time.monotonic() + GRACE)
        if failures:
            order = sorted(failures, key=lambda index: failures[index].time)
            raise RuntimeError("\n".join(f"Rank {index} of {self.name} {failures[index].text}" for index in order))
        if pending:
            plural, names = "s" * (len(pending) > 1), ", ".join(map(str, sorted(pending)))
            raise TimeoutError(f"Rank{plural} {names} of {self.name} had not ended the turn after {limit:g} s.")
        return [laps[index] for index in range(len(self._pipes))]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Failure(NamedTuple):
    """What a process sends in place of a lap: when (on the clock that all share) and how it failed."""

    time: float
    text: str


def die_with(parent: int) -> None:
    """Let the kernel kill this process as soon as its parent has ended, however that ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def _run(
    turns: Turns, body: Callable[[Turns], None], core: int, enter: Callable[[Turns], None] | None, parent: int
) -> NoReturn:
    try:
        die_with(parent)
        if enter is not None:
            enter(turns)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {core})
        torch.set_num_threads(1)
        torch.manual_seed(0)
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        body(turns)
    except BaseException:
        turns.pipe.send(_Failure(time.monotonic(), f"failed:\n{traceback.format_exc()}"))
    os._exit(0)


def interleave(text: str, teams: Mapping[str, Team], pairs: int) -> dict[str, list[list[Lap]]]:
    """Let teams take a turn to warm up and `pairs` turns, A B A B; end them. Returns the laps by team and turn."""
    laps: dict[str, list[list[Lap]]] = {name: [] for name in teams}
    try:
        for k in range(pairs + 1):
            progress(text, k, pairs)
            for name, team in teams.items():
                lap = team.turn()
                if k:
                    laps[name].append(lap)
    finally:
        for team in teams.values():
            team.close()
    return laps


Turn = Sequence[Lap]


def own_seconds(turns: Sequence[Turn]) -> list[float]:
    """Return the own time of every turn, the mean over processes."""
    return [float(np.mean([lap.end.own - lap.start.own for lap in laps])) for laps in turns]


def cpu_seconds(turns: Sequence[Turn]) -> list[float]:
    """Return the time on cores of every turn, the sum over processes."""
    return [sum(lap.end.cpu - lap.start.cpu for lap in laps) for laps in turns]


def makespan(turns: Sequence[Turn]) -> list[float]:
    """Return the time of every turn on the wall, from the first process's start to the last one's end."""
    return [max(lap.end.wall for lap in laps) - min(lap.start.wall for lap in laps) for laps in turns]


# ------------------------------------------------------------------------------------------------------------ Lightning
class TakeTurns(pl.Callback):
    """Lets a `Trainer` train `steps` batches in every turn.

    Args:
        turns: of this process.
        steps: batches in a turn.
        mark: the batch at whose end the clock is read; by default the last one.
    """

    def __init__(self, turns: Turns, steps: int, mark: int | None = None) -> None:
        self.turns, self.steps, self.mark = turns, steps, mark or steps
        self.count = 0
        self.start = self.end = now()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin()

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += 1
        if self.count == self.mark:
            self.end = now()
        if self.count == self.steps:
            self.turns.report(self.start, self.end)
            self._begin()

    def _begin(self) -> None:
        self.turns.wait()
        self.count, self.start = 0, now()


def trainer(strategy: Any, devices: int = 1, **options: Any) -> pl.Trainer:
    """Return a `Trainer` that trains and does nothing else; without end, unless the options say otherwise."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    endless: dict[str, Any] = {"max_epochs": -1, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    return pl.Trainer(strategy=strategy, devices=devices, accelerator="cpu", **{**quiet, **endless, **options})


# --------------------------------------------------------------------------------------------------------------- memory
def fix_malloc() -> None:
    """Let every large tensor be mapped, so that freed memory leaves the process; glibc would adapt the threshold."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(-3, 2**18)  # M_MMAP_THRESHOLD


def reset_peak() -> None:
    """Start a new peak of resident memory at what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def memory(peak: bool = True) -> float:
    """Return the peak of this process's resident memory since `reset_peak`, or its present size, in MiB (Linux)."""
    field = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024
