"""Which clients take part in a round, and which rank trains which of them in which turn."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_distopt.communication import derive_seed

STEPS_PER_TURN = 100
"""Optimizer steps that a turn has at least, where there are so many: what surrounds a turn costs as much as half a step."""


def sample(clients: int, count: int, round_: int, seed: int = 0) -> list[int]:
    """Return the clients `S_t` of a round: a uniform choice without repetition, the same wherever it is made.

    Example:
        >>> sample(clients=10, count=3, round_=0), sample(clients=10, count=3, round_=1)
        ([0, 8, 9], [0, 4, 7])

    Args:
        clients: `K`.
        count: how many take part, `C K`.
        round_: `t`, from 0.
        seed: of all choices.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "cohort", round_))
    chosen: list[int] = torch.randperm(clients, generator=generator)[:count].tolist()
    return sorted(chosen)


@dataclass(frozen=True)
class Plan:
    """Who trains whom in a round.

    Args:
        round: its number `t`.
        clients: `S_t`, in ascending order.
        turns: for each rank the clients of each of its turns; ranks have equally many turns, which may be empty.
        steps: optimizer steps of the rank that makes most of them.
    """

    round: int
    clients: tuple[int, ...]
    turns: tuple[tuple[tuple[int, ...], ...], ...]
    steps: int


def plan(round_: int, clients: Sequence[int], steps: Sequence[int], ranks: int, turns: int, stay: bool = False) -> Plan:
    """Deal the clients of a round out to ranks, so that these have about equally many steps, and to turns.

    Example:
        >>> plan(0, clients=[0, 1, 2, 3], steps=[5, 1, 3, 2], ranks=2, turns=2).turns
        (((0,), (1,)), ((2,), (3,)))

    Args:
        round_: its number.
        clients: who takes part.
        steps: optimizer steps of all clients, `[K]`.
        ranks: how many there are.
        turns: of a round.
        stay: whether a client always has the same rank, `k mod ranks`, where its state is.
    """
    hosts: list[list[int]] = [[] for _ in range(ranks)]
    if stay:
        for k in clients:
            hosts[k % ranks].append(k)
    else:  # the longest first, each to the rank that has least to do
        load = [(0, rank) for rank in range(ranks)]
        for k in sorted(clients, key=lambda k: (-steps[k], k)):
            total, rank = heapq.heappop(load)
            hosts[rank].append(k)
            heapq.heappush(load, (total + steps[k], rank))
    ordered = [sorted(own) for own in hosts]
    longest = max(sum(steps[k] for k in own) for own in ordered)
    return Plan(round_, tuple(clients), tuple(_cut(own, steps, turns) for own in ordered), longest)


def turns_of_round(count: int, steps: Sequence[int], ranks: int) -> int:
    """Return into how many turns rounds of `count` clients are cut: each has whole clients, and work enough."""
    most = -(-count // ranks)
    return max(1, min(most, int(most * sum(steps) / len(steps) / STEPS_PER_TURN)))


def _cut(clients: Sequence[int], steps: Sequence[int], turns: int) -> tuple[tuple[int, ...], ...]:
    """Cut a sequence of clients into turns of about equally many steps."""
    cut: list[list[int]] = [[] for _ in range(turns)]
    total, done = sum(steps[k] for k in clients), 0
    for k in clients:
        cut[min(turns - 1, done * turns // max(total, 1))].append(k)
        done += steps[k]
    return tuple(map(tuple, cut))
