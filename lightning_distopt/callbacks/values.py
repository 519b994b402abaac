"""When and how callbacks log numbers, and how they write sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch


def is_logging_step(trainer: pl.Trainer, step: int) -> bool:
    """Return whether the Trainer logs after so many steps, at its `log_every_n_steps`."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(every) and step % every == 0


def log_doubles(pl_module: pl.LightningModule, values: Mapping[str, Any], **options: Any) -> None:
    """Log numbers as doubles: Lightning makes single-precision numbers of others, and bytes are many.

    Args:
        pl_module: through which they are logged.
        values: by name.
        **options: of `LightningModule.log_dict`. What is averaged over ranks is put on the module's device.
    """
    device = pl_module.device if options.get("sync_dist") and pl_module.device.type != "mps" else None
    exact = {name: torch.as_tensor(value, dtype=torch.float64, device=device) for name, value in values.items()}
    pl_module.log_dict(exact, **options)


def readable_size(number: float) -> str:
    """Return a number of bytes with three digits and a unit.

    Example:
        >>> readable_size(1_890_000)
        '1.89 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
