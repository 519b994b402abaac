"""What a step takes on a cluster: formulas of what is sent, over which links, and of the work that goes with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from lightning_distopt.communication.levels import PIECE
from lightning_distopt.communication.traffic import all_reduce_bytes
from lightning_distopt.compression import make as make_compressor
from lightning_distopt.plan.costs import Costs
from lightning_distopt.plan.settings import Cluster, Method, Workload
from lightning_distopt.topologies import make as make_topology

__all__ = ["Round", "bytes_per_step", "communication", "enough", "time_per_round", "time_per_step"]

BUCKET = 25 * 2**20
"""Bytes of gradients that DDP averages together."""

_MOST_LOCAL_STEPS = 2**40


# ---------------------------------------------------------------------------------------------------------------- a round
class Round(NamedTuple):
    """What a round takes.

    Example:
        >>> done = Round(sent=60e6, wire=4.8, work=0.2)
        >>> done.wire + done.work  # seconds, where training waits
        5.0

    Args:
        sent: bytes, by a replica in the mean, as `traffic.bytes_sent` counts them.
        wire: seconds until they are there.
        work: seconds of the training's own processor beside that: compressing and mixing.
    """

    sent: float = 0.0
    wire: float = 0.0
    work: float = 0.0


def communication(method: Method, cluster: Cluster, workload: Workload, costs: Costs) -> Round:
    r"""Return what a round of a method takes; where rounds differ, their mean.

    Of `n` replicas with rows of `D` bytes, a port of `B` bits per second of which the share `eta` is left for what is sent,
    latency `l`, and seconds `a` per message and `s` per byte sent, one over all replicas takes

    $$ V = 2 \tfrac{n-1}{n} D, \qquad t = V \max(\tfrac{8}{\eta B}, s) + 2 (n-1) (l + a), $$

    an all-gather of payloads of `P` bytes

    $$ V = (n-1) P, \qquad t = V \max(\tfrac{8}{\eta B}, s) + (n-1) (l + a), $$

    and a gossip step with messages of `P` bytes to `g` neighbours

    $$ V = g P, \qquad t = V \max(\tfrac{8}{\eta B}, s) + l + g a. $$

    Between clusters, a ring that all replicas form is as slow as its slowest link, and a gossip step as slow as the replica
    that takes longest. Hierarchical local SGD averages over all in two levels, of which only `2 (k-1)/k D/g` bytes pass
    between the `k` clusters of `g` replicas.

    Example:
        >>> cluster = Cluster(replicas=4, bandwidth=100e6)
        >>> workload = Workload(parameters=10_000_000, step_seconds=0.1)
        >>> communication(Method("local_sgd"), cluster, workload, Costs(efficiency=1, overhead=0, message=0, mixing=0))
        Round(sent=60000000.0, wire=4.8, work=0.0)

    Args:
        method: how replicas come to agree.
        cluster: the replicas.
        workload: what they train.
        costs: the constants.
    """
    D = workload.row_bytes
    n, slow = cluster.replicas, max(1.0, 1 / cluster.cores)
    if n == 1:
        return Round()
    if method.algorithm == "local_sgd":
        two_levels = method.blocks and 1 < cluster.group < n
        whole = (_two_levels if two_levels else _all_reduce)(n, cluster, workload, costs)
        P, inside = method.block_period, _all_reduce(cluster.group, cluster, workload, costs)
        # Averaged gradients leave nothing to average inside a cluster; where parameters are averaged, the round over all
        # replicas takes the place of one inside.
        rounds_inside = (P if method.averages_gradients else P - 1) if method.blocks else 0
        return Round(*((rounds_inside * a + b) / P for a, b in zip(inside, whole, strict=True)))
    payload = workload.payload_bytes(method.compressor)
    if method.algorithm == "ef_sign":
        sent = (n - 1) * payload
        wire = sent * _per_byte(cluster, costs, crossing=cluster.clusters > 1) + _hops(n, n - 1, cluster, costs)
        work = costs.per_byte(method.compressor) * D * _passes(method.compressor, decoded=n) + costs.mixing * D
        return Round(sent, wire, slow * (costs.overhead + work))

    steps = _messages(method.topology, n, cluster.clusters)
    degree = sum(step.mean for step in steps) / len(steps)
    wire = 0.0
    for step in steps:  # each as slow as its slowest replica
        moving = max(
            step.most * _per_byte(cluster, costs, crossing=False),
            step.most_crossing * _per_byte(cluster, costs, crossing=True),
        )
        wire += payload * moving + cluster.latency_between(step.most_crossing > 0) + step.most * slow * costs.message
    if method.algorithm == "choco":  # two passes besides, with which the constants were fitted
        passes = _passes(method.compressor, decoded=degree + 1)
        work = costs.per_byte(method.compressor) * D * passes + 2 * costs.mixing * D
    else:  # every neighbour's row and the own one
        work = costs.mixing * D * (degree + 1)
    return Round(degree * payload, wire / len(steps), slow * (costs.overhead + work))


def _all_reduce(replicas: int, cluster: Cluster, workload: Workload, costs: Costs) -> Round:
    if replicas == 1:
        return Round()
    sent = all_reduce_bytes(workload.parameters, workload.bytes_per_parameter, replicas)
    crossing = replicas > cluster.group
    wire = sent * _per_byte(cluster, costs, crossing) + _hops(replicas, 2 * (replicas - 1), cluster, costs)
    return Round(float(sent), wire, max(1.0, 1 / cluster.cores) * (costs.overhead + costs.mixing * workload.row_bytes))


def _two_levels(replicas: int, cluster: Cluster, workload: Workload, costs: Costs) -> Round:
    """Return an average over all that goes in two levels: a replica sums a slice in its cluster, then across, and tells it."""
    g, k, slow, D = cluster.group, cluster.clusters, max(1.0, 1 / cluster.cores), workload.row_bytes
    pieces, message = -(-workload.parameters // PIECE), slow * costs.message
    inside = 2 * (g - 1) / g * D * _per_byte(cluster, costs, crossing=False)
    inside += pieces * (g * cluster.latency + 2 * (g - 1) * message)  # all at once, and round a ring
    across = 2 * (k - 1) / k * D / g * _per_byte(cluster, costs, crossing=True)
    across += pieces * 2 * (k - 1) * (cluster.latency_between(True) + message)
    sent = all_reduce_bytes(workload.parameters, workload.bytes_per_parameter, replicas)
    return Round(float(sent), inside + across, slow * (costs.overhead + 2 * costs.mixing * D))


def _per_byte(cluster: Cluster, costs: Costs, crossing: bool) -> float:
    """Return the seconds that a byte takes on a link."""
    return max(8 / (costs.efficiency * cluster.bandwidth_between(crossing)), costs.sending * max(1.0, 1 / cluster.cores))


def _hops(replicas: int, hops: int, cluster: Cluster, costs: Costs) -> float:
    """Return the seconds that what goes round a ring takes for its hops, some of which cross clusters."""
    crossing = replicas // cluster.group if replicas > cluster.group else 0
    around = (replicas - crossing) * cluster.latency_between(False) + crossing * cluster.latency_between(True)
    return hops * (around / replicas + max(1.0, 1 / cluster.cores) * costs.message)


def _passes(compressor: str, decoded: float) -> float:
    """Return the passes over a row that compress it and add `decoded` payloads; sparse ones take next to nothing to add."""
    return 1 + (0 if getattr(make_compressor(compressor), "sparse", False) else decoded)


class _Messages(NamedTuple):
    """Messages of a replica in a gossip step: in the mean, the most, and the most that cross clusters."""

    mean: float
    most: int
    most_crossing: int


@lru_cache(maxsize=1024)
def _messages(topology: str, replicas: int, clusters: int) -> Sequence[_Messages]:
    graph, group, steps = make_topology(topology, replicas), replicas // clusters, []
    for t in range(graph.period or 16):
        listeners = [graph.listeners(i, t) for i in range(replicas)]
        counts = [len(heard_by) for heard_by in listeners]
        crossing = 0
        if clusters > 1:
            crossing = max(sum(j // group != i // group for j in heard_by) for i, heard_by in enumerate(listeners))
        steps.append(_Messages(sum(counts) / replicas, max(counts), crossing))
    return tuple(steps)


# ----------------------------------------------------------------------------------------------------------------- a step
def bytes_per_step(method: Method, cluster: Cluster, workload: Workload) -> float:
    """Return the bytes that a replica sends per step, in the mean; what `traffic.bytes_sent` counts.

    Example:
        >>> cluster, workload = Cluster(8, bandwidth=1e9), Workload(parameters=1_000_000, step_seconds=0.1)
        >>> bytes_per_step(Method("dpsgd", topology="ring"), cluster, workload)
        8000000.0
        >>> bytes_per_step(Method("local_sgd", sync_period=8), cluster, workload)
        875000.0

    Args:
        method: how replicas come to agree.
        cluster: the replicas.
        workload: what they train.
    """
    return communication(method, cluster, workload, Costs()).sent / method.sync_period


def time_per_round(method: Method, cluster: Cluster, workload: Workload, costs: Costs) -> float:
    """Return the seconds of communication in a round, whether or not training goes on meanwhile.

    Example:
        >>> cluster, workload = Cluster(8, bandwidth=1e9), Workload(parameters=1_000_000, step_seconds=0.1)
        >>> free = Costs(efficiency=1, overhead=0, message=0, mixing=0)
        >>> time_per_round(Method("dpsgd", topology="ring"), cluster, workload, free)
        0.064

    Args:
        method: how replicas come to agree.
        cluster: the replicas.
        workload: what they train.
        costs: the constants.
    """
    done = communication(method, cluster, workload, costs)
    return done.wire + done.work


def time_per_step(method: Method, cluster: Cluster, workload: Workload, costs: Costs) -> float:
    r"""Return the expected seconds of a step, in the mean over a round of `H` steps of `c` seconds of computing.

    With `t` on the wire and work `w` (see `communication`), plain and overlapped:

    $$ T = c + \frac{t + w}{H}, \qquad T = \frac{\max(H c, t) + w}{H}. $$

    Gradients are averaged by DDP, whose all-reduce runs beside the backward pass, all but that of the last bucket:

    $$ T = \max(c, (1 - \beta) c + (1 - x) t) + x t + w, \qquad x = \min(1, \tfrac{25\,\text{MiB}}{D}). $$

    Example:
        >>> cluster, workload = Cluster(8, bandwidth=1e9), Workload(parameters=1_000_000, step_seconds=0.1)
        >>> free = Costs(efficiency=1, overhead=0, message=0, mixing=0)
        >>> time_per_step(Method("dpsgd", topology="ring"), cluster, workload, free)
        0.164
        >>> time_per_step(Method("dpsgd", topology="ring", overlap=True), cluster, workload, free)
        0.1

    Args:
        method: how replicas come to agree.
        cluster: the replicas.
        workload: what they train.
        costs: the constants.
    """
    H, c = method.sync_period, workload.step_seconds
    done = communication(method, cluster, workload, costs)
    if method.overlap:
        return (max(H * c + _taken(done, cluster, costs), done.wire) + done.work) / H
    if not method.averages_gradients:
        return c + (done.wire + done.work) / H
    # Averaged gradients, inside clusters if there are blocks; parameters are averaged over all besides.
    members = cluster.group if method.blocks else cluster.replicas
    gradients = _all_reduce(members, cluster, workload, costs)
    exposed = min(1.0, BUCKET / workload.row_bytes)
    beside = (1 - exposed) * gradients.wire
    busy = c + (1 - exposed) * _taken(gradients, cluster, costs)
    step = max(busy, (1 - costs.backward) * c + beside) + exposed * gradients.wire + gradients.work
    return step + (done.wire + done.work) - (gradients.wire + gradients.work)


def _taken(done: Round, cluster: Cluster, costs: Costs) -> float:
    """Return the seconds that sending takes from computing beside it, where no second core does it."""
    return costs.sending * done.sent * max(1.0, 1 / cluster.cores) * min(1.0, max(0.0, 2 - cluster.cores))


def enough(method: Method, cluster: Cluster, workload: Workload, costs: Costs, tolerance: float = 0.05) -> int | None:
    """Return the smallest `H` with which communication hardly matters: a step takes at most `1 + tolerance` of its computing.

    Example:
        >>> cluster, workload = Cluster(8, bandwidth=1e9), Workload(parameters=1_000_000, step_seconds=0.1)
        >>> enough(Method("local_sgd"), cluster, workload, Costs(efficiency=1, overhead=0, message=0, mixing=0))
        12

    Args:
        method: whose `sync_period` does not matter.
        cluster: the replicas.
        workload: what they train.
        costs: the constants.
        tolerance: share of the computing.

    Returns:
        `H`, or None where the method makes a round at every step and that is too much.
    """

    def fits(H: int) -> bool:
        allowed = (1 + tolerance) * workload.step_seconds
        return time_per_step(replace(method, sync_period=H), cluster, workload, costs) <= allowed

    if fits(1):
        return 1
    if method.algorithm == "ef_sign":
        return None
    low, high = 1, 2
    while not fits(high):
        if high >= _MOST_LOCAL_STEPS:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
