"""Trainings with probes attached and without, on everything random that there is."""

from __future__ import annotations

import random
import warnings
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from lightning_distopt import GossipStrategy, LocalSGDStrategy
from lightning_distopt.analysis import Objective
from tests.analysis.linear import accuracy, entropy
from tests.conformance.case import Case
from tests.conformance.problems import QUIET, Augmented, SmallNet, fit_net
from tests.helpers import PoolEnvironment

STRATEGIES = {
    "local_sgd": lambda **kw: LocalSGDStrategy(sync_period=3, **kw),
    "gossip": lambda **kw: GossipStrategy("dsgd", topology="ring", **kw),
}


def batches() -> list[Any]:
    """Return batches of four that are the same whenever they are asked for; the last is smaller."""
    data = Augmented(10)
    return list(zip(data.x.split(4), data.y.split(4), strict=True))


def probe_options(**options: Any) -> dict[str, Any]:
    return {"data": batches(), "metrics": accuracy, **options}


def objective(module: torch.nn.Module) -> Objective:
    """Return what probes with `probe_options` measure."""
    return Objective(module, entropy, batches(), metrics=accuracy)


class Everything(L.Callback):
    """Notes after every batch all that a probe could change."""

    def __init__(self) -> None:
        self.notes: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        state = trainer.optimizers[0].state
        self.notes.append(
            {
                "state": {name: value.clone() for name, value in module.state_dict().items()},
                "optimizer": [{k: v.clone() for k, v in state[p].items()} for p in module.parameters() if p in state],
                "grad": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
                "modes": [child.training for child in module.modules()],
                "random": (torch.get_rng_state().clone(), random.random(), float(np.random.normal())),
            }
        )


def train(rank: int, world_size: int, *probes: L.Callback, **options: Any) -> tuple[list[Any], L.LightningModule]:
    """Train on this rank, by DDP if there are several; returns notes of all batches, and the module."""
    warnings.filterwarnings("ignore")
    L.seed_everything(5, verbose=False)
    notes = Everything()
    module = SmallNet().double()
    ckpt_path, more = options.pop("ckpt_path", None), options.pop("callbacks", [])
    if world_size > 1:
        options |= {"strategy": "ddp_find_unused_parameters_true", "plugins": [PoolEnvironment(rank, world_size)]}
    settings = {"accelerator": "cpu", "devices": world_size, "max_epochs": 2, "enable_checkpointing": False, **QUIET, **options}
    # The probes come last: after them nothing is noted but what they leave to the next batch.
    trainer = L.Trainer(callbacks=[notes, *more, *probes], **settings)
    loaders = DataLoader(Augmented(24), 4, shuffle=True), DataLoader(Augmented(4), 4)
    trainer.fit(module, *loaders, ckpt_path=ckpt_path)
    return notes.notes, module


def train_replicas(rank: int, world_size: int, m: int, strategy: str, *callbacks: L.Callback, **options: Any) -> dict[str, Any]:
    """Train replicas, some on each rank; see `fit_net`."""
    case = Case(strategy, STRATEGIES[strategy], oracle=None, rounds=None)
    return fit_net(
        rank, world_size, m, case, callbacks=callbacks, max_epochs=2, val_loader=DataLoader(Augmented(8), 4), **options
    )


def unnoticed(plain: dict[str, Any], probed: dict[str, Any]) -> None:
    """Compare trainings of replicas, but for what evaluation costs."""
    for name in ("rows", "state"):
        torch.testing.assert_close(probed[name], plain[name], rtol=0, atol=0)
    assert probed["global_step"] == plain["global_step"]
    assert {name: plain["metrics"][name] for name in plain["metrics"]}.items() <= probed["metrics"].items()
    for name in ("bytes_sent", "rounds"):
        assert probed["traffic"][name] == plain["traffic"][name]
