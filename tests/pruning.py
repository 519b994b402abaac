"""A small network that is pruned while it trains, alone, on several ranks or as several replicas of one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distopt.callbacks.dynamic_pruning import DynamicPruning
from lightning_distopt.sparsity.packing import pack_bits
from lightning_distopt.strategies.base import ReplicaStrategy
from tests.helpers import PoolEnvironment

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
PRUNED = {"conv": 4 * 9, "hidden": 6 * 64}
"""Weights of the layers that are pruned by default."""
DENSE = 4 + 6 + 3 * 6 + 3
"""All other parameters: two biases, and the head."""


class Net(L.LightningModule):
    """A convolution that lies in memory as `channels_last`, a linear layer, dropout, and a head that stays dense."""

    def __init__(self, optimizer: str = "sgd", dropout: float = 0.0) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.conv = nn.Conv2d(1, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.hidden = nn.Linear(64, 6)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(torch.tanh(self.hidden(torch.relu(self.conv(x)).flatten(1)))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=0.01)
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9 * (self.optimizer == "sgd"), weight_decay=1e-3)


class Notes(L.Callback):
    """Keeps masks, and parameters of all replicas of this rank: before every optimizer step but the first, and at the end."""

    def __init__(self, pruning: DynamicPruning | None) -> None:
        self.pruning = pruning
        self.masks: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.updates: list[int] = []  # steps after which masks had been computed anew
        self._seen = self._updates = 0

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._seen = trainer.global_step
        if self.pruning is not None:
            self._updates = self.pruning.pruner.updates

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step > self._seen:
            self.note(trainer)
        elif self.pruning is not None:
            self._updates = self.pruning.pruner.updates

    def on_train_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step > self._seen:
            self.note(trainer)

    def note(self, trainer: L.Trainer) -> None:
        self._seen = trainer.global_step
        if self.pruning is not None:
            self.masks.append(pack_bits(self.pruning.pruner.masks))
            if self.pruning.pruner.updates > self._updates:
                self._updates = self.pruning.pruner.updates
                self.updates.append(trainer.global_step)
        self.rows.append(parameters(trainer))


def parameters(trainer: L.Trainer) -> Tensor:
    """Return the parameters of all replicas of this rank, `[m, d]`, in the order of the plain module."""
    if isinstance(trainer.strategy, ReplicaStrategy):
        return trainer.strategy.replica_parameters()
    dense = {name.replace("parametrizations.weight.original", "weight"): p for name, p in trainer.model.named_parameters()}
    dense = {name.removeprefix("module."): p.detach().reshape(-1) for name, p in dense.items()}
    return torch.cat([dense[name] for name, _ in Net().named_parameters()])[None]


def samples(size: int) -> TensorDataset:
    """Return images, whose class is told by where they are bright."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(size, 1, 4, 4, generator=generator, dtype=torch.float64)
    y = torch.stack([x[:, 0, :2].sum((1, 2)), x[:, 0, 2:, :2].sum((1, 2)), x[:, 0, 2:, 2:].sum((1, 2))]).argmax(dim=0)
    return TensorDataset(x.to(torch.get_default_dtype()), y)


def fit(
    rank: int = 0,
    world: int = 1,
    strategy: Any = "auto",
    pruning: DynamicPruning | None = None,
    n: int | None = None,
    steps: int = 20,
    callbacks: Sequence[L.Callback] = (),
    ckpt_path: str | None = None,
    module: Any = Net,
    shuffle: bool = False,
    loader: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Train on this rank for two epochs, `steps` steps in all unless gradients accumulate; returns all that can be compared.

    `module` is one, or makes one after everything was seeded.
    """
    warnings.simplefilter("ignore")
    L.seed_everything(5, verbose=False)
    n = n or world * getattr(strategy, "replicas_per_device", 1)
    options = {"max_epochs": 2, "precision": "64-true", "enable_checkpointing": False, "limit_val_batches": 0} | options
    options = {"log_every_n_steps": 10} | options
    module = module if isinstance(module, nn.Module) else module()
    if options["precision"] == "64-true":
        module.double()  # Lightning reads checkpoints before it does so
    notes = Notes(pruning)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        plugins=[PoolEnvironment(rank, world)] if world > 1 else [],
        callbacks=[*([] if pruning is None else [pruning]), notes, *callbacks],
        **QUIET,
        **options,
    )
    dtype = torch.float64 if options["precision"] == "64-true" else torch.float32
    data = TensorDataset(*(t.to(dtype) if t.is_floating_point() else t for t in samples(2 * n * steps // 2).tensors))
    loader = DataLoader(data, batch_size=2, shuffle=shuffle) if loader is None else loader
    trainer.fit(module, loader, DataLoader(data, batch_size=len(data)), ckpt_path=ckpt_path)
    return {
        "module": module,
        "state": {key: value.clone() for key, value in module.state_dict().items() if isinstance(value, Tensor)},
        "masks": torch.stack(notes.masks) if notes.masks else torch.empty(0),
        "rows": torch.stack(notes.rows) if notes.rows else torch.empty(0),
        "updates": notes.updates,
        "traffic": trainer.strategy.traffic.bytes_sent if isinstance(trainer.strategy, ReplicaStrategy) else 0,
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
        "step": trainer.global_step,
        "trainer": trainer,
    }


def sent(result: dict[str, Any]) -> dict[str, Any]:
    """Return what may go from a rank to the test."""
    return {key: value for key, value in result.items() if key not in ("module", "trainer")}


def zeros(state: dict[str, Tensor]) -> int:
    """Return how many of the pruned layers' weights are zero."""
    return sum(int((state[f"{name}.weight"] == 0).sum()) for name in PRUNED)
