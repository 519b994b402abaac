"""The problems that federations are tested on, and how they are run on any number of ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_distopt import FederatedStrategy
from lightning_distopt.federated import cohorts
from tests.conformance.problems import QUIET, Augmented, Quadratic, SmallNet
from tests.helpers import PoolEnvironment

SIZES = [7, 3, 9, 4, 5, 8, 2, 6]
"""Samples of the clients: batches of three, some of them incomplete."""

BATCH, EPOCHS, FRACTION, SEED = 3, 2, 0.5, 1234
ETAS = [0.2, 0.2, 0.1, 0.0, 0.05]
"""Learning rates of the rounds: a decay, and a zero."""


def parts() -> list[list[int]]:
    """Return the samples of each client: runs of a shuffled sequence."""
    order = np.random.default_rng(8).permutation(sum(SIZES)).tolist()
    ends = np.cumsum(SIZES).tolist()
    return [order[end - size : end] for size, end in zip(SIZES, ends, strict=True)]


def data() -> tuple[np.ndarray, np.ndarray]:
    """Return (a, c), `[samples, 8]` each."""
    rng = np.random.default_rng(5)
    return rng.uniform(0.3, 1.2, (sum(SIZES), 8)), rng.normal(size=(sum(SIZES), 8))


@dataclass
class Problem:
    """What an oracle knows: the numbers of samples and steps, who takes part when, the learning rates, and gradients."""

    samples: Sequence[int]
    steps: Sequence[int]
    cohorts: Sequence[Sequence[int]]
    etas: Sequence[float]

    def gradient(self, k: int, h: int, x: np.ndarray) -> np.ndarray:
        """Return the gradient of client `k` at `x` in its local step `h`, which is the same in every round."""
        own, place = parts()[k], h % -(-SIZES[k] // BATCH)
        return mean_gradient(own[place * BATCH : (place + 1) * BATCH], x)

    def full_gradient(self, k: int, x: np.ndarray) -> np.ndarray:
        """Return the gradient of the mean loss of all samples of client `k`."""
        return mean_gradient(parts()[k], x)


def mean_gradient(indices: Sequence[int], x: np.ndarray) -> np.ndarray:
    a, c = data()
    return np.mean(a[indices] ** 2 * (x - c[indices]), axis=0)


def problem(epochs: int = EPOCHS, fraction: float = FRACTION, etas: Sequence[float] = ETAS) -> Problem:
    """Return the problem that `fit_quadratic` trains."""
    count = round(fraction * len(SIZES))
    chosen = [cohorts.sample(len(SIZES), count, t, SEED) for t in range(len(etas))]
    return Problem(SIZES, [epochs * -(-size // BATCH) for size in SIZES], chosen, etas)


def start() -> np.ndarray:
    """Return the parameters that training begins with."""
    module = Quadratic(ETAS).double()
    return np.concatenate([p.detach().numpy().ravel() for p in module.parameters()])


class History(L.Callback):
    """Keeps the server's model after every round, and what the strategy says about the round."""

    def __init__(self) -> None:
        self.models: list[torch.Tensor] = []
        self.losses: list[dict[int, float]] = []
        self.dropped: list[list[int]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.models.append(torch.cat([p.detach().reshape(-1).clone() for p in module.parameters() if p.requires_grad]))
        self.losses.append(dict(trainer.strategy.algorithm.losses))
        self.dropped.append(list(trainer.strategy.algorithm.dropped))


def run(
    rank: int,
    world_size: int,
    module: L.LightningModule,
    loader: Any,
    strategy: dict[str, Any],
    rounds: int,
    callbacks: Sequence[L.Callback] = (),
    ckpt_path: str | None = None,
    validation: Any = None,
    wrap: Callable[[FederatedStrategy], Any] = lambda strategy: None,
    **options: Any,
) -> dict[str, Any]:
    """Train on this rank of the pool; returns what there is to compare."""
    made = FederatedStrategy(**strategy, cluster_environment=PoolEnvironment(rank, world_size) if world_size > 1 else None)
    wrap(made)
    history = History()
    devices = world_size if world_size > 1 else 1
    L.seed_everything(SEED, verbose=False)
    settings = {**QUIET, "enable_checkpointing": False, "max_epochs": rounds, **options}
    trainer = L.Trainer(accelerator="cpu", devices=devices, strategy=made, callbacks=[history, *callbacks], **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader, validation, ckpt_path=ckpt_path)
    return {
        "models": torch.stack(history.models),
        "buffers": [b.clone() for b in module.buffers()],
        "losses": history.losses,
        "dropped": history.dropped,
        "global_step": trainer.global_step,
        "rounds": made.traffic.rounds,
        "up": made.traffic.bytes_up,
        "down": made.traffic.bytes_down,
        "metrics": {key: value.item() for key, value in trainer.callback_metrics.items()},
    }


def fit_quadratic(
    rank: int,
    world_size: int,
    aggregator: Any = "fedavg",
    optimizer: str = "plain",
    etas: Sequence[float] = ETAS,
    **options: Any,
) -> dict[str, Any]:
    """Train the quadratics of `Problem`: no shuffling, float64."""
    a, c = data()
    dataset = TensorDataset(torch.from_numpy(a), torch.from_numpy(c))
    strategy = {
        "aggregator": aggregator,
        "clients": len(SIZES),
        "fraction": FRACTION,
        "local_epochs": EPOCHS,
        "partition": parts(),
        **options.pop("strategy", {}),
    }
    module = Quadratic(list(etas), optimizer).double()
    return run(rank, world_size, module, DataLoader(dataset, BATCH), strategy, len(etas), **options)


def fit_net(rank: int, world_size: int, aggregator: Any = "fedavg", optimizer: str = "sgd", **options: Any) -> dict[str, Any]:
    """Train a module with batch norm, dropout, tied and frozen parameters, on data that is augmented when it is loaded."""
    torch.manual_seed(3)
    module = SmallNet(optimizer).double()
    workers = options.pop("num_workers", 0)
    loader = DataLoader(Augmented(), options.pop("batch_size", BATCH), shuffle=True, num_workers=workers)
    strategy = {"aggregator": aggregator, "clients": 10, "fraction": 0.6, "partition": "iid", **options.pop("strategy", {})}
    return run(rank, world_size, module, loader, strategy, options.pop("rounds", 3), **options)
