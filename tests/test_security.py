"""Nothing that is read from disk or from the network runs code."""

from __future__ import annotations

import io
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader

import lightning_distopt
from lightning_distopt.communication.messages import pack, unpack
from tests.conformance.cases import CASES
from tests.conformance.problems import Augmented, fit_net
from tests.pool import RankPool

LOCAL = next(case for case in CASES if case.name == "local_sgd")


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "value",
    [1, 2.5, True, None, "text", b"bytes", [1, [2, "3"]], (1, (2,)), {"a": {"b": None}}, {1, 2}, float("inf"), "é", ""],
    ids=repr,
)
def test_messages_hold_plain_objects(value: Any) -> None:
    message = pack(value)
    assert message.dtype == torch.uint8
    assert message.dim() == 1
    read = unpack(message)
    assert read == value
    assert type(read) is type(value)


def test_messages_hold_tensors() -> None:
    value = {"x": torch.arange(6).reshape(2, 3), "y": [torch.tensor(2.5, dtype=torch.bfloat16)]}
    read = unpack(pack(value))
    assert torch.equal(read["x"], value["x"])
    assert torch.equal(read["y"][0], value["y"][0])


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_message_that_would_run_code_is_not_read(tmp_path: Path, how: str) -> None:
    buffer = io.BytesIO()
    if how == "pickle":
        pickle.dump(Malicious(tmp_path / "ran"), buffer)
    else:
        torch.save({"a": Malicious(tmp_path / "ran")}, buffer)
    message = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    with pytest.raises(ValueError, match="so it was not read"):
        unpack(message)
    assert not (tmp_path / "ran").exists()


def save(rank: int, world_size: int, folder: str) -> None:
    saver = ModelCheckpoint(dirpath=folder, filename="good", every_n_train_steps=6)
    fit_net(rank, world_size, 1, LOCAL, max_epochs=1, callbacks=(saver,), enable_checkpointing=True)


def resume(rank: int, world_size: int, path: str) -> str:
    try:
        fit_net(rank, world_size, 1, LOCAL, max_epochs=1, ckpt_path=path)
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("where", ["checkpoint", "replicas"])
def test_a_checkpoint_that_would_run_code_is_not_loaded(ranks: RankPool, tmp_path: Path, where: str) -> None:
    ranks.run(2, save, str(tmp_path))
    path = tmp_path / "good.ckpt"
    poisoned = path if where == "checkpoint" else sorted(Path(f"{path}.replicas").iterdir())[1]
    state = torch.load(poisoned, weights_only=True)
    torch.save({**state, "more": Malicious(tmp_path / "ran")}, poisoned)
    for text in ranks.run(2, resume, str(path)):
        assert "othing of it was loaded" in text or "Nothing was loaded" in text, text
        if where == "checkpoint":
            assert "weights_only=False" in text
        assert "\n" not in text
        assert len(text) < 900
    assert not (tmp_path / "ran").exists()


def without_objects(rank: int, world_size: int, folder: str) -> int:
    """Train, validate, save and resume where whoever unpickles what came over the network would raise."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an object was unpickled")

    unpickle = dist.distributed_c10d._tensor_to_object
    dist.distributed_c10d._tensor_to_object = refuse
    try:
        for ckpt_path in (None, f"{folder}/best.ckpt"):
            fit_net(
                rank,
                world_size,
                1,
                LOCAL,
                max_epochs=2,
                ckpt_path=ckpt_path,
                callbacks=(
                    ModelCheckpoint(dirpath=folder, filename="best", monitor="val_loss", enable_version_counter=False),
                    EarlyStopping("val_loss"),
                ),
                enable_checkpointing=True,
                logger=True,
                default_root_dir=folder,
                val_loader=DataLoader(Augmented(), batch_size=10),
                strategy={"buffers": "average", "optimizer_state": "average"},
            )
    finally:
        dist.distributed_c10d._tensor_to_object = unpickle
    return len(list(Path(folder).glob("*.ckpt")))


def test_training_unpickles_nothing_that_came_over_the_network(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, without_objects, str(tmp_path), timeout=60) == [1, 1]


def test_the_package_asks_for_no_unsafe_loading() -> None:
    root = Path(lightning_distopt.__file__).parent
    unsafe = re.compile(
        r"pickle\.loads?\(|weights_only\s*=\s*False\s*[,)]|(gather|broadcast|scatter)_object|(?<![.\w])(eval|exec)\("
    )
    found = [
        f"{path.name}: {line.strip()}"
        for path in root.rglob("*.py")
        for line in path.read_text().splitlines()
        if unsafe.search(line) and "`weights_only=False`" not in line
    ]
    assert found == []
