"""What cannot be right is refused before training starts, on every rank, in a sentence that says what to do."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as pl_callbacks
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_distopt  # noqa: F401  # registers the strategies' names
from lightning_distopt import CHOCO, ConstantWarmup, Dirichlet, GossipStrategy, LocalSGDStrategy
from tests.helpers import PoolEnvironment
from tests.pool import RankPool

QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


class Net(L.LightningModule):
    """Counts its training steps; what is wrong with it is up to the test."""

    def __init__(self, hidden: nn.Module | None = None, plateau: str = "", manual: bool = False) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.hidden = nn.Identity() if hidden is None else hidden
        self.head = nn.Linear(4, 2)
        self.plateau, self.steps = plateau, 0
        self.automatic_optimization = not manual

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        x, y = batch
        loss = nn.functional.mse_loss(self.head(self.hidden(self.body(x))), y)
        self.log("loss", loss)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        if not self.plateau:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        config = {"scheduler": scheduler, "interval": self.plateau, "monitor": "loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}


def data(size: int = 24) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(size, 4, generator=generator), torch.randn(size, 2, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=2)


def fit(
    module: L.LightningModule,
    strategy: Any = None,
    *,
    rank: int = 0,
    world: int = 1,
    ckpt_path: str | None = None,
    loader: Any = None,
    **trainer: Any,
) -> L.Trainer:
    if isinstance(strategy, dict):
        strategy = LocalSGDStrategy(**{"sync_period": 2, "timeout": timedelta(seconds=8), **strategy})
    plugins = [*trainer.pop("plugins", []), *([PoolEnvironment(rank, world)] if world > 1 else [])]
    options = {"max_steps": 3, "enable_checkpointing": False, **QUIET, **trainer}
    fitter = L.Trainer(strategy=strategy, devices=world, plugins=plugins, **options)
    fitter.fit(module, loader or data(), ckpt_path=ckpt_path)
    return fitter


def error_of(action: Callable[[], Any]) -> str:
    """The kind and the text of the error that an action raises, or nothing."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refused(module: L.LightningModule, strategy: Any = None, **options: Any) -> str:
    """The sentence with which a fit is refused; not one batch has been trained by then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = error_of(lambda: fit(module, strategy, **options))
    assert text, "was not refused"
    assert getattr(module, "steps", 0) == 0, "training had started"
    assert "\n" not in text, text
    assert len(text) < 450, text
    return text


# -------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("wrong", [0, -4, 2.5, "8", None, True, lambda step: 0, [4]])
def test_sync_period(wrong: Any) -> None:
    with pytest.raises(ValueError, match="`sync_period` must be a whole number of steps, at least 1"):
        LocalSGDStrategy(sync_period=wrong)


def test_sync_period_that_goes_wrong_later() -> None:
    """A schedule can't be checked for all steps; the sentence says at which it failed."""
    text = error_of(lambda: fit(Net(), {"sync_period": lambda step: 1 if step < 2 else 0, "replicas_per_device": 2}))
    assert re.search(r"ValueError: `sync_period` must be .* at step 2 it is 0", text), text


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2", True, None])
def test_replicas_per_device(wrong: Any) -> None:
    with pytest.raises(ValueError, match="`replicas_per_device` must be a whole number, at least 1; got"):
        LocalSGDStrategy(replicas_per_device=wrong)


@pytest.mark.parametrize("name", ["evaluate", "buffers", "optimizer_state"])
@pytest.mark.parametrize("wrong", ["mean", None, True, ["average"]])
def test_choices(name: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` must be one of '.*; got "):
        LocalSGDStrategy(**{name: wrong})


def test_blocks() -> None:
    with pytest.raises(ValueError, match="`block_size=2` makes blocks, so say with `block_period`"):
        LocalSGDStrategy(block_size=2)
    text = refused(Net(), {"block_size": 3, "block_period": 2, "replicas_per_device": 4})
    assert "`block_size=3` does not divide the 4 replicas" in text
    assert "use one of 1, 2, 4" in text
    text = refused(Net(), {"block_size": 8, "block_period": 2, "replicas_per_device": 4})
    assert "`block_size=8`" in text


def test_blocks_by_default_follow_nodes() -> None:
    trainer = fit(Net(), {"block_period": 2, "replicas_per_device": 2})
    assert trainer.strategy.algorithm.block_size == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("sync_perod", "did you mean `sync_period`"),
        ("replica_per_device", "did you mean `replicas_per_device`"),
        ("blocksize", "did you mean `block_size`"),
        ("find_unused_parameters", "pass `ddp_kwargs={'find_unused_parameters': ...}`"),
        ("static_graph", "ddp_kwargs"),
        ("gradient_as_bucket_view", "ddp_kwargs"),
        ("algorithm", "has no option `algorithm`"),
        ("process_group", "did you mean `process_group_backend`"),  # which `ddp_kwargs` does not take either
        ("xyzzy", "the options are sync_period, block_size"),
    ],
)
def test_unknown_options(name: str, hint: str) -> None:
    with pytest.raises(TypeError, match=rf"LocalSGDStrategy has no option `{name}`") as caught:
        LocalSGDStrategy(**{name: True})
    assert hint in str(caught.value)
    assert str(caught.value).count("no option") == 1
    assert not str(caught.value).endswith("?.")


def test_options_of_the_algorithm_and_of_ddp_in_a_strategy_that_does_not_have_them() -> None:
    with pytest.raises(TypeError, match=r"it is one of CHOCO, so pass `CHOCO\(compressor=\.\.\.\)`\.$"):
        GossipStrategy("choco", compressor="sign")
    with pytest.raises(TypeError, match="the options are algorithm, topology") as caught:
        GossipStrategy(xyzzy=1)
    assert "ddp_kwargs" not in str(caught.value)
    with pytest.raises(ValueError, match=r"GossipStrategy never averages gradients.*leave `ddp_kwargs` out\.$"):
        GossipStrategy(ddp_kwargs={"find_unused_parameters": True})


@pytest.mark.parametrize(
    ("algorithm", "sentence"),
    [
        (CHOCO, "CHOCO is a class: give an object of it, such as `CHOCO(compressor='top_k:0.01')`."),
        ("choco:sign", "The gossip algorithm 'choco:sign' is given by an object, such as `CHOCO("),
        ("chocco", "did you mean 'choco'"),
    ],
)
def test_algorithms_that_are_none(algorithm: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        GossipStrategy(algorithm)


@pytest.mark.parametrize("timeout", [60, "5 minutes", timedelta(0)])
def test_timeouts_that_are_none(timeout: Any) -> None:
    with pytest.raises(ValueError, match=r"`timeout` must be a `datetime.timedelta` above 0"):
        LocalSGDStrategy(timeout=timeout)
    LocalSGDStrategy(timeout=None)


def test_start_methods_that_there_are_not() -> None:
    with pytest.raises(ValueError, match=r"`start_method` must be one of 'popen', .*; got 'notebook'"):
        GossipStrategy(start_method="notebook")


@pytest.mark.parametrize("wrong", [{"find_unused_params": True}, {"process_group": None}, {"module": None}])
def test_unknown_options_of_ddp(ranks: RankPool, wrong: Any) -> None:
    """They would otherwise be noticed by the first step that averages gradients, perhaps hours later."""

    def run(rank: int, world_size: int) -> tuple[str, int]:
        module = Net()
        strategy = {"sync_period": lambda step: 2 if step < 2 else 1, "ddp_kwargs": wrong}
        return error_of(lambda: fit(module, strategy, rank=rank, world=world_size)), module.steps

    for text, steps in ranks.run(2, run, timeout=40):
        assert next(iter(wrong)) in text, text
        assert steps == 0


@pytest.mark.parametrize("wrong", ["idd", "Fixed", "", None, 3, True])
def test_unknown_partition(wrong: Any) -> None:
    with pytest.raises(ValueError, match="`partition") as caught:
        LocalSGDStrategy(partition=wrong)
    assert "index lists" in str(caught.value)


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        ([[0, 1], [2]], "gives 2 index lists, but there are 3 replicas"),
        ([[0], [], [1]], "gives replica 1 no sample"),
        ([[0], [24], [1]], "gives replica 1 the sample 24"),
        (lambda dataset, n: [[0]], "gives 1 index lists"),
    ],
)
def test_partition_that_does_not_fit(partition: Any, message: str) -> None:
    assert message in refused(Net(), {"partition": partition, "replicas_per_device": 3})


# -------------------------------------------------------------------------------------------------------------- modules


class Counting(torch.optim.SGD):
    """Keeps its own learning rate, from step to step, where all replicas of a process would see it."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["d"] = group.get("d", 1.0) * 1.1
        return super().step(closure)


class Counts(Net):
    def configure_optimizers(self) -> Any:
        return Counting(self.parameters(), lr=0.1)


@pytest.mark.parametrize("sync_period", [1, 2])
def test_optimizers_whose_groups_hold_state(sync_period: int) -> None:
    text = error_of(lambda: fit(Counts(), {"sync_period": sync_period, "replicas_per_device": 2}))
    assert "Counting keeps `d`, which changes with every step" in text
    assert not error_of(lambda: fit(Counts(), {"sync_period": sync_period}))


def test_half_precision_with_several_replicas() -> None:
    plugin = MixedPrecision("16-mixed", "cpu")
    text = refused(Net(), {"replicas_per_device": 2}, plugins=[plugin])
    assert "`precision='16-mixed'`" in text
    assert "`replicas_per_device=1`" in text
    assert "bf16-mixed" in text
    module = Net()
    fit(module, {"replicas_per_device": 2}, precision="bf16-mixed")
    assert module.steps == 6


def test_manual_optimization_with_several_replicas() -> None:
    text = refused(Net(manual=True), {"replicas_per_device": 2})
    assert "Manual optimization" in text
    assert "`replicas_per_device=1`" in text


@pytest.mark.parametrize("algorithm", ["gradient_tracking", "ef_sign", "quasi_global_adam"])
def test_manual_optimization_where_gradients_are_changed(algorithm: str) -> None:
    """Their gradients would not be there; the other algorithms train with it."""
    text = refused(Net(manual=True), GossipStrategy(algorithm))
    assert "changes gradients before the optimizer's step" in text
    assert "use automatic optimization" in text


def test_a_step_that_fetches_its_own_data_with_several_replicas() -> None:
    class Fetching(Net):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            return super().training_step(next(dataloader_iter)[0], 0)

    assert "`dataloader_iter`" in refused(Fetching(), {"replicas_per_device": 2})


def test_synchronised_batch_norm() -> None:
    """Asked for by the Trainer, or built into the module."""
    for m, text in (
        (2, refused(Net(), {"replicas_per_device": 2}, sync_batchnorm=True)),
        (2, refused(Net(nn.SyncBatchNorm(4)), {"replicas_per_device": 2})),
    ):
        assert "SyncBatchNorm" in text, m
        assert "`sync_batchnorm=False`" in text


def test_lazy_parameters() -> None:
    text = refused(Net(nn.LazyLinear(4)), {"replicas_per_device": 2})
    assert "`hidden.weight` is lazy" in text
    assert "run one batch through the module" in text
    text = refused(Net(nn.LazyBatchNorm1d(affine=False)), {"replicas_per_device": 2})
    assert "`hidden.running_mean` is lazy" in text


def test_nothing_to_train() -> None:
    module = Net()
    module.requires_grad_(False)
    text = refused(module, {"replicas_per_device": 2})
    assert "no trainable parameter" in text
    assert "`requires_grad=True`" in text


def test_callbacks_that_would_average_one_replica() -> None:
    callbacks: list[Any] = [pl_callbacks.StochasticWeightAveraging(swa_lrs=0.1)]
    if hasattr(pl_callbacks, "WeightAveraging"):
        callbacks.append(pl_callbacks.WeightAveraging())
    for callback in callbacks:
        text = refused(Net(), {"replicas_per_device": 2}, callbacks=[callback])
        assert f"The callback {type(callback).__name__} would average the weights of one of 2 replicas" in text
        assert "remove it" in text


def test_plateau_at_every_step() -> None:
    text = refused(Net(plateau="step"), {"replicas_per_device": 2})
    assert "`interval='epoch'`" in text
    module = Net(plateau="epoch")
    fit(module, {"replicas_per_device": 2}, max_steps=-1, max_epochs=1)
    assert module.steps == 12


def test_one_replica_may_do_all_of_it() -> None:
    """With `n = 1` the run is that of a single device, so nothing of this is in the way, and it is said."""
    module = Net(plateau="step")
    with pytest.warns(UserWarning, match="There is one replica, so nothing is communicated"):
        fit(Net(), {})
    fit(module, {}, callbacks=[pl_callbacks.StochasticWeightAveraging(swa_lrs=0.1)], max_steps=-1, max_epochs=1)
    assert module.steps == 12
    module = Net(manual=True)
    fit(module, {})
    assert module.steps == 3


# ----------------------------------------------------------------------------------------------------- on several ranks


def on_ranks(ranks: RankPool, world: int, make: Callable[[int], Any], strategy: Any = None, **trainer: Any) -> list[str]:
    """The sentence of every rank; none has trained, and none waited for another until its timeout."""

    def run(rank: int, world_size: int) -> tuple[str, int]:
        warnings.simplefilter("ignore")
        module = make(rank)
        options = strategy(rank) if callable(strategy) else strategy or {}
        text = error_of(lambda: fit(module, {**options}, rank=rank, world=world_size, **trainer))
        return text, module.steps

    texts = []
    for text, steps in ranks.run(world, run, timeout=60):
        assert text, "was not refused"
        assert steps == 0
        texts.append(text)
    return texts


@pytest.mark.parametrize("m", [1, 2])
def test_layouts_that_differ_between_ranks(ranks: RankPool, m: int) -> None:
    def frozen(rank: int) -> Net:
        module = Net(nn.Linear(4, 4))
        module.hidden.requires_grad_(rank != 1)
        return module

    def double(rank: int) -> Net:
        return Net(nn.Linear(4, 4)).double() if rank == 1 else Net(nn.Linear(4, 4))

    def wider(rank: int) -> Net:
        return Net(nn.Sequential(nn.Linear(4, 4 + rank), nn.Linear(4 + rank, 4)))

    def buffered(rank: int) -> Net:
        return Net(nn.BatchNorm1d(4, affine=False) if rank else None)

    def frozen_only(rank: int) -> Net:
        return Net(nn.Linear(4, 4 + rank).requires_grad_(False))

    for make in (frozen, double, wider, buffered, frozen_only):
        for text in on_ranks(ranks, 2, make, {"replicas_per_device": m}):
            assert "Rank 1 has another model or other strategy options than rank 0" in text, make.__name__


def test_options_that_differ_between_ranks(ranks: RankPool) -> None:
    options: list[Callable[[int], Any]] = [
        lambda rank: {"sync_period": 2 + rank},
        lambda rank: {"sync_period": ConstantWarmup(4, 10 + rank)},
        lambda rank: {"replicas_per_device": 1 + rank},
        lambda rank: {"average": "parameters" if rank else "auto"},
        lambda rank: {"partition": Dirichlet(0.5, seed=rank)},
        lambda rank: {"partition": "iid" if rank else "fixed"},
    ]
    for strategy in options:
        for text in on_ranks(ranks, 2, lambda rank: Net(), strategy):
            assert "Rank 1 has another model or other strategy options than rank 0" in text


def test_policies_that_differ_between_ranks(ranks: RankPool) -> None:
    """Policies at rounds are collectives: another one on some rank would be matched with something else, or hang."""
    options: list[Callable[[int], Any]] = [
        lambda rank: {"buffers": "average" if rank else "local"},
        lambda rank: {"optimizer_state": "average" if rank else "keep"},
        lambda rank: {"evaluate": "local" if rank else "average"},
    ]
    for strategy in options:
        for text in on_ranks(ranks, 2, lambda rank: Net(nn.BatchNorm1d(4)), strategy):
            assert "other strategy options than rank 0" in text


def test_schedules_may_be_any_function_on_any_rank(ranks: RankPool) -> None:
    """Functions have other addresses in other processes, which makes them no other options."""

    class Schedule:
        def __call__(self, step: int) -> int:
            return 2

    def run(rank: int, world_size: int) -> int:
        keep = [object() for _ in range(1000 * rank)]
        module = Net()
        fit(module, {"sync_period": Schedule()}, rank=rank, world=world_size)
        h = len(keep) * 0 + 2
        fit(module, {"sync_period": lambda step: h}, rank=rank, world=world_size)
        return module.steps

    assert ranks.run(2, run, timeout=40) == [6, 6]


def test_a_module_that_only_one_rank_refuses(ranks: RankPool) -> None:
    """It says why; the others fail as well and name it."""

    def nothing_to_train(rank: int) -> Net:
        module = Net()
        module.requires_grad_(rank == 0)
        return module

    def lazy(rank: int) -> Net:
        return Net(nn.LazyLinear(4) if rank else None)

    def synchronised(rank: int) -> Net:
        return Net(nn.SyncBatchNorm(4) if rank else nn.BatchNorm1d(4))

    for make, reason in ((nothing_to_train, "no trainable"), (lazy, "lazy"), (synchronised, "SyncBatchNorm")):
        here, there = on_ranks(ranks, 2, make, {"timeout": timedelta(seconds=3)})
        assert reason in there
        assert re.search(r"rank(\(s\))? 1", here), make.__name__


def test_values_that_differ_between_ranks_are_made_equal(ranks: RankPool) -> None:
    """Trained and frozen parameters in any memory format, and buffers of every replica, are those of replica 0."""

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            strategy: Any = trainer.strategy
            self.states = []
            for row in range(strategy.replicas_per_device):
                strategy.replicas.activate(row)
                self.states.append({name: value.clone() for name, value in module.state_dict().items()})
            strategy.replicas.activate(0)

    def run(rank: int, world_size: int, m: int) -> Any:
        torch.manual_seed(100 + rank)
        frozen = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last).requires_grad_(False)
        extra = nn.BatchNorm1d(4)
        extra.running_mean.normal_()  # type: ignore[union-attr]
        extra.num_batches_tracked.fill_(rank)  # type: ignore[union-attr]
        extra.register_buffer("flipped", torch.randn(2, 3).t())
        module, look = Net(extra), Look()
        module.frozen = frozen
        first = {name: value.clone() for name, value in module.state_dict().items()}
        fit(module, {"replicas_per_device": m}, rank=rank, world=world_size, callbacks=[look])
        return first, look.states

    for m in (1, 2):
        results = ranks.run(2, run, m, timeout=40)
        expected = results[0][0]
        assert not torch.equal(expected["frozen.weight"], results[1][0]["frozen.weight"])
        wrong = {
            (rank, row, name)
            for rank, (_, states) in enumerate(results)
            for row, state in enumerate(states)
            for name, value in state.items()
            if not torch.equal(value, expected[name])
        }
        assert not wrong, f"m={m}"


# --------------------------------------------------------------------------------------------------- the two Lightnings


def test_pytorch_lightning() -> None:
    """Its classes are others than those of `lightning`; each Trainer refuses what belongs to the other package."""
    other = pytest.importorskip("pytorch_lightning")

    class Other(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise AssertionError("training has started")

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    text = error_of(lambda: fit(Other(), {"replicas_per_device": 2}))
    assert "must be a `LightningModule`" in text
    text = error_of(lambda: other.Trainer(strategy=LocalSGDStrategy(), logger=False, accelerator="cpu", devices=1))
    assert "pytorch_lightning.strategies.Strategy" in text
    text = error_of(lambda: other.Trainer(strategy="local_sgd", logger=False, accelerator="cpu", devices=1))
    assert "local_sgd" in text


def test_a_model_that_is_none() -> None:
    text = error_of(lambda: fit(nn.Linear(4, 2), {"replicas_per_device": 2}))  # type: ignore[arg-type]
    assert "must be a `LightningModule`" in text


# ---------------------------------------------------------------------------------------------------------- checkpoints


class Start(L.Callback):
    """Notes where training starts, and what was loaded by then."""

    def __init__(self) -> None:
        self.rows = torch.empty(0)
        self.step = -1

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        strategy: Any = trainer.strategy
        self.rows, self.step = strategy.replica_parameters(), trainer.global_step


def saved(rank: int, world: int, m: int, path: str, hidden: bool = False, strategy: Any = None) -> Tensor:
    """Train for five steps of H = 4, and save in the middle of a round, by hand."""
    torch.manual_seed(3)
    saver = pl_callbacks.ModelCheckpoint(Path(path).parent, Path(path).stem, every_n_train_steps=5)
    module = Net(nn.Linear(4, 4) if hidden else None)
    options = {"sync_period": 4, "replicas_per_device": m, **(strategy or {})}
    fit(module, options, rank=rank, world=world, callbacks=[saver], enable_checkpointing=True, max_steps=5)
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def resumed(rank: int, world: int, m: int, path: str, hidden: bool = False) -> tuple[str, list[str], Start, Tensor, bool]:
    """Resume; returns the error, the warnings, where training started, the rows there, whether nothing was loaded."""
    torch.manual_seed(9 + rank)
    module, start = Net(nn.Linear(4, 4) if hidden else None), Start()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    options = {"sync_period": 4, "replicas_per_device": m}

    def run() -> None:
        fit(module, options, rank=rank, world=world, callbacks=[start], max_steps=7, ckpt_path=path)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        text = error_of(run)
    told = [str(w.message) for w in caught if "replicas" in str(w.message)]
    same = all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    return text, told, start, start.rows, same


@pytest.fixture(scope="module")
def checkpoint(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks."""
    path = tmp_path_factory.mktemp("saved") / "two.ckpt"
    ranks.run(2, saved, 1, str(path), timeout=40)
    assert sorted(p.name for p in path.parent.iterdir()) == ["two.ckpt", "two.ckpt.replicas"]
    return path


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of it to be spoilt."""
    shutil.copytree(checkpoint.parent, tmp_path / "copy")
    return tmp_path / "copy" / "two.ckpt"


def replica_file(path: Path, rank: int) -> Path:
    (file,) = Path(f"{path}.replicas").glob(f"*rank-{rank:05d}.ckpt")
    return file


def all_refuse(ranks: RankPool, path: Path, *words: str, m: int = 1, world: int = 2, hidden: bool = False) -> None:
    """Every rank says so, and the modules are what they were."""
    for text, _, start, _, untouched in ranks.run(world, resumed, m, str(path), hidden, timeout=40):
        for word in words:
            assert word in text, text
        assert start.step == -1, "training had started"
        assert untouched, "something was loaded"
        assert "CommunicationError" not in text


def test_a_good_checkpoint_is_resumed(ranks: RankPool, copied: Path) -> None:
    for text, told, start, _, _ in ranks.run(2, resumed, 1, str(copied), timeout=40):
        assert text == ""
        assert told == []
        assert start.step == 5


def test_a_truncated_checkpoint(ranks: RankPool, copied: Path) -> None:
    content = copied.read_bytes()
    for length in (0, 100, len(content) // 2, len(content) - 1):
        copied.write_bytes(content[:length])
        all_refuse(ranks, copied, "two.ckpt can't be read", "truncated", "Nothing of it was loaded")


def test_a_file_that_is_no_checkpoint(ranks: RankPool, copied: Path) -> None:
    for content in ({"weights": torch.ones(3)}, [1, 2], {"state_dict": {}}):
        torch.save(content, copied)
        all_refuse(ranks, copied, "two.ckpt", "no checkpoint")


def test_a_checkpoint_of_another_model(ranks: RankPool, copied: Path) -> None:
    all_refuse(ranks, copied, "hidden", hidden=True)


def test_a_truncated_replica_file(ranks: RankPool, copied: Path) -> None:
    for rank in (0, 1):
        file = replica_file(copied, rank)
        content = file.read_bytes()
        for length in (0, len(content) // 2):
            file.write_bytes(content[:length])
            all_refuse(ranks, copied, f"can't be resumed on rank {rank}", "truncated", "Nothing was loaded")
        file.write_bytes(content)


def test_a_missing_replica_file(ranks: RankPool, copied: Path) -> None:
    replica_file(copied, 1).unlink()
    all_refuse(ranks, copied, "can't be resumed on rank 1", "is missing", "load_from_checkpoint")
    shutil.rmtree(f"{copied}.replicas")
    all_refuse(ranks, copied, "can't be resumed on rank 0", "is missing")


def test_a_replica_file_of_another_checkpoint(ranks: RankPool, copied: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.ckpt"
    ranks.run(2, saved, 1, str(other), timeout=40)
    shutil.copy(replica_file(other, 1), replica_file(copied, 1))
    all_refuse(ranks, copied, "can't be resumed on rank 1", "belongs to another checkpoint")


def test_the_replica_file_of_another_rank(ranks: RankPool, copied: Path) -> None:
    """It has the right token, but holds other replicas."""
    shutil.copy(replica_file(copied, 0), replica_file(copied, 1))
    all_refuse(ranks, copied, "can't be resumed on rank 1")


def test_a_replica_file_that_is_none(ranks: RankPool, copied: Path) -> None:
    torch.save([1, 2, 3], replica_file(copied, 0))
    all_refuse(ranks, copied, "can't be resumed on rank 0")


def test_another_distribution_of_the_same_replicas(ranks: RankPool, copied: Path) -> None:
    all_refuse(ranks, copied, "saved with `replicas_per_device=1`", "same number of ranks", m=2, world=1)


@pytest.mark.parametrize(("world", "m"), [(3, 1), (1, 3), (2, 2)])
def test_another_number_of_replicas_starts_from_the_average(ranks: RankPool, copied: Path, world: int, m: int) -> None:
    """One warning says what happens, and training goes on from there."""
    weights = torch.load(copied, weights_only=True)["state_dict"]
    average = torch.cat([value.flatten() for value in weights.values()])
    results = ranks.run(world, resumed, m, str(copied), timeout=40)
    for text, _, start, rows, untouched in results:
        assert text == ""
        assert start.step == 5
        assert torch.equal(rows, average.expand(m, -1))
        assert not untouched
    told = [text for result in results for text in result[1] if "was saved with" in text]
    assert len(told) == 1  # rank 0 speaks for all
    assert f"saved with 2 replicas and is resumed with {world * m}" in told[0]
    assert "start from the average model" in told[0]


def test_another_number_of_replicas_keeps_the_step_of_the_schedule(ranks: RankPool, copied: Path) -> None:
    """H follows the step of training, which does not start over: a warm-up is not made a second time."""

    def run(rank: int, world_size: int, path: str) -> list[int]:
        asked = []

        def schedule(step: int) -> int:
            asked.append(step)
            return 1

        module = Net()
        fit(module, {"sync_period": schedule, "replicas_per_device": 2}, rank=rank, world=2, max_steps=7, ckpt_path=path)
        return asked

    for asked in ranks.run(2, run, str(copied), timeout=40):
        assert set(asked) - {0} <= {5, 6, 7}  # 0 is asked at construction
        assert 5 in asked


def test_a_checkpoint_of_another_strategy_is_a_start(ranks: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "plain.ckpt"
    module = Net()
    trainer = fit(module, "auto", max_steps=5)
    trainer.save_checkpoint(path)
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    for text, _, start, rows, _ in ranks.run(2, resumed, 1, str(path), timeout=40):
        assert text == ""
        assert start.step == 5
        assert torch.equal(rows[0], weights)


def test_a_missing_checkpoint(ranks: RankPool, tmp_path: Path) -> None:
    all_refuse(ranks, tmp_path / "nowhere.ckpt", "FileNotFoundError", "nowhere.ckpt")


# ------------------------------------------------------------------------------------------------------ after a refusal


def test_what_was_refused_can_be_corrected() -> None:
    """A refusal leaves neither the module nor the Trainer's objects spoilt."""
    module = Net()
    module.requires_grad_(False)
    assert error_of(lambda: fit(module, {"replicas_per_device": 2}))
    module.requires_grad_(True)
    fit(module, {"replicas_per_device": 2})
    assert module.steps == 6


def test_replicas_are_asked_for_outside_of_training() -> None:
    strategy = LocalSGDStrategy()
    with pytest.raises(RuntimeError, match=r"only while `trainer.fit` runs"):
        strategy.replica_parameters()
    with pytest.raises(RuntimeError, match=r"only while `trainer.fit` runs"), strategy.average_parameters():
        pass
    assert strategy.traffic.rounds == 0
