"""Where parameters lie in a block: contiguous, aligned, each with the strides it had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

ALIGNMENT = 64
"""Bytes to which slices and rows of a block are aligned: a cache line, and what vector units like."""


class Slot(NamedTuple):
    """Where a parameter lives: in `blocks[block]`, `numel` values of each row from `offset` on.

    Example:
        >>> Slot("weight", block=0, offset=2, numel=2, shape=(1, 2), stride=(2, 1)).view(torch.arange(8.0))
        tensor([[2., 3.]])

    Args:
        name: of the parameter.
        block: number of the block, of those with the parameter's dtype and device.
        offset: of its first value in the row.
        numel: number of its values.
        shape: of the parameter.
        stride: as `torch.Tensor.stride` has it, in values.
    """

    name: str
    block: int
    offset: int
    numel: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, row: Tensor) -> Tensor:
        """Return the parameter's view of `row`, a row `[d]` of its block."""
        return row.as_strided(self.shape, self.stride, row.storage_offset() + self.offset)


def lay_out(parameters: Sequence[tuple[str, nn.Parameter]], m: int) -> tuple[list[Slot], tuple[Tensor, ...]]:
    """Place parameters into blocks, one for each dtype and device, and allocate these."""
    kinds: list[tuple[torch.dtype, torch.device]] = []
    lengths: list[int] = []
    slots = []
    for name, p in parameters:
        kind = (p.dtype, p.device)
        if kind not in kinds:
            kinds.append(kind)
            lengths.append(0)
        k = kinds.index(kind)
        # `empty_like` keeps strides such as channels_last where they are dense, and makes others contiguous.
        stride = torch.empty_like(p, device="meta").stride()
        slots.append(Slot(name, k, lengths[k], p.numel(), tuple(p.shape), tuple(stride)))
        unit = max(1, ALIGNMENT // p.element_size())
        lengths[k] += -(-p.numel() // unit) * unit
    blocks = [torch.zeros(m, d, dtype=dtype, device=device) for (dtype, device), d in zip(kinds, lengths, strict=True)]
    return slots, tuple(blocks)
