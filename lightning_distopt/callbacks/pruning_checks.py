"""What pruning can't be combined with is refused before training starts; what goes wrong later is warned of."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_distopt.callbacks.everywhere import replicas_meet
from lightning_distopt.callbacks.mask_checks import check_masks
from lightning_distopt.sparsity.method import PruningMethod
from lightning_distopt.sparsity.pruner import Pruner
from lightning_distopt.strategies import FederatedStrategy
from lightning_distopt.strategies.base import ReplicaStrategy

OVERSHOOT = 10.0
"""How many times as large as all others a filter that comes back has to be for a warning."""


def check_pruning(trainer: pl.Trainer, method: PruningMethod) -> None:
    """Refuse strategies and callbacks that pruning can't have.

    Raises:
        MisconfigurationException: for one of them.
    """
    check_masks(trainer, "DynamicPruning")
    strategy = trainer.strategy
    if isinstance(strategy, FederatedStrategy):
        raise MisconfigurationException(
            f"DynamicPruning changes masks after optimizer steps, which the clients of {type(strategy).__name__} make one "
            "after the other: use LocalSGDStrategy, GossipStrategy or DDP, or prune the model that the federation has trained."
        )
    if method.rewind_to is not None and not replicas_meet(strategy):
        raise MisconfigurationException(
            f"{type(method).__name__} goes back to earlier weights, which replicas that never agree do not have in common: use "
            "LocalSGDStrategy or DDP."
        )


def check_sparse_rounds(trainer: pl.Trainer) -> None:
    """Refuse `sparse_rounds` where there are no rounds that can send a part of the parameters.

    Raises:
        MisconfigurationException: if it is so.
    """
    strategy = trainer.strategy
    what = type(strategy).__name__
    if isinstance(strategy, ReplicaStrategy):
        if strategy.algorithm.sends_columns:
            return
        what += f" with {strategy.algorithm!r}"
    raise MisconfigurationException(
        f"`sparse_rounds=True` needs rounds that average parameters as they are, and {what} has none, or something else goes "
        "with them: use LocalSGDStrategy, or GossipStrategy with DSGD, without `overlap` and ConsensusControl."
    )


def check_moments(trainer: pl.Trainer, method: PruningMethod, weights: Sequence[Tensor]) -> None:
    """Refuse optimizers that keep no running mean of the gradients of some weights.

    Raises:
        MisconfigurationException: if one is such.
    """
    own = set(map(id, weights))
    for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
        if not group.get("momentum") and "betas" not in group and not own.isdisjoint(map(id, group["params"])):
            raise without_moments(method)


def without_moments(method: PruningMethod) -> MisconfigurationException:
    """Return the error for an optimizer that has not what a method looks at."""
    return MisconfigurationException(
        f"{type(method).__name__} looks at the momentum of weights, and this optimizer has none: use SGD with momentum, or "
        "Adam."
    )


def warn_at_the_end(pruner: Pruner, sparsity: float, step: int) -> None:
    """Warn if training has ended before masks were as sparse as they were to be, or with layers that have no weight left."""
    if pruner.lacks(sparsity):
        sooner = ", or let `ramp` end sooner" if pruner.method.ramp else ""
        rank_zero_warn(
            f"DynamicPruning: training has ended after step {step} with {pruner.sparsity:.3g} of the weights pruned, before "
            f"masks came to `sparsity={sparsity:g}`: train longer{sooner}."
        )
    sizes = dict(zip(pruner.layers, (w.numel() for w in pruner.weights), strict=True))
    gone = [f"`{name}`" for name, zeros in pruner.zeros.items() if zeros == sizes[name]]
    if gone:
        rank_zero_warn(
            f"DynamicPruning: no weight is left in {', '.join(gone)}, where nothing but a bias comes out: use a lower "
            "`sparsity`, a `distribution` such as 'layer' or 'erk', or leave small layers out of `layers`."
        )


def warn_of_overshoot(pruner: Pruner, masks: Sequence[Tensor]) -> bool:
    """Warn of filters that come back from nothing, with these masks, much larger than the others; return whether any does."""
    layer, factor = pruner.overshoot(masks)
    if factor > OVERSHOOT:
        rank_zero_warn(
            f"DynamicPruning: a filter of `{layer}` that had no weights left comes back {factor:.0f} times as large as the "
            "largest of the others. In front of batch norm the gradient of such a filter is hundreds of times too large, "
            "and training may not recover: use `method=DPF(limit=True)`, a lower sparsity or `gradient_clip_val`."
        )
    return factor > OVERSHOOT
