"""Masking in Lightning: what trains, what checkpoints hold, what is left afterwards, with every kind of strategy."""

from __future__ import annotations

import copy
import csv
import warnings
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as pl_callbacks
from lightning.pytorch.callbacks import Checkpoint, LearningRateFinder, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, TensorDataset

from lightning_distopt import FederatedStrategy, GossipStrategy, LocalSGDStrategy, LossLandscape
from lightning_distopt.callbacks import fit_callback
from lightning_distopt.callbacks.weight_masking import WeightMasking
from lightning_distopt.sparsity.masked_tasks import MaskedTasks
from lightning_distopt.sparsity.packed_masks import PackedMasks
from lightning_distopt.sparsity.weights import dense_weight
from tests.helpers import PoolEnvironment

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
STEPS = 8  # of an epoch, on one device


class Net(L.LightningModule):
    """A pretrained net; with dropout, a norm, a frozen layer, and a buffer whose name ends in `_mask`."""

    def __init__(self, fails_at: int | None = None, lr: float = 3e-3) -> None:
        super().__init__()
        self.fails_at, self.lr = fails_at, lr
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.first = nn.Linear(6, 12)
            self.norm = nn.LayerNorm(12)
            self.second = nn.Linear(12, 12, bias=False)
            self.third = nn.Linear(12, 12).requires_grad_(False)
            self.head = nn.Linear(12, 3)
        self.dropout = nn.Dropout(0.2)
        self.register_buffer("causal_mask", torch.ones(12, 12).tril())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(torch.relu(self.norm(self.first(x))))
        return self.head(torch.relu(self.third(self.second(x) @ self.causal_mask)))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step == self.fails_at:
            raise RuntimeError("out of luck")
        x, y = batch
        return nn.functional.cross_entropy(self(x.to(self.norm.weight.dtype)).float(), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("loss", nn.functional.cross_entropy(self(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


LAYERS = ["second", "third", "head"]


def masking(**options: Any) -> WeightMasking:
    return WeightMasking(**{"layers": LAYERS, "sparsity": 0.2, "head": ["head.*"], **options})


def loader(shuffle: bool = True) -> DataLoader:
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(STEPS * 4, 6, generator=generator)
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=4, shuffle=shuffle)


def one_batch() -> DataLoader:
    """Return a loader of one batch again and again: in the middle of an epoch, Lightning lets loaders start over."""
    x, y = next(iter(loader(shuffle=False)))
    return DataLoader(TensorDataset(x.repeat(STEPS, 1), y.repeat(STEPS)), batch_size=4)


def fit(
    module: L.LightningModule,
    *callbacks: L.Callback,
    data: DataLoader | None = None,
    ckpt_path: Any = None,
    validation: Any = None,
    seed: int = 1,
    **options: Any,
) -> L.Trainer:
    settings = {**QUIET, "enable_checkpointing": False, "max_epochs": 2, "accelerator": "cpu", "devices": 1, **options}
    settings["enable_checkpointing"] |= any(isinstance(callback, Checkpoint) for callback in callbacks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        L.seed_everything(seed, verbose=False)
        trainer = L.Trainer(callbacks=list(callbacks), **settings)
        trainer.fit(module, data or loader(), validation, ckpt_path=ckpt_path)
    return trainer


def equal(a: Any, b: Any) -> bool:
    a, b = (x.state_dict() if isinstance(x, nn.Module) else x for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_masks(a: WeightMasking, b: WeightMasking) -> bool:
    return all(torch.equal(bits, b.masks.bits[name]) for name, bits in a.masks.bits.items()) and equal(
        a.state_dict()["scores"], b.state_dict()["scores"]
    )


# ------------------------------------------------------------------------------------------------------------- training


class Watch(L.Callback):
    """Looks at the module while it trains."""

    def __init__(self) -> None:
        self.trained: set[str] = set()
        self.gradients: set[str] = set()

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self.trained = {name for name, p in module.named_parameters() if p.requires_grad}
        self.gradients = {name for name, p in module.named_parameters() if p.grad is not None}


def test_only_scores_are_trained_and_the_module_is_plain_afterwards() -> None:
    module, callback, watch = Net(), masking(), Watch()
    before = copy.deepcopy(module.state_dict())
    required = {name: p.requires_grad for name, p in module.named_parameters()}
    identities = {name: id(p) for name, p in module.named_parameters()}
    trainer = fit(module, callback, watch)
    assert watch.trained == watch.gradients == {f"{name}.parametrizations.weight.0.scores" for name in LAYERS}
    assert type(module) is Net and list(module.state_dict()) == list(before)
    assert not any(parametrize.is_parametrized(each) for each in module.modules())
    assert {name: p.requires_grad for name, p in module.named_parameters()} == required
    assert {name: id(p) for name, p in module.named_parameters()} == identities
    assert not {"teardown", "lightning_module_state_dict"} & vars(trainer.strategy).keys()
    after, changed = module.state_dict(), 0
    for name, value in before.items():
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in LAYERS:
            mask = callback.masks.masks(layer)
            assert torch.equal(after[name], value * mask)
            changed += int((mask != callback.initial_masks.masks(layer)).sum())
        else:
            assert torch.equal(after[name], value)
    assert changed > 20
    callback.restore(module)
    assert equal(module, before)


def test_training_equals_that_by_hand() -> None:
    module, callback = Net(), masking()
    fit(module, callback, max_epochs=1)
    other = Net()
    hand = masking()
    L.seed_everything(1, verbose=False)
    hand.setup(L.Trainer(**QUIET, accelerator="cpu", enable_checkpointing=False), other, "fit")
    optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=3e-3)
    for x, y in loader():
        optimizer.zero_grad()
        nn.functional.cross_entropy(other(x), y).backward()
        optimizer.step()
    assert equal(
        {name: other.get_submodule(name).weight for name in LAYERS}, {n: module.get_submodule(n).weight for n in LAYERS}
    )


def test_masks_do_not_depend_on_the_global_seed() -> None:
    callbacks = [masking(), masking(), masking(seed=5)]
    for seed, callback in enumerate(callbacks):
        fit(Net(), callback, max_epochs=1, limit_train_batches=1, seed=seed)
    first, second, other = ({n: c.initial_masks.masks(n) for n in LAYERS} for c in callbacks)
    assert equal(first, second) and not any(torch.equal(first[name], other[name]) for name in LAYERS)
    assert not torch.equal(first["second"], first["third"])  # layers of one shape


def test_it_logs_at_lightnings_interval(tmp_path) -> None:
    callback = masking()
    logger = CSVLogger(tmp_path)
    fit(Net(), callback, max_epochs=1, logger=logger, log_every_n_steps=4)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        shown = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    assert [row["step"] for row in shown] == [3, 7]
    changed = sum(int((callback.masks.masks(n) != callback.initial_masks.masks(n)).sum()) for n in LAYERS)
    assert shown[-1]["masking/changed"] == pytest.approx(changed / (2 * 144 + 36), abs=1e-6) and changed
    assert shown[-1]["masking/sparsity"] == pytest.approx(callback.masks.sparsity, abs=1e-6)


def test_layers_made_in_configure_model() -> None:
    class Late(Net):
        def configure_model(self) -> None:
            if not hasattr(self, "late"):
                self.late = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.late(super().forward(x))

    module, callback = Late(), masking(layers=["late"], head=["late.*"])
    fit(module, callback)
    assert list(callback.masks.bits) == ["late"] and set(callback.masks.head) == {"late.weight", "late.bias"}


def test_the_learning_rate_finder() -> None:
    module, callback = Net(), masking()
    before = copy.deepcopy(module.state_dict())
    fit(module, callback, LearningRateFinder(num_training_steps=30, update_attr=True))
    assert module.lr != 3e-3
    callback.restore(module)
    assert equal(module, before)


def test_a_tuner_leaves_the_module_as_it_was() -> None:
    module, callback = Net(), masking()
    before = copy.deepcopy(module.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(**QUIET, accelerator="cpu", enable_checkpointing=False, max_epochs=2, callbacks=[callback])
        Tuner(trainer).lr_find(module, loader(), num_training=30)
    assert module.lr != 3e-3 and equal(module, before) and callback.masks is None
    trainer.fit(module, loader())
    callback.restore(module)
    assert equal(module, before)


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_are_those_of_the_plain_module(tmp_path, weights_only: bool) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_weights_only=weights_only, every_n_train_steps=4, save_top_k=-1)
    module = Net()
    fit(module, masking(), saver, max_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        last, middle = (Net.load_from_checkpoint(tmp_path / f"step={step}.ckpt", map_location="cpu") for step in (8, 4))
    assert equal(last, module) and not equal(middle, module)


def test_every_epoch_validates_the_masked_model() -> None:
    module, callback = Net(), masking()
    trainer = fit(module, callback, validation=loader(shuffle=False))
    loss = trainer.callback_metrics["loss"]
    assert trainer.validate(module, loader(shuffle=False), verbose=False)[0]["loss"] == pytest.approx(loss.item(), abs=1e-6)


def steady() -> Net:
    """Return a module that draws no random numbers, which Lightning does not restore."""
    net = Net()
    net.dropout.p = 0.0
    return net


@pytest.mark.parametrize("step", [3, 8, 11])
def test_a_resume_is_exact(tmp_path, step: int) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    module, whole = steady(), masking()
    fit(module, whole, saver, data=one_batch())
    resumed, callback = steady(), masking(seed=9)  # the initial masks are the checkpoint's,
    for layer in LAYERS:
        nn.init.zeros_(resumed.get_submodule(layer).weight)  # and so are the weights
    trainer = fit(resumed, callback, data=one_batch(), ckpt_path=tmp_path / f"step={step}.ckpt")
    assert trainer.global_step == 2 * STEPS
    assert equal(module, resumed) and same_masks(whole, callback)
    assert equal(callback.initial_masks.bits, whole.initial_masks.bits)
    callback.restore(resumed)
    assert equal(resumed, Net())


def test_a_checkpoint_after_training_resumes(tmp_path) -> None:
    whole, first, second = masking(), masking(), masking()
    net, module, resumed = steady(), steady(), steady()
    fit(net, whole, data=one_batch())
    fit(module, first, data=one_batch(), max_epochs=1).save_checkpoint(tmp_path / "after.ckpt")
    assert equal(torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"], module)
    fit(resumed, second, data=one_batch(), ckpt_path=tmp_path / "after.ckpt")
    assert equal(resumed, net) and same_masks(whole, second)


def test_a_checkpoint_of_the_end_gives_the_same_model(tmp_path) -> None:
    module, first, other, second = Net(), masking(), Net(), masking()
    fit(module, first, ModelCheckpoint(tmp_path, "end"))
    trainer = fit(other, second, ckpt_path=tmp_path / "end.ckpt")  # there is nothing left to train
    assert trainer.global_step == 2 * STEPS and equal(module, other) and same_masks(first, second)


def test_a_plain_checkpoint_starts_masks_over_its_weights(tmp_path) -> None:
    other = Net()
    nn.init.normal_(other.second.weight)
    saver = ModelCheckpoint(tmp_path, filename="plain")
    fit(other, saver, max_epochs=1)
    module, callback = Net(), masking()
    with pytest.raises(ValueError, match="optimizer"):  # whose optimizer has other parameters
        fit(module, callback, ckpt_path=tmp_path / "plain.ckpt", max_epochs=2)
    assert equal(list_of(module), list_of(other))


def list_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in module.named_parameters() if "norm" not in name}


def test_a_checkpoint_of_other_layers_is_refused(tmp_path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="one")
    fit(Net(), masking(), saver, max_epochs=1)
    with pytest.raises(MisconfigurationException, match="other layers, of which `third` is the first"):
        fit(Net(), masking(layers=["second", "head"]), ckpt_path=tmp_path / "one.ckpt")


# ----------------------------------------------------------------------------------------------------------- exceptions


def test_after_an_exception_the_module_is_the_pretrained_one(tmp_path) -> None:
    module, callback = Net(fails_at=11), masking(path=tmp_path / "masks.pt")
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(module, callback, OnExceptionCheckpoint(tmp_path, "failed"))
    assert equal(module, before) and not parametrize.is_parametrized(module.second)
    assert [p.requires_grad for p in module.third.parameters()] == [False, False] and module.first.weight.requires_grad
    assert callback.masks is None and not (tmp_path / "masks.pt").exists()
    with pytest.raises(RuntimeError, match="no weights to restore"):
        callback.restore(module)
    saved = Net.load_from_checkpoint(tmp_path / "failed.ckpt")  # of the plain, masked module
    assert not equal(saved, before)
    assert torch.equal(saved.second.weight[saved.second.weight != 0], before["second.weight"][saved.second.weight != 0])
    module.fails_at = None
    trainer = fit(module, callback, ckpt_path=tmp_path / "failed.ckpt")
    assert trainer.global_step == 16 and callback.masks is not None and (tmp_path / "masks.pt").exists()
    callback.restore(module)
    assert equal(module, before)


def test_a_failure_of_another_callback_leaves_nothing() -> None:
    class Fails(L.Callback):
        def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
            raise RuntimeError("not today")

    module, callback = Net(), masking()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match="not today"):
        fit(module, callback, Fails())
    assert equal(module, before) and module.second.weight.requires_grad
    fit(module, callback)
    assert callback.masks is not None


def test_two_fits_with_one_callback() -> None:
    callback, modules = masking(), [Net(), Net()]
    for module in modules:
        fit(module, callback)
    assert equal(*modules)
    callback.restore(modules[1])
    assert equal(modules[1], Net())


# ----------------------------------------------------------------------------------------------------------- mask files


def test_the_file_of_a_task(tmp_path) -> None:
    module, callback = Net(), masking(path=str(tmp_path / "tasks" / "a.pt"))
    nn.init.normal_(module.head.weight)  # of this task alone
    fit(module, callback)
    base, x = Net(), torch.randn(5, 6)
    tasks = MaskedTasks(base)
    tasks.add("a", tmp_path / "tasks" / "a.pt")
    for net in (base, module):
        net.eval()
    with tasks.using("a"):
        assert torch.equal(base(x), module(x))
    assert equal(base, Net())
    loaded = PackedMasks.load(tmp_path / "tasks" / "a.pt")
    assert sum(bits.numel() for bits in loaded.bits.values()) == 18 + 18 + 5
    assert set(loaded.head) == {"head.weight", "head.bias"} and equal(loaded.head, callback.masks.head)


class Normed(Net):
    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__(fails_at)
        self.norm = nn.BatchNorm1d(12)


def test_running_statistics_belong_to_the_task() -> None:
    module, callback, x = Normed(), masking(), torch.randn(5, 6)
    fit(module, callback)
    assert set(callback.masks.head) - {"head.weight", "head.bias"} == {
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    base = Normed().eval()
    tasks = MaskedTasks(base)
    tasks.add("a", callback.masks)
    with tasks.using("a"):
        assert torch.equal(base(x), module.eval()(x))
    assert equal(base, Normed())
    callback.restore(module)
    assert equal(module, Normed())
    failing = Normed(fails_at=3)
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(failing, masking())
    assert equal(failing, Normed())


# ------------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: str) -> None:
    module, callback = Net(), masking()
    fit(module, callback, precision=precision)
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert module.second.weight.dtype == dtype
    assert all(scores.dtype == torch.float32 for scores in callback.state_dict()["scores"].values())
    for name in LAYERS:
        mask, pretrained = callback.masks.masks(name), Net().get_submodule(name).weight.to(dtype)
        assert torch.equal(module.get_submodule(name).weight, pretrained * mask)
        assert not torch.equal(mask, callback.initial_masks.masks(name))
    callback.restore(module)
    assert equal(module, Net().to(dtype))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precisions_resume(tmp_path, precision: str) -> None:
    module, whole, resumed, callback = steady(), masking(), steady(), masking()
    fit(
        module,
        whole,
        ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1),
        data=one_batch(),
        precision=precision,
    )
    fit(resumed, callback, data=one_batch(), precision=precision, ckpt_path=tmp_path / "step=5.ckpt")
    assert equal(module, resumed) and same_masks(whole, callback)


# ----------------------------------------------------------------------------------------------------------- strategies

STRATEGIES = {
    "ddp": lambda env: L.pytorch.strategies.DDPStrategy(cluster_environment=env),
    "local_sgd": lambda env: LocalSGDStrategy(sync_period=3, cluster_environment=env),
    "local_sgd_replicas": lambda env: LocalSGDStrategy(sync_period=3, replicas_per_device=2, cluster_environment=env),
    "gossip": lambda env: GossipStrategy(topology="ring", replicas_per_device=2, cluster_environment=env),
}


def run(rank: int, world_size: int, name: str, folder: str, ckpt_path: str | None = None) -> dict[str, Any]:
    """Train on a rank; returns what is left, and the average of the replicas while training."""
    strategy = STRATEGIES[name](PoolEnvironment(rank, world_size) if world_size > 1 else None)
    module, callback = steady() if name == "ddp" else Net(), masking(path=f"{folder}/masks.pt")
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    options = {"strategy": strategy, "devices": world_size}
    trainer = fit(module, callback, *([] if ckpt_path else [saver]), ckpt_path=ckpt_path, **options)
    return {
        "state": module.state_dict(),
        "scores": callback.state_dict()["scores"],
        "bits": callback.masks.bits,
        "initial": callback.initial_masks.bits,
        "steps": trainer.global_step,
    }


@pytest.mark.parametrize(
    ("name", "world_size"), [("ddp", 2), ("local_sgd", 2), ("local_sgd_replicas", 1), ("local_sgd_replicas", 2), ("gossip", 1)]
)
def test_strategies(ranks, tmp_path, name: str, world_size: int) -> None:
    results = ranks.run(world_size, run, name, str(tmp_path))
    first = results[0]
    assert all(equal(result[key], first[key]) for result in results for key in ("state", "scores", "bits", "initial"))
    steps = first["steps"]
    pretrained = Net().state_dict()
    assert not all(torch.equal(first["bits"][layer], first["initial"][layer]) for layer in LAYERS)
    masks = PackedMasks.load(tmp_path / "masks.pt")
    assert equal(masks.bits, first["bits"])
    for layer in LAYERS:
        assert torch.equal(first["state"][f"{layer}.weight"], pretrained[f"{layer}.weight"] * masks.masks(layer))
    # The last checkpoint is that of the plain module, with the mask of the average scores.
    assert equal(torch.load(tmp_path / f"step={steps}.ckpt", weights_only=True)["state_dict"], first["state"])
    # What is resumed ends as what was never stopped: with rounds from the middle of one.
    resumed = ranks.run(world_size, run, name, str(tmp_path), str(tmp_path / f"step={steps // 2}.ckpt"))
    for one, other in zip(results, resumed, strict=True):
        assert all(equal(one[key], other[key]) for key in ("state", "scores", "bits", "initial"))
        assert other["steps"] == steps


def test_clients_learn_masks_one_by_one_or_at_once() -> None:
    callbacks = [masking(), masking()]
    for m, callback in zip((1, 2), callbacks, strict=True):
        fit(steady(), callback, strategy=FederatedStrategy(clients=4, fraction=0.5, replicas_per_device=m), max_epochs=4)
    one, both = (callback.state_dict()["scores"] for callback in callbacks)
    for name in LAYERS:
        torch.testing.assert_close(one[name], both[name], rtol=0, atol=1e-6)
        assert not torch.equal(callbacks[0].masks.bits[name], callbacks[0].initial_masks.bits[name])


# ------------------------------------------------------------------------------------------------------- which layers


def names_of(module: L.LightningModule, **options: Any) -> tuple[set[str], set[str]]:
    callback = WeightMasking(**options)
    fit_setup(callback, module)
    chosen, own = set(callback._layers), set(callback._own)
    assert all(dense_weight(layer) is not None for layer in callback._layers.values())
    return chosen, own


def fit_setup(callback: WeightMasking, module: L.LightningModule, **options: Any) -> None:
    callback.setup(L.Trainer(**QUIET, accelerator="cpu", enable_checkpointing=False, **options), module, "fit")


class Wrapped(L.LightningModule):
    def __init__(self, model: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model
        if head is not None:
            self.out = head


SMALL = {"vocab_size": 30, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 16}
IN_BLOCK = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
IN_BLOCK += ("intermediate.dense", "output.dense")


def test_layers_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**SMALL, num_hidden_layers=4, num_labels=5)
    blocks = {f"encoder.layer.{k}.{name}" for k in (2, 3) for name in IN_BLOCK}
    chosen, own = names_of(Wrapped(transformers.BertForSequenceClassification(config)))
    assert chosen == {f"model.bert.{name}" for name in blocks | {"pooler.dense"}} | {"model.classifier"}
    assert own == {"model.classifier.weight", "model.classifier.bias"}
    chosen, own = names_of(Wrapped(transformers.BertModel(config), nn.Sequential(nn.Dropout(), nn.Linear(8, 5))))
    assert chosen == {f"model.{name}" for name in blocks | {"pooler.dense"}} | {"out.1"} and own == {
        "out.1.weight",
        "out.1.bias",
    }

    config = transformers.RobertaConfig(**SMALL, num_hidden_layers=3)
    chosen, own = names_of(Wrapped(transformers.RobertaForSequenceClassification(config)))
    assert chosen == {f"model.roberta.encoder.layer.2.{name}" for name in IN_BLOCK} | {
        "model.classifier.dense",
        "model.classifier.out_proj",
    }
    config = transformers.DistilBertConfig(
        vocab_size=30, dim=8, n_heads=2, hidden_dim=16, n_layers=4, max_position_embeddings=16
    )
    chosen, own = names_of(Wrapped(transformers.DistilBertForSequenceClassification(config)))
    linear = ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2")
    blocks = {f"model.distilbert.transformer.layer.{k}.{name}" for k in (2, 3) for name in linear}
    assert chosen == blocks | {"model.pre_classifier", "model.classifier"}

    # The decoder of a language model shares its weight with the embedding.
    chosen, _ = names_of(Wrapped(transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, num_hidden_layers=3))))
    assert "model.cls.predictions.transform.dense" in chosen and not any("decoder" in name for name in chosen)

    with pytest.raises(MisconfigurationException, match=r"no transformer blocks `encoder\.layer\.2` and up"):
        fit_setup(WeightMasking(), Wrapped(transformers.BertModel(transformers.BertConfig(**SMALL, num_hidden_layers=2))))


class Text(Wrapped):
    """Fine-tunes a model of `transformers`."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        ids, labels = batch
        return nn.functional.cross_entropy(self.model(input_ids=ids).logits, labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def test_an_encoder_serves_two_tasks(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")

    def model(classes: int) -> nn.Module:
        config = transformers.BertConfig(**SMALL, num_hidden_layers=3, num_labels=classes)
        torch.manual_seed(0)
        encoder = transformers.BertModel(config)
        torch.manual_seed(classes)
        made = transformers.BertForSequenceClassification(config)
        made.bert.load_state_dict(encoder.state_dict())
        return made

    ids = torch.randint(0, 30, (32, 7), generator=torch.Generator().manual_seed(1))
    expected, tasks = {}, MaskedTasks(model(2).eval())
    for classes in (2, 3):
        module, callback = Text(model(classes)), WeightMasking()
        fit(module, callback, data=DataLoader(TensorDataset(ids, ids[:, 0] % classes), batch_size=4))
        assert torch.equal(
            module.model.bert.embeddings.word_embeddings.weight, tasks.model.bert.embeddings.word_embeddings.weight
        )
        expected[str(classes)] = module.model.eval()(input_ids=ids).logits
        tasks.add(str(classes), callback.masks.relative_to("model"))
    for name in ("3", "2", "3"):
        tasks.activate(name)
        assert torch.equal(tasks.model(input_ids=ids).logits, expected[name])
    tasks.activate(None)
    assert equal(tasks.model, model(2))


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sparsity": 1.0}, r"`sparsity` .* up to 1 \(excluded\); got 1.0"),
        ({"sparsity": -0.1}, "`sparsity`"),
        ({"sparsity": float("nan")}, "`sparsity` must be a number"),
        ({"sparsity": "5%"}, "`sparsity` must be a number"),
        ({"width": 0}, "`width`"),
        ({"threshold": float("-inf")}, "`threshold` must be a number"),
        ({"seed": 0.5}, "`seed`"),
    ],
)
def test_options_that_make_no_sense(options, says) -> None:
    with pytest.raises(ValueError, match=says):
        WeightMasking(**options)


def test_a_path_that_is_a_folder(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"`path` is the path of a file, and '.*' is a folder: name a file in it"):
        WeightMasking(path=tmp_path)


@pytest.mark.parametrize("name", ["masking", "probe"])
def test_training_without_batches(name, monkeypatch) -> None:
    warned: list[str] = []
    monkeypatch.setattr(fit_callback, "rank_zero_warn", warned.append)
    callback = masking() if name == "masking" else LossLandscape()
    L.Trainer(accelerator="cpu", max_epochs=1, callbacks=[callback], enable_checkpointing=False, **QUIET).fit(Net(), [])
    assert [message.partition(", so")[0] for message in warned] == [f"{type(callback).__name__}: training had no batches"]


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.copy = nn.Linear(12, 12)
        self.copy.weight = self.second.weight


class LateSetup(Net):
    def setup(self, stage: str) -> None:
        self.late = nn.Linear(3, 3)


class Parametrized(Net):
    def __init__(self) -> None:
        super().__init__()
        parametrize.register_parametrization(self.third, "weight", nn.Identity())


@pytest.mark.parametrize(
    ("module", "options", "says"),
    [
        (Net, {"layers": ["second", "fourth"]}, "'fourth', which matches no layer"),
        (Net, {"layers": lambda name, layer: False}, "chooses no layer"),
        (Net, {"layers": None}, "no pretrained model of `transformers` inside of Net"),
        (
            Net,
            {"head": ["model.head"]},
            r"'model\.head', which .* no parameter \(did you mean 'head\.\*'\?\); .* are 'second\.\*', ",
        ),
        (Tied, {}, r"`second\.weight` is also `copy\.weight`"),
        (LateSetup, {"layers": ["late"]}, "make them in `__init__` or `configure_model`, not in `setup`"),
        (Parametrized, {}, "`third` .* has a mask or another parametrization already"),
        (Net, {"layers": lambda name, layer: name in ("second", "dropout")}, "`dropout` .* no parameter `weight`"),
        (Net, {"layers": lambda name, layer: name in ("second", "norm")}, r"`norm` \(LayerNorm\) .* no matrix, but a vector"),
    ],
)
def test_modules_that_can_not_be_masked(module, options, says) -> None:
    net = module()
    before, required = copy.deepcopy(net.state_dict()), [p.requires_grad for p in net.parameters()]
    with pytest.raises(MisconfigurationException, match=says):
        fit(net, masking(**options))
    assert equal(net, before) and [p.requires_grad for p in net.parameters()] == required


def test_a_layer_that_another_callback_masks() -> None:
    class Other(WeightMasking):
        pass

    net = Net()
    with pytest.raises(MisconfigurationException, match=r"`second` .* give the layer to one callback only"):
        fit(net, masking(), Other(layers=["second"]))
    assert equal(net, Net())


def test_strategies_that_divide_layers() -> None:
    with pytest.raises(MisconfigurationException, match="whole layers on every device, but FSDPStrategy divides them"):
        callback = masking()
        trainer = L.Trainer(**QUIET, accelerator="cpu")
        trainer._accelerator_connector.strategy = FSDPStrategy()
        callback.setup(trainer, Net(), "fit")


@pytest.mark.parametrize("name", ["WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging", "ModelPruning"])
@pytest.mark.parametrize("first", [False, True])
def test_callbacks_that_change_weights_as_well(name: str, first: bool) -> None:
    if not hasattr(pl_callbacks, name):
        pytest.skip("This Lightning has no such callback.")
    options = {"StochasticWeightAveraging": {"swa_lrs": 0.1}, "ModelPruning": {"pruning_fn": "l1_unstructured"}}
    other, net = getattr(pl_callbacks, name)(**options.get(name, {})), Net()
    with pytest.raises(MisconfigurationException, match=f"The callback {name} .* use it, or WeightMasking, and not both"):
        fit(net, *([other, masking()] if first else [masking(), other]))
    assert equal(net, Net())
