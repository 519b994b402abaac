"""Trainings and bare messages, over links of limited rate or over loopback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.contenders import Contender
from benchmarks.contenders.task import Workload, fitting, train
from benchmarks.gossip_round import Bare
from benchmarks.harness import Lap, Team, Turns, makespan, now
from benchmarks.network import Network
from lightning_distopt.topologies import make

RUN_IN = 3
"""Steps, at least, before a contender is measured: DDP settles its buckets, PowerSGD begins."""


@dataclass(frozen=True)
class Link:
    """The links between ranks.

    Args:
        rate: of every port, such as "100mbit"; with `across` inside of two clusters. None: loopback, without a limit.
        across: of every port, to the other cluster.
    """

    rate: str | None = None
    across: str | None = None

    def __str__(self) -> str:
        rates = [rate.replace("mbit", "") for rate in (self.rate, self.across) if rate is not None]
        return f"{' / '.join(rates)} Mbit/s" if rates else "loopback"

    @property
    def clusters(self) -> int:
        """Return the number of clusters."""
        return 1 if self.across is None else 2

    def open(self, ranks: int) -> AbstractContextManager[Network | None]:
        """Return a network of such links."""
        if self.rate is None:
            return nullcontext()
        return Network(ranks, self.rate, clusters=self.clusters, across=self.across)


def _team(net: Network | None, n: int, name: str, body: Callable[[Turns], None]) -> Team:
    return Team(name, body, n) if net is None else net.team(name, body)


def curve(
    net: Network | None,
    workload: Workload,
    n: int,
    contender: Contender,
    seed: int,
    timeout: float,
    until: float = 2.0,
) -> dict[str, Any]:
    """Train, and return steps, seconds without evaluations, and accuracies.

    Args:
        net: the network; None for loopback.
        workload, n, contender, seed: what is trained.
        timeout: seconds for a segment.
        until: an accuracy that ends the training.
    """
    task = {"workload": workload, "seed": seed, "switch": workload.warmup, "clusters": net.clusters if net else 1}
    segments = [workload.every] * (workload.steps // workload.every)
    pace = {"segments": segments, "evaluates": True}
    found: dict[str, Any] = {"steps": [], "seconds": [], "accuracy": []}
    with _team(net, n, contender.name, partial(train, body=contender.train, task=task, pace=pace)) as team:
        for k in range(len(segments)):
            turn = team.turn(timeout)
            found["steps"].append((k + 1) * workload.every)
            found["seconds"].append(makespan([turn])[0] + (found["seconds"][-1] if k else 0.0))
            found["accuracy"].append(turn[0].value["accuracy"])
            if found["accuracy"][-1] >= until:
                break
    return found


def speed(
    net: Network | None, workload: Workload, n: int, contender: Contender, window: float, timeout: float
) -> dict[str, Any]:
    """Train for a while, after everything has settled, and return seconds and bytes of a step, the mean over ranks.

    It settles without limits: so models that are sent to all ranks first, and dense steps, take no time on slow links.

    Args:
        net: the network; None for loopback.
        workload, n, contender: what is trained; post-local contenders are local from the start.
        window: seconds to measure, of whole cycles; one at least.
        timeout: seconds for a segment.
    """
    cycle = contender.cycle(n)
    run_in = cycle * -(-RUN_IN // cycle)
    segments = [1, run_in - 1]
    task = {"workload": workload, "seed": 0, "switch": 0, "clusters": net.clusters if net else 1}
    pace = {"segments": segments, "window": window, "cycle": cycle}
    with _team(net, n, contender.name, partial(train, body=contender.train, task=task, pace=pace)) as team:
        with nullcontext() if net is None else net.lifted():
            for _ in segments:
                team.turn(timeout)
        turn = team.turn(timeout)
        if turn[0].value["more"]:
            turn = team.turn(timeout)
    steps = turn[0].value["steps"]
    return {
        "seconds": makespan([turn])[0] / steps,
        "steps": steps,
        **{key: _mean(turn, key, steps) for key in ("traffic", "sent")},
    }


def _mean(turn: Sequence[Lap], key: str, steps: int) -> float | None:
    values = [lap.value[key] for lap in turn]
    return None if None in values else float(np.mean(values)) / steps


@dataclass(frozen=True)
class Message:
    """What a rank exchanges in a round.

    Args:
        kind: "all", an all-reduce; "blocks", one in each half of the ranks; "gather", an all-gather; or a graph.
        size: bytes; on a graph those to each neighbour.
    """

    kind: str
    size: int


def bare(net: Network | None, n: int, messages: Sequence[Message], window: float, timeout: float) -> list[float]:
    """Return the seconds that gloo alone needs for each message.

    Args:
        net: the network; None for loopback.
        n: number of ranks.
        messages: to measure.
        window: seconds for each; one message at least, on a graph that changes one for each of its phases.
        timeout: seconds for each turn.
    """
    with _team(net, n, "bare gloo", partial(_exchange, messages=messages, window=window)) as team:
        turns = [team.turn(timeout) for _ in messages]
    return [makespan([turn])[0] / turn[0].value for turn in turns]


def _exchange(turns: Turns, messages: Sequence[Message], window: float) -> None:
    turns.wait()
    turns.connect()
    for message in messages:
        phases = 1 if message.kind in ("all", "blocks", "gather") else make(message.kind, turns.size).period or 1
        connecting = _operation(Message(message.kind, 64), turns.index, turns.size)
        for _ in range(phases):
            connecting()
        operation = _operation(message, turns.index, turns.size)
        dist.barrier()
        start = now()
        for _ in range(phases):
            operation()
        count = fitting(window, now().wall - start.wall) * phases
        dist.barrier()
        start = now()
        for _ in range(count):
            operation()
        turns.report(start, now(), count)
        turns.wait()


def _operation(message: Message, rank: int, n: int) -> Callable[[], Any]:
    values = torch.zeros(-(-message.size // 4))
    if message.kind == "all":
        return lambda: dist.all_reduce(values)
    if message.kind == "blocks":
        block = dist.new_subgroups(n // 2)[0]
        return lambda: dist.all_reduce(values, group=block)
    if message.kind == "gather":
        others = list(torch.zeros(n, len(values)).unbind())
        return lambda: dist.all_gather(others, values)
    return Bare(make(message.kind, n), rank, values).exchange
