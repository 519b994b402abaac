"""Learning rates over training, and how long that is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["training_steps", "warm_up", "with_schedule"]


def training_steps(trainer: Any) -> float:
    """Return the optimizer steps of training, inf if they are unknown: Lightning says -1 where the data has no length."""
    steps = float(trainer.estimated_stepping_batches)
    return steps if steps >= 0 else math.inf


def warm_up(steps: int, then: Callable[[int], float]) -> Callable[[int], float]:
    """Return the factor of the learning rate that grows linearly for some steps, and then is another one.

    Example:
        >>> [warm_up(2, lambda step: 1.0)(step) for step in range(4)]
        [0.5, 1.0, 1.0, 1.0]
    """
    # f(t) = (t + 1) / w while t < w
    return lambda step: (step + 1) / steps if step < steps else then(step)


def with_schedule(optimizer: Optimizer, factor: Callable[[int], float]) -> Any:
    """Return what `configure_optimizers` returns for a learning rate that is multiplied by the factor of each step."""
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}
