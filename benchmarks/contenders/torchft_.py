"""torchft's LocalSGD: every rank is a replica group of its own; the lighthouse runs beside rank 0."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch.distributed as dist

from benchmarks.contenders.task import Pace, Task

os.environ.setdefault("RUST_LOG", "error")  # read when torchft is imported
PATIENCE = timedelta(minutes=10)


def _address() -> str:
    """Return the address at which other ranks find this one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], 9))
        return str(probe.getsockname()[0])


def loop(task: Task, pace: Pace, period: int) -> None:
    """Train with rounds every `period` steps."""
    here = _address()
    socket.gethostname = lambda: here  # torchft tells others this name, which network namespaces share
    from torchft import Manager, ProcessGroupGloo
    from torchft.coordination import LighthouseServer
    from torchft.local_sgd import LocalSGD

    lighthouse = LighthouseServer(bind="0.0.0.0:0", min_replicas=task.n, join_timeout_ms=60_000) if task.rank == 0 else None
    told = [lighthouse and f"http://{here}:{lighthouse.address().rpartition(':')[2]}"]
    dist.broadcast_object_list(told)
    store = dist.TCPStore(here, 0, is_master=True, wait_for_workers=False)
    made = task.module.configure_optimizers()
    optimizer = made["optimizer"]
    manager = Manager(
        pg=ProcessGroupGloo(timeout=PATIENCE),
        load_state_dict=task.module.network.load_state_dict,
        state_dict=task.module.network.state_dict,
        min_replica_size=task.n,
        use_async_quorum=False,  # LocalSGD asks for it
        timeout=PATIENCE,
        quorum_timeout=PATIENCE,
        rank=0,
        world_size=1,
        store_addr=here,
        store_port=store.port,
        lighthouse_addr=told[0],
        replica_id=f"rank_{task.rank}",
        hostname=here,
        init_sync=False,  # all ranks start from the same seed
    )
    with LocalSGD(manager, task.module.network, optimizer, sync_every=period):
        task.train(pace, task.module.network, optimizer, made["lr_scheduler"]["scheduler"])
