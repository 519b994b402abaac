"""The training data of clients: which samples each has, and the batches that it trains on in a round."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_distopt.communication import derive_seed
from lightning_distopt.strategies.lists import checked_lists
from lightning_distopt.strategies.shards import (
    batches_in,
    index_lists,
    own_order,
    seeded,
    shuffles,
    with_batches,
)


@dataclass
class Turn:
    """What Lightning takes for a batch: some clients of a round, one after the other."""

    round: int
    index: int
    clients: tuple[int, ...]


class Clients:
    """The parts of a dataset that clients have, and the batches of their local training.

    A client's batches follow from the seed, the round and its number alone.

    Args:
        loader: the user's, whose dataset, batch size, order, workers and so on clients take over.
        partition: how the dataset is divided, see `ReplicaStrategy`.
        clients: `K`.
        epochs: local epochs of a round.
        steps: optimizer steps of a round, in place of `epochs`.
        limit: of the batches of an epoch, Lightning's `limit_train_batches`.
        accumulate: batches of an optimizer step; the last one of an epoch may have fewer.

    Attributes:
        samples, steps: of every client.
        division: stands for which samples each has, among divisions into the same numbers.

    Raises:
        MisconfigurationException: for data that can't be divided among clients.
    """

    def __init__(
        self,
        loader: Any,
        partition: Any,
        clients: int,
        epochs: int = 1,
        steps: int | None = None,
        limit: int | float = 1.0,
        accumulate: int = 1,
    ) -> None:
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
            raise MisconfigurationException(
                "Clients get parts of the training data, and batches of their own: return one `DataLoader` over a map-style "
                "dataset, with a batch size and without a batch sampler of yours, from `train_dataloader`."
            )
        if own_order(loader) is not None:
            raise MisconfigurationException(
                "A sampler of yours and `partition` both decide which samples a client sees: leave the sampler out, and put "
                "the choice into `partition`."
            )
        self.batch_size, self.drop_last, self.accumulate = loader.batch_size, loader.drop_last, accumulate
        self.shuffle = shuffles(loader.sampler)
        try:
            given = index_lists(partition, loader.dataset, clients)
        except ValueError as error:
            raise MisconfigurationException(str(error).replace("replica", "client")) from None
        assert given is not None  # a partition that does not stay was refused
        lists = checked_lists(given, clients, len(loader.dataset), "client")  # type: ignore[arg-type]
        self.samples = [len(own) for own in lists]
        self._indices = np.concatenate(lists)
        self.division = hashlib.sha256(self._indices.tobytes()).hexdigest()
        self._ends = np.cumsum(self.samples).tolist()
        self._epoch = [self._batches_of_epoch(k, n, limit) for k, n in enumerate(self.samples)]
        self._epochs, self._steps = epochs, steps
        self.steps = [steps if steps is not None else epochs * -(-b // accumulate) for b in self._epoch]
        self._todo: Sequence[tuple[int, int]] = ()
        self._first_all, self._training = False, True
        self._seed = 0
        self._workers = loader.num_workers > 0
        self.loader = with_batches(loader, self, torch.Generator())

    def _batches_of_epoch(self, client: int, samples: int, limit: int | float) -> int:
        batches = batches_in(samples, self.batch_size, self.drop_last, "client", client)
        return max(1, min(batches, limit) if isinstance(limit, int) else int(batches * limit))

    def of(self, client: int) -> np.ndarray[Any, Any]:
        """Return the samples of a client."""
        end = self._ends[client]
        return self._indices[end - self.samples[client] : end]

    def iterate(
        self, clients: Sequence[int], round_: int, seed: int, first_all: bool = False, training: bool = True
    ) -> Iterator[Any]:
        """Return the batches of clients in a round, one client after the other.

        Args:
            clients: their numbers.
            round_: its number.
            seed: of the order of samples.
            first_all: whether there is one pass over all samples of each client first (`full_pass`).
            training: whether there are the batches of its training.
        """
        self._todo, self._seed = [(k, round_) for k in clients], seed
        self._first_all, self._training = first_all, training
        return iter(self.loader)

    def ending_alone(self, full_pass: bool) -> list[int]:
        """Return the clients who train on a batch of one sample alone, since it is what is left over from larger ones.

        Args:
            full_pass: whether clients go over all their samples before they train, whatever is dropped then.
        """
        left_over = [k for k, n in enumerate(self.samples) if self.batch_size > 1 and n % self.batch_size == 1]

        def trained(k: int) -> bool:
            whole = not self.drop_last and self._epoch[k] * self.batch_size > self.samples[k]
            return whole and self.steps[k] >= -(-self._epoch[k] // self.accumulate)

        return [k for k in left_over if full_pass or trained(k)]

    def full_pass(self, client: int) -> list[int]:
        """Return the sizes of the batches of one pass over all samples of a client."""
        full, rest = divmod(self.samples[client], self.batch_size)
        return [self.batch_size] * full + [rest] * (rest > 0)

    def steps_of(self, client: int) -> Iterator[tuple[int, bool]]:
        """Give, for each batch of a client in a round, its number and whether the optimizer steps after it."""
        number = done = 0
        while done < self.steps[client]:
            place = number % self._epoch[client] + 1
            step = place % self.accumulate == 0 or place == self._epoch[client]
            yield number, step
            number, done = number + 1, done + step

    def __iter__(self) -> Iterator[list[int]]:
        """Give the samples of each batch, as the loader asks for them."""
        for client, round_ in self._todo:
            own, order = self.of(client), np.empty(0)
            for number in range(len(self.full_pass(client)) if self._first_all else 0):
                batch = own[number * self.batch_size : (number + 1) * self.batch_size].tolist()
                if self._workers:
                    batch = seeded(batch, derive_seed(self._seed, "all", round_, client, number))
                yield batch
            for number, _ in self.steps_of(client) if self._training else ():
                epoch, place = divmod(number, self._epoch[client])
                if place == 0:
                    order = own
                    if self.shuffle:
                        generator = torch.Generator().manual_seed(derive_seed(self._seed, "order", round_, client, epoch))
                        order = own[torch.randperm(len(own), generator=generator).numpy()]
                batch = order[place * self.batch_size : (place + 1) * self.batch_size].tolist()
                if self._workers:
                    batch = seeded(batch, derive_seed(self._seed, "batch", round_, client, number))
                yield batch

    def __len__(self) -> int:
        first = sum(len(self.full_pass(client)) for client, _ in self._todo) if self._first_all else 0
        return first + (sum(1 for client, _ in self._todo for _ in self.steps_of(client)) if self._training else 0)


def warn_of_lone_samples(clients: Clients, module: nn.Module, full_pass: bool) -> None:
    """Warn where a norm over the samples of a batch would meet a single one, perhaps only in a late round.

    Norms over images and volumes, which are seldom of one pixel, have enough values in a single sample.

    Args:
        clients: who has how many samples.
        module: what they train.
        full_pass: whether they go over all their samples before they train.
    """
    alone = clients.ending_alone(full_pass)
    norms = (nn.BatchNorm1d, nn.LazyBatchNorm1d)
    if alone and any(isinstance(layer, norms) and layer.training for layer in module.modules()):
        which = f"{len(alone)} of {len(clients.samples)} clients, such as client {alone[0]}"
        cure = "another batch size" if full_pass else "`drop_last=True`, or another batch size"
        rank_zero_warn(
            f"The last batch of {which}, has one sample, and the module a BatchNorm1d, which can't normalize one value: "
            f"training may fail in a round in which they take part; use {cure}."
        )


class RoundLoader:
    """What Lightning iterates over: the turns of the round that is under way.

    Args:
        turns: of every round.
        begin: returns the turns of the round, from the one that comes next on.
        loader: of the user, whose data clients have.
    """

    def __init__(self, turns: int, begin: Any, loader: Any) -> None:
        self.turns, self._begin, self.loader = turns, begin, loader

    def __len__(self) -> int:
        return self.turns

    def __iter__(self) -> Iterator[Turn]:
        yield from self._begin()

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the federation knows which turn comes next, and Lightning that the loader can be resumed."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""
