"""Every pruning method: its equations, and that it works in a Trainer whatever happens to it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_distopt import GossipStrategy, LocalSGDStrategy
from lightning_distopt.callbacks.dynamic_pruning import DynamicPruning
from lightning_distopt.sparsity import (
    DPF,
    DSR,
    METHODS,
    SET,
    SNIP,
    Layers,
    LotteryTicket,
    OneShot,
    RigL,
    SparseMomentum,
)
from lightning_distopt.sparsity.regrowth import drop, grow, shared_out
from tests.helpers import PoolEnvironment
from tests.sparsity.table import ROWS, SPARSITY, Net, Quadratic, batches, by_hand, expected, loader

ONCE = [name for name in ROWS if name not in ("dpf", "lottery_ticket")]
"""Each method with one set of options: what the Trainer does with them is the same for all."""
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Masks(L.Callback):
    """Keeps the masks, and the weights that the network computes with: before every step but the first, and at the end."""

    def __init__(self, pruning: DynamicPruning) -> None:
        self.pruning, self.masks, self.weights = pruning, [], []
        self._begun = False

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if self._begun:
            self.on_train_end()
        self._begun = True

    def on_train_end(self, *args: Any) -> None:
        self.masks.append(torch.cat([m.flatten() for m in self.pruning.pruner.masks]).clone())
        self.weights.append(torch.cat([layer.weight.detach().flatten() for layer in self.pruning.pruner.layers.values()]))


def train(
    name: str, seed: int = 5, module: Any = None, data: Any = None, ckpt_path: Any = None, **options: Any
) -> tuple[Masks, L.LightningModule]:
    row = ROWS[name]
    L.seed_everything(seed, verbose=False)
    period = {} if row.period is None else {"period": row.period}
    pruning = DynamicPruning(SPARSITY, row.make(), **period, **options.pop("pruning", {}))
    masks, module = Masks(pruning), module or Net()
    more = {"enable_checkpointing": False, "max_epochs": 4, **QUIET, **options}
    more["callbacks"] = [pruning, masks, *options.get("callbacks", ())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        L.Trainer(**more).fit(module, data or loader(), ckpt_path=ckpt_path)
    return masks, module


def zeros(module: Net) -> int:
    return sum(int((layer.weight == 0).sum()) for layer in (module.conv, module.hidden))


def wanted(name: str) -> int:
    """`round(s N)` of 36 + 512 weights, or of 4 + 8 filters with 9 and 64: 2 and 5 of them."""
    return 2 * 9 + 5 * 64 if name == "soft_filter" else round(SPARSITY * 548)


def test_the_table_has_all_methods() -> None:
    assert {type(row.make()) for row in ROWS.values()} == set(METHODS.values())


# -------------------------------------------------------------------------------------------------------------- equations
@pytest.mark.parametrize("name", ROWS)
def test_equals_the_transcription_in_a_loop(name: str) -> None:
    row = ROWS[name]
    history, found = expected(row, seed=9), by_hand(row.make(), row.period, seed=9)
    np.testing.assert_allclose(found, history, rtol=0, atol=1e-10)
    if row.period is not None:
        assert len(np.unique(history != 0, axis=0)) > 2  # masks change


@pytest.mark.parametrize("name", ROWS)
def test_equals_the_transcription_in_a_trainer(name: str) -> None:
    data = DataLoader(TensorDataset(*map(torch.from_numpy, batches())), batch_size=1)
    masks, module = train(
        name, 9, Quadratic(), data, max_epochs=1, precision="64-true", pruning={"layers": ["one", "two"], "ramp": 0.75}
    )
    found = torch.stack(masks.weights).numpy()
    np.testing.assert_allclose(found, expected(ROWS[name], seed=9), rtol=0, atol=1e-10)
    assert torch.equal(module.x.detach(), masks.weights[-1])


# ----------------------------------------------------------------------------------------------------------- in a Trainer
@pytest.mark.parametrize("name", ONCE)
def test_ends_at_the_sparsity_that_was_asked_for(name: str) -> None:
    masks, module = train(name)
    assert zeros(module) == wanted(name)
    assert not any(hasattr(layer, "parametrizations") for layer in module.modules())
    pairs = zip(masks.masks, masks.masks[1:], strict=False)
    back = sum(int((new > old).sum()) for old, new in pairs)
    assert (back == 0) == ROWS[name].absorbing
    if ROWS[name].random:  # they have their sparsity from the first step on, in total
        assert {int((m == 0).sum()) for m in masks.masks} == {wanted(name)}
    if name in ("set", "rigl"):  # and in each layer
        assert len({int(m[:36].sum()) for m in masks.masks}) == 1


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.random])
def test_seeds_reproduce(name: str) -> None:
    runs = [train(name, seed, max_epochs=1)[0].masks for seed in (1, 1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][0], runs[2][0])


@pytest.mark.parametrize("name", ONCE)
def test_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"enable_checkpointing": True, "callbacks": [save]}
    whole, one = train(name, module=Net(by_step=True), max_epochs=2, **options)
    for step in (5, 6):  # inside an epoch, and at its end
        path = tmp_path / f"step={step}.ckpt"
        rest, two = train(name, seed=99, module=Net(by_step=True), max_epochs=2, ckpt_path=path)
        assert len(rest.weights) == 12 - step
        for a, b in zip(whole.weights[step:], rest.weights, strict=True):
            assert torch.equal(a, b)
        for key, value in one.state_dict().items():
            assert torch.equal(value, two.state_dict()[key]), key


def on_rank(rank: int, world: int, name: str, strategy: str, m: int = 1) -> dict[str, Any]:
    # updates wait for rounds, which end after 5 and 10 steps; those at the end, after 12, are made from the average
    made: Any = "ddp" if strategy == "ddp" else LocalSGDStrategy(sync_period=5, replicas_per_device=m)
    more = {"plugins": [PoolEnvironment(rank, world)]} if world > 1 else {}
    more |= {"max_epochs": 2, "precision": "64-true"}
    masks, module = train(name, module=Net(), data=loader(2, torch.float64), strategy=made, devices=world, **more)
    return {"masks": torch.stack(masks.masks), "zeros": zeros(module), "weights": module.hidden.weight.detach().clone()}


# Those that look at nothing but weights, like DPF, are left out.
@pytest.mark.parametrize("name", [name for name in ONCE if name not in ("one_shot", "incremental", "soft_filter")])
def test_ranks_have_the_same_mask(name: str, ranks: Any) -> None:
    one, two = ranks.run(2, on_rank, name, "ddp")
    assert torch.equal(one["masks"], two["masks"]) and torch.equal(one["weights"], two["weights"])
    assert one["zeros"] == wanted(name)


@pytest.mark.parametrize("name", ONCE)
def test_local_sgd_in_a_process_equals_that_on_two_ranks(name: str, ranks: Any) -> None:
    here = on_rank(0, 1, name, "local_sgd", m=2)
    one, two = ranks.run(2, on_rank, name, "local_sgd")
    assert torch.equal(one["masks"], two["masks"]) and torch.equal(one["masks"], here["masks"])
    torch.testing.assert_close(one["weights"], here["weights"], rtol=0, atol=1e-10)
    assert here["zeros"] == one["zeros"] == two["zeros"] == wanted(name)


@pytest.mark.parametrize("name", [name for name in ONCE if ROWS[name].make().rewind_to is None])
def test_gossip_where_replicas_never_agree(name: str) -> None:
    made = GossipStrategy(topology="ring", sync_period=2, replicas_per_device=3)
    masks, module = train(name, data=loader(3), strategy=made, accumulate_grad_batches=2)
    assert len(masks.masks) == 24 and zeros(module) == wanted(name)


@pytest.mark.parametrize("name", ["snip", "lottery_ticket"])
def test_going_back_needs_replicas_that_agree(name: str) -> None:
    with pytest.raises(MisconfigurationException, match="goes back to earlier weights"):
        train(name, data=loader(3), strategy=GossipStrategy(topology="ring", replicas_per_device=3))


@pytest.mark.parametrize("name", ["snip", "rigl"])
def test_gradients_add_up_over_the_batches_of_a_step(name: str) -> None:
    # a^2 (x - c) of one batch of a step is that of another, so two of them are as good as one
    data = [DataLoader(TensorDataset(*(t.repeat_interleave(k, 0) for t in map(torch.from_numpy, batches())))) for k in (1, 2)]
    options = {"max_epochs": 1, "precision": "64-true", "pruning": {"layers": ["one", "two"]}}
    one, _ = train(name, 9, Quadratic(), data[0], **options)
    two, _ = train(name, 9, Quadratic(), data[1], accumulate_grad_batches=2, **options)
    assert all(torch.equal(a, b) for a, b in zip(one.masks, two.masks[1::2], strict=True))


def test_what_a_pruned_weight_kept_does_not_matter() -> None:
    # RigL's weights come back from zero, without the momentum that they went with
    masks, _ = train("rigl", module=Net(by_step=True))

    class Noise(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            pruner = trainer.callbacks[0].pruner
            for w, m in zip(pruner.weights, pruner.masks, strict=True):
                w.data += (1 - m) * 7.0
                trainer.optimizers[0].state[w]["momentum_buffer"] += (1 - m) * 7.0

    noisy, _ = train("rigl", module=Net(by_step=True), callbacks=[Noise()])
    assert all(torch.equal(a, b) for a, b in zip(masks.weights, noisy.weights, strict=True))


def test_schedules_by_epoch_go_back_too() -> None:
    class Rates(L.Callback):
        def __init__(self) -> None:
            self.rates: list[float] = []

        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = Rates()  # rounds of two epochs, halved after three: never reached, as each starts anew
    train("lottery_ticket", max_epochs=9, callbacks=[rates])
    assert rates.rates == 3 * [0.1] * 18
    rates.rates.clear()
    train("one_shot", max_epochs=4, callbacks=[rates])
    assert rates.rates == [0.1] * 18 + [0.05] * 6


@pytest.mark.parametrize("name", ["set", "sparse_momentum", "soft_filter"])
def test_an_epoch_is_a_period(name: str) -> None:
    L.seed_everything(5, verbose=False)
    pruning = DynamicPruning(SPARSITY, name)
    masks = Masks(pruning)
    L.Trainer(callbacks=[pruning, masks], max_epochs=3, enable_checkpointing=False, **QUIET).fit(Net(), loader())
    changes = [t for t in range(1, 18) if not torch.equal(masks.masks[t], masks.masks[t - 1])]
    assert set(changes) <= {5, 11, 17} and 11 in changes


# ------------------------------------------------------------------------------------------------------------ their parts
def test_growth_and_loss_take_ties_in_order() -> None:
    ones = torch.ones(4)
    assert drop(ones, ones, 1).tolist() == [0, 1, 1, 1]
    assert grow(torch.zeros(4), ones, 1).tolist() == [0, 0, 0, 1]
    assert drop(ones, ones, 4).sum() == 0 and grow(ones, ones, 0).sum() == 4


def test_what_finds_no_room_goes_to_the_others() -> None:
    room = [torch.zeros(2), torch.zeros(9), torch.zeros(9)]
    assert shared_out([8.0, 1.0, 1.0], room, 10) == [2, 4, 4]
    assert shared_out([0.0, 0.0, 0.0], room, 6) == [2, 2, 2]
    assert shared_out([1.0, 0.0, 0.0], room, 20) == [2, 9, 9]


def test_weights_that_are_zero_by_themselves_are_not_confused_with_pruned_ones() -> None:
    weights, masks = [torch.zeros(6)], [torch.tensor([1.0, 0, 1, 0, 1, 0])]
    (new,) = ROWS["incremental"].make().update(Layers(weights, masks, sparsity=0.5))
    assert torch.equal(new, masks[0])


def test_soft_pruned_filters_take_part_until_the_epoch_ends() -> None:
    masks, _ = train("soft_filter")
    dead = [int((w == 0).sum()) for w in masks.weights]
    assert dead[3] == wanted("soft_filter") and dead[4] == 0 and dead[-1] == wanted("soft_filter")


# -------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: OneShot(at=1.0), "`at` must be above 0 and below 1; got 1.0"),
        (lambda: OneShot(at="half"), "`at` must be above 0 and below 1; got 'half'"),
        (lambda: SET(drop=0.0), "`drop` must be above 0 and below 1"),
        (lambda: RigL(drop=1.5), "`drop` must be above 0 and below 1"),
        (lambda: RigL(until=1.5), "`until` must be above 0 and below 1"),
        (lambda: SparseMomentum(drop=True), "`drop` must be above 0 and below 1"),
        (lambda: DSR(drop=-0.1), "`drop` must be above 0 and below 1"),
        (lambda: DSR(tolerance=2), "`tolerance` must be above 0 and below 1"),
        (lambda: DSR(threshold=0), "`threshold` must be a number above 0; got 0"),
        (lambda: LotteryTicket(rounds=0), "`rounds` must be a whole number, at least 1; got 0"),
        (lambda: LotteryTicket(rewind_to=-1), "`rewind_to` must be a whole number, at least 0; got -1"),
        (lambda: DPF("erk", filters=True), "`distribution='erk'` .* says nothing of whole filters: use 'global' or 'layer'"),
        (
            lambda: DynamicPruning(method="soft_filter", sparse_rounds=True),
            "SoftFilterPruning .* leave `sparse_rounds` out",
        ),
        (lambda: SET(distribution="global"), "SET knows the `distribution` 'erk', 'layer', not 'global'"),
        (lambda: DynamicPruning(method="rigl", ramp=0.5), "RigL has no sparsity that rises with `ramp`: leave it out"),
        (lambda: DynamicPruning(method="snip", period=16), "SNIP updates masks at steps of its own: leave `period` out"),
        (lambda: DynamicPruning(method="one_shot", fine_tune=0.9), "OneShot says itself when masks change"),
        (lambda: DynamicPruning(method="rigl", period=0), "`period` must be a whole number of optimizer steps"),
        (lambda: DynamicPruning(method="sett"), "did you mean 'set'"),
    ],
)
def test_options_that_make_no_sense(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        (OneShot(), {"max_epochs": -1}, "OneShot has to know how long training is"),
        (RigL(), {"max_epochs": -1}, "RigL has to know how long training is"),
        (LotteryTicket(rounds=30), {"max_epochs": 4}, "LotteryTicket needs at least 31 optimizer steps; training has 24"),
        (LotteryTicket(rounds=2, rewind_to=8), {"max_epochs": 4}, "`rewind_to=8` comes after the first of the 3 parts"),
    ],
)
def test_training_of_the_wrong_length(method: Any, options: dict[str, Any], text: str) -> None:
    module = Net()
    trainer = L.Trainer(callbacks=[DynamicPruning(0.5, method)], enable_checkpointing=False, **QUIET, **options)
    with pytest.raises(MisconfigurationException, match=text):
        trainer.fit(module, loader())
    assert not hasattr(module.conv, "parametrizations")


def test_what_a_method_looks_at_is_missing() -> None:
    weights, masks = [torch.ones(4)], [torch.tensor([1.0, 1.0, 0.0, 0.0])]
    layers = Layers(weights, masks, sparsity=0.5, step=1)
    for method, text in ((SNIP(), "SNIP looks at"), (RigL(), "RigL looks at"), (SparseMomentum(), "SparseMomentum looks at")):
        with pytest.raises(ValueError, match=text):
            method.update(layers)
    silent: list[Tensor] = [torch.zeros(4)]
    with pytest.raises(ValueError, match="all zero or not finite"):
        SNIP().update(Layers(weights, weights, 0.5, 1, gradients=silent, first=weights))


def test_sparse_momentum_takes_what_adam_has() -> None:
    class Adam(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    masks, module = train("sparse_momentum", module=Adam())
    assert zeros(module) == wanted("sparse_momentum") and not torch.equal(masks.masks[0], masks.masks[-1])


def test_sparse_momentum_wants_momentum() -> None:
    class Plain(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(MisconfigurationException, match="this optimizer has none"):
        train("sparse_momentum", module=Plain())
