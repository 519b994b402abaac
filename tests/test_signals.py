"""Signals to processes that were really launched: popen's children get Ctrl-C too, and SIGTERM from their parent."""

from __future__ import annotations

import os
import signal
import textwrap
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import Forked, fresh_environment

ROOT = Path(__file__).parent.parent

SCRIPT = textwrap.dedent(
    """
    import signal, sys, time, warnings
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which whoever started the tests may ignore
    from pathlib import Path
    warnings.filterwarnings("ignore")
    import lightning as L
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader, TensorDataset
    from lightning_distopt import LocalSGDStrategy
    from tests.faults import Module

    class Tell(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            time.sleep(0.01)
            if trainer.global_step == 5:
                Path(sys.argv[1], f"trains{trainer.global_rank}").touch()

    if __name__ == "__main__":
        x = torch.randn(64, 4)
        trainer = L.Trainer(
            accelerator="cpu", devices=2, strategy=LocalSGDStrategy(4), max_steps=3000, logger=False,
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[Tell(), ModelCheckpoint(sys.argv[1], every_n_epochs=1000)],
        )
        trainer.fit(Module(), DataLoader(TensorDataset(x, x.sum(dim=1, keepdim=True)), batch_size=4))
    """
)


@pytest.mark.launch
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "SIGTERM"])
def test_a_signal_ends_all_processes_with_a_checkpoint(tmp_path: Path, number: int) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    with Forked([str(script), str(tmp_path)], tmp_path, fresh_environment(ROOT)) as main:
        process = main.process
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("trains*"))) < 2:
            assert process.is_alive(), main.said
            assert time.monotonic() < deadline, "did not come to train"
            time.sleep(0.05)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # a terminal tells all
        else:
            os.kill(process.pid, number)
        process.join(60)
        text = main.said
        assert not process.is_alive(), text
    assert process.exitcode >= 0, "was killed"  # Lightning ends with 0 after SIGTERM, with 1 after Ctrl-C
    assert "Training ends by a signal after step" in text
    assert "Exception ignored" not in text
    checkpoint = torch.load(tmp_path / "interrupted.ckpt", weights_only=True)
    assert 5 <= checkpoint["global_step"] < 3000
    assert checkpoint["global_step"] % 4 == 0  # H
    for rank in range(2):
        token = checkpoint["lightning_distopt"]["token"]
        state = torch.load(tmp_path / "interrupted.ckpt.replicas" / f"{token}-rank-{rank:05d}.ckpt", weights_only=True)
        assert state["steps"] == checkpoint["global_step"]
