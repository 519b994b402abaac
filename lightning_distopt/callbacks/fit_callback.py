"""What callbacks have in common that take part in fits alone."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl


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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`, if it is a fit that does."""
        if self.fitting:
            self.resume(state_dict)

    def resume(self, state_dict: dict[str, Any]) -> None:
        """Continue a fit from `state_dict`."""
