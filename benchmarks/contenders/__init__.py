"""Who takes part in `benchmarks.time_to_accuracy`: what people use today, and what this package has in its place.

All train the same network from the same start on the same batches with the same optimizer; see `task`. A new contender is
an entry of `PEERS` or `OURS`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks.contenders import accelerate_, lightning_, torch_parts, torchft_
from benchmarks.contenders.task import Pace, Task
from lightning_distopt import GossipStrategy, LocalSGDStrategy, PostLocalSwitch
from lightning_distopt.algorithms import ALGORITHMS
from lightning_distopt.topologies import make

H, BLOCK_H, BLOCKS, RANK = 8, 4, 4, 2
"""Steps of a round; of one inside a cluster, and how many of those for one of all ranks; the rank of low-rank compression."""

ONE_PEER = "one_peer_exponential"


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Args:
        name: in tables.
        train: the body of a rank.
        sync_period: steps of a round.
        topology: "all" for an all-reduce, "gather" for an all-gather, or a graph; "" for others' contenders.
        blocks: rounds inside of clusters, the last of which is one of all ranks; such a contender needs two clusters.
        algorithm, compressor: as this package names them.
        overlap: whether messages travel while gradients are computed.
        dense: steps at the beginning that cost what DDP's do.
        post_local: whether those up to the workload's switch do.
        needs: a module that has to be installed.
        learns_as: the name of one that learns exactly the same, as a test shows, and is trained in its place.
    """

    name: str
    train: Callable[[Task, Pace], None]
    sync_period: int = 1
    topology: str = ""
    blocks: int = 1
    algorithm: str = ""
    compressor: str | None = None
    overlap: bool = False
    dense: int = 0
    post_local: bool = False
    needs: str | None = None
    learns_as: str = ""

    @property
    def ours(self) -> bool:
        """Whether it is one of this package."""
        return bool(self.topology)

    @property
    def installed(self) -> bool:
        """Whether what it needs is there."""
        return self.needs is None or importlib.util.find_spec(self.needs) is not None

    def cycle(self, n: int) -> int:
        """Return the steps after which everything repeats itself."""
        phases = make(self.topology, n).period or 1 if self.topology == ONE_PEER else 1
        if self.algorithm == "power_gossip":
            phases = 2  # it sends what belongs to rows and to columns in turns
        return self.sync_period * self.blocks * phases


def _ddp(name: str, strategy: Callable[[], Any], dense: int = 0) -> Contender:
    return Contender(name, partial(lightning_.fit, strategy=lambda task: strategy()), algorithm="ddp", dense=dense)


def _torch(name: str, averager: Callable[[int, int], Any], sync_period: int, blocks: int = 1) -> Contender:
    body = partial(torch_parts.loop, averager=averager)
    return Contender(name, body, sync_period=sync_period, blocks=blocks, post_local=True)


def _local(name: str, sync_period: int = H, blocks: int = 1, post_local: bool = False) -> Contender:
    def strategy(task: Task) -> LocalSGDStrategy:
        return LocalSGDStrategy(sync_period, *((task.n // 2, blocks) if blocks > 1 else ()))

    def switch(task: Task) -> list[PostLocalSwitch]:
        return [PostLocalSwitch(at=task.switch)] if post_local else []

    body = partial(lightning_.fit, strategy=strategy, callbacks=switch)
    algorithm = "hierarchical" if blocks > 1 else "local_sgd"
    return Contender(name, body, sync_period, "all", blocks, algorithm, post_local=post_local)


def _gossip(
    name: str,
    algorithm: str,
    topology: str,
    sync_period: int = 1,
    gossip_steps: int = 1,
    overlap: bool | None = None,
    **options: Any,
) -> Contender:
    def strategy(task: Task) -> GossipStrategy:
        graph = "auto" if topology == "gather" else topology
        return GossipStrategy(ALGORITHMS[algorithm](**options), graph, gossip_steps, sync_period, overlap)

    return Contender(
        name,
        partial(lightning_.fit, strategy=strategy),
        sync_period,
        topology,
        algorithm=algorithm,
        compressor=options.get("compressor"),
        overlap=ALGORITHMS[algorithm](**options).plan(gossip_steps, sync_period, overlap).overlap,
    )


LOCAL = _local(f"local SGD, H = {H}")
ONE_PEER_OVERLAPPED = _gossip("D-PSGD one-peer, overlapped", "dpsgd", ONE_PEER)
DDP = _ddp("DDP", lightning_.plain_ddp)
POWER_SGD = _ddp(f"DDP, PowerSGD rank {RANK}", lambda: lightning_.power_sgd(RANK), dense=lightning_.DENSE_STEPS)
PEERS = [
    DDP,
    _ddp("DDP, bf16", lightning_.bf16_ddp),
    POWER_SGD,
    _torch(f"torch post-local, H = {H}", partial(torch_parts.periodic, H), H),
    _torch(
        f"torch hierarchical, H = {BLOCK_H}, {BLOCK_H * BLOCKS}", partial(torch_parts.halves, BLOCK_H, BLOCKS), BLOCK_H, BLOCKS
    ),
    Contender(
        f"accelerate LocalSGD, H = {H}", partial(accelerate_.loop, period=H), H, needs="accelerate", learns_as=LOCAL.name
    ),
    Contender(f"torchft LocalSGD, H = {H}", partial(torchft_.loop, period=H), H, needs="torchft", learns_as=LOCAL.name),
]

OURS = [
    LOCAL,
    _local(f"post-local SGD, H = {H}", post_local=True),
    _local(f"hierarchical, H = {BLOCK_H}, {BLOCK_H * BLOCKS}", BLOCK_H, BLOCKS),
    replace(_gossip("D-PSGD one-peer", "dpsgd", ONE_PEER, overlap=False), learns_as=ONE_PEER_OVERLAPPED.name),
    ONE_PEER_OVERLAPPED,
    _gossip(f"D-PSGD one-peer, overlapped, H = {H}", "dpsgd", ONE_PEER, H),
    _gossip("EF-sign", "ef_sign", "gather", compressor="sign"),
    _gossip("CHOCO sign", "choco", "ring", compressor="sign"),
    _gossip("CHOCO sign, H = 2", "choco", "ring", 2, compressor="sign"),
    _gossip(f"CHOCO sign, H = {H}", "choco", "ring", H, compressor="sign"),
    _gossip(f"PowerGossip rank {RANK}", "power_gossip", "hypercube", rank=RANK),
    _gossip(f"PowerGossip rank 8, 4 gossip steps, H = {H}", "power_gossip", "hypercube", H, 4, rank=8),
]

ALONE = Contender("a Trainer alone", lightning_.alone)
"""Measured beside the others: what computation takes."""
