"""Partitioners: what each promises, where labels are found, a run on their parts, the command and the page."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from lightning_distopt import GossipStrategy, LocalSGDStrategy, cli
from lightning_distopt.data import (
    IID,
    PARTITIONERS,
    ByClass,
    ByKey,
    Dirichlet,
    ImageDataset,
    LabelShards,
    Partitioner,
    class_counts,
    effective_classes,
    labels_of,
    make_partitioner,
    total_variation,
)
from lightning_distopt.data.partition_report import partition
from lightning_distopt.data.shares import log_gamma, scale
from tests.conformance.problems import QUIET
from tests.helpers import PoolEnvironment
from tests.pool import RankPool

PAGE = Path(__file__).parents[2] / "docs" / "partition.md"


def labelled(labels: Any) -> TensorDataset:
    """A dataset with nothing but labels."""
    return TensorDataset(torch.as_tensor(labels))


def uneven(size: int = 997, classes: int = 10) -> np.ndarray:
    """Labels in a random order, class 0 twice as frequent as class 9."""
    rng = np.random.default_rng(0)
    frequency = np.linspace(2, 1, classes)
    return rng.choice(classes, size=size, p=frequency / frequency.sum())


LABELS = uneven()
KEYS = np.random.default_rng(1).integers(0, 60, len(LABELS))
ALL = [
    IID(),
    Dirichlet(10),
    Dirichlet(0.1),
    Dirichlet(1e-4),
    Dirichlet(0.5, over="classes"),
    Dirichlet(1, balanced=False),
    LabelShards(),
    LabelShards(3, seed=5),
    ByClass(),
    ByClass(10),
    ByKey(KEYS),
]


# ------------------------------------------------------------------------------------------------------- what all promise


@pytest.mark.parametrize("n", [1, 2, 7, 10])
@pytest.mark.parametrize("partitioner", ALL, ids=repr)
def test_every_sample_goes_to_one_replica(partitioner: Partitioner, n: int) -> None:
    lists = partitioner(labelled(LABELS), n)
    assert len(lists) == n
    assert all(part == sorted(part) and part for part in lists)
    assert sorted(k for part in lists for k in part) == list(range(len(LABELS)))
    assert {type(k) for part in lists for k in part} == {int}


@pytest.mark.parametrize("partitioner", ALL, ids=repr)
def test_it_follows_from_the_options_alone(partitioner: Partitioner) -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    first = partitioner(labelled(LABELS), 6)
    drawn = torch.rand(1).item(), random.random(), np.random.rand()
    assert partitioner(labelled(LABELS), 6) == first  # from other global streams
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == drawn
    if isinstance(partitioner, IID | Dirichlet | LabelShards):
        other = type(partitioner)(**{**vars(partitioner), "seed": 99})
        assert other(labelled(LABELS), 6) != first


@pytest.mark.parametrize("partitioner", [IID(), Dirichlet(10), Dirichlet(0.01), Dirichlet(0.1, over="classes"), LabelShards(1)])
@pytest.mark.parametrize("n", [3, 16, 64])
def test_replicas_have_equally_many_samples(partitioner: Partitioner, n: int) -> None:
    sizes = [len(part) for part in partitioner(labelled(LABELS), n)]
    assert max(sizes) - min(sizes) <= 1


def test_more_replicas_than_samples() -> None:
    with pytest.raises(ValueError, match="There are 6 replicas but only 5 samples"):
        IID()(labelled(range(5)), 6)


# --------------------------------------------------------------------------------------------------------------- Dirichlet


@pytest.mark.parametrize("alpha", [10, 1, 0.1])
@pytest.mark.parametrize("balanced", [True, False])
def test_shares_of_a_class_are_those_of_a_dirichlet_distribution(alpha: float, balanced: bool) -> None:
    # Of Dir(alpha 1_n), E sum_i q_i^2 = (alpha + 1) / (n alpha + 1). Many classes, so that equal sizes hardly matter.
    n, classes, size = 8, 200, 200
    shares = []
    for seed in range(3):
        data = labelled(np.arange(classes * size) % classes)
        shares.append(class_counts(data, Dirichlet(alpha, balanced=balanced, seed=seed)(data, n)) / size)
    found = (np.concatenate(shares, axis=1) ** 2).sum(axis=0).mean()
    assert found == pytest.approx((alpha + 1) / (n * alpha + 1), rel=0.05)


@pytest.mark.parametrize(("alpha", "largest"), [(100, 0.153), (10, 0.293), (1, 0.667), (0.1, 0.943)])
def test_mixtures_of_replicas_are_those_of_a_dirichlet_distribution(alpha: float, largest: float) -> None:
    # The mean of the largest component of Dir(alpha p), p = 1/10; many replicas, so that the classes' sizes hardly matter.
    n, size = 200, 200
    data = labelled(np.arange(n * size) % 10)
    counts = np.concatenate([class_counts(data, Dirichlet(alpha, over="classes", seed=s)(data, n)) for s in range(3)])
    assert (counts.max(axis=1) / size).mean() == pytest.approx(largest, abs=0.025)


def test_mixtures_follow_the_frequencies_of_classes() -> None:
    data = labelled(np.repeat([0, 1], [9000, 1000]))
    counts = class_counts(data, Dirichlet(2000, over="classes")(data, 10))
    assert counts[:, 1].min() > 70 and counts[:, 1].max() < 130
    few = class_counts(data, Dirichlet(1e-3, over="classes")(data, 10))
    assert sorted(few[:, 1].tolist()) == [0] * 9 + [1000]


def test_with_equal_classes_the_conventions_differ_by_their_number() -> None:
    data = labelled(np.arange(5000) % 10)
    assert Dirichlet(1, over="classes")(data, 16) == Dirichlet(0.1)(data, 16)


def test_a_large_alpha_is_iid_and_a_small_one_gives_a_class_each() -> None:
    data = labelled(np.arange(6000) % 6)
    for alpha in (1e9, 1e300):
        counts = class_counts(data, Dirichlet(alpha)(data, 6))
        assert abs(counts - 1000 / 6).max() < 2
    for alpha in (1e-3, 1e-9, 1e-300):  # shares far below the smallest float
        counts = class_counts(data, Dirichlet(alpha)(data, 6))
        assert sorted(counts.max(axis=1)) == [1000] * 6


def test_few_samples_of_many_classes_are_rounded_without_a_drift() -> None:
    # 500 classes of 13 samples each for 10 replicas: 1.3 on average, and not 13 of the last classes to who is short of them.
    data = labelled(np.arange(6500) % 500)
    counts = class_counts(data, Dirichlet(1e9)(data, 10))
    assert counts.min() >= 0 and counts.max() <= 3
    assert (counts.sum(axis=1) == 650).all()


def test_heterogeneity_grows_as_alpha_falls() -> None:
    data = labelled(np.arange(20_000) % 10)
    distances = []
    for alpha in (100, 10, 1, 0.1, 0.01):
        runs = [total_variation(class_counts(data, Dirichlet(alpha, seed=s)(data, 16))).mean() for s in range(5)]
        distances.append(np.mean(runs))
    assert distances == sorted(distances)
    assert distances[0] < 0.05 and distances[-1] > 0.8


def test_scaled_shares_have_the_sums_and_the_odds_ratios_of_what_was_drawn() -> None:
    # Which makes them the nearest in relative entropy.
    drawn = log_gamma(np.full((5, 4), 0.5), np.random.RandomState(0))
    rows, columns = np.array([30, 30, 20, 10, 10]) * 1000, np.array([40, 30, 20, 10]) * 1000
    scaled = scale(drawn, rows, columns)
    assert abs(np.exp(scaled).sum(axis=1) - rows).max() < 1
    assert abs(np.exp(scaled).sum(axis=0) - columns).max() < 1
    odds = [x[1:, 1:] + x[0, 0] - x[1:, :1] - x[:1, 1:] for x in (drawn, scaled)]
    np.testing.assert_allclose(odds[0], odds[1], atol=1e-9)


def test_sizes_that_follow_from_the_shares_have_a_least() -> None:
    data = labelled(LABELS)
    sizes = [len(part) for part in Dirichlet(0.5, balanced=False, seed=3)(data, 10)]
    least = [len(part) for part in Dirichlet(0.5, balanced=False, min_samples=30, seed=3)(data, 10)]
    assert min(sizes) < 30 <= min(least)
    assert max(least) - min(least) > 30
    with pytest.raises(ValueError, match=r"In 100 draws with `alpha=0\.01` one of 16 .* less than `min_samples=1`: use"):
        Dirichlet(0.01, balanced=False)(data, 16)
    with pytest.raises(ValueError, match="`min_samples=100` for 10 replicas is more than the 997 samples"):
        Dirichlet(1, min_samples=100)(data, 10)


def test_a_class_is_dealt_out_at_random() -> None:
    data = labelled([0] * 1000)
    (first, second) = Dirichlet(1)(data, 2)
    assert np.mean(first) == pytest.approx(np.mean(second), abs=60)  # not the first half and the second


# ---------------------------------------------------------------------------------------------------- shards, classes, keys


def test_label_shards_as_of_mcmahan() -> None:
    # Two of 200 shards of 300 for each of 100 clients; a shard lies within one class.
    labels = np.random.default_rng(0).permutation(np.arange(60_000) % 10)
    counts = class_counts(labelled(labels), LabelShards(2)(labelled(labels), 100))
    assert set(counts.flatten().tolist()) == {0, 300, 600}
    assert (counts.sum(axis=1) == 600).all()
    assert 1.7 < (counts > 0).sum(axis=1).mean() <= 2
    one = class_counts(labelled(labels), LabelShards(1)(labelled(labels), 10))
    assert sorted(one.argmax(axis=1)) == list(range(10)) and one.max() == 6000


def test_shards_that_do_not_fit_classes() -> None:
    lists = LabelShards(3)(labelled(LABELS), 4)
    order = np.argsort(LABELS, kind="stable").tolist()
    shards = np.array_split(order, 12)
    for part in lists:
        assert sum(set(shard) <= set(part) for shard in shards) == 3


def test_each_class_belongs_to_one_replica() -> None:
    counts = class_counts(labelled(LABELS), ByClass()(labelled(LABELS), 4))
    assert ((counts > 0).sum(axis=0) == 1).all()
    assert counts.sum(axis=1).max() - counts.sum(axis=1).min() <= counts.max()
    ten = class_counts(labelled(LABELS), ByClass()(labelled(LABELS), 10))
    assert ((ten > 0).sum(axis=1) == 1).all()


@pytest.mark.parametrize(("k", "n"), [(1, 10), (1, 16), (2, 16), (3, 4), (5, 7), (10, 3)])
def test_each_replica_has_so_many_classes(k: int, n: int) -> None:
    counts = class_counts(labelled(LABELS), ByClass(k)(labelled(LABELS), n))
    assert ((counts > 0).sum(axis=1) == k).all()
    owners = (counts > 0).sum(axis=0)
    assert owners.min() >= 1 and owners.max() - owners.min() <= 1
    for c in range(10):
        shared = counts[counts[:, c] > 0, c]
        assert shared.max() - shared.min() <= 1


class Spoken(Dataset[Any]):
    """Has an attribute that says who speaks, and a method that doesn't."""

    def __init__(self) -> None:
        self.speaker = [f"speaker {k}" for k in KEYS]

    def __len__(self) -> int:
        return len(self.speaker)

    def __getitem__(self, k: int) -> int:
        return k

    def speakers(self) -> None: ...


@pytest.mark.parametrize(
    "key",
    [KEYS, KEYS.tolist(), torch.tensor(KEYS), lambda k: KEYS[k], lambda k: torch.tensor(KEYS)[k], lambda k: [str(KEYS[k])]],
    ids=["array", "list", "tensor", "function", "function of tensors", "function of lists"],
)
def test_groups_are_not_split(key: Any) -> None:
    lists = ByKey(key)(labelled(LABELS), 7)
    seen = [set(KEYS[part].tolist()) for part in lists]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 60
    sizes = [len(part) for part in lists]
    assert max(sizes) - min(sizes) <= np.bincount(KEYS).max()
    assert lists == ByKey(KEYS)(labelled(LABELS), 7)


def test_a_key_by_its_name() -> None:
    assert make_partitioner("by_key:speaker")(Spoken(), 7) == ByKey(KEYS)(labelled(LABELS), 7)
    part = Subset(Spoken(), range(0, 900, 2))
    assert make_partitioner("by_key:speaker")(part, 3) == ByKey(KEYS[0:900:2])(part, 3)
    for name in ("speakers", "listener"):
        with pytest.raises(ValueError, match=f"The dataset has no `{name}`"):
            ByKey(name)(Spoken(), 2)
    for wrong in (3, None, ""):
        with pytest.raises(ValueError, match="`key` must be a sequence, a function"):
            ByKey(wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------------ labels


class Samples(Dataset[Any]):
    """Labels are nowhere but in the samples; reading one draws."""

    def __init__(self, samples: list[Any], **attributes: Any) -> None:
        self.samples = samples
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return [sample[index] for sample in self.samples]
        torch.rand(3)
        np.random.rand()
        return self.samples[index]


X, Y = torch.zeros(6, 2), [3, 1, 1, 0, 3, 2]
PAIRS = [(X[k], Y[k]) for k in range(6)]
IMAGES = ImageDataset(torch.zeros(6, 8, 8), torch.tensor(Y), 0, 1)
ROWS = [{"text": "...", "label": y} for y in Y]


@pytest.mark.parametrize(
    "dataset",
    [
        Samples([None] * 6, targets=Y),
        Samples([None] * 6, labels=torch.tensor(Y)),
        Samples([None] * 6, labels=np.array(Y)[:, None]),
        Samples([None] * 6, targets=[torch.tensor(y) for y in Y], labels=None),
        Samples([None] * 6, targets=None, labels=Y),
        Samples([None] * 6, targets=[float(y) for y in Y]),
        TensorDataset(X, torch.tensor(Y)),
        TensorDataset(X, X, torch.tensor(Y)),
        IMAGES,
        Subset(ImageDataset(torch.zeros(9, 8, 8), torch.tensor([9, *Y, 9, 9]), 0, 1), range(1, 7)),
        Subset(Subset(Samples(PAIRS + PAIRS, targets=[*Y, *Y]), range(2, 12)), range(4, 10)),
        ConcatDataset([Subset(IMAGES, [0, 1]), Samples([None] * 4, labels=Y[2:])]),
        ConcatDataset([Subset(IMAGES, [0, 1]), Samples(PAIRS[2:])]),
        Subset(Samples([*PAIRS, None]), range(6)),  # reads what it has alone
        Samples(ROWS, column_names=["text", "label"]),
        Samples(PAIRS),
        Samples(PAIRS, label=3),
        Samples([[x, torch.tensor([y])] for x, y in PAIRS]),
        Samples(ROWS),
        Samples([{"input": x, "targets": np.int64(y)} for x, y in PAIRS]),
    ],
    ids=lambda dataset: type(dataset).__name__,
)
def test_labels_are_found(dataset: Dataset[Any]) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    labels = labels_of(dataset)
    drawn = torch.rand(1).item(), np.random.rand()
    assert labels.tolist() == Y
    torch.manual_seed(0)
    np.random.seed(0)
    assert (torch.rand(1).item(), np.random.rand()) == drawn
    assert ByClass()(dataset, 2) == [[1, 2, 3], [0, 4, 5]]


def test_keys_are_found_where_labels_are() -> None:
    """Also in samples that are dictionaries, which are read without a draw from the global streams."""
    rows = Samples([{"x": torch.rand(2), "author": name} for name in ("ann", "bob", "ann", "cyd", "bob", "bob")])
    torch.manual_seed(0)
    assert make_partitioner("by_key:author")(rows, 2) == ByKey(["ann", "bob", "ann", "cyd", "bob", "bob"])(rows, 2)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn)
    assert ByClass(labels="author")(rows, 3) == [[1, 4, 5], [0, 2], [3]]
    assert ByKey("author")(Subset(rows, [5, 3, 0]), 3) == [[0], [1], [2]]
    for dataset, where in ((rows, "its samples have the keys `x`, `author`"), (Samples(PAIRS), "neither have its samples")):
        with pytest.raises(ValueError, match=f"The dataset has no `speaker`, and {where}: give a sequence as `key`."):
            ByKey("speaker")(dataset, 2)


def test_labels_by_hand_and_by_name() -> None:
    dataset = Samples([{"fine": y, "coarse": "odd" if y % 2 else "even"} for y in Y], column_names=["fine", "coarse"])
    assert labels_of(dataset, "fine").tolist() == Y
    assert labels_of(dataset, "coarse").tolist() == ["odd", "odd", "odd", "even", "odd", "even"]
    assert ByClass(labels="coarse")(dataset, 2) == [[0, 1, 2, 4], [3, 5]]
    assert labels_of(Samples(dataset.samples), "coarse").tolist()[0] == "odd"  # read from the samples
    assert ByClass(labels=[True, False] * 3)(dataset, 2) == [[1, 3, 5], [0, 2, 4]]
    # Not those that the dataset has.
    assert ByClass(labels=torch.tensor([0, 0, 0, 1, 1, 1]))(TensorDataset(X, torch.tensor(Y)), 2) == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("dataset", "labels", "sentence"),
    [
        (Samples([X[0]] * 6), None, "no `targets` or `labels` or `target` or `label`, and its samples are no pairs"),
        (Samples([(1, 2, 3)] * 6), None, "its samples are no pairs"),
        (Samples(ROWS), "genre", "no `genre`, and its samples have the keys `"),
        (Samples(PAIRS), "genre", "no `genre`, and neither have its samples"),
        (TensorDataset(X), None, "The labels of the dataset must be one number or name for each sample"),
        (TensorDataset(X, X), None, "The labels of the dataset must be one number or name for each sample"),
        (Samples([None] * 6, targets=[[1], [1, 2], [], [1], [1], [1]]), None, "must be one number or name for each sample"),
        (Samples([None] * 6, targets=[{"box": 1}] * 6), None, "must be one number or name for each sample"),
        (Samples([None] * 6, targets=Y[:5]), None, "The labels of the dataset are 5, but there are 6 samples"),
        (Samples(PAIRS), Y[:5], "`labels` are 5, but there are 6 samples"),
        (Samples(PAIRS), 3 * Y, "`labels` are 18, but there are 6 samples"),
        (Samples(PAIRS), [0.5, 1, 2, 3, 4, 5], "`labels` are fractions, which are no classes"),
        (Samples(PAIRS), [float("nan")] * 6, "`labels` are fractions, which are no classes"),
    ],
)
def test_labels_that_are_none(dataset: Dataset[Any], labels: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        Dirichlet(0.1, labels=labels)(dataset, 2)
    assert "give" in str(caught.value)


# ------------------------------------------------------------------------------------------------------------------- names


def test_names() -> None:
    assert {name: type(make_partitioner(name)) for name in ("iid", "shards", "by_class")} == {
        "iid": IID,
        "shards": LabelShards,
        "by_class": ByClass,
    }
    assert vars(make_partitioner("dirichlet:0.1")) == vars(Dirichlet(0.1))
    assert vars(make_partitioner("dirichlet:1e-2")) == vars(Dirichlet(0.01))
    assert vars(make_partitioner("shards:5")) == vars(LabelShards(5))
    assert vars(make_partitioner("by_class:2")) == vars(ByClass(2))
    assert make_partitioner("by_key:a:b").key == "a:b"  # type: ignore[attr-defined]
    own = Dirichlet(1)
    assert make_partitioner(own) is own


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("dirchlet:0.1", "There is no partitioner 'dirchlet' (did you mean 'dirichlet'?)"),
        ("xyzzy", "There is no partitioner 'xyzzy'; the names are iid, dirichlet, shards, by_class, by_key."),
        ("iid:3", "'iid' takes nothing after a colon"),
        ("dirichlet", "After the colon of 'dirichlet' stands its `alpha`, as in 'dirichlet:0.1'"),
        ("shards:two", "After the colon of 'shards' stands its `per_replica`, as in 'shards:2'"),
        ("by_key:", "After the colon of 'by_key' stands its `key`"),
    ],
)
def test_names_that_are_none(name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make_partitioner(name)
    with pytest.raises(ValueError, match=re.escape(f"`partition={name!r}`")):
        LocalSGDStrategy(partition=name)


# -------------------------------------------------------------------------------------------------------------- strategies


class Seen(L.LightningModule):
    """Notes which labels each replica of its rank trains on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 4)
        self.seen: dict[int, list[int]] = {}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        strategy: Any = self.trainer.strategy
        replica = self.global_rank * strategy.replicas_per_device + strategy.replicas.active
        self.seen.setdefault(replica, []).extend(y.tolist())
        return nn.functional.cross_entropy(self.layer(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(rank: int, world: int, m: int, partition: Any) -> dict[int, list[int]]:
    module = Seen()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=GossipStrategy(topology="ring", replicas_per_device=m, partition=partition),
        plugins=[PoolEnvironment(rank, world)] if world > 1 else [],
        max_epochs=2,
        enable_checkpointing=False,
        **QUIET,
    )
    y = torch.arange(80) % 4
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(80, 2), y), batch_size=5, shuffle=True))
    return module.seen


@pytest.mark.parametrize("layout", [(4, 1), (2, 2), (1, 4)], ids=str)
def test_replicas_train_on_their_classes_alone(ranks: RankPool, layout: tuple[int, int]) -> None:
    m, world = layout
    seen = {i: labels for part in ranks.run(world, run, m, "by_class") for i, labels in part.items()}
    assert sorted(seen) == [0, 1, 2, 3]
    for i, labels in seen.items():
        assert labels == [i] * 40  # 20 samples, two epochs


def test_replicas_keep_their_samples(ranks: RankPool) -> None:
    data = labelled(torch.arange(80) % 4)
    expected = class_counts(data, Dirichlet(0.3, seed=1)(data, 4))
    for m, world in ((4, 1), (1, 4)):
        seen = {i: labels for part in ranks.run(world, run, m, Dirichlet(0.3, seed=1)) for i, labels in part.items()}
        for i in range(4):
            assert np.bincount(seen[i], minlength=4).tolist() == (2 * expected[i]).tolist()
    assert total_variation(expected).mean() > 0.3


@pytest.mark.parametrize(
    "section", ["dirichlet:0.1", {"class_path": "Dirichlet", "init_args": {"alpha": 0.1, "seed": 3}}, [[0, 1], [2, 3]]]
)
def test_partitions_in_yaml(section: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    config = {
        "trainer": {
            "strategy": {"class_path": "LocalSGDStrategy", "init_args": {"replicas_per_device": 2, "partition": section}},
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 1,
            "enable_checkpointing": False,
            **QUIET,
        },
        "model": {
            "class_path": "ImageClassifier",
            "init_args": {"model": "lenet", "model_options": {"in_channels": 1, "image_size": 8}},
        },
        "data": {"class_path": "DigitsDataModule"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    trained = cli._CLI(["fit", "--config=config.yaml"])
    found = trained.trainer.strategy.partition  # type: ignore[attr-defined]
    assert found == section or (isinstance(found, Dirichlet) and (found.alpha, found.seed) == (0.1, 3))
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config=config.yaml", "--print_config"])
    written = yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"]["init_args"]["partition"]
    if isinstance(section, dict):
        assert written["init_args"].items() >= section["init_args"].items()
    else:
        assert written == section


# ----------------------------------------------------------------------------------------------------- command, figures, page


def test_figures_of_a_partition() -> None:
    counts = np.array([[10, 10, 0, 0], [0, 0, 20, 0], [10, 10, 0, 20]])
    assert effective_classes(counts).tolist() == pytest.approx([2, 1, np.exp(1.5 * np.log(2))])
    assert total_variation(counts).tolist() == pytest.approx([0.5, 0.75, 0.25])


def test_the_command(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    args = ["--replicas=2", "--data=DigitsDataModule", "--data.num_train=100", "--output=figures/it.png"]
    cli.main(["partition", "by_class, iid", *args])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ByClass(seed=0), 2 replicas, 100 samples of DigitsDataModule"
    assert lines[1].split() == ["replica", "samples", *map(str, range(10)), "classes", "distance"]
    first, second = (line.split() for line in lines[2:4])
    assert int(first[1]) + int(second[1]) == 100
    assert [(a == ".") != (b == ".") for a, b in zip(first[2:12], second[2:12], strict=True)] == [True] * 10
    assert float(first[13]) == pytest.approx(1 - int(first[1]) / 100, abs=1e-3)  # all that the other has is missing
    assert lines[8].startswith("IID(seed=0), 2 replicas")
    assert lines[-1] == "Written: figures/it.png"
    assert (tmp_path / "figures" / "it.png").read_bytes().startswith(b"\x89PNG")


class ManyClasses(L.LightningDataModule):
    """A hundred classes with names."""

    def train_dataloader(self) -> Any:
        return DataLoader(Samples([(0, f"class {k % 100}") for k in range(3000)]), 10)


class Streamed(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return [1, 2]


def test_the_command_on_data_of_ones_own(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partition("dirichlet:0.1", replicas=40, data=ManyClasses(), output=str(tmp_path / "figure.png"))
    text = capsys.readouterr().out
    assert "class 3" not in text  # no room for a hundred columns
    assert "75 to 75" in text and "of 100 in the mean" in text
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"`Streamed\.train_dataloader` must return a `DataLoader` over a map-style dataset"):
        partition("iid", data=Streamed())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    partition("iid", data=ManyClasses(), output=str(tmp_path / "none.png"))
    assert "pip install 'lightning-distopt[plot]'" in capsys.readouterr().out
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["partition", "dirichlt:0.1"], "There is no partitioner 'dirichlt' (did you mean 'dirichlet'?)"),
        (["partition", "dirichlet:-1"], "`alpha` of a Dirichlet distribution must be a number greater than 0; got -1.0."),
        (["partition", "iid", "--replicas=0"], "--replicas must be at least 1; got 0."),
        (["partition", "by_class", "--replicas=11", "--data=DigitsDataModule"], "There are 11 replicas but only 10 classes"),
        (["partition", "iid", "--data=DigitDataModule"], "did you mean `DigitsDataModule`?"),
    ],
)
def test_mistakes_are_one_sentence(args: list[str], sentence: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(args)
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err


def test_partitioners_are_listed(capsys: Any) -> None:
    cli.main(["partitioners"])
    assert set(re.findall(r"^(\w+)$", capsys.readouterr().out, re.MULTILINE)) == set(PARTITIONERS)
    cli.main(["partitioners", "dirichlet"])
    assert "alpha\n    concentration, greater than 0" in capsys.readouterr().out


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]


def test_the_table_of_the_page_is_what_its_snippet_prints(capsys: Any) -> None:
    page = PAGE.read_text()
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), {"__name__": "page"})
    printed = capsys.readouterr().out
    (table,) = re.findall(r"^\| `alpha` \|.*?(?=\n\n)", page, re.MULTILINE | re.DOTALL)
    assert [row.count("|") for row in table.splitlines()] == [row.count("|") for row in printed.splitlines()]
    assert numbers(table) == pytest.approx(numbers(printed), abs=0.011)  # the last digit may be rounded either way
    assert len(numbers(table)) == 5 + 20 + 8


def test_the_output_on_the_page_is_that_of_the_command(capsys: Any, tmp_path: Path) -> None:
    partition("dirichlet:0.1", replicas=16, output=str(tmp_path / "figure.png"))
    assert capsys.readouterr().out.partition("Written")[0] in PAGE.read_text()


def test_every_partitioner_is_on_the_page() -> None:
    named = re.findall(r'^\| `"(\w+)(?::[\w.]+)?"` / `(\w+)\(', PAGE.read_text(), re.MULTILINE)
    assert {name: cls.__name__ for name, cls in PARTITIONERS.items()} == dict(named)
