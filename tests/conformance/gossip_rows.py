"""Rows of gossip: graphs, algorithms, compressors, several gossip steps, local steps between rounds, delays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning_distopt import CHOCO, DCD, DPSGD, ECD, DeepSqueeze, EFSign, GossipStrategy
from lightning_distopt.topologies import RandomMatching, Torus
from tests.conformance.case import Case
from tests.oracles import compressors, gossip, topologies

SIZES = (6, 2)  # of the tensors of `Quadratic`
SIGN = compressors.per_tensor(compressors.sign, SIZES)
HALF = compressors.per_tensor(compressors.top_k(0.5), SIZES)


def row(
    name: str,
    algorithm: Callable[[], Any],
    oracle: Callable[..., Any],
    graph: Callable[[int], Any] | None = topologies.ring,
    varying: bool = False,
    sizes: tuple[int, ...] = (4,),
    options: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
    **told: Any,
) -> Case:
    """Make a row; `graph` is what the oracle mixes with, `varying` whether as a function of the gossip step."""

    def run(x0: Any, gradients: Any, etas: Any, n: int, optimizer: Any, limit: Any = None) -> Any:
        matrix = {} if graph is None else {"W": graph(n)}
        if varying and not callable(matrix["W"]):
            matrix["W"] = topologies.static(matrix["W"])
        return oracle(x0, gradients, etas, n, optimizer, limit, **matrix, **told)

    return Case(
        name,
        lambda **kw: GossipStrategy(algorithm(), **(options or {}), **kw),
        run,
        rounds=lambda steps: steps // told.get("H", 1),
        sizes=sizes,
        **(facts or {}),
    )


def random_matching(n: int) -> Any:
    return lambda t: RandomMatching(n, seed=3).matrix(t).numpy()


def lazy(n: int) -> Any:
    return (topologies.ring(n) + topologies.matching(n, [])) / 2


def torus(n: int) -> Any:
    return Torus(n).matrix().numpy()


sgd = partial(row, oracle=gossip.dsgd, varying=True)
lossy = {"preserves_mean": False, "exact": False}

ROWS = [
    sgd("dsgd", lambda: "dsgd", graph=topologies.one_peer_exponential, sizes=(2, 3, 4)),
    sgd("dsgd_ring_two_steps", lambda: "dsgd", options={"topology": "ring", "gossip_steps": 2}, sizes=(2, 3), k=2),
    sgd("dsgd_star_local_steps", lambda: "dsgd", graph=topologies.star, options={"topology": "star", "sync_period": 3}, H=3),
    sgd("dsgd_random_matching", lambda: "dsgd", graph=random_matching, options={"topology": "random_matching:3"}),
    row(
        "dsgd_delayed",
        lambda: "dsgd",
        gossip.dsgd_delayed,
        graph=lazy,
        varying=True,
        options={"topology": "ring", "overlap": True, "sync_period": 2},
        H=2,
    ),
    row("dpsgd", DPSGD, gossip.dpsgd, graph=topologies.one_peer_exponential, sizes=(2, 3, 4)),
    row(
        "dpsgd_ring_two_steps_local_steps",
        DPSGD,
        gossip.dpsgd,
        varying=True,
        options={"topology": "ring", "gossip_steps": 2, "sync_period": 2, "overlap": False},
        k=2,
        H=2,
    ),
    row(
        "choco_sign",
        lambda: CHOCO(gamma=0.4, compressor="sign"),
        gossip.choco,
        gamma=0.4,
        compress=SIGN,
        sizes=(2, 3, 4),
    ),
    row(
        "choco_top_k_two_steps_local_steps",
        lambda: CHOCO(gamma=0.3, compressor="top_k:0.5", x_hat_init="zero"),
        gossip.choco,
        graph=torus,
        options={"topology": "torus", "gossip_steps": 2, "sync_period": 2},
        gamma=0.3,
        compress=HALF,
        k=2,
        H=2,
        x_hat="zero",
    ),
    row(
        "choco_over_rows",
        lambda: CHOCO(gamma=0.4, compressor="sign", scope="row"),
        gossip.choco,
        gamma=0.4,
        compress=compressors.sign,
    ),
    row("dcd_top_k", lambda: DCD("top_k:0.5"), gossip.dcd, compress=HALF, facts=lossy),
    row(
        "dcd_identity_local_steps",
        lambda: DCD("identity"),
        gossip.dcd,
        compress=compressors.identity,
        H=2,
        options={"sync_period": 2},
    ),
    row("ecd_identity", lambda: ECD("identity"), gossip.ecd, compress=compressors.identity),
    row(
        "deep_squeeze_sign",
        lambda: DeepSqueeze(gamma=0.1, compressor="sign"),
        gossip.deep_squeeze,
        gamma=0.1,
        compress=SIGN,
    ),
    row(
        "ef_sign",
        EFSign,
        gossip.ef_sign,
        graph=None,
        compress=SIGN,
        sizes=(2, 4),
        facts={**lossy, "diverges": False},
    ),
]
