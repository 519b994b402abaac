"""What `DynamicPruning` logs and draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distopt.callbacks.dynamic_pruning import DynamicPruning
from lightning_distopt.callbacks.sparsity_figure import draw_sparsity
from lightning_distopt.sparsity.macs import count_macs
from lightning_distopt.sparsity.statistics import SparsityHistory

BATCH = 4


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(96, 3)
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Logged(L.Callback):
    """Keeps what is logged, and how many hooks layers have."""

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []
        self.hooks: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.values.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.hooks.append(sum(len(layer._forward_hooks) for layer in pl_module.modules()))


def fit(
    folder: Path,
    pruning: DynamicPruning,
    steps: int = 8,
    ckpt_path: Any = None,
    saves: Any = None,
    more: Any = (),
    **options: Any,
) -> tuple[Module, Logged]:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(16, 1, 8, 8, generator=generator), torch.randint(3, (16,), generator=generator))
    logged, module = Logged(), Module()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[pruning, *more, logged, *([saves] if saves else [])],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"log_every_n_steps": 1, "logger": False, "enable_checkpointing": saves is not None, **options},
    )
    trainer.fit(module, DataLoader(data, BATCH), ckpt_path=ckpt_path)
    return module, logged


def test_costs_are_logged(tmp_path: Path) -> None:
    pruning = DynamicPruning(sparsity=0.75, period=2, ramp=0.5)
    module, logged = fit(tmp_path, pruning)
    last, first = logged.values[-1], logged.values[0]
    # Of the plain module after training, counted without the callback.
    layers = {name: layer for name, layer in module.named_modules() if name in ("model.0", "model.2", "model.4")}
    dense = count_macs(module, lambda: module.model(torch.zeros(1, 1, 8, 8)))
    left = {name: float((layer.weight != 0).double().mean()) for name, layer in layers.items()}
    assert dense == {"model.0": 9 * 4 * 64, "model.2": 36 * 6 * 16, "model.4": 288}
    assert last["sparsity/macs"] == pytest.approx(sum(left[name] * dense[name] for name in dense), abs=1e-9)
    assert last["sparsity/macs"] < first["sparsity/macs"] == sum(dense.values())
    parameters = sum(p.numel() for p in module.parameters())
    zeros = sum(int((layers[name].weight == 0).sum()) for name in ("model.0", "model.2"))
    assert zeros == round(0.75 * (36 + 216)) and last["sparsity"] == zeros / (36 + 216)
    assert first["sparsity/parameters"] == parameters and last["sparsity/parameters"] == parameters - zeros
    for values in logged.values:
        assert 0 <= values["sparsity/delta"] <= values["sparsity"] + 1e-12  # (6.1): those that go are the smallest
        total = 36 * values["sparsity/model.0"] + 216 * values["sparsity/model.2"]
        assert total == pytest.approx(252 * values["sparsity"])
    assert last["sparsity/delta"] > 0


def test_two_callbacks_are_summed_up(tmp_path: Path) -> None:
    """One for each layer logs and draws what belongs to both."""
    first = DynamicPruning(0.75, layers="model.0", period=2, ramp=0.5)
    second = DynamicPruning(0.5, layers="model.2", period=4, ramp=0.5)
    module, logged = fit(tmp_path, first, more=[second], logger=CSVLogger(tmp_path, name="run", version=""))
    last = logged.values[-1]
    assert (module.model[0].weight == 0).sum() == 27 and (module.model[2].weight == 0).sum() == 108
    assert last["sparsity/model.0"] == 0.75 and last["sparsity/model.2"] == 0.5
    assert last["sparsity"] == 135 / 252
    assert last["sparsity/parameters"] == sum(p.numel() for p in module.parameters()) - 135
    assert last["sparsity/macs"] == pytest.approx(9 * 4 * 64 / 4 + 36 * 6 * 16 / 2 + 288)
    killed = [sum(callback.notes.pruner.killed.values()) for callback in (first, second)]
    assert last["sparsity/killed"] == sum(killed) > 0
    assert [path.name for path in tmp_path.rglob("*.png")] == ["sparsity.png"]
    whole = SparsityHistory.joined([first.notes.history, second.notes.history])
    assert whole.steps == first.notes.history.steps == [0, 2, 4, 6] and second.notes.history.steps == [0, 4]
    assert whole.sparsity[-1] == [0.75, 0.5] and whole.sparsity[1] == [first.notes.history.sparsity[1][0], 0]
    assert whole.killed[2] == first.notes.history.killed[2] + second.notes.history.killed[1]


def test_a_network_that_computes_with_pruned_weights_costs_what_a_dense_one_does(tmp_path: Path) -> None:
    module, logged = fit(tmp_path, DynamicPruning(0.5, "soft_filter"))  # masks change after steps 4 and 8
    whole, macs = (logged.values[0][f"sparsity/{name}"] for name in ("parameters", "macs"))
    zeros = sum(int((module.model[k].weight == 0).sum()) for k in (0, 2))
    assert whole == sum(p.numel() for p in module.parameters()) and zeros == 126
    # A filter whose bias lets nothing through has no gradients and stays at zero; the others are back in the next step.
    assert [whole - values["sparsity/parameters"] for values in logged.values] == [0, 0, 0, zeros, 36, 36, 36, zeros]
    assert logged.values[3]["sparsity/macs"] == logged.values[7]["sparsity/macs"] < logged.values[4]["sparsity/macs"] < macs


def test_layers_have_no_hooks_after_the_first_batch(tmp_path: Path) -> None:
    _, logged = fit(tmp_path, DynamicPruning(sparsity=0.5), accumulate_grad_batches=2)
    assert set(logged.hooks) == {0}


def test_training_is_the_same_with_and_without_logging(tmp_path: Path) -> None:
    quiet, _ = fit(tmp_path, DynamicPruning(sparsity=0.5, period=2), log_every_n_steps=0)
    loud, _ = fit(tmp_path, DynamicPruning(sparsity=0.5, period=2))
    assert all(torch.equal(a, b) for a, b in zip(quiet.parameters(), loud.parameters(), strict=True))


def test_the_picture_is_written_where_it_is_wanted(tmp_path: Path) -> None:
    from matplotlib.image import imread

    path = tmp_path / "new" / "picture.png"
    fit(tmp_path, DynamicPruning(sparsity=0.9, period=2, figure=path))
    assert imread(path).shape[2] == 4
    fit(tmp_path, DynamicPruning(sparsity=0.9, period=2), logger=CSVLogger(tmp_path, name="run", version=""))
    assert imread(tmp_path / "run" / "sparsity.png").shape == imread(path).shape


@pytest.mark.parametrize("options", [{}, {"fast_dev_run": 2, "logger": True}])
def test_no_picture_without_a_folder_for_it(options: dict[str, Any], tmp_path: Path) -> None:
    fit(tmp_path, DynamicPruning(sparsity=0.9, period=2), **options)
    assert list(tmp_path.rglob("*.png")) == []


def test_the_picture_of_a_fit_that_failed(tmp_path: Path) -> None:
    class Fails(Module):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if self.trainer.global_step == 5:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    pruning = DynamicPruning(sparsity=0.9, period=2, figure=tmp_path / "a.png")
    data = TensorDataset(torch.randn(16, 1, 8, 8), torch.randint(3, (16,)))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(accelerator="cpu", max_steps=8, callbacks=[pruning], default_root_dir=tmp_path, **quiet)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(Fails(), DataLoader(data, BATCH))
    assert (tmp_path / "a.png").exists() and pruning.notes.history.steps == [0, 2, 4]


def test_history_goes_on_after_a_resume(tmp_path: Path) -> None:
    whole = DynamicPruning(sparsity=0.8, period=2)
    fit(tmp_path, whole, max_epochs=3, steps=-1)
    saves = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(tmp_path, DynamicPruning(sparsity=0.8, period=2), max_epochs=3, steps=-1, saves=saves)
    resumed = DynamicPruning(sparsity=0.8, period=2, figure=tmp_path / "b.png")
    fit(tmp_path, resumed, max_epochs=3, steps=-1, ckpt_path=tmp_path / "epoch=0.ckpt")
    for attribute in ("steps", "sparsity", "regrown", "killed"):
        assert getattr(resumed.notes.history, attribute) == getattr(whole.notes.history, attribute)
    assert resumed.notes.history.steps == [0, 2, 4, 6, 8, 10]
    assert (tmp_path / "b.png").exists()


def test_picture_of_many_layers_and_of_one_update(tmp_path: Path) -> None:
    from matplotlib.image import imread

    many = SparsityHistory({f"layer{k}": 10 for k in range(100)})
    one = SparsityHistory({"a": 10})
    for history, updates in ((many, 5), (one, 1)):
        for step in range(updates):
            history.add(step, dict.fromkeys(history.sizes, 0), dict.fromkeys(history.sizes, 2))
        draw_sparsity(history, tmp_path / "x.png")
        assert imread(tmp_path / "x.png")[..., :3].std() > 0.05  # there is something on it


def test_without_matplotlib_training_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level("INFO"):
        fit(tmp_path, DynamicPruning(sparsity=0.5, period=2, figure=tmp_path / "c.png"))
    assert "draws no picture without matplotlib" in caplog.text and not (tmp_path / "c.png").exists()
