"""The loaders that Lightning sees: those of several replicas as one, and those whose length ranks have to agree on."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_distopt.communication import Communicator
from lightning_distopt.strategies import _lightning as private
from lightning_distopt.strategies.shards import ReplicaBatchSampler, SeededDataset, shard


class LoadingMixin:
    """Divides training data among replicas, for a strategy."""

    def _shard(self: Any, loader: Any) -> Any:
        """Give every replica its part of a training loader."""
        n, m = self.num_replicas, self.replicas_per_device
        if n == 1:
            return loader
        own = not private.divides_data(self.lightning_module.trainer)
        if isinstance(loader, DataLoader):
            samplers = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
            own |= any(isinstance(sampler, DistributedSampler) for sampler in samplers)
        communicator, replicas = self._require_communicator(), self._require_replicas()
        if own or not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            if m > 1:
                raise MisconfigurationException(
                    "With `replicas_per_device > 1` the strategy divides the training data itself: use a `DataLoader` over a "
                    "map-style dataset, without a `DistributedSampler`, and leave `use_distributed_sampler` on."
                )
            if not (isinstance(self.partition, str) and self.partition == "reshuffle"):
                raise MisconfigurationException(
                    "`partition` divides a `DataLoader` over a map-style dataset, without a `DistributedSampler` and with "
                    "`use_distributed_sampler` on; this data is divided elsewhere: leave `partition` out."
                )
            result = agree_on_length(loader, communicator)
        else:
            loaders = shard(loader, self.partition, n, communicator.local_replicas, self._seed)
            result = loaders[0] if m == 1 else ReplicaLoader(loaders, replicas.activate_streams)
            self._check_division((len(result), batch_samplers(result)[0].shards.division))
            remember_position(result, self.lightning_module.trainer)
        self._loaders.append(result)
        return result

    def _check_division(self: Any, division: Any) -> None:
        """Refuse data that ranks divide differently: some of it would be trained on twice, and some never. Collective."""
        divisions = self._require_communicator().gather(division)
        for rank, other in enumerate(divisions):
            if other != divisions[0]:
                raise MisconfigurationException(
                    f"Rank {rank} divides the data otherwise than rank 0: seed the partition, or give every rank the same "
                    "dataset."
                )


class ReplicaLoader:
    """The loaders of all replicas of a rank as one: it yields the batch of row 0 and keeps the others in a queue.

    Args:
        loaders: one for each row.
        activate: called with a row before anything of it is loaded, so that it is loaded from the row's random streams.
    """

    def __init__(self, loaders: Sequence[DataLoader[Any]], activate: Callable[[int], None]) -> None:
        self.loaders = list(loaders)
        self.queue: deque[list[Any]] = deque()
        self.sampler = self
        self._activate = activate

    @property
    def dataset(self) -> Any:
        """The dataset that all replicas share."""
        return self.loaders[0].dataset

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of every replica's shard."""
        for sampler in batch_samplers(self):
            sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.loaders[0])

    def __iter__(self) -> Iterator[Any]:
        self.queue.clear()
        left = len(self) - _start(self)  # which iterators that load ahead may change
        iterators = [iter(loader) for loader in self.loaders]
        for _ in range(left):
            batches: list[Any] = []
            for row in reversed(range(len(iterators))):
                self._activate(row)
                batches.insert(0, next(iterators[row]))
            self.queue.append(batches[1:])
            yield batches[0]


class WrappedLoader:
    """A loader around one of the user's, in which Lightning finds that one's samplers, to set their epoch, and its position."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        for name in ("sampler", "batch_sampler", "state_dict", "load_state_dict"):
            if hasattr(loader, name):
                setattr(self, name, getattr(loader, name))


class TruncatedLoader(WrappedLoader):
    """A sized loader that ends after as many batches as the shortest rank's has."""

    def __init__(self, loader: Any, length: int) -> None:
        super().__init__(loader)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.loader, self.length)


class CyclingLoader(WrappedLoader):
    """A loader without a length: it starts over when it runs out, until all ranks learn at a round that one of them has."""

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self._exhausted = self._stop = False

    def __iter__(self) -> Iterator[Any]:
        self._exhausted = self._stop = False
        while not self._stop:
            empty = True
            for batch in self.loader:
                empty = False
                yield batch
                if self._stop:
                    return
            if empty:
                raise MisconfigurationException("The training loader of this rank yields no batch.")
            self._exhausted = True

    def agree(self, communicator: Communicator) -> None:
        """End the epoch after the batches that are loaded already, on all ranks, if any of them has run out of data."""
        (self._stop,) = communicator.any(self._exhausted)


def agree_on_length(loader: Any, communicator: Communicator) -> Any:
    """Wrap a loader that the user shards, so that no rank waits for data that another does not have."""
    lengths = communicator.gather(len(loader) if _has_length(loader) else None)
    if None in lengths:
        return CyclingLoader(loader)
    return loader if len(set(lengths)) == 1 else TruncatedLoader(loader, min(lengths))


def batch_samplers(loader: Any) -> list[ReplicaBatchSampler]:
    """Return the samplers of ours behind a loader."""
    if isinstance(loader, ReplicaLoader):
        return [sampler for one in loader.loaders for sampler in batch_samplers(one)]
    found = [getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)]
    return [sampler for sampler in found if isinstance(sampler, ReplicaBatchSampler)]


def behind(loader: Any) -> tuple[Any, Any]:
    """Return torch's loader behind those of ours, and the user's dataset; what is none of ours is returned as it is."""
    if isinstance(loader, ReplicaLoader):
        loader = loader.loaders[0]
    while not isinstance(loader, DataLoader) and hasattr(loader, "loader"):
        loader = loader.loader
    dataset = getattr(loader, "dataset", None)
    return loader, dataset.dataset if isinstance(dataset, SeededDataset) else dataset


def reseed(loaders: Sequence[Any], seed: int) -> None:
    """Let loaders go through the data in the order of another seed."""
    for loader in loaders:
        for sampler in batch_samplers(loader):
            sampler.shards.reseed(seed)


def remember_position(loader: Any, trainer: pl.Trainer) -> None:
    """Let Lightning save and restore how far the epoch has come, by the protocol of stateful loaders.

    The position is the same on all ranks. What counts is what has been trained, not what has been fetched ahead.
    """

    def state_dict() -> dict[str, int]:
        epoch, batch = batch_samplers(loader)[0].epoch, private.batches_trained(trainer)
        if batch >= private.epoch_length(trainer):
            return {"epoch": epoch + 1, "batch": 0}
        # A loader that is shorter than the epoch has started over, or has come to its end.
        return {"epoch": epoch, "batch": batch % len(loader) if private.starts_over(trainer) else min(batch, len(loader))}

    def load_state_dict(state: dict[str, int]) -> None:
        shorter = private.starts_over(trainer) and len(loader) < private.epoch_length(trainer)
        trained = private.batches_trained_in_all(trainer)
        for sampler in batch_samplers(loader):
            sampler.start_at(
                state["epoch"],
                state["batch"],
                once=shorter,
                begun=lambda: private.batches_trained_in_all(trainer) > trained,
            )

    loader.state_dict, loader.load_state_dict = state_dict, load_state_dict


def _start(loader: Any) -> int:
    sampler = batch_samplers(loader)[0]
    return sampler._start[1] if sampler._start[0] == sampler.epoch else 0


def _has_length(loader: Any) -> bool:
    try:
        len(loader)
    except (TypeError, NotImplementedError):
        return False
    return True
