"""Checkpoints: ordinary files that anybody can load, replicas beside them, and nothing left over."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch.utils.data import DataLoader

from lightning_distopt import LocalSGDStrategy
from tests.conformance.cases import CASES
from tests.conformance.problems import LAYOUTS, QUIET, Augmented, SmallNet, fit_net
from tests.helpers import PoolEnvironment

LOCAL = next(case for case in CASES if case.name == "local_sgd")


class Average(L.Callback):
    """Keeps the mean of the replicas at every step, taken by hand."""

    def __init__(self):
        self.means = {}

    def on_train_batch_end(self, trainer, *args):
        rows = trainer.strategy.all_gather(trainer.strategy.replica_parameters())
        self.means[trainer.global_step] = rows.reshape(-1, rows.shape[-1]).mean(dim=0)


def save(rank, world_size, m, folder):
    average = Average()
    saver = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=2, save_top_k=-1, save_last="link")
    fit_net(rank, world_size, m, LOCAL, callbacks=(average, saver), enable_checkpointing=True, max_epochs=1)
    return average.means


@pytest.mark.parametrize("layout", LAYOUTS[4], ids=str)
def test_the_checkpoint_holds_the_average(ranks, tmp_path, layout):
    m, world_size = layout
    means = ranks.run(world_size, save, m, str(tmp_path))[0]
    state = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["state_dict"]
    order = ["conv.weight", "conv.bias", "norm.weight", "norm.bias", "hidden.weight", "hidden.bias", "tied.bias"]
    order += ["head.weight", "head.bias"]
    mean = torch.cat([state[name].reshape(-1) for name in order])
    torch.testing.assert_close(mean, means[4], rtol=0, atol=1e-12)


def test_every_rank_has_a_file_beside_the_checkpoint(ranks, tmp_path):
    ranks.run(4, save, 1, str(tmp_path))
    names = sorted(path.name for path in (tmp_path / "step=4.ckpt.replicas").iterdir())
    assert len(names) == 4
    assert [name.split("-", 1)[1] for name in names] == [f"rank-{rank:05d}.ckpt" for rank in range(4)]
    torch.load(tmp_path / "step=4.ckpt.replicas" / names[0], weights_only=True)


def link(rank, world_size, path):
    return fit_net(rank, world_size, 1, LOCAL, ckpt_path=path, max_epochs=1)["global_step"]


def test_a_link_to_the_last_checkpoint_resumes(ranks, tmp_path):
    ranks.run(2, save, 1, str(tmp_path))
    (tmp_path / "latest.ckpt").symlink_to(tmp_path / "step=4.ckpt")
    assert ranks.run(2, link, str(tmp_path / "latest.ckpt")) == [12, 12]


def keep_two(rank, world_size, folder):
    saver = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=2, monitor="step", mode="max", save_top_k=2)
    fit_net(rank, world_size, 1, LOCAL, callbacks=(saver,), enable_checkpointing=True, max_epochs=1)


def test_replica_files_go_with_the_checkpoint(ranks, tmp_path):
    ranks.run(2, keep_two, str(tmp_path))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step=10.ckpt", "step=10.ckpt.replicas", "step=12.ckpt", "step=12.ckpt.replicas"]


def overwrite(rank, world_size, folder):
    saver = ModelCheckpoint(dirpath=folder, filename="same", every_n_train_steps=2, save_top_k=1, enable_version_counter=False)
    fit_net(rank, world_size, 1, LOCAL, callbacks=(saver,), enable_checkpointing=True, max_epochs=1)


def test_overwriting_leaves_one_set_of_replica_files(ranks, tmp_path):
    ranks.run(2, overwrite, str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["same.ckpt", "same.ckpt.replicas"]
    assert len(list((tmp_path / "same.ckpt.replicas").iterdir())) == 2


def test_loads_where_the_package_is_unknown(tmp_path):
    from tests.conformance.problems import Quadratic, fit_quadratic

    saver = ModelCheckpoint(dirpath=tmp_path, filename="plain", every_n_train_steps=3)
    fit_quadratic(0, 1, 4, LOCAL, [0.1] * 5, callbacks=(saver,), enable_checkpointing=True)
    names = [name for name, _ in Quadratic([]).named_parameters()]
    script = textwrap.dedent(f"""
        import sys, torch, lightning as L
        class MyModule(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.double))
                self.bias = torch.nn.Parameter(torch.zeros(2, dtype=torch.double))
        module = MyModule.load_from_checkpoint({str(tmp_path / "plain.ckpt")!r})
        assert not any("distopt" in name for name in sys.modules)
        print(*torch.cat([getattr(module, name).detach().flatten() for name in {names!r}]).tolist())
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]
    expected = torch.cat([state[name].flatten() for name in names])
    assert [float(x) for x in done.stdout.split()] == expected.tolist()


def test_weights_only_checkpoints_have_no_replicas(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, filename="weights", every_n_train_steps=3, save_weights_only=True)
    fit_net(0, 1, 2, LOCAL, callbacks=(saver,), enable_checkpointing=True, max_epochs=1)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("weights")] == ["weights.ckpt"]


def fail_in_training(rank, world_size, folder):
    class Fail(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 4:
                raise RuntimeError("boom")

    from lightning.pytorch.callbacks import OnExceptionCheckpoint

    with pytest.raises(RuntimeError, match="boom"):
        fit_net(
            rank,
            world_size,
            1,
            LOCAL,
            callbacks=(OnExceptionCheckpoint(folder), Fail()),
            enable_checkpointing=True,
            max_epochs=1,
        )
    return True


def test_a_checkpoint_on_an_exception_does_not_wait_for_others(ranks, tmp_path):
    assert ranks.run(2, fail_in_training, str(tmp_path), timeout=30) == [True, True]
    assert (Path(tmp_path) / "on_exception.ckpt").exists()


def finish(rank, world_size, m, folder, buffers):
    """Train to the end, in the middle of a round, and resume what has come to its end; returns what is other then."""
    states = []
    for path in (None, f"{folder}/done.ckpt"):
        torch.manual_seed(1)
        module, strategy = SmallNet().double(), LocalSGDStrategy(100, replicas_per_device=m, buffers=buffers)
        saver = ModelCheckpoint(folder, "done", every_n_train_steps=4, enable_version_counter=False)
        options = {"max_steps": 4, "callbacks": [saver], "plugins": [PoolEnvironment(rank, world_size)], **QUIET}
        trainer = L.Trainer(accelerator="cpu", devices=world_size, strategy=strategy, **options)
        trainer.fit(module, DataLoader(Augmented(), batch_size=3), ckpt_path=path)
        states.append({name: value.clone() for name, value in module.state_dict().items()})
    return [name for name, value in states[0].items() if not torch.equal(value, states[1][name])]


@pytest.mark.parametrize("buffers", ["local", "recalibrate"])
@pytest.mark.parametrize("layout", LAYOUTS[2], ids=str)
def test_training_that_was_over_leaves_the_average(ranks, tmp_path, layout, buffers):
    m, world_size = layout
    assert ranks.run(world_size, finish, m, str(tmp_path), buffers) == [[]] * world_size


def train_on_one(rank, world_size, strategy, path):
    """Go on with a single replica; returns the steps made in all, and what was warned about."""
    trainer = L.Trainer(accelerator="cpu", devices=1, strategy=strategy, max_steps=9, enable_checkpointing=False, **QUIET)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(SmallNet("sgd").double(), DataLoader(Augmented(), batch_size=3), ckpt_path=path)
    return trainer.global_step, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("strategy", ["auto", "local_sgd"])
def test_one_replica_goes_on_from_the_middle_of_an_epoch(ranks, tmp_path, strategy):
    ranks.run(1, save, 2, str(tmp_path))
    ((steps, warned),) = ranks.run(1, train_on_one, strategy, str(tmp_path / "step=4.ckpt"))
    assert steps == 9
    assert any("saved with 2 replicas and is resumed with 1" in text for text in warned) is (strategy != "auto")


def save_with_fewer(rank, world_size, folder):
    """The ranks of now overwrite what twice as many have written."""
    saver = ModelCheckpoint(folder, "same", every_n_train_steps=2, enable_version_counter=False)
    fit_net(rank, world_size, 1, LOCAL, callbacks=(saver,), enable_checkpointing=True, max_epochs=1)


def test_files_of_ranks_that_are_no_more_go(ranks, tmp_path):
    for world_size in (4, 2):
        ranks.run(world_size, save_with_fewer, str(tmp_path))
        assert len(os.listdir(tmp_path / "same.ckpt.replicas")) == world_size


class Late(AsyncCheckpointIO):
    """Writes the ordinary file of a later save only when all else is done."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        if "state_dict" in checkpoint and Path(path).exists():
            self.left = checkpoint, path
            return
        self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)


def test_replicas_stay_until_a_file_that_is_written_late_names_others(tmp_path):
    late = Late()
    saver = ModelCheckpoint(tmp_path, "same", every_n_train_steps=2, enable_version_counter=False)
    options = {"plugins": [late], "callbacks": (saver,), "enable_checkpointing": True}
    fit_net(0, 1, 2, LOCAL, **options, max_steps=4)
    token = torch.load(tmp_path / "same.ckpt", weights_only=True)["lightning_distopt"]["token"]
    assert late.left[0]["lightning_distopt"]["token"] != token
    assert (tmp_path / "same.ckpt.replicas" / f"{token}-rank-00000.ckpt").exists()
    fit_net(0, 1, 2, LOCAL, max_steps=6, ckpt_path=str(tmp_path / "same.ckpt"))
    fit_net(0, 1, 2, LOCAL, **options, max_steps=12)  # and go then
    assert len(os.listdir(tmp_path / "same.ckpt.replicas")) == 2


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

    def fail(self, checkpoint, path, storage_options=None):
        Path(path).write_text("half of it")
        raise OSError("the disk is full")

    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", fail)
    saver = ModelCheckpoint(tmp_path, "same", every_n_train_steps=2)
    with pytest.raises(OSError, match="disk is full"):
        fit_net(0, 1, 1, LOCAL, callbacks=(saver,), enable_checkpointing=True, max_steps=4)
    assert os.listdir(tmp_path) == []
