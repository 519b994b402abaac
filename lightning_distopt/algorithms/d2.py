"""D2: decentralized SGD that corrects for what replicas' data differ in."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from lightning_distopt.algorithms.gossip import Blocks, GossipAlgorithm
from lightning_distopt.communication import Communicator, Replicas
from lightning_distopt.topologies import TOPOLOGIES, Custom, Lazy, Topology

SMALLEST = -1 / 3
"""The least eigenvalue with which D2 converges."""


class D2(GossipAlgorithm):
    r"""D2, with `plus` D2+: every replica steps by how its gradient changes, so that differences between data cancel.

    $$ x_i^{t+1} = \sum_j w_{ij} \bigl( 2 x_j^t - x_j^{t-1} - \eta^t ( g_j^t - g_j^{t-1} ) \bigr) \quad \text{(D2)} $$

    $$ x_i^{t+1} = \sum_j w_{ij} \Bigl( x_j^t - \eta^t \bigl( \tfrac{x_j^{t-1} - x_j^t}{\eta^{t-1}} + g_j^t - g_j^{t-1} \bigr)
       \Bigr) \quad \text{(D2+)} $$

    from a first step of D-SGD. For a constant learning rate they are the same, and reach the optimum exactly where D-SGD is
    biased by the heterogeneity of data. When the learning rate falls, D2 goes on with a step of the size before: it is thrown
    off, and stays so; D2+ rescales what it remembers.

    `W` must have no eigenvalue below -1/3. So graphs are used lazily, as `(W + I) / 2`; a matrix of your own is used as it is.
    A step with learning rate zero mixes, and leaves what is remembered as it is.

    For other optimizers than plain SGD `-Delta / eta` takes the place of the gradient.

    Example:
        >>> D2(plus=True)
        D2(plus=True)

    Args:
        plus: whether this is D2+.

    Memory: D2 two blocks, D2+ one.

    Raises:
        ValueError: when fitting starts, for a matrix with an eigenvalue below -1/3.

    Reference: H. Tang, X. Lian, M. Yan, C. Zhang and J. Liu, *D2: decentralized training over decentralized data*, ICML 2018;
    D2+: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, sections 9.6.2 and 18.2.4.
    """

    static_graph = True
    gossips_freely = False
    local_steps = False
    kept = ("b", "u")

    def __init__(self, plus: bool = False) -> None:
        super().__init__()
        self.plus = bool(plus)
        # With y^t = x^t - eta^t g^t, the last one's place before the correction and gossip:
        self._b: Blocks = ()  # y^{t-1} - x^t
        self._u: Blocks = ()  # eta^{t-1} g^{t-1} = x^{t-1} - y^{t-1}; x^t while gradients are computed
        self._rates: list[float] = []  # of each parameter, the last learning rate that was not zero

    def __repr__(self) -> str:
        return f"D2(plus={self.plus})"

    def connect(self, topology: Topology) -> GossipAlgorithm:
        """Make a graph lazy; refuse a matrix with too small an eigenvalue."""
        own = topology.from_matrix if isinstance(topology, Custom) else type(topology) not in (Lazy, *TOPOLOGIES.values())
        super().connect(topology if own or isinstance(topology, Lazy) else Lazy(topology))
        smallest = float(torch.linalg.eigvalsh(topology.matrix())[0]) if own else 0.0
        if smallest < SMALLEST - 1e-9:
            raise ValueError(
                f"D2 diverges with this mixing matrix, whose smallest eigenvalue is {smallest:.3f} and may not be below -1/3: "
                "use (W + I) / 2, or give the graph, of which D2 makes that itself."
            )
        if smallest < SMALLEST + 1e-9:
            warnings.warn(
                "The smallest eigenvalue of this mixing matrix is -1/3, where D2 just does not converge any more: use "
                "(W + I) / 2, or give the graph, of which D2 makes that itself.",
                stacklevel=2,
            )
        return self

    def setup(self, replicas: Replicas, communicator: Communicator) -> None:
        """Start with a step of D-SGD."""
        super().setup(replicas, communicator)
        self._rates = []
        self._b, self._u = replicas.new_blocks(), () if self.plus else replicas.new_blocks()

    def begin_gossip(self) -> None:
        """Bring what is remembered to this step's learning rate, and keep `x^t`. Doing it twice changes nothing."""
        rates = self.replicas.learning_rates()
        changes = list(zip(rates, self._rates or rates, strict=True))
        self._rates = [eta or last for eta, last in changes]
        for k, columns, (eta, last) in self.replicas.parts(changes):
            if not eta:
                continue
            ratio = eta / last if last else 1.0
            b = self._b[k][:, columns]
            if self.plus:
                b *= ratio  # (eta^t / eta^{t-1}) (y^{t-1} - x^t)
            else:
                u = self._u[k][:, columns]
                b.sub_(u, alpha=ratio - 1)  # y^{t-1} - x^t - (eta^t - eta^{t-1}) g^{t-1}
                u.copy_(self.replicas.parameters[k][:, columns])

    def finish_gossip(self) -> None:
        """Correct the step, and mix."""
        x = self.replicas.parameters
        moving = [(k, columns) for k, columns, eta in self.replicas.parts(self.replicas.learning_rates()) if eta]
        for k, columns in moving:
            b, y = self._b[k][:, columns], x[k][:, columns]
            if not self.plus:
                self._u[k][:, columns].sub_(y)  # eta^t g^t = x^t - y^t
            y -= b
            b += y  # y^t
        self.gossip(x)  # x^{t+1} = W (y^t - b)
        for k, columns in moving:
            self._b[k][:, columns].sub_(x[k][:, columns])  # y^t - x^{t+1}

    def state_dict(self) -> dict[str, Any]:
        """Return the learning rates as well."""
        return {**super().state_dict(), "rates": self._rates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with them."""
        super().load_state_dict(state)
        self._rates = [float(rate) for rate in state["rates"]]
