"""Training that probes must not disturb: what a run is made of, and all that can be compared between two runs."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_distopt.analysis.batch_norm import batch_norm_statistics
from lightning_distopt.analysis.objective import Objective
from lightning_distopt.analysis.operators import CurvatureOperator
from lightning_distopt.analysis.result import Result
from lightning_distopt.callbacks.probe import Probe
from lightning_distopt.strategies.base import ReplicaStrategy
from tests.conformance.problems import QUIET, Augmented, SmallNet
from tests.helpers import PoolEnvironment

MOMENTS = ["start", "epoch", "validation", "lr_decay", "end"]


# --------------------------------------------------------------------------------------------------------------- probing
@dataclass
class Numbers(Result):
    """What `TestProbe` measures."""

    loss: np.ndarray
    accuracy: float
    gradient: float
    product: float

    def numbers(self) -> dict[str, float]:
        return {
            "loss": float(self.loss[0]),
            "accuracy": self.accuracy,
            "gradient": self.gradient,
            "product": self.product,
            **({"val_loss": float(self.loss[1])} if len(self.loss) > 1 else {}),
        }

    def figure(self) -> Any:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(2, 2))
        figure.subplots().plot(self.loss)
        return figure


class SmallProbe(Probe[Numbers]):
    """Measures in all the ways that there are."""

    name = "small"

    def measure(self, trainer: L.Trainer, objectives: Mapping[str, Objective]) -> Numbers:
        first = next(iter(objectives.values()))
        w = first.vector()
        operator = CurvatureOperator(first, keep_graph=True)
        g = first.gradient()
        product = operator.matvec(g)
        assert torch.allclose(operator.matvec(g), product)
        losses = [objective.loss() for objective in objectives.values()]
        values = first.measure()
        first.loss(w - 0.1 * g, batch_norm_statistics(first, w - 0.1 * g))
        return Numbers(np.array(losses), values.get("accuracy", 0.0), float(g.norm()), float(product.norm()))


class EveryBatch(SmallProbe):
    """Measures after every batch, also where gradients wait for more."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._measure(trainer, on_step=True, on_epoch=False)


# -------------------------------------------------------------------------------------------------------------- training
class Net(SmallNet):
    """Logs metrics that accumulate, has a layer that is always in evaluation mode, a counter and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.train_accuracy, self.val_accuracy = MulticlassAccuracy(3), MulticlassAccuracy(3, average="micro")
        self.resting = nn.Dropout(0.5).eval()
        self.calls, self.seen = 0, []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls += 1
        self.seen.append(len(batch[0]))
        self.train_accuracy(self(batch[0]), batch[1])
        self.log("train_accuracy", self.train_accuracy, on_epoch=True)
        return {"loss": super().training_step(batch, batch_idx)}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.val_accuracy(self(self.resting(batch[0])), batch[1])
        self.log("val_accuracy", self.val_accuracy)


class WithoutMetrics(SmallNet):
    """Returns its loss as a tensor, and logs no metric."""


class Memory(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int | None, dict[str, float]]] = []

    name = version = "memory"  # type: ignore[assignment]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.entries.append((step, dict(metrics)))


class Diary(L.Callback):
    """Keeps all that training is made of, after every batch, and checkpoints, after every epoch."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.states: list[dict[str, Any]] = []
        self.checkpoints: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        optimizer = trainer.optimizers[0].state_dict()
        self.states.append(
            {
                "rows": trainer.strategy.replica_parameters() if isinstance(trainer.strategy, ReplicaStrategy) else None,
                "weights": copied(dict(module.named_parameters())),
                "grad": copied({name: p.grad for name, p in module.named_parameters()}),
                "needed": [p.requires_grad for p in module.parameters()],
                "buffers": copied(dict(module.named_buffers())),
                "optimizer": copied(optimizer),
                "modes": [child.training for child in module.modules()],
                "metrics": copied([dict(m.metric_state) for m in module.modules() if isinstance(m, Metric)]),
                "attributes": (getattr(module, "calls", 0), list(getattr(module, "seen", ())), sorted(vars(module))),
                "torch": torch.get_rng_state(),
                "numpy": np.random.get_state()[1:],
                "python": random.getstate(),
            }
        )

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.folder is not None:
            path = self.folder / f"epoch={trainer.current_epoch}.ckpt"
            trainer.save_checkpoint(path)
            self.checkpoints.append(torch.load(path, weights_only=True))


def images(size: int = 12, dtype: torch.dtype = torch.float64) -> TensorDataset:
    """Return images that are the same whenever they are loaded."""
    data = Augmented(size, dtype)
    return TensorDataset(data.x, data.y)


def fit(
    rank: int = 0,
    world: int = 1,
    strategy: Any = "auto",
    probes: Sequence[L.Callback] = (),
    module: Any = Net,
    data: Any = None,
    workers: int = 0,
    validation: Any = None,
    folder: Path | None = None,
    callbacks: Sequence[L.Callback] = (),
    ckpt_path: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Train on this rank of the pool; returns what there is to compare."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(1)
    options = {"max_epochs": 2, "precision": "64-true", "val_check_interval": 0.5, "enable_checkpointing": False, **options}
    dtype = torch.float64 if options["precision"] == "64-true" else torch.float32
    module = module().to(dtype) if isinstance(module, type) else module
    loader = DataLoader(Augmented(12, dtype), 3, shuffle=True, num_workers=workers) if data is None else data
    validation = DataLoader(images(7, dtype), 4) if validation is None else validation
    L.seed_everything(7, verbose=False)
    diary, logger = Diary(folder), Memory()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy() if callable(strategy) else strategy,
        plugins=[PoolEnvironment(rank, world)] if world > 1 else [],
        callbacks=[*callbacks, *probes, diary],
        default_root_dir=folder,
        **{**QUIET, "logger": logger, "log_every_n_steps": 1, **options},
    )
    trainer.fit(module, loader, None if validation == [] else validation, ckpt_path=ckpt_path)
    return {
        "states": diary.states,
        "checkpoints": diary.checkpoints,
        "logged": logger.entries,
        "step": trainer.global_step,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "final": copied(module.state_dict()),
        "histories": [probe.history for probe in probes if isinstance(probe, Probe)],
        "results": [probe.result for probe in probes if isinstance(probe, Probe)],
        "traffic": trainer.strategy.traffic.state_dict() if isinstance(trainer.strategy, ReplicaStrategy) else {},
    }


# -------------------------------------------------------------------------------------------------------------- comparing
def copied(value: Any) -> Any:
    """Return a value that training changes no more."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list | tuple) else value


def difference(a: Any, b: Any, at: str = "", but: Sequence[str] = ()) -> str:
    """Return where two values differ in any bit, or nothing."""
    if any(word in at for word in but):
        return ""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return "" if same else at
    if isinstance(a, np.ndarray):
        return "" if np.array_equal(a, b) else at
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys = [key for key in {**a, **b} if not any(word in str(key) for word in but)]
        found = [difference(a[k], b[k], f"{at}/{k}", but) if k in a and k in b else f"{at}/{k}" for k in keys]
        return next(filter(None, found), "")
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return f"{at}: {len(a)} and {len(b)}"
        return next(filter(None, (difference(x, y, f"{at}/{k}", but) for k, (x, y) in enumerate(zip(a, b, strict=True)))), "")
    return "" if a == b else f"{at}: {a!r} and {b!r}"


def disturbance(without: dict[str, Any], with_probes: dict[str, Any], name_of_probe: str = "small") -> str:
    """Return where a run with probes differs from one without, but for what probes add."""
    prefix = f"{name_of_probe}/"
    for name in ("states", "checkpoints", "step", "final"):
        own = ("seconds_blocked", "evaluation_bytes", "token", "EveryBatch", "HessianProbe")
        if found := difference(without[name], with_probes[name], name, own):
            return found
    for name in ("bytes_sent", "rounds", "bytes_up", "bytes_down"):
        if without["traffic"].get(name) != with_probes["traffic"].get(name):
            return f"traffic/{name}"
    entries = [(step, values) for step, values in with_probes["logged"] if not all(name.startswith(prefix) for name in values)]
    if found := difference(without["logged"], entries, "logged"):
        return found
    own = {name: value for name, value in with_probes["metrics"].items() if not name.startswith(prefix)}
    return difference(without["metrics"], own, "metrics")
