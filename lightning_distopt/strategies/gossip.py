"""Gossip: decentralized training over a graph, with compressed messages if asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from lightning_distopt.algorithms import ALGORITHMS, GossipAlgorithm, SyncPeriod
from lightning_distopt.lookup import by_name
from lightning_distopt.strategies.base import ReplicaStrategy
from lightning_distopt.strategies.checks import check_keywords
from lightning_distopt.topologies import Complete, Topology, make
from lightning_distopt.topologies.make import read as read_topology


class GossipStrategy(ReplicaStrategy):
    r"""Train replicas that talk to their neighbours in a graph alone; for any optimizer.

    $$ x_i^{t+1} = \sum_j w_{ij} \, ( x_j^t + \Delta_j^t ) $$

    is decentralized SGD, the default. A replica sends to its neighbours and to nobody else, so a round costs the same for 8
    replicas and for 1,000, and a slow one holds up its neighbours only.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_distopt import CHOCO, GossipStrategy
        >>> strategy = GossipStrategy(CHOCO(compressor="sign"), topology="ring", replicas_per_device=4)
        >>> quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=1, max_steps=5, limit_val_batches=0, **quiet)
        >>> trainer.fit(BoringModel())
        >>> strategy.traffic.bytes_sent  # 5 rounds, 2 neighbours, a bit for each of 66 values and two means
        170

    Args:
        algorithm: a `GossipAlgorithm`, or the name of one with its own defaults, such as "dsgd" or "choco";
            `lightning-distopt algorithms` lists them.
        topology: the graph: a name such as "ring", "torus:4" or "random_matching:7", a `Topology`, a networkx graph, an edge
            list or a mixing matrix. "auto" is "one_peer_exponential", or "ring" for algorithms that need a graph which is
            symmetric and always the same, or "binary_tree" for RelaySum.
        gossip_steps: in a round.
        sync_period: `H`, optimizer steps in a round; a number, or a callable of the step at which a round starts.
        overlap: whether messages travel while gradients are computed. None: where that changes nothing in the mathematics
            (DPSGD, CHOCO and DMSGD); True for DSGD delays what neighbours have sent by a round.
        **kwargs: options of every strategy, see `ReplicaStrategy`: replicas_per_device, evaluate, buffers, optimizer_state,
            nonfinite, partition, and Lightning's own.

    Attributes:
        algorithm: the algorithm; its `topology` is the graph while training.

    Raises:
        ValueError: for an unknown algorithm or topology, or options that contradict each other; when fitting starts, for a
            graph that does not fit the number of replicas or the algorithm.
        TypeError: for an unknown option.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, chapters 4 and 5.
    """

    algorithm: GossipAlgorithm

    averages_gradients = False

    def __init__(
        self,
        algorithm: GossipAlgorithm | str = "dsgd",
        topology: Topology | str | Any = "auto",
        gossip_steps: int = 1,
        sync_period: int | SyncPeriod | Callable[[int], int] = 1,
        overlap: bool | None = None,
        **kwargs: Any,
    ) -> None:
        made = by_name(algorithm, ALGORITHMS, GossipAlgorithm, "gossip algorithm", "CHOCO(compressor='top_k:0.01')")
        check_keywords(type(self), GossipStrategy, kwargs, made)
        made.plan(gossip_steps, sync_period, overlap)
        if not (isinstance(topology, str) and topology == "auto"):
            if isinstance(topology, str):
                read_topology(topology)  # raises for what is none; whether it fits `n` is known later
            if not made.needs_graph:
                raise ValueError(f"{type(made).__name__} has no graph, all replicas talk to all: leave `topology` out.")
        super().__init__(algorithm=made, **kwargs)
        self.topology = topology

    def _graph(self) -> Topology:
        n = self.num_replicas
        if not self.algorithm.needs_graph:
            return Complete(n)
        if isinstance(self.topology, str) and self.topology == "auto":
            return make(self.algorithm.default_topology, n)
        return make(self.topology, n, self.algorithm.column_stochastic)

    def _setup_replicas(self) -> None:
        self.algorithm.connect(self._graph())
        super()._setup_replicas()

    def _options(self) -> tuple[Any, ...]:
        """Return what must be the same on all ranks; the graph's weights in the first few steps stand for the graph."""
        algorithm, graph = self.algorithm, self.algorithm.topology
        digest = hashlib.md5()
        for t in range(min(graph.period or 4, 16)):
            for i in range(graph.num_replicas):
                digest.update(repr(graph.weights(i, t)).encode())
        rounds = (algorithm.gossip_steps, repr(algorithm.sync_period), algorithm.overlap)
        return (*super()._options(), digest.hexdigest(), *rounds)
