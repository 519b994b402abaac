"""Rows of push-sum on directed graphs, RelaySum on trees, and PowerGossip."""

from __future__ import annotations

from typing import Any

import networkx as nx
import torch

from lightning_distopt import GossipStrategy, PowerGossip, RelaySum
from lightning_distopt.communication import derive_seed
from tests.conformance.case import Case
from tests.oracles import directed, topologies

UNEVEN = [(0, 1), (1, 2), (2, 3), (3, 0), (0, 2), (0, 3)]  # from, to: replica 0 sends to three and hears one
SEED = 7  # of `problems.fit`


def tree(n: int) -> list[tuple[int, int]]:
    return [((i - 1) // 2, i) for i in range(1, n)]


def chain(n: int) -> list[tuple[int, int]]:
    return [(i, i + 1) for i in range(n - 1)]


def drawn(i: int, j: int) -> list[tuple[Any, Any]]:
    """What both ends of an edge draw for a matrix of 3 rows and 2 columns."""
    generator = torch.Generator().manual_seed(derive_seed(SEED, "power_gossip", i, j, 0))
    vectors = torch.empty(5, dtype=torch.float64).normal_(generator=generator).numpy()
    return [(vectors[:3, None], vectors[3:, None])]


def push_sum(name: str, A: Any, sizes: tuple[int, ...], options: dict[str, Any], facts: dict[str, Any], **told: Any) -> Case:
    return Case(
        name,
        lambda **kw: GossipStrategy("push_sum", **options, **kw),
        lambda x0, gradients, etas, n, *rest: directed.push_sum(x0, gradients, etas, n, *rest, A=A(n), **told),
        rounds=lambda steps: steps // told.get("H", 1),
        sizes=sizes,
        **facts,
    )


def relay_sum(name: str, edges: Any, options: dict[str, Any], **told: Any) -> Case:
    return Case(
        name,
        lambda **kw: GossipStrategy(RelaySum(), **options, **kw),
        lambda x0, gradients, etas, n, *rest: directed.relay_sum(x0, gradients, etas, n, *rest, edges=edges(n), **told),
        rounds=lambda steps: steps // told.get("H", 1),
        preserves_mean=False,
        exact=False,
    )


def power_gossip(name: str, options: dict[str, Any], **told: Any) -> Case:
    def run(x0: Any, gradients: Any, etas: Any, n: int, *rest: Any) -> Any:
        known = {"W": topologies.ring(n), "shapes": [(3, 2), (2,)], "start": drawn}
        return directed.power_gossip(x0, gradients, etas, n, *rest, **known, **told)

    return Case(
        name,
        lambda **kw: GossipStrategy(PowerGossip(), **options, **kw),
        run,
        rounds=lambda steps: steps // told.get("H", 1),
    )


biased = {"preserves_mean": False, "exact": False}

ROWS: list[Case] = [
    push_sum("push_sum", topologies.one_peer_exponential, (2, 3, 4), {}, {}),
    push_sum(
        "push_sum_uneven",
        lambda n: topologies.static(directed.out_degrees(n, UNEVEN)),
        (4,),
        {"topology": nx.DiGraph(UNEVEN)},
        {**biased, "refuses_one": "The graph has 4 nodes"},
    ),
    push_sum(
        "push_sum_uneven_two_steps_local_steps",
        lambda n: topologies.static(directed.out_degrees(n, UNEVEN)),
        (4,),
        {"topology": UNEVEN, "gossip_steps": 2, "sync_period": 2},
        {**biased, "refuses_one": "leads to a replica that does not exist"},
        k=2,
        H=2,
    ),
    relay_sum("relay_sum", tree, {}),
    relay_sum("relay_sum_chain_local_steps", chain, {"topology": "chain", "sync_period": 2}, H=2),
    power_gossip("power_gossip", {}),
    power_gossip("power_gossip_two_steps_local_steps", {"gossip_steps": 2, "sync_period": 2}, k=2, H=2),
]
