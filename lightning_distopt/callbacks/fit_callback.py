"""What callbacks have in common that take part in fits alone."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn


class FitCallback(pl.Callback):
    """Base of callbacks whose state belongs to a fit.

    Lightning hands the state in a checkpoint to all callbacks, also in `validate(ckpt_path=...)`, where there is no fit that
    could go on with it. Subclasses implement `setup_fit` and `resume` in place of `setup` and `load_state_dict`.
    """

    fitting = True
    """Whether it is a fit that was set up last, if anything was."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prepare for a fit, if it is one that starts."""
        self.fitting = stage == "fit"
        if self.fitting:
            self.setup_fit(trainer, pl_module)

    def setup_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what can't be, and begin anew."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn if there was nothing to train on, where Lightning calls no other hook."""
        if not trainer.num_training_batches or not trainer.limit_train_batches:
            rank_zero_warn(
                f"{type(self).__name__}: training had no batches, so there was nothing for it to do. Is the training set "
                "empty, or `limit_train_batches` too small?"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`, if it is a fit that does."""
        if self.fitting:
            self.resume(state_dict)

    def resume(self, state_dict: dict[str, Any]) -> None:
        """Continue a fit from `state_dict`."""
