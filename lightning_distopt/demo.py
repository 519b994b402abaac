"""`lightning-distopt demo`: four ways to train the same network with several replicas, and what each of them sends."""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment

from lightning_distopt.__about__ import __version__
from lightning_distopt.algorithms.consensus import squared_distances
from lightning_distopt.callbacks import PostLocalSwitch
from lightning_distopt.data import DeformedDigitsDataModule
from lightning_distopt.figures import BLACK, BLUE, GREEN, ORANGE, lacking, tidy
from lightning_distopt.models import ImageClassifier, build_model
from lightning_distopt.strategies import LocalSGDStrategy

__all__ = ["demo"]

_BASE_LR = 0.1  # of one replica with batches of 32
_LOGGERS = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]


@dataclass(frozen=True)
class _Method:
    name: str
    options: dict[str, Any]
    color: str
    dashes: str = "-"
    switch: bool = False  # whether the options hold from the first decay of the learning rate only
    result: dict[str, Any] = field(default_factory=dict)


def _methods() -> list[_Method]:
    return [
        _Method("mini-batch SGD", {"sync_period": 1}, BLACK, "--"),
        _Method("local SGD, H=8", {"sync_period": 8}, BLUE),
        _Method("post-local SGD, H=1 then 16", {"sync_period": 16}, ORANGE, switch=True),
        _Method("hierarchical, H=4, 2 blocks", {"sync_period": 4, "block_period": 4}, GREEN),
    ]


def demo(
    quick: bool = False,
    output: str = "outputs/demo",
    epochs: int | None = None,
    replicas: int = 4,
    batch_size: int = 32,
    num_train: int | None = None,
    num_test: int | None = None,
    seed: int = 0,
    start_method: Literal["fork", "spawn"] | None = None,
) -> list[dict[str, Any]]:
    """Train ResNet-8 on deformed digits in four ways, and compare accuracy with what was sent.

    Mini-batch SGD, local SGD, post-local SGD and hierarchical local SGD train the same network from the same start on
    the same number of samples, each with several replicas in processes of their own on the CPU. Prints a table and
    writes `demo.png` and `demo.json`. All share one recipe: learning rate in proportion to the global batch, warm-up
    in the first epoch, division by 10 after a half and three quarters of the epochs, momentum 0.9.

    Example:
        >>> results = demo(quick=True)  # doctest: +SKIP

    Args:
        quick: Less data and fewer epochs: done within a minute, but far from the final accuracy.
        output: Folder of the figure and of the numbers.
        epochs: Passes over the training images, at least 2. By default 6, or 4 if quick.
        replicas: Replicas, each a process; an even number, at least 4.
        batch_size: Images in a replica's batch.
        num_train: Training images, at most 50,000. By default 20,480, or 4,096 if quick.
        num_test: Test images, at most 10,000. By default 10,000, or 2,000 if quick.
        seed: Seed of the network's start and of the order of images.
        start_method: How processes start. By default "fork" on Linux, "spawn" elsewhere.

    Returns:
        The results of each method, as `demo.json` holds them.

    Raises:
        ValueError: If a number is out of its range.
    """
    epochs = epochs if epochs is not None else 4 if quick else 6
    num_train = num_train if num_train is not None else 4_096 if quick else 20_480
    num_test = num_test if num_test is not None else 2_000 if quick else 10_000
    if replicas < 4 or replicas % 2:
        raise ValueError(f"--replicas must be an even number, at least 4, to form two blocks; got {replicas}.")
    if epochs < 2:
        raise ValueError(f"--epochs must be at least 2, for a decay of the learning rate; got {epochs}.")
    if batch_size < 1 or num_train < replicas * batch_size or num_test < 1:
        raise ValueError("There must be at least one test image, and one training batch for every replica.")
    # A process that has run on several threads can't be forked safely, and on macOS no process that uses its libraries.
    start_method = start_method or ("fork" if sys.platform == "linux" else "spawn")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    data = DeformedDigitsDataModule(batch_size, num_train=num_train, num_test=num_test)
    milestones = sorted({math.ceil(epochs / 2), math.ceil(3 * epochs / 4)} - {epochs})
    lr = _BASE_LR * replicas * batch_size / 32
    print(
        f"ResNet-8 on {num_train:,} deformed digits of 16x16 pixels; {replicas} replicas in processes, batches of "
        f"{batch_size} each;\nlearning rate {lr:g}, divided by 10 after epochs {' and '.join(map(str, milestones))}. "
        f"Test accuracy of the average model in % after each of {epochs} epochs:",
        flush=True,
    )
    methods = _methods()
    with _quiet_and_single_threaded(), tempfile.TemporaryDirectory() as scratch:
        data.prepare_data()
        data.setup()
        importlib.import_module("torch._dynamo")  # the first optimizer would import it, in each process again
        for method in methods:
            print(f"  {method.name:28}", end="", flush=True)
            pl.seed_everything(seed, verbose=False)
            network = build_model("resnet8", in_channels=1)
            module = ImageClassifier(network, lr=lr, schedule=milestones, warmup_epochs=1)
            blocks = {"block_size": replicas // 2} if "block_period" in method.options else {}
            options = {**method.options, **blocks}
            recorder = _Recorder(str(Path(scratch) / "result.json"))
            trainer = pl.Trainer(
                accelerator="cpu",
                devices=replicas,
                strategy=LocalSGDStrategy(start_method=start_method, **options),
                plugins=[LightningEnvironment()],  # also inside of a cluster's job
                callbacks=[recorder, PostLocalSwitch()] if method.switch else [recorder],
                max_epochs=epochs,
                num_sanity_val_steps=0,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, datamodule=data)
            os.environ.pop("MASTER_PORT", None)  # the next group of processes takes another one
            method.result.update(name=method.name, options=options, **json.loads(Path(recorder.path).read_text()))

    results = [method.result for method in methods]
    print("\n" + _table(results))
    settings = {
        "epochs": epochs, "replicas": replicas, "batch_size": batch_size, "num_train": num_train, "num_test": num_test,
        "lr": lr, "milestones": milestones, "seed": seed, "cores": os.cpu_count(),
        "versions": {"lightning_distopt": __version__, "torch": torch.__version__, "lightning": pl.__version__},
    }  # fmt: skip
    (folder / "demo.json").write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
    try:
        _draw(methods, folder / "demo.png", f"ResNet-8 on deformed digits, {replicas} replicas")
    except ModuleNotFoundError as error:
        print(lacking(error))
    print("Written: " + ", ".join(str(path) for path in sorted(folder.glob("demo.*"))))
    return results


class _Recorder(pl.Callback):
    """Shows progress; writes what happened to a file, for the process that started the ranks."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.curve: list[dict[str, float]] = []
        self.consensus = 0.0
        self.start = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        _hush()  # a spawned process begins anew

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = time.perf_counter()
        strategy, last = trainer.strategy, trainer.estimated_stepping_batches - 1
        assert isinstance(strategy, LocalSGDStrategy)

        def measure(*_: Any) -> None:
            # Here the optimizer has made the local step, and the round that may follow has not begun.
            if strategy.steps == last:
                rows = strategy.all_gather(strategy.replica_parameters()).flatten(0, -2)
                self.consensus = float(squared_distances([rows], [rows.mean(dim=0)]).mean().sqrt())

        trainer.optimizers[0].register_step_post_hook(measure)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        quarter = max(1, int(trainer.num_training_batches) // 4)
        if trainer.is_global_zero and trainer.fit_loop.batch_idx % quarter == quarter - 1:
            print(".", end="", flush=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        accuracy = 100 * float(trainer.callback_metrics["val_accuracy"])
        sent = trainer.strategy.traffic.bytes_sent  # type: ignore[attr-defined]
        self.curve.append({"epoch": trainer.current_epoch + 1, "accuracy": accuracy, "bytes_sent": sent})
        if trainer.is_global_zero:
            print(f" {accuracy:.1f} ", end="", flush=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        traffic = trainer.strategy.traffic  # type: ignore[attr-defined]
        blocked = trainer.strategy.all_gather(torch.tensor(traffic.seconds_blocked))
        seconds = time.perf_counter() - self.start
        if trainer.is_global_zero:
            print(f" {seconds:.0f} s", flush=True)
            result = {
                "test_accuracy": self.curve[-1]["accuracy"],
                "rounds": traffic.rounds,
                "bytes_sent": traffic.bytes_sent,
                "seconds_blocked": float(blocked.mean()),
                "seconds": seconds,
                "consensus_distance": self.consensus,
                "curve": self.curve,
            }
            Path(self.path).write_text(json.dumps(result))


def _hush() -> None:
    warnings.simplefilter("ignore")
    for logger in _LOGGERS:
        logger.setLevel(logging.ERROR)


@contextmanager
def _quiet_and_single_threaded() -> Iterator[None]:
    environment, threads = dict(os.environ), torch.get_num_threads()
    levels = [logger.level for logger in _LOGGERS]
    os.environ["OMP_NUM_THREADS"] = "1"  # without it Lightning gives the ranks as many threads as there are cores for them
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            _hush()
            yield
    finally:
        for logger, level in zip(_LOGGERS, levels, strict=True):
            logger.setLevel(level)
        torch.set_num_threads(threads)
        os.environ.clear()
        os.environ.update(environment)


def _table(results: Sequence[dict[str, Any]]) -> str:
    header = f"{'':28} {'test accuracy':>13} {'rounds':>7} {'MB sent':>8} {'s blocked':>10} {'consensus distance':>19}"
    lines = [header, "-" * len(header)]
    for r in results:
        lines.append(
            f"{r['name']:28} {r['test_accuracy']:>11.1f} % {r['rounds']:>7} {r['bytes_sent'] / 1e6:>8.1f} "
            f"{r['seconds_blocked']:>10.1f} {r['consensus_distance']:>19.4f}"
        )
    lines += [
        "",
        "MB sent: by each replica, to train. s blocked: waiting for communication, or for others on the same core;",
        "mean over replicas. Consensus distance: sqrt(mean ||x_i - mean x||^2) after the last local step, before its",
        "round. Hierarchical: one round in four is over all replicas, the others inside blocks, where links are fast.",
    ]
    return "\n".join(lines)


def _draw(methods: Sequence[_Method], path: Path, title: str) -> None:
    """Draw test accuracy against epochs and against megabytes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for method in reversed(methods):  # the reference on top: where it agrees with others, its dashes show them
        curve = method.result["curve"]
        accuracy = [point["accuracy"] for point in curve]
        style = {"color": method.color, "linestyle": method.dashes, "marker": "o", "markersize": 4, "linewidth": 1.8}
        left.plot([point["epoch"] for point in curve], accuracy, label=method.name, **style)
        right.plot([point["bytes_sent"] / 1e6 for point in curve], accuracy, **style)
    left.set(xlabel="epoch", ylabel="test accuracy of the average model (%)", title="by samples seen")
    right.set(xlabel="MB sent by each replica (log scale)", xscale="log", title="by bytes sent")
    for axes in (left, right):
        tidy(axes)
    left.xaxis.get_major_locator().set_params(integer=True)
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_major_formatter("{x:g}")
    right.xaxis.set_minor_formatter("")
    figure.suptitle(title)
    handles, labels = (part[::-1] for part in left.get_legend_handles_labels())
    figure.legend(handles, labels, loc="outside lower center", ncols=len(methods), frameon=False)
    figure.savefig(path, dpi=150)
