"""What several tests need to run Lightning inside of the rank pool."""

from __future__ import annotations

import os

from lightning.pytorch.plugins.environments import ClusterEnvironment

LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def fresh_environment(root: os.PathLike[str]) -> dict[str, str]:
    """Return the environment for a process that launches ranks itself and imports the package from `root`.

    Trainers of other tests may have left what a launcher sets, which would tell this one that it has launched already.
    """
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    return environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.fspath(root)}


class PoolEnvironment(ClusterEnvironment):
    """Tells a `Trainer` that it runs on one rank of the pool, whose processes exist already.

    Works with either setting of the pool's `process_group`: Lightning takes a process group that is there as it is, and
    otherwise initialises one from the environment variables that the pool has set.

    Example:
        >>> def fit(rank, world_size):
        ...     env = PoolEnvironment(rank, world_size)
        ...     trainer = Trainer(accelerator="cpu", devices=world_size, strategy="ddp", plugins=[env], max_steps=5)
        ...     trainer.fit(Model())
        >>> ranks.run(2, fit)  # doctest: +SKIP

    Args:
        rank: this process's rank, on the only node.
        world_size: number of ranks.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self._rank = rank
        self._world_size = world_size

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return os.environ["MASTER_ADDR"]

    @property
    def main_port(self) -> int:
        return int(os.environ["MASTER_PORT"])

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._world_size

    def set_world_size(self, size: int) -> None:
        if size != self._world_size:
            raise ValueError(f"The Trainer asks for {size} ranks, but the pool runs {self._world_size}")

    def global_rank(self) -> int:
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        if rank != self._rank:
            raise ValueError(f"The Trainer takes this for rank {rank}, but it is rank {self._rank} of the pool")

    def local_rank(self) -> int:
        return self._rank

    def node_rank(self) -> int:
        return 0
