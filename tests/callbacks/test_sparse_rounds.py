"""`sparse_rounds`: what a round sends, what stays behind, and what that means for the network."""

from __future__ import annotations

from functools import cache, partial

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_distopt import (
    CHOCO,
    DPSGD,
    DSGD,
    ConsensusControl,
    FederatedStrategy,
    GossipStrategy,
    LocalSGDStrategy,
    PostLocalSwitch,
    QuasiGlobal,
)
from lightning_distopt.callbacks.dynamic_pruning import DynamicPruning
from lightning_distopt.communication import Communicator, Replicas, all_reduce_bytes
from tests.callbacks.test_dynamic_pruning import TOTAL, Swap, bits, oracle, stop_and_go
from tests.pruning import DENSE, PRUNED, Net, fit, sent

DOUBLE = 8
PADDED = sum(-(-p.numel() // 8) * 8 for p in Net().parameters())  # parameters begin at multiples of 64 bytes


def sparse(rank, world, m, strategy, options=None, pruning=None, **more):
    pruning = pruning or DynamicPruning(0.8, period=8, sparse_rounds=True, **(options or {}))
    return sent(fit(rank, world, strategy(m), pruning, **more))


def local(m):
    return LocalSGDStrategy(2, replicas_per_device=m)


def ring(m):
    return GossipStrategy("dsgd", topology="ring", replicas_per_device=m)


def blocks(m):
    return LocalSGDStrategy(2, block_size=2, block_period=2, replicas_per_device=m)


@cache
def here(strategy):
    """Return what comes of training all replicas in this process; several tests look at it."""
    return sparse(0, 1, 2 if strategy is local else 4, strategy)


def visible(mask):
    """Return which parameters the network shows, in the order of the plain module: conv, its bias, hidden, its bias, head."""
    conv = PRUNED["conv"]
    return np.concatenate([mask[:conv], np.ones(4, bool), mask[conv:], np.ones(DENSE - 4, bool)])


# ---------------------------------------------------------------------------------------------------------------- columns
class Odd(nn.Module):
    """A channels-last weight, one that is used twice, one that is frozen, and another type."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 2).to(memory_format=torch.channels_last)
        self.linear, self.tied = nn.Linear(5, 5), nn.Linear(5, 5, bias=False)
        self.tied.weight = self.linear.weight
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.precise = nn.Linear(5, 3).double()


def test_columns_are_those_of_the_masks_and_never_the_padding():
    module = Odd()
    masks = {p: torch.rand(p.shape) < 0.5 for p in (module.conv.weight, module.precise.weight, module.frozen.weight)}
    replicas = Replicas(module, replicas_per_rank=3)
    for row in range(3):
        replicas.activate(row)
        for p in module.parameters():
            nn.init.normal_(p)
    replicas.activate(0)
    replicas.columns = replicas.columns_of({p: m.to(p.dtype) for p, m in masks.items()})
    counts = [int(masks[module.conv.weight].sum()) + 5 + 25 + 5, int(masks[module.precise.weight].sum()) + 3]
    assert [len(c) for c in replicas.columns] == counts

    before = [[p.clone() for p in row] for row in ([replicas.activate(r), *module.parameters()][1:] for r in range(3))]
    communicator = Communicator(replicas_per_rank=3)
    with replicas.sent() as packed:
        assert [tuple(block.shape) for block in packed] == [(3, n) for n in counts]
        for block in packed:
            communicator.mean(block)
    assert communicator.traffic.bytes_sent == sum(all_reduce_bytes(n, size, 3) for n, size in zip(counts, (4, 8), strict=True))
    for row in range(3):
        replicas.activate(row)
        for k, p in enumerate(module.parameters()):
            mean = torch.stack([values[k] for values in before]).mean(dim=0)
            alive = masks.get(p, torch.ones(p.shape)).bool() & p.requires_grad
            torch.testing.assert_close(p, torch.where(alive, mean, before[row][k]))
    for k, block in enumerate(replicas.parameters):
        padding = torch.ones(block.shape[1], dtype=torch.bool)
        padding[sorted(of(replicas, k))] = False
        assert (block[:, padding] == 0).all()


def of(replicas, block):
    """Return the columns of a block that belong to a parameter."""
    return {c for slot in replicas.slots if slot.block == block for c in range(slot.offset, slot.offset + slot.numel)}


def test_nothing_alive_is_sent_as_nothing():
    module = nn.Linear(4, 2, bias=False)
    replicas = Replicas(module, replicas_per_rank=2)
    replicas.columns = replicas.columns_of({module.weight: torch.zeros(2, 4)})
    with replicas.sent() as packed:
        assert packed == ()


# ------------------------------------------------------------------------------------------------------------------ bytes
def alive(result, step):
    """Return how many parameters a round after `step` sends, by the masks of the step before."""
    return DENSE + int(bits(result["masks"][step - 2]).sum())


def test_bytes_of_local_sgd():
    result = here(local)
    assert result["updates"] == [8, 16]
    charged = 0
    for step in range(2, 21, 2):
        if step < 8 or step in result["updates"]:
            charged += all_reduce_bytes(PADDED, DOUBLE, 2)  # nothing is pruned yet, or masks are due
        else:
            charged += all_reduce_bytes(alive(result, step), DOUBLE, 2)
    assert result["traffic"] == charged
    assert charged < 10 * all_reduce_bytes(PADDED, DOUBLE, 2)


def test_bytes_of_gossip():
    result = here(ring)
    assert result["updates"] == [8, 16]
    charged = 0
    for step in range(1, 21):
        whole = step <= 8 or step in result["updates"]
        charged += 2 * DOUBLE * (PADDED if whole else alive(result, step))  # to two neighbours
    assert result["traffic"] == charged + len(result["updates"]) * -(-TOTAL // 8)  # and the masks of replica 0


# ----------------------------------------------------------------------------------------------------------- what is true
@pytest.mark.parametrize("strategy", [local, blocks])
def test_the_network_agrees_and_hidden_values_do_not(strategy):
    result = here(strategy)
    updates = [t for t in result["updates"] if t < 20]
    every = 2 if strategy is local else 4
    hidden_differ = []
    for step in range(every, 20, every):
        rows, shown = result["rows"][step - 1].numpy(), visible(bits(result["masks"][step - 1]))
        assert np.ptp(rows[:, shown], axis=0).max() == 0
        hidden_differ.append(step not in updates and step > updates[0])
        if hidden_differ[-1]:
            assert np.ptp(rows[:, ~shown], axis=0).max() > 1e-4
        else:
            assert np.ptp(rows, axis=0).max() == 0
    assert any(hidden_differ) and not all(hidden_differ)


def test_outputs_of_replicas_are_equal():
    class Outputs(L.Callback):
        def __init__(self, pruning):
            self.pruning, self.seen, self.x = pruning, {}, torch.randn(3, 1, 4, 4, dtype=torch.float64)

        def on_train_batch_end(self, trainer, pl_module, *args):
            outputs, hidden = [], []
            for row in (1, 0):
                trainer.strategy.replicas.activate(row)
                with torch.no_grad():
                    outputs.append(pl_module(self.x))
                hidden.append(torch.cat(self.pruning.pruner.hidden()))
            self.seen[trainer.global_step] = (*outputs, *hidden)

    pruning = DynamicPruning(0.8, period=8, sparse_rounds=True)
    outputs = Outputs(pruning)
    fit(0, 1, local(2), pruning, callbacks=[outputs])
    one, other, hidden, its = outputs.seen[12]  # a round between the updates at 8 and 16
    assert torch.equal(one, other)
    assert not torch.equal(hidden, its)
    one, other, hidden, its = outputs.seen[16]
    assert torch.equal(hidden, its)
    one, other, *_ = outputs.seen[13]
    assert not torch.equal(one, other)


def test_new_masks_come_from_the_average_of_all_dense_values():
    result = here(local)
    step = 16
    rows = result["rows"][step - 1].numpy()
    np.testing.assert_array_equal(bits(result["masks"][step - 1]), oracle(rows[0], step))
    # The step before, replicas were apart everywhere; SGD with the same momentum would not have made them equal by itself.
    assert np.ptp(result["rows"][step - 2].numpy(), axis=0).max() > 1e-4


def test_with_everything_alive_it_is_the_same_training():
    """Masks do not change what a step does; without pruning, rounds send the same values."""
    dense = fit(0, 1, local(2), DynamicPruning(0.0))
    result = fit(0, 1, local(2), DynamicPruning(0.0, sparse_rounds=True))
    assert torch.equal(dense["rows"], result["rows"])
    assert dense["traffic"] == result["traffic"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_is_that_of_rounds_that_send_everything(optimizer):
    """Hidden values have no influence on gradients, and their updates are linear in them."""
    module = partial(Net, optimizer)
    ordinary = fit(0, 1, local(2), DynamicPruning(0.8, period=8), module=module)
    result = fit(0, 1, local(2), DynamicPruning(0.8, period=8, sparse_rounds=True), module=module)
    for step in range(1, 17):
        shown = visible(bits(ordinary["masks"][step - 1]))
        torch.testing.assert_close(ordinary["rows"][step - 1][:, shown], result["rows"][step - 1][:, shown], rtol=0, atol=1e-12)
    # At the next update all dense values are averaged, and a mean of means is the mean: nothing is lost.
    torch.testing.assert_close(ordinary["rows"][15], result["rows"][15], rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------- layouts
@pytest.mark.parametrize(("strategy", "world"), [(ring, 2), (blocks, 4)], ids=["ring", "blocks"])
def test_layouts_agree(ranks, strategy, world):
    one, several = here(strategy), ranks.run(world, sparse, 4 // world, strategy)
    for other in several:
        assert torch.equal(one["masks"], other["masks"])
        assert one["traffic"] == other["traffic"]
    rows = torch.cat([other["rows"] for other in several], dim=1)
    torch.testing.assert_close(one["rows"], rows, rtol=0, atol=1e-10)


def falling(step):
    """H, which becomes 1: gradients are averaged from there on, and nothing would make hidden values equal."""
    return 4 if step < 12 else 1


def test_replicas_are_equal_before_gradients_are_averaged(ranks):
    def strategy(m):
        return LocalSGDStrategy(falling, replicas_per_device=m)

    pruning = DynamicPruning(0.8, period=5, sparse_rounds=True)
    one = sparse(0, 1, 2, strategy, pruning=pruning)
    assert one["updates"] == [8, 12, 15]
    assert (one["rows"][11:, 0] - one["rows"][11:, 1]).abs().max() < 1e-12
    several = ranks.run(2, sparse, 1, strategy, pruning=DynamicPruning(0.8, period=5, sparse_rounds=True))
    for other in several:
        assert torch.equal(one["masks"], other["masks"])
        assert one["traffic"] == other["traffic"]
    rows = torch.cat([other["rows"] for other in several], dim=1)
    torch.testing.assert_close(one["rows"], rows, rtol=0, atol=1e-10)


def test_after_a_switch_to_local_steps():
    options = {"callbacks": [PostLocalSwitch(8, sync_period=2)]}
    result = sparse(0, 1, 2, local, **options)
    shown = visible(bits(result["masks"][11]))
    assert np.ptp(result["rows"][11].numpy()[:, shown], axis=0).max() == 0
    assert np.ptp(result["rows"][11].numpy()[:, ~shown], axis=0).max() > 1e-4


@pytest.mark.parametrize("optimizer_state", ["average", "average_all", "reset"])
def test_policies_for_the_optimizer_state_act_on_all_of_it(optimizer_state):
    class Momentum(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 12:
                states = []
                for row in (1, 0):
                    trainer.strategy.replicas.activate(row)
                    state = trainer.optimizers[0].state
                    states.append([state[p].get("momentum_buffer") for p in trainer.optimizers[0].param_groups[0]["params"]])
                self.states = states

    momentum = Momentum()
    fit(
        0,
        1,
        LocalSGDStrategy(2, replicas_per_device=2, optimizer_state=optimizer_state),
        DynamicPruning(0.8, period=8, sparse_rounds=True),
        callbacks=[momentum],
    )
    one, other = momentum.states
    if optimizer_state == "reset":
        assert one == other == [None] * 6
    else:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_resume_is_bit_exact(tmp_path):
    # Step 13 lies in a round that sends a part, after one that did, and hidden values differ.
    assert stop_and_go(0, 1, "local", 2, tmp_path, 13, {"period": 8, "sparse_rounds": True}) == ([], 7)
    assert stop_and_go(0, 1, "ring", 4, tmp_path / "ring", 13, {"period": 8, "sparse_rounds": True}) == ([], 7)


def test_gossip_updates_wait_for_rounds():
    def strategy(m):
        return GossipStrategy("dsgd", topology="ring", sync_period=3, replicas_per_device=m)

    assert sparse(0, 1, 4, strategy)["updates"] == [9, 18]  # due at 8 and 16


def test_weights_that_come_back_at_zero_are_zero_in_every_replica():
    pruning = DynamicPruning(0.8, Swap(), period=8, sparse_rounds=True)
    result = sparse(0, 1, 2, local, pruning=pruning)
    before, after = bits(result["masks"][14]), bits(result["masks"][15])
    back = visible(after & ~before) & ~visible(np.zeros(TOTAL, bool))
    assert back.sum() == TOTAL // 2
    assert np.ptp(result["rows"][14].numpy()[:, back], axis=0).max() > 1e-4  # behind the masks, replicas were apart
    assert (result["rows"][15].numpy()[:, back] == 0).all()


# -------------------------------------------------------------------------------------------------------------- bad input
REFUSED = {
    "single": lambda: "auto",
    "dpsgd": lambda: GossipStrategy(DPSGD(), topology="ring", replicas_per_device=4),
    "overlap": lambda: GossipStrategy(DSGD(), topology="ring", replicas_per_device=4, overlap=True),
    "choco": lambda: GossipStrategy(CHOCO(), topology="ring", replicas_per_device=4),
    "quasi_global": lambda: GossipStrategy(QuasiGlobal(), topology="ring", replicas_per_device=4),
    **{
        name: lambda name=name: GossipStrategy(name, replicas_per_device=4)
        for name in ("d2", "gradient_tracking", "push_sum", "relay_sum", "power_gossip", "dmsgd", "quasi_global_adam")
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_sends_something_else_is_refused(name):
    module = Net({"quasi_global_adam": "adamw", "quasi_global": "plain", "dmsgd": "plain"}.get(name, "sgd"))
    before = {key: value.clone() for key, value in module.double().state_dict().items()}
    with pytest.raises(MisconfigurationException, match=r"`sparse_rounds=True` needs rounds that average parameters"):
        fit(0, 1, REFUSED[name](), DynamicPruning(0.8, sparse_rounds=True), module=module)
    assert type(module.hidden) is nn.Linear
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_consensus_control_is_refused():
    with pytest.raises(MisconfigurationException, match="`sparse_rounds=True` needs rounds that average parameters"):
        fit(0, 1, ring(4), DynamicPruning(0.8, sparse_rounds=True), callbacks=[ConsensusControl("efficient", 0.1)])


def test_clients_are_refused():
    with pytest.raises(MisconfigurationException, match="the clients of FederatedStrategy make one after the other"):
        fit(0, 1, FederatedStrategy(clients=4, fraction=0.5), DynamicPruning(0.8))
