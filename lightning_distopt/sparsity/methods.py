"""Pruning methods by name."""

from __future__ import annotations

from lightning_distopt.lookup import by_name
from lightning_distopt.sparsity.dpf import DPF
from lightning_distopt.sparsity.dsr import DSR
from lightning_distopt.sparsity.incremental import Incremental
from lightning_distopt.sparsity.lottery_ticket import LotteryTicket
from lightning_distopt.sparsity.method import PruningMethod
from lightning_distopt.sparsity.one_shot import OneShot
from lightning_distopt.sparsity.rigl import RigL
from lightning_distopt.sparsity.set import SET
from lightning_distopt.sparsity.snip import SNIP
from lightning_distopt.sparsity.soft_filter import SoftFilterPruning
from lightning_distopt.sparsity.sparse_momentum import SparseMomentum

METHODS: dict[str, type[PruningMethod]] = {
    "dpf": DPF,
    "one_shot": OneShot,
    "incremental": Incremental,
    "snip": SNIP,
    "lottery_ticket": LotteryTicket,
    "set": SET,
    "rigl": RigL,
    "sparse_momentum": SparseMomentum,
    "dsr": DSR,
    "soft_filter": SoftFilterPruning,
}
"""Methods by the names that `DynamicPruning(method=...)` takes."""


def make_method(method: str | PruningMethod) -> PruningMethod:
    """Return the method of a name, with its defaults; a method is returned as it is.

    Example:
        >>> make_method("dpf")
        DPF(distribution='global', filters=False, limit=False)

    Args:
        method: a name among `METHODS`, or a method.

    Raises:
        ValueError: if there is none of that name.
    """
    return by_name(method, METHODS, PruningMethod, "pruning method", "RigL(drop=0.5)")
