"""`DynamicPruning` with the strategies: masks, rounds, checkpoints, and what is left when training is over."""

from __future__ import annotations

import copy
import pickle
import re
from functools import partial
from itertools import pairwise

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch import callbacks as pl_callbacks
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_distopt import CHOCO, GossipStrategy, LocalSGDStrategy, PostLocalSwitch
from lightning_distopt.callbacks import fit_callback, pruning_checks
from lightning_distopt.callbacks.dynamic_pruning import DynamicPruning
from lightning_distopt.sparsity import DPF, LotteryTicket
from lightning_distopt.sparsity.methods import make_method
from lightning_distopt.sparsity.packing import pack_bits
from lightning_distopt.sparsity.pruner import Pruner
from lightning_distopt.sparsity.straight_through import StraightThroughMask
from tests.pruning import DENSE, PRUNED, QUIET, Net, fit, parameters, samples, sent, zeros
from tests.strategies.test_coupling import Collectives

TOTAL = sum(PRUNED.values())
SETTINGS = {
    "ddp": lambda m: "ddp",
    "local": lambda m: LocalSGDStrategy(4, replicas_per_device=m),
    "parameters": lambda m: LocalSGDStrategy(1, average="parameters", replicas_per_device=m),
    "blocks": lambda m: LocalSGDStrategy(2, block_size=2, block_period=2, replicas_per_device=m),
    "ring": lambda m: GossipStrategy("dsgd", topology="ring", replicas_per_device=m),
    "one_peer": lambda m: GossipStrategy("dsgd", topology="one_peer_exponential", replicas_per_device=m),
    "choco": lambda m: GossipStrategy(CHOCO(compressor="sign"), topology="ring", replicas_per_device=m),
}
REPLICAS = {"blocks": 4, "ring": 4, "one_peer": 4}  # others: 2


def pruned(rank, world, name, m=1, options=None, **more):
    """Train with pruning in a setting."""
    options = {"sparsity": 0.8, "period": 5, **(options or {})}
    return sent(fit(rank, world, SETTINGS[name](m), DynamicPruning(**options), **more))


def saving(folder, step):
    """Return what writes a checkpoint, named by its number, every so many steps."""
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=step, auto_insert_metric_name=False, save_top_k=-1)


def here(name, **more):
    """Train all replicas of a setting in this process."""
    return pruned(0, 1, name, REPLICAS.get(name, 2), **more)


# ------------------------------------------------------------------------------------------------------------------ dense
def dense_and_not(rank, world, name, m):
    dense = fit(rank, world, SETTINGS[name](m), steps=10)
    sparse = fit(rank, world, SETTINGS[name](m), DynamicPruning(0.0), steps=10)
    same = all(torch.equal(a, b) for a, b in zip(dense["state"].values(), sparse["state"].values(), strict=True))
    return torch.equal(dense["rows"], sparse["rows"]) and same, dense["traffic"] - sparse["traffic"], len(dense["rows"])


@pytest.mark.parametrize("name", ["ddp", "local"])
def test_sparsity_0_is_dense_training_bit_for_bit_on_two_ranks(ranks, name):
    assert ranks.run(2, dense_and_not, name, 1) == [(True, 0, 10)] * 2


@pytest.mark.parametrize("name", ["ring", "choco"])
def test_sparsity_0_is_dense_training_bit_for_bit_here(name):
    assert dense_and_not(0, 1, name, 2) == (True, 0, 10)


def test_sparsity_0_is_dense_training_bit_for_bit_on_a_single_device():
    dense, sparse = fit(), fit(pruning=DynamicPruning(0.0))
    assert torch.equal(dense["rows"], sparse["rows"])
    assert not torch.equal(dense["rows"], fit(pruning=DynamicPruning(0.5, period=5))["rows"])


# ------------------------------------------------------------------------------------------------------------------ masks
def oracle(weights, step, total=20, final=0.8, ramp=0.75):
    """Return the mask of the largest magnitudes of all layers together, from rows of all parameters."""
    conv, hidden = PRUNED.values()
    chosen = np.concatenate([weights[:conv], weights[conv + 4 : conv + 4 + hidden]])  # between them the bias
    sparsity = final * (1 - (1 - min(1.0, step / total / ramp)) ** 3)
    mask = np.ones(len(chosen), dtype=bool)
    mask[np.argsort(np.abs(chosen), kind="stable")[: round(sparsity * len(chosen))]] = False
    return mask


def bits(packed):
    return np.unpackbits(packed.numpy(), bitorder="little")[:TOTAL].astype(bool)


CLIPPED = {"gradient_clip_val": 0.05, "module": partial(Net, "adamw")}


@pytest.mark.parametrize(
    ("name", "world", "more"),
    [
        ("ddp", 2, {}),
        ("local", 2, CLIPPED),
        ("parameters", 2, {}),
        ("blocks", 4, {}),
        ("ring", 2, CLIPPED),
        ("one_peer", 2, {}),
        ("choco", 2, {}),
    ],
)
def test_all_ranks_have_the_same_masks_and_layouts_agree(ranks, name, world, more):
    results = ranks.run(world, pruned, name, REPLICAS.get(name, 2) // world, **more)
    assert results[0]["updates"][0] == (8 if name in ("local", "blocks") else 5)
    assert len(np.unique(results[0]["masks"].numpy(), axis=0)) >= 3
    for other in results[1:]:
        assert torch.equal(results[0]["masks"], other["masks"])
        assert all(torch.equal(a, b) for a, b in zip(results[0]["state"].values(), other["state"].values(), strict=True))
    assert zeros(results[0]["state"]) == round(0.8 * TOTAL)
    if name == "ddp":
        return
    one = here(name, **more)
    assert torch.equal(one["masks"], results[0]["masks"])
    torch.testing.assert_close(one["rows"], torch.cat([r["rows"] for r in results], dim=1), rtol=0, atol=1e-10)
    assert one["traffic"] == results[0]["traffic"]
    # Masks come from the average, or else from replica 0.
    for step in one["updates"]:
        rows = one["rows"][step - 1].numpy()
        if name in ("local", "blocks"):
            assert np.ptp(rows, axis=0).max() == 0  # a round has just made them equal
        np.testing.assert_array_equal(bits(one["masks"][step - 1]), oracle(rows[0], step))


def test_gossip_updates_wait_for_rounds(ranks):
    """Between rounds there is no collective, though masks are due after steps 4, 8, 12 and 16."""

    def run(rank, world):
        collectives, strategy = Collectives(), GossipStrategy("dsgd", topology="ring", sync_period=7)
        result = fit(rank, world, strategy, DynamicPruning(0.8, period=4), callbacks=[collectives])
        return result["updates"], [batch for batch, _ in collectives.calls if batch is not None], zeros(result["state"])

    for updates, batches, pruned_weights in ranks.run(2, run):
        assert updates == [7, 14]
        assert set(batches) == {6, 3}  # of epochs of ten
        assert pruned_weights == round(0.8 * TOTAL)


@pytest.mark.parametrize(("period", "steps", "expected"), [(16, 32, [16, 32]), (5, 26, [8, 16, 24]), (8, 16, [8, 16])])
def test_updates_wait_for_rounds(period, steps, expected):
    pruning = DynamicPruning(0.8, period=period)
    assert fit(0, 1, LocalSGDStrategy(8, replicas_per_device=2), pruning, steps=steps)["updates"] == expected


def test_updates_follow_the_rounds_of_a_switch():
    strategy = LocalSGDStrategy(4, replicas_per_device=2)
    result = fit(0, 1, strategy, DynamicPruning(0.8, period=5), callbacks=[PostLocalSwitch(10)])
    assert result["updates"] == [5, 10, 18]  # rounds at every step up to 10, then at 14 and 18
    assert zeros(result["state"]) == round(0.8 * TOTAL)


class Seen(L.Callback):
    """Keeps the masks that steps and validations compute with."""

    def __init__(self, pruning):
        self.pruning, self.steps, self.validations = pruning, [], []

    def _bits(self):
        return pack_bits(self.pruning.pruner.masks)

    def on_before_backward(self, *args):
        self.steps.append(self._bits())

    def on_validation_start(self, *args):
        self.validations.append(self._bits())


@pytest.mark.parametrize("name", ["single", "local", "one_peer"])
def test_validation_sees_masks_that_were_trained_with(name):
    """Masks are due after steps 5, 10 and 15, and there is a validation after each of them."""
    pruning = DynamicPruning(0.8, period=5)
    seen = Seen(pruning)
    strategy = "auto" if name == "single" else LocalSGDStrategy(5) if name == "local" else GossipStrategy("dsgd")
    fit(0, 1, strategy, pruning, callbacks=[seen], limit_val_batches=1, val_check_interval=5)
    assert len(seen.validations) == 4
    for k, shown in enumerate(seen.validations, start=1):
        assert torch.equal(shown, seen.steps[5 * k - 1])
    assert [torch.equal(a, b) for a, b in pairwise(seen.steps)] == [k not in (5, 10, 15) for k in range(1, 20)]


@pytest.mark.parametrize(
    ("options", "expected"), [({"ramp": 0.5}, [7, 14]), ({"ramp": 0.7}, [7, 14]), ({"ramp": 0.9}, [7, 14, 20])]
)
def test_masks_change_at_the_end_only_if_they_are_not_sparse_enough(options, expected):
    result = fit(pruning=DynamicPruning(0.8, period=7, **options))
    assert result["updates"] == expected
    assert zeros(result["state"]) == round(0.8 * TOTAL)


def in_the_middle(rank, world, m, method=None):
    """Train until the end of the ramp, four steps after a round."""
    options = {"sparsity": 0.8, "period": 5, "ramp": 1.0} | ({} if method is None else {"method": method})
    pruning = DynamicPruning(**options)
    result = sent(fit(rank, world, LocalSGDStrategy(8, replicas_per_device=m), pruning))
    return {**result, "hidden": torch.cat(pruning.state_dict()["hidden"])}


def test_training_that_ends_in_the_middle_of_a_round_is_pruned_from_the_average(ranks):
    one, two = in_the_middle(0, 1, 2), ranks.run(2, in_the_middle, 1)
    rows = one["rows"][-1]
    assert (rows[0] - rows[1]).abs().max() > 1e-3  # step 20 lies between the rounds at 16 and 24
    mean = rows.mean(dim=0).numpy()
    mask = oracle(mean, step=20, ramp=1.0)
    conv, hidden = PRUNED.values()
    chosen = np.concatenate([mean[:conv], mean[conv + 4 : conv + 4 + hidden]])
    for result in (one, *two):
        weights = torch.cat([result["state"][f"{name}.weight"].reshape(-1) for name in PRUNED]).numpy()
        np.testing.assert_allclose(weights, np.where(mask, chosen, 0), rtol=0, atol=1e-10)
        np.testing.assert_allclose(result["hidden"].numpy(), chosen[~mask], rtol=0, atol=1e-10)


def test_a_method_whose_weights_come_back_at_zero_sets_them_in_every_replica(ranks):
    """The last update shows the average, and the replicas are what changes."""
    one = in_the_middle(0, 1, 2, Swap())
    two = ranks.run(2, in_the_middle, 1, Swap())
    for result in two:
        for name in PRUNED:
            torch.testing.assert_close(result["state"][f"{name}.weight"], one["state"][f"{name}.weight"], rtol=0, atol=1e-10)
    assert zeros(one["state"]) == TOTAL  # one half is pruned, and the other has just come back


class Swap(type(DynamicPruning().method).__mro__[1]):
    """Prunes one half of the weights and the other in turns; what comes back starts from zero."""

    def update(self, layers):
        first = layers.masks[0].reshape(-1)[0] == 0
        return [((torch.arange(m.numel()) % 2 == 0) == first).view(m.shape).to(m) for m in layers.masks]


def test_buffers_of_replicas_are_their_own_after_the_last_update():
    """That update activates replicas while nobody shows the average any more."""

    class Normed(Net):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x):
            return self.head(self.norm(self.hidden(torch.relu(self.conv(x)).flatten(1))))

    def statistics(pruning):
        options = {"sparsity": 0.8} if pruning else {"sparsity": 0.0}
        return Running(DynamicPruning(period=100, **options))

    class Running(L.Callback):
        def __init__(self, pruning):
            self.pruning, self.means = pruning, []

        def on_train_end(self, trainer, pl_module):
            for row in range(2):
                self.means.append(trainer.strategy.replicas.buffers(row)[0].clone())

    with_update = statistics(True)
    result = fit(0, 1, LocalSGDStrategy(8, replicas_per_device=2), with_update.pruning, module=Normed, callbacks=[with_update])
    assert zeros(result["state"]) == round(0.8 * TOTAL)  # in one update, after the last step
    mean = torch.stack(with_update.means).mean(dim=0)
    assert not torch.equal(*with_update.means)
    torch.testing.assert_close(result["state"]["norm.running_mean"], mean, rtol=0, atol=1e-12)


def test_bits_of_replica_0_are_charged_to_the_traffic():
    dense, sparse = fit(0, 1, SETTINGS["ring"](4)), here("ring")
    updates = 1 + len(sparse["updates"])  # a first one, before the first step, where all are equal, is not sent
    assert sparse["traffic"] - dense["traffic"] == (updates - 1) * -(-TOTAL // 8)


# --------------------------------------------------------------------------------------------------------- other features
@pytest.mark.parametrize("m", [0, 2])
def test_steps_are_those_of_the_optimizer(m):
    strategy = LocalSGDStrategy(2, replicas_per_device=2) if m else "auto"
    result = fit(0, 1, strategy, DynamicPruning(0.8, period=4), steps=32, accumulate_grad_batches=2)
    assert (result["step"], result["updates"]) == (16, [4, 8, 12])


@pytest.mark.parametrize("name", ["single", "local"])
def test_bf16_mixed(name):
    strategy = "auto" if name == "single" else SETTINGS[name](2)
    result = fit(0, 1, strategy, DynamicPruning(0.8, period=4), precision="bf16-mixed")
    assert zeros(result["state"]) == round(0.8 * TOTAL)
    assert result["state"]["hidden.weight"].dtype == torch.float32


def test_manual_optimization():
    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    automatic, manual = (fit(pruning=DynamicPruning(0.8, period=5), module=module) for module in (Net, Manual))
    assert torch.equal(automatic["rows"], manual["rows"])
    assert automatic["updates"] == manual["updates"] == [5, 10, 15]


class Late(Net):
    """Makes its network in a hook."""

    def __init__(self):
        L.LightningModule.__init__(self)
        self.optimizer = "sgd"

    def _make(self):
        if "conv" not in self._modules:
            torch.manual_seed(0)
            for name, child in Net().to(torch.float64).named_children():
                self.add_module(name, child)


class Configured(Late):
    def configure_model(self):
        self._make()


class SetUp(Late):
    def setup(self, stage):
        self._make()


@pytest.mark.parametrize("late", [Configured, SetUp])
def test_layers_that_hooks_make(late, tmp_path):
    saver = saving(tmp_path, 10)
    whole = fit(pruning=DynamicPruning(0.8, period=4), module=late, callbacks=[saver], enable_checkpointing=True)
    assert zeros(whole["state"]) == round(0.8 * TOTAL)
    rest = fit(pruning=DynamicPruning(0.8, period=4), module=late, ckpt_path=str(tmp_path / "10.ckpt"))
    assert torch.equal(rest["rows"], whole["rows"][10:])


def test_a_compiled_module():
    torch._dynamo.reset()
    module = Net(dropout=0.0)
    before = copy.deepcopy(module)
    plain = fit(pruning=DynamicPruning(0.8, period=1), module=before, steps=2)
    compiled = fit(pruning=DynamicPruning(0.8, period=1), module=torch.compile(module, backend="eager"), steps=2)
    torch.testing.assert_close(compiled["rows"], plain["rows"], rtol=0, atol=1e-10)
    assert zeros(module.state_dict()) == round(0.8 * TOTAL)


def test_attention_is_pruned_in_its_output_layer():
    class Attending(Net):
        def __init__(self):
            super().__init__(dropout=0.0)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            x = x[:, 0]
            return self.head(torch.tanh(self.hidden(torch.relu(self.conv(self.attention(x, x, x)[0][:, None])).flatten(1))))

    result = fit(pruning=DynamicPruning(0.5, period=5, layers=["attention.out_proj", "hidden"]), module=Attending)
    found = (result["state"]["attention.out_proj.weight"] == 0).sum() + (result["state"]["hidden.weight"] == 0).sum()
    assert found == round(0.5 * (16 + 384))


def test_two_callbacks_prune_different_layers(tmp_path):
    def both():
        conv, hidden = DynamicPruning(0.5, layers="conv", period=4), DynamicPruning(0.9, layers="hidden", period=3)
        return {"pruning": conv, "callbacks": [hidden]}

    options = both()
    saver = saving(tmp_path, 10)
    options["callbacks"].append(saver)
    whole = fit(**options, enable_checkpointing=True)
    assert (whole["state"]["conv.weight"] == 0).sum() == 18
    assert (whole["state"]["hidden.weight"] == 0).sum() == round(0.9 * 384)
    rest = fit(**both(), ckpt_path=str(tmp_path / "10.ckpt"))
    assert torch.equal(rest["rows"], whole["rows"][10:])
    with pytest.raises(MisconfigurationException, match="choose the same `layers`"):
        fit(pruning=DynamicPruning(0.5, layers="c*"), ckpt_path=str(tmp_path / "10.ckpt"))


def chosen(name, module, wanted="hidden"):
    return name == wanted


class Chosen:
    def __call__(self, name, module):
        return name == "hidden"


@pytest.mark.parametrize(
    "layers",
    [("hidden", ["hidden"]), (["hidden"], ("hidden",)), (partial(chosen, wanted="hidden"),) * 2, (Chosen(), Chosen())],
    ids=["string", "tuple", "partial", "object"],
)
def test_layers_that_are_chosen_alike(layers, tmp_path):
    first, second = (DynamicPruning(0.8, period=4, layers=copy.deepcopy(how)) for how in layers)
    assert first.state_key == second.state_key != DynamicPruning(0.8).state_key
    assert " at 0x" not in first.state_key  # which another process would not have
    whole = fit(pruning=first, callbacks=[saving(tmp_path, 10)], enable_checkpointing=True)
    rest = fit(pruning=second, ckpt_path=str(tmp_path / "10.ckpt"))
    assert torch.equal(rest["rows"], whole["rows"][10:])


def test_evaluation_of_a_checkpoint_that_was_pruned_in_other_layers(tmp_path):
    fit(pruning=DynamicPruning(0.8, period=4, layers="hidden"), callbacks=[saving(tmp_path, 10)], enable_checkpointing=True)
    trainer = L.Trainer(
        accelerator="cpu", enable_checkpointing=False, callbacks=[DynamicPruning(0.5)], precision="64-true", **QUIET
    )
    module, loader = Net().double(), torch.utils.data.DataLoader(samples(8), 4, collate_fn=as_double)
    trainer.validate(module, loader, ckpt_path=str(tmp_path / "10.ckpt"), verbose=False)
    assert (module.hidden.weight == 0).any()


# ------------------------------------------------------------------------------------------------------------ checkpoints
def stop_and_go(rank, world, name, m, folder, step, options, **more):
    """Train with a checkpoint after `step` steps, then resume it in new objects; returns what is different."""
    make = (lambda: "auto") if name == "single" else (lambda: SETTINGS[name](m))
    saver = saving(folder, step)
    alone = name in ("single", "ddp")  # Lightning itself does not save random streams
    more = {"shuffle": not alone, "module": partial(Net, dropout=0.0 if alone else 0.1), "limit_val_batches": 1, **more}
    first, second = (DynamicPruning(**{"sparsity": 0.8, "period": 5, **options}) for _ in range(2))
    whole = fit(rank, world, make(), first, callbacks=[saver], enable_checkpointing=True, **more)
    rest = fit(rank, world, make(), second, ckpt_path=f"{folder}/{step}.ckpt", **more)
    found = []
    for what in ("rows", "masks"):
        if not torch.equal(whole[what][step:], rest[what]):
            found.append(what)
    if whole["updates"] != [t for t in whole["updates"] if t <= step] + rest["updates"]:
        found.append("updates")
    found += [key for key in whole["state"] if not torch.equal(whole["state"][key], rest["state"][key])]
    found += ["traffic"] * (whole["traffic"] != rest["traffic"]) + ["metrics"] * (whole["metrics"] != rest["metrics"])
    hidden, again = (torch.cat(pruning.state_dict()["hidden"]) for pruning in (first, second))
    return found + ["hidden"] * (not torch.equal(hidden, again)), len(rest["rows"])


# Lightning by itself resumes data at the end of an epoch, which is no update here. Replicas resume anywhere: step 7 lies
# between updates and, in "local", in the middle of a round for which masks wait since step 5.
ALONE = 10, {"period": 4}
AMONG = 7, {}


@pytest.mark.parametrize("name", ["single", "local", "blocks", "ring", "choco"])
def test_resume_is_bit_exact_here(name, tmp_path):
    step, options = ALONE if name == "single" else AMONG
    assert stop_and_go(0, 1, name, REPLICAS.get(name, 2), tmp_path, step, options) == ([], 20 - step)


@pytest.mark.parametrize("name", ["ddp", "local"])
def test_resume_is_bit_exact_on_two_ranks(ranks, name, tmp_path):
    step, options = ALONE if name == "ddp" else AMONG
    assert ranks.run(2, stop_and_go, name, 1, str(tmp_path), step, options) == [([], 20 - step)] * 2


@pytest.mark.parametrize(
    "options", [{"period": "epoch", "ramp": "epoch:0-1", "layers": ["hidden"]}, {"fine_tune": 0.5, "ramp": 0.5}]
)
def test_resume_with_other_options(options, tmp_path):
    assert stop_and_go(0, 1, "local", 2, tmp_path, 9, options) == ([], 11)


def test_resume_while_gradients_accumulate(tmp_path):
    more = {"accumulate_grad_batches": 2, "steps": 40}
    assert stop_and_go(0, 1, "local", 2, tmp_path, 7, {}, **more) == ([], 13)


class Stateful(torch.utils.data.DataLoader):
    """A loader that knows where it is, like that of `torchdata`."""

    def __init__(self):
        super().__init__(torch.utils.data.TensorDataset(*(t[:20] for t in samples(20).tensors)), batch_size=2)
        self.done = 0

    def __iter__(self):
        start, self.done = self.done % 10, self.done % 10
        for k, (x, y) in enumerate(super().__iter__()):
            if k >= start:
                self.done += 1
                yield x.double(), y

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


def test_loaders_with_a_state_resume_where_they_were(tmp_path):
    saver = saving(tmp_path, 7)
    whole = fit(pruning=DynamicPruning(0.8, period=4), callbacks=[saver], loader=Stateful(), enable_checkpointing=True)
    rest = fit(pruning=DynamicPruning(0.8, period=4), loader=Stateful(), ckpt_path=str(tmp_path / "7.ckpt"))
    assert torch.equal(rest["rows"], whole["rows"][7:])


class Start(L.Callback):
    """Keeps what training starts from."""

    def __init__(self, pruning):
        self.pruning = pruning

    def on_train_start(self, trainer, pl_module):
        self.rows = parameters(trainer)
        self.masks = [m.clone() for m in self.pruning.pruner.masks]


def test_another_number_of_replicas_starts_from_the_average_with_the_masks(tmp_path):
    saver = saving(tmp_path, 11)
    whole = here("local", callbacks=[saver], enable_checkpointing=True)
    pruning = DynamicPruning(0.8, period=5)
    start = Start(pruning)
    fit(0, 1, SETTINGS["local"](3), pruning, n=3, callbacks=[start], ckpt_path=str(tmp_path / "11.ckpt"))
    mean = whole["rows"][10].mean(dim=0)
    torch.testing.assert_close(start.rows, mean.expand(3, -1), rtol=0, atol=1e-12)  # with what lies behind the masks
    flat = torch.cat([m.reshape(-1) for m in start.masks]).bool().numpy()
    np.testing.assert_array_equal(flat, bits(whole["masks"][10]))


@pytest.mark.parametrize(("name", "weights_only"), [("single", True), ("local", False), ("ring", True)])
def test_checkpoints_load_into_the_plain_module(name, weights_only, tmp_path):
    strategy = "auto" if name == "single" else SETTINGS[name](2)
    saver = ModelCheckpoint(tmp_path, "best", monitor="val_loss", save_weights_only=weights_only)
    pruning = DynamicPruning(0.8, period=3)
    fit(0, 1, strategy, pruning, callbacks=[saver], enable_checkpointing=True, limit_val_batches=1)
    state = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    assert set(state) == set(Net().state_dict())
    assert zeros(state) > 0
    loaded = Net.load_from_checkpoint(saver.best_model_path).double()
    data = samples(2 * 10 * (1 if name == "single" else 2))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data.tensors[0].double(), data.tensors[1]), 8)
    trainer = L.Trainer(accelerator="cpu", enable_checkpointing=False, precision="64-true", **QUIET)
    (metrics,) = trainer.test(Net(), loader, ckpt_path=saver.best_model_path, verbose=False)
    assert metrics["test_loss"] == pytest.approx(float(saver.best_model_score), abs=1e-7)
    x = data.tensors[0][:4].double()
    loaded.eval()
    sparse = torch.tanh(loaded.hidden(torch.relu(loaded.conv(x)).flatten(1)))
    torch.testing.assert_close(loaded(x), loaded.head(sparse))


class WithMasks(Net):
    """Has buffers whose names look like those of a mask."""

    def __init__(self, *args):
        super().__init__("sgd")
        self.register_buffer("causal_mask", torch.ones(3, 3).tril())
        self.hidden.register_buffer("weight_mask", torch.zeros(2))

    def training_step(self, batch, batch_idx):
        self.hidden.weight_mask += 1
        return super().training_step(batch, batch_idx)


def test_buffers_called_masks(tmp_path):
    saver = saving(tmp_path, 7)
    options = {"enable_checkpointing": True, "callbacks": [saver]}
    whole = fit(0, 1, SETTINGS["local"](2), DynamicPruning(0.8, period=5), module=WithMasks, **options)
    rest = fit(0, 1, SETTINGS["local"](2), DynamicPruning(0.8, period=5), module=WithMasks, ckpt_path=str(tmp_path / "7.ckpt"))
    assert torch.equal(rest["rows"], whole["rows"][7:])
    assert torch.equal(rest["state"]["causal_mask"], torch.ones(3, 3).tril())
    assert (rest["state"]["hidden.weight_mask"] == 20).all()
    assert list(rest["state"]) == list(WithMasks().state_dict())


def test_going_back_includes_buffers_that_checkpoints_lack():
    class Counting(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()), persistent=False)

        def get_extra_state(self):
            return {"this is": "no tensor"}

        def set_extra_state(self, state):
            pass

        def training_step(self, batch, batch_idx):
            self.seen += 1
            return super().training_step(batch, batch_idx)

    assert fit(pruning=DynamicPruning(0.8, "snip"), module=(module := Counting()))["step"] == 20
    assert module.seen == 19  # the first step has been taken back


@pytest.mark.parametrize("name", ["single", "local"])
def test_a_dense_checkpoint_goes_on_with_pruning(name, tmp_path):
    strategy = (lambda: "auto") if name == "single" else (lambda: SETTINGS[name](2))
    saver = saving(tmp_path, 10)
    dense = fit(0, 1, strategy(), callbacks=[saver], enable_checkpointing=True)
    rest = fit(0, 1, strategy(), DynamicPruning(0.8, period=3), ckpt_path=str(tmp_path / "10.ckpt"))
    assert rest["updates"] == ([12, 15, 18] if name == "single" else [12, 16])  # training goes on at step 10
    assert zeros(rest["state"]) == round(0.8 * TOTAL)
    assert torch.equal(rest["rows"][0], dense["rows"][10])


@pytest.mark.parametrize("name", ["single", "local"])
@pytest.mark.parametrize(("method", "step"), [("rigl", 10), ("rigl", 18), ("dsr", 10), ("set", 10), ("sparse_momentum", 10)])
def test_methods_that_start_sparse_do_so_after_a_dense_checkpoint(name, method, step, tmp_path):
    """At once, whatever the period is, and also where RigL would change no mask any more."""
    strategy = (lambda: "auto") if name == "single" else (lambda: SETTINGS[name](2))
    fit(0, 1, strategy(), callbacks=[saving(tmp_path, step)], enable_checkpointing=True)
    pruning = DynamicPruning(0.8, method, period=100)
    rest = fit(0, 1, strategy(), pruning, ckpt_path=str(tmp_path / f"{step}.ckpt"))
    assert pruning.notes.history.steps == [step]
    # dsr and sparse momentum prune the same part of each layer, rounded; a weight may be zero by chance
    assert zeros(rest["state"]) == pytest.approx(0.8 * TOTAL, abs=2)
    assert torch.equal(*rest["masks"][[0, -1]])


def test_soft_filters_do_not_start_sparse_after_a_dense_checkpoint(tmp_path):
    fit(callbacks=[saving(tmp_path, 10)], enable_checkpointing=True)
    pruning = DynamicPruning(0.25, "soft_filter", period=4)
    fit(pruning=pruning, ckpt_path=str(tmp_path / "10.ckpt"))
    assert pruning.notes.history.steps == [12, 16, 20]


@pytest.mark.parametrize(
    ("options", "step", "message"),
    [
        ({"method": "snip"}, 1, "after step 0 it is too late for SNIP to begin"),
        ({"method": "one_shot"}, 17, "after step 16 it is too late for OneShot to begin"),
        ({"method": LotteryTicket(rounds=1, rewind_to=3)}, 4, "after step 3 it is too late for LotteryTicket to begin"),
        ({"fine_tune": 0.5, "ramp": 0.5}, 11, "after step 10 it is too late for DPF to begin"),
    ],
)
def test_a_dense_checkpoint_of_a_step_that_is_too_late(options, step, message, tmp_path):
    fit(callbacks=[saving(tmp_path, step)], enable_checkpointing=True)
    module = Net()
    with pytest.raises(MisconfigurationException, match=f"The checkpoint of step {step} has no masks, and {message}"):
        fit(pruning=DynamicPruning(0.8, **options), module=module, ckpt_path=str(tmp_path / f"{step}.ckpt"))
    assert type(module.hidden) is nn.Linear


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    fit(pruning=DynamicPruning(0.8, period=5), callbacks=[saving(tmp_path, 10)], enable_checkpointing=True)
    with pytest.raises(MisconfigurationException, match="pruned by DPF, not by Incremental: choose the same `method`"):
        fit(pruning=DynamicPruning(0.8, "incremental", period=5), ckpt_path=str(tmp_path / "10.ckpt"))


class Kept(L.Callback):
    """Notes what the callback keeps of the past, in memory and for checkpoints."""

    def __init__(self, pruning):
        self.pruning, self.snapshots, self.first = pruning, [], []

    def on_train_batch_end(self, trainer, *args):
        state = self.pruning.state_dict()
        assert state["kept"] is self.pruning._kept and len(state["first"]) == len(self.pruning._first)
        self.snapshots.append(state["kept"] is not None)
        self.first.append(len(state["first"]))


@pytest.mark.parametrize(
    ("method", "until"),
    [("snip", 1), (LotteryTicket(rounds=1), 10), (LotteryTicket(rounds=3), 15)],  # of 20 steps; then it goes back
)
def test_what_training_goes_back_to_is_kept_no_longer_than_needed(method, until):
    kept = Kept(pruning := DynamicPruning(0.8, method))
    fit(pruning=pruning, callbacks=[kept])
    assert kept.snapshots == [step <= until for step in range(1, 21)]
    assert not any(kept.first[until:])
    assert pruning.state_dict()["kept"] is None


def test_a_finished_run_is_trained_further(tmp_path):
    whole = fit(pruning=(first := DynamicPruning(0.8, period=5)))
    whole["trainer"].save_checkpoint(tmp_path / "end.ckpt")
    second = DynamicPruning(0.8, period=5)
    rest = fit(pruning=second, ckpt_path=str(tmp_path / "end.ckpt"), max_epochs=3, steps=20)
    assert len(rest["rows"]) == 10
    assert first.state_dict()["step"] == 20
    assert rest["updates"] == [25]


# ------------------------------------------------------------------------------------------------------ what is left over
def test_the_module_is_plain_afterwards():
    fresh, module = Net(), fit(pruning=DynamicPruning(0.8, period=5))["module"]
    assert [type(m) for m in module.modules()] == [type(m) for m in fresh.modules()]
    assert list(module.state_dict()) == list(fresh.state_dict())
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in fresh.named_parameters()]
    assert module.conv.weight.stride() == fresh.conv.weight.stride()
    x = torch.randn(5, 1, 4, 4, dtype=torch.float64)
    module = module.eval()
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x), module(x))
    assert zeros(module.state_dict()) == round(0.8 * TOTAL)


class Fail(L.Callback):
    def __init__(self, error):
        self.error = error

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 12:
            raise self.error


@pytest.mark.parametrize(("name", "error"), [("single", KeyboardInterrupt()), ("local", RuntimeError("boom"))])
def test_training_that_failed_leaves_a_plain_module_that_trains_again(name, error, tmp_path):
    strategy = (lambda: "auto") if name == "single" else (lambda: SETTINGS[name](2))
    torch.manual_seed(5)
    module, pruning = Net(), DynamicPruning(0.8, period=5)
    last = pl_callbacks.OnExceptionCheckpoint(tmp_path, "last")
    with pytest.raises((RuntimeError, SystemExit)):
        fit(0, 1, strategy(), pruning, module=module, callbacks=[Fail(error), last], enable_checkpointing=True)
    assert list(module.state_dict()) == list(Net().state_dict())
    assert type(module.hidden) is nn.Linear
    again = fit(0, 1, strategy(), pruning, module=module)  # the same callback
    assert again["updates"] == ([5, 10, 15] if name == "single" else [8, 12, 16])
    assert zeros(again["state"]) == round(0.8 * TOTAL)
    whole = fit(0, 1, strategy(), DynamicPruning(0.8, period=5))
    start = Start(pruning)
    fit(0, 1, strategy(), pruning, callbacks=[start], ckpt_path=str(tmp_path / "last.ckpt"))
    assert torch.equal(whole["rows"][11], start.rows)
    # Masks that the round after step 12 has made are those of step 13.
    np.testing.assert_array_equal(torch.cat([m.reshape(-1) for m in start.masks]), bits(whole["masks"][10]))


def test_two_fits_in_a_row():
    module, pruning = Net(), DynamicPruning(0.8, period=5)
    first = fit(pruning=pruning, module=module)
    second = fit(pruning=pruning, module=module)
    assert first["updates"] == second["updates"] == [5, 10, 15]
    assert zeros(second["state"]) == round(0.8 * TOTAL)
    assert not torch.equal(first["masks"][-1], second["masks"][-1])


def test_a_strategy_is_left_as_it_was():
    strategy = SETTINGS["local"](2)
    before = set(vars(strategy))
    fit(0, 1, strategy, DynamicPruning(0.8, period=5))
    assert set(vars(strategy)) - before <= {"_noted", "_resume", "_shared"}


def test_evaluation_with_the_callback_changes_nothing():
    module = fit(pruning=DynamicPruning(0.8, period=5))["module"]
    state = copy.deepcopy(module.state_dict())
    data = samples(8)
    trainer = L.Trainer(
        accelerator="cpu", enable_checkpointing=False, callbacks=[DynamicPruning(0.5)], precision="64-true", **QUIET
    )
    trainer.validate(module, torch.utils.data.DataLoader(data, 4, collate_fn=as_double), verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), module.state_dict().values(), strict=True))


def as_double(batch):
    x, y = torch.utils.data.default_collate(batch)
    return x.double(), y


def test_parameters_of_the_test_problem():
    assert sum(p.numel() for p in Net().parameters()) == TOTAL + DENSE


# -------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("sparsity", [1.0, 1, -0.1, 1.5, "0.5", True, None, float("nan")])
def test_sparsity_outside_of_its_range(sparsity):
    with pytest.raises(ValueError, match="`sparsity` is the part of the weights that is pruned, at least 0 and below 1"):
        DynamicPruning(sparsity)


@pytest.mark.parametrize("period", [0, -1, 1.5, True, "step"])
def test_periods_that_are_none(period):
    with pytest.raises(ValueError, match="`period` must be a whole number of optimizer steps, at least 1, or 'epoch'"):
        DynamicPruning(period=period)


@pytest.mark.parametrize(
    "options", [{"ramp": 0}, {"ramp": 1.5}, {"ramp": "epoch:3-"}, {"fine_tune": -1}, {"fine_tune": "later"}]
)
def test_stretches_that_are_none(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`|phase"):
        DynamicPruning(**options)


class Various(Net):
    """Has what can't be pruned, beside what can."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(2, 3)
        self.lazy = nn.LazyLinear(3)
        self.attention = nn.MultiheadAttention(4, 2)
        self.scripted = torch.jit.script(nn.Linear(2, 2))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        self.cut = nn.utils.prune.identity(nn.Linear(2, 2), "weight")
        self.whole = nn.Linear(2, 2)
        self.whole.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
        self.tied = nn.Linear(64, 6)
        self.tied.weight = self.hidden.weight
        self.embedding = nn.Embedding(2, 2)
        self.decoder = nn.Linear(2, 2)
        self.decoder.weight = self.embedding.weight
        self.norm = nn.LayerNorm(3)
        self.quantised = nn.ParameterDict({"weight": nn.Parameter(torch.ones(3, 3))})


def only(name):
    """Return a predicate, which may choose what has no weight."""
    return lambda found, module: found == name


BAD = {
    "nothing": (["conv", "nothing.*"], r"`layers` has the pattern 'nothing\.\*', which matches no layer with a weight matrix"),
    "no_pattern": ([], "`layers` chooses no layer"),
    "recurrent": (["rnn"], "the pattern 'rnn', which matches no layer with a weight matrix"),
    "attention": (["attention"], "the pattern 'attention', which matches no layer with a weight matrix"),
    "recurrent_by_predicate": (only("rnn"), r"The weight of `rnn` \(LSTM\) can't be masked: it has no parameter `weight`"),
    "lazy": (["lazy"], "`lazy` .* it is lazy and has no shape yet"),
    "scripted": (["scripted"], "`scripted` .* compiled to TorchScript"),
    "norm": (only("norm"), r"The weight of `norm` \(LayerNorm\) can't be masked: it is no matrix, but a vector"),
    "normed": (["conv", "normed"], "`normed` .* it has a mask or another parametrization already"),
    "cut": (["conv", "cut"], r"`cut` .* call `prune\.remove`"),
    "whole": (["conv", "whole"], "`whole` .* its type is torch.int8"),
    "tied": (["conv", "hidden", "tied"], "`tied.weight` is also `hidden.weight`"),
    "tied_to_another": (["conv", "hidden"], "`hidden.weight` is also `tied.weight`: choose layers that have a weight of their"),
    "tied_to_an_embedding": (["decoder"], "`decoder.weight` is also `embedding.weight`"),
}


@pytest.mark.parametrize("name", BAD)
def test_layers_that_cannot_be_pruned(name):
    layers, message = BAD[name]
    module = Various()
    kinds, keys = [type(m) for m in module.modules()], list(module.state_dict())
    with pytest.raises(MisconfigurationException, match=message):
        fit(pruning=DynamicPruning(0.5, layers=layers), module=module, precision="32-true")
    assert [type(m) for m in module.modules()] == kinds
    assert list(module.state_dict()) == keys


class Upwards(Net):
    """Has a transposed convolution, the rows of whose weight are its input channels."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 2, 1)

    def forward(self, x):
        up = self.up(torch.relu(self.conv(x)))
        return self.head(torch.tanh(self.hidden(torch.cat([up, up], dim=1).flatten(1))))


@pytest.mark.parametrize("method", [DPF(filters=True), DPF(limit=True), "soft_filter"], ids=str)
def test_filters_of_a_transposed_convolution(method):
    module = Upwards()
    with pytest.raises(MisconfigurationException, match=r"those of `up` \(ConvTranspose2d\) are input channels: leave"):
        fit(pruning=DynamicPruning(0.5, method, layers=["conv", "up"]), module=module)
    assert type(module.up) is nn.ConvTranspose2d and type(module.conv) is nn.Conv2d


def test_single_weights_of_a_transposed_convolution():
    result = fit(pruning=DynamicPruning(0.5, period=4, layers="up"), module=Upwards)
    assert (result["state"]["up.weight"] == 0).sum() == 4
    up = nn.ConvTranspose2d(2, 2, 1)
    pruner = Pruner({"up": up}, DPF())
    pruner.take([torch.tensor([0.0, 0.0, 1.0, 1.0]).view_as(up.weight)])
    assert pruner.overshoot([torch.ones_like(up.weight)]) == ("", 0.0)  # rows that come back are no filters


@pytest.mark.parametrize("optimizer", ["plain", "rmsprop"])
def test_sparse_momentum_without_momentum(optimizer):
    class Plain(Net):
        def training_step(self, batch, batch_idx):
            raise AssertionError("training starts")

        def configure_optimizers(self):
            kind = torch.optim.SGD if optimizer == "plain" else torch.optim.RMSprop
            return kind(self.parameters(), lr=0.1)

    module = Plain()
    with pytest.raises(MisconfigurationException, match="SparseMomentum looks at the momentum of weights"):
        fit(pruning=DynamicPruning(0.5, "sparse_momentum"), module=module)
    assert type(module.hidden) is nn.Linear


def test_nothing_to_prune_by_default():
    class One(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def training_step(self, batch, batch_idx):
            raise AssertionError("training starts")

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(MisconfigurationException, match="every convolutional and linear layer but the last, as there is one"):
        fit(pruning=DynamicPruning(0.5), module=One)


@pytest.mark.parametrize("strategy", ["auto", "local"])
def test_two_callbacks_on_one_layer(strategy):
    module, strategy = Net(), "auto" if strategy == "auto" else SETTINGS["local"](2)
    with pytest.raises(MisconfigurationException, match=r"`hidden` .* give the layer to one callback only"):
        fit(0, 1, strategy, DynamicPruning(0.5), module=module, callbacks=[DynamicPruning(0.5, layers="h*n")])
    assert type(module.conv) is nn.Conv2d
    assert list(module.state_dict()) == list(Net().state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"`ramp=0\.75` is a part of training, whose length is not known"),
        ({"ramp": "step:0-8", "fine_tune": 0.5}, r"`fine_tune=0\.5` is a part of training, whose length is not known"),
    ],
)
def test_training_without_an_end(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(pruning=DynamicPruning(0.5, **options), max_epochs=-1)


def test_training_without_an_end_by_steps():
    result = fit(pruning=DynamicPruning(0.8, ramp="step:0-8", period=4), max_epochs=-1, callbacks=[Enough(12)])
    assert result["updates"] == [4, 8]  # what would come back after step 12 could learn no more
    assert zeros(result["state"]) == round(0.8 * TOTAL)
    filters = DynamicPruning(0.25, DPF(filters=True), ramp="step:0-8", period=4)  # a part of all filters, which differ in size
    result = fit(pruning=filters, max_epochs=-1, callbacks=[Enough(12)])
    assert 0 < zeros(result["state"]) < round(0.25 * TOTAL)
    assert result["updates"] == [4, 8]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter((x.double(), y) for x, y in samples(40))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ramp": "epoch:0-2"}, "`ramp` is given in epochs, and the data does not say how long one is"),
        ({"period": "epoch"}, "`period='epoch'` needs to know how long an epoch is"),
        ({"fine_tune": "epoch:1-"}, "`fine_tune` is given in epochs, and the data does not say how long one is"),
        (
            {"ramp": 0.75},
            r"`ramp=0\.75` is a part of training, whose length is not known",
        ),
    ],
)
def test_epochs_of_unknown_length(options, message):
    options = {"ramp": "step:0-9"} | options
    loader = torch.utils.data.DataLoader(Stream(), batch_size=2)
    with pytest.raises(MisconfigurationException, match=message):
        fit(pruning=DynamicPruning(0.5, **options), loader=loader)


def test_data_of_unknown_length_and_a_number_of_steps():
    loader = torch.utils.data.DataLoader(Stream(), batch_size=2)
    result = fit(pruning=DynamicPruning(0.8, period=5), loader=loader, max_steps=10)
    assert result["updates"] == [5, 10]
    assert zeros(result["state"]) == round(0.8 * TOTAL)


@pytest.mark.parametrize(("fine_tune", "last"), [(0.5, 10), (0.47, 10), ("epoch:1-", 10), ("step:13-", 13)])
def test_masks_change_for_the_last_time_when_fine_tuning_begins(fine_tune, last):
    result = fit(pruning=DynamicPruning(0.8, period=4, ramp=0.4, fine_tune=fine_tune))
    assert result["updates"][-1] == last and last + 3 < result["step"]
    assert zeros(result["state"]) == round(0.8 * TOTAL)


def test_fine_tuning_of_a_training_shorter_than_a_period():
    result = fit(pruning=DynamicPruning(0.8, period=100, ramp=0.4, fine_tune=0.5))
    assert result["updates"] == [10]
    assert zeros(result["state"]) == round(0.8 * TOTAL)


@pytest.mark.parametrize("options", [{"fine_tune": 0.5}, {"ramp": "epoch:0-2", "fine_tune": "step:19-"}])
def test_fine_tuning_that_begins_before_the_sparsity_is_reached(options):
    module = Net()
    with pytest.raises(MisconfigurationException, match="let `ramp` end sooner"):
        fit(pruning=DynamicPruning(0.8, **options), module=module)
    assert type(module.conv) is nn.Conv2d


@pytest.mark.parametrize("max_epochs", [2, None])
@pytest.mark.parametrize("name", ["single", "local"])
def test_a_stop_by_steps_does_not_shorten_epochs(max_epochs, name):
    """Ten steps are an epoch, though training stops after 14; with `max_steps` alone Lightning loads the data late."""
    strategy = "auto" if name == "single" else LocalSGDStrategy(5, replicas_per_device=2)
    pruning = DynamicPruning(0.8, ramp="epoch:0-1", period="epoch")
    assert fit(0, 1, strategy, pruning, max_steps=14, max_epochs=max_epochs)["updates"] == [10]


class Enough(L.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step >= self.step


@pytest.mark.parametrize("name", ["single", "local", "ring"])
@pytest.mark.parametrize("step", [4, 13])  # of epochs of ten
def test_training_that_stops_early_leaves_soft_filters_pruned(name, step):
    strategy = {"single": lambda: "auto", "local": lambda: LocalSGDStrategy(4, replicas_per_device=2)}
    strategy["ring"] = lambda: GossipStrategy("dsgd", topology="ring", sync_period=3, replicas_per_device=2)
    module = Net()
    fit(0, 1, strategy[name](), DynamicPruning(0.5, "soft_filter"), module=module, callbacks=[Enough(step)])
    assert [int((layer.weight.flatten(1) == 0).all(dim=1).sum()) for layer in (module.conv, module.hidden)] == [2, 3]


@pytest.mark.parametrize(("options", "warns"), [({"ramp": 0.5}, False), ({"ramp": 0.9}, True), ({"method": "one_shot"}, True)])
def test_training_that_ends_before_it_is_sparse_is_warned_of(options, warns, monkeypatch):
    said = []
    monkeypatch.setattr(pruning_checks, "rank_zero_warn", said.append)
    fit(pruning=DynamicPruning(0.8, period=None if "method" in options else 2, **options), callbacks=[Enough(12)])
    assert len(said) == warns
    for text in said:
        assert re.match("DynamicPruning: training has ended after step 12 with 0.* before masks came to `sparsity=0.8`", text)


def test_strategies_that_shard_weights():
    class Sharding(L.pytorch.strategies.SingleDeviceStrategy):
        restore_checkpoint_after_setup = True

    with pytest.raises(MisconfigurationException, match="DynamicPruning needs whole layers on every device, but Sharding"):
        fit(0, 1, Sharding(torch.device("cpu")), DynamicPruning(0.5))


@pytest.mark.parametrize("name", ["WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging", "ModelPruning"])
def test_callbacks_that_change_weights_as_well(name):
    if not hasattr(pl_callbacks, name):
        pytest.skip("This Lightning has no such callback.")
    options = {"StochasticWeightAveraging": {"swa_lrs": 0.1}, "ModelPruning": {"pruning_fn": "l1_unstructured"}}
    other = getattr(pl_callbacks, name)(**options.get(name, {}))
    module = Net()
    with pytest.raises(MisconfigurationException, match=f"The callback {name} .* use it, or DynamicPruning, and not both"):
        fit(pruning=DynamicPruning(0.5), module=module, callbacks=[other])
    assert type(module.hidden) is nn.Linear


# ----------------------------------------------------------------------------------------------- filters in front of norms
class Normed(Net):
    """A network whose convolution is in front of batch norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(torch.tanh(self.norm(self.conv(x))).flatten(1))))


class Largest(L.Callback):
    """Keeps the largest norm of a filter, and how often a filter came back."""

    def __init__(self, pruning):
        self.pruning, self.norm, self.back = pruning, 0.0, 0

    def on_train_batch_end(self, trainer, module, *args):
        self.norm = max(self.norm, float(module.conv.parametrizations.weight.original.flatten(1).norm(dim=1).max()))
        self.back += self.pruning.pruner.regrown["conv"]


def test_filters_that_come_back_are_no_larger_than_others(monkeypatch):
    found, said = {}, []
    monkeypatch.setattr(pruning_checks, "rank_zero_warn", said.append)
    for limit in (False, True, None):
        pruning = DynamicPruning(0.5, DPF(filters=True, limit=limit), period=3, layers="conv", ramp=0.2)
        found[limit] = Largest(pruning)
        fit(pruning=pruning, module=Normed, steps=60, callbacks=[found[limit]])
        assert found[limit].back > 0
    (text,) = said
    assert re.search("a filter of `(.*?)` .* use `method=(.*?)`", text).groups() == ("conv", "DPF(limit=True)")
    assert found[True].norm < 30 < 300 < found[False].norm
    assert found[None].norm == found[True].norm


def test_gradients_of_empty_filters_are_held_down():
    """To the median norm of those with weights, row by row; where none has any, they stay as they are."""
    weight = torch.zeros(5, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    gradient = torch.tensor([[3.0, 4.0], [60.0, 80.0], [0.3, 0.4], [0.0, 0.0], [30.0, 40.0]], dtype=torch.float64)
    gradient = gradient.view(5, 2, 1, 1)  # norms 5, 100, 0.5, 0, 50
    for rows, factors in (
        ([0, 1, 2], [1, 1, 1, 1, 0.1]),  # one that is too large itself does not count
        ([2], [0.1, 0.005, 1, 1, 0.01]),
        ([3], [0, 0, 0, 1, 0]),
        ([0, 4], [1, 0.05, 1, 1, 1]),  # of two, the lower one
        ([0, 1, 2, 3, 4], [1, 1, 1, 1, 1]),
        ([], [1, 1, 1, 1, 1]),
    ):
        mask = StraightThroughMask(limit=True)
        mask.set(torch.stack([torch.full((2, 1, 1), row in rows) for row in range(5)]), weight)
        (found,) = torch.autograd.grad(mask(weight), weight, gradient)
        expected = gradient * torch.tensor(factors, dtype=torch.float64).view(5, 1, 1, 1)
        torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)
    (found,) = torch.autograd.grad(StraightThroughMask(limit=True)(weight).clone(), weight, gradient)
    assert torch.equal(found, gradient)  # there is no mask yet


def test_a_limit_where_no_filter_is_empty_changes_nothing():
    free, limited = (fit(pruning=DynamicPruning(0.5, DPF(limit=limit), period=5)) for limit in (False, True))
    assert torch.equal(free["rows"], limited["rows"])


def test_a_ramp_that_is_longer_than_training():
    with pytest.raises(
        MisconfigurationException, match=r"Training has 20 optimizer steps, and `ramp='epoch:0-225'` ends after 2250"
    ):
        fit(pruning=DynamicPruning(0.8, ramp="epoch:0-225"))
    with pytest.raises(MisconfigurationException, match=r"`fine_tune=0\.5` keeps masks as they are before `ramp=0\.75`"):
        fit(pruning=DynamicPruning(0.8, fine_tune=0.5))


def test_layers_without_weights_are_named():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning_checks, "rank_zero_warn", (warned := []).append)
        result = fit(pruning=DynamicPruning(0.998, period=2))  # a single weight is left
    gone = next(name for name in PRUNED if not result["state"][f"{name}.weight"].any())
    assert [message for message in warned if f"no weight is left in `{gone}`, where" in message]


@pytest.mark.parametrize(("method", "sooner"), [("dpf", True), ("snip", False)])
def test_only_methods_with_a_ramp_are_told_of_it(method, sooner, monkeypatch):
    warned = []
    monkeypatch.setattr(pruning_checks, "rank_zero_warn", warned.append)
    layer = nn.Linear(4, 4)
    pruning_checks.warn_at_the_end(Pruner({"layer": layer}, make_method(method)), 0.5, 7)
    assert ["`ramp`" in message for message in warned] == [sooner]


def test_a_figure_that_is_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"`figure` is the path of a file, and '.*' is a folder: name a file in it"):
        DynamicPruning(0.8, figure=tmp_path)


@pytest.mark.parametrize("options", [{"loader": []}, {"limit_train_batches": 0}], ids=str)
def test_training_without_batches(options):
    with pytest.MonkeyPatch.context() as patch:
        warned = []
        patch.setattr(fit_callback, "rank_zero_warn", warned.append)
        fit(pruning=DynamicPruning(0.8), **options)
    assert len(warned) == 1 and warned[0].startswith("DynamicPruning: training had no batches")
