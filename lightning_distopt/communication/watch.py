"""Who failed: every rank shows signs of life, and learns soon why another one has ended."""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

Position = tuple[int, int]
"""Where a rank is: (round under way, from 1; optimizer steps attempted)."""


class CommunicationError(RuntimeError):
    r"""A collective or a message failed; the text names this rank, the operation, the round, and which rank is at fault.

    Example:
        >>> try:
        ...     with Watch().guard("averaging", peers=[]):
        ...         raise RuntimeError("connection closed")
        ... except CommunicationError as error:
        ...     print(error, repr(error.__cause__), sep="\n")
        Rank 0: averaging failed in round 1 (timeout 1800 s): ... (connection closed)
        RuntimeError('connection closed')
    """


@dataclass(frozen=True)
class Failure:
    """Which ranks failed first, how, and where they were.

    Example:
        >>> str(Failure((1,), "raised ValueError", "in round 2, after 8 steps"))
        'rank 1 raised ValueError (in round 2, after 8 steps)'

    Args:
        ranks: their numbers.
        what: how they failed, as it follows their names.
        where: round and step.
    """

    ranks: tuple[int, ...]
    what: str
    where: str

    def __str__(self) -> str:
        return self.seen_by(None)

    def seen_by(self, rank: int | None) -> str:
        """Return this for the output of a rank, which is "this rank" there."""
        others = [str(other) for other in self.ranks if other != rank]
        named = [f"rank{'s' * (len(others) > 1)} {', '.join(others)}"] if others else []
        who = " and ".join(["this rank"] * (rank in self.ranks) + named)
        return f"{who} {self.what} ({self.where})"


class Watch:
    r"""Finds out which rank is at fault when communication fails.

    A thread of each rank writes a sign of life into the store of the process group twice a second: a count, whether the rank
    waits for others, and its position. The first failure is written there too, and all others read it. So a rank whose
    collective fails can tell an error from a crash, a crash from slowness, and cause from consequence. Nothing here is
    collective, and training never waits for it.

    Example:
        >>> watch = Watch()  # of a single process: watches nobody
        >>> with watch.guard("averaging", peers=[]):
        ...     raise RuntimeError("connection closed")
        Traceback (most recent call last):
        ...
        lightning_distopt.communication.watch.CommunicationError: Rank 0: averaging failed in round 1 ...

    Args:
        store: of the process group; None watches nobody: there is one process only, or they are still to be connected.
        rank, world_size: of this process.
        timeout: how long collectives wait, for the text of errors.
        interval: seconds between signs of life.
        patience: seconds without one after which a rank is taken for dead.
    """

    def __init__(
        self,
        store: dist.Store | None = None,
        rank: int = 0,
        world_size: int = 1,
        timeout: timedelta = timedelta(minutes=30),
        interval: float = 0.5,
        patience: float = 3.0,
    ) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.interval, self.patience = interval, patience
        self.position: Callable[[], Position] = lambda: (1, 0)
        self.failure: Failure | None = None
        self._waiting = self._operations = 0  # guarded operations: under way (they may be nested), and so far
        self._failed = self._host_gone = False
        self._signs = 0
        self._stopped, self._asked, self._answered = threading.Event(), threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._store: Any = None
        if store is not None and world_size > 1:
            self._store = _connection(store)
        if self._store is not None:
            # Ranks make their watches in the same order, so the same number belongs to the same training everywhere.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._prefix = f"lightning_distopt/watch/{attempt}/"
            self._prefix += f"{self._store.add(f'{self._prefix}count/{rank}', 1)}/"
            self._write_sign()
            self._thread = threading.Thread(target=self._run, name="lightning_distopt watch", daemon=True)
            self._thread.start()

    def __reduce__(self) -> Any:
        """Go to a process that is started by spawn, where nothing is connected yet, as a new one."""
        return Watch, ()

    # ------------------------------------------------------------------------------------------------ in the main thread
    @contextmanager
    def guard(self, operation: str, peers: Sequence[int], on_failure: Callable[[], Any] = lambda: None) -> Iterator[None]:
        """Turn the failure of a collective in the body into a `CommunicationError` that says who is at fault.

        Args:
            operation: what the body does, for the text.
            peers: the other ranks that take part.
            on_failure: called at once, to give up connections so that others do not wait for this rank in turn.
        """
        if self.failure is not None:
            on_failure()
            failure = self.failure.seen_by(self.rank)
            raise CommunicationError(f"Rank {self.rank}: no {operation} in round {self.position()[0]}, for {failure}.")
        self._operations += self._waiting == 0
        self._waiting += 1
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if isinstance(error, CommunicationError):
                raise
            self._failed = True
            # torch's frames hold the operation, and that its group and its connections, which others wait for; and an error
            # whose traceback ends here is part of a cycle, which would hold them until garbage is collected.
            traceback.clear_frames(error.__traceback__)
            error.__traceback__ = None
            on_failure()
            raise CommunicationError(self.explain(operation, peers, error)) from error
        finally:
            self._waiting -= 1

    def explain(self, operation: str, peers: Sequence[int], error: BaseException) -> str:
        """Return a sentence about a failed operation: which rank is at fault, as far as can be found out."""
        others = ", ".join(str(peer) for peer in peers if peer != self.rank)
        what = f"{operation}{' with rank(s) ' * bool(others)}{others}"
        timeout, line = f"{self.timeout.total_seconds():g}", first_line(error)
        if self.world_size > 1 and self._store is None:
            return (
                f"Rank {self.rank}: {what} failed while connecting (timeout {timeout} s): not all of them have started in "
                f"time, or they can't reach one another; look for the first error on the other ranks. ({line})"
            )
        failure = self.diagnose()
        reason = (
            failure.seen_by(self.rank)
            if failure is not None
            else "one of them has ended, or is slower than the timeout; look for the first error on the other ranks"
        )
        return f"Rank {self.rank}: {what} failed in round {self.position()[0]} (timeout {timeout} s): {reason}. ({line})"

    def report(self, error: BaseException) -> None:
        """Let the others know that this rank ends with an error of its own."""
        self._failed = True
        if self._active and self.failure is None:
            what = f"raised {type(error).__name__}: {first_line(error)}"
            _bounded(lambda: self._settle(Failure((self.rank,), what, self._where(*self.position()))), self.patience)

    def diagnose(self) -> Failure | None:
        """Find out which ranks failed first; takes `patience` seconds where they can't tell any more.

        Returns:
            None where all ranks live and wait: then they do not communicate in the same order, or the network has failed.
        """
        self._failed = True
        if not self._active or self.failure is not None:
            return self.failure
        self._asked.set()
        if not self._answered.wait(self.patience + 2 * self.interval + 1) and self.failure is None:
            self.failure = self._host_failure("does not answer")
        return self.failure

    def stop(self, failed: bool = False) -> None:
        """Show no more signs of life. After a failure the host of the store stays for those who still have to ask it."""
        if self._thread is None:
            return
        if failed and not self._host_gone:
            _bounded(self._leave, self.patience + 2)
        self._stopped.set()
        self._asked.set()
        self._thread.join(0.2)
        self._thread = None  # the store stays: the thread may be in the middle of a call

    @property
    def _active(self) -> bool:
        """Whether this rank shows signs of life, and can ask for those of others."""
        return self._store is not None and not self._stopped.is_set()

    # ----------------------------------------------------------------------------------------------------- in the thread
    def _run(self) -> None:
        try:
            while not self._asked.wait(self.interval):
                self._write_sign()
                self._read_failure()
            if not self._stopped.is_set():
                self._investigate()
        except RuntimeError:  # the store has gone, and with it the process that hosts it
            if not self._stopped.is_set() and self.failure is None:
                self.failure = self._host_failure("has ended")
        finally:
            self._answered.set()
        while not self._stopped.wait(self.interval):  # others may still look at this rank
            try:
                self._write_sign()
            except RuntimeError:
                return

    def _investigate(self) -> None:
        """Watch all ranks for a while: who shows no sign of life, or keeps the others waiting?"""
        begin = time.monotonic()
        seen: dict[int, tuple[str, float]] = {}
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        while self.failure is None and time.monotonic() - begin < self.patience + 2 * self.interval:
            self._write_sign()
            for rank in others:
                sign = self._read(f"sign/{rank}")
                if rank not in seen or seen[rank][0] != sign:
                    seen[rank] = (sign, time.monotonic())
            self._read_failure()
            if self._stopped.wait(self.interval / 2):
                return
        if self.failure is not None:
            return
        now = time.monotonic()
        signs = {rank: json.loads(sign) if sign else None for rank, (sign, _) in seen.items()}
        silent = [rank for rank in others if now - seen[rank][1] >= self.patience]
        if silent:
            known = [last for rank in silent if (last := signs[rank]) is not None]
            where = self._where(*min(last[2:4] for last in known)) if known else "before training"
            self._settle(Failure(tuple(silent), f"shows no sign of life for {self.patience:g} s", where))
            return
        # A rank that waits is not at fault, unless it is stuck in something that the others have left behind.
        alive = {rank: last for rank, last in signs.items() if last is not None and last[1] != "failed"}
        busy = {rank: last for rank, last in alive.items() if last[1] == "busy" or last[4] < self._operations}
        if busy:
            behind = min(last[2:4] for last in busy.values())
            late = tuple(rank for rank, last in busy.items() if last[2] == behind[0])
            self._settle(Failure(late, "is alive, but slower than the timeout", self._where(*behind)))

    def _settle(self, failure: Failure) -> None:
        """Write a failure into the store, unless there is an earlier one, which then is the cause."""
        stored = self._store.compare_set(self._prefix + "failure", "", json.dumps(asdict(failure)))
        self.failure = self._decode(stored.decode())

    def _read_failure(self) -> None:
        if self.failure is None and (stored := self._read("failure")):
            self.failure = self._decode(stored)

    @staticmethod
    def _decode(stored: str) -> Failure:
        fields = json.loads(stored)
        return Failure(tuple(fields["ranks"]), fields["what"], fields["where"])

    def _read(self, key: str) -> str:
        key = self._prefix + key
        return str(self._store.get(key).decode()) if self._store.check([key]) else ""

    def _write_sign(self) -> None:
        self._signs += 1
        state = "failed" if self._failed else "waits" if self._waiting else "busy"
        self._store.set(f"{self._prefix}sign/{self.rank}", json.dumps([self._signs, state, *self.position(), self._operations]))

    def _leave(self) -> None:
        """Note that this rank needs the store no more; its host waits until nobody does."""
        self._store.set(f"{self._prefix}left/{self.rank}", "1")
        if self.rank or _hosted_by_launcher():
            return
        ended = self.failure.ranks if self.failure is not None else ()
        end = time.monotonic() + self.patience + 1
        waiting = [rank for rank in range(1, self.world_size) if rank not in ended]
        while waiting and time.monotonic() < end:
            waiting = [rank for rank in waiting if not self._read(f"left/{rank}")]
            time.sleep(self.interval / 10)

    def _host_failure(self, what: str) -> Failure:
        self._host_gone = True
        if _hosted_by_launcher():
            return Failure((0,), f"or the launcher that hosts its store {what}", "no more is known")
        return Failure((0,), f"{what}, as its store shows", "no more is known")

    @staticmethod
    def _where(round_: int, step: int) -> str:
        return f"in round {round_}, after {step} steps"


def _hosted_by_launcher() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "") == "True"


def _connection(store: Any) -> Any:
    """Return a connection of our own to the store: the main thread may block that of the process group."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        return dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
    return store


def _bounded(action: Callable[[], Any], seconds: float) -> None:
    """Run something that may block for ever, for a bounded time; an error in it means that nobody is left to tell."""

    def run() -> None:
        try:
            action()
        except RuntimeError:  # the store has gone
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)


def first_line(error: BaseException) -> str:
    r"""Return the first line of what an error says; its kind, if it says nothing.

    Example:
        >>> first_line(RuntimeError("no answer\nTraceback ...")), first_line(KeyError())
        ('no answer', 'KeyError')

    Args:
        error: any; 300 characters of the line at most are returned.
    """
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
