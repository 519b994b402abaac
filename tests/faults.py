"""Injects faults into training, and judges how the other ranks end: how soon, what they say, what is left on disk."""

from __future__ import annotations

import os
import re
import signal
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_distopt import GossipStrategy, LocalSGDStrategy
from tests.conformance.problems import QUIET
from tests.helpers import PoolEnvironment

KINDS = ("raise", "kill", "stop", "slow")
PLACES = ("step", "before_round", "in_round", "after_round", "validation", "checkpoint")
TIMEOUT = 3.0  # seconds that collectives wait
DIAGNOSIS = 6.0  # seconds to find out who it was, beyond the timeout
PERIOD = 3  # H; a validation and a checkpoint after each second round
ROUNDS = 6


@dataclass(frozen=True)
class Fault:
    """What happens to which rank, where, and in which round (from 1)."""

    kind: str
    place: str
    rank: int
    round: int
    sync_period: int = PERIOD
    topology: str = ""  # gossip over this graph

    def __str__(self) -> str:
        period = f"H{self.sync_period}" if not self.topology else f"H{self.sync_period}-{self.topology}"
        return f"{self.kind}-{self.place}-rank{self.rank}-round{self.round}-{period}"

    def strategy(self) -> Any:
        """Return what is trained with."""
        options = {"sync_period": self.sync_period, "timeout": timedelta(seconds=TIMEOUT)}
        return GossipStrategy(topology=self.topology, **options) if self.topology else LocalSGDStrategy(**options)


class InjectedError(Exception):
    """What a rank raises when it is asked to."""


class Injector(L.Callback):
    """Lets a fault happen."""

    def __init__(self, fault: Fault, clock: Path) -> None:
        self.fault, self.clock, self.round = fault, clock, 1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.global_rank != self.fault.rank:
            return
        if self.fault.place == "checkpoint":
            save = trainer.strategy.checkpoint_io.save_checkpoint

            def half(checkpoint: Any, path: Any, storage_options: Any = None) -> None:
                save(checkpoint, path, storage_options)
                if self.due("checkpoint"):
                    os.truncate(path, os.path.getsize(path) // 2)
                    self.strike()

            trainer.strategy.checkpoint_io.save_checkpoint = half

    def due(self, place: str) -> bool:
        return self.fault.place == place and self.round >= self.fault.round

    def strike(self) -> None:
        self.clock.write_text(str(time.monotonic()))
        self.round = -1  # once
        if self.fault.kind == "raise":
            raise InjectedError(f"injected {self.fault}")
        if self.fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault.kind == "slow":
            time.sleep(TIMEOUT + DIAGNOSIS + 2)
        if self.fault.kind == "stop":
            stopped = os.getpid()
            if os.fork() == 0:  # somebody has to end the stopped rank
                time.sleep(TIMEOUT + DIAGNOSIS + 4)
                os.kill(stopped, signal.SIGKILL)
                os._exit(0)
            os.kill(stopped, signal.SIGSTOP)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_rank == self.fault.rank and self.due("step"):
            self.strike()

    def on_before_round(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_rank != self.fault.rank:
            return
        if self.due("before_round"):
            self.strike()
        if self.due("in_round"):
            reduce = dist.all_reduce

            def begun(*args: Any, **kwargs: Any) -> Any:
                dist.all_reduce = reduce
                work = reduce(*args, **{**kwargs, "async_op": True})
                self.strike()
                work.wait()
                return work if kwargs.get("async_op") else None

            dist.all_reduce = begun

    def on_after_round(self, trainer: L.Trainer, pl_module: L.LightningModule, group: int) -> None:
        if trainer.global_rank == self.fault.rank and self.due("after_round"):
            self.strike()
        if self.round > 0:
            self.round += 1

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_rank == self.fault.rank and self.due("validation"):
            self.strike()


class Module(L.LightningModule):
    """Logs a validation loss over all ranks, so that validation communicates."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).sub(batch[1]).pow(2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch[0]).sub(batch[1]).pow(2).mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def train(
    rank: int, world_size: int, folder: str, fault: Fault, ckpt_path: str | None = None, strikes: bool = True
) -> dict[str, Any]:
    """Train with a fault, if it strikes; returns how this rank ended and when."""
    warnings.filterwarnings("ignore")
    L.seed_everything(0, verbose=False)
    x = torch.randn(ROUNDS * PERIOD * world_size * 2, 4)
    loader = DataLoader(TensorDataset(x, x.sum(dim=1, keepdim=True)), batch_size=2, shuffle=True)
    saver = ModelCheckpoint(
        dirpath=folder, filename="{step}", every_n_train_steps=2 * PERIOD, save_top_k=2, monitor="step", mode="max"
    )
    injector = [Injector(fault, Path(folder) / "clock")] if strikes else []
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world_size,
        plugins=[PoolEnvironment(rank, world_size)],
        strategy=fault.strategy(),
        callbacks=[*injector, saver],
        max_epochs=1,
        val_check_interval=2 * PERIOD,
        limit_val_batches=2,
        **QUIET,
    )
    error = ""
    try:
        trainer.fit(Module(), loader, loader, ckpt_path=ckpt_path)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
        if dist.is_initialized():  # as the end of the process would
            dist.destroy_process_group()
    return {"error": error, "ended": time.monotonic(), "step": trainer.global_step}


def inject(ranks: Any, world_size: int, fault: Fault, folder: Path) -> tuple[list[str], float]:
    """Run training with a fault; return what is wrong with how it ended, and how soon the last other rank did, in seconds.

    Every other rank must end within the timeout and the time of the diagnosis, with an error that names the right rank and
    a round; every checkpoint must be whole, and the newest one resumes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dies = {fault.rank} if fault.kind in ("kill", "stop") else set()
    results = ranks.run(world_size, train, str(folder), fault, timeout=90, expect_dead=dies, process_group=False)
    if not (folder / "clock").exists():
        return ["the fault did not happen"], 0.0
    struck = float((folder / "clock").read_text())
    problems = []
    blamed = rf"\branks? {fault.rank} (raised InjectedError|shows no sign|is alive, but slower|has ended|does not answer)"
    for rank, result in enumerate(results):
        if rank == fault.rank:
            continue
        if not re.search(blamed, result["error"]):
            problems.append(f"rank {rank} does not name rank {fault.rank}: {result['error'] or 'no error'}")
        elif not re.search(r"\bround \d+", result["error"]):
            problems.append(f"rank {rank} names no round: {result['error']}")
        own = folder / f"survivor-rank-{rank:05d}.ckpt"
        if not own.exists() or str(own) not in result["error"] or "state_dict" not in torch.load(own, weights_only=True):
            problems.append(f"rank {rank} left nothing of its own: {result['error']}")
        if result["ended"] - struck > TIMEOUT + DIAGNOSIS:
            problems.append(f"rank {rank} ended after {result['ended'] - struck:.1f} s")
    problems += [problem for path in sorted(folder.glob("step=*.ckpt")) for problem in broken(path, world_size)]
    newest = max(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.split("=")[1]), default=None)
    if newest is not None and not problems:
        resumed = ranks.run(world_size, train, str(folder), fault, str(newest), strikes=False, timeout=60, process_group=False)
        problems += [f"resume: {result['error']}" for result in resumed if result["error"]]
    others = [result["ended"] for rank, result in enumerate(results) if rank != fault.rank]
    return problems, max(others) - struck


def broken(path: Path, world_size: int) -> list[str]:
    """Return what is wrong with a checkpoint: each of its files must load, and belong to it."""
    problems = []
    try:
        header = torch.load(path, weights_only=True)["lightning_distopt"]
    except Exception as error:
        return [f"{path.name} is not whole: {error}"]
    for rank in range(world_size):
        file = Path(f"{path}.replicas") / f"{header['token']}-rank-{rank:05d}.ckpt"
        try:
            torch.load(file, weights_only=True)
        except Exception as error:
            problems.append(f"{file.name} of {path.name} is not whole: {error}")
    return problems
