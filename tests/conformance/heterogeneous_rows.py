"""Rows of algorithms for heterogeneous data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_distopt import D2, DMSGD, GradientTracking, QuasiGlobal, QuasiGlobalAdam
from tests.conformance.case import Case
from tests.conformance.gossip_rows import lazy, row
from tests.oracles import heterogeneous, topologies


def decayed(oracle: Callable[..., Any], weight_decay: float = 0.01) -> Callable[..., Any]:
    """Let an oracle with an optimizer of its own know the weight decay alone."""
    return lambda x0, gradients, etas, n, optimizer, limit=None, **told: oracle(
        x0, gradients, etas, n, weight_decay, limit, **told
    )


QG = decayed(heterogeneous.quasi_global)
OWN = {"takes": "sgd", "acts_alone": True, "exact": False, "preserves_mean": False}
RING = {"topology": "ring"}
FACTORS = {"beta": 0.8, "mu": 0.7}

ROWS: list[Case] = [
    row(
        "quasi_global",
        lambda: QuasiGlobal(**FACTORS),
        QG,
        topologies.one_peer_exponential,
        varying=True,
        sizes=(2, 3, 4),
        facts=OWN,
        **FACTORS,
    ),
    row(
        "quasi_global_nesterov",
        lambda: QuasiGlobal(nesterov=True, **FACTORS),
        QG,
        varying=True,
        options=RING,
        facts=OWN,
        nesterov=True,
        **FACTORS,
    ),
    row(
        "quasi_global_every_third",
        lambda: QuasiGlobal(period=3, beta=0.8),
        QG,
        varying=True,
        options=RING,
        facts=OWN,
        period=3,
        beta=0.8,
        mu=0.8,
    ),
    row(
        "quasi_global_adam",
        QuasiGlobalAdam,
        decayed(heterogeneous.quasi_global_adam, 0.0),
        varying=True,
        options=RING,
        facts={**OWN, "takes": "adam", "learns": 0.7},
    ),
    row("dmsgd_1", lambda: DMSGD(1, 0.8, 0.7), decayed(heterogeneous.dmsgd), options=RING, facts=OWN, option=1, **FACTORS),
    row("dmsgd_2", lambda: DMSGD(2, 0.8, 0.7), decayed(heterogeneous.dmsgd), options=RING, facts=OWN, option=2, **FACTORS),
    row(
        "d2",
        D2,
        decayed(heterogeneous.d2),
        graph=lazy,
        sizes=(2, 3, 4),
        facts={"takes": "sgd", "exact": False, "preserves_mean": False, "decays": False},
    ),
    row("d2_plus", lambda: D2(plus=True), decayed(heterogeneous.d2), graph=lazy, facts={"takes": "sgd"}, plus=True),
    row(
        "gradient_tracking",
        GradientTracking,
        heterogeneous.gradient_tracking,
        topologies.one_peer_exponential,
        varying=True,
        sizes=(2, 3, 4),
    ),
]
