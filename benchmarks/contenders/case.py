"""One workload on ranks with links of one kind: what is measured there, and what follows from it."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import ALONE, DDP, Contender
from benchmarks.contenders.measure import Link, Message, bare, curve, speed
from benchmarks.contenders.task import Workload
from lightning_distopt.topologies import make

AGAIN = 5
"""Contenders after which computation is measured again: machines are not equally fast all the time."""

LONGER = 2
"""Times the steps of DDP that others may take to its accuracy, with a schedule as long, if they miss it in as many."""

MARGIN = 0.005
"""Accuracy that counts as none: the standard error on 10,000 images is 0.3 to 0.4 points."""


class Store:
    """What has been measured, by name, in a file from which an interrupted run goes on.

    Args:
        path: the file. None: no file.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.exists() else {}

    def get(self, key: Sequence[Any], measure: Callable[[], Any]) -> Any:
        """Return what is stored under a key, after measuring it if it is not there."""
        name = " | ".join(map(str, key))
        if name not in self.data:
            print(name, file=sys.stderr, flush=True)
            self.data[name] = measure()
            if self.path is not None:
                self.path.write_text(json.dumps(self.data, indent=0))
        return self.data[name]


def attempt(contender: Contender, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Measure; what prevents somebody else's contender is noted in place of the result, under "failed"."""
    if not contender.installed:
        return {"failed": "not installed"}
    try:
        return measure()
    except (RuntimeError, TimeoutError) as error:
        if contender.ours or contender is DDP:
            raise
        return {"failed": f"does not run: {str(error).strip().splitlines()[-1]}"}


def messages(contender: Contender, n: int, parameters: int, sent: float) -> list[tuple[Message, float]]:
    """Return what a rank exchanges, and how often in a step.

    Args:
        contender: one of this package's.
        n: number of ranks.
        parameters: of the network.
        sent: bytes of a step.
    """
    rate = 1 / contender.sync_period
    if contender.topology == "all":
        everybody = Message("all", 4 * parameters), rate / contender.blocks
        inside = Message("blocks", 4 * parameters), rate * (1 - 1 / contender.blocks)
        return [everybody, inside] if contender.blocks > 1 else [everybody]
    receivers = n - 1 if contender.topology == "gather" else make(contender.topology, n).max_degree
    return [(Message(contender.topology, round(sent / rate / receivers)), rate)]


class Case:
    """A workload on a number of ranks and links of one kind: what was measured, and what follows from it.

    Args:
        workload, n, link: what they are.
        contenders: who takes part, those for two clusters where there are two.
        repeats: of each measurement of a speed.
        is_equal: whether the link's rate was chosen so that communication takes as long as computation.

    Attributes:
        speeds: by contender, one for each repeat.
        compute: by contender, the seconds of a step without communication, measured shortly before, in each repeat.
        curves: by contender, one for each seed: of its longer training if it has not reached the accuracy in the other.
        finals: by contender, the accuracy after the workload's steps, with each seed.
        bare: by message, the seconds of bare gloo in each repeat.
        direct: by contender, steps and seconds to the accuracy in a training over these links.
    """

    def __init__(
        self,
        workload: Workload,
        n: int,
        link: Link,
        contenders: Iterable[Contender],
        repeats: int,
        is_equal: bool = False,
    ) -> None:
        self.workload, self.n, self.link, self.repeats, self.is_equal = workload, n, link, repeats, is_equal
        self.contenders = [c for c in contenders if c.blocks == 1 or link.clusters > 1]
        self.parameters = workload.parameters()
        self.speeds: dict[str, list[dict[str, Any]]] = {}
        self.compute: dict[str, list[float]] = {}
        self.curves: dict[str, list[dict[str, Any]]] = {}
        self.finals: dict[str, list[float]] = {}
        self.bare: dict[Message, list[float]] = {}
        self.direct: dict[str, tuple[int, float]] = {}

    def __str__(self) -> str:
        return f"{self.workload.name}, n = {self.n}, {self.link}"

    def measure(self, store: Store, window: float, timeout: float) -> None:
        """Let contenders take turns on the links, bare gloo after them.

        Args:
            store: for the results.
            window: seconds of each measurement.
            timeout: seconds for a turn.
        """
        with self.link.open(self.n) as net:
            for repeat in range(self.repeats):
                for place, c in enumerate(self.contenders):
                    run = functools.partial(speed, net, self.workload, self.n, c, window, timeout)
                    if place % AGAIN == 0:
                        run_alone = functools.partial(speed, net, self.workload, self.n, ALONE, window, timeout)
                        alone = store.get(("speed", self, ALONE.name, repeat, place), run_alone)
                    self.compute.setdefault(c.name, []).append(alone["seconds"])
                    known = self.speeds.setdefault(c.name, [])
                    if not known or "failed" not in known[0]:
                        known.append(store.get(("speed", self, c.name, repeat), functools.partial(attempt, c, run)))
                wanted = list(dict.fromkeys(m for c in self.contenders if c.ours for m, _ in self.messages(c)))
                run_bare = functools.partial(bare, net, self.n, wanted, window / 4, timeout)
                for message, seconds in zip(wanted, store.get(("bare", self, wanted, repeat), run_bare), strict=True):
                    self.bare.setdefault(message, []).append(seconds)

    def train(self, store: Store, contenders: Sequence[Contender], seeds: int, timeout: float) -> None:
        """Train without limits; those who do not reach the accuracy of the first once more, `LONGER` times as long.

        Args:
            store: for the results.
            contenders: of all cases of the workload; who learns as another is not trained.
            seeds: of each training.
            timeout: seconds for a segment.
        """
        for c in self.contenders:
            trained = next((other for other in contenders if other.name == c.learns_as), c)
            for workload in (self.workload, self.workload.stretched(LONGER)):
                curves = []
                for seed in range(seeds):
                    run = functools.partial(curve, None, workload, self.n, trained, seed, timeout)
                    key = ("curve", workload.name, self.n, trained.name, f"{workload.steps} steps", seed)
                    curves.append(store.get(key, functools.partial(attempt, trained, run)))
                self.curves[c.name] = curves
                if self.failure(c) is not None:
                    break
                self.finals.setdefault(c.name, [x["accuracy"][-1] for x in curves])
                if self.steps(c) is not None:
                    break

    def train_directly(self, store: Store, names: Iterable[str], timeout: float) -> None:
        """Train over the links until the accuracy is reached."""
        chosen = [c for c in self.contenders if c.name in names and self.failure(c) is None]
        with self.link.open(self.n) as net:
            for c in chosen:
                workload = replace(self.workload, steps=self.curves[c.name][0]["steps"][-1])
                run = functools.partial(curve, net, workload, self.n, c, 0, timeout, self.target)
                found = store.get(("direct", self, c.name), run)
                self.direct[c.name] = found["steps"][-1], found["seconds"][-1]

    # ------------------------------------------------------------------------------------------------------- of a method
    def failure(self, c: Contender) -> str | None:
        """Return why there are no figures of a contender, if so."""
        found = (x["failed"] for x in (*self.speeds[c.name], *self.curves.get(c.name, ())) if "failed" in x)
        return next(found, None)

    def messages(self, c: Contender) -> list[tuple[Message, float]]:
        """Return what one of this package's contenders exchanges, and how often in a step."""
        return messages(c, self.n, self.parameters, self.speeds[c.name][0]["traffic"])

    def seconds(self, c: Contender) -> list[float]:
        """Return the seconds of a step, in each repeat."""
        return [x["seconds"] for x in self.speeds[c.name]]

    def sent(self, c: Contender) -> float | None:
        """Return the bytes of a step: those of the interface if there is one, else those that the contender counts."""
        known = [x["sent"] if x["sent"] is not None else x["traffic"] for x in self.speeds[c.name]]
        return None if None in known else float(np.median(known))

    def over_expected(self, c: Contender) -> list[float]:
        """Return the time of a step over what computation and bare messages need, in each repeat."""
        ratios = []
        for k, seconds in enumerate(self.seconds(c)):
            compute = self.compute[c.name][k]
            communicate = sum(self.bare[message][k] * often for message, often in self.messages(c))
            ratios.append(seconds / (max(compute, communicate) if c.overlap else compute + communicate))
        return ratios

    def accuracy(self, c: Contender) -> list[float]:
        """Return the accuracy over steps, the mean over seeds."""
        return [float(np.mean(of_seeds)) for of_seeds in zip(*(x["accuracy"] for x in self.curves[c.name]), strict=True)]

    @property
    def target(self) -> float:
        """The accuracy to reach: what DDP ends with, the mean over seeds, less the margin."""
        return float(np.mean(self.finals[DDP.name])) - MARGIN

    def steps(self, c: Contender) -> int | None:
        """Return the steps to the accuracy, or None if it is not reached."""
        reached = zip(self.curves[c.name][0]["steps"], self.accuracy(c), strict=True)
        return next((step for step, accuracy in reached if accuracy >= self.target), None)

    def dense(self, c: Contender) -> int:
        """Return how many of the first steps cost what DDP's do."""
        return self.workload.warmup if c.post_local else c.dense

    def axis(self, c: Contender, steps: int, repeat: int) -> float:
        """Return the seconds that so many steps take, by the speeds of a repeat."""
        dense = min(steps, self.dense(c))
        return dense * self.seconds(DDP)[repeat] + (steps - dense) * self.seconds(c)[repeat]

    def times(self, c: Contender) -> list[float] | None:
        """Return the seconds to the accuracy, for each repeat."""
        steps = self.steps(c)
        return None if steps is None else [self.axis(c, steps, k) for k in range(self.repeats)]

    def bytes_to_target(self, c: Contender) -> float | None:
        """Return the bytes to the accuracy."""
        steps, sent, ddp = self.steps(c), self.sent(c), self.sent(DDP)
        if steps is None or sent is None or (ddp is None and self.dense(c)):
            return None
        dense = min(steps, self.dense(c))
        return dense * (ddp or 0.0) + (steps - dense) * sent

    def running(self, ours: bool) -> list[Contender]:
        """Return the contenders of one side that have figures and reach the accuracy."""
        return [c for c in self.contenders if c.ours == ours and self.failure(c) is None and self.times(c)]

    def fastest(self, contenders: Iterable[Contender]) -> Contender:
        """Return who is first at the accuracy."""
        return min(contenders, key=lambda c: float(np.median(self.times(c) or [])))

    def as_dict(self) -> dict[str, Any]:
        """Return all that was measured."""
        return {
            "workload": self.workload.name,
            "ranks": self.n,
            "link": str(self.link),
            "parameters": self.parameters,
            "speeds": self.speeds,
            "compute": self.compute,
            "curves": self.curves,
            "finals": self.finals,
            "bare": [{"kind": m.kind, "bytes": m.size, "seconds": seconds} for m, seconds in self.bare.items()],
            "direct": self.direct,
        }
