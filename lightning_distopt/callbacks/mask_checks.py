"""What layers with masks can't be combined with, whoever has put them there, is refused before training starts."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_distopt.callbacks.everywhere import shards_weights
from lightning_distopt.strategies.checks import lightning_callbacks


def check_masks(trainer: pl.Trainer, name: str) -> None:
    """Refuse strategies and callbacks of Lightning that layers with masks can't have.

    Args:
        trainer: which is about to fit.
        name: of the callback that makes the masks.

    Raises:
        MisconfigurationException: for one of them.
    """
    if shards_weights(trainer.strategy):
        raise MisconfigurationException(
            f"{name} needs whole layers on every device, but {type(trainer.strategy).__name__} divides them: use `ddp`, a "
            "strategy of this package, or a single device."
        )
    averaging = "averages copies of the module that have no masks"
    kinds = {"WeightAveraging": averaging, "StochasticWeightAveraging": averaging, "ModelPruning": "prunes as well"}
    for kind, why in kinds.items():
        for callback in lightning_callbacks(trainer, kind):
            raise MisconfigurationException(f"The callback {type(callback).__name__} {why}: use it, or {name}, and not both.")
