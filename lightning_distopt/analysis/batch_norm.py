"""Batch-norm statistics of weights that were never trained with: points between models, or away from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_distopt.analysis.objective import Objective
from lightning_distopt.analysis.undisturbed import undisturbed

BatchNormPolicy = Literal["reestimate", "keep"]
"""Of points around a model."""

Statistics = Literal["reestimate", "interpolate"]
"""Of points between two."""


def batch_norm_statistics(
    objective: Objective, at: Tensor | None = None, buffers: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    r"""Return running means and variances that belong to the weights at a point: the mean over those of the batches.

    $$ \mu = \frac1B \sum_{b=1}^B \mu_b(w), \qquad \sigma^2 = \frac1B \sum_{b=1}^B \sigma_b^2(w) $$

    Example:
        >>> norm = nn.Sequential(nn.BatchNorm1d(1, affine=False), nn.Linear(1, 1))
        >>> f = Objective(norm, lambda net, x: net(x).mean(), [torch.ones(4, 1), 3 * torch.ones(4, 1)])
        >>> batch_norm_statistics(f)["0.running_mean"]
        tensor([2.])

    Args:
        objective: with batches of training data, over all ranks.
        at: `[d]`; None: the weights as they are.
        buffers: and frozen parameters by name, that stand in for the module's own; statistics among them do not count.

    Returns:
        Buffers by name, for `Objective.loss(at, {**buffers, ...})`; none where there is no batch norm with running statistics.

    Reference:
        Izmailov et al.: Averaging weights leads to wider optima. UAI 2018 (update of the statistics of an average).
    """
    norms = {
        name: child
        for name, child in objective.module.named_modules()
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.track_running_stats and child.running_mean is not None
    }
    if not norms:
        return {}
    names = [f"{norm}.{kind}".lstrip(".") for norm in norms for kind in ("running_mean", "running_var")]
    own = {f"{name}.{kind}".lstrip(".") for name, norm in norms.items() for kind, _ in norm.named_buffers(recurse=False)}
    others = {name: value for name, value in (buffers or {}).items() if name not in own}
    problem: Exception | None = None
    with undisturbed(objective.module, objective.mode, objective.seed), torch.no_grad():
        for norm in norms.values():
            # new ones: writing to the old would spoil graphs that are kept
            for kind, value in list(norm.named_buffers(recurse=False)):
                setattr(norm, kind, torch.ones_like(value) if kind == "running_var" else torch.zeros_like(value))
            norm.momentum = None  # a plain mean over batches
            norm.train()
        try:
            place = objective.place(at, others or None)
            for batch in objective.batches:
                objective.batch_loss(batch, place)
        except Exception as error:
            problem = error
        estimated = dict(objective.module.named_buffers())
        found = [estimated[name].clone() for name in names]
        count = float(len(objective.batches))
        wide = [value.reshape(-1).to(objective.wide) for value in found]
        sums = count * torch.cat([*wide, wide[0].new_ones(1)])
    sums = objective.total(sums, problem)
    means = (sums[:-1] / sums[-1]).split([value.numel() for value in found])
    return {name: mean.view_as(value).to(value.dtype) for name, mean, value in zip(names, means, found, strict=True)}
