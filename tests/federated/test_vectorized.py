"""Clients that train at once are those that train one after the other."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_distopt import FedAvg, FederatedStrategy, FedProx, MimeLite, OneBit, Scaffold
from lightning_distopt.federated import cohorts
from lightning_distopt.strategies import federated, vectorized
from tests.conformance.problems import QUIET
from tests.federated.problem import run
from tests.federated.test_strategy import SaveAndFail, Stop

SAMPLES = [7, 4, 7, 7, 4, 7, 2, 7, 4, 7]
"""Of the clients: groups of six and three, and one that is left over; batches of three."""


class Total(Metric):
    """The sum of all values."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, value: torch.Tensor) -> None:
        self.total = self.total + value

    def compute(self) -> torch.Tensor:
        return self.total


class Net(L.LightningModule):
    """What vmap can run: convolution, normalisation, tied, frozen, unused and channels-last parameters, a counter, logs."""

    def __init__(
        self, optimizer: Any = torch.optim.SGD, norm: str = "batch", dropout: float = 0.0, scheduled: bool = True
    ) -> None:
        super().__init__()
        self.make, self.scheduled = optimizer, scheduled
        self.conv = nn.Conv2d(1, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4) if norm == "batch" else nn.GroupNorm(2, 4)
        self.hidden = nn.Linear(36, 36)
        self.tied = nn.Linear(36, 36)
        self.tied.weight = self.hidden.weight
        self.frozen = nn.Linear(36, 36).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(36, 3)
        self.metric = Total()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.avg_pool2d(torch.relu(self.norm(self.conv(x))), 2).flatten(1)
        return self.head(self.dropout(torch.relu(self.tied(torch.tanh(self.hidden(self.frozen(x)))) * self.scale)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.cross_entropy(self(batch["x"]), batch["y"])
        self.log("loss", loss, on_step=False, on_epoch=True)
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log_dict({"number": batch_idx}, on_step=False, on_epoch=True, batch_size=1)
        return {"loss": loss}

    def configure_optimizers(self) -> Any:
        others = [p for name, p in self.named_parameters() if not name.startswith("conv")]
        groups = [{"params": self.conv.parameters(), "lr": 0.02}, {"params": others}]
        optimizer = self.make(groups, lr=0.05, weight_decay=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)] if self.scheduled else []


class Images(torch.utils.data.Dataset[Any]):
    """Images that the global random stream changes whenever they are loaded."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(11)
        self.x = torch.randn(sum(SAMPLES), 1, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
        self.y = torch.randint(3, (sum(SAMPLES),), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, k: int) -> Any:
        return {"x": self.x[k] + 0.1 * torch.randn(1, dtype=self.x.dtype), "y": self.y[k], "name": "image"}


def parts() -> list[range]:
    ends = [sum(SAMPLES[: k + 1]) for k in range(len(SAMPLES))]
    return [range(end - size, end) for end, size in zip(ends, SAMPLES, strict=True)]


def fit(
    rank: int,
    world_size: int,
    m: int,
    aggregator: Any = "fedavg",
    module: Any = Net,
    dtype: torch.dtype = torch.float64,
    strategy: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    torch.manual_seed(3)
    made = module().to(dtype)
    loader = DataLoader(Images(dtype), 3, shuffle=True, collate_fn=collate)
    given = {"clients": len(SAMPLES), "fraction": 0.9, "partition": parts(), "replicas_per_device": m, **(strategy or {})}
    return run(rank, world_size, made, loader, {"aggregator": aggregator, **given}, 2, **options)


def collate(samples: list[Any]) -> dict[str, Any]:
    return {
        "x": torch.stack([s["x"] for s in samples]),
        "y": torch.stack([s["y"] for s in samples]),
        "name": samples[0]["name"],
    }


def same(one: dict[str, Any], other: dict[str, Any], atol: float = 1e-10) -> None:
    for name in ("models", "buffers", "losses"):
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=atol)
    torch.testing.assert_close(one["metrics"], other["metrics"], rtol=0, atol=1e-6)  # Lightning keeps them in float32
    for name in ("up", "down", "rounds", "dropped", "global_step"):
        assert one[name] == other[name]


OPTIMIZERS = {
    "momentum": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adamw": torch.optim.AdamW,
    "adagrad": partial(torch.optim.Adagrad, initial_accumulator_value=0.3),
    "nadam": torch.optim.NAdam,
    "rmsprop": partial(torch.optim.RMSprop, centered=True, momentum=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(ranks: Any, name: str) -> None:
    module = partial(Net, OPTIMIZERS[name])
    same(*(ranks.run(1, fit, m, module=module)[0] for m in (1, 4)))


@pytest.mark.parametrize(
    "options",
    [
        {"aggregator": FedProx(0.3), "gradient_clip_val": 0.3},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 2},
        {"aggregator": Scaffold(option=1)},
        {"aggregator": OneBit(FedProx(0.1))},
        {"aggregator": OneBit(), "precision": "64-true"},
        {"aggregator": Scaffold(option=2), "module": partial(Net, norm="group")},
        {"aggregator": MimeLite(), "strategy": {"local_epochs": 2}},
        {"strategy": {"uplink": "top_k:0.3", "buffers": "local", "local_steps": 4}},
    ],
    ids=str,
)
def test_what_clients_do_beside(ranks: Any, options: dict[str, Any]) -> None:
    same(*(ranks.run(1, fit, m, **dict(options))[0] for m in (1, 4)))


@pytest.mark.parametrize(("world_size", "m"), [(1, 3), (1, 20), (2, 2)])
def test_does_not_depend_on_how_many_train_at_once(ranks: Any, world_size: int, m: int) -> None:
    one = ranks.run(1, fit, 1)[0]
    for result in ranks.run(world_size, fit, m):
        same({**one, "global_step": 0}, {**result, "global_step": 0, "metrics": one["metrics"]})


class Prototypes(L.LightningModule):
    """Clients with networks of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        small = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(36, 3))
        self.prototypes = nn.ModuleDict(
            {"small": small, "large": nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AvgPool2d(4))}
        )
        self.prototype = "small"

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.prototypes[self.prototype](batch["x"]).flatten(1), batch["y"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


@pytest.mark.parametrize("aggregator", [FedAvg(), FedProx(0.3)], ids=str)
def test_clients_with_different_networks(ranks: Any, aggregator: Any) -> None:
    options: dict[str, Any] = {"module": Prototypes, "strategy": {"prototypes": "even"}, "gradient_clip_val": 0.5}
    same(*(ranks.run(1, fit, m, aggregator, **options)[0] for m in (1, 4)))


def test_single_precision(ranks: Any) -> None:
    same(*(ranks.run(1, fit, m, dtype=torch.float32)[0] for m in (1, 5)), atol=1e-6)


class Counting(vectorized.Vectorized):
    """Notes the groups that are trained at once."""

    seen: list[list[int]]

    def train(self, numbers: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(list(numbers))
        return super().train(numbers, *args, **kwargs)


def groups_of_run(rank: int, world_size: int, **options: Any) -> list[list[int]]:
    Counting.seen, before = [], federated.Vectorized
    federated.Vectorized = Counting  # type: ignore[misc]
    try:
        fit(rank, world_size, 4, strategy={"fraction": 1.0}, **options)
    finally:
        federated.Vectorized = before  # type: ignore[misc]
    return Counting.seen


def test_trains_at_once_who_has_equally_many_samples(ranks: Any) -> None:
    assert ranks.run(1, groups_of_run)[0] == 2 * [[0, 2, 3, 5], [7, 9], [1, 4, 8]]  # and client 6 alone


class Poisoned(Net):
    """Has a loss that is not a number for the image that is largest."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        far = batch["x"].abs().amax() > 3.2
        return {"loss": torch.where(far, torch.nan, output["loss"])}


def test_client_that_is_not_finite_leaves_the_others_alone(ranks: Any) -> None:
    one, other = (ranks.run(1, fit, m, module=partial(Poisoned, norm="group"), gradient_clip_val=0.5)[0] for m in (1, 4))
    assert all(one["dropped"]) and all(one["losses"])
    same({**one, "metrics": {}}, {**other, "metrics": {}})


def test_dropout_draws_for_each_client(ranks: Any) -> None:
    one, again = (ranks.run(1, fit, 4, module=partial(Net, dropout=0.5))[0] for _ in range(2))
    same(one, again, atol=0)
    assert not torch.equal(one["models"], ranks.run(1, fit, 4)[0]["models"])


class Different(Net):
    """Shows whether two clients of a group get the same masks."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        draw = torch.rand((), dtype=torch.float64)
        self.log("mean", draw, on_step=False, on_epoch=True)
        self.log("low", draw, on_step=False, on_epoch=True, reduce_fx="min")
        return super().training_step(batch, batch_idx)


def test_random_numbers_differ_between_clients(ranks: Any) -> None:
    metrics = ranks.run(
        1, fit, 20, module=Different, strategy={"local_steps": 1, "partition": [range(3 * k, 3 * k + 3) for k in range(10)]}
    )
    assert metrics[0]["metrics"]["low"] < metrics[0]["metrics"]["mean"] - 0.1


class Rows(L.Callback):
    """Sees whether all rows are the server's model after a round."""

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        rows = trainer.strategy.replica_parameters()
        assert (
            len(rows) == 4 and (rows == torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])).all()
        )


def test_rows_are_the_model_after_a_round(ranks: Any) -> None:
    ranks.run(1, fit, 4, callbacks=[Rows()])


def stop_and_resume(rank: int, world_size: int, folder: str, **options: Any) -> list[dict[str, Any]]:
    """Rounds of nine clients in four turns, where pairs train at once; returns the results without and with a stop."""
    path, before = f"{folder}/stopped.ckpt", cohorts.STEPS_PER_TURN
    cohorts.STEPS_PER_TURN = 1
    try:
        whole = fit(rank, world_size, 2, **options)
        with pytest.raises(Stop):
            fit(rank, world_size, 2, callbacks=[SaveAndFail(6, path)], **options)
        return [whole, fit(rank, world_size, 2, ckpt_path=path, **options)]
    finally:
        cohorts.STEPS_PER_TURN = before


def test_resumes_exactly_inside_a_round(ranks: Any, tmp_path: Any) -> None:
    whole, rest = ranks.run(1, stop_and_resume, str(tmp_path), module=partial(Net, dropout=0.5))[0]
    assert len(rest["models"]) == 1 and torch.equal(whole["models"][-1], rest["models"][-1])
    assert whole["losses"][-1] == rest["losses"][-1]


# ------------------------------------------------------------------------------------------------------------ bad input
class Custom(torch.optim.SGD):
    pass


class Hooked(Net):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        raise AssertionError


class Zeroing(Net):
    def on_before_zero_grad(self, optimizer: Any) -> None:
        raise AssertionError


class Looking(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        return output if output["loss"].item() < 100 else None


class Skipping(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


class Updating(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.metric.update(batch["x"].mean())
        return super().training_step(batch, batch_idx)


class LoggingMetric(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("metric", self.metric)
        return super().training_step(batch, batch_idx)


class Ragged(Net):
    """Cuts images to a random width."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {**batch, "x": batch["x"][..., : int(torch.randint(1, 7, ()))]}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"module": partial(Net, Custom)}, "Custom"),
        ({"strategy": {"optimizer_state": "keep"}}, "optimizer_state='reset'"),
        ({"module": Hooked}, "`on_before_optimizer_step`"),
        ({"module": Zeroing}, "`on_before_zero_grad`"),
        ({"module": Looking}, "`.item()`"),
        ({"module": Skipping}, "a loss of zero"),
        ({"module": Updating}, "metric of torchmetrics"),
        ({"module": LoggingMetric}, "metric of torchmetrics"),
        ({"module": Ragged}, "pad all samples"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_says_what_to_do(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MisconfigurationException) as error:
        fit(0, 1, 4, **options)
    assert sentence in str(error.value) and "replicas_per_device=1" in str(error.value)


def test_schedulers_see_steps(recwarn: Any) -> None:
    strategy = FederatedStrategy(clients=len(SAMPLES), fraction=1.0, partition=parts(), replicas_per_device=4)
    trainer = L.Trainer(accelerator="cpu", devices=1, strategy=strategy, max_epochs=2, enable_checkpointing=False, **QUIET)
    trainer.fit(Net().double(), DataLoader(Images(torch.float64), 3, collate_fn=collate))
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]
