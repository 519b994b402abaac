"""What aggregators ask of the optimizers that clients train with."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import SGD, Optimizer


def check_plain_sgd(optimizers: Sequence[Optimizer], reason: str, instead: str) -> None:
    """Raise a `ValueError` unless all are SGD without momentum.

    Args:
        optimizers: those of the module.
        reason: half a sentence, that says what the steps of SGD are needed for.
        instead: what takes any optimizer.
    """
    for optimizer in optimizers:
        plain = isinstance(optimizer, SGD) and not any(group["momentum"] for group in optimizer.param_groups)
        if not plain:
            what = f"the momentum of {type(optimizer).__name__}" if isinstance(optimizer, SGD) else type(optimizer).__name__
            raise ValueError(f"{reason}, which {what} would change: use `torch.optim.SGD(..., momentum=0)`, or {instead}.")
