"""What all contenders are given: network, data, optimizer, and the clock that they report every step to."""

from __future__ import annotations

import copy
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from benchmarks.harness import Turns, now
from benchmarks.network import read
from lightning_distopt.data import DeformedDigitsDataModule
from lightning_distopt.models import build_model

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4


def small_network() -> nn.Module:
    """Return ResNet-8: 78 thousand parameters, much computation for each."""
    return build_model("resnet8", in_channels=1)


def wide_network(width: int = 3000) -> nn.Module:
    """Return two narrow convolutions and a wide classifier: 6.2 million parameters, 25 MB, little computation for each."""
    features = [nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    classifier = [nn.Flatten(), nn.Linear(32 * 8 * 8, width), nn.ReLU(), nn.Linear(width, 10)]
    return nn.Sequential(*features, *classifier)


@dataclass(frozen=True)
class Workload:
    """A network on deformed digits, and how it is trained, whoever trains it.

    Args:
        name: of the workload.
        network: makes the network.
        batch: images of a rank in a step.
        lr: learning rate after warm-up, for 4 ranks; it goes with their number.
        steps: of a whole training; the last quarter of them has a tenth of the learning rate.
        warmup: steps in which the learning rate rises; also where post-local training becomes local.
        every: steps between evaluations.
        wait: seconds that a step waits besides, as for an accelerator.
        num_train, num_test: images. None: all.
    """

    name: str
    network: Callable[[], nn.Module]
    batch: int
    lr: float
    steps: int
    warmup: int
    every: int
    wait: float = 0.0
    num_train: int | None = None
    num_test: int | None = None

    def data(self) -> DeformedDigitsDataModule:
        """Return the images, loaded once in a process and its children."""
        return _data(self.num_train, self.num_test)

    def stretched(self, times: int) -> Workload:
        """Return the same with so many times the steps; what happens at the beginning stays."""
        return replace(self, steps=times * self.steps)

    def parameters(self) -> int:
        """Return `d`."""
        return sum(p.numel() for p in self.network().parameters())


@functools.cache
def _data(num_train: int | None, num_test: int | None) -> DeformedDigitsDataModule:
    data = DeformedDigitsDataModule(num_train=num_train, num_test=num_test)
    data.prepare_data()
    data.setup()
    return data


class Module(pl.LightningModule):
    """The workload as a LightningModule; loops without Lightning use its parts."""

    def __init__(self, workload: Workload, n: int) -> None:
        super().__init__()
        self.workload, self.n = workload, n
        self.network = workload.network()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(self.network(batch[0]), batch[1])

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch."""
        if self.workload.wait:
            time.sleep(self.workload.wait)
        return F.cross_entropy(logits, labels)

    def configure_optimizers(self) -> Any:
        workload = self.workload
        rate = workload.lr * self.n / 4
        optimizer = torch.optim.SGD(
            self.network.parameters(), rate, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
        )

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / workload.warmup) * (0.1 if step >= 0.75 * workload.steps else 1.0)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Task:
    """A rank's part of a training.

    Args:
        workload: what is trained.
        rank: of this process.
        n: number of ranks.
        seed: of the start and of the order of the data.
        switch: the step at which post-local training becomes local.
        clusters: groups of ranks, which are nodes to Lightning.
    """

    def __init__(self, workload: Workload, rank: int, n: int, seed: int, switch: int, clusters: int = 1) -> None:
        self.workload, self.rank, self.n, self.switch, self.clusters = workload, rank, n, switch, clusters
        torch.manual_seed(seed)
        self.module = Module(workload, n)
        data = workload.data().train_set
        assert data is not None
        sampler: DistributedSampler[Any] = DistributedSampler(data, n, rank, seed=seed, drop_last=True)
        self.loader: DataLoader[Any] = DataLoader(data, workload.batch, sampler=sampler, drop_last=True)
        self.sent: Callable[[], int | None] = lambda: None  # what the contender itself has counted, if it does
        self._evaluated = copy.deepcopy(self.module.network)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches without end, those that a `Trainer` would take from the loader."""
        epoch = 0
        while True:
            self.loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            yield from self.loader
            epoch += 1

    def train(self, pace: Pace, network: torch.nn.Module, optimizer: Any, schedule: Any) -> None:
        """Train without Lightning, until `pace` has seen enough steps."""
        pace.begin()
        for images, labels in self.batches():
            optimizer.zero_grad()
            self.module.loss(network(images), labels).backward()
            optimizer.step()
            schedule.step()
            pace.step()

    @torch.no_grad()
    def accuracy(self) -> float:
        """Return the test accuracy of the average of all ranks' networks, of which each takes a part of the images."""
        targets = [x for x in (*self._evaluated.parameters(), *self._evaluated.buffers()) if x.is_floating_point()]
        sources = (*self.module.network.parameters(), *self.module.network.buffers())
        for target, source in zip(targets, (x for x in sources if x.is_floating_point()), strict=True):
            target.copy_(source)
        flat = torch.cat([x.reshape(-1) for x in targets])
        dist.all_reduce(flat)
        for target, mean in zip(targets, flat.div_(self.n).split([x.numel() for x in targets]), strict=True):
            target.copy_(mean.view_as(target))
        self._evaluated.eval()
        data = self.workload.data().test_set
        assert data is not None
        images, labels = data.images[self.rank :: self.n], data.targets[self.rank :: self.n]
        right = torch.zeros(1)
        for x, y in zip(images.split(500), labels.split(500), strict=True):
            x = x.to(torch.float32).sub_(data.mean).div_(data.std).unsqueeze(1)
            right += (self._evaluated(x).argmax(1) == y).sum()
        dist.all_reduce(right)
        return right.item() / len(data)


class Pace:
    """Tells the conductor after so many steps: one turn for each segment of a training.

    The clock runs from a barrier at the beginning of a segment to the end of its last step, so it stands still during
    evaluation and between turns. After the last segment the process waits for its end.

    Args:
        turns: of this process.
        task: what is trained.
        segments: steps of each.
        evaluates: whether the accuracy is measured after each.
        window: seconds of a segment after those, of as many whole cycles as fit in; a cycle before it says how many do, and
            that they follow ("more"). A cycle that is longer is the last segment itself. None: no such.
        cycle: steps after which everything repeats itself.
    """

    def __init__(
        self,
        turns: Turns,
        task: Task,
        segments: Sequence[int],
        evaluates: bool = False,
        window: float | None = None,
        cycle: int = 1,
    ) -> None:
        self.turns, self.task, self.evaluates, self.window, self.cycle = turns, task, evaluates, window, cycle
        self._segments, self._probed = list(segments), False

    def begin(self) -> None:
        """Start the clock; called once, when training is about to begin."""
        dist.barrier()
        self._count, self._before, self._start = 0, self._bytes(), now()

    def step(self) -> None:
        """Note the end of a step."""
        self._count += 1
        if self._count < self._segments[0]:
            return
        end = now()
        dist.barrier()  # so that what this rank has handed to its system has left it
        after = self._bytes()
        traffic, sent = (None if a is None or b is None else b - a for a, b in zip(self._before, after, strict=True))
        value: dict[str, Any] = {"steps": self._count, "traffic": traffic, "sent": sent}
        if self.evaluates:
            value["accuracy"] = self.task.accuracy()
        del self._segments[0]
        if not self._segments and self.window is not None:
            if not self._probed:
                self._segments, self._probed = [self.cycle], True
            else:
                cycles = fitting(self.window, end.wall - self._start.wall)
                self._segments, self.window = [cycles * self.cycle] * (cycles > 1), None
                value["more"] = cycles > 1
        self.turns.report(self._start, end, value)
        self.turns.wait()
        while not self._segments:
            self.turns.wait()
        self.begin()

    def _bytes(self) -> tuple[int | None, int | None]:
        return self.task.sent(), interface_bytes()


def fitting(window: float, seconds: float) -> int:
    """Return how often something that takes `seconds` fits into a window, at least once; the same on all ranks."""
    slowest = torch.tensor(seconds)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return max(1, min(1000, int(window / slowest.item())))


def interface_bytes() -> int | None:
    """Return what this process's network interface has sent, less headers; None on loopback, which all ranks share."""
    name = os.environ.get("GLOO_SOCKET_IFNAME")
    return None if name is None else read()[name].payload_sent


def train(turns: Turns, body: Callable[[Task, Pace], None], task: dict[str, Any], pace: dict[str, Any]) -> None:
    """Be a rank of a contender's training.

    Args:
        turns: of this process.
        body: the contender's.
        task, pace: options of `Task` and `Pace`.
    """
    turns.wait()
    turns.connect()
    os.environ.update(RANK=str(turns.index), WORLD_SIZE=str(turns.size))
    mine = Task(rank=turns.index, n=turns.size, **task)
    body(mine, Pace(turns, mine, **pace))
