"""Each replica's own part of a dataset: which samples, in which order, from which position, with which randomness."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, get_worker_info
from torchdata.stateful_dataloader.sampler import BatchSampler as StatefulBatchSampler
from torchdata.stateful_dataloader.sampler import RandomSampler as StatefulRandomSampler

from lightning_distopt.communication import derive_seed, isolated_streams
from lightning_distopt.communication.rng import seed_streams
from lightning_distopt.data.partition import PARTITIONERS, Partitioner, make_partitioner
from lightning_distopt.lookup import nearest
from lightning_distopt.strategies._lightning import rebuild_dataloader
from lightning_distopt.strategies.lists import checked_lists, described, same_lists

RANDOM = (RandomSampler, StatefulRandomSampler)
BATCHES = (BatchSampler, StatefulBatchSampler)
"""What torch's `DataLoader` and torchdata's `StatefulDataLoader` make by themselves."""

_NAMES = ("reshuffle", "fixed")

Partition = Partitioner | str | Sequence[Sequence[int]] | Callable[[Dataset[Any], int], Sequence[Sequence[int]]]
"""How a dataset is divided: "reshuffle", "fixed", a partitioner or its name, n index lists, or a function of (dataset, n)."""


def check_partition(partition: Any) -> None:
    """Raise a `ValueError` that says what `partition` may be, unless it is that."""
    if isinstance(partition, str) and partition not in _NAMES:
        known = [*_NAMES, *PARTITIONERS]
        name = partition.partition(":")[0]
        if name not in PARTITIONERS:
            raise ValueError(
                f"`partition={partition!r}` is unknown{nearest(name, known)}: use {', '.join(map(repr, known))}, a "
                "partitioner, a function of (dataset, n) or index lists."
            )
        try:
            make_partitioner(partition)
        except ValueError as error:
            raise ValueError(f"`partition={partition!r}`: {error}") from None
    if isinstance(partition, type):
        raise ValueError(f"`partition={partition.__name__}` is a class: give an object of it, or its name.")
    rows = isinstance(partition, np.ndarray | torch.Tensor) and partition.ndim == 2  # of which each is a list
    if isinstance(partition, bytes) or not (rows or isinstance(partition, str | Sequence) or callable(partition)):
        raise ValueError(
            "`partition` must be a string, a partitioner, a function of (dataset, n) or index lists; got "
            f"{described(partition)}."
        )


def index_lists(partition: Partition, dataset: Dataset[Any], n: int) -> Sequence[Sequence[int]] | None:
    """Return the samples of each of `n` parts of a dataset; None if there are no parts that stay ("reshuffle").

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> [list(part) for part in index_lists("fixed", TensorDataset(torch.zeros(5)), n=2)]
        [[0, 2, 4], [1, 3]]

    Args:
        partition: how the dataset is divided.
        dataset: a map-style one.
        n: how many parts there are.

    Raises:
        ValueError: if a partitioner cannot divide the dataset.
        MisconfigurationException: if a function divides it otherwise when it is called once more.
    """
    if isinstance(partition, str) and partition not in _NAMES:
        partition = make_partitioner(partition)
    if callable(partition):
        lists = partition(dataset, n)
        if not isinstance(partition, Partitioner) and not same_lists(lists, partition(dataset, n)):
            raise MisconfigurationException(
                "`partition` divides the data otherwise each time it is called, so that no run could be resumed or repeated: "
                "let it draw from a stream with a seed, such as a `np.random.default_rng(0)` that is made inside it."
            )
        return lists
    if isinstance(partition, str):
        return [range(i, len(dataset), n) for i in range(n)] if partition == "fixed" else None  # type: ignore[arg-type]
    return partition


def batches_in(samples: int, batch_size: int, drop_last: bool, who: str, number: int) -> int:
    """Return how many batches there are in the samples of a replica or client, which would not be trained if it had none."""
    batches = samples // batch_size if drop_last else -(-samples // batch_size)
    if batches == 0:
        raise MisconfigurationException(
            f"{who.capitalize()} {number} has {samples} samples, fewer than a batch of {batch_size}, and its loader drops an "
            f"incomplete batch: use `drop_last=False`, smaller batches or fewer {who}s."
        )
    return batches


def shuffles(sampler: Any) -> bool:
    """Return whether a loader's sampler does nothing but shuffle all samples."""
    return type(sampler) in RANDOM and not sampler.replacement and sampler._num_samples is None


def own_order(loader: DataLoader[Any]) -> Any:
    """Return the sampler or batch sampler of the user's that decides on a loader's order; None where torch's own do."""
    sampler, batches = loader.sampler, loader.batch_sampler
    # A loader that is given a batch sampler, of whatever class, has no batch size.
    if batches is not None and (loader.batch_size is None or type(batches) not in BATCHES):
        return batches
    return None if shuffles(sampler) or type(sampler) is SequentialSampler else sampler


def with_batches(loader: DataLoader[Any], batches: Any, generator: torch.Generator) -> DataLoader[Any]:
    """Return a loader like `loader`, with other batches, or samples where it does not batch; workers take seeds from these.

    Args:
        loader: the user's.
        batches: what it is to load.
        generator: from which it draws a seed for each iteration, in place of the global stream.
    """
    changes: dict[str, Any] = {"sampler": None, "batch_sampler": batches, "batch_size": 1, "generator": generator}
    if loader.batch_size is None and loader.batch_sampler is None:  # automatic batching is off
        changes |= {"sampler": batches, "batch_sampler": None, "batch_size": None}
    if loader.num_workers > 0:
        changes["dataset"] = SeededDataset(loader.dataset)
    return rebuild_dataloader(loader, **changes, shuffle=False, drop_last=False)


class Shards:
    r"""The order in which `n` replicas go through a dataset of `N` samples, epoch by epoch.

    Every epoch follows from the seed and the epoch's number, so any rank knows any shard and any position can be resumed.
    All shards have the length of the longest; shorter ones start over, so no sample is left out.

    - "reshuffle": a permutation of the whole dataset each epoch (its own order if `shuffle` is false); replica `i` takes
      positions `i, i + n, ...`, as torch's `DistributedSampler` does.
    - "fixed", or index lists: a replica keeps its samples; `shuffle` permutes them inside the shard.

    Example:
        >>> shards = Shards(size=5, n=2, shuffle=False)
        >>> shards.order(0, epoch=0), shards.order(1, epoch=0)
        ([0, 2, 4], [1, 3, 0])

    Args:
        size: `N`.
        n: number of replicas.
        shuffle: whether the user's loader shuffles.
        seed: the base of all permutations.
        lists: index lists, one for each replica, for "fixed" and explicit partitions.
        sampler: the user's own sampler, whose order is dealt out in place of a permutation.

    Raises:
        MisconfigurationException: if the lists are not `n`, or one is empty or names a sample that does not exist.
    """

    def __init__(
        self,
        size: int,
        n: int,
        shuffle: bool = True,
        seed: int = 0,
        lists: Sequence[Sequence[int]] | None = None,
        sampler: Iterable[Any] | None = None,
    ) -> None:
        self.size, self.n, self.shuffle, self.seed, self.sampler = size, n, shuffle, seed, sampler
        self.lists = None if lists is None else [part.tolist() for part in checked_lists(lists, n, size, "replica")]
        self._cached: tuple[int, list[Any]] = (-1, [])

    def reseed(self, seed: int) -> None:
        """Take another seed."""
        self.seed, self._cached = seed, (-1, [])

    @property
    def division(self) -> str:
        """Stands for which samples each replica has."""
        lists = self.lists or []
        digest = hashlib.sha256(repr((self.size, len(self), self.shuffle, [len(part) for part in lists])).encode())
        for part in lists:
            digest.update(np.asarray(part, dtype=np.int64).tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        if self.lists is not None:
            return max(len(part) for part in self.lists)
        total = len(self.sampler) if self.sampler is not None else self.size  # type: ignore[arg-type]
        return -(-total // self.n)

    def order(self, replica: int, epoch: int) -> list[Any]:
        """Return the samples of `replica` in this epoch, in order."""
        if self.lists is not None:
            part = self.lists[replica]
            if self.shuffle:
                part = [part[k] for k in _permutation(len(part), derive_seed(self.seed, "shard", epoch, replica))]
            return _repeat(part, len(self))
        everything = self._everything(epoch)
        return _repeat(everything, len(self) * self.n)[replica :: self.n]

    def _everything(self, epoch: int) -> list[Any]:
        if self._cached[0] != epoch:
            if self.sampler is not None:
                order = _draw(self.sampler, epoch, derive_seed(self.seed, "sampler", epoch))
            elif self.shuffle:
                order = _permutation(self.size, derive_seed(self.seed, "epoch", epoch))
            else:
                order = list(range(self.size))
            self._cached = (epoch, order)
        return self._cached[1]


class _Seeded:
    """An index or the indices of a batch, with the seed of whatever loading it draws."""

    seed: int

    def plain(self) -> Any:
        """Return it as it was."""
        return type(self).__bases__[1](self)

    def __reduce__(self) -> Any:
        return seeded, (self.plain(), self.seed)


class _SeededList(_Seeded, list[Any]):
    pass


class _SeededTuple(_Seeded, tuple[Any, ...]):
    pass


class _SeededInt(_Seeded, int):
    pass


def seeded(value: Any, seed: int) -> Any:
    """Attach a seed to an index, where it is of one of the usual types; worker processes start from it what they draw."""
    kinds: dict[type, type[Any]] = {list: _SeededList, tuple: _SeededTuple, int: _SeededInt}
    if type(value) not in kinds:
        return value
    index = kinds[type(value)](value)
    index.seed = seed
    return index


class ReplicaBatchSampler:
    """The batches of one replica, from any position of any epoch.

    Args:
        shards: where the samples come from; its elements are batches already if `batch_size` is None.
        replica: number of the replica.
        batch_size: samples in a batch.
        drop_last: whether an incomplete last batch is left out.
        seeded: whether each batch brings a seed for the worker process that loads it.

    Raises:
        MisconfigurationException: if there is no batch.
    """

    def __init__(
        self, shards: Shards, replica: int, batch_size: int | None, drop_last: bool = False, seeded: bool = False
    ) -> None:
        self.shards, self.replica, self.batch_size, self.drop_last = shards, replica, batch_size, drop_last
        self.seeded = seeded
        self.epoch = 0
        self._start = (0, 0)
        self._once, self._ahead = False, 0  # the latter: epochs that Lightning has counted too many
        self._begun: Callable[[], bool] = lambda: True
        self.sampler = self  # where Lightning looks for `set_epoch`
        len(self)  # raises if there is no batch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration goes through."""
        if not self._begun():  # where epochs have no limit, Lightning counts one twice that a resume begins with
            self._ahead = max(0, epoch - self._start[0])
        self.epoch = epoch - self._ahead

    def start_at(self, epoch: int, batch: int, once: bool = False, begun: Callable[[], bool] = lambda: True) -> None:
        """Let every iteration through `epoch` begin at `batch`, or (`once`) the first; other epochs begin at 0.

        Until training has `begun`, numbers of epochs above `epoch` are taken for it, if it begins at 0.
        """
        self.epoch, self._start, self._once = epoch, (epoch, batch), once
        self._ahead, self._begun = 0, begun if batch == 0 else lambda: True

    def __len__(self) -> int:
        if self.batch_size is None:
            return len(self.shards)
        return batches_in(len(self.shards), self.batch_size, self.drop_last, "replica", self.replica)

    def __iter__(self) -> Iterator[Any]:
        epoch, start = self.epoch, self._start[1] if self._start[0] == self.epoch else 0
        order = self.shards.order(self.replica, epoch)
        for k in range(start, len(self)):
            batch = order[k] if self.batch_size is None else order[k * self.batch_size : (k + 1) * self.batch_size]
            if self.seeded:
                batch = seeded(batch, derive_seed(self.shards.seed, "batch", epoch, k, self.replica))
            if self._once and k == len(self) - 1:  # before it is taken: several rows take no more than they need
                self._start, self._once = (0, 0), False
            yield batch


def _take_seed(index: Any) -> Any:
    """Seed this worker process from an index that brings a seed; returns the index without it."""
    if isinstance(index, _Seeded):
        if get_worker_info() is not None:
            seed_streams(index.seed)
        return index.plain()
    return index


class SeededDataset(Dataset[Any]):
    """A dataset that, in a worker process, draws each batch from a stream of its own.

    So what a worker draws depends neither on their number nor on where training was resumed.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[_take_seed(index)]

    def __getitems__(self, indices: Any) -> Any:
        indices = _take_seed(indices)
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(indices)
        return [self.dataset[index] for index in indices]

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # while unpickling
            raise AttributeError(name)
        return getattr(self.dataset, name)


def shard(loader: DataLoader[Any], partition: Partition, n: int, replicas: Iterable[int], seed: int) -> list[DataLoader[Any]]:
    """Return one loader for each of `replicas`, like `loader` but over the replica's shard.

    Raises:
        MisconfigurationException: if the partition does not fit the dataset, or a fixed one meets a sampler of the user's.
        ValueError: if a partitioner cannot divide the dataset.
    """
    dataset, order = loader.dataset, own_order(loader)
    if len(dataset) == 0:  # type: ignore[arg-type]
        raise MisconfigurationException("The training dataset is empty.")
    lists = index_lists(partition, dataset, n)
    if lists is not None and order is not None:
        raise MisconfigurationException(
            "A fixed partition and a sampler of your own both decide which samples a replica sees: use "
            "`partition='reshuffle'` to deal out your sampler's order, or put the choice into the partition."
        )
    shards = Shards(len(dataset), n, shuffles(loader.sampler), seed, lists, order)  # type: ignore[arg-type]
    batch_size = None if order is loader.batch_sampler else loader.batch_size

    loaders = []
    for i in replicas:
        batches = ReplicaBatchSampler(shards, i, batch_size, loader.drop_last, seeded=loader.num_workers > 0)
        # The loader draws its workers' seeds from a generator of its own, not from the replica's stream.
        loaders.append(with_batches(loader, batches, torch.Generator().manual_seed(derive_seed(seed, "workers", i))))
    return loaders


def _permutation(size: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def _repeat(values: list[Any], length: int) -> list[Any]:
    return (values * -(-length // len(values)))[:length]


def _draw(sampler: Iterable[Any], epoch: int, seed: int) -> list[Any]:
    """Return what the user's sampler draws in this epoch when it draws from `seed`, the same on every rank."""
    for owner in (sampler, getattr(sampler, "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
        set_epoch = getattr(owner, "set_epoch", None)
        if callable(set_epoch) and len(inspect.signature(set_epoch).parameters) == 1:
            set_epoch(epoch)
    with isolated_streams(torch.device("cpu")):
        seed_streams(seed)
        return list(sampler)
