"""RelaySGD: replicas of a tree relay sums, so that each averages all others with equal weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_distopt.algorithms.gossip import Blocks, GossipAlgorithm
from lightning_distopt.communication import Communicator, Replicas
from lightning_distopt.topologies import Topology

_PIECE = 2**16  # values that are summed at once: they stay in the cache


class RelaySum(GossipAlgorithm):
    r"""RelaySGD (RelaySum/Model): along a tree every replica reaches every other, undiluted, one hop in a step.

    $$ m_{i \to j}^t = x_i^{t+1/2} + \sum_{k \in N_i \setminus j} m_{k \to i}^{t-1}, \qquad
       x_i^{t+1} = \frac1n \Bigl( x_i^{t+1/2} + \sum_{j \in N_i} m_{j \to i}^t \Bigr), \qquad
       x_i^{t+1/2} = x_i^t + \Delta_i^t $$

    In a tree there is one path between any two, so this is the mean of all replicas, as old as they are far,

    $$ x_i^{t+1} = \frac1n \sum_j x_j^{(t - \tau_{ij}) + 1/2}, \qquad \tau_{ij} = \max(0, \text{hops}_{ij} - 1) , $$

    with the common start `x^0` for what has not arrived yet. (The authors count what has; here the first messages hold that
    many `x^0`, which is the same.) What stays as it is is averaged exactly after as many steps as the diameter, whatever the
    tree; replicas come to rest where they agree and the mean gradient is zero, however different their data. A replica sends
    as many bytes as in D-SGD on the same tree. The mean of replicas is not preserved: what a step adds to it arrives
    gradually.

    Here messages are means instead of sums, `m / (number of replicas it stands for)`, so that nothing grows with `n` and
    replicas that are equal stay so to the last bit. Weights of a matrix do not matter, only its graph. Buffers are mixed with
    neighbours, as in D-SGD.

    Example:
        >>> from lightning_distopt.topologies import make
        >>> RelaySum().connect(make("chain", 8))
        RelaySum()

    Memory: for each neighbour, what it has relayed last and what is sent to it.

    Raises:
        ValueError: when fitting starts, if the graph has a cycle.

    Reference: T. Vogels, L. He, A. Koloskova, T. Lin, S. P. Karimireddy, S. U. Stich and M. Jaggi, *RelaySum for decentralized
    deep learning on heterogeneous data*, NeurIPS 2021.
    """

    static_graph = True
    gossips_freely = False
    default_topology = "binary_tree"  # of 2 log2 n hops, where a chain has n - 1, and at most three messages of a replica
    kept = ("relayed",)

    def __init__(self) -> None:
        super().__init__()
        self._relayed: Blocks = ()  # [edges, d], what has come along each edge to a replica here, as means
        self._heard: list[list[tuple[int, int, int]]] = []  # by row: edge, neighbour, and how many replicas are behind it

    def __repr__(self) -> str:
        return "RelaySum()"

    def connect(self, topology: Topology) -> GossipAlgorithm:
        """Say who talks to whom: in a tree."""
        if sum(topology.degree(i) for i in range(topology.num_replicas)) > 2 * (topology.num_replicas - 1):
            raise ValueError(
                f"RelaySum relays sums along a tree, and {topology!r} has a cycle: use 'chain', 'star' or 'binary_tree', or a "
                "spanning tree, `networkx.minimum_spanning_tree(graph)`."
            )
        return super().connect(topology)

    def setup(self, replicas: Replicas, communicator: Communicator) -> None:
        """Look up who is behind which neighbour."""
        super().setup(replicas, communicator)
        behind, local = replicas_behind(self.topology), communicator.local_replicas
        edges = [(i, j) for i in local for j in self.topology.neighbors(i)]
        self._heard = [[(e, j, behind[j, i]) for e, (to, j) in enumerate(edges) if to == i] for i in local]

    def begin_gossip(self) -> None:
        """Take the common start for what has not arrived yet."""
        if not self._relayed:
            rows = [row for row, heard in enumerate(self._heard) for _ in heard]
            self._relayed = tuple(block[rows] for block in self.replicas.parameters)

    def finish_gossip(self) -> None:
        """Relay, and average what has arrived."""
        n, local = self.communicator.num_replicas, self.communicator.local_replicas
        hood = self.neighbourhood(self._gossip_step)
        self._gossip_step += 1
        for k, (block, relayed) in enumerate(zip(self.replicas.parameters, self._relayed, strict=True)):
            sends = {
                (i, j): torch.empty_like(x) for i, x, heard in zip(local, block, self._heard, strict=True) for _, j, _ in heard
            }
            for i, x, heard in zip(local, block, self._heard, strict=True):
                for piece, own, apart, total in self._differences(relayed, x, heard):
                    for (_, j, behind), difference in zip(heard, apart, strict=True):
                        # (x_i + sum_{k != j} m_{k->i}) / (n - behind), where `behind` replicas are behind j
                        sends[i, j][piece] = total.sub(difference, alpha=behind).div_(n - behind).add_(own)
            receives = {(j, i): relayed[e] for i, heard in zip(local, self._heard, strict=True) for e, j, _ in heard}
            self.communicator.exchange(sends, receives, hood=None if k else hood)
            for x, heard in zip(block, self._heard, strict=True):
                for piece, own, _, total in self._differences(relayed, x, heard):
                    x[piece] = total.div_(n).add_(own)  # (x_i + sum_j m_{j->i}) / n

    @staticmethod
    def _differences(
        relayed: Tensor, x: Tensor, heard: list[tuple[int, int, int]]
    ) -> Iterator[tuple[slice, Tensor, list[Tensor], Tensor]]:
        """Give by pieces of a row: where it is, `x`, how far each message is from it, and the sum of that over all replicas."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        for start in range(0, len(x), _PIECE):
            piece = slice(start, start + _PIECE)
            own = x[piece].to(dtype)
            apart = [relayed[e][piece].to(dtype) - own for e, _, _ in heard]
            total = torch.zeros_like(own)
            for (_, _, behind), difference in zip(heard, apart, strict=True):
                total.add_(difference, alpha=behind)
            yield piece, own, apart, total


def replicas_behind(tree: Topology) -> dict[tuple[int, int], int]:
    """Return for each edge `(j, i)` of a tree how many replicas reach `i` along it.

    Example:
        >>> from lightning_distopt.topologies import Chain
        >>> replicas_behind(Chain(3))
        {(1, 0): 2, (0, 1): 1, (2, 1): 1, (1, 2): 2}

    Args:
        tree: a connected graph without cycles.
    """
    parent, order = {0: 0}, [0]
    for i in order:  # grows while it runs
        for j in tree.neighbors(i):
            if j not in parent:
                parent[j] = i
                order.append(j)
    below = dict.fromkeys(order, 1)
    for i in reversed(order[1:]):
        below[parent[i]] += below[i]
    n = tree.num_replicas
    return {(j, i): below[j] if parent[j] == i else n - below[i] for i in range(n) for j in tree.neighbors(i)}
