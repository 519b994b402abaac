"""What crossed the wire: bytes, rounds and the time that training stood still for them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(repr=False)
class Traffic:
    r"""Counts what one replica sends and how long its rank waits for it.

    Bytes are counted per replica as if every replica were a process of its own, so that a simulation of `n` replicas on
    one rank and a run on `n` ranks report the same numbers.

    Example:
        >>> traffic = Traffic()
        >>> with traffic.blocked(torch.device("cpu")):
        ...     traffic.bytes_sent += all_reduce_bytes(numel=1000, itemsize=4, replicas=4)
        >>> traffic.bytes_sent, traffic.rounds, traffic.seconds_blocked > 0
        (6000, 0, True)

    Attributes:
        bytes_sent: bytes that one replica has sent to train.
        rounds: communication events so far, of whatever size.
        evaluation_bytes: bytes that one replica has sent to form the average for evaluation and checkpoints.
    """

    bytes_sent: int = 0
    rounds: int = 0
    evaluation_bytes: int = 0
    _seconds: float = 0.0
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def __repr__(self) -> str:
        counts = f"bytes_sent={self.bytes_sent}, rounds={self.rounds}, seconds_blocked={self.seconds_blocked:.3g}"
        return f"Traffic({counts}, evaluation_bytes={self.evaluation_bytes})"

    @property
    def seconds_blocked(self) -> float:
        """Seconds this rank has waited for communication (on CUDA: that its stream was busy with it)."""
        while self._events:
            start, end = self._events.pop()
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        return self._seconds

    def add_interval(self, start: Any, end: Any) -> None:
        """Add time that was measured elsewhere, between two readings of a clock in seconds or two CUDA events."""
        if isinstance(start, float):
            self._seconds += end - start
            return
        self._events.append((start, end))
        if len(self._events) > 1024:
            _ = self.seconds_blocked

    @contextmanager
    def blocked(self, device: torch.device) -> Iterator[None]:
        """Measure the body as time spent waiting; on CUDA with events, so that nothing is synchronised for it."""
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            try:
                yield
            finally:
                end.record()
                self.add_interval(start, end)
        else:
            begin = time.perf_counter()
            try:
                yield
            finally:
                self._seconds += time.perf_counter() - begin

    def state_dict(self) -> dict[str, float]:
        """Return the counts for a checkpoint."""
        return {
            "bytes_sent": self.bytes_sent,
            "rounds": self.rounds,
            "evaluation_bytes": self.evaluation_bytes,
            "seconds_blocked": self.seconds_blocked,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from the counts of a checkpoint."""
        self.bytes_sent, self.rounds = int(state["bytes_sent"]), int(state["rounds"])
        self.evaluation_bytes = int(state["evaluation_bytes"])
        self._seconds, self._events = float(state["seconds_blocked"]), []


def all_reduce_bytes(numel: int, itemsize: int, replicas: int) -> int:
    r"""Return the bytes that each of `g` replicas sends to all-reduce `d` values.

    $$ 2 \, \frac{g - 1}{g} \, d \cdot \text{itemsize} $$

    It is what a ring sends, and the lower bound.

    Example:
        >>> all_reduce_bytes(numel=1000, itemsize=4, replicas=4)
        6000
    """
    return 2 * (replicas - 1) * numel * itemsize // replicas
