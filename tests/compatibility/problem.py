"""What the rows of the table are tried on: a small module, its data and one run, all of which options change."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from torchmetrics.classification import MulticlassAccuracy

from lightning_distopt import CHOCO, GossipStrategy, LocalSGDStrategy
from tests.compatibility.matrix import Row
from tests.helpers import PoolEnvironment

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
SIZE = 47  # training samples, which two replicas can't share equally


class Net(L.LightningModule):
    """A classifier of 4x4 images; every option is something that real modules have.

    Args:
        optimizer: "sgd", "adamw" or "lbfgs".
        schedule: any of "step", "epoch", "one_cycle", "plateau_epoch", "plateau_step".
        manual: number of optimizers that `training_step` steps by itself; 0 is automatic optimization.
        layer: "batch_norm", "sync_batch_norm", "weight_norm", "lazy", or none.
        tied, frozen, unfreeze, unused, branching, channels_last: what the parameters are like; one branch depends on the data.
        checkpointing: "reentrant", "not_reentrant" or none.
        compiled: "module" or "layer": by torch.compile.
        skip_every: `training_step` returns None in batches `1, 1 + skip_every, ...`.
        metric: whether it holds a torchmetrics metric.
        fetching: whether `training_step` takes a `dataloader_iter`.
    """

    def __init__(
        self,
        optimizer: str = "sgd",
        schedule: tuple[str, ...] = ("step",),
        manual: int = 0,
        layer: str = "",
        tied: bool = False,
        frozen: bool = False,
        unfreeze: bool = False,
        unused: bool = False,
        branching: bool = False,
        channels_last: bool = False,
        checkpointing: str = "",
        compiled: str = "",
        skip_every: int = 0,
        metric: bool = False,
        fetching: bool = False,
    ) -> None:
        super().__init__()
        self.optimizer, self.schedule, self.manual, self.skip_every = optimizer, schedule, manual, skip_every
        self.automatic_optimization = not manual
        self.checkpointing = checkpointing
        self.lr = 0.1
        self.seen: dict[int, list[int]] = {}
        self.clipped: list[tuple[float, float]] = []
        layers: dict[str, Any] = {
            "": nn.Identity,
            "batch_norm": lambda: nn.BatchNorm2d(4),
            "sync_batch_norm": lambda: nn.SyncBatchNorm(4),
            "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
            "lazy": lambda: nn.LazyConv2d(4, 1),
        }
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.layer = layers[layer]()
        self.backbone = nn.Sequential(nn.Linear(64, 8), nn.Tanh())
        self.hidden = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.unused = nn.Linear(3, 3) if unused else None
        self.branch = nn.Linear(8, 8) if branching else None
        self.accuracy = MulticlassAccuracy(3) if metric else None
        if tied:
            self.second.weight = self.hidden[0].weight
        self.unfreeze = unfreeze
        if frozen or unfreeze:
            self.second.requires_grad_(False)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.conv.to(memory_format=self.memory_format)
        if compiled == "layer":
            self.hidden = torch.compile(self.hidden, backend="aot_eager")  # type: ignore[assignment]
        if fetching:
            self.training_step = self._fetching_step  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.layer(self.conv(x.contiguous(memory_format=self.memory_format))))
        x = self.backbone(x.flatten(1))
        if self.checkpointing:
            x = checkpoint(self.hidden, x, use_reentrant=self.checkpointing == "reentrant")  # type: ignore[assignment]
        else:
            x = self.hidden(x)
        if self.branch is not None and x[0, 0] > 0:
            x = x + self.branch(x)
        return self.head(torch.tanh(self.second(x)))

    def _loss(self, batch: Any) -> Tensor:
        if isinstance(batch, dict):  # of several loaders
            return torch.stack([self._loss(part) for part in batch.values()]).mean()
        x, y, _ = batch
        logits = self(x)
        if self.accuracy is not None:
            self.accuracy(logits, y)
            self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return nn.functional.cross_entropy(logits, y)

    def on_train_epoch_start(self) -> None:
        if self.unfreeze and self.current_epoch == 1:
            self.second.requires_grad_(True)

    @torch.compiler.disable
    def _note(self, batch: Any) -> None:
        replicas = getattr(self.trainer.strategy, "replicas", None)
        parts = batch.values() if isinstance(batch, dict) else [batch]
        row = self.seen.setdefault(replicas.active if replicas is not None else 0, [])
        row.extend(int(k) for _, _, indices in parts for k in indices)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        self._note(batch)
        if self.manual:
            return self._manual_step(batch)
        if self.skip_every and batch_idx % self.skip_every == 1:
            return None
        loss = self._loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def _fetching_step(self, dataloader_iter: Iterator[Any]) -> Tensor:
        (x, *others), _, _ = next(dataloader_iter)
        batch = (x.to(self.dtype), *others)  # Lightning converts only what it fetches itself
        self._note(batch)
        return self._loss(batch)

    def _manual_step(self, batch: Any) -> Tensor:
        optimizers: Any = self.optimizers(use_pl_optimizer=True)
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        schedulers: Any = self.lr_schedulers()
        for optimizer in optimizers:
            self.toggle_optimizer(optimizer)
            loss = self._loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=1.0)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            scheduler.step()
        return loss

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if gradient_clip_val is not None:
            gradients = torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None])
            self.clipped.append((float(gradients.norm()), float(gradients.abs().max())))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), sync_dist=True)
        # Better and better on rank 0, worse and worse elsewhere: what a decision of each rank by itself would come from.
        self.log("own", float(self.current_epoch if self.global_rank else -self.current_epoch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self._loss(batch), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        make: dict[str, Any] = {
            "sgd": lambda p: torch.optim.SGD(p, lr=self.lr, momentum=0.9, weight_decay=0.01),
            "adamw": lambda p: torch.optim.AdamW(p, lr=0.1 * self.lr),
            "lbfgs": lambda p: torch.optim.LBFGS(p, lr=self.lr, max_iter=2),
        }
        if self.manual > 1:
            first = [*self.conv.parameters(), *self.layer.parameters(), *self.backbone.parameters()]
            known = {id(p) for p in first}
            groups = [first, [p for p in self.parameters() if id(p) not in known]]
        else:
            groups = [list(self.parameters())]
        optimizers = [make[self.optimizer](group) for group in groups]
        return optimizers, [self._scheduler(name, optimizer) for optimizer in optimizers for name in self.schedule]

    def _scheduler(self, name: str, optimizer: Any) -> dict[str, Any]:
        schedules = torch.optim.lr_scheduler
        if name == "step":
            return {"scheduler": schedules.StepLR(optimizer, 4, gamma=0.5), "interval": "step"}
        if name == "epoch":
            return {"scheduler": schedules.ExponentialLR(optimizer, 0.7), "interval": "epoch"}
        if name == "one_cycle":
            total = int(self.trainer.estimated_stepping_batches)
            return {"scheduler": schedules.OneCycleLR(optimizer, 0.1, total_steps=total), "interval": "step"}
        plateau = schedules.ReduceLROnPlateau(optimizer, patience=0, threshold=100.0, threshold_mode="abs")
        return {"scheduler": plateau, "interval": name.removeprefix("plateau_"), "monitor": "loss"}


# ----------------------------------------------------------------------------------------------------------------- data


def samples(size: int) -> TensorDataset:
    """Return images, classes and numbers; the first of a larger set are those of a smaller one."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(100, 1, 4, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (100,), generator=generator)
    return TensorDataset(x[:size].to(torch.get_default_dtype()), y[:size], torch.arange(size))


class OddFirst(Sampler[int]):
    """An order of the user's own: odd numbers backwards, then some even ones twice."""

    def __init__(self, size: int) -> None:
        self.order = [*range(size - 1 - size % 2, 0, -2), *range(0, size, 4), *range(0, size, 4)]

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


class Stream(IterableDataset[Any]):
    """Every `world`-th sample; the first rank has more of them."""

    def __init__(self, size: int, rank: int, world: int, sized: bool) -> None:
        data = samples(size)
        self.own = [data[k] for k in range(rank, size, world)][: size // world + 1 - 5 * rank]
        if sized:
            self.__class__ = type("SizedStream", (Stream,), {"__len__": lambda stream: len(stream.own)})

    def __iter__(self) -> Iterator[Any]:
        return iter(self.own)


class Folder(DataLoader[Any]):
    """A subclass with an argument of its own."""

    def __init__(self, path: str, *args: Any, **kwargs: Any) -> None:
        self.path = path
        super().__init__(*args, **kwargs)


class Module(L.LightningDataModule):
    """The same data, as a datamodule."""

    def __init__(self, train: Any, val: Any) -> None:
        super().__init__()
        self.train, self.val = train, val

    def train_dataloader(self) -> Any:
        return self.train

    def val_dataloader(self) -> Any:
        return self.val


def train_loader(kind: str = "plain", rank: int = 0, world: int = 1, size: int = SIZE, **options: Any) -> Any:
    """Return a training loader of some kind; `options` are those of torch's."""
    options = {"batch_size": 3, **options}
    data = samples(size)
    if kind == "weighted":
        generator = torch.Generator().manual_seed(2)
        return DataLoader(data, sampler=WeightedRandomSampler(torch.linspace(1, 2, size), size, generator=generator), **options)
    if kind == "sampler":
        return DataLoader(data, sampler=OddFirst(size), **options)
    if kind == "batch_sampler":
        return DataLoader(data, batch_sampler=BatchSampler(OddFirst(size), 3, drop_last=False))
    if kind == "own_part":
        return DataLoader(Subset(data, range(rank, size, world)), **options)
    if kind == "distributed":
        return DataLoader(data, sampler=DistributedSampler(data, world, rank, shuffle=False), **options)
    if kind in ("iterable", "sized_iterable"):
        return DataLoader(Stream(size, rank, world, kind == "sized_iterable"), **options)
    if kind == "several":
        return {"a": DataLoader(data, **options), "b": DataLoader(data, **{**options, "batch_size": 5})}
    if kind == "subclass":
        return Folder("somewhere", data, **options)
    if kind == "stateful":
        from torchdata.stateful_dataloader import StatefulDataLoader

        return StatefulDataLoader(data, **options)
    return DataLoader(data, **options)


# ------------------------------------------------------------------------------------------------------------------ runs


class Watch(L.Callback):
    """Keeps what happens."""

    def __init__(self) -> None:
        self.start: Tensor | None = None
        self.rows: list[Tensor] = []
        self.steps: list[int] = []
        self.rates: list[list[float]] = []
        self.validations: list[float] = []

    def _rows(self, trainer: L.Trainer) -> Tensor:
        strategy: Any = trainer.strategy
        if hasattr(strategy, "replica_parameters"):
            return strategy.replica_parameters()
        parameters = [p.detach().flatten() for p in trainer.lightning_module.parameters() if p.requires_grad]
        return torch.cat(parameters).unsqueeze(0).clone()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.start = self._rows(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.rows.append(self._rows(trainer))
        optimizers = trainer.optimizers
        self.steps.append(getattr(trainer.strategy, "steps", trainer.global_step // len(optimizers)))
        self.rates.append([group["lr"] for optimizer in optimizers for group in optimizer.param_groups])

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validations.append(float(trainer.callback_metrics.get("val_loss", 0.0)))  # `barebones` has none


def execute(
    rank: int,
    world: int,
    row: Row,
    folder: str,
    m: int = 1,
    period: int | None = None,
    share: int | None = None,
    accelerator: str = "cpu",
    gossip: bool = False,
) -> dict[str, Any]:
    """Run a row on this rank, and return what came of it; an error is returned, too.

    Args:
        rank, world: of the pool.
        row: what is tried.
        folder: for its files.
        m: replicas per rank.
        period: `H`; None is a single device without the strategy.
        share: this many samples, the same for all replicas, in place of a part of the data for each.
        accelerator: what it runs on.
        gossip: whether replicas gossip, with compressed messages.
    """
    warnings.simplefilter("ignore")
    L.seed_everything(7, verbose=False)
    n, watch = world * m, Watch()
    if row.module.get("compiled"):
        torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    module = Net(**row.module)
    loader = train_loader(**{"rank": rank, "world": world, **row.loader, **({} if share is None else {"size": share})})
    evaluation = DataLoader(samples(12), batch_size=6)
    strategy: Any = "auto"
    if period is not None:
        options = {} if share is None or n == 1 else {"partition": [list(range(share))] * n}
        options = {"replicas_per_device": m, **options, **row.strategy}
        if gossip:
            options.pop("ddp_kwargs", None)  # refused, as it never averages gradients
        choco = CHOCO(gamma=0.4, compressor="top_k:0.5")
        strategy = GossipStrategy(choco, sync_period=period, **options) if gossip else LocalSGDStrategy(period, **options)
    options = {"max_epochs": 2, "precision": "64-true", "enable_checkpointing": False, **QUIET, **row.trainer}
    if row.plugins is not list:
        del options["precision"]
    trainer: L.Trainer | None = None
    error, output = "", None
    try:
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=world,
            strategy=strategy,
            plugins=[PoolEnvironment(rank, world), *row.plugins()],
            callbacks=[*row.callbacks(folder), watch],
            default_root_dir=folder,
            **options,
        )
        compiled: Any = torch.compile(module, backend="eager") if row.module.get("compiled") == "module" else module
        if row.entry != "fit":
            output = getattr(trainer, row.entry)(compiled, evaluation, **({} if row.entry == "predict" else {"verbose": False}))
        elif row.datamodule:
            trainer.fit(compiled, datamodule=Module(loader, evaluation))
        else:
            trainer.fit(compiled, loader, evaluation)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    except SystemExit as raised:  # how Lightning ends a program that is interrupted
        error = f"SystemExit after {raised.__context__!r}"
    result: dict[str, Any] = {
        "error": error,
        "output": output,
        "start": watch.start,
        "rows": torch.stack(watch.rows) if watch.rows else torch.empty(0),
        "steps": watch.steps,
        "rates": watch.rates,
        "validations": watch.validations,
        "seen": module.seen,
        "clipped": module.clipped,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs,
        "optimizers": 2 if row.module.get("manual", 0) > 1 else 1,
    }
    if trainer is not None and not error:
        result["state"] = {key: value.clone() for key, value in module.state_dict().items()}
        result["rounds"] = trainer.strategy.traffic.rounds if period is not None else 0  # type: ignore[attr-defined]
        result["bytes"] = trainer.strategy.traffic.bytes_sent if period is not None else 0  # type: ignore[attr-defined]
        result["global_step"], result["epochs"] = trainer.global_step, trainer.current_epoch
        plateaus = [config.scheduler for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
        result["best"] = [float(scheduler.best) for scheduler in plateaus]
        result["metrics"] = {key: float(value) for key, value in trainer.callback_metrics.items()}
    if rank == 0:
        found = sorted(Path(folder).rglob("*.ckpt"))
        files = [path for path in found if path.is_file() and ".replicas" not in str(path)]
        result["files"] = {path.name: torch.load(path, weights_only=True) for path in files}
    return result
