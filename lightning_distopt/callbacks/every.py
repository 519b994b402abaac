"""When a probe measures, as users write it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_EVERY = re.compile(r"(?:(\d+) )?(epoch|step)s?")
_ONCE = ("start", "end", "validation", "lr_decay")


class Every:
    """Moments of training: "start", "end", "epoch", "5 epochs", "100 steps", "validation", "lr_decay", or several of them.

    Example:
        >>> every = Every(["start", "2 epochs"])
        >>> "start" in every, every.due("epoch", 1, 2), every.due("epoch", 2, 3)
        (True, True, False)

    Args:
        every: one moment or a list of them.

    Raises:
        ValueError: for anything else.
    """

    def __init__(self, every: str | Sequence[str]) -> None:
        self.moments = list(every) if isinstance(every, Sequence) and not isinstance(every, str) else [every]
        self._periods: list[tuple[str, int]] = []
        self._once: set[str] = set()
        for moment in self.moments:
            match = _EVERY.fullmatch(moment) if isinstance(moment, str) else None
            if match is not None and int(match[1] or 1) > 0:
                self._periods.append((match[2], int(match[1] or 1)))
            elif isinstance(moment, str) and moment in _ONCE:
                self._once.add(moment)
            else:
                raise ValueError(
                    f"`every` does not understand {moment!r}: use 'start', 'end', 'epoch', '5 epochs', '100 steps', "
                    "'validation', 'lr_decay', or a list of these."
                )
        if not self.moments:
            raise ValueError("`every` is empty, so nothing would be measured: name a moment, such as 'epoch'.")

    def __contains__(self, moment: Any) -> bool:
        return moment in self._once

    def due(self, kind: str, before: int, now: int) -> bool:
        """Return whether a period of epochs or steps has ended between two counts."""
        return any(now // period > before // period for of, period in self._periods if of == kind)
