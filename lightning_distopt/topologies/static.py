"""Undirected graphs that never change, with Metropolis weights."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_distopt.options import check_share, is_whole
from lightning_distopt.topologies.topology import Topology

if TYPE_CHECKING:
    import networkx as nx

__all__ = [
    "BinaryTree",
    "Chain",
    "Complete",
    "ErdosRenyi",
    "Grid",
    "Hypercube",
    "Ring",
    "SocialNetwork",
    "Star",
    "Static",
    "Torus",
]

_DRAWS = 100  # of a random graph that shall be connected


class Static(Topology):
    """A single matrix, kept as one dictionary of weights for each replica: base of the classes in this module.

    Example:
        >>> Static([{0: 0.5, 1: 0.5}, {0: 0.5, 1: 0.5}], symmetric=True).matrix()
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]], dtype=torch.float64)

    Args:
        rows: for each replica, the weights of those it receives from, and of itself.
        symmetric: whether the matrix is.
        doubly_stochastic: False where only columns sum to 1.
    """

    def __init__(self, rows: Sequence[dict[int, float]], symmetric: bool, doubly_stochastic: bool = True) -> None:
        super().__init__(len(rows), 1, symmetric, doubly_stochastic)
        self._rows = [{j: row.get(j, 0.0) for j in sorted({i, *row})} for i, row in enumerate(rows)]
        self._listeners: list[list[int]] = [[] for _ in rows]
        for i, row in enumerate(self._rows):
            for j in row:
                if j != i:
                    self._listeners[j].append(i)

    def weights(self, i: int, t: int = 0) -> dict[int, float]:
        """Return row `i` of the matrix."""
        return dict(self._rows[i])

    def listeners(self, i: int, t: int = 0) -> list[int]:
        """Return the replicas that receive from `i`."""
        return list(self._listeners[i])


def metropolis(graph: nx.Graph) -> list[dict[int, float]]:
    r"""Return the rows of Metropolis weights, which make the matrix of any undirected graph doubly stochastic.

    $$ w_{ij} = \frac{1}{1 + \max(\deg i, \deg j)} \text{ for edges}, \qquad w_{ii} = 1 - \sum_{j \ne i} w_{ij} $$

    The thesis prints `1/max(deg(i), deg(j))` where degrees count the replica itself: its table 4.2 follows from that alone.

    Example:
        >>> import networkx as nx
        >>> metropolis(nx.path_graph(3))[0]
        {1: 0.333, 0: 0.667}

    Args:
        graph: its nodes are `0, ..., n - 1`; loops and weights of edges are disregarded.
    """
    neighbors = [[j for j in graph[i] if j != i] for i in range(len(graph))]
    rows = []
    for i, of_i in enumerate(neighbors):
        row = {j: 1 / (1 + max(len(of_i), len(neighbors[j]))) for j in of_i}
        row[i] = max(0.0, 1 - math.fsum(row.values()))
        rows.append(row)
    return rows


class _Undirected(Static):
    """What a generator of networkx makes, with Metropolis weights."""

    def __init__(self, num_replicas: int) -> None:
        Topology.__init__(self, num_replicas)  # refuses a wrong number before networkx does
        import networkx as nx  # here, as importing this package shall not wait for it

        graph = nx.convert_node_labels_to_integers(self._graph(), ordering="sorted")
        super().__init__(metropolis(graph), symmetric=True)

    def _graph(self) -> nx.Graph:
        raise NotImplementedError


class Ring(_Undirected):
    r"""Each replica exchanges with the one before and the one after it.

    The spectral gap is `2/3 (1 - cos(2 pi / n))`, which falls as `1 / n^2`.

    Example:
        >>> Ring(16).weights(0)
        {0: 0.333, 1: 0.333, 15: 0.333}
        >>> Ring(16).spectral_gap
        0.0507

    Args:
        num_replicas: `n`.

    Raises:
        ValueError: if `n` is no whole number of at least 1.
    """

    def _graph(self) -> nx.Graph:
        import networkx as nx

        return nx.cycle_graph(self.num_replicas)


class Chain(_Undirected):
    """A ring that is cut open: each replica exchanges with the one before and the one after it.

    Example:
        >>> Chain(4).neighbors(0)
        [1]

    Args:
        num_replicas: `n`.

    Raises:
        ValueError: if `n` is no whole number of at least 1.
    """

    def _graph(self) -> nx.Graph:
        import networkx as nx

        return nx.path_graph(self.num_replicas)


class _Lattice(_Undirected):
    _shortest_side = 1

    def __init__(self, num_replicas: int, rows: int | None = None) -> None:
        Topology.__init__(self, num_replicas)
        n = self.num_replicas
        name = type(self).__name__.lower()
        if rows is None:
            rows = next(r for r in range(math.isqrt(n), 0, -1) if n % r == 0)
            if n > 1 and rows < self._shortest_side:
                raise ValueError(f"A {name} needs two sides of at least 2, but {n} is prime: use 'ring' or 'grid'.")
        elif not is_whole(rows, least=1) or n % rows:
            raise ValueError(f"The rows of a {name} divide the number of replicas, but rows={rows!r} does not divide {n}.")
        elif n > 1 and min(rows, n // rows) < self._shortest_side:
            raise ValueError(f"A {name} needs two sides of at least 2; with rows={rows} of {n} it is a ring: use 'ring'.")
        self.rows, self.columns = rows, n // rows
        super().__init__(n)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_replicas}, rows={self.rows})"


class Torus(_Lattice):
    """A grid whose sides are joined: each replica exchanges with the one above, below, left and right of it.

    Sides of length 2 have single edges, so four replicas form a ring, with weights 1/3 as in table 4.2 of the thesis.

    Example:
        >>> Torus(16)
        Torus(16, rows=4)
        >>> Torus(16).neighbors(0), Torus(16).spectral_gap
        ([1, 3, 4, 12], 0.4)

    Args:
        num_replicas: `n`; replica `i` stands in row `i // columns`.
        rows: a divisor of `n`; by default that which makes the torus most square.

    Raises:
        ValueError: if a side would be shorter than 2, as for every prime `n`.
    """

    _shortest_side = 2

    def _graph(self) -> nx.Graph:
        import networkx as nx

        return nx.grid_2d_graph(self.rows, self.columns, periodic=True)


class Grid(_Lattice):
    """Each replica exchanges with the one above, below, left and right of it, as far as there is one.

    Example:
        >>> Grid(9).neighbors(4)
        [1, 3, 5, 7]

    Args:
        num_replicas: `n`; replica `i` stands in row `i // columns`.
        rows: a divisor of `n`; by default that which makes the grid most square. A prime `n` gives a chain.

    Raises:
        ValueError: if `n` is no whole number of at least 1, or `rows` does not divide it.
    """

    def _graph(self) -> nx.Graph:
        import networkx as nx

        return nx.grid_2d_graph(self.rows, self.columns)


class Star(_Undirected):
    """Replica 0 exchanges with all others, and they with nobody else: a parameter server.

    Example:
        >>> Star(5).max_degree
        4

    Args:
        num_replicas: `n`.

    Raises:
        ValueError: if `n` is no whole number of at least 1.
    """

    def _graph(self) -> nx.Graph:
        import networkx as nx

        return nx.star_graph(self.num_replicas - 1)


class BinaryTree(_Undirected):
    """Replica `i` exchanges with its children `2 i + 1` and `2 i + 2`, and with its parent.

    Example:
        >>> BinaryTree(7).neighbors(1)
        [0, 3, 4]

    Args:
        num_replicas: `n`.

    Raises:
        ValueError: if `n` is no whole number of at least 1.
    """

    def _graph(self) -> nx.Graph:
        import networkx as nx

        return nx.full_rary_tree(2, self.num_replicas)


class Hypercube(_Undirected):
    r"""Replicas exchange if their numbers differ in one bit.

    With `p = \log_2 n` the spectral gap is `2 / (1 + p)`, that of the static exponential graph, but edges go both ways.

    Example:
        >>> Hypercube(8).neighbors(0), Hypercube(8).spectral_gap
        ([1, 2, 4], 0.5)

    Args:
        num_replicas: `n`, a power of two.

    Raises:
        ValueError: if `n` is no power of two.
    """

    def _graph(self) -> nx.Graph:
        import networkx as nx

        n = self.num_replicas
        if n & (n - 1):
            raise ValueError(f"A hypercube has 2, 4, 8, ... replicas, but there are {n}: use 'exponential' or 'torus'.")
        return nx.hypercube_graph(n.bit_length() - 1) if n > 1 else nx.empty_graph(1)


class SocialNetwork(_Undirected):
    """Davis's Southern Women: 18 women and the 14 events that they attended, a graph of 32 nodes and 89 edges.

    Example:
        >>> SocialNetwork().max_degree, SocialNetwork().spectral_gap
        (14, 0.0821)

    Args:
        num_replicas: 32, the only possibility.

    Raises:
        ValueError: for another number of replicas.

    Reference:
        A. Davis, B. Gardner, M. Gardner, *Deep South*, 1941.
    """

    def __init__(self, num_replicas: int = 32) -> None:
        if num_replicas != 32:
            raise ValueError(f"The social network has 32 nodes, but there are {num_replicas!r} replicas: use 'erdos_renyi'.")
        super().__init__(num_replicas)

    def _graph(self) -> nx.Graph:
        import networkx as nx

        graph = nx.davis_southern_women_graph()
        return nx.relabel_nodes(graph, {name: number for number, name in enumerate(graph)})  # women first, then events


class ErdosRenyi(_Undirected):
    r"""A random graph that has each possible edge with the same probability; drawn again until it is connected.

    Example:
        >>> ErdosRenyi(16, probability=0.5, seed=1).steps_to_reach_all(0)
        2

    Args:
        num_replicas: `n`.
        probability: of each edge; `min(1, 2 \log(n) / n)` by default, twice what makes most large graphs connected.
        seed: of the draw; the same on all ranks.

    Raises:
        ValueError: if the probability is not in (0, 1], or so small that none of 100 draws is connected.
    """

    def __init__(self, num_replicas: int, probability: float | None = None, seed: int = 0) -> None:
        Topology.__init__(self, num_replicas)
        n = self.num_replicas
        self.probability = min(1.0, 2 * math.log(n) / n) if probability is None else check_share("probability", probability)
        self.seed = seed
        super().__init__(n)

    def __repr__(self) -> str:
        return f"ErdosRenyi({self.num_replicas}, probability={self.probability:g}, seed={self.seed})"

    def _graph(self) -> nx.Graph:
        import networkx as nx

        stream = random.Random(self.seed)
        for _ in range(_DRAWS):
            graph = nx.gnp_random_graph(self.num_replicas, self.probability, seed=stream)
            if nx.is_connected(graph):
                return graph
        likely = math.log(self.num_replicas) / self.num_replicas
        raise ValueError(
            f"None of {_DRAWS} random graphs of {self.num_replicas} replicas with edge probability {self.probability:g} is "
            f"connected: use a probability well above log(n)/n = {likely:.2g}."
        )


class Complete(Topology):
    r"""Each replica exchanges with all others, and a step averages exactly: `W = 1 1^T / n`.

    Example:
        >>> Complete(4).weights(2)
        {0: 0.25, 1: 0.25, 2: 0.25, 3: 0.25}

    Args:
        num_replicas: `n`.

    Raises:
        ValueError: if `n` is no whole number of at least 1.
    """

    def __init__(self, num_replicas: int) -> None:
        super().__init__(num_replicas, 1, symmetric=True)

    def weights(self, i: int, t: int = 0) -> dict[int, float]:
        """Return row `i` of the matrix."""
        weight = 1 / self.num_replicas
        return dict.fromkeys(range(self.num_replicas), weight)
