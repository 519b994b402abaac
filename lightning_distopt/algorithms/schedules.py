r"""Schedules of `H`, the number of optimizer steps between rounds.

A schedule is any callable that maps the step at which a round starts (counted from 0) to `H >= 1`; a number stays what it
is. Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, chapter 2 (eq. 2.2,
post-local SGD) and appendix 11 (warm-up of local steps).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from lightning_distopt.options import is_whole


def period_at(schedule: int | Callable[[int], int], step: int) -> int:
    """Return `H` for a round that starts at `step`.

    Raises:
        ValueError: if the schedule does not give a whole number of at least 1.
    """
    period = schedule(step) if callable(schedule) else schedule
    number = isinstance(period, Real) and not isinstance(period, bool) and math.isfinite(period)
    if not number or period != int(period) or period < 1:
        raise ValueError(f"`sync_period` must be a whole number of steps, at least 1, but at step {step} it is {period!r}.")
    return int(period)


def check_schedule(schedule: Any) -> None:
    """Raise a `ValueError` with a clear sentence unless `schedule` is a number `H >= 1` or a callable of the step."""
    if not callable(schedule) and not is_whole(schedule, least=1):
        raise ValueError(
            f"`sync_period` must be a whole number of steps, at least 1, or a callable that maps a step to one; "
            f"got {schedule!r}."
        )
    if callable(schedule):
        period_at(schedule, 0)


class SyncPeriod:
    """Base of the schedules in this module, for type hints and YAML (`class_path: lightning_distopt.LinearWarmup`).

    Example:
        >>> class Root(SyncPeriod):
        ...     def __call__(self, step: int) -> int:
        ...         return 1 + int(step**0.5)
        >>> Root()(100)
        11
    """

    def __call__(self, step: int) -> int:
        """Return `H` for a round that starts at `step`."""
        raise NotImplementedError

    def before(self, step: int) -> bool:
        """Return whether `step` is in the first phase of post-local SGD, in which there are no blocks."""
        return False


class _Warmup(SyncPeriod):
    def __init__(self, sync_period: int, steps: int) -> None:
        if callable(sync_period):
            raise ValueError(f"The `sync_period` that a warm-up of H ends at must be a number; got {sync_period!r}.")
        check_schedule(sync_period)
        if not is_whole(steps, least=1):
            raise ValueError(f"A warm-up of H takes a whole number of steps, at least one step; got steps={steps!r}.")
        self.sync_period: int = int(sync_period)
        self.steps: int = int(steps)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(sync_period={self.sync_period}, steps={self.steps})"


class ConstantWarmup(_Warmup):
    r"""One step between rounds for a while, then `H`: the two phases of post-local SGD (algorithm 8).

    $$ H_t = 1 \text{ if } t < T', \quad H \text{ otherwise} $$

    Example:
        >>> schedule = ConstantWarmup(sync_period=8, steps=100)
        >>> [schedule(t) for t in (0, 99, 100)]
        [1, 1, 8]

    Args:
        sync_period: `H` after the warm-up.
        steps: `T'`, the length of the warm-up in optimizer steps.

    Raises:
        ValueError: if one of the two is no whole number of at least 1.
    """

    def __call__(self, step: int) -> int:
        """Return `H` for a round that starts at `step`."""
        return 1 if self.before(step) else self.sync_period

    def before(self, step: int) -> bool:
        """Return whether `step` is in the first phase."""
        return step < self.steps


class LinearWarmup(_Warmup):
    r"""`H` grows linearly from 1.

    $$ H_t = 1 + \lfloor (H - 1) \, t / T' \rfloor \text{ for } t < T' $$

    Example:
        >>> schedule = LinearWarmup(sync_period=5, steps=100)
        >>> [schedule(t) for t in (0, 24, 25, 50, 99, 100)]
        [1, 1, 2, 3, 4, 5]

    Args:
        sync_period: `H` after the warm-up.
        steps: `T'`, the length of the warm-up in optimizer steps.

    Raises:
        ValueError: if one of the two is no whole number of at least 1.
    """

    def __call__(self, step: int) -> int:
        """Return `H` for a round that starts at `step`."""
        return 1 + (self.sync_period - 1) * min(step, self.steps) // self.steps


class ExponentialWarmup(_Warmup):
    r"""`H` doubles from 1 in equal stages: 1, 2, 4, ..., `H`.

    $$ H_t = 2^{\lfloor S t / T' \rfloor} \text{ for } t < T', \quad S = \lceil \log_2 H \rceil $$

    Example:
        >>> schedule = ExponentialWarmup(sync_period=8, steps=300)
        >>> [schedule(t) for t in (0, 100, 200, 300)]
        [1, 2, 4, 8]

    Args:
        sync_period: `H` after the warm-up.
        steps: `T'`, the length of the warm-up in optimizer steps.

    Raises:
        ValueError: if one of the two is no whole number of at least 1.
    """

    def __call__(self, step: int) -> int:
        """Return `H` for a round that starts at `step`."""
        stages = math.ceil(math.log2(self.sync_period))
        return self.sync_period if step >= self.steps else 2 ** (stages * step // self.steps)


class SwitchedPeriod(SyncPeriod):
    r"""One step between rounds until a switch whose time may still be unknown, then `H`.

    Example:
        >>> schedule = SwitchedPeriod(8)
        >>> schedule(1000)
        1
        >>> schedule.steps = 500
        >>> schedule(499), schedule(500)
        (1, 8)

    Args:
        sync_period: `H` after the switch, a number or a callable of the step.
        steps: the switch, in optimizer steps; None: not yet.

    Raises:
        ValueError: if `sync_period` is neither a callable nor a whole number of at least 1.
    """

    def __init__(self, sync_period: int | Callable[[int], int], steps: int | None = None) -> None:
        check_schedule(sync_period)
        self.sync_period, self.steps = sync_period, steps

    def __repr__(self) -> str:
        return f"SwitchedPeriod({self.sync_period!r})"

    def __call__(self, step: int) -> int:
        """Return `H` for a round that starts at `step`."""
        return 1 if self.before(step) else period_at(self.sync_period, step)

    def before(self, step: int) -> bool:
        """Return whether `step` is before the switch."""
        return self.steps is None or step < self.steps
