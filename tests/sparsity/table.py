"""All pruning methods: how they are made in tests, which oracle they have, and how they are trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distopt.sparsity import (
    DPF,
    DSR,
    SET,
    SNIP,
    Incremental,
    LotteryTicket,
    OneShot,
    Pruner,
    PruningMethod,
    RigL,
    SoftFilterPruning,
    SparseMomentum,
    cubic_sparsity,
)
from tests.oracles import sparsity as oracles

SIZES = [(6, 5), (3, 8)]
SPARSITY = 0.6
ETAS = [0.2] * 11 + [0.1] * 6 + [0.0] + [0.05] * 6  # a decay, and a zero
STEPS = len(ETAS)


@dataclass(frozen=True)
class Row:
    """A method.

    Args:
        make: makes it.
        oracle: of `(x0, sizes, gradient, etas, s)`, and `chance` where that decides.
        period: of its updates here.
        absorbing: whether pruned weights never come back.
        random: whether chance decides.
    """

    make: Callable[[], PruningMethod]
    oracle: Callable[..., np.ndarray]
    period: int | None = 4
    absorbing: bool = False
    random: bool = False
    options: dict[str, Any] = field(default_factory=dict)


ROWS = {
    "dpf_every_step": Row(DPF, partial(oracles.dpf, p=1, ramp=0.75), period=1),
    "dpf": Row(DPF, partial(oracles.dpf, p=7, ramp=0.75), period=7),
    "one_shot": Row(partial(OneShot, at=0.5), partial(oracles.one_shot, at=0.5), None, absorbing=True),
    "incremental": Row(Incremental, partial(oracles.incremental, p=4, ramp=0.75), absorbing=True),
    "snip": Row(SNIP, oracles.snip, None, absorbing=True),
    "lottery_ticket": Row(
        partial(LotteryTicket, rounds=2), partial(oracles.lottery_ticket, rounds=2, rewind_to=0), None, absorbing=True
    ),
    "lottery_ticket_late": Row(
        partial(LotteryTicket, rounds=3, rewind_to=2),
        partial(oracles.lottery_ticket, rounds=3, rewind_to=2),
        None,
        absorbing=True,
    ),
    "set": Row(partial(SET, drop=0.4), partial(oracles.set_, p=4, zeta=0.4), random=True),
    "rigl": Row(partial(RigL, drop=0.5), partial(oracles.rigl, p=4, alpha=0.5, T_end=0.75 * STEPS), random=True),
    "sparse_momentum": Row(
        partial(SparseMomentum, drop=0.7), partial(oracles.sparse_momentum, p=4, prune_rate=0.7), random=True
    ),
    "dsr": Row(
        partial(DSR, drop=0.1, threshold=0.1, tolerance=0.2),
        partial(oracles.dsr, p=4, target=0.1 * 54, H=0.1, delta=0.2),
        random=True,
    ),
    "soft_filter": Row(SoftFilterPruning, partial(oracles.soft_filter, p=4)),
}


# ------------------------------------------------------------------------------------------------------------- quadratics
def start() -> np.ndarray:
    return np.random.default_rng(1).normal(size=54)


def batches() -> tuple[np.ndarray, np.ndarray]:
    """Return (a, c), `[T, 54]` each, of f_t(x) = ||a_t * (x - c_t)||^2 / 2."""
    rng = np.random.default_rng(2)
    c = rng.normal(size=54) * np.repeat([1.0, 0.5], [30, 24])
    return rng.uniform(0.3, 1.2, (STEPS, 54)), c + 0.3 * rng.normal(size=(STEPS, 54))


def gradient(t: int, x: np.ndarray) -> np.ndarray:
    a, c = batches()
    return a[t] ** 2 * (x - c[t])


def chance(seed: int, t: int) -> np.ndarray:
    """The numbers that a generator with this seed draws at step `t`, layer by layer."""
    generator = torch.Generator().manual_seed(seed + t)
    return torch.cat([torch.rand(size, generator=generator).flatten() for size in SIZES]).double().numpy()


def expected(row: Row, seed: int) -> np.ndarray:
    """Return what the oracle has after each step."""
    more = {"chance": partial(chance, seed)} if row.random else {}
    return row.oracle(start(), SIZES, gradient, ETAS, SPARSITY, **more)


class Quadratic(L.LightningModule):
    """`f_t` of the weights of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Linear(size[1], size[0], bias=False) for size in SIZES)
        x = torch.from_numpy(start())
        self.one.weight.data, self.two.weight.data = x[:30].view(6, 5).clone(), x[30:].view(3, 8).clone()

    @property
    def x(self) -> Tensor:
        return torch.cat([self.one.weight.flatten(), self.two.weight.flatten()])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        a, c = batch
        return 0.5 * (a * (self.x - c)).square().sum()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0, momentum=oracles.MOMENTUM, weight_decay=oracles.DECAY)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: ETAS[min(t, STEPS - 1)])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def by_hand(method: PruningMethod, period: int | None, seed: int) -> np.ndarray:
    """Train with `Pruner` in a loop, and return the weights that the network computes with, after each step."""
    module = Quadratic()
    pruner = Pruner({"one": module.one, "two": module.two}, method)
    optimizer = torch.optim.SGD(pruner.weights, lr=1.0, momentum=oracles.MOMENTUM, weight_decay=oracles.DECAY)
    first = kept = [w.detach().clone() for w in pruner.weights]
    history, clock = [], 0
    for t, (a, c) in enumerate(zip(*map(torch.from_numpy, batches()), strict=True)):
        for step in (0, t + 1) if t == 0 else (t + 1,):
            if step > 0:
                pruner.record("gradients" in method.needs)
                optimizer.zero_grad()
                module.training_step((a, c), t).backward()
                optimizer.param_groups[0]["lr"] = ETAS[clock]
                optimizer.step()
                clock += 1
                if method.pruned == "zero":
                    pruner.clear_pruned()
            if step == method.rewind_to:
                kept = [w.detach().clone() for w in pruner.weights]
            total = sum(w.numel() for w in pruner.weights)
            late = step == STEPS and method.ramp and sum(pruner.pruned.values()) < round(SPARSITY * total)
            if method.due(step, STEPS, period or 1) or late:
                sparsity = cubic_sparsity(step / (0.75 * STEPS), SPARSITY) if method.ramp else SPARSITY
                moments = [optimizer.state[w].get("momentum_buffer", torch.zeros_like(w)) for w in pruner.weights]
                options = {"gradients": pruner.recorded, "moments": moments, "first": first, "seed": seed + step}
                pruner.update(sparsity, [optimizer], step=step, total=STEPS, **options)
                if method.rewind_to is not None:
                    for weight, value in zip(pruner.weights, kept, strict=True):
                        weight.data.copy_(value)
                    optimizer.state.clear()
                    clock = method.rewind_to
        history.append(module.x.detach().numpy())
    return np.array(history)


# ---------------------------------------------------------------------------------------------------------------- networks
class Net(L.LightningModule):
    """A convolution, a norm, and two linear layers, the last of which stays dense; its data are known by step."""

    def __init__(self, by_step: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.hidden, self.head = nn.Linear(64, 8), nn.Linear(8, 3)
        self.by_step = by_step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if self.by_step:  # wherever the loader stands
            generator = torch.Generator().manual_seed(self.trainer.global_step)
            x, y = torch.randn(x.shape, generator=generator, dtype=x.dtype), torch.randint(3, y.shape, generator=generator)
        x = torch.tanh(self.norm(self.conv(x))).flatten(1)
        return nn.functional.cross_entropy(self.head(torch.tanh(self.hidden(x))), y)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)}


def loader(replicas: int = 1, precision: torch.dtype = torch.float32) -> DataLoader[Any]:
    """Return six batches for each replica: an epoch."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(6 * 4 * replicas, 1, 4, 4, generator=generator, dtype=precision)
    return DataLoader(TensorDataset(x, torch.randint(3, (len(x),), generator=generator)), batch_size=4)
