"""Schedules of H: whole numbers from 1 to H, never falling, and clear sentences for what is none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from lightning_distopt import ConstantWarmup, ExponentialWarmup, LinearWarmup, SyncPeriod
from lightning_distopt.algorithms.schedules import SwitchedPeriod, check_schedule, period_at

WARMUPS = [ConstantWarmup, LinearWarmup, ExponentialWarmup]
SENTENCE = "must be a whole number of steps, at least 1"


@pytest.mark.parametrize("kind", WARMUPS)
@pytest.mark.parametrize("sync_period", [1, 2, 3, 5, 7, 8, 16, 31, 32, 33, 64, 100, 1024, 2**31])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 97])
def test_properties(kind: Any, sync_period: int, steps: int) -> None:
    schedule = kind(sync_period, steps)
    periods = [schedule(step) for step in range(steps + 5)]
    assert all(type(period) is int for period in periods)
    assert periods[0] == 1
    assert all(1 <= period <= sync_period for period in periods)
    assert periods == sorted(periods)
    assert periods[steps:] == [sync_period] * 5
    assert schedule(10**12) == sync_period
    assert [period_at(schedule, step) for step in range(steps)] == periods[:steps]
    assert isinstance(schedule, SyncPeriod)


@pytest.mark.parametrize("sync_period", [2, 8, 64, 2**20])
def test_exponential_warmup_has_stages_of_equal_length(sync_period: int) -> None:
    stages = int(math.log2(sync_period))
    schedule = ExponentialWarmup(sync_period, 10 * stages)
    periods = [schedule(step) for step in range(10 * stages + 10)]
    assert periods == [2**k for k in range(stages + 1) for _ in range(10)]


def test_linear_warmup_is_linear() -> None:
    schedule = LinearWarmup(11, 100)
    for step in range(101):
        assert schedule(step) == 1 + math.floor(10 * step / 100 + 1e-9)


def test_constant_warmup_has_two_phases() -> None:
    assert [ConstantWarmup(8, 3)(step) for step in range(5)] == [1, 1, 1, 8, 8]


@pytest.mark.parametrize("kind", WARMUPS)
def test_warmups_refuse_what_they_cannot_use(kind: Any) -> None:
    for wrong in (0, -1, 1.5, "8", None, True, float("nan")):
        with pytest.raises(ValueError, match=SENTENCE):
            kind(wrong, 10)
    for steps in (0, -5):
        with pytest.raises(ValueError, match="at least one step"):
            kind(8, steps)
    for steps in ("10", None, 2.5, True):
        with pytest.raises((ValueError, TypeError), match="step"):
            kind(8, steps)


@pytest.mark.parametrize("kind", WARMUPS)
def test_warmups_refuse_a_schedule_for_their_end(kind: Any) -> None:
    """At construction, and not in the middle of training when the warm-up ends."""
    with pytest.raises(ValueError, match="sync_period"):
        kind(lambda step: 4, 10)


@pytest.mark.parametrize("kind", WARMUPS)
def test_warmups_show_their_options(kind: Any) -> None:
    """Ranks compare what options their strategies have by how these look."""
    assert repr(kind(8, 10)) == f"{kind.__name__}(sync_period=8, steps=10)"
    assert repr(kind(8, 10)) != repr(kind(8, 11))


@pytest.mark.parametrize("wrong", [0, -3, 2.5, True, False, None, "8", [8], float("inf"), float("nan"), np.float64(2.5)])
def test_what_is_no_period_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=SENTENCE) as caught:
        check_schedule(wrong)
    assert repr(wrong) in str(caught.value)


@pytest.mark.parametrize("wrong", [0, -3, 2.5, True, None, "8", float("inf"), float("-inf"), float("nan")])
def test_what_a_schedule_must_not_return(wrong: Any) -> None:
    with pytest.raises(ValueError, match=SENTENCE):
        check_schedule(lambda step: wrong)
    with pytest.raises(ValueError, match="at step 7"):
        period_at(lambda step: wrong if step == 7 else 2, 7)


@pytest.mark.parametrize("period", [1, 4, 4.0, np.int64(4), np.float64(4.0), np.int32(1)])
def test_what_a_schedule_may_return(period: Any) -> None:
    """Schedules are often computed with NumPy."""
    check_schedule(lambda step: period)
    found = period_at(lambda step: period, 3)
    assert found == period
    assert type(found) is int


def test_a_number_of_numpy_is_a_number() -> None:
    check_schedule(np.int64(4))
    assert period_at(np.int64(4), 0) == 4


def test_an_error_inside_of_a_schedule_is_not_hidden() -> None:
    def broken(step: int) -> int:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        check_schedule(broken)


def test_schedules_are_asked_for_the_step() -> None:
    asked = []

    def schedule(step: int) -> int:
        asked.append(step)
        return 3

    assert period_at(schedule, 17) == 3
    assert asked == [17]


def test_switch() -> None:
    schedule = SwitchedPeriod(LinearWarmup(5, 10))
    assert [schedule(step) for step in (0, 5, 100)] == [1, 1, 1]
    schedule.steps = 5
    assert [schedule(step) for step in (4, 5, 10)] == [1, 3, 5]
    with pytest.raises(ValueError, match=SENTENCE):
        SwitchedPeriod(0)
