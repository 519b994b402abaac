"""Stochastic gradient push: gossip over directed graphs, with weights that undo the bias of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_distopt.algorithms.gossip import Blocks, GossipAlgorithm
from lightning_distopt.communication import Communicator, Neighbourhood, Replicas
from lightning_distopt.topologies import Topology


class PushSum(GossipAlgorithm):
    r"""Stochastic gradient push (SGP), for directed graphs in which replicas send to more or fewer than they hear.

    $$ x_i^{t+1} = \sum_j a_{ij} \, ( x_j^t + \Delta_j^t ), \qquad w_i^{t+1} = \sum_j a_{ij} \, w_j^t, \qquad
       z_i^{t+1} = x_i^{t+1} / w_i^{t+1}, \qquad w_i^0 = 1 $$

    with gradients taken at `z`, and steps of the optimizer, weight decay too, from `x`. Only the columns of `A` sum to 1: a
    replica settles alone how it divides what it has among those it sends to. So the sums of the `x` and of the `w` are
    preserved, and without gradients every `z_i` tends to the mean of the start. Where rows sum to 1 as well, all `w` are 1 and
    this is `DSGD`.

    The replicas' rows are `z`; the model that is evaluated and saved is the mean of the `x`. The `w` follow from the graph
    alone, so that every rank computes all `n` of them instead of sending them along, and replicas mix `z` with weights that sum
    to 1,

    $$ z_i^{t+1} = \sum_j b_{ij} \, z_j, \qquad b_{ij} = a_{ij} \, w_j^t / w_i^{t+1} , $$

    which replicas that are equal leave as they are, to the last bit. Buffers and optimizer state are mixed with them too. An
    exact average of all replicas, which `ConsensusControl` may ask for, leaves each with the mean of the `x` and `w = 1`.

    A graph or a list of edges `(j, i)`, from `j` to `i`, gets `a_ij = 1 / (1 + number that j sends to)`; a matrix has in entry
    `[i, j]` the share of what `j` has that it sends to `i`.

    Example:
        >>> from lightning_distopt.topologies import make
        >>> push_sum = PushSum().connect(make([(0, 1), (1, 2), (2, 0), (0, 2)], 3, column_stochastic=True))
        >>> push_sum.advance(torch.ones(3, dtype=torch.float64), t=0)
        tensor([0.8333, 0.8333, 1.3333], dtype=torch.float64)

    Memory: pieces of what is received.

    Raises:
        ValueError: when fitting starts, for LBFGS on a graph whose weights are not all 1.

    Reference: M. Assran, N. Loizou, N. Ballas and M. Rabbat, *Stochastic gradient push for distributed deep learning*, ICML
    2019; D. Kempe, A. Dobra and J. Gehrke, *Gossip-based computation of aggregate information*, FOCS 2003.
    """

    column_stochastic = True

    def __init__(self) -> None:
        super().__init__()
        self._w = torch.ones(1, dtype=torch.float64)
        self._edges: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._at_x: int | None = None  # the row that is at x just now

    def __repr__(self) -> str:
        return "PushSum()"

    def connect(self, topology: Topology) -> GossipAlgorithm:
        """Say who talks to whom; only columns need sum to 1."""
        super().connect(topology)
        self.steps_elsewhere, self._edges = not topology.doubly_stochastic, {}
        return self

    def check_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Refuse what evaluates gradients where it steps."""
        if self.steps_elsewhere and any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
            raise ValueError(
                "LBFGS takes gradients at the point that it steps from, and PushSum at another one: use another optimizer, or "
                "a graph in which every replica sends to as many as it hears."
            )

    def setup(self, replicas: Replicas, communicator: Communicator) -> None:
        """Start with weights of 1."""
        super().setup(replicas, communicator)
        self._w, self._at_x = torch.ones(communicator.num_replicas, dtype=torch.float64), None

    # ----------------------------------------------------------------------------------------------------------- weights
    @property
    def push_weights(self) -> Tensor:
        """`w` of all replicas, `[n]`; they sum to `n`."""
        return self._w.clone()

    def advance(self, w: Tensor, t: int) -> Tensor:
        """Return `A w` with the matrix of gossip step `t`."""
        period = self.topology.period
        key = t if period is None else t % period
        if key not in self._edges:
            if period is None:
                self._edges.clear()
            rows = [self.topology.weights(i, t) for i in range(self.topology.num_replicas)]
            entries = [(i, j, weight) for i, row in enumerate(rows) for j, weight in row.items()]
            i, j, weights = zip(*entries, strict=True)
            self._edges[key] = torch.tensor(i), torch.tensor(j), torch.tensor(weights, dtype=torch.float64)
        i_, j_, a = self._edges[key]
        return torch.zeros_like(w).index_add_(0, i_, a * w[j_])  # w_i <- sum_j a_ij w_j

    def neighbourhood(self, t: int) -> Neighbourhood:
        """Return what replicas here send and hear in gossip step `t`, the next one or the last, and how they mix `z`."""
        if not self.steps_elsewhere:
            return super().neighbourhood(t)
        if t not in self._hoods:
            self._hoods.clear()
            topology, w, new = self.topology, self._w.tolist(), self.advance(self._w, t).tolist()
            self._hoods[t] = Neighbourhood.of(
                self.communicator.local_replicas,
                lambda i: {j: a * w[j] / new[i] for j, a in topology.weights(i, t).items()},  # b_ij = a_ij w_j / w_i'
                lambda j: topology.listeners(j, t),
            )
        return self._hoods[t]

    def _own(self, block: Tensor) -> Tensor:
        """Return the `w` of the replicas here, `[m, 1]`, for a block."""
        here = self.communicator.local_replicas
        return self._w[here.start : here.stop, None].to(block.device, torch.promote_types(block.dtype, torch.float32))

    # ----------------------------------------------------------------------------------------------------------- updates
    def before_update(self) -> None:
        """Go from `z` to `x`."""
        if self.steps_elsewhere and self._at_x is None:
            self._at_x = self.replicas.active
            for block in self.replicas.parameters:
                block[self._at_x].mul_(self._own(block)[self._at_x])

    def after_update(self) -> None:
        """Go back to `z`."""
        if self._at_x is not None:
            for block in self.replicas.parameters:
                block[self._at_x].div_(self._own(block)[self._at_x])
            self._at_x = None

    def models(self) -> Blocks:
        """Return the `x`, whose mean is preserved."""
        z = self.replicas.parameters
        return tuple((block * self._own(block)).to(block.dtype) for block in z) if self.steps_elsewhere else z

    # ------------------------------------------------------------------------------------------------------------ rounds
    def finish_round(self, step: int) -> int:
        """Gossip, or average the `x` exactly."""
        if self.steps_elsewhere and self._mode == "average":
            for block in self.replicas.parameters:
                block *= self._own(block)
            self._w = torch.ones_like(self._w)
        return super().finish_round(step)

    def finish_gossip(self) -> None:
        """Mix the stepped iterates, and the weights."""
        done = 0
        while self.wants_more(done):
            t = self.next_gossip_step
            self.gossip(self.replicas.parameters)  # z_i <- sum_j b_ij z_j
            if self.steps_elsewhere:
                self._w = self.advance(self._w, t)
            done += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the weights as well."""
        return {**super().state_dict(), "w": self._w.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with them."""
        super().load_state_dict(state)
        self._w = state["w"].to("cpu", torch.float64)
