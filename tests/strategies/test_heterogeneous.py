"""What strategies do for algorithms that own the momentum, and for momentum that all replicas share."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_distopt import GossipStrategy, LocalSGDStrategy, QuasiGlobal
from tests.conformance.cases import CASES
from tests.conformance.problems import (
    LAYOUTS,
    QUIET,
    Augmented,
    SmallNet,
    all_rows,
    fit_net,
    fit_quadratic,
    quadratic_gradients,
)
from tests.conformance.test_equations import ETAS, STEPS, start
from tests.oracles import gossip, topologies
from tests.oracles.local_sgd import SGD

BY_NAME = {case.name: case for case in CASES}
LOOKING_AHEAD = BY_NAME["quasi_global_nesterov"]


class Synchronised(SGD):
    """Momentum SGD whose buffers are averaged over all replicas after every step."""

    def step(self, X, G, eta):
        X = super().step(X, G, eta)
        self.U = np.broadcast_to(self.U.mean(axis=0), self.U.shape)
        return X


@pytest.mark.parametrize("layout", LAYOUTS[4], ids=str)
def test_momentum_synchronised_over_all_replicas(ranks, layout):
    m, world_size = layout
    options = {"partition": "fixed", "optimizer_state": "average_all"}
    results = ranks.run(world_size, fit_quadratic, m, BY_NAME["dsgd"], ETAS, strategy=options)
    W = topologies.one_peer_exponential(4)
    expected = gossip.dsgd(start(), quadratic_gradients(4, STEPS, 2), ETAS, 4, Synchronised(0.9, 0.01), W=W)
    np.testing.assert_allclose(all_rows(results).numpy(), expected, rtol=0, atol=1e-10)


class Momentum(Callback):
    """Keeps the momentum of every row of this rank, after every step."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, *args):
        replicas = trainer.strategy.replicas
        states = [replicas.pack_optimizers(row)[0] for row in range(replicas.replicas_per_rank)]
        self.rows.append([[state["momentum_buffer"] for state in of_row.values()] for of_row in states])


def momentum_in_blocks(rank, world_size, m, policy):
    """At `H = 1`: gradients are averaged in blocks of two, and parameters over all in the second step."""
    momentum, case = Momentum(), SimpleNamespace(strategy=LocalSGDStrategy, callbacks=tuple)
    options = {"sync_period": 1, "block_size": 2, "block_period": 2, "partition": "fixed", "optimizer_state": policy}
    fit_quadratic(rank, world_size, m, case, ETAS, callbacks=(momentum,), max_steps=2, strategy=options)
    return momentum.rows


@pytest.mark.parametrize("layout", LAYOUTS[4], ids=str)
def test_policies_act_where_more_is_averaged_than_gradients(ranks, layout):
    m, world_size = layout
    kept, averaged, reset = (
        [
            [row for rows in of_ranks for row in rows]
            for of_ranks in zip(*ranks.run(world_size, momentum_in_blocks, m, policy), strict=True)
        ]
        for policy in ("keep", "average", "reset")
    )
    flat = [torch.stack([torch.cat([value.flatten() for value in row]) for row in rows]) for rows in (*kept, *averaged)]
    assert torch.equal(flat[0], flat[2])  # nothing is averaged beside gradients in the first step
    assert not torch.equal(flat[1][0], flat[1][2])
    torch.testing.assert_close(flat[3], flat[1].mean(dim=0).expand(4, -1), rtol=0, atol=1e-12)
    assert reset[0] and reset[1] == [[]] * 4


@pytest.mark.parametrize("layout", LAYOUTS[4], ids=str)
def test_a_look_ahead_is_never_shown(ranks, layout):
    """Between batches whose gradients add up, parameters are ahead; rows are the iterates."""
    m, world_size = layout
    rows = all_rows(ranks.run(world_size, fit_quadratic, m, LOOKING_AHEAD, ETAS, accumulate_grad_batches=2, batch_size=1))
    torch.testing.assert_close(rows[2::2], rows[1:-1:2], rtol=0, atol=0)
    assert (rows[3::2] != rows[2:-1:2]).any(dim=2).all()


class SaveAfterBatch(Callback):
    """Saves in the middle of an accumulation, and keeps the average that is validated there."""

    def __init__(self, batch, path):
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == self.batch and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


class Start(Callback):
    """Keeps the rows that training starts from."""

    def on_train_batch_start(self, trainer, *args):
        self.rows = getattr(self, "rows", trainer.strategy.replica_parameters())


def resumed_start(rank, world_size, m, path):
    start = Start()
    result = saved_rows(rank, world_size, m, path, ckpt_path=path, callbacks=(start,))
    return start.rows, result["rows"]


def saved_rows(rank, world_size, m, path, **options):
    return fit_net(rank, world_size, m, LOOKING_AHEAD, accumulate_grad_batches=2, max_epochs=1, **options)


@pytest.mark.parametrize("layout", LAYOUTS[4], ids=str)
def test_a_checkpoint_in_the_middle_of_an_accumulation_holds_the_iterates(ranks, tmp_path, layout):
    m, world_size = layout
    path = str(tmp_path / "middle.ckpt")
    whole = ranks.run(world_size, saved_rows, m, path, callbacks=(SaveAfterBatch(2, path),))
    model = torch.load(path, weights_only=True)["state_dict"]
    iterates = all_rows(whole)[2].mean(dim=0)
    shown = torch.cat(
        [
            model[name].flatten()
            for name in model
            if name in dict(SmallNet().named_parameters()) and not name.startswith("frozen") and name != "tied.weight"
        ]
    )
    torch.testing.assert_close(shown, iterates, rtol=0, atol=1e-12)
    resumed = torch.cat([rows for rows, _ in ranks.run(world_size, resumed_start, m, path)])
    torch.testing.assert_close(resumed, all_rows(whole)[2], rtol=0, atol=0)


def train_alone(max_steps, ckpt_path=None, callbacks=()):
    warnings.filterwarnings("ignore")
    L.seed_everything(7, verbose=False)
    module = SmallNet("plain")
    module.dropout = torch.nn.Identity()
    data = torch.utils.data.TensorDataset(Augmented(dtype=torch.float32).x, Augmented().y)
    strategy = GossipStrategy(QuasiGlobal(nesterov=True))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_steps=max_steps,
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
        **QUIET,
    )
    trainer.fit(module, DataLoader(data, batch_size=7), ckpt_path=ckpt_path)
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_a_single_replica_resumes_with_its_momentum(tmp_path):
    whole = train_alone(18, callbacks=[ModelCheckpoint(tmp_path, filename="ten", every_n_train_steps=10, save_top_k=-1)])
    rest = train_alone(18, ckpt_path=str(tmp_path / "ten.ckpt"))
    torch.testing.assert_close(rest, whole, rtol=0, atol=0)


def test_half_precision_that_overflows_is_refused_where_gradients_are_remembered(monkeypatch):
    module, data = SmallNet(), DataLoader(Augmented(dtype=torch.float32), batch_size=7)
    strategy = GossipStrategy("gradient_tracking", replicas_per_device=2)
    trainer = L.Trainer(accelerator="cpu", devices=1, strategy=strategy, max_steps=1, enable_checkpointing=False, **QUIET)
    monkeypatch.setattr(trainer.precision_plugin, "scaler", torch.amp.GradScaler("cpu"), raising=False)
    with pytest.raises(MisconfigurationException, match=r"GradientTracking remembers gradients.*use `precision='bf16-mixed'`"):
        trainer.fit(module, data)


def test_an_optimizer_with_momentum_is_refused_before_training():
    strategy = GossipStrategy("quasi_global", replicas_per_device=2)
    trainer = L.Trainer(accelerator="cpu", devices=1, strategy=strategy, max_steps=1, enable_checkpointing=False, **QUIET)
    with pytest.raises(ValueError, match="QuasiGlobal has a momentum of its own"):
        trainer.fit(SmallNet(), DataLoader(Augmented(dtype=torch.float32), batch_size=7))
    assert trainer.global_step == 0
