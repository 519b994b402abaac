"""A point of training that it can go back to."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_distopt.sparsity.weights import named_tensors


def take_snapshot(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
    """Return the module's parameters and buffers, the options of its optimizers and its learning-rate schedules, as copies."""
    groups = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in trainer.optimizers]
    schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    tensors = {name: t.detach().clone() for name, t in named_tensors(pl_module).items()}
    return {"tensors": tensors, **copy.deepcopy({"groups": groups, "schedules": schedules})}


def go_back(trainer: pl.Trainer, pl_module: pl.LightningModule, snapshot: dict[str, Any]) -> None:
    """Go back to a snapshot; optimizers start anew, and the data goes on."""
    with torch.no_grad():
        for name, tensor in named_tensors(pl_module).items():
            tensor.copy_(snapshot["tensors"][name])
    snapshot = copy.deepcopy({key: snapshot[key] for key in ("groups", "schedules")})
    for optimizer, groups in zip(trainer.optimizers, snapshot["groups"], strict=True):
        optimizer.state.clear()
        for group, kept in zip(optimizer.param_groups, groups, strict=True):
            group.update(kept)
    for config, state in zip(trainer.lr_scheduler_configs, snapshot["schedules"], strict=True):
        config.scheduler.load_state_dict(state)
