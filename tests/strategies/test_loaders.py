"""Each replica's own data: shards, positions, augmentation, and loaders that never leave a rank waiting."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_distopt import LocalSGDStrategy
from lightning_distopt.communication import Communicator
from lightning_distopt.strategies.loaders import (
    CyclingLoader,
    ReplicaLoader,
    TruncatedLoader,
    agree_on_length,
    batch_samplers,
    remember_position,
)
from lightning_distopt.strategies.shards import ReplicaBatchSampler, Shards, shard
from tests.helpers import PoolEnvironment
from tests.pool import RankPool

SIZES = [(12, 3), (13, 3), (5, 4), (3, 4), (1, 2), (7, 1)]


class Numbers(Dataset[int]):
    """The samples 0, 1, 2, ..."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, k: int) -> int:
        return int(k)


class Noisy(Numbers):
    """Samples with something random from every library."""

    def __getitem__(self, k: int) -> Any:  # type: ignore[override]
        return torch.tensor([float(k), torch.rand(()).item(), random.random(), np.random.rand()], dtype=torch.float64)


def values(loader: Any) -> list[list[float]]:
    return [torch.as_tensor(batch).tolist() for batch in loader]


def flat(batches: list[list[Any]]) -> list[Any]:
    return [value for batch in batches for value in batch]


# --------------------------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("size", "n"), SIZES)
def test_shards_cover_the_dataset_with_the_least_padding(size: int, n: int, shuffle: bool) -> None:
    shards = Shards(size, n, shuffle, seed=3)
    for epoch in range(3):
        orders = [shards.order(i, epoch) for i in range(n)]
        assert [len(order) for order in orders] == [len(shards)] * n
        assert len(shards) == -(-size // n)
        seen = Counter(flat(orders))
        assert set(seen) == set(range(size))
        assert max(seen.values()) - min(seen.values()) <= 1  # nobody twice more often than anybody else
        if size % n == 0:
            assert set(seen.values()) == {1}  # disjoint
        if not shuffle and size >= n:
            sampler = DistributedSampler(Numbers(size), n, 0, shuffle=False)
            assert orders[0] == list(sampler)


def test_reshuffling_is_global_repeats_by_seed_and_is_the_same_everywhere() -> None:
    def orders(seed: int, epoch: int) -> list[list[int]]:
        # Every replica asks a `Shards` of its own, as ranks do, after having asked for other epochs.
        out = []
        for i in range(3):
            shards = Shards(60, 3, True, seed)
            shards.order(i, i)
            out.append(shards.order(i, epoch))
        return out

    first, second = orders(1, 0), orders(1, 1)
    assert first == orders(1, 0)
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(60))
    assert set(first[0]) != set(second[0])  # replica 0 sees other samples than in the epoch before
    assert first != orders(2, 0)


def test_fixed_shards_stay_and_are_permuted_inside() -> None:
    lists = [list(range(i, 20, 2)) for i in range(2)]
    shards = Shards(20, 2, True, 1, lists)
    epochs = [[shards.order(i, epoch) for i in range(2)] for epoch in range(2)]
    for orders in epochs:
        assert [sorted(order) for order in orders] == lists
    assert epochs[0] != epochs[1]
    assert [k // 2 for k in epochs[0][0]] != [k // 2 for k in epochs[0][1]]  # not the same permutation for both
    unshuffled = Shards(20, 2, False, 1, lists)
    assert [unshuffled.order(i, 5) for i in range(2)] == lists


def test_uneven_lists_repeat_to_the_longest() -> None:
    shards = Shards(10, 3, False, 0, [[0, 1, 2, 3, 4, 5, 6], [7, 8], np.array([9])])
    assert len(shards) == 7
    assert [shards.order(i, 0) for i in range(3)] == [[0, 1, 2, 3, 4, 5, 6], [7, 8] * 3 + [7], [9] * 7]
    assert all(type(k) is int for k in shards.order(2, 0))


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([[0], [1], [2]], "gives 3 index lists, but there are 2 replicas"),
        ([[0, 1], []], "gives replica 1 no sample"),
        ([[0, 1], [2, 10]], "replica 1 the sample 10, but the dataset has only 10"),
        ([[0, -1], [2, 3]], "replica 0 the sample -1"),
    ],
)
def test_lists_that_do_not_fit_are_refused(lists: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        Shards(10, 2, lists=lists)


# ------------------------------------------------------------------------------------------------ positions in an epoch


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_batches_and_positions(batch_size: int, drop_last: bool) -> None:
    shards = Shards(22, 2, True, 5)
    whole: dict[tuple[int, int], list[list[int]]] = {}
    for i in range(2):
        sampler = ReplicaBatchSampler(shards, i, batch_size, drop_last)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            batches = [list(batch) for batch in sampler]
            assert len(batches) == len(sampler) == len(BatchSampler(range(11), batch_size, drop_last))
            assert [len(b) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
            expected = shards.order(i, epoch)
            assert flat(batches) == (expected[: 11 // batch_size * batch_size] if drop_last else expected)
            whole[i, epoch] = batches
    for i in range(2):
        for start in range(len(whole[i, 1]) + 1):
            sampler = ReplicaBatchSampler(shards, i, batch_size, drop_last)
            sampler.start_at(1, start)
            sampler.set_epoch(1)  # Lightning says it again
            length = len(sampler)
            assert [list(b) for b in sampler] == whole[i, 1][start:]
            assert [list(b) for b in sampler] == whole[i, 1][start:]  # and again when asked again
            assert len(sampler) == length == len(whole[i, 1])
            sampler.set_epoch(0)
            assert [list(b) for b in sampler] == whole[i, 0]
            sampler.set_epoch(2)
            assert len(list(sampler)) == length


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("workers", [0, 1])
def test_position_of_a_loader(m: int, workers: int) -> None:
    """What counts is what was trained, though workers have fetched further; at the end it is the start of the next."""
    trained = 0

    def make() -> tuple[Any, Any]:
        loaders = shard(DataLoader(Numbers(20), 2, shuffle=True, num_workers=workers), "reshuffle", 2, range(m), 7)
        loader: Any = loaders[0] if m == 1 else ReplicaLoader(loaders, lambda row: None)
        progress = SimpleNamespace(current=SimpleNamespace(ready=trained), total=SimpleNamespace(ready=trained))
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress), _combined_loader=None)
        remember_position(loader, SimpleNamespace(fit_loop=loop, num_training_batches=len(loader)))
        return loader, progress.current

    loader, progress = make()
    for sampler in batch_samplers(loader):
        sampler.set_epoch(3)
    iterator, batches = iter(loader), []
    for _ in range(len(loader)):
        batches.append(next(iterator).tolist())
    for trained, expected in ((2, {"epoch": 3, "batch": 2}), (5, {"epoch": 4, "batch": 0})):
        progress.ready = trained
        assert loader.state_dict() == expected
        other, _ = make()
        other.load_state_dict(loader.state_dict())
        rest = values(other)
        assert rest == batches[2:] if trained == 2 else len(rest) == 5
        assert len(other) == 5


def test_a_replica_loader_resumes_all_rows() -> None:
    def make() -> ReplicaLoader:
        return ReplicaLoader(shard(DataLoader(Numbers(24), 2, shuffle=True), "reshuffle", 3, range(3), 7), lambda row: None)

    def rows(loader: ReplicaLoader) -> list[list[list[int]]]:
        out = []
        for batch in loader:
            (others,) = loader.queue
            loader.queue.popleft()
            out.append([batch.tolist(), *[other.tolist() for other in others]])
        return out

    loader = make()
    loader.set_epoch(1)
    whole = rows(loader)
    assert sorted(flat(flat(whole))) == list(range(24))
    other = make()
    for sampler in batch_samplers(other):
        sampler.start_at(1, 3)
    assert rows(other) == whole[3:]


# ------------------------------------------------------------------------------------------------- the user's own order


def everything(loader: DataLoader[Any], n: int, partition: Any = "reshuffle", epoch: int = 0, seed: int = 1) -> Any:
    """The batches of each of `n` replicas, every one from a rank of its own."""
    out = []
    for i in range(n):
        torch.manual_seed(i)  # ranks have drawn differently
        (one,) = shard(loader, partition, n, range(i, i + 1), seed)
        batch_samplers(one)[0].set_epoch(epoch)
        assert len(one) == len(values(one))
        out.append(values(one))
    return out


def test_a_plain_loader_keeps_its_order_and_a_shuffled_one_its_samples() -> None:
    assert everything(DataLoader(Numbers(8), 2), 2) == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]
    shuffled = everything(DataLoader(Numbers(8), 2, shuffle=True), 2)
    assert sorted(flat(flat(shuffled))) == list(range(8))
    assert shuffled != everything(DataLoader(Numbers(8), 2, shuffle=True), 2, epoch=1)


def test_fixed_partition_function_and_lists() -> None:
    loader = DataLoader(Numbers(8), 2)
    assert everything(loader, 2, "fixed") == everything(loader, 2, "fixed", epoch=1)
    halves = [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert everything(loader, 2, [range(4), range(4, 8)]) == halves
    assert everything(loader, 2, lambda dataset, n: [range(i * 4, i * 4 + 4) for i in range(n)], epoch=2) == halves
    assert everything(loader, 2, (torch.arange(4), torch.arange(4, 8))) == halves


@pytest.mark.parametrize("own_generator", [False, True])
def test_weighted_sampling_is_dealt_out(own_generator: bool) -> None:
    """All ranks draw the same order, a new one each epoch, and the weights hold."""
    weights = [0.0] * 10 + [1.0] * 10
    generator = torch.Generator() if own_generator else None
    sampler = WeightedRandomSampler(weights, 40, generator=generator)
    loader = DataLoader(Numbers(20), 5, sampler=sampler)
    first = everything(loader, 2)
    assert [len(batches) for batches in first] == [4, 4]
    drawn = flat(flat(first))
    assert len(drawn) == 40
    assert min(drawn) >= 10
    assert len(set(drawn)) < 40  # with replacement, as asked
    if own_generator:
        generator.manual_seed(99)  # type: ignore[union-attr]
    assert everything(loader, 2) == first
    assert everything(loader, 2, epoch=1) != first
    # The same draw, dealt to four.
    dealt = everything(loader, 4)
    merged = [k for column in zip(*[flat(batches) for batches in dealt], strict=True) for k in column]
    assert merged == [k for column in zip(*[flat(batches) for batches in first], strict=True) for k in column]


def test_drawing_leaves_the_global_streams_alone() -> None:
    loader = DataLoader(Numbers(20), 5, sampler=WeightedRandomSampler([1.0] * 20, 20))
    torch.manual_seed(0)
    (one,) = shard(loader, "reshuffle", 2, range(1), 1)
    list(one)
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), after)


def test_other_samplers_of_the_users() -> None:
    subset = everything(DataLoader(Numbers(20), 3, sampler=SubsetRandomSampler([2, 3, 5, 7, 11, 13])), 2)
    assert sorted(flat(flat(subset))) == [2, 3, 5, 7, 11, 13]
    with_replacement = everything(DataLoader(Numbers(6), 3, sampler=RandomSampler(range(6), True, 30)), 2)
    assert len(flat(flat(with_replacement))) == 30
    fewer = everything(DataLoader(Numbers(20), 3, sampler=RandomSampler(range(20), num_samples=6)), 2)
    assert len(set(flat(flat(fewer)))) == 6


class Curriculum(Sampler[int]):
    """Epoch `e` has the samples `e, e + 1, ...`; it may be asked for its epoch."""

    def __init__(self) -> None:
        self.epoch = 0
        self.told: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.told.append(epoch)
        self.epoch = epoch

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[int]:
        np.random.RandomState(self.epoch)  # what such samplers do, and what a large seed would break
        return iter(range(self.epoch, self.epoch + 4))


def test_samplers_are_told_the_epoch() -> None:
    sampler = Curriculum()
    loader = DataLoader(Numbers(20), 1, sampler=sampler)
    assert everything(loader, 2, epoch=3) == [[[3], [5]], [[4], [6]]]
    assert set(sampler.told) == {3}


class Pairs(BatchSampler):
    """Batches of the user's own, lists or tuples."""

    def __init__(self, kind: type = list) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[Any]:
        return (self.kind((2 * k, 2 * k + 1)) for k in range(5))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [list, tuple])
def test_batches_of_the_users_are_dealt_out_whole(kind: type, workers: int) -> None:
    loader = DataLoader(Numbers(10), batch_sampler=Pairs(kind), num_workers=workers)
    assert everything(loader, 2) == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [0, 1]]]


def test_a_partition_and_a_sampler_contradict() -> None:
    for loader in (
        DataLoader(Numbers(10), 2, sampler=WeightedRandomSampler([1.0] * 10, 10)),
        DataLoader(Numbers(10), batch_sampler=Pairs()),
    ):
        for partition in ("fixed", [range(5), range(5, 10)]):
            with pytest.raises(MisconfigurationException, match="fixed partition and a sampler of your own"):
                shard(loader, partition, 2, range(1), 0)


def test_an_empty_dataset_is_refused() -> None:
    loader = DataLoader(Numbers(1), 2)
    loader.dataset.size = 0  # type: ignore[attr-defined]
    with pytest.raises(MisconfigurationException, match="training dataset is empty"):
        shard(loader, "reshuffle", 2, range(1), 0)


def test_shards_without_a_batch_are_refused() -> None:
    loader = DataLoader(Numbers(20), 8, drop_last=True)
    with pytest.raises(MisconfigurationException, match="Replica 0 has 5 samples, fewer than a batch of 8") as caught:
        shard(loader, "reshuffle", 4, range(4), 0)
    assert str(caught.value).endswith("use `drop_last=False`, smaller batches or fewer replicas.")
    assert len(shard(loader, "reshuffle", 2, range(2), 0)[0]) == 1


def test_drop_last() -> None:
    kept = everything(DataLoader(Numbers(10), 2, drop_last=False), 2)
    dropped = everything(DataLoader(Numbers(10), 2, drop_last=True), 2)
    assert [len(batches) for batches in kept] == [3, 3]
    assert dropped == [batches[:2] for batches in kept]


def test_without_automatic_batching() -> None:
    loader = DataLoader(Numbers(6), batch_size=None)
    assert everything(loader, 2) == [[0, 2, 4], [1, 3, 5]]
    shuffled = everything(DataLoader(Numbers(6), batch_size=None, shuffle=True), 2)
    assert sorted(flat(shuffled)) == list(range(6))


class Lists(Numbers):
    def __getitem__(self, indices: Any) -> Any:
        return [int(k) for k in indices]


def test_batches_from_a_sampler_without_automatic_batching() -> None:
    """`sampler=BatchSampler(...)` with `batch_size=None`: the dataset loads a batch at once."""
    sampler = BatchSampler(SequentialSampler(range(8)), 2, drop_last=False)
    for workers in (0, 1):
        loader = DataLoader(Lists(8), batch_size=None, sampler=sampler, num_workers=workers)
        assert everything(loader, 2) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


# ------------------------------------------------------------------------------------------------------ loaders rebuilt


def collate(samples: list[int]) -> Tensor:
    return torch.tensor(samples) * 10


def test_options_of_the_loader_stay() -> None:
    def init(worker: int) -> None:
        return None

    loader = DataLoader(
        Numbers(8),
        2,
        num_workers=1,
        collate_fn=collate,
        timeout=30,
        worker_init_fn=init,
        prefetch_factor=3,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    (one,) = shard(loader, "reshuffle", 2, range(1), 0)
    for name in ("num_workers", "collate_fn", "timeout", "worker_init_fn", "prefetch_factor", "persistent_workers"):
        assert getattr(one, name) == getattr(loader, name), name
    assert one.multiprocessing_context.get_start_method() == "fork"
    assert values(one) == [[0, 20], [40, 60]]
    assert values(loader) == [[0, 10], [20, 30], [40, 50], [60, 70]]  # the user's own is untouched


class Named(DataLoader[Any]):
    """A loader of the user's own, with an argument of its own."""

    def __init__(self, name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.name = name


class Listed(DataLoader[Any]):
    """Takes some of torch's arguments by name, and no others."""

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        scale: float = 1.0,
        shuffle: bool = False,
        sampler: Any = None,
        batch_sampler: Any = None,
    ) -> None:
        super().__init__(dataset, batch_size, shuffle, sampler, batch_sampler)
        self.scale = scale


class Closed(DataLoader[Any]):
    """Makes everything itself, so nobody can give it another sampler."""

    def __init__(self, size: int) -> None:
        super().__init__(Numbers(size), batch_size=2)


class Recorder(L.LightningModule):
    """Keeps every batch that each replica trains on."""

    def __init__(self, make_loader: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.make_loader = make_loader
        self.seen: list[tuple[int, Any]] = []
        self.starts: list[int] = []  # of epochs

    def on_train_epoch_start(self) -> None:
        self.starts.append(len(self.seen))

    def train_dataloader(self) -> Any:
        return self.make_loader()

    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        replicas = self.trainer.strategy.replicas
        self.seen.append((replicas.first_replica + replicas.active, plain(batch)))
        return self.weight.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def plain(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {key: plain(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [plain(value) for value in batch]
    return batch.tolist() if isinstance(batch, Tensor) else batch


QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
}


def fit(rank: int, world: int, make: Any, *, trainer: dict[str, Any] | None = None, **strategy: Any) -> Any:
    """Train on a loader; returns the module and the trainer."""
    module = Recorder(make)
    options = {"max_epochs": 1, **QUIET, **(trainer or {})}
    plugins = [PoolEnvironment(rank, world)] if world > 1 else []
    strategy = {"sync_period": 2, "timeout": timedelta(seconds=20), **strategy}
    fitter = L.Trainer(devices=world, strategy=LocalSGDStrategy(**strategy), plugins=plugins, **options)
    fitter.fit(module)
    return module, fitter


def by_replica(module: Recorder) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for replica, batch in module.seen:
        found.setdefault(replica, []).append(batch)
    return found


@pytest.mark.parametrize(
    "make",
    [
        lambda: Named("mine", Numbers(8), batch_size=2),
        lambda: Named("mine", Numbers(8), 2, False),
        lambda: Named("mine", dataset=Numbers(8), batch_size=2),
        lambda: Listed(Numbers(8), 2, 3.0),
        lambda: Listed(Numbers(8), scale=3.0, batch_size=2),
    ],
)
def test_subclasses_of_the_loader(make: Any) -> None:
    """Made inside of a hook, where Lightning notes their arguments, and outside of it."""
    expected = {0: [[0, 2], [4, 6]], 1: [[1, 3], [5, 7]]}
    module, _ = fit(0, 1, make, replicas_per_device=2)
    assert by_replica(module) == expected
    assert everything(make(), 2) == [expected[0], expected[1]]


def test_own_attributes_of_subclasses_stay() -> None:
    found = []

    def make() -> Any:
        return Named("mine", Numbers(8), batch_size=2)

    class Look(L.Callback):
        def on_train_start(self, trainer: Any, *args: Any) -> None:
            found.extend((type(one), one.name) for one in trainer.train_dataloader.loaders)

    fit(0, 1, make, replicas_per_device=2, trainer={"callbacks": [Look()]})
    assert found == [(Named, "mine")] * 2


def test_a_loader_that_takes_no_sampler_is_refused() -> None:
    """Rather than that every replica silently trains on all of it."""
    with pytest.raises((MisconfigurationException, TypeError), match="Trying to inject parameters into the `Closed` instance"):
        fit(0, 1, lambda: Closed(8), replicas_per_device=2)


# --------------------------------------------------------------------------------------------------------- augmentation


def noise(workers: int, epoch: int = 0, start: int = 0, **options: Any) -> list[Any]:
    loader = DataLoader(Noisy(16), 2, shuffle=True, num_workers=workers, **options)
    (one,) = shard(loader, "reshuffle", 2, range(1), 3)
    batch_samplers(one)[0].start_at(epoch, start)
    return values(one)


def test_what_workers_draw_does_not_depend_on_their_number() -> None:
    one, two = noise(1), noise(2)
    assert one == two
    assert noise(2, epoch=1) != one
    draws = [value for batch in one for sample in batch for value in sample[1:]]
    assert len(set(draws)) == len(draws) == 8 * 3


def test_what_workers_draw_does_not_depend_on_where_training_was_resumed() -> None:
    assert noise(2, epoch=1, start=2) == noise(1, epoch=1)[2:]


def test_replicas_do_not_draw_the_same() -> None:
    loaders = shard(DataLoader(Noisy(16), 2, num_workers=1), "reshuffle", 2, range(2), 3)
    draws = [value for one in loaders for batch in values(one) for sample in batch for value in sample[1:]]
    assert len(set(draws)) == len(draws) == 16 * 3


def test_without_automatic_batching_workers_do_not_matter_either() -> None:
    def draw(workers: int) -> Any:
        (one,) = shard(DataLoader(Noisy(8), batch_size=None, num_workers=workers), "reshuffle", 2, range(1), 3)
        return values(one)

    assert draw(1) == draw(2)


def test_without_workers_each_replica_draws_from_its_own_stream() -> None:
    """The same in any layout, as `activate` switches the streams before each row is loaded."""

    def make() -> Any:
        return DataLoader(Noisy(8), 2)

    module, _ = fit(0, 1, make, replicas_per_device=2, trainer={"max_epochs": 2})
    drawn = by_replica(module)
    everything = [value for k in drawn for batch in drawn[k] for sample in batch for value in sample[1:]]
    assert len(set(everything)) == len(everything) == 2 * 8 * 3


def test_augmentation_in_ranks_is_that_in_rows(ranks: RankPool) -> None:
    def run(rank: int, world_size: int, m: int, workers: int) -> Any:
        L.seed_everything(3, verbose=False)
        options = {"max_epochs": 2}
        return by_replica(fit(rank, world_size, lambda: loader(workers), replicas_per_device=m, trainer=options)[0])

    def loader(workers: int) -> Any:
        return DataLoader(Noisy(8), 2, shuffle=True, num_workers=workers)

    for workers in (0, 1):
        (together,) = ranks.run(1, run, 2, workers, timeout=60)
        apart = ranks.run(2, run, 1, workers, timeout=60)
        assert {**apart[0], **apart[1]} == together
        assert sorted(together) == [0, 1]


# ------------------------------------------------------------------------------------------------------ several loaders


def test_a_dict_and_a_list_of_loaders() -> None:
    """Every replica has its own part of each; a shorter loader starts over without mixing up the replicas."""

    def pair(module: Recorder) -> None:
        found = by_replica(module)
        assert sorted(found) == [0, 1]
        for replica in (0, 1):
            batches = [list(b.values()) if isinstance(b, dict) else b for b in found[replica]]
            assert len(batches) == 4
            assert all(k % 2 == replica for long, short in batches for k in [*long, *short])
            assert flat([long for long, _ in batches]) == list(range(replica, 16, 2))
            assert flat([short for _, short in batches]) == [replica, replica + 2, replica + 4, replica + 6] * 2

    def loaders() -> list[Any]:
        return [DataLoader(Numbers(16), 2), DataLoader(Numbers(8), 2)]

    pair(fit(0, 1, lambda: dict(zip("ab", loaders(), strict=True)), replicas_per_device=2)[0])
    pair(fit(0, 1, loaders, replicas_per_device=2)[0])
    pair(fit(0, 1, lambda: CombinedLoader(loaders(), "max_size_cycle"), replicas_per_device=2)[0])


@pytest.mark.parametrize(("mode", "steps"), [("min_size", 2), ("max_size", 4)])
def test_other_modes_of_combined_loaders(mode: Any, steps: int) -> None:
    def make() -> Any:
        return CombinedLoader({"a": DataLoader(Numbers(16), 2), "b": DataLoader(Numbers(8), 2)}, mode)

    found = by_replica(fit(0, 1, make, replicas_per_device=2)[0])
    for replica in (0, 1):
        assert [batch["a"] for batch in found[replica]] == [[4 * k + replica, 4 * k + 2 + replica] for k in range(steps)]
        short = [[4 * k + replica, 4 * k + 2 + replica] for k in range(2)] + [None] * (steps - 2)
        assert [batch["b"] for batch in found[replica]] == short


def test_an_epoch_that_was_cut_short_leaves_nothing_behind() -> None:
    module, _ = fit(
        0,
        1,
        lambda: DataLoader(Numbers(16), 2),
        replicas_per_device=2,
        trainer={"max_epochs": 2, "limit_train_batches": 2},
    )
    assert by_replica(module) == {0: [[0, 2], [4, 6]] * 2, 1: [[1, 3], [5, 7]] * 2}


def test_reloaded_loaders() -> None:
    trainer = {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}
    module, _ = fit(0, 1, lambda: DataLoader(Numbers(8), 2), replicas_per_device=2, trainer=trainer)
    assert by_replica(module) == {0: [[0, 2], [4, 6]] * 3, 1: [[1, 3], [5, 7]] * 3}


# ---------------------------------------------------------------------------------------------------- the user's shards


class Stream(IterableDataset[int]):
    """A stream without a length."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size))


def test_uneven_loaders_of_the_users_end_together(ranks: RankPool) -> None:
    def run(rank: int, world_size: int) -> Any:
        options = {"max_epochs": 2, "use_distributed_sampler": False}
        module, trainer = fit(rank, world_size, lambda: DataLoader(Numbers(6 + 4 * rank), 2), trainer=options, sync_period=3)
        loader = trainer.train_dataloader
        return [batch for _, batch in module.seen], trainer.global_step, type(loader).__name__, module.weight.item()

    first, second = ranks.run(2, run, timeout=40)
    assert first[0] == second[0] == [[0, 1], [2, 3], [4, 5]] * 2
    assert first[1] == second[1] == 6
    assert second[2] == "TruncatedLoader"
    assert first[3] == second[3]


def test_loaders_without_a_length_end_together(ranks: RankPool) -> None:
    """Whoever runs out starts over, until the next round tells all that somebody has."""

    def run(rank: int, world_size: int, h: int) -> Any:
        size = 8 if rank == 0 else 100
        module, trainer = fit(rank, world_size, lambda: DataLoader(Stream(size), 2), trainer={"max_epochs": 2}, sync_period=h)
        batches = [batch for _, batch in module.seen]
        epochs = [batches[start:end] for start, end in zip(module.starts, [*module.starts[1:], None], strict=True)]
        return epochs, trainer.global_step, trainer.current_epoch, module.weight.item()

    for h in (1, 3):
        first, second = ranks.run(2, run, h, timeout=40)
        assert first[1:] == second[1:]
        assert first[2] == 2
        assert [len(epoch) for epoch in first[0]] == [len(epoch) for epoch in second[0]]
        assert sum(len(epoch) for epoch in first[0]) == first[1]
        for mine, others in zip(first[0], second[0], strict=True):
            # The four batches that there are, up to the round after the end was seen, and one that was loaded ahead.
            assert 4 <= len(mine) <= 4 + h + 1
            assert mine == ([[0, 1], [2, 3], [4, 5], [6, 7]] * 2)[: len(mine)]
            assert others == [[2 * k, 2 * k + 1] for k in range(len(others))]


def test_a_stream_of_one_rank_that_is_empty_is_an_error(ranks: RankPool) -> None:
    def run(rank: int, world_size: int) -> str:
        try:
            fit(rank, world_size, lambda: DataLoader(Stream(8 * rank), 2), timeout=timedelta(seconds=3))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    empty, other = ranks.run(2, run, timeout=30)
    assert "yields no batch" in empty
    assert other.startswith("CommunicationError: Rank 1"), other


def test_lengths_are_agreed_upon(ranks: RankPool) -> None:
    def run(rank: int, world_size: int) -> Any:
        c = Communicator(1, timeout=timedelta(seconds=20))
        same = DataLoader(Numbers(8), 2)
        mixed = DataLoader(Stream(4), 2) if rank else DataLoader(Numbers(4), 2)
        longer = DataLoader(Numbers(4 + 2 * rank), 2)
        found = agree_on_length(same, c) is same
        truncated = agree_on_length(longer, c)
        cycling = agree_on_length(mixed, c)
        kinds = type(truncated).__name__, len(truncated), values(truncated), type(cycling).__name__
        c.close()
        return found, kinds

    for found, kinds in ranks.run(2, run, timeout=40):
        assert found
        assert kinds == ("TruncatedLoader", 2, [[0, 1], [2, 3]], "CyclingLoader")


class Stateful(DataLoader[Any]):
    """Knows where it is, as torchdata's StatefulDataLoader does."""

    def state_dict(self) -> dict[str, int]:
        return {"at": 5}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("wrap", [lambda loader: TruncatedLoader(loader, 1), CyclingLoader])
def test_wrapped_loaders_keep_their_position(wrap: Any) -> None:
    from lightning.fabric.utilities.types import _Stateful

    loader = Stateful(Numbers(4))
    wrapped = wrap(loader)
    assert isinstance(wrapped, _Stateful)  # how Lightning finds those whose position it saves
    assert wrapped.state_dict() == {"at": 5}
    wrapped.load_state_dict({"at": 7})
    assert loader.at == 7
    assert not isinstance(wrap(DataLoader(Numbers(4))), _Stateful)


@pytest.mark.parametrize("in_batches", [False, True])
def test_a_distributed_sampler_of_the_users_is_left_alone(ranks: RankPool, in_batches: bool) -> None:
    def run(rank: int, world_size: int) -> Any:
        dataset = Numbers(8)

        def make() -> Any:
            sampler: Any = DistributedSampler(dataset, world_size, rank, shuffle=False)
            if in_batches:
                return DataLoader(dataset, batch_sampler=BatchSampler(sampler, 2, drop_last=False))
            return DataLoader(dataset, 2, sampler=sampler)

        module, trainer = fit(rank, world_size, make)
        return [batch for _, batch in module.seen], type(trainer.train_dataloader) is DataLoader

    assert ranks.run(2, run, timeout=40) == [([[0, 2], [4, 6]], True), ([[1, 3], [5, 7]], True)]


@pytest.mark.parametrize("in_batches", [False, True])
@pytest.mark.parametrize("wrap", [lambda loader: TruncatedLoader(loader, 1), CyclingLoader])
def test_samplers_of_wrapped_loaders_are_told_the_epoch(wrap: Any, in_batches: bool) -> None:
    sampler: Any = DistributedSampler(Numbers(4), 2, 0)
    loader = DataLoader(Numbers(4), batch_sampler=BatchSampler(sampler, 2, drop_last=False))
    if not in_batches:
        loader = DataLoader(Numbers(4), 2, sampler=sampler)
    _set_sampler_epoch(wrap(loader), 3)
    assert sampler.epoch == 3


def unseeded(dataset: Any, n: int) -> Any:
    """Divide a dataset at random, whenever it is asked to."""
    return np.array_split(np.random.default_rng().permutation(len(dataset)), n)


def of_rank(dataset: Any, n: int) -> Any:
    """Divide a dataset at random, by a stream that is another one on every rank."""
    return np.array_split(np.random.default_rng(dist.get_rank()).permutation(len(dataset)), n)


def test_a_function_that_divides_data_otherwise_when_it_is_called_again_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="divides the data otherwise each time it is called"):
        fit(0, 1, lambda: DataLoader(Numbers(16), 2), partition=unseeded, replicas_per_device=2)


@pytest.mark.parametrize(("size", "partition"), [(lambda rank: 16 + 8 * rank, "reshuffle"), (lambda rank: 16, of_rank)])
def test_data_that_ranks_divide_differently_is_refused(ranks: RankPool, size: Any, partition: Any) -> None:
    def run(rank: int, world_size: int) -> str:
        with pytest.raises(MisconfigurationException) as error:
            fit(rank, world_size, lambda: DataLoader(Numbers(size(rank)), 2), partition=partition)
        return str(error.value)

    sentence = "Rank 1 divides the data otherwise than rank 0: seed the partition, or give every rank the same dataset."
    assert ranks.run(2, run, timeout=40) == [sentence] * 2


def test_uneven_parts_of_one_dataset_are_not() -> None:
    lists = [[0, 1, 2], [3]]
    assert Shards(4, 2, lists=lists).division == Shards(4, 2, lists=[np.array(part) for part in lists]).division
    assert Shards(4, 2, lists=lists).division != Shards(4, 2, lists=[[0, 1], [2, 3]]).division


def test_several_replicas_on_a_rank_need_data_that_can_be_divided() -> None:
    cases: list[Any] = [
        (lambda: DataLoader(Stream(8), 2), {}),
        (lambda: [[1.0], [2.0]], {}),
        (lambda: DataLoader(Numbers(8), 2), {"use_distributed_sampler": False}),
    ]
    for make, trainer in cases:
        with pytest.raises(MisconfigurationException, match="strategy divides the training data itself"):
            fit(0, 1, make, replicas_per_device=2, trainer=trainer)


def test_a_partition_of_data_that_is_divided_elsewhere_is_refused(ranks: RankPool) -> None:
    def run(rank: int, world_size: int, kind: int) -> str:
        dataset = Numbers(8)
        cases: list[Any] = [
            (lambda: DataLoader(dataset, 2, sampler=DistributedSampler(dataset, world_size, rank)), {}),
            (lambda: DataLoader(Stream(8), 2), {}),
            (lambda: DataLoader(dataset, 2), {"use_distributed_sampler": False}),
        ]
        make, options = cases[kind]
        with pytest.raises(MisconfigurationException) as error:
            fit(rank, world_size, make, partition="fixed", trainer=options)
        return str(error.value)

    for kind in range(3):
        for text in ranks.run(2, run, kind, timeout=40):
            assert "`partition` divides a `DataLoader` over a map-style dataset" in text
            assert "leave `partition` out" in text


def test_one_replica_leaves_the_loader_alone() -> None:
    loader = DataLoader(TensorDataset(torch.arange(6.0)), 2, shuffle=True)
    module, trainer = fit(0, 1, lambda: loader, replicas_per_device=1)
    assert trainer.train_dataloader is loader
    assert len(module.seen) == 3


def test_validation_loaders_are_not_multiplied() -> None:
    class Validating(Recorder):
        def val_dataloader(self) -> Any:
            return DataLoader(Numbers(6), 2)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.validated.append(batch.tolist())

    module = Validating(lambda: DataLoader(Numbers(8), 2))
    module.validated = []
    trainer = L.Trainer(strategy=LocalSGDStrategy(replicas_per_device=2), max_epochs=1, num_sanity_val_steps=0, **QUIET)
    trainer.fit(module)
    assert module.validated == [[0, 1], [2, 3], [4, 5]]
