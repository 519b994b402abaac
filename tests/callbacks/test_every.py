"""The moments that users write."""

from __future__ import annotations

import pytest

from lightning_distopt.callbacks.every import Every


@pytest.mark.parametrize(
    ("every", "kind", "expected"),
    [
        ("epoch", "epoch", [1, 2, 3, 4, 5, 6]),
        ("1 epoch", "epoch", [1, 2, 3, 4, 5, 6]),
        ("epochs", "epoch", [1, 2, 3, 4, 5, 6]),
        ("2 epochs", "epoch", [2, 4, 6]),
        ("2 epochs", "step", []),
        ("4 steps", "step", [4]),
        (["2 steps", "3 steps"], "step", [2, 3, 4, 6]),
        (("start", "5 steps", "epoch"), "step", [5]),
    ],
)
def test_periods(every, kind, expected):
    moments = Every(every)
    assert [now for now in range(1, 7) if moments.due(kind, now - 1, now)] == expected


def test_counts_that_jump():
    """As global steps do where a batch has several optimizer steps."""
    assert Every("4 steps").due("step", 3, 6)
    assert Every("4 steps").due("step", 3, 9)
    assert not Every("4 steps").due("step", 4, 7)
    assert not Every("4 steps").due("step", 4, 4)


def test_moments_that_come_once():
    every = Every(["start", "lr_decay", "2 epochs"])
    assert [moment in every for moment in ("start", "end", "validation", "lr_decay", "2 epochs")] == [
        True,
        False,
        False,
        True,
        False,
    ]
    assert every.moments == ["start", "lr_decay", "2 epochs"]


@pytest.mark.parametrize(
    "wrong", ["0 epochs", "00 steps", "", "5", "-1 steps", "1.5 epochs", "Epoch", 5, None, ["epoch", 3], "end "]
)
def test_anything_else(wrong):
    with pytest.raises(ValueError, match=r"`every` does not understand .*: use 'start', 'end', 'epoch'"):
        Every(wrong)


def test_nothing():
    with pytest.raises(ValueError, match="`every` is empty"):
        Every([])
