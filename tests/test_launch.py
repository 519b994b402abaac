"""Real launches: what the rank pool bypasses. Few, because every process that a launcher starts imports everything anew."""

from __future__ import annotations

import json
import runpy
import socket
import textwrap
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry

import lightning_distopt  # noqa: F401  # registers the strategies' names
from tests.helpers import Forked, exhaustive, fresh_environment

ROOT = Path(__file__).parent.parent
TORCHRUN = ["-m", "torch.distributed.run"]

SCRIPT = textwrap.dedent(
    """
    import json, sys, warnings
    from pathlib import Path
    warnings.filterwarnings("ignore")
    import lightning as L
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    from lightning_distopt import LocalSGDStrategy

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).sub(batch[1]).pow(2).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    class Write(L.Callback):
        def __init__(self, folder):
            self.folder, self.rows = Path(folder), []

        def on_train_batch_end(self, trainer, *_):
            self.rows.append(trainer.strategy.replica_parameters().tolist())

        def on_train_end(self, trainer, module):
            strategy, environment = trainer.strategy, trainer.strategy.cluster_environment
            found = {
                "n": strategy.num_replicas,
                "world": trainer.world_size,
                "node": trainer.node_rank,
                "environment": type(environment).__name__,
                "block": strategy.algorithm.block_size,
                "rounds": strategy.traffic.rounds,
                "rows": self.rows,
            }
            (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))

    def fit(folder, devices, num_nodes, strategy):
        L.seed_everything(0, verbose=False)
        x = torch.randn(128, 4, dtype=torch.float64)
        trainer = L.Trainer(
            accelerator="cpu", precision="64-true", devices=devices, num_nodes=num_nodes, max_epochs=1, logger=False,
            strategy=strategy if isinstance(strategy, str) else LocalSGDStrategy(**strategy), callbacks=[Write(folder)],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )
        module = Module().double()
        trainer.fit(module, DataLoader(TensorDataset(x, x.sum(dim=1, keepdim=True)), batch_size=4, shuffle=True))
        if trainer.global_rank == 0:
            parameters = [x for p in module.parameters() for x in p.detach().flatten().tolist()]
            (Path(folder) / "module.json").write_text(json.dumps(parameters))

    if __name__ == "__main__":
        fit(*json.loads(sys.argv[1]))
    """
)


def launch(
    folder: Path,
    commands: Sequence[tuple[list[str], dict[str, str]]],
    devices: int,
    num_nodes: int,
    strategy: str | dict[str, Any],
) -> tuple[list[dict[str, Any]], list[float]]:
    """Run the script under all commands, with their variables, at once.

    Returns:
        What each rank found, and the parameters of the module after `fit` on rank 0.
    """
    script = folder / "train.py"
    script.write_text(SCRIPT)
    arguments = [str(script), json.dumps([str(folder), devices, num_nodes, strategy])]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(Forked([*command, *arguments], folder, fresh_environment(ROOT) | variables, f"output{number}"))
            for number, (command, variables) in enumerate(commands)
        ]
        for process in processes:
            process.finish(timeout=120)
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(devices * num_nodes)]
    return ranks, json.loads((folder / "module.json").read_text())


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def test_names_mirror_those_of_ddp() -> None:
    def start_methods(prefix: str) -> dict[str, str]:
        names = [name for name in StrategyRegistry.available_strategies() if name.startswith(prefix)]
        return {
            name.removeprefix(prefix): StrategyRegistry[name]["init_params"]["start_method"]
            for name in names
            if "find_unused" not in name  # an option of DDP's, which goes through `ddp_kwargs`
        }

    assert start_methods("local_sgd") == start_methods("ddp")


@pytest.mark.launch
@pytest.mark.parametrize(
    ("command", "strategy"),
    [
        ([], "local_sgd"),
        ([], "local_sgd_spawn"),
        ([], "local_sgd_fork"),
        ([], "local_sgd_notebook"),
        exhaustive([*TORCHRUN, "--standalone", "--nproc-per-node=2"], "local_sgd"),
    ],
    ids=["popen", "spawn", "fork", "notebook", "torchrun"],
)
def test_one_node(tmp_path: Path, command: list[str], strategy: str) -> None:
    ranks, module = launch(tmp_path, [(command, {})], 2, 1, strategy)
    for found in ranks:
        assert (found["n"], found["world"], found["rounds"]) == (2, 2, 2)  # 16 steps, H = 8
    rows = torch.tensor([found["rows"] for found in ranks], dtype=torch.float64)[:, :, 0]  # [rank, step, parameter]
    spread = (rows[0] - rows[1]).abs().amax(dim=1)
    assert [step for step, distance in enumerate(spread.tolist(), start=1) if distance == 0] == [8, 16]
    assert module == rows[0, -1].tolist()


NODES = ["0", "1"]


def two_agents() -> list[tuple[list[str], dict[str, str]]]:
    """Two torchruns that meet at a given address, as on two machines."""
    meeting = ["--nnodes=2", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    return [([*TORCHRUN, *meeting, f"--node-rank={node}"], {}) for node in NODES]


def two_mains() -> list[tuple[list[str], dict[str, str]]]:
    """The script once on each node; Lightning starts the other process there."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [([], {**meeting, "NODE_RANK": node}) for node in NODES]


def four_tasks() -> list[tuple[list[str], dict[str, str]]]:
    """What srun does in a job of two nodes with two tasks each; the address follows from the list of nodes."""
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NNODES": "2",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "4",
        "SLURM_NTASKS_PER_NODE": "2",
        "MASTER_PORT": free_port(),
    }
    tasks = [{"SLURM_PROCID": str(i), "SLURM_NODEID": str(i // 2), "SLURM_LOCALID": str(i % 2)} for i in range(4)]
    return [([], {**job, **task}) for task in tasks]


@pytest.mark.launch
@pytest.mark.parametrize(
    ("commands", "environment"),
    [
        (two_agents, "TorchElasticEnvironment"),
        (two_mains, "LightningEnvironment"),
        (four_tasks, "SLURMEnvironment"),
    ],
    ids=["torchrun", "lightning", "slurm"],
)
def test_blocks_follow_nodes(tmp_path: Path, commands: Any, environment: str) -> None:
    """Two nodes of two ranks: averages inside a node every 2 steps, over both every 4, with the numbers of one process."""
    options = {"sync_period": 2, "block_period": 2}
    ranks, module = launch(tmp_path, commands(), 2, 2, options)
    for number, found in enumerate(ranks):
        assert found["environment"] == environment
        assert (found["n"], found["world"], found["node"], found["block"]) == (4, 4, number // 2, 2)
        assert found["rounds"] == 4  # in 8 steps
    rows = torch.tensor([found["rows"] for found in ranks], dtype=torch.float64)[:, :, 0]  # [rank, step, parameter]

    def equal(a: int, b: int) -> list[int]:
        return [step for step in range(1, 9) if torch.equal(rows[a, step - 1], rows[b, step - 1])]

    assert equal(0, 1) == equal(2, 3) == [2, 4, 6, 8]
    assert equal(0, 2) == equal(1, 3) == [4, 8]

    simulated = tmp_path / "simulated"
    simulated.mkdir()
    fit = runpy.run_path(str(tmp_path / "train.py"))["fit"]
    fit(str(simulated), 1, 1, {**options, "block_size": 2, "replicas_per_device": 4})
    expected = json.loads((simulated / "rank0.json").read_text())["rows"]  # [step, replica, parameter]
    torch.testing.assert_close(rows.transpose(0, 1), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.tensor(module, dtype=torch.float64), rows.mean(dim=0)[-1], rtol=0, atol=1e-12)
