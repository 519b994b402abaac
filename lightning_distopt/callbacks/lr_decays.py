"""Decays of the learning rate, by which callbacks divide training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl


class LearningRateDecays:
    """Counts decays of the learning rate: it is at most half of the largest one since the last decay.

    So warm-up never counts, and small steps count once they have halved the rate: with milestones each one that divides by two
    or more is a decay, with a cosine the first comes about half way. Of several parameter groups the largest rate counts.

    Example:
        >>> from types import SimpleNamespace
        >>> decays, group = LearningRateDecays(), {}
        >>> trainer = SimpleNamespace(optimizers=[SimpleNamespace(param_groups=[group])])
        >>> [group.update(lr=lr) or decays.see(trainer) for lr in (0.05, 0.1, 0.06, 0.05, 0.03, 0.01)]
        [False, False, False, True, False, True]

    Attributes:
        count: decays so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._largest = 0.0

    def see(self, trainer: pl.Trainer) -> bool:
        """Return whether the learning rate has decayed since the last call; to be called when a batch starts."""
        lr = max((float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups), default=0.0)
        decayed = 2 * lr <= self._largest and lr < self._largest
        self._largest = lr if decayed else max(lr, self._largest)
        self.count += decayed
        return decayed

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs to go on."""
        return {"count": self.count, "largest": self._largest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.count, self._largest = int(state["count"]), float(state["largest"])
