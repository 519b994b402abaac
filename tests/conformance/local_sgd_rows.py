"""Rows of local SGD and its kin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_distopt import ConstantWarmup, ExponentialWarmup, LinearWarmup, LocalSGDStrategy, PostLocalSwitch
from tests.conformance.case import Case
from tests.oracles import local_sgd as oracle


def back_to_gradients(step: int) -> int:
    """H = 3 for nine steps, then mini-batch SGD."""
    return 3 if step < 9 else 1


def _lengths(schedule: Callable[[int], int], steps: int) -> list[int]:
    lengths, t = [], 0
    while t < steps:
        lengths.append(schedule(t))
        t += lengths[-1]
    return lengths


def _scheduled(schedule: Callable[[int], int]) -> dict[str, Any]:
    """A row for a schedule of H that averages parameters throughout."""

    def run(x0: Any, gradients: Any, etas: Any, n: int, optimizer: Any, limit: Any = None) -> Any:
        return oracle.local_sgd(x0, gradients, etas, n, optimizer, _lengths(schedule, len(etas)), limit)

    def rounds(steps: int) -> int:
        ends = [sum(_lengths(schedule, steps)[: k + 1]) for k in range(len(_lengths(schedule, steps)))]
        return sum(end <= steps for end in ends)

    return {
        "strategy": lambda **kw: LocalSGDStrategy(schedule, average="parameters", **kw),
        "oracle": run,
        "rounds": rounds,
    }


def doubling(step: int) -> int:
    """Any function of the step is a schedule."""
    return 1 + step // 5


ROWS = [
    Case(
        "minibatch_sgd",
        lambda **kw: LocalSGDStrategy(1, **kw),
        oracle.minibatch_sgd,
        rounds=lambda steps: steps,
        diverges=False,
    ),
    Case(
        "parameter_averaging_every_step",
        lambda **kw: LocalSGDStrategy(1, average="parameters", **kw),
        lambda *a: oracle.local_sgd(*a[:5], [1] * 100, *a[5:]),
        rounds=lambda steps: steps,
        diverges=False,
    ),
    Case(
        "local_sgd",
        lambda **kw: LocalSGDStrategy(3, **kw),
        lambda *a: oracle.local_sgd(*a[:5], [3] * 100, *a[5:]),
        rounds=lambda steps: steps // 3,
    ),
    Case("local_sgd_linear_warmup", **_scheduled(LinearWarmup(4, steps=10))),
    Case("local_sgd_exponential_warmup", **_scheduled(ExponentialWarmup(4, steps=9))),
    Case("local_sgd_constant_warmup", **_scheduled(ConstantWarmup(4, steps=5))),
    Case("local_sgd_any_callable", **_scheduled(doubling)),
    Case(
        "local_sgd_back_to_gradients",
        lambda **kw: LocalSGDStrategy(back_to_gradients, **kw),
        lambda *a: oracle.local_then_minibatch(*a[:5], 9, 3, *a[5:]),
        rounds=lambda steps: 3 + (steps - 9) if steps > 9 else steps // 3,
    ),
    Case(
        "post_local_sgd",
        lambda **kw: LocalSGDStrategy(3, **kw),
        lambda *a: oracle.post_local_sgd(*a[:5], 7, 3, *a[5:]),
        rounds=lambda steps: 7 + (steps - 7) // 3,
        callbacks=lambda: [PostLocalSwitch(at=7)],
    ),
    Case(
        "post_local_sgd_at_first_lr_decay",  # which the battery's learning rates have at step 5
        lambda **kw: LocalSGDStrategy(8, **kw),
        lambda *a: oracle.post_local_sgd(*a[:5], 5, 2, *a[5:]),
        rounds=lambda steps: 5 + (steps - 5) // 2,
        callbacks=lambda: [PostLocalSwitch(sync_period=2)],
    ),
    Case(
        "hierarchical_local_sgd",
        lambda **kw: LocalSGDStrategy(2, block_size=2, block_period=3, **kw),
        lambda *a: oracle.hierarchical(*a[:5], 2, 2, 3, *a[5:]),
        rounds=lambda steps: steps // 2,
        sizes=(2, 4),
        refuses_one="does not divide",
    ),
    Case(
        "post_local_hierarchical",
        lambda **kw: LocalSGDStrategy(2, block_size=2, block_period=2, **kw),
        lambda *a: oracle.post_local_hierarchical(*a[:5], 5, 2, 2, 2, *a[5:]),
        rounds=lambda steps: 5 + (steps - 5) // 2,
        callbacks=lambda: [PostLocalSwitch(at=5)],
        sizes=(2, 4),
        refuses_one="does not divide",
    ),
    Case(
        "hierarchical_gradients_in_blocks",
        lambda **kw: LocalSGDStrategy(1, block_size=2, block_period=3, **kw),
        lambda *a: oracle.hierarchical_gradients(*a[:5], 2, 3, *a[5:]),
        rounds=lambda steps: steps,
        sizes=(2, 4),
        refuses_one="does not divide",
    ),
]
