"""Graphs and matrices of your own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch

from lightning_distopt.topologies.static import Static, metropolis
from lightning_distopt.topologies.topology import TOLERANCE, Topology

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["Custom"]

_ROUNDING = 1e-12  # of sums of weights that are 1


class Custom(Static):
    r"""A graph of networkx, a list of edges, or a matrix.

    An undirected graph gets Metropolis weights. In a directed graph, an edge `(j, i)` leads from `j` to `i`, and
    `w_{ij} = 1 / (1 + d)` for all edges, with the largest degree `d`; this is doubly stochastic if every replica sends to as
    many as it receives from. Loops and weights of edges are disregarded: for weights of your own, give a matrix.

    Example:
        >>> square = Custom(4, [(0, 1), (1, 2), (2, 3), (3, 0)])
        >>> square.weights(0), square.spectral_gap
        ({0: 0.333, 1: 0.333, 3: 0.333}, 0.667)
        >>> Custom(2, [[0.9, 0.1], [0.1, 0.9]]).spectral_gap
        0.2

    Args:
        num_replicas: `n`.
        graph: a `networkx.Graph` or `DiGraph` of `n` nodes, numbered in their order unless they are `0, ..., n - 1`; pairs of
            replicas; or a matrix `[n, n]` (tensor, array or nested lists), whose entry `[i, j]` is the weight of what `j`
            sends to `i`.
        column_stochastic: for push-sum: only the columns of the matrix need sum to 1, and each replica of a graph splits what
            it has equally among itself and those it sends to. A pair `(j, i)` is an edge from `j` to `i` then.

    Attributes:
        from_matrix: whether its weights are the user's own.

    Raises:
        ValueError: if it is none of these, has another number of replicas, is not connected, or its weights are negative, not
            finite or do not sum to 1 in a row or column.
    """

    def __init__(self, num_replicas: int, graph: Any, column_stochastic: bool = False) -> None:
        Topology.__init__(self, num_replicas)
        self.from_matrix = False
        if isinstance(graph, type):
            raise ValueError(f"{graph.__name__} is a class: give an object of it, made for {self.num_replicas} replicas.")
        if hasattr(graph, "is_directed") and hasattr(graph, "edges"):
            rows = _rows_of_graph(graph, self.num_replicas, column_stochastic)
        elif (pairs := _as_pairs(graph)) is not None:
            edges = _graph_of_pairs(pairs, self.num_replicas, directed=column_stochastic)
            rows = _rows_of_graph(edges, self.num_replicas, column_stochastic)
        else:
            rows, self.from_matrix = _rows_of_matrix(graph, self.num_replicas, column_stochastic), True
        symmetric = all(rows[j].get(i) == weight for i, row in enumerate(rows) for j, weight in row.items())
        both = all(abs(math.fsum(row.values()) - 1) <= _ROUNDING for row in rows)
        super().__init__(rows, symmetric, doubly_stochastic=not column_stochastic or both)
        self.validate()
        self._check_converges()

    def __repr__(self) -> str:
        messages = sum(self.degree(i) for i in range(self.num_replicas))
        edges = f"{messages // 2} edges" if self.symmetric else f"{messages} directed edges"
        return f"<Custom topology of {self.num_replicas} replicas with {edges}>"

    def _check_converges(self) -> None:
        import networkx as nx

        if not any(self._rows[i][i] for i in range(self.num_replicas)):
            edges = [(j, i) for i in range(self.num_replicas) for j in self.neighbors(i)]
            if not nx.is_aperiodic(nx.DiGraph(edges)):
                raise ValueError(
                    "With this matrix replicas swap values for ever and never agree: give them weight on themselves, as "
                    "(W + I) / 2 does."
                )


def _as_pairs(graph: Any) -> list[tuple[int, int]] | None:
    """Return a list of edges, or None if `graph` is something else. Pairs of whole numbers are edges, not a matrix."""
    if not isinstance(graph, Sequence) or isinstance(graph, str):
        return None
    pairs = [tuple(edge) if isinstance(edge, Sequence) and not isinstance(edge, str) else () for edge in graph]
    if any(len(pair) != 2 or not all(isinstance(end, Integral) for end in pair) for pair in pairs):
        return None
    return [(int(i), int(j)) for i, j in pairs]


def _graph_of_pairs(pairs: list[tuple[int, int]], n: int, directed: bool) -> nx.Graph:
    import networkx as nx

    for pair in pairs:
        if not all(0 <= end < n for end in pair):
            raise ValueError(f"The edge {pair} leads to a replica that does not exist: there are 0 to {n - 1}.")
    graph = nx.empty_graph(n, nx.DiGraph if directed else nx.Graph)
    graph.add_edges_from(pairs)
    return graph


def _rows_of_graph(graph: Any, n: int, column_stochastic: bool) -> list[dict[int, float]]:
    import networkx as nx

    if len(graph) != n:
        raise ValueError(f"The graph has {len(graph)} nodes, but there are {n} replicas.")
    numbers = {node: k for k, node in enumerate(range(n) if set(graph) == set(range(n)) else graph)}
    edges = [(numbers[j], numbers[i]) for j, i in graph.edges() if j != i]
    if not graph.is_directed() and not column_stochastic:
        simple = nx.empty_graph(n)  # without labels, loops and parallel edges
        simple.add_edges_from(edges)
        return metropolis(simple)
    if not graph.is_directed():
        edges += [(i, j) for j, i in edges]
    sends: list[set[int]] = [set() for _ in range(n)]
    receives: list[set[int]] = [set() for _ in range(n)]
    for j, i in edges:
        sends[j].add(i)
        receives[i].add(j)
    if column_stochastic:  # a_ij = 1 / (1 + out-degree of j)
        return [{j: 1 / (1 + len(sends[j])) for j in {i, *receives[i]}} for i in range(n)]
    for i in range(n):
        if len(sends[i]) != len(receives[i]):
            raise ValueError(
                f"Replica {i} sends to {len(sends[i])} replicas and receives from {len(receives[i])}: a directed graph without "
                "weights needs as many of both. Use push-sum (`algorithm='push_sum'`), give a matrix, or an undirected graph."
            )
    degree = max(map(len, sends))
    weight = 1 / (1 + degree)
    return [{i: 1 - len(receives[i]) * weight, **dict.fromkeys(receives[i], weight)} for i in range(n)]


def _rows_of_matrix(graph: Any, n: int, column_stochastic: bool) -> list[dict[int, float]]:
    try:
        matrix = torch.as_tensor(graph, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            "A topology is a name, a networkx graph, a list of edges, a matrix of numbers or an object of a class derived from "
            f"`Topology`; got {_shortened(graph)}."
        ) from error
    if matrix.shape != (n, n):
        raise ValueError(
            f"A mixing matrix of {n} replicas has the shape [{n}, {n}], but this one has {list(matrix.shape)}; "
            "edges are a list of pairs of whole numbers."
        )
    _check_direction(matrix, column_stochastic)
    if not column_stochastic and (matrix - matrix.T).abs().max() <= TOLERANCE:
        matrix = (matrix + matrix.T) / 2
    # What rounding leaves of the sums goes to the diagonal, or it would add up over many steps; larger errors are refused.
    diagonal = matrix.diagonal()
    remainder = 1 - matrix.sum(dim=0 if column_stochastic else 1)
    small = (remainder.abs() <= TOLERANCE) & (diagonal + remainder >= 0)
    diagonal += torch.where(small, remainder, 0.0)
    return [{j: weight for j, weight in enumerate(row) if weight != 0} for row in matrix.tolist()]


def _check_direction(matrix: torch.Tensor, column_stochastic: bool) -> None:
    """Refuse a matrix that sums to 1 in the one direction where it has to in the other."""
    wrong = [(matrix.sum(dim=dim) - 1).abs() > TOLERANCE for dim in (1, 0)]  # of rows, of columns
    names, place = ("column", "row") if column_stochastic else ("row", "column"), int(column_stochastic)
    if not wrong[place].any() or wrong[1 - place].any() or not matrix.isfinite().all():
        return
    k = int(wrong[place].nonzero()[0])
    total = float(matrix.sum(dim=1 - place)[k])
    remedy = (
        "push-sum would be biased. Transpose it: entry [i, j] is the share of what j has that it sends to i"
        if column_stochastic
        else "push-sum alone can use it (`algorithm='push_sum'`)"
    )
    raise ValueError(
        f"The weights of each {names[0]} must sum to 1, but those of {names[0]} {k} sum to {total:g}. Those of each {names[1]} "
        f"do: {remedy}."
    )


def _shortened(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) < 80 else text[:77] + "..."
