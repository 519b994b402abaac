"""Several models of one task: what they predict together, and how different their masks are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_distopt.options import check_choice
from lightning_distopt.sparsity.packed_masks import PackedMasks

Masks = Mapping[str, Tensor] | PackedMasks


def combine_predictions(
    logits: Tensor | Sequence[Tensor], by: Literal["labels", "logits", "probabilities"] = "probabilities"
) -> Tensor:
    r"""Return the classes that several models predict together.

    $$ \begin{aligned}
    \text{labels:} \quad & \arg\max_c \sum_k [\, \arg\max z_k = c \,] \\
    \text{logits:} \quad & \arg\max_c \sum_k z_{k,c} \\
    \text{probabilities:} \quad & \arg\max_c \sum_k \operatorname{softmax}(z_k)_c
    \end{aligned} $$

    Where labels have equally many votes, the probabilities decide among them.

    Example:
        >>> logits = torch.tensor([[[4.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]])  # three models, one sample, two classes
        >>> combine_predictions(logits, "labels"), combine_predictions(logits, "logits")
        (tensor([1]), tensor([0]))

    Args:
        logits: `[models, ..., classes]`, or one tensor for each model.
        by: what is combined.

    Returns:
        `[...]`, numbers of classes.

    Raises:
        ValueError: for another `by`.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, section 7.6.
    """
    check_choice("by", by, ("labels", "logits", "probabilities"))
    scores = logits if isinstance(logits, Tensor) else torch.stack(list(logits))
    probabilities = scores.softmax(-1).mean(0)
    if by == "labels":
        votes = torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).sum(0)
        best = votes == votes.amax(-1, keepdim=True)
        return probabilities.where(best, probabilities.new_tensor(-1)).argmax(-1)
    if by == "logits":
        return scores.mean(0).argmax(-1)
    return probabilities.argmax(-1)


def mask_dissimilarity(
    first: Masks, second: Masks, first_initial: Masks, second_initial: Masks | None = None
) -> dict[str, float]:
    r"""Return how differently two runs have changed the mask of each layer.

    $$ s = \frac{\| M_1 - M_2 \|_1}{\| M_1 - M_1^{\text{init}} \|_1 + \| M_2 - M_2^{\text{init}} \|_1} $$

    From one initial mask, `s` is 0 for equal masks, 1 where no bit has changed in both runs, and never more. Where neither
    run has changed a mask, `s` is 0 if the two are equal, else infinite.

    Example:
        >>> start = {"layer": torch.tensor([1, 1, 1, 1])}
        >>> mask_dissimilarity({"layer": torch.tensor([0, 0, 1, 1])}, {"layer": torch.tensor([1, 0, 0, 1])}, start)
        {'layer': 0.5}

    Args:
        first: masks of the first run, by layer.
        second: of the second run.
        first_initial: what the first run started from.
        second_initial: what the second started from; None: the same.

    Raises:
        ValueError: if they are not masks of the same layers.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, section 7.6.
    """
    ones, twos, starts = _tensors(first), _tensors(second), _tensors(first_initial)
    others = starts if second_initial is None else _tensors(second_initial)
    everywhere = set.intersection(*(set(masks) for masks in (ones, twos, starts, others)))
    unequal = sorted({*ones, *twos, *starts, *others} - everywhere)
    if unequal:
        raise ValueError(f"These are not masks of the same layers: not all of them have one of `{unequal[0]}`.")

    def distance(a: Tensor, b: Tensor) -> int:
        return int((a.bool() ^ b.bool()).sum())

    result = {}
    for name in ones:
        apart = distance(ones[name], twos[name])
        changed = distance(ones[name], starts[name]) + distance(twos[name], others[name])
        result[name] = apart / changed if changed else (float("inf") if apart else 0.0)
    return result


def _tensors(masks: Masks) -> Mapping[str, Tensor]:
    return {name: masks.masks(name) for name in masks.bits} if isinstance(masks, PackedMasks) else masks
