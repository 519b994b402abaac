"""Which weights stay: the largest ones over all layers or layer by layer, one by one or by whole filters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Distribution = Literal["global", "layer", "erk"]

DISTRIBUTIONS: tuple[Distribution, ...] = ("global", "layer", "erk")
_CHUNK = 1 << 16  # values
_BRACKET_SAMPLE = 1 << 17  # values that bracket the threshold of an exact selection
_SAMPLE = 1 << 21  # values that stand for all of them in an approximate one: a standard error of 0.02 points at 90 %


def rounded(value: float) -> int:
    """Return the nearest whole number, halves rounded up.

    Example:
        >>> rounded(2.5), rounded(1.4)
        (3, 1)
    """
    return math.floor(value + 0.5)


def pruned_count(sparsity: float, total: int) -> int:
    """Return how many of `total` weights are zero, `round(s N)`, halves rounded up.

    Example:
        >>> pruned_count(0.9, 25), pruned_count(0.5, 3)
        (23, 2)
    """
    return min(total, rounded(sparsity * total))


def smallest(values: Sequence[Tensor], k: int) -> list[Tensor]:
    """Return masks of ones and zeros, in the type of the values: zeros where the `k` smallest are.

    Of values that are equal the first ones are taken, in the order of the tensors and of the values as they lie in memory, so
    that all ranks that have the same values choose the same.

    Example:
        >>> smallest([torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])], k=1)
        [tensor([0., 1.]), tensor([1., 1.])]

    Args:
        values: of any number of tensors of one type and device.
        k: from 0 to their number.

    Raises:
        ValueError: if there are not as many values.
    """
    return _smallest(values, k, lambda part, room: part)


def _smallest(values: Sequence[Tensor], k: int, score: _Score, exact: bool = True) -> list[Tensor]:
    """Return the masks of `smallest` for the scores of values, which no more than a chunk is computed of at a time.

    If it need not be `exact`, all scores up to a quantile are taken, that of a sample of two million: about `k` of them.
    """
    total = sum(v.numel() for v in values)
    if k > total:
        raise ValueError(f"There are {total} values, of which the {k} smallest can't be taken.")
    if k <= 0:
        return [torch.ones_like(v) for v in values]
    values = [v.detach() if _permuted(v).is_contiguous() else v.detach().contiguous() for v in values]
    masks = [torch.empty_like(v) for v in values]
    chunks = [pair for v, mask in zip(values, masks, strict=True) for pair in zip(_chunks(v), _chunks(mask), strict=True)]
    room = torch.empty_like(max((part for part, _ in chunks), key=len))  # for the scores of a chunk
    if not exact and total > _SAMPLE:
        sample = _sample(values, total, _SAMPLE, score)
        value = sample.kthvalue(max(1, min(len(sample), round(k / total * len(sample))))).values
        for part, mask in chunks:
            torch.gt(score(part, room), value, out=mask)
        return masks
    low, high = _bracket(_sample(values, total, _BRACKET_SAMPLE, score), k / total)
    # Above the bracket all is kept, below nothing; what lies between its ends is noted.
    flags, kept = torch.empty_like(room, dtype=torch.float32), 0
    places: list[Tensor] = []
    inside: list[Tensor] = []
    for part, mask in chunks:
        scores, flag = score(part, room), flags[: len(part)]
        torch.ge(scores, low, out=mask)
        torch.le(scores, high, out=flag)
        kept += int(mask.sum(dtype=torch.float64))
        places.append(_nonzero(flag.mul_(mask)))
        inside.append(scores[places[-1]])
    candidates, left = torch.cat(inside), k - (total - kept)
    if not 0 < left <= len(candidates):  # the sample was not like the rest
        candidates, left = torch.cat([score(part, torch.empty_like(part)) for part, _ in chunks]), k
        places = [torch.arange(len(part), device=part.device) for part, _ in chunks]
    value = candidates.kthvalue(left).values
    ties = left - int((candidates < value).sum())
    keep = candidates > value
    keep[_nonzero(candidates == value)[ties:]] = True
    for (_, mask), place, new in zip(chunks, places, keep.split([len(p) for p in places]), strict=True):
        mask[place] = new.to(mask.dtype)
    return masks


_Score = Callable[[Tensor, Tensor], Tensor]  # of a value; the second tensor has room for the result


def _magnitude(part: Tensor, room: Tensor) -> Tensor:
    return torch.abs(part, out=room[: len(part)])


def _permuted(values: Tensor) -> Tensor:
    """Return a view with the dimensions in the order in which they lie in memory, such as that of `channels_last`."""
    strides = values.stride()
    return values.permute(sorted(range(values.dim()), key=lambda d: -strides[d]))


def _chunks(values: Tensor) -> tuple[Tensor, ...]:
    """Return flat views, on CPU small enough to stay in its cache."""
    flat = _permuted(values).view(-1)
    return flat.split(_CHUNK if values.device.type == "cpu" else max(1, len(flat)))


def _nonzero(flags: Tensor) -> Tensor:
    """Return where a vector is not zero; NumPy takes a fifth of torch's time for it."""
    if flags.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(flags.numpy() != 0))
    return flags.nonzero()[:, 0]


def _sample(values: Sequence[Tensor], total: int, size: int, score: _Score) -> Tensor:
    """Return the scores of about `size` of the values, at equal distances."""
    stride = max(1, total // size)
    while math.gcd(stride, 2 * 3 * 5 * 7) > 1:  # or else some places of a filter would be left out
        stride += 1
    sample = torch.cat([_permuted(v).view(-1)[::stride] for v in values])
    return score(sample, torch.empty_like(sample))


def _bracket(sample: Tensor, part: float) -> tuple[Tensor, Tensor]:
    """Return two values between which most probably the quantile lies that a `part` of all values does not exceed."""
    ordered = sample.sort().values
    place = part * len(ordered)
    margin = 5 * math.sqrt(max(1.0, place * (1 - part))) + 2  # standard errors of the sample's quantile
    low, high = math.floor(place - margin), math.ceil(place + margin)
    return (
        ordered[low] if low > 0 else torch.full_like(ordered[0], -math.inf),
        ordered[high] if high < len(ordered) - 1 else torch.full_like(ordered[0], math.inf),
    )


def shares(sizes: Sequence[Sequence[int]], sparsity: float, distribution: Distribution) -> list[int]:
    r"""Divide the weights to prune among layers, for a distribution that looks at shapes alone.

    "layer" prunes the same part of each. "erk" leaves layer `l` with a density that is proportional to the sum of its
    dimensions over their product (the Erdős-Rényi kernel),

    $$ 1 - s_l = \epsilon \, \frac{\sum_i n_{l,i}}{\prod_i n_{l,i}} \quad \text{(at most 1)} $$

    with the `epsilon` that prunes `round(s N)` in all.

    Example:
        >>> shares([(4, 4), (16, 16)], 0.75, "layer")
        [12, 192]
        >>> shares([(4, 4), (16, 16)], 0.75, "erk")
        [2, 202]

    Args:
        sizes: shapes of the layers' weights.
        sparsity: of all of them together.
        distribution: "layer" or "erk".

    Returns:
        Weights to prune in each layer; they add up to `round(s N)`.

    Reference: Evci, Gale, Menick, Castro, Elsen: Rigging the lottery. ICML 2020 (after Mocanu et al. 2018).
    """
    counts = [math.prod(shape) for shape in sizes]
    total = pruned_count(sparsity, sum(counts))
    if distribution == "layer":
        return allot([total * n / sum(counts) for n in counts], counts, total)
    full: set[int] = set()  # layers that stay dense
    while True:
        alive = sum(counts) - total - sum(counts[k] for k in full)
        weight = sum(sum(shape) for k, shape in enumerate(sizes) if k not in full)
        epsilon = alive / weight if weight else 0.0
        over = {k for k, shape in enumerate(sizes) if k not in full and epsilon * sum(shape) > counts[k]}
        if not over:
            break
        full |= over
    wanted = [0.0 if k in full else counts[k] - epsilon * sum(shape) for k, shape in enumerate(sizes)]
    return allot(wanted, counts, total)


def allot(wanted: Sequence[float], most: Sequence[int], total: int) -> list[int]:
    """Round to whole numbers that add up to `total`: those with the largest fractions are rounded up.

    Example:
        >>> allot([1.6, 1.8, 0.6], most=[9, 9, 9], total=4)
        [2, 2, 0]

    Args:
        wanted: numbers that add up to about `total`.
        most: what each may be at most; they add up to `total` or more.
        total: of the result.
    """
    result = [min(n, math.floor(w + 1e-9)) for w, n in zip(wanted, most, strict=True)]
    order = sorted(range(len(wanted)), key=lambda k: (result[k] - wanted[k], k))
    while sum(result) < total:
        for k in order:
            if sum(result) < total and result[k] < most[k]:
                result[k] += 1
    return result


def filter_norms(weight: Tensor) -> Tensor:
    """Return the Euclidean norm of every filter (output channel, or row of a matrix), `[channels]`.

    Example:
        >>> filter_norms(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([5., 1.])
    """
    return weight.reshape(len(weight), -1).norm(dim=1)


def check_filters(distribution: Distribution, filters: bool) -> None:
    """Raise a `ValueError` for a distribution that whole filters can't have."""
    if filters and distribution == "erk":
        raise ValueError(
            "`distribution='erk'` divides single weights by the shapes of kernels, and says nothing of whole filters: use "
            "'global' or 'layer'."
        )


def largest(
    scores: Sequence[Tensor], sparsity: float, distribution: Distribution = "global", filters: bool = False, exact: bool = True
) -> list[Tensor]:
    """Return masks that keep the weights with the largest scores.

    Example:
        >>> largest([torch.tensor([[1.0, -4.0]]), torch.tensor([[2.0, 3.0]])], sparsity=0.5)
        [tensor([[0., 1.]]), tensor([[0., 1.]])]
        >>> largest([torch.tensor([[1.0, -4.0]]), torch.tensor([[2.0, 3.0]])], sparsity=0.5, distribution="layer")
        [tensor([[0., 1.]]), tensor([[0., 1.]])]

    Args:
        scores: of the layers' weights, such as the weights themselves; their magnitudes count, or their filters' norms.
        sparsity: part of all weights (or filters) that goes.
        distribution: "global" compares across layers; "layer" takes the same part of each, "erk" see `shares`.
        filters: whether to take whole filters.
        exact: whether the number is exactly `round(s N)`. Else a global threshold is read off two million of the scores, which
            spares the selection among those near it: for networks so large that updates of their masks count. The sparsity
            is off by 0.02 points or so.

    Returns:
        Ones and zeros in the shapes and types of the scores.

    Raises:
        ValueError: for a distribution that whole filters can't have.
    """
    check_filters(distribution, filters)
    values = [filter_norms(w) for w in scores] if filters else list(scores)
    if distribution == "global":
        masks = _smallest(values, pruned_count(sparsity, sum(v.numel() for v in values)), _magnitude, exact)
    else:
        counts = shares([v.shape for v in values], sparsity, distribution)
        masks = [_smallest([v], k, _magnitude)[0] for v, k in zip(values, counts, strict=True)]
    if not filters:
        return masks
    return [m.view(-1, *[1] * (w.dim() - 1)).expand_as(w).contiguous() for m, w in zip(masks, scores, strict=True)]
