"""What a plan is made for: a cluster, what is trained on it, and how replicas come to agree."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from lightning_distopt.compression import make as make_compressor
from lightning_distopt.compression.compressor import working_type
from lightning_distopt.options import check_choice, check_whole

__all__ = ["Cluster", "Method", "Workload"]

_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


@dataclass(frozen=True)
class Cluster:
    """Replicas and what connects them: each has a port of its own, on which it sends and receives at the same time.

    Example:
        >>> Cluster(replicas=8, bandwidth=10e9, latency=1e-4, clusters=2, across=100e6).group
        4

    Args:
        replicas: how many there are.
        bandwidth: of a replica's port, bit/s.
        latency: of a message, seconds.
        clusters: groups of consecutive replicas with slower links between them.
        across: what a replica can send to other clusters, bit/s; by default as much as to its own.
        across_latency: of a message between clusters, seconds; by default `latency`.
        cores: of the processor, for each replica. From two on, messages move beside the training; below one, replicas share.

    Raises:
        ValueError: if one of these is out of range, or the clusters are not equally large.
    """

    replicas: int
    bandwidth: float
    latency: float = 0.0
    clusters: int = 1
    across: float | None = None
    across_latency: float | None = None
    cores: float = 2.0

    def __post_init__(self) -> None:
        for name, count in (("replicas", self.replicas), ("clusters", self.clusters)):
            check_whole(name, count)
        for name, value in (("bandwidth", self.bandwidth), ("across", self.across), ("cores", self.cores)):
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be above 0; got {value:g}.")
        for name, value in (("latency", self.latency), ("across_latency", self.across_latency)):
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must be 0 or more, and finite; got {value:g}.")
        if self.replicas % self.clusters:
            raise ValueError(
                f"{self.replicas} replicas can't be divided into {self.clusters} clusters of the same size: use a divisor."
            )
        if self.clusters == 1 and (self.across is not None or self.across_latency is not None):
            raise ValueError("`across` and `across_latency` are those of links between clusters: give `clusters`, at least 2.")

    @property
    def group(self) -> int:
        """Replicas in a cluster."""
        return self.replicas // self.clusters

    def latency_between(self, crossing: bool) -> float:
        """Return the latency of a message, which may cross clusters."""
        return self.across_latency if crossing and self.across_latency is not None else self.latency

    def bandwidth_between(self, crossing: bool) -> float:
        """Return the rate of messages, which may cross clusters."""
        return min(self.bandwidth, self.across) if crossing and self.across is not None else self.bandwidth


@dataclass(frozen=True)
class Workload:
    """What every replica trains.

    Example:
        >>> Workload(parameters=25_000_000, step_seconds=0.05).row_bytes
        100000000

    Args:
        parameters: `d`, those that are trained.
        step_seconds: of computing in a step, without any communication.
        bytes_per_parameter: 2, 4 or 8, as the parameters are kept.

    Raises:
        ValueError: if one of these is out of range.
    """

    parameters: int
    step_seconds: float
    bytes_per_parameter: int = 4

    def __post_init__(self) -> None:
        check_whole("parameters", self.parameters)
        if not 0 < self.step_seconds < math.inf:
            raise ValueError(f"Computing a step takes some time, above 0 and finite; got {self.step_seconds:g} seconds.")
        if self.bytes_per_parameter not in _DTYPES:
            raise ValueError(f"`bytes_per_parameter` must be 2, 4 or 8; got {self.bytes_per_parameter!r}.")

    @property
    def row_bytes(self) -> int:
        """Bytes of all parameters."""
        return self.parameters * self.bytes_per_parameter

    def payload_bytes(self, compressor: str) -> int:
        """Return the bytes of all parameters as one compressed vector; without a compressor, `row_bytes`."""
        if not compressor:
            return self.row_bytes
        dtype = working_type(_DTYPES[self.bytes_per_parameter])
        return make_compressor(compressor).nbytes((self.parameters,), dtype)


@dataclass(frozen=True)
class Method:
    """How replicas come to agree: an algorithm with what matters for its costs.

    Example:
        >>> Method("choco", topology="ring", compressor="sign", overlap=True).code
        "GossipStrategy(CHOCO(compressor='sign'), topology='ring', overlap=True)"

    Args:
        algorithm: "local_sgd" averages all replicas, at `sync_period=1` their gradients by DDP; "dsgd", "dpsgd" and "choco"
            gossip on `topology`; "ef_sign" gathers what `compressor` makes of all gradients.
        sync_period: `H`, steps in a round.
        topology: the graph of gossip, by name.
        compressor: of "choco" and "ef_sign", in its short form.
        overlap: whether messages travel while gradients are computed.
        block_period: with "local_sgd", above 1: rounds are inside clusters, and every `block_period`-th is over all replicas.
        average: with "local_sgd", "parameters" averages them at `sync_period=1` too, in place of gradients.
        block_size: replicas of a block, as `code` names them; times are those of blocks that are the cluster's.

    Raises:
        ValueError: if one of these is out of range, or is nothing that the algorithm has.
    """

    algorithm: Literal["local_sgd", "dsgd", "dpsgd", "choco", "ef_sign"]
    sync_period: int = 1
    topology: str = ""
    compressor: str = ""
    overlap: bool = False
    block_period: int = 1
    average: Literal["auto", "parameters"] = "auto"
    block_size: int | None = None

    def __post_init__(self) -> None:
        for name, count in (("sync_period", self.sync_period), ("block_period", self.block_period)):
            check_whole(name, count)
        check_choice("average", self.average, ("auto", "parameters"))
        if self.algorithm not in _CLASSES:
            raise ValueError(f"There is no cost model for {self.algorithm!r}; there is for {', '.join(_CLASSES)}.")
        gossips, compresses = self.algorithm in ("dsgd", "dpsgd", "choco"), self.algorithm in ("choco", "ef_sign")
        for name, has, value in (
            ("topology", gossips, self.topology),
            ("compressor", compresses, self.compressor),
            ("average", self.average != "auto" and self.algorithm == "local_sgd", self.average.removeprefix("auto")),
            ("block_period", self.blocks and self.algorithm == "local_sgd", self.block_period * self.blocks),
        ):
            if has and not value:
                raise ValueError(f"{self.algorithm!r} needs a `{name}`; got {value!r}.")
            if value and not has:
                raise ValueError(f"{self.algorithm!r} has no `{name}`; got {value!r}.")
        if self.overlap and not gossips:
            raise ValueError(f"{self.algorithm!r} has no `overlap`; DDP's own is taken into account.")
        if self.algorithm == "ef_sign" and self.sync_period > 1:
            raise ValueError("'ef_sign' makes a round at every step: use `sync_period=1`.")

    @property
    def blocks(self) -> bool:
        """Whether most rounds are inside clusters."""
        return self.block_period > 1

    @property
    def averages_gradients(self) -> bool:
        """Whether DDP averages gradients at every step, over all replicas or inside clusters."""
        return self.algorithm == "local_sgd" and self.sync_period == 1 and self.average == "auto"

    @property
    def code(self) -> str:
        """The strategy, as it is written in Python."""
        if self.algorithm == "local_sgd":
            size = "" if self.block_size is None else f", block_size={self.block_size}"
            blocks = f"{size}, block_period={self.block_period}" if self.blocks else ""
            average = f", average={self.average!r}" if self.average != "auto" else ""
            return f"LocalSGDStrategy(sync_period={self.sync_period}{blocks}{average})"
        options = f"compressor={self.compressor!r}" if self.compressor else ""
        graph = f", topology={self.topology!r}, overlap={self.overlap}" if self.topology else ""
        period = f", sync_period={self.sync_period}" if self.sync_period > 1 else ""
        return f"GossipStrategy({_CLASSES[self.algorithm]}({options}){graph}{period})"


_CLASSES = {"local_sgd": "LocalSGD", "dsgd": "DSGD", "dpsgd": "DPSGD", "choco": "CHOCO", "ef_sign": "EFSign"}
