"""What crossed the wire: bytes, rounds and the time that training stood still for them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Traffic:
    r"""Counts what a replica sends and how long its rank waits for it.

    Bytes are counted per replica as if every replica were a process of its own, so that a simulation of `n` replicas on
    one rank and a run on `n` ranks report the same numbers.

    Example:
        >>> traffic = Traffic()
        >>> with traffic.blocked(torch.device("cpu")):
        ...     traffic.bytes_sent += all_reduce_bytes(numel=1000, itemsize=4, replicas=4)
        >>> traffic.bytes_sent, traffic.rounds, traffic.seconds_blocked > 0
        (6000, 0, True)

    Args:
        rows: replicas that the rank hosts.

    Attributes:
        rounds: communication events so far, of whatever size.
        evaluation_bytes: bytes that one replica has sent to form the average for evaluation and checkpoints.
        bytes_up, bytes_down: bytes that the clients of a federation have sent to their server and got from it, all together.
    """

    def __init__(self, rows: int = 1) -> None:
        self.rounds = self.evaluation_bytes = 0
        self.bytes_up = self.bytes_down = 0
        self._common = 0  # bytes that every replica has sent
        self._by_row = [0] * rows  # bytes that one has sent besides, to its neighbours
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __repr__(self) -> str:
        counts = f"bytes_sent={self.bytes_sent}, rounds={self.rounds}, seconds_blocked={self.seconds_blocked:.3g}"
        return f"Traffic({counts}, evaluation_bytes={self.evaluation_bytes})"

    @property
    def bytes_sent(self) -> int:
        """Bytes that a replica has sent to train: the mean over those of this rank, where they differ."""
        return self._common + sum(self._by_row) // len(self._by_row)

    @bytes_sent.setter
    def bytes_sent(self, value: int) -> None:
        self._common += value - self.bytes_sent

    @property
    def bytes_sent_max(self) -> int:
        """Bytes that the busiest replica of this rank has sent to train."""
        return self._common + max(self._by_row)

    def add_messages(self, row: int, sent: int) -> None:
        """Charge one replica of this rank with `sent` bytes."""
        self._by_row[row] += sent

    @property
    def seconds_blocked(self) -> float:
        """Seconds this rank has waited for communication (on CUDA: that its stream was busy with it)."""
        while self._events:
            start, end = self._events.pop()
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        return self._seconds

    def add_interval(self, start: Any, end: Any) -> None:
        """Add time that was measured elsewhere, between two results of `now`."""
        if isinstance(start, float):
            self._seconds += end - start
            return
        self._events.append((start, end))
        if len(self._events) > 1024:
            _ = self.seconds_blocked

    @contextmanager
    def blocked(self, device: torch.device) -> Iterator[None]:
        """Measure the body as time spent waiting; on CUDA with events, so that nothing is synchronised for it."""
        start = now(device)
        try:
            yield
        finally:
            self.add_interval(start, now(device))

    def state_dict(self) -> dict[str, Any]:
        """Return the counts for a checkpoint."""
        return {
            "bytes_sent": self.bytes_sent,
            "bytes_by_row": [self._common + sent for sent in self._by_row],
            "rounds": self.rounds,
            "evaluation_bytes": self.evaluation_bytes,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "seconds_blocked": self.seconds_blocked,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the counts of a checkpoint."""
        self._common, self._by_row = 0, [int(sent) for sent in state["bytes_by_row"]]
        self.rounds = int(state["rounds"])
        self.evaluation_bytes = int(state["evaluation_bytes"])
        self.bytes_up, self.bytes_down = int(state.get("bytes_up", 0)), int(state.get("bytes_down", 0))
        self._seconds, self._events = float(state["seconds_blocked"]), []


def now(device: torch.device) -> Any:
    """Return the time in seconds; on CUDA an event, which will know it once the stream has come there."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def all_reduce_bytes(numel: int, itemsize: int, replicas: int) -> int:
    r"""Return the bytes that each of `g` replicas sends to all-reduce `d` values.

    $$ 2 \, \frac{g - 1}{g} \, d \cdot \text{itemsize} $$

    It is what a ring sends, and the lower bound.

    Example:
        >>> all_reduce_bytes(numel=1000, itemsize=4, replicas=4)
        6000

    Args:
        numel: `d`.
        itemsize: bytes of a value.
        replicas: `g`.
    """
    return 2 * (replicas - 1) * numel * itemsize // replicas
