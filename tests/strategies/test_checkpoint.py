"""Checkpoints: ordinary files that anybody can load, replicas beside them, and nothing left over."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.conformance.cases import CASES
from tests.conformance.problems import LAYOUTS, fit_net

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
