"""Lightning's private names that the package uses: they exist, and where one is missing training goes on."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, Timer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_distopt import LocalSGDStrategy
from lightning_distopt.strategies import _lightning as private

VERSION = tuple(int(part) for part in re.findall(r"\d+", L.__version__)[:3])
SINCE = {"_broadcast_sigterm_tensor": (2, 6, 5)}  # names that earlier versions lack
QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
    "devices": 1,
}


def make(**options: Any) -> L.Trainer:
    return L.Trainer(**{**QUIET, "max_steps": 4, "limit_val_batches": 0, **options})


def owner_of(trainer: Any, path: str) -> Any:
    for name in path.split("."):
        trainer = getattr(trainer, name)
    return trainer


@pytest.mark.parametrize(("owner", "name"), private.PRIVATE_NAMES)
def test_the_name_exists(owner: str, name: str) -> None:
    trainer = make()
    there = hasattr(owner_of(trainer, owner), name)
    expected = SINCE.get(name, (2, 5, 0)) <= VERSION
    assert there is expected


def test_other_private_names() -> None:
    """Those that belong to something else than a Trainer."""
    from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
    from lightning.fabric.utilities.data import _reinstantiate_wrapped_cls
    from lightning.fabric.utilities.optimizer import _optimizers_to_device
    from lightning.pytorch.overrides.distributed import _sync_module_states
    from lightning.pytorch.trainer.call import _call_and_handle_interrupt
    from lightning.pytorch.utilities.data import _get_dataloader_init_args_and_kwargs

    assert list(inspect.signature(_optimizers_to_device).parameters) == ["optimizers", "device"]
    assert list(inspect.signature(_reinstantiate_wrapped_cls).parameters)[:2] == ["orig_object", "args"]
    assert list(inspect.signature(_get_dataloader_init_args_and_kwargs).parameters)[:2] == ["dataloader", "sampler"]
    assert list(inspect.signature(_sync_module_states).parameters) == ["module"]
    assert list(inspect.signature(_call_and_handle_interrupt).parameters)[:2] == ["trainer", "trainer_fn"]
    observer = _ChildProcessObserver(main_pid=0, child_processes=[])
    for name in ("_child_processes", "_run"):
        assert hasattr(observer, name), name
    trainer = make(callbacks=[ModelCheckpoint(train_time_interval=None)], enable_checkpointing=True)
    assert hasattr(trainer.checkpoint_callback, "_train_time_interval")
    assert hasattr(trainer._accelerator_connector, "use_distributed_sampler")
    assert hasattr(BoringModel(), "_on_before_batch_transfer")
    assert hasattr(BoringModel(), "_trainer")
    for name in ("_combined_loader", "_data_source"):
        assert hasattr(trainer.fit_loop.epoch_loop.val_loop, name), name
    assert isinstance(trainer.interrupted, bool)
    for name in ("_load_state_dicts", "_mode"):
        assert hasattr(CombinedLoader([]), name), name
    strategy = DDPStrategy()
    for name in ("_layer_sync", "_timeout", "_ddp_kwargs", "_start_method", "_launcher"):
        assert hasattr(strategy, name), name
    assert "_forward_cache" in inspect.getsource(_ResultMetric)
    assert trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0


def test_every_private_name_of_the_trainer_is_listed() -> None:
    """What the module reaches for below `trainer` stands in the list, so that the test above looks at it."""
    body = "".join(path.read_text() for path in Path(private.__file__).parent.glob("*.py") if path.name != "names.py")
    chains = re.findall(r"\b(?:trainer|connector|epoch_loop|fit_loop|precision_plugin)((?:\.\w+)+)", body)
    used = {name for chain in chains for name in chain.split(".") if name.startswith("_")}
    listed = {name for path, name in private.PRIVATE_NAMES} | {
        part for path, _ in private.PRIVATE_NAMES for part in path.split(".")
    }
    assert used
    assert used <= listed


def test_no_other_file_touches_private_names_of_the_trainer() -> None:
    root = Path(private.__file__).parent
    for path in root.parent.parent.rglob("*.py"):
        if path.parent != root:
            assert not re.findall(r"trainer\.(?:\w+\.)*_[a-z]\w*", path.read_text()), path


# -------------------------------------------------------------------------------------------------------------- patches


def test_patches_are_undone() -> None:
    """On the object alone, in the reverse order, also where the object had an attribute of its own."""

    class Thing:
        def method(self) -> str:
            return "original"

    thing, other, patches = Thing(), Thing(), private.Patches()
    other.method = lambda: "own"  # type: ignore[method-assign]
    for _ in range(2):
        assert patches.replace(thing, "method", lambda original: lambda: original() + "+")
        assert patches.replace(other, "method", lambda original: lambda: original() + "+")
    assert not patches.replace(thing, "missing", lambda original: original)
    assert (thing.method(), other.method()) == ("original++", "own++")
    patches.undo()
    patches.undo()
    assert (thing.method(), other.method(), vars(thing)) == ("original", "own", {})


def test_a_fit_leaves_no_patches() -> None:
    class Failing(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    for module in (BoringModel(), Failing()):
        strategy = LocalSGDStrategy(sync_period=2, replicas_per_device=2)
        trainer = make(strategy=strategy, callbacks=[Timer(duration={"hours": 1})])
        owners = [owner_of(trainer, path) for path, _ in private.PRIVATE_NAMES if path != "precision_plugin"]
        owners += [trainer.precision_plugin, trainer.fit_loop.epoch_loop.val_loop, *trainer.callbacks]  # type: ignore[attr-defined]
        names = {name for _, name in private.PRIVATE_NAMES} | {"run", "on_train_batch_end"}
        if isinstance(module, Failing):
            with pytest.raises(ZeroDivisionError):
                trainer.fit(module)
        else:
            trainer.fit(module)
        for owner in owners:
            patched = {name for name in names & set(vars(owner)) if callable(vars(owner)[name])}
            assert not patched, (type(owner).__name__, patched)


# ---------------------------------------------------------------------------------------------- where a name is missing


class Logging(BoringModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        self.log("loss", output["loss"])
        return output


def hide(trainer: Any, path: str, name: str) -> None:
    """Let an object be without a name, as in a version that has renamed it: only Lightning itself still finds it."""
    owner = owner_of(trainer, path)
    kind = type(owner)

    class Hiding(kind):  # type: ignore[misc, valid-type]
        def __getattribute__(self, asked: str) -> Any:
            caller = inspect.currentframe().f_back  # type: ignore[union-attr]
            if asked == name and caller is not None and "lightning_distopt" in caller.f_globals.get("__name__", ""):
                raise AttributeError(f"{kind.__name__} has no attribute {name}")
            return super().__getattribute__(asked)

    Hiding.__name__, Hiding.__qualname__ = kind.__name__, kind.__qualname__
    owner.__class__ = Hiding


@pytest.mark.parametrize(("path", "name"), private.PRIVATE_NAMES)
def test_a_missing_name_degrades(path: str, name: str) -> None:
    """An unknown Lightning version still trains, or says in a sentence what it can't do: no AttributeError halfway."""
    strategy = LocalSGDStrategy(sync_period=2, replicas_per_device=2)
    trainer = make(strategy=strategy)
    hide(trainer, path, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer.fit(Logging())
        except (MisconfigurationException, RuntimeError) as error:
            assert name in str(error) or "Lightning" in str(error)
            return
    assert trainer.global_step == 4
    assert strategy.traffic.rounds == 2


class Early(BoringModel):
    """Its loaders are made before a checkpoint is read, so it is not Lightning that brings them to their position."""

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches == 8
        return super().configure_optimizers()


class Hide(Callback):
    """Hides a name as soon as there are loaders."""

    def __init__(self, path: str, name: str) -> None:
        self.path, self.name = path, name

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        hide(trainer, self.path, self.name)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("fit_loop", "_combined_loader_states_to_load"),
        ("fit_loop", "_combined_loader"),
        ("fit_loop", "_data_fetcher"),
        ("fit_loop._combined_loader", "_load_state_dicts"),
    ],
)
def test_a_resume_without_a_name_goes_on_with_a_warning(tmp_path: Path, path: str, name: str) -> None:
    options: dict[str, Any] = {"max_epochs": 1, "max_steps": -1, "limit_train_batches": 8}
    saver = ModelCheckpoint(tmp_path, "last", every_n_train_steps=3)
    first = make(strategy=LocalSGDStrategy(2, replicas_per_device=2), callbacks=[saver], enable_checkpointing=True, **options)
    first.fit(Early())
    callbacks = [] if path == "fit_loop" else [Hide(path, name)]
    resumed = make(strategy=LocalSGDStrategy(2, replicas_per_device=2), callbacks=callbacks, **options)
    if path == "fit_loop":
        hide(resumed, path, name)
    with pytest.warns(UserWarning, match=f"lacks `{name}`"):
        resumed.fit(Early(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert resumed.global_step == 8


def test_whether_loaders_start_over_is_no_without_the_name() -> None:
    trainer = make()
    assert not private.starts_over(trainer)
    hide(trainer, "fit_loop", "_combined_loader")
    assert not private.starts_over(trainer)


def test_data_that_cannot_be_divided_is_warned_about() -> None:
    strategy = LocalSGDStrategy(sync_period=2)
    trainer = make(strategy=strategy)
    hide(trainer, "_data_connector", "_prepare_dataloader")
    with pytest.warns(UserWarning, match="lacks `_prepare_dataloader`"):
        trainer.fit(BoringModel())


def test_the_state_of_optimizers_moves() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.grad = torch.ones(2)
    optimizer.step()
    private.move_optimizers([optimizer], torch.device("meta"))
    assert optimizer.state[parameter]["momentum_buffer"].device.type == "meta"
