"""Averages of tensors that live outside of blocks: buffers, optimizer state; whether tensors are finite; distances of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distopt.communication.communicator import Communicator

_PIECE = 2**18  # values whose distance is computed at once: they stay in the cache


def _flatten(rows: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> Tensor:
    return torch.stack([torch.cat([t.reshape(-1) for t in row if t.dtype == dtype]) for row in rows])


def combine_tensors(rows: Sequence[Sequence[Tensor]], combine: Callable[[Tensor], None]) -> None:
    """Replace corresponding tensors of the rows by what `combine` makes of them, one flat block for each dtype, in place."""
    for dtype in sorted({t.dtype for t in rows[0]}, key=str):
        block = _flatten(rows, dtype)
        combine(block)
        for values, row in zip(block, rows, strict=True):
            _unflatten(values, [t for t in row if t.dtype == dtype])


def averages(rows: Sequence[Sequence[Tensor]], communicator: Communicator) -> list[Tensor]:
    """Return the means of corresponding tensors over all replicas; the rows stay as they are."""
    means = [torch.empty_like(t) for t in rows[0]]
    for dtype in sorted({t.dtype for t in rows[0]}, key=str):
        _unflatten(communicator.average(_flatten(rows, dtype)), [t for t in means if t.dtype == dtype])
    return means


def _unflatten(values: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, piece in zip(tensors, values.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(piece.view(tensor.shape))


def clone_tree(tree: Any) -> Any:
    """Copy nested dictionaries and lists, and the tensors in them (a view alone, not the storage behind it)."""
    return map_tensors(tree, lambda tensor: tensor.detach().clone())


def map_tensors(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """Copy nested dictionaries and lists, with what `function` makes of the tensors in them.

    Example:
        >>> map_tensors({"a": [torch.ones(2), 3]}, lambda tensor: tensor.sum().item())
        {'a': [2.0, 3]}
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(value, function) for value in tree)
    return tree


def named_buffers(module: nn.Module) -> list[tuple[str, nn.Module, Tensor]]:
    """Return names, owners and values of a module's buffers, in the order of `Replicas.buffers`.

    Example:
        >>> [(name, type(owner).__name__) for name, owner, _ in named_buffers(nn.Sequential(nn.BatchNorm1d(2)))]
        [('0.running_mean', 'BatchNorm1d'), ('0.running_var', 'BatchNorm1d'), ('0.num_batches_tracked', 'BatchNorm1d')]
    """
    return [
        (f"{prefix}.{name}" if prefix else name, part, buffer)
        for prefix, part in module.named_modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]


def buffer_names(module: nn.Module) -> list[str]:
    """Return names of a module's buffers, in the order of `Replicas.buffers`; one that is there twice has one name."""
    first: dict[int, str] = {}
    return [first.setdefault(id(buffer), name) for name, _, buffer in named_buffers(module)]


def finite(tensors: Iterable[Tensor]) -> list[bool]:
    """Return for each tensor whether all its values are finite.

    Example:
        >>> finite([torch.ones(2), torch.tensor([0.0, float("nan")])])
        [True, False]
    """
    sums = [x.sum(dtype=torch.float32) for x in tensors]  # finite only if all terms are, in one pass; halves would overflow
    return torch.stack(sums).isfinite().tolist() if sums else []


def squared_distances(blocks: Sequence[Tensor], means: Sequence[Tensor]) -> Tensor:
    r"""Return for each replica here the squared distance to the mean, `||x_i - x_bar||^2`, or to a point of its own.

    Example:
        >>> squared_distances([torch.tensor([[0.0, 0.0], [6.0, 8.0]])], [torch.tensor([3.0, 4.0])])
        tensor([25., 25.], dtype=torch.float64)

    Args:
        blocks: each `[m, d]`.
        means: each `[d]`, or `[m, d]` with one for each replica.

    Returns:
        `[m]` in double precision.
    """
    squares = torch.zeros(len(blocks[0]), dtype=torch.float64, device=blocks[0].device)
    for block, mean in zip(blocks, means, strict=True):
        for square, row, point in zip(squares, block, mean.expand_as(block), strict=True):
            for x, y in zip(row.split(_PIECE), point.split(_PIECE), strict=True):
                square += torch.linalg.vector_norm(x - y, dtype=torch.float64).square()
    return squares
