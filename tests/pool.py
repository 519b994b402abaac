"""A persistent pool of forked ranks, so that a multi-rank test costs milliseconds instead of process launches.

The workers are forked once, after collection, when everything slow has already been imported. Every call of
`RankPool.run` is otherwise independent: it has a fresh gloo process group, fresh random seeds, and the interpreter
state that tests tend to change (environment, default dtype, warning filters, ...) is put back afterwards.

A worker that raises is reported with its traceback. A worker that dies or hangs is reported as well, with the stack it
hung in, and the whole pool is killed and forked again at the next call. Things that tests patch in the parent process
are not patched in the workers: patch inside of the function that is run.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import multiprocessing as mp
import os
import pickle
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import torch
import torch._dynamo  # the first optimizer of a process imports it, which would take each forked rank a second
import torch.distributed as dist

SEED = 1234
GRACE = 3.0  # seconds that the other ranks get to finish or fail by themselves, once one rank has failed
COLLECTIVE_SHARE = 0.8  # of the timeout; collectives give up there, so that blocked ranks can tell where they were


class RankError(AssertionError):
    """Some rank did not return a result; `errors` maps each such rank, in order of occurrence, to what happened."""

    def __init__(self, errors: dict[int, str]) -> None:
        self.errors = errors
        super().__init__("\n".join(f"--- rank {rank}: {text.rstrip()}" for rank, text in errors.items()))


@dataclass(frozen=True)
class _Call:
    """What one rank is asked to do."""

    payload: bytes  # cloudpickled (fn, args, kwargs)
    rank: int
    world_size: int
    store: str
    port: int
    timeout: float
    process_group: bool
    folder: str


@dataclass(frozen=True)
class _Reply:
    """What came of it."""

    ok: bool
    value: Any = None
    error: str = ""
    time: float = 0.0  # when it failed, on the clock that all processes share


def seed_everything(seed: int) -> None:
    """Seed the random number generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def free_port() -> int:
    """A TCP port nobody listens on, below the range from which the system draws ports of outgoing connections."""
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


# ------------------------------------------------------------------------------------------------ inside of a worker


@contextlib.contextmanager
def _isolated(call: _Call) -> Iterator[None]:
    """Set up seeds, folder and environment of one call, and put the interpreter's state back after it."""
    environ, path = dict(os.environ), list(sys.path)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)}
    os.environ.update(
        RANK=str(call.rank),
        LOCAL_RANK=str(call.rank),
        WORLD_SIZE=str(call.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(call.port),
    )
    rank_zero = sys.modules.get("lightning_utilities.core.rank_zero")
    if rank_zero is not None:  # Lightning reads RANK when it is imported, which here happened before there were ranks
        rank_zero.rank_zero_only.rank = call.rank
    os.chdir(call.folder)  # where the test is now; a pool that was forked in another's folder may have outlived that
    seed_everything(SEED + call.rank)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        os.environ.clear()
        os.environ.update(environ)
        os.chdir("/")
        sys.path[:] = path
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(True)
        torch.use_deterministic_algorithms(deterministic)
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)


def _destroy_process_group() -> None:
    """Leave no process group, nor the trace of one that could not be initialised.

    Each attempt to initialise raises the counter from which torch makes the group's name in the store, and only the
    destruction of a group sets it back. Ranks whose counters differ would wait for each other under different names.
    """
    if dist.is_initialized():
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
    dist.distributed_c10d._world.group_count = 0


def _execute(call: _Call) -> bytes:
    """Run the function and pickle what comes of it. The process group stays up unless the function failed."""
    try:
        with _isolated(call):
            fn, args, kwargs = pickle.loads(call.payload)
            if call.process_group:
                dist.init_process_group(
                    "gloo",
                    store=dist.PrefixStore("ranks", dist.FileStore(call.store, -1)),
                    rank=call.rank,
                    world_size=call.world_size,
                    timeout=timedelta(seconds=COLLECTIVE_SHARE * call.timeout),
                )
            value = fn(call.rank, call.world_size, *args, **kwargs)
            return cloudpickle.dumps(_Reply(ok=True, value=value))
    except BaseException:  # including SystemExit and pytest's own outcomes, which derive from BaseException
        reply = _Reply(ok=False, error=traceback.format_exc(), time=time.monotonic())
        # torch 2.6 joins gloo's threads with the GIL held, which one needs that still has to free its last operation's tensor.
        time.sleep(0.05)
        _destroy_process_group()  # at once: ranks that wait for this one then fail now and not at their timeout
        return cloudpickle.dumps(reply)


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, where it can (Linux)."""
    with contextlib.suppress(Exception):
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _worker(connection: Connection, inherited: list[Connection], stack_file: Path) -> None:
    """Serve calls until the connection closes.

    Each call takes two messages: the call itself, answered by its reply, and `None`, answered by `None`, upon which the
    process group is destroyed. Hence no rank closes its sockets while another still reads from them.
    """
    for other in inherited:  # else the end of one process would not be seen as the end of its connection
        other.close()
    os.setsid()  # children, such as data loader workers, are killed together with this process
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    torch.set_num_threads(1)
    gc.freeze()  # what the parent has imported need not be looked at in each collection
    with stack_file.open("w") as stacks, contextlib.suppress(EOFError, OSError):
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
        while True:
            call = pickle.loads(connection.recv_bytes())
            if call is not None:
                connection.send_bytes(_execute(call))
            else:
                _destroy_process_group()
                gc.collect()
                connection.send_bytes(pickle.dumps(None))
    os._exit(0)


# ------------------------------------------------------------------------------------------------ inside of pytest


class RankPool:
    """Up to `size` ranks on which functions can be run, see the module's description.

    Args:
        size: number of worker processes, the largest possible world size.
    """

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self.forks = 0  # how many times the workers have been started
        self._directory: Path | None = None
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []

    def run(
        self,
        world_size: int,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float = 60,
        expect_dead: Collection[int] = (),
        process_group: bool = True,
        **kwargs: Any,
    ) -> list[Any]:
        """Run `fn(rank, world_size, *args, **kwargs)` on ranks `0, ..., world_size - 1` and return their results.

        Args:
            world_size: number of ranks, at least 1.
            fn: any function, closures included; it may use everything that its test module has imported.
            *args: more arguments of `fn`.
            timeout: seconds after which ranks that have not returned are killed. Collectives on the default group give
                up a little earlier.
            expect_dead: ranks that must end their process; their results are `None`.
            process_group: whether to initialise `torch.distributed` (gloo). If not, `fn` may do so itself, or let
                Lightning do it: `RANK`, `LOCAL_RANK`, `WORLD_SIZE`, `MASTER_ADDR` and a free `MASTER_PORT` are set
                either way.
            **kwargs: keyword arguments of `fn`.

        Returns:
            One result per rank.

        Raises:
            RankError: if a rank raised, died or hung, or did not die although it was expected to.
        """
        if not 1 <= world_size <= self.size:
            raise ValueError(f"world_size must be in 1, ..., {self.size}, not {world_size}")
        payload = cloudpickle.dumps((fn, args, kwargs))
        self._ensure_started()
        assert self._directory is not None
        store, port = self._directory / "store", free_port()
        deadline = time.monotonic() + timeout
        try:
            for rank in range(world_size):
                call = _Call(payload, rank, world_size, str(store), port, timeout, process_group, os.getcwd())
                self._connections[rank].send_bytes(pickle.dumps(call))
            replies, errors = self._collect(world_size, deadline, expect_dead)
            healthy = len(replies) == world_size and self._release(world_size)
        except BaseException:  # an interrupt, or the time limit of the test
            self.stop(kill=True)
            raise
        store.unlink(missing_ok=True)
        if not healthy:
            self.stop(kill=True)
        if errors:
            raise RankError(errors)
        return [replies[rank].value if rank in replies else None for rank in range(world_size)]

    def stop(self, kill: bool = False) -> None:
        """End all workers and remove the pool's files; a later `run` starts new ones."""
        for connection in self._connections:
            connection.close()
        deadline = time.monotonic() + (0 if kill else 2)
        for process in self._processes:
            if not kill:
                process.join(max(0, deadline - time.monotonic()))
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid or 0, signal.SIGKILL)  # also what the worker has started
            process.kill()
            process.join()
            process.close()
        self._connections, self._processes = [], []
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _ensure_started(self) -> None:
        if self._processes and all(process.is_alive() for process in self._processes):
            return
        self.stop(kill=True)
        self._directory = Path(tempfile.mkdtemp(prefix="rank_pool_"))
        context = mp.get_context("fork")
        pipes = [context.Pipe() for _ in range(self.size)]
        ends = [end for pipe in pipes for end in pipe]
        for rank, (here, there) in enumerate(pipes):
            inherited = [end for end in ends if end is not there]
            target_args = (there, inherited, self._directory / f"stack{rank}")
            process = context.Process(target=_worker, args=target_args, name=f"rank{rank}", daemon=False)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: forking with threads around
                process.start()
            self._processes.append(process)
            self._connections.append(here)
        for _, there in pipes:
            there.close()
        self.forks += 1

    def _collect(
        self, world_size: int, deadline: float, expect_dead: Collection[int]
    ) -> tuple[dict[int, _Reply], dict[int, str]]:
        """Wait for the replies of all ranks; returns those that came and a text for each rank that failed."""
        replies: dict[int, _Reply] = {}
        failures: dict[int, tuple[float, str]] = {}  # when, and what
        pending = set(range(world_size))
        while pending and time.monotonic() < deadline:
            # A child of a dead rank may hold its connection open, hence the look at the process from time to time.
            ready = wait([self._connections[r] for r in pending], min(0.25, max(0, deadline - time.monotonic())))
            for rank in sorted(pending):
                if self._connections[rank] in ready:
                    try:
                        reply: _Reply | None = pickle.loads(self._connections[rank].recv_bytes())
                    except (EOFError, ConnectionError):
                        reply = None
                elif not self._processes[rank].is_alive() and not self._connections[rank].poll():
                    reply = None
                else:
                    continue
                pending.remove(rank)
                if reply is not None:
                    replies[rank] = reply
                    if not reply.ok:
                        failures[rank] = (reply.time, reply.error)
                    elif rank in expect_dead:
                        failures[rank] = (time.monotonic(), "was expected to die but returned")
                elif rank not in expect_dead:
                    self._processes[rank].join(1)
                    failures[rank] = (0.0, f"died with exit code {self._processes[rank].exitcode}")
                if rank in failures:
                    deadline = min(deadline, time.monotonic() + GRACE)
        errors = {rank: failures[rank][1] for rank in sorted(failures, key=lambda rank: failures[rank][0])}
        if pending:
            reason = f"had not finished {GRACE:.0f} s after another rank failed" if errors else "timed out"
            for rank, stack in self._stacks(sorted(pending)).items():
                errors[rank] = f"{reason} and was killed in\n{stack}"
        return replies, errors

    def _stacks(self, ranks: list[int]) -> dict[int, str]:
        """Where these ranks are just now."""
        assert self._directory is not None
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._processes[rank].pid or 0, signal.SIGUSR2)
        time.sleep(0.2)
        return {rank: (self._directory / f"stack{rank}").read_text() for rank in ranks}

    def _release(self, world_size: int) -> bool:
        """Let the ranks destroy their process groups; whether all of them have done so."""
        for rank in range(world_size):
            self._connections[rank].send_bytes(pickle.dumps(None))
        deadline = time.monotonic() + 10
        for rank in range(world_size):
            if not self._connections[rank].poll(max(0, deadline - time.monotonic())):
                return False
            try:
                self._connections[rank].recv_bytes()
            except (EOFError, ConnectionError):
                return False
        return True
