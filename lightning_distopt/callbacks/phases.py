"""Phases and stretches of training that callbacks act in, and how users write them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_distopt.options import is_number


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


class Stretch:
    """A stretch of training: up to a part of it, from a part of it on, or a phase.

    Example:
        >>> Stretch("ramp", "epoch:0-4", until=True).progress(step=30, total=100, steps_per_epoch=10)
        0.75
        >>> Stretch("fine_tune", "epoch:8-", until=False).first_step(total=100, steps_per_epoch=10)
        80
        >>> Stretch("ramp", "epoch:0-4", until=True).last_step(total=100, steps_per_epoch=10)
        40

    Args:
        option: what the user calls it.
        value: a part, above 0 and at most 1, or a phase in epochs or steps, see `parse_phases`.
        until: whether a part is where it ends, else where it begins; and whether a phase has to have an end.

    Raises:
        ValueError: for anything else.
    """

    def __init__(self, option: str, value: Any, until: bool) -> None:
        self.option, self.until = option, until
        self.value: float | Phase
        example = "'epoch:0-225'" if until else "'epoch:240-'"
        if isinstance(value, str):
            self.value = parse_phases(value)[0]
            good = self.value.kind != "lr_decay" and math.isfinite(self.value.end) == until
        else:
            good = is_number(value) and 0 < value <= 1
            self.value = float(value) if good else 0.0
        if not good:
            raise ValueError(
                f"`{option}` is a part of training, above 0 and at most 1, or a phase such as {example}; got {value!r}."
            )

    def check(self, total: float, steps_per_epoch: float) -> None:
        """Raise an error if the length of training, or of an epoch, is not known (inf), but needed."""
        if isinstance(self.value, Phase) and self.value.kind == "epoch" and math.isinf(steps_per_epoch):
            raise MisconfigurationException(
                f"`{self.option}` is given in epochs, and the data does not say how long one is: give it in steps, such as "
                f"{self.option}='{'step:0-5000' if self.until else 'step:5000-'}'."
            )
        if isinstance(self.value, float) and math.isinf(total):
            raise MisconfigurationException(
                f"`{self.option}={self.value}` is a part of training, whose length is not known: give a phase such as "
                f"{self.option}='{'step:0-5000' if self.until else 'step:5000-'}', or `max_epochs` to the Trainer."
            )

    def first_step(self, total: float, steps_per_epoch: float) -> float:
        """Return the number of optimizer steps after which it begins."""
        if isinstance(self.value, Phase):
            return self.value.start * (steps_per_epoch if self.value.kind == "epoch" else 1)
        return 0 if self.until else math.ceil(self.value * total - 1e-9)

    def last_step(self, total: float, steps_per_epoch: float) -> float:
        """Return the number of optimizer steps after which it ends, inf if it does not."""
        if isinstance(self.value, Phase):
            return self.value.end * (steps_per_epoch if self.value.kind == "epoch" else 1)
        return math.ceil(self.value * total - 1e-9) if self.until else math.inf

    def progress(self, step: int, total: float, steps_per_epoch: float) -> float:
        """Return how far it has come after `step` steps: below 0 before it, 1 at its end; epochs count when they are over."""
        start, end, now = 0.0, 1.0, step / total
        if isinstance(self.value, Phase):
            start, end = self.value.start, self.value.end
            now = step / steps_per_epoch // 1 if self.value.kind == "epoch" else step
        elif self.until:
            end = self.value
        else:
            start = self.value
        return now - start if math.isinf(end) or start == end else (now - start) / (end - start)
