"""Stretches of training that users give as a part of it, in epochs or in steps."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_distopt.callbacks.phases import Phase, parse_phases
from lightning_distopt.options import is_number


class Stretch:
    """A stretch of training: up to a part of it, from a part of it on, or a phase.

    Example:
        >>> Stretch("ramp", "epoch:0-4", until=True).progress(step=30, total=100, steps_per_epoch=10)
        0.75
        >>> Stretch("fine_tune", "epoch:8-", until=False).first_step(total=100, steps_per_epoch=10)
        80

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
