"""Real launches: what the rank pool bypasses. Few, because every fresh process imports everything anew."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.helpers import fresh_environment

SCRIPT = textwrap.dedent(
    """
    import json, os, sys, warnings
    warnings.filterwarnings("ignore")
    import lightning as L
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    import lightning_distopt

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).sub(batch[1]).pow(2).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    class Write(L.Callback):
        def on_train_end(self, trainer, module):
            strategy = trainer.strategy
            found = {
                "n": strategy.num_replicas,
                "world": trainer.world_size,
                "rounds": strategy.traffic.rounds,
                "row": strategy.replica_parameters()[0].tolist(),
            }
            with open(os.path.join(sys.argv[1], f"rank{trainer.global_rank}.json"), "w") as file:
                json.dump(found, file)

    if __name__ == "__main__":
        L.seed_everything(0, verbose=False)
        x = torch.randn(64, 4)
        trainer = L.Trainer(
            accelerator="cpu", devices=2, strategy=sys.argv[2], max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[Write()],
        )
        module = Module()
        trainer.fit(module, DataLoader(TensorDataset(x, x.sum(dim=1, keepdim=True)), batch_size=4, shuffle=True))
        if trainer.global_rank == 0:
            with open(os.path.join(sys.argv[1], "module.json"), "w") as file:
                json.dump([p.detach().flatten().tolist() for p in module.parameters()], file)
    """
)


@pytest.mark.launch
@pytest.mark.parametrize(
    ("launcher", "strategy"),
    [
        ([sys.executable], "local_sgd"),
        ([sys.executable], "local_sgd_fork"),
        ([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], "local_sgd"),
    ],
    ids=["popen", "fork", "torchrun"],
)
def test_launch(tmp_path: Path, launcher: list[str], strategy: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parent.parent
    environment = fresh_environment(root)
    command = [*launcher, str(script), str(tmp_path), strategy]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for found in ranks:
        assert (found["n"], found["world"], found["rounds"]) == (2, 2, 1)  # 8 steps, H = 8
    assert ranks[0]["row"] == ranks[1]["row"]
    module = json.loads((tmp_path / "module.json").read_text())
    assert [x for p in module for x in p] == ranks[0]["row"]
