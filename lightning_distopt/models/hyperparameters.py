"""The hyperparameters that a module has in its checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any


def keep_hyperparameters(module: Any, ignore: Sequence[str] = ()) -> None:
    """Save the arguments of the constructor that calls this, but for objects that a checkpoint can't describe.

    If LightningCLI makes the module, they are its configuration, which describes objects too.

    Example:
        >>> from lightning import LightningModule
        >>> class Net(LightningModule):
        ...     def __init__(self, network, lr=0.1):
        ...         super().__init__()
        ...         keep_hyperparameters(self, ignore=["network"])
        >>> dict(Net(object()).hparams)
        {'lr': 0.1}

    Args:
        module: a `LightningModule` under construction.
        ignore: names of arguments.
    """
    frame: Any = inspect.currentframe()
    module.save_hyperparameters(ignore=list(ignore), frame=frame.f_back)
    if "_instantiator" in module.hparams:
        module.save_hyperparameters(frame=frame.f_back)
