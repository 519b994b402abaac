"""What `DynamicPruning` notes, logs and draws."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_distopt.callbacks.sparsity_figure import draw_sparsity
from lightning_distopt.callbacks.values import log_doubles
from lightning_distopt.figures import lacking
from lightning_distopt.sparsity.macs import MacCounter, count_parameters, sparse_macs
from lightning_distopt.sparsity.pruner import Pruner
from lightning_distopt.sparsity.statistics import SparsityHistory, pruning_error

Path = str | os.PathLike[str]


class PruningLog:
    """The record of a fit with pruning.

    Args:
        pruner: the masks.
        figure: the file for the picture, or None: `sparsity.png` in the log folder, if there is a logger.

    Attributes:
        history: of the mask updates.
        macs: multiply-accumulates of the dense layers for one sample, by name; None until the first forward pass.
    """

    def __init__(self, pruner: Pruner, figure: Path | None) -> None:
        self.pruner, self.figure = pruner, figure
        self.history = SparsityHistory({name: w.numel() for name, w in zip(pruner.layers, pruner.weights, strict=True)})
        self.macs: dict[str, float] | None = None
        self._counter: MacCounter | None = None
        self._samples = 0
        self._path: Path | None = None

    # ------------------------------------------------------------------------------------------------------------ costs
    def start_counting(self, module: pl.LightningModule, batch: Any) -> None:
        """Count multiply-accumulates from here on, at the first batch."""
        if self.macs is None and self._counter is None:
            with suppress(MisconfigurationException):  # of a batch that does not say how many samples it has
                self._samples = extract_batch_size(batch)
                self._counter = MacCounter(module).__enter__()

    def stop_counting(self) -> None:
        """End that, after a forward pass."""
        if self._counter is not None:
            self._counter.__exit__()
            self.macs = {name: count / self._samples for name, count in self._counter.macs.items()}
            self._counter = None

    # ---------------------------------------------------------------------------------------------------------- logging
    def note(self, step: int) -> None:
        """Note the mask update that has just been."""
        self.history.add(step, self.pruner.regrown, self.pruner.killed)

    def log(self, module: pl.LightningModule, logs: Sequence[PruningLog]) -> None:
        """Log the sparsity of each layer; of all `logs` together, if there are any, the last changes and what is left."""
        values = {f"sparsity/{name}": n / self.history.sizes[name] for name, n in self.pruner.pruned.items()}
        if logs:
            values |= self._totals(module, logs)
        log_doubles(module, values, on_step=True, on_epoch=False)

    def _totals(self, module: pl.LightningModule, logs: Sequence[PruningLog]) -> dict[str, float]:
        pruners = [log.pruner for log in logs]
        sizes = {name: n for log in logs for name, n in log.history.sizes.items()}
        zeros = {name: n for pruner in pruners for name, n in pruner.zeros.items()}
        weights = [w for pruner in pruners for w in pruner.weights]
        masks = [mask for pruner in pruners for mask in pruner.masks]
        values = {
            "sparsity": sum(n for pruner in pruners for n in pruner.pruned.values()) / sum(sizes.values()),
            "sparsity/regrown": sum(n for pruner in pruners for n in pruner.regrown.values()),
            "sparsity/killed": sum(n for pruner in pruners for n in pruner.killed.values()),
            "sparsity/parameters": count_parameters(module, sum(zeros.values())),
            "sparsity/delta": pruning_error(weights, masks),
        }
        if self.macs is not None:
            values["sparsity/macs"] = sparse_macs(self.macs, {name: 1 - n / sizes[name] for name, n in zeros.items()})
        return values

    # ---------------------------------------------------------------------------------------------------------- picture
    def find_path(self, trainer: pl.Trainer, sums: bool) -> None:
        """Settle where the picture is written; the log folder is for one that sums up all logs. Collective."""
        folder = trainer.log_dir or trainer.default_root_dir
        self._path = self.figure
        if self.figure is None and sums and trainer.loggers:
            self._path = os.path.join(folder, "sparsity.png")
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            self._path = None

    def draw(self, logs: Sequence[PruningLog]) -> None:
        """Write the picture, of the layers of all `logs`, or of its own if there are none."""
        history = SparsityHistory.joined([log.history for log in logs or [self]])
        if self._path is None or not history.steps:
            return
        os.makedirs(os.path.dirname(os.path.abspath(self._path)), exist_ok=True)
        try:
            draw_sparsity(history, self._path)
        except ModuleNotFoundError as error:
            rank_zero_info(lacking(error, "DynamicPruning draws no picture"))

    # ------------------------------------------------------------------------------------------------------- checkpoint
    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs to go on."""
        return {"history": self.history.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.history.load_state_dict(state["history"])
