"""What every topology is: who sends to whom in which gossip step, and with what weights the messages are averaged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from lightning_distopt.options import is_whole

__all__ = ["TOLERANCE", "Topology"]

TOLERANCE = 1e-6  # of sums of weights, which a user may have written with seven digits
_STEPS_OF_RANDOM = 16  # looked at to validate a topology that never repeats


class Topology(ABC):
    r"""A graph over `n` replicas with a mixing matrix `W` for each gossip step, static or varying over time.

    $$ x_i \leftarrow \sum_j w_{ij} x_j, \qquad W 1 = 1, \quad 1^T W = 1^T, \quad w_{ij} \ge 0 $$

    Rows and columns sum to 1 (doubly stochastic), so the mean over replicas is preserved. A topology of your own defines
    `weights`; the rest follows from it.

    Example:
        >>> class Pair(Topology):
        ...     def weights(self, i, t=0):
        ...         return {0: 0.75, 1: 0.25} if i == 0 else {0: 0.25, 1: 0.75}
        >>> pair = Pair(2, symmetric=True)
        >>> pair.spectral_gap, pair.contraction, pair.neighbors(0)
        (0.5, 0.75, [1])

    Args:
        num_replicas: `n`, at least 1.
        period: gossip steps after which the matrices repeat: 1 if static, None if they never do.
        symmetric: whether the matrix of every step is symmetric.
        doubly_stochastic: False where only columns sum to 1, which push-sum can use.

    Raises:
        ValueError: if `num_replicas` is no whole number of at least 1.

    Reference:
        T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, assumptions 4 and 6.
    """

    num_replicas: int
    period: int | None
    symmetric: bool
    doubly_stochastic: bool

    def __init__(
        self, num_replicas: int, period: int | None = 1, symmetric: bool = False, doubly_stochastic: bool = True
    ) -> None:
        if not is_whole(num_replicas, least=1):
            raise ValueError(f"A topology has a whole number of replicas, at least 1; got {num_replicas!r}.")
        self.num_replicas = int(num_replicas)
        self.period = period
        self.symmetric = symmetric
        self.doubly_stochastic = doubly_stochastic

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_replicas})"

    # ---------------------------------------------------------------------------------------------------------- edges

    @abstractmethod
    def weights(self, i: int, t: int = 0) -> dict[int, float]:
        """Return row `i` of step `t`'s matrix: the weight of `i` itself and of each replica it receives from, sorted.

        Args:
            i: a replica.
            t: a gossip step, from 0 on.

        Returns:
            Weights by replica; they sum to 1. `i` is among them, even with weight 0.
        """

    def neighbors(self, i: int, t: int = 0) -> list[int]:
        """Return the replicas that `i` receives from in gossip step `t`, sorted, without `i`."""
        return [j for j in self.weights(i, t) if j != i]

    def listeners(self, i: int, t: int = 0) -> list[int]:
        """Return the replicas that receive from `i` in gossip step `t`, sorted, without `i`."""
        if self.symmetric:
            return self.neighbors(i, t)
        return [j for j in range(self.num_replicas) if j != i and i in self.weights(j, t)]

    def degree(self, i: int, t: int = 0) -> int:
        """Return how many messages `i` sends in gossip step `t`."""
        return len(self.listeners(i, t))

    @property
    def static(self) -> bool:
        """Whether all steps have the same matrix."""
        return self.period == 1

    @property
    def _steps(self) -> range:
        """The steps to look at for what holds in all of them."""
        return range(_STEPS_OF_RANDOM if self.period is None else self.period)

    @cached_property
    def max_degree(self) -> int:
        """The most messages that a replica sends in one gossip step."""
        return max(self.degree(i, t) for t in self._steps for i in range(self.num_replicas))

    def bytes_per_step(self, row_bytes: float) -> tuple[float, float]:
        """Return the bytes that a replica sends per gossip step, averaged over a period: mean over replicas, and busiest.

        Args:
            row_bytes: bytes of a message, `4 d` for `d` uncompressed parameters in float32.
        """
        steps = self._steps
        messages = [sum(self.degree(i, t) for t in steps) / len(steps) for i in range(self.num_replicas)]
        return row_bytes * sum(messages) / self.num_replicas, row_bytes * max(messages)

    def steps_to_reach_all(self, source: int, t: int = 0) -> int:
        """Return how many gossip steps, from step `t` on, bring information from `source` to all replicas.

        In each step, every replica that has it passes it to those it sends to.

        Args:
            source: a replica.
            t: the first step in which it can send.

        Raises:
            ValueError: if it never reaches all of them.
        """
        reached = frontier = {source}
        idle, steps = 0, 0
        while len(reached) < self.num_replicas:
            # In a static graph whoever has sent before has nothing new to say.
            senders = frontier if self.static else reached
            frontier = {j for i in senders for j in self.listeners(i, t + steps)} - reached
            reached = reached | frontier
            idle = 0 if frontier else idle + 1
            steps += 1
            if idle >= (self.period or 1000 * self.num_replicas):
                missing = min(set(range(self.num_replicas)) - reached)
                raise ValueError(f"What replica {source} sends never reaches replica {missing} in {self!r}.")
        return steps

    # ------------------------------------------------------------------------------------------------------- matrices

    def matrix(self, t: int = 0) -> Tensor:
        """Return the matrix `[n, n]` of gossip step `t` in float64; entry `[i, j]` is the weight of what `j` sends to `i`."""
        matrix = torch.zeros(self.num_replicas, self.num_replicas, dtype=torch.float64)
        for i in range(self.num_replicas):
            row = self.weights(i, t)
            matrix[i, list(row)] = torch.tensor(list(row.values()), dtype=torch.float64)
        return matrix

    @cached_property
    def spectral_gap(self) -> float:
        r"""`1 - |\lambda_2|`, with the second largest eigenvalue of a static matrix, by absolute value.

        Raises:
            ValueError: if the topology varies over time; `contraction` is defined there too.
        """
        if not self.static:
            raise ValueError(f"{self!r} varies over time and has no spectral gap; its `contraction` compares with static ones.")
        if self.num_replicas == 1:
            return 1.0
        matrix = self.matrix()
        eigenvalues = torch.linalg.eigvalsh(matrix) if self.symmetric else torch.linalg.eigvals(matrix)
        return _snapped(1 - float(eigenvalues.abs().sort(descending=True).values[1]))

    @cached_property
    def contraction(self) -> float:
        r"""`p`, the share of the squared consensus distance that a gossip step takes away at least.

        $$ \| W X - \bar X \|_F^2 \le (1-p) \| X - \bar X \|_F^2, \qquad
           p = 1 - \sigma^{2 / P}, \quad \sigma = \| W_{P-1} \cdots W_0 - \tfrac1n 1 1^T \|_2 $$

        `P` is the period: per step in the geometric mean over steps `0, ..., P - 1`, and 1 where a period averages exactly. Of
        a static matrix it is `1 - \sigma_2^2`, and `1 - \lambda_2^2` if it is symmetric. Random topologies: in expectation.

        Raises:
            ValueError: if the matrix is not doubly stochastic, or random without a closed form.
        """
        if not self.doubly_stochastic or self.period is None:
            raise ValueError(f"There is no contraction for {self!r}: it needs doubly stochastic matrices that repeat.")
        product = torch.eye(self.num_replicas, dtype=torch.float64)
        for t in range(self.period):
            product = self.matrix(t) @ product
        sigma = float(torch.linalg.matrix_norm(product - 1 / self.num_replicas, ord=2))
        return _snapped(1 - _snapped(sigma) ** (2 / self.period))

    # ---------------------------------------------------------------------------------------------------- what is needed

    def validate(self) -> None:
        """Check the matrices, what is said of them, and that the graph (all steps of a period together) is connected.

        Raises:
            ValueError: with the row or column whose weights are wrong, two replicas that do not agree on who sends to whom, or
                a replica that can't be reached.
        """
        n = self.num_replicas
        union: list[set[int]] = [set() for _ in range(n)]  # who receives from whom
        for t in self._steps:
            columns = [0.0] * n
            rows = [self.weights(i, t) for i in range(n)]
            hearers: list[set[int]] = [set() for _ in range(n)]
            for i, row in enumerate(rows):
                if not all(is_whole(j, least=0) and j < n for j in row):
                    raise ValueError(f"The replicas of {self!r} are 0 to {n - 1}, but {i} receives from {list(row)}.")
                union[i] |= {j for j, weight in row.items() if weight != 0}
                for j, weight in row.items():
                    if not 0 <= weight < float("inf"):
                        raise ValueError(f"Weights are finite and not negative, but that of {j} for {i} is {weight:g}.")
                    if self.symmetric and abs(rows[j].get(i, 0.0) - weight) > TOLERANCE:
                        raise ValueError(
                            f"{self!r} says that it is symmetric, but the weight of {j} for {i} is {weight:g} and that of {i} "
                            f"for {j} is {rows[j].get(i, 0.0):g}: give both the same weight, or leave out `symmetric=True`."
                        )
                    columns[j] += weight
                    hearers[j] |= {i} - {j}
                if self.doubly_stochastic:
                    _check_sum("row", i, sum(row.values()))
            for j in range(n):
                _check_sum("column", j, columns[j])
                if type(self).listeners is not Topology.listeners and set(self.listeners(j, t)) != hearers[j]:
                    raise ValueError(
                        f"{sorted(hearers[j])} receive from replica {j} in step {t}, but its `listeners` are "
                        f"{sorted(self.listeners(j, t))}: leave `listeners` out, or make both agree."
                    )
        senders = union
        receivers: list[set[int]] = [set() for _ in range(n)]
        for i, row_senders in enumerate(senders):
            for j in row_senders:
                receivers[j].add(i)
        for edges in (receivers, senders):
            reached, frontier = {0}, {0}
            while frontier:
                frontier = set().union(*(edges[i] for i in frontier)) - reached
                reached |= frontier
            if len(reached) < n:
                lost = min(set(range(n)) - reached)
                way = f"from replica 0 to {lost}" if edges is receivers else f"from replica {lost} to 0"
                raise ValueError(f"The graph is not connected: there is no path {way}. Add edges, so that all replicas agree.")

    def require(
        self, symmetric: bool = False, static: bool = False, doubly_stochastic: bool = True, by: str = "This algorithm"
    ) -> None:
        """Refuse the topology where an algorithm needs more of it.

        Args:
            symmetric: whether matrices must be symmetric.
            static: whether there must be a single matrix.
            doubly_stochastic: whether rows, too, must sum to 1.
            by: the algorithm, for the sentence.

        Raises:
            ValueError: if it is not so; names topologies that are.
        """
        if doubly_stochastic and not self.doubly_stochastic:
            raise ValueError(
                f"{by} needs a doubly stochastic mixing matrix, and of that of {self!r} only the columns sum to 1: use PushSum."
            )
        lacks = []
        if symmetric and not self.symmetric:
            lacks.append("symmetric")
        if static and not self.static:
            lacks.append("static")
        if not lacks:
            return
        if not symmetric:
            instead = "'ring' or 'exponential'" if static else "'one_peer_exponential' or 'ring'"
        else:
            instead = "'ring' or 'torus'" if static else "'random_matching' or 'ring'"
        raise ValueError(f"{by} needs a {' and '.join(lacks)} mixing matrix, and that of {self!r} is not: use {instead}.")


def _check_sum(kind: str, index: int, total: float) -> None:
    if not abs(total - 1) <= TOLERANCE:
        raise ValueError(f"The weights of each {kind} must sum to 1, but those of {kind} {index} sum to {total:g}.")


def _snapped(value: float) -> float:
    """Drop the rounding error of what is 0 or 1."""
    return float(round(value)) if abs(value - round(value)) < 1e-12 else value
