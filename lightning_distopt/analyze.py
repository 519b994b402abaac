"""`lightning-distopt analyze`: curvature, landscapes and paths of trained models, from a configuration and checkpoints."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from jsonargparse import SUPPRESS
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from lightning_distopt import cli
from lightning_distopt.analyzer import ANALYSES, Analyzer

__all__ = ["main"]

_FIXED: dict[str, Any] = {
    "strategy": "auto",  # any strategy trains the same module, and a checkpoint holds the average of replicas
    "logger": False,
    "callbacks": None,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "fast_dev_run": False,
    "barebones": False,
    "overfit_batches": 0.0,
    "max_time": None,
    "min_epochs": None,
    "min_steps": None,
    "num_sanity_val_steps": 0,
    "gradient_clip_val": None,
    "accumulate_grad_batches": 1,
    "profiler": None,
    "detect_anomaly": False,
}
"""Options of the `Trainer` that are about training; the others, such as devices and precision, are the user's."""


def measured(
    ckpt: list[str] | None = None,
    output: str = "outputs/analyze",
    on: Literal["train", "val", "both"] = "train",
    samples: int | None = 2048,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    parameters: list[str] | None = None,
    seed: int = 0,
    check: bool = True,
    progress: bool = True,
) -> None:
    """Say what is measured.

    Args:
        ckpt: Checkpoints of the model, one or several: `--ckpt a.ckpt b.ckpt`.
        output: Folder of what is written: `.npz`, `.json` and `.png`.
        on: Data that the loss is measured on.
        samples: How many are drawn from each data; null for all.
        loss_fn: Import path of `loss_fn(module, batch)`, the mean loss of a batch. By default what `training_step` returns.
        parameters: Patterns of the names of the parameters that count, such as `[layer1.*]`. By default all.
        seed: Of all that is drawn.
        check: Whether to refuse data and losses that are not the same twice.
        progress: Whether to show bars.
    """


class _Parser(cli._Parser):
    commands: Mapping[str, Callable[..., Any]] = {}


class _CLI(cli._CLI):
    prog, parser_type = "lightning-distopt analyze", _Parser

    def __init__(self, args: ArgsType) -> None:
        super().__init__(args, trainer_class=Analyzer, save_config_callback=None)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: {"model", "datamodule"} for name in ANALYSES}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_function_arguments(measured, as_group=False)
        for name in set(inspect.signature(pl.Trainer.fit).parameters) - {
            "self",
            "model",
            "train_dataloaders",
            "val_dataloaders",
            "datamodule",
        }:
            parser.add_argument(f"--{name}", type=Any, default=None, help=SUPPRESS)  # of a configuration that `fit` has saved

    def before_instantiate_classes(self) -> None:
        if not self._get(self.config, "ckpt"):
            raise ValueError("There is nothing to analyse: give one checkpoint or several, `--ckpt a.ckpt b.ckpt`.")
        trainer = self.config[self.config.subcommand].trainer
        for name in _FIXED.keys() & vars(trainer).keys():
            trainer[name] = _FIXED[name]

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        assert isinstance(trainer, Analyzer)
        trainer.measured = {name: self._get(self.config_init, name) for name in inspect.signature(measured).parameters}
        return trainer


def main(args: Sequence[str]) -> None:
    """Run `lightning-distopt analyze`.

    Example:
        >>> main(["hessian", "--config", "config.yaml", "--ckpt", "last.ckpt"])  # doctest: +SKIP

    Args:
        args: what follows after `analyze`.

    Raises:
        SystemExit: with status 2 after a mistake in the arguments, which one sentence on stderr describes.
    """
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with cli._mistakes_in_one_sentence():
            _CLI(_with_lists(args) or ["--help"])
    finally:
        logger.setLevel(level)


def _with_lists(args: Sequence[str]) -> list[str]:
    """Let `--ckpt a b` be a list."""
    words, found = list(args), list[str]()
    while words:
        word = words.pop(0)
        if word == "--ckpt" and not (words and words[0].startswith("[")):
            paths = []
            while words and not words[0].startswith("-"):
                paths.append(words.pop(0))
            word = f"--ckpt={json.dumps(paths)}"
        found.append(word)
    return found
