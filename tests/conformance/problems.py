"""The problems of the battery, and how they are run in any layout of replicas over ranks."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tests.helpers import PoolEnvironment

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
LAYOUTS = {2: [(2, 1), (1, 2)], 3: [(3, 1), (1, 3)], 4: [(4, 1), (2, 2), (1, 4)]}
"""For n replicas: (replicas per rank, ranks)."""


class Recorder(L.Callback):
    """Keeps every replica's parameters after every batch, and what the test asks for besides."""

    def __init__(self) -> None:
        self.rows: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.rows.append(trainer.strategy.replica_parameters())


class Quadratic(L.LightningModule):
    """f(x; a, c) = 1/2 ||a * (x - c)||^2: gradient a^2 (x - c), stochastic through (a, c)."""

    def __init__(self, etas: list[float], optimizer: str = "sgd") -> None:
        super().__init__()
        self.etas, self.optimizer = etas, optimizer
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(3, 2, generator=generator))
        self.bias = nn.Parameter(torch.randn(2, generator=generator))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        a, c = batch
        x = torch.cat([self.weight.flatten(), self.bias])
        return 0.5 * (a * (x - c)).pow(2).sum(dim=1).mean()

    def configure_optimizers(self) -> Any:
        if self.optimizer == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.Adam(self.parameters(), lr=1.0)
        elif self.optimizer == "plain":
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        elif self.optimizer == "decayed":
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0, weight_decay=0.01)
        else:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0, momentum=0.9, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: self.etas[min(t, len(self.etas) - 1)])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def quadratic_data(n: int, steps: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (a, c), `[n * steps * batch_size, 8]` each."""
    rng = np.random.default_rng(5)
    size = n * steps * batch_size
    return rng.uniform(0.3, 1.2, (size, 8)), rng.normal(size=(size, 8))


def quadratic_gradients(n: int, steps: int, batch_size: int) -> Any:
    """Return `gradient(k, t, x)`; replica `k` sees samples `k, k + n, ...` in order."""
    a, c = quadratic_data(n, steps, batch_size)

    def gradient(k: int, t: int, x: np.ndarray) -> np.ndarray:
        of = slice(k + n * t * batch_size, k + n * (t + 1) * batch_size, n)
        return np.mean(a[of] ** 2 * (x - c[of]), axis=0)

    return gradient


class SmallNet(L.LightningModule):
    """What real modules have: batch norm, dropout, tied, frozen and channels-last parameters, a scheduler, logging."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__()
        self.optimizer = optimizer
        self.conv = nn.Conv2d(1, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(36, 36)
        self.tied = nn.Linear(36, 36)
        self.tied.weight = self.hidden.weight
        self.frozen = nn.Linear(36, 36).requires_grad_(False)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(36, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.avg_pool2d(torch.relu(self.norm(self.conv(x))), 2).flatten(1)
        return self.head(self.dropout(torch.relu(self.tied(torch.relu(self.hidden(self.frozen(x)))))))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y), sync_dist=True)

    def configure_optimizers(self) -> Any:
        if self.optimizer == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        elif self.optimizer == "plain":
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        else:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Augmented(Dataset[Any]):
    """Images that a random shift and noise from all three libraries change whenever they are loaded."""

    def __init__(self, size: int = 70, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(11)
        self.x = torch.randn(size, 1, 6, 6, generator=generator, dtype=dtype)
        self.y = torch.randint(3, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        import random

        shift = int(torch.randint(3, ()))
        noise = 0.1 * random.gauss(0, 1) + 0.1 * np.random.normal()
        return self.x[k].roll(shift, dims=-1) + noise, self.y[k]


def fit(
    rank: int,
    world_size: int,
    m: int,
    case: Any,
    module: L.LightningModule,
    loader: DataLoader[Any],
    *,
    strategy: dict[str, Any] | None = None,
    callbacks: tuple[Any, ...] = (),
    ckpt_path: str | None = None,
    val_loader: DataLoader[Any] | None = None,
    seed: int = 7,
    **trainer_options: Any,
) -> dict[str, Any]:
    """Train one case in a layout; returns the recorded rows, the final state and the traffic."""
    warnings.filterwarnings("ignore")
    L.seed_everything(seed, verbose=False)
    recorder = Recorder()
    options: dict[str, Any] = {"enable_checkpointing": False, **QUIET, **trainer_options}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world_size,
        plugins=options.pop("plugins", [PoolEnvironment(rank, world_size)]),
        strategy=case.strategy(replicas_per_device=m, **(strategy or {})),
        callbacks=[recorder, *case.callbacks(), *callbacks],
        **options,
    )
    trainer.fit(module, loader, val_loader, ckpt_path=ckpt_path)
    return {
        "rows": torch.stack(recorder.rows),
        "state": {key: value.clone() for key, value in module.state_dict().items()},
        "traffic": trainer.strategy.traffic.state_dict(),
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
        "global_step": trainer.global_step,
    }


def fit_quadratic(
    rank: int, world_size: int, m: int, case: Any, etas: list[float], batch_size: int = 2, optimizer: str = "sgd", **kwargs: Any
) -> dict[str, Any]:
    """Train a case on quadratics, every replica on its own samples in order."""
    takes = getattr(case, "takes", "")
    if takes:
        optimizer = "adam" if takes == "adam" else "plain" if optimizer == "plain" else "decayed"
    module = Quadratic(etas, optimizer)
    accumulate = kwargs.get("accumulate_grad_batches", 1)
    a, c = quadratic_data(world_size * m, len(etas) * accumulate, batch_size)
    loader = DataLoader(TensorDataset(torch.from_numpy(a), torch.from_numpy(c)), batch_size=batch_size)
    kwargs = {"precision": "64-true", "max_epochs": 1, "strategy": {"partition": "fixed"}, **kwargs}
    return fit(rank, world_size, m, case, module, loader, **kwargs)


class EarlyNet(SmallNet):
    """Asks how long training is when it makes its optimizer, so that the data is loaded before a checkpoint is read."""

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


def fit_net(
    rank: int, world_size: int, m: int, case: Any, optimizer: str = "sgd", early: bool = False, **kwargs: Any
) -> dict[str, Any]:
    """Train a case on `SmallNet`, with everything random that there is."""
    optimizer = {"sgd": "plain", "adam": "adamw"}.get(getattr(case, "takes", ""), optimizer)
    torch.manual_seed(1)
    module = EarlyNet(optimizer) if early else SmallNet(optimizer)
    options = {"precision": "64-true", "max_epochs": 3, **kwargs}
    data = Augmented(dtype=torch.float64 if options["precision"] == "64-true" else torch.float32)
    loader = DataLoader(data, batch_size=3, shuffle=True, num_workers=options.pop("num_workers", 0))
    return fit(rank, world_size, m, case, module, loader, **options)


def all_rows(results: list[dict[str, Any]]) -> torch.Tensor:
    """Return `[batches, n, d]` from the results of all ranks."""
    return torch.cat([result["rows"] for result in results], dim=1)
