"""What algorithms share that own the momentum, and take learning rate and weight decay from the user's optimizer."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import SGD, Optimizer


def check_plain_sgd(optimizers: Sequence[Optimizer], by: str) -> None:
    """Raise a `ValueError` unless all are SGD without momentum."""
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if not isinstance(optimizer, SGD):
            raise ValueError(
                f"{by} takes the place of SGD's momentum, and {name} is another method: use `torch.optim.SGD(..., momentum=0)`"
                ", or DSGD, which mixes the steps of any optimizer."
            )
        if any(group.get("momentum", 0) for group in optimizer.param_groups):
            raise ValueError(
                f"{by} has a momentum of its own, beside which that of {name} would act a second time: use `momentum=0` in the "
                f"optimizer, and `{by}(beta=...)`."
            )
