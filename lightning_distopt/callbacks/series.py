"""Probes with a history that is worth a file: it is written once, when training ends."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lightning_distopt.analysis.history import History
from lightning_distopt.analysis.result import Result, Results
from lightning_distopt.callbacks.probe import Probe

R = TypeVar("R", bound="Result | Results[Any]")


class SeriesProbe(Probe[R]):
    """Base of probes that write their whole history once training ends, and, unless they say so, no result by itself."""

    series_label: ClassVar[str] = ""
    """Of the history's files, where results have files as well."""

    def series(self) -> History:
        """Return all that has been measured."""
        names = [name for name in dict.fromkeys(key for entry in self.history for key in entry) if name not in _PLACE]
        values = {name: [entry.get(name, float("nan")) for entry in self.history] for name in names}
        return History(np.array([entry["step"] for entry in self.history]), values)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the history."""
        super().on_train_end(trainer, pl_module)
        self._write_series(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write what there is by now."""
        super().on_exception(trainer, pl_module, exception)
        try:
            self._write_series(trainer)
        except OSError as error:  # the first one is what counts, and others have to clean up as well
            rank_zero_warn(f"{type(self).__name__} can't write its history: {error}")

    def _write(self, trainer: pl.Trainer, result: Result | Results[Any]) -> None:
        """Write nothing for a single measurement."""

    def _write_series(self, trainer: pl.Trainer) -> None:
        if self._folder is None or not self.history:  # as before training starts
            return
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save(trainer, self.series(), self.series_label)


_PLACE = ("step", "epoch")
