"""PowerGossip: neighbours find the largest part of what they differ in by power iteration, and average that."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_distopt.algorithms.gossip import Blocks, GossipAlgorithm
from lightning_distopt.communication import Communicator, Neighbourhood, Replicas, derive_seed
from lightning_distopt.communication.layout import Slot
from lightning_distopt.options import check_whole


class Matrix(NamedTuple):
    """A parameter whose differences are compressed: its slot, its size as a matrix, and where its vectors lie."""

    slot: Slot
    rows: int
    columns: int
    left: int
    right: int

    def add_product(self, x: Tensor, left: Tensor, right: Tensor) -> None:
        """Add a product of two matrices to a replica's row."""
        own = self.slot.view(x)
        if own.is_contiguous() and own.dtype == left.dtype:
            own.view(self.rows, self.columns).addmm_(left, right)
        else:
            own.add_((left @ right).view(self.slot.shape))


class Link(NamedTuple):
    """What a replica here shares with a neighbour: the row of the vectors, the neighbour, `w_ij`, and whether it is first."""

    number: int
    neighbour: int
    weight: float
    is_first: bool


class PowerGossip(GossipAlgorithm):
    r"""Gossip that compresses what two neighbours differ in to rank `r`, without a step size to tune.

    For a matrix `X` of the parameters and an edge `(i, j)`, `i < j`, with `D = X_i - X_j`, gossip steps are in turns

    $$ \hat p = \operatorname{orth}(p), \quad q = D^T \hat p, \quad M_{ij} = \hat p q^T \qquad \text{and} \qquad
       \hat q = \operatorname{orth}(q), \quad p = D \hat q, \quad M_{ij} = p \, \hat q^T $$

    $$ X_i \leftarrow X_i - \sum_{j > i} w_{ij} M_{ij} + \sum_{j < i} w_{ji} M_{ji} , \qquad X = X + \Delta \text{ before} $$

    Each end multiplies its own `X`, and they exchange the products: `r (rows + columns) / 2` values of a matrix in the mean.
    The `p` and `q` of an edge stay from step to step, so that what has been missed is found later. `M` is a projection of `D`:
    it takes away what it finds and adds nothing, so the weights are those of plain gossip; the mean over replicas is preserved.

    A tensor of several dimensions counts as the matrix of its first dimension by all others. What has one dimension, or no more
    than `r` rows or columns, is mixed as it is. As in the authors' program each multiplication is followed by averaging, so
    that their iterations are `gossip_steps` here. Where two ends agree, `p` and `q` stay as they are (theirs end at zero there,
    and the first step is left out).

    Example:
        >>> PowerGossip()
        PowerGossip(rank=1)

    Args:
        rank: `r`, at least 1.

    Memory: `p` and `q` of each neighbour, and the products; nothing of the size of the parameters but what is changed of one.

    Raises:
        ValueError: if `rank` is no whole number of at least 1.

    Reference: T. Vogels, S. P. Karimireddy and M. Jaggi, *Practical low-rank communication compression in decentralized deep
    learning* (PowerGossip), NeurIPS 2020.
    """

    static_graph = True
    kept = ("p", "q")

    def __init__(self, rank: int = 1) -> None:
        super().__init__()
        self.rank = check_whole("rank", rank)
        self._matrices: list[list[Matrix]] = []  # by block
        self._plain: list[list[Slot]] = []
        self._links: list[list[Link]] = []  # by row
        self._p: Blocks = ()  # [edges, r * rows of all matrices]
        self._q: Blocks = ()

    def __repr__(self) -> str:
        return f"PowerGossip(rank={self.rank})"

    def setup(self, replicas: Replicas, communicator: Communicator) -> None:
        """Draw the vectors of every edge: both ends the same ones."""
        super().setup(replicas, communicator)
        local, r = communicator.local_replicas, self.rank
        pairs = [(i, j) for i in local for j in self.topology.neighbors(i)]
        self._links = [
            [Link(e, j, self.topology.weights(i)[j], i < j) for e, (own, j) in enumerate(pairs) if own == i] for i in local
        ]
        self._matrices, self._plain, p, q = [], [], [], []
        for k, block in enumerate(replicas.parameters):
            slots = [slot for slot in replicas.slots if slot.block == k]
            matrices, left, right = [], 0, 0
            for slot in slots:
                rows, columns = (slot.shape[0], math.prod(slot.shape[1:])) if len(slot.shape) > 1 else (0, 0)
                if min(rows, columns) > r:
                    matrices.append(Matrix(slot, rows, columns, left, right))
                    left, right = left + r * rows, right + r * columns
            self._matrices.append(matrices)
            self._plain.append([slot for slot in slots if slot not in {matrix.slot for matrix in matrices}])
            dtype = torch.promote_types(block.dtype, torch.float32)
            drawn = torch.empty(len(pairs), left + right, dtype=dtype)
            for row, pair in zip(drawn, pairs, strict=True):
                seed = derive_seed(self.seed, "power_gossip", min(pair), max(pair), k)
                row.normal_(generator=torch.Generator().manual_seed(seed))
            p.append(drawn[:, :left].to(block.device, copy=True))
            q.append(drawn[:, left:].to(block.device, copy=True))
        self._p, self._q = tuple(p), tuple(q)

    def finish_gossip(self) -> None:
        """Make half an iteration in each gossip step."""
        done = 0
        while self.wants_more(done):
            x = self.replicas.parameters
            before = [block.clone() for block in x] if self.measures else []
            hood, on_left = self.neighbourhood(self._gossip_step), self._gossip_step % 2 == 0
            self._gossip_step += 1
            for k, block in enumerate(x):
                self._iterate(k, block, on_left, None if k else hood)
            if self.measures:
                changes = [block - old for block, old in zip(x, before, strict=True)]
                moved = [torch.linalg.vector_norm(change, dim=1, dtype=torch.float64).square() for change in changes]
                self.moved = torch.stack(moved).sum(dim=0)
            done += 1

    def _iterate(self, k: int, block: Tensor, on_left: bool, hood: Neighbourhood | None) -> None:
        """Multiply from one side, exchange the products, and average."""
        known, found = (self._p[k], self._q[k]) if on_left else (self._q[k], self._p[k])
        matrices, plain, dtype = self._matrices[k], self._plain[k], known.dtype
        rows = list(zip(self.communicator.local_replicas, block, self._links, strict=True))
        sends, receives = {}, {}
        for i, x, links in rows:
            parts: list[list[Tensor]] = [[] for _ in links]
            for matrix in matrices:
                own = matrix.slot.view(x).reshape(matrix.rows, matrix.columns).to(dtype)
                for link, of_link in zip(links, parts, strict=True):
                    base = orthonormal(self._vectors(known, matrix, link, on_left))
                    # X^T p, X q: the thin factor first, and with long rows, is several times faster than the other way round
                    of_link.append((base.T.contiguous() @ (own if on_left else own.T)).T.flatten())
            rest = [x[slot.offset : slot.offset + slot.numel].to(dtype) for slot in plain]
            for link, of_link in zip(links, parts, strict=True):
                sends[i, link.neighbour] = torch.cat([*of_link, *rest])
                receives[link.neighbour, i] = torch.empty_like(sends[i, link.neighbour])
        self.communicator.exchange(sends, receives, hood=hood)

        width = found.shape[1]  # of the products
        for i, x, links in rows:
            differences = [receives[link.neighbour, i] - sends[i, link.neighbour] for link in links]
            for link, difference in zip(links, differences, strict=True):
                if not link.is_first:
                    difference[:width].neg_()  # the products with -D, the same to the last bit at both ends
            for matrix in matrices:
                lefts, rights = [], []
                for link, difference in zip(links, differences, strict=True):
                    base, kept = self._vectors(known, matrix, link, on_left), self._vectors(found, matrix, link, not on_left)
                    start = matrix.right if on_left else matrix.left
                    product = difference[start : start + kept.numel()].view_as(kept)
                    left, right = (base, product) if on_left else (product, base)
                    lefts.append(left * (link.weight if link.is_first else -link.weight))
                    rights.append(right)
                    kept.copy_(torch.where(product.any(), product, kept))
                if links:
                    # X_i <- X_i + sum_j -+ w_ij M_ij, one product of all edges' vectors
                    matrix.add_product(x, torch.cat(lefts, dim=1), torch.cat(rights, dim=1).T)
            start = width
            for slot in plain:
                own = x[slot.offset : slot.offset + slot.numel]
                change = torch.zeros(slot.numel, dtype=dtype, device=x.device)
                for link, difference in zip(links, differences, strict=True):
                    change.add_(difference[start : start + slot.numel], alpha=link.weight)  # w_ij (x_j - x_i)
                own.add_(change)
                start += slot.numel

    def _vectors(self, block: Tensor, matrix: Matrix, link: Link, is_left: bool) -> Tensor:
        """Return the `p`, if `is_left`, or the `q` of a matrix and an edge."""
        start, length = (matrix.left, matrix.rows) if is_left else (matrix.right, matrix.columns)
        return block[link.number, start : start + self.rank * length].view(length, self.rank)


def orthonormal(vectors: Tensor) -> Tensor:
    """Make the columns of `[length, r]` an orthonormal basis of what they span, in place.

    Example:
        >>> orthonormal(torch.tensor([[3.0], [4.0]]))
        tensor([[0.6000],
                [0.8000]])
    """
    vectors.div_(vectors.abs().amax())  # so that no square is too small
    if vectors.shape[1] == 1:
        return vectors.div_(torch.linalg.vector_norm(vectors))
    return vectors.copy_(torch.linalg.qr(vectors).Q)
