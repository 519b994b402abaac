"""Phases of training that a callback is active in, and how they are written."""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class Phase(NamedTuple):
    """A stretch of training, in epochs, steps or decays of the learning rate.

    Attributes:
        name: as the user wrote it.
        kind: what is counted: "epoch" and "step" from 0 on, "lr_decay" from 1 on, which is the phase up to the first decay.
        start: the first that belongs to it.
        end: the first that does not belong to it any more.
    """

    name: str
    kind: str
    start: float
    end: float


def parse_phases(phases: Any) -> list[Phase]:
    """Read phases from a string or a list of them.

    Example:
        >>> parse_phases(["epoch:0-5", "step:1000-"])[1]
        Phase(name='step:1000-', kind='step', start=1000, end=inf)
        >>> parse_phases("lr_decay:1")
        [Phase(name='lr_decay:1', kind='lr_decay', start=1, end=2)]

    Args:
        phases: such as "epoch:0-5" (0 to 4), "step:1000-" (without an end), "lr_decay:1" (this one alone).

    Returns:
        One for each, in the same order.

    Raises:
        ValueError: for anything else.
    """
    parsed = []
    for name in list(phases) if isinstance(phases, list | tuple) else [phases]:
        kind, _, bounds = str(name).partition(":")
        first, dash, last = bounds.partition("-")
        known = kind in ("epoch", "step", "lr_decay") and first.isdigit() and (last.isdigit() or not last)
        start = int(first) if known else 0
        end = (int(last) if last else math.inf if dash else start + 1) if known else 0
        if not known or end <= start or (kind == "lr_decay" and start < 1):
            raise ValueError(
                f"`phases` does not understand {name!r}: use 'epoch:0-5' (epochs 0 to 4), 'step:1000-' (from step 1000 on), "
                "'lr_decay:1' (up to the first decay of the learning rate), or a list of these."
            )
        parsed.append(Phase(str(name), kind, start, end))
    if not parsed:
        raise ValueError("`phases` is empty, so there would be none: name one, or leave it out for all of training.")
    return parsed
