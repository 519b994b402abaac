"""What federated training can't be is refused in one sentence, before any client has trained."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from lightning_distopt import Dirichlet, FederatedStrategy, FedProx, OneBit, TrimmedMean
from lightning_distopt.federated import AGGREGATORS, Aggregator
from lightning_distopt.strategies.clients import Clients, warn_of_lone_samples
from tests.conformance.problems import QUIET
from tests.helpers import PoolEnvironment


class Net(L.LightningModule):
    """Counts its training steps; what is wrong with it is up to the test."""

    def __init__(self, hidden: nn.Module | None = None, optimizer: Any = torch.optim.SGD, manual: bool = False) -> None:
        super().__init__()
        self.body, self.hidden, self.head = nn.Linear(4, 4), hidden or nn.Identity(), nn.Linear(4, 2)
        self.optimizer, self.trained = optimizer, 0
        self.automatic_optimization = not manual

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.trained += 1
        return nn.functional.cross_entropy(self.head(self.hidden(self.body(batch[0]))), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))
        self.trained -= 1

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=0.1)


def dataset(size: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(size, 4, generator=generator), torch.arange(size) % 2)


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(dataset(), **{"batch_size": 2, **options})


def refused(
    module: L.LightningModule,
    data: Any = None,
    *,
    strategy: dict[str, Any] | None = None,
    validation: Any = None,
    rank: int = 0,
    world_size: int = 1,
    **trainer: Any,
) -> str:
    """Return the sentence with which a fit is refused; no client has trained by then."""
    plugins = [*trainer.pop("plugins", []), *([PoolEnvironment(rank, world_size)] if world_size > 1 else [])]
    options = {"accelerator": "cpu", "devices": world_size, "max_epochs": 2, "enable_checkpointing": False, **QUIET, **trainer}
    with warnings.catch_warnings(), pytest.raises(Exception) as caught:
        warnings.simplefilter("ignore")
        made = FederatedStrategy(**{"clients": 4, "fraction": 0.5, **(strategy or {})})
        L.Trainer(strategy=made, plugins=plugins, **options).fit(module, loader() if data is None else data, validation)
    assert getattr(module, "trained", 0) == 0, f"training had started: {caught.value}"
    text = f"{type(caught.value).__name__}: {caught.value}"
    assert type(caught.value).__name__ in ("ValueError", "TypeError", "MisconfigurationException"), text
    assert "\n" not in text
    assert len(text) < 450
    assert text.endswith(".")
    return text


# -------------------------------------------------------------------------------------------------------------- options
OUT_OF_RANGE = [
    *[
        ({name: wrong}, f"`{name}` must be a whole number, at least 1; got {wrong!r}.")
        for name in ("clients", "local_epochs", "local_steps")
        for wrong in (0, -3, 1.5, "8", True)
    ],
    *[({name: None}, f"`{name}` must be a whole number") for name in ("clients", "local_epochs")],
    *[
        ({"fraction": wrong}, f"must be above 0 and at most 1; got {wrong!r}.")
        for wrong in (0, -0.1, 1.01, float("nan"), float("inf"), "0.1", True, None)
    ],
    ({"clients": 9, "fraction": 0.1}, "`fraction=0.1` of 9 clients is less than one: nobody would train; use at least 0.111."),
    ({"clients": 1, "fraction": 0.5}, "use at least 1."),
    ({"local_epochs": 2, "local_steps": 5}, "`local_epochs` and `local_steps` both say how long clients train: give one"),
    *[
        ({name: wrong}, f"`{name}` must be one of '")
        for name in ("weighting", "optimizer_state", "buffers")
        for wrong in ("mean", None, 1, ["samples"])
    ],
    ({"buffers": "recalibrate"}, "`buffers` must be one of 'average', 'local'; got 'recalibrate'."),
    ({"optimizer_state": "average"}, "`optimizer_state` must be one of 'reset', 'keep'; got 'average'."),
    ({"partition": "reshuffle"}, "clients keep theirs: use 'iid'."),
    *[({"partition": wrong}, "`partition") for wrong in ("idd", "", None, 3, True)],
    *[({"partition": f"dirichlet:{alpha}"}, "alpha") for alpha in (0, -1, "nan", "x")],
    ({"ddp_kwargs": {"static_graph": True}}, "FederatedStrategy never averages gradients"),
    ({"aggregator": "fedavgg"}, "There is no aggregator 'fedavgg' (did you mean 'fedavg'?)"),
    ({"aggregator": "median of means"}, "There is no aggregator 'median of means': use 'fedavg', "),
    ({"aggregator": None}, "There is no aggregator None"),
    ({"aggregator": FedProx}, "FedProx is a class: give an object of it, such as `FedProx(mu=0.1)`."),
    *[({name: wrong}, "compressor") for name in ("uplink", "downlink") for wrong in ("top_q", 3)],
    *[({"replicas_per_device": wrong}, "`replicas_per_device` must be a whole number, at least 1") for wrong in (0, 1.5, "2")],
]


@pytest.mark.parametrize(("options", "sentence"), OUT_OF_RANGE, ids=lambda value: str(value)[:40])
def test_options_out_of_range(options, sentence):
    with pytest.raises((ValueError, TypeError)) as caught:
        FederatedStrategy(**options)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("partition", "what"),
    [
        (np.arange(10_000), "an array of shape (10000,) and type int64."),
        (torch.zeros(2, 3, 4), "an array of shape (2, 3, 4) and type torch.float32."),
        ({k: list(range(1000)) for k in range(100)}, "a dict: give `list(d.values())`."),
        ({"a", "b"}, "an object of type set."),
    ],
    ids=["array", "tensor", "dict", "set"],
)
def test_what_is_no_partition_is_not_printed_as_a_whole(partition, what):
    with pytest.raises(ValueError, match="`partition` must be a string, a partitioner") as caught:
        FederatedStrategy(partition=partition)
    assert str(caught.value).endswith(f"or index lists; got {what}")


@pytest.mark.parametrize(
    "partition",
    [
        np.arange(24).reshape(4, 6),
        torch.arange(24).reshape(4, 6),
        [range(6 * k, 6 * k + 6) for k in range(4)],
        [{6 * k + j for j in range(6)} for k in range(4)],
        [[torch.tensor(6 * k + j) for j in range(6)] for k in range(4)],
        lambda dataset, clients: torch.arange(len(dataset)).chunk(clients),
        lambda dataset, clients: tuple(np.arange(24, dtype=np.uint8).reshape(clients, 6)),
    ],
    ids=range(7),
)
def test_index_lists_of_any_kind(partition):
    clients = Clients(loader(), FederatedStrategy(partition=partition).partition, 4)
    assert [clients.of(k).tolist() for k in range(4)] == [list(range(6 * k, 6 * k + 6)) for k in range(4)]


def test_a_division_that_follows_from_a_seed():
    def partition(dataset: Any, clients: int) -> Any:
        return np.array_split(np.random.default_rng(3).permutation(len(dataset)), clients)

    assert Clients(loader(), partition, 4).division == Clients(loader(), partition, 4).division


@pytest.mark.parametrize("state_folder", [3, "", True])
def test_a_state_folder_that_is_none(state_folder):
    with pytest.raises(ValueError, match="`state_folder`"):
        FederatedStrategy(state_folder=state_folder)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("client", "did you mean `clients`?"),
        ("local_epoch", "did you mean `local_epochs`?"),
        ("evaluate", "has no option `evaluate`"),
        ("nonfinite", "has no option `nonfinite`"),
        ("algorithm", "has no option `algorithm`"),
        ("find_unused_parameters", "an option of torch's DDP, which is not used: leave it out"),
        ("xyzzy", "the options are aggregator, clients, fraction"),
    ],
)
def test_unknown_options(name, hint):
    with pytest.raises(TypeError, match=f"FederatedStrategy has no option `{name}`") as caught:
        FederatedStrategy(**{name: 1})
    assert hint in str(caught.value)


@pytest.mark.parametrize("alpha", [0, -0.5, float("nan")])
def test_alpha(alpha):
    with pytest.raises(ValueError, match="alpha"):
        FederatedStrategy(partition=Dirichlet(alpha))


@pytest.mark.parametrize("mu", [-1, float("nan"), float("inf"), "0.1", True, None])
def test_mu(mu):
    with pytest.raises(ValueError, match="`mu`, the proximal factor, must be a number, at least 0"):
        FedProx(mu)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_name_makes_an_aggregator_or_says_what_is_missing(name):
    try:
        made = FederatedStrategy(name).aggregator
    except ValueError as error:
        assert name == "feddf"
        assert "give them" in str(error)
    else:
        assert isinstance(made, Aggregator)


# ----------------------------------------------------------------------------------------------------------------- data
@pytest.mark.parametrize(
    ("partition", "sentence"),
    [
        ([[0, 1], [2], [3]], "gives 3 index lists, but there are 4 clients"),
        ([[0], [], [1], [2]], "gives client 1 no sample: use fewer clients"),
        ([[0], [24], [1], [2]], "gives client 1 the sample 24, but the dataset has only 24"),
        ([[0], [-1], [1], [2]], "gives client 1 the sample -1"),
        (lambda dataset, clients: [[0]] * 3, "gives 3 index lists"),
        (lambda dataset, clients: {k: [k] for k in range(clients)}, "give index lists; got a dict: give `list(d.values())`"),
        (lambda dataset, clients: ([k] for k in range(clients)), "give index lists; got an object of type generator"),
        ([[True] * 24] * 4, "gives client 0 values of type bool in place of samples: give indices, such as `np.flatnonzero"),
        (np.ones((4, 24), dtype=bool), "values of type bool"),
        (lambda dataset, clients: torch.eye(clients, 24) > 0, "values of type bool"),
        ([[0, 1], [0.5, 1.7], [2], [3]], "gives client 1 values of type float"),
        (lambda dataset, clients: np.ones((clients, 2)), "values of type float"),
        ([["1", "2"], ["3"], ["4"], ["5"]], "values of type str"),
        ([0, 1, 2, 3], "gives client 0 0 in place of samples"),
        ([[[0], [1]], [2], [3], [4]], "gives client 0 an object of type list in place"),
        (lambda dataset, clients: torch.randperm(len(dataset)).chunk(clients), "otherwise each time it is called"),
        (lambda dataset, clients: np.random.default_rng().permutation(24).reshape(clients, 6), "a stream with a seed"),
        ("by_class", "client"),
    ],
    ids=range(18),
)
def test_a_partition_that_does_not_fit(partition, sentence):
    strategy = {"partition": partition}
    if isinstance(partition, str):
        strategy |= {"clients": 40}
    assert sentence in refused(Net(), strategy=strategy)


def test_more_clients_than_samples():
    text = refused(Net(), strategy={"clients": 25})
    assert "client" in text
    assert "replica" not in text


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(dataset())


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (lambda: [loader(), loader()], "There are several training loaders, and clients get parts of one"),
        (lambda: {"a": loader(), "b": loader()}, "There are several training loaders"),
        (
            lambda: [loader()],
            "`train_dataloader` returns a list with one training loader in it: return that `DataLoader` itself",
        ),
        (lambda: DataLoader(Stream(), 2), "return one `DataLoader` over a map-style dataset"),
        (lambda: [dataset()[k] for k in range(8)], "return one `DataLoader` over a map-style dataset"),
        (lambda: loader(batch_size=None), "with a batch size"),
        (lambda: loader(sampler=SubsetRandomSampler(range(8))), "leave the sampler out"),
        (lambda: loader(sampler=WeightedRandomSampler([1.0] * 24, 24)), "leave the sampler out"),
        (lambda: DataLoader(dataset(), batch_sampler=[[0, 1], [2, 3]]), "without a batch sampler of yours"),
        (lambda: loader(batch_size=8, drop_last=True), "Client 0 has 6 samples, fewer than a batch of 8, and its loader drops"),
    ],
    ids=range(10),
)
def test_data_that_clients_cannot_have(data, sentence):
    assert sentence in refused(Net(), data())


# -------------------------------------------------------------------------------------------------- modules and Trainers
def test_manual_optimization():
    assert "which manual optimization can't: use automatic optimization." in refused(Net(manual=True))


def test_a_schedule_in_optimizer_step():
    class Warmup(Net):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)

    assert "schedules of clients go by round, so use a scheduler." in refused(Warmup())


def test_half_precision():
    text = refused(Net(), plugins=[MixedPrecision("16-mixed", "cpu")])
    assert "`precision='16-mixed'` scales losses" in text
    assert "use `precision='bf16-mixed'`" in text


@pytest.mark.parametrize("interval", [0.5, 3, 1])
def test_validation_inside_a_round(interval):
    text = refused(Net(), validation=loader(), val_check_interval=interval, limit_train_batches=3)
    assert f"`val_check_interval={interval}` would validate inside a round" in text
    assert "`check_val_every_n_epoch`, which counts rounds" in text


def test_accumulation_that_changes():
    assert "use `accumulate_grad_batches`" in refused(Net(), callbacks=[GradientAccumulationScheduler({0: 2})])


@pytest.mark.parametrize("world_size", [1, 2])
def test_optimizers_that_evaluate_several_times(ranks, world_size):
    def fit(rank: int, world_size: int) -> str:
        return refused(Net(optimizer=torch.optim.LBFGS), rank=rank, world_size=world_size)

    for text in ranks.run(world_size, fit):
        assert "LBFGS" in text


@pytest.mark.parametrize("world_size", [1, 2])
def test_batch_norm_over_ranks(ranks, world_size):
    def fit(rank: int, world_size: int) -> str:
        return refused(Net(nn.SyncBatchNorm(4)), rank=rank, world_size=world_size)

    for text in ranks.run(world_size, fit):
        assert "SyncBatchNorm" in text
        assert "BatchNorm or GroupNorm" in text


def test_several_optimizers():
    class Two(Net):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.body.parameters(), 0.1), torch.optim.SGD(self.head.parameters(), 0.1)]

    assert "multiple optimizers" in refused_by_lightning(Two())


def refused_by_lightning(module: L.LightningModule) -> str:
    trainer = L.Trainer(
        strategy=FederatedStrategy(clients=4, fraction=0.5),
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        enable_checkpointing=False,
        **QUIET,
    )
    with pytest.raises(RuntimeError) as caught:
        trainer.fit(module, loader())
    assert module.trained == 0  # type: ignore[union-attr]
    return str(caught.value)


def test_data_that_ranks_divide_differently(ranks):
    """Each rank would train its share of clients of its own, so some would be trained by nobody."""

    def fit(rank: int, world_size: int) -> str:
        def partition(dataset: Any, clients: int) -> Any:
            return np.array_split(np.random.default_rng(rank).permutation(len(dataset)), clients)

        return refused(Net(), strategy={"partition": partition}, rank=rank, world_size=world_size)

    for text in ranks.run(2, fit):
        assert "Rank 1 divides the data otherwise than rank 0: seed the partition" in text


def test_options_that_differ_between_ranks(ranks):
    def fit(rank: int, world_size: int, one: dict[str, Any], other: dict[str, Any]) -> str:
        return refused(Net(), strategy=other if rank else one, rank=rank, world_size=world_size)

    for one, other in (
        ({"clients": 4}, {"clients": 6}),
        ({"local_epochs": 1}, {"local_epochs": 2}),
        ({"aggregator": "fedprox"}, {"aggregator": FedProx(0.2)}),
        ({"aggregator": TrimmedMean(0.1)}, {"aggregator": TrimmedMean(0.2)}),
        ({"weighting": "samples"}, {"weighting": "uniform"}),
        ({"partition": "iid"}, {"partition": "dirichlet:1"}),
    ):
        for text in ranks.run(2, fit, one, other):
            assert "Rank 1 has another model or other strategy options than rank 0" in text


# ------------------------------------------------------------------------------------------------------------- warnings
def warned(module: L.LightningModule, data: Any = None, **strategy: Any) -> list[str]:
    """Return what a round of training warns about."""
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_checkpointing": False, **QUIET}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = FederatedStrategy(**{"clients": 4, "fraction": 1.0, **strategy})
        L.Trainer(strategy=made, **options).fit(module, loader() if data is None else data)
    return [str(warning.message) for warning in caught]


def batches_of_one(found: list[str]) -> list[str]:
    return [text for text in found if "has one sample" in text]


SIZES = [range(6), range(6, 11), range(11, 17), range(17, 24)]
"""Clients of 6, 5, 6 and 7 samples."""


@pytest.mark.parametrize(
    ("options", "clients"),
    [
        ({}, 2),
        ({"accumulate": 2}, 2),
        ({"steps": 3}, 1),  # the fourth client comes to its last batch in step 4
        ({"limit": 2}, 0),
        ({"drop_last": True}, 0),
        ({"drop_last": True, "full_pass": True}, 2),
        ({"batch_size": 3}, 1),
        ({"batch_size": 1}, 0),
    ],
    ids=str,
)
def test_clients_who_end_with_a_batch_of_one(options, clients):
    own = {name: options.pop(name) for name in ("batch_size", "drop_last") if name in options}
    full_pass = options.pop("full_pass", False)
    assert len(Clients(loader(**own), SIZES, 4, **options).ending_alone(full_pass)) == clients


def test_batch_norm_over_one_sample_is_warned_of():
    """Torch refuses it, but only in a round in which such a client takes part."""
    one = [range(6), range(6, 12), range(12, 18), range(18, 23)]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        warned(Net(nn.BatchNorm1d(4)), partition=one)
    with pytest.warns(UserWarning, match="The last batch of 1 of 4 clients, such as client 3, has one sample") as caught:
        clients = Clients(loader(), one, 4)
        warn_of_lone_samples(clients, Net(nn.BatchNorm1d(4)), full_pass=False)
    assert "use `drop_last=True`, or another batch size." in str(caught[0].message)
    assert not batches_of_one(warned(Net(nn.BatchNorm1d(4)), loader(drop_last=True), partition=one))
    assert not batches_of_one(warned(Net(nn.GroupNorm(2, 4)), partition=one))
    images = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.BatchNorm2d(1), nn.Flatten())
    assert not batches_of_one(warned(Net(images), partition=one))
    assert not batches_of_one(warned(Net(nn.BatchNorm1d(4).eval()), partition=one))


@pytest.mark.parametrize(
    ("aggregator", "clients", "cure"),
    [
        (TrimmedMean(), 4, "take at least `TrimmedMean(1 / 4)`, or more clients."),
        (OneBit(TrimmedMean(0.3)), 3, "take at least `TrimmedMean(1 / 3)`, or more clients."),
        (TrimmedMean(0.4), 2, "take at least 3 clients."),
        (TrimmedMean(1 / 3), 3, ""),
        (TrimmedMean(0.0), 4, ""),
        (TrimmedMean(), 10, ""),
    ],
    ids=str,
)
def test_a_trimmed_mean_that_trims_nobody_is_warned_of(aggregator, clients, cure):
    found = [text for text in warned(Net(), aggregator=aggregator, clients=clients) if "leaves out nobody" in text]
    assert len(found) == bool(cure)
    if found:
        assert found[0].endswith(cure)
        assert f"nobody of the {clients} clients of a round" in found[0]
