"""Sums over all ranks where links inside a block of ranks are faster than those between blocks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

PIECE = 2**22
"""Values that are summed at once; as many are kept beside them."""


class Levels:
    r"""Sums in two levels, over `b` blocks of `g` ranks each, so that little passes from block to block.

    Inside its block every rank sums one slice of `d/g` values, then adds up what its peers in the other blocks have of that
    slice, and gives the result to its block:

    $$ \underbrace{\frac{g-1}{g} d}_{\text{slices, inside}}
       + \underbrace{2 \, \frac{b-1}{b} \, \frac{d}{g}}_{\text{all-reduce, across}}
       + \underbrace{\frac{g-1}{g} d}_{\text{sums, inside}}
       = 2 \, \frac{n-1}{n} \, d, \qquad n = b g, $$

    values that a rank sends: as many as in a ring over all of them, of which those at the ends of blocks send all across.

    Args:
        inside: the process group of this rank's block.
        across: that of the ranks in the same place of all blocks.
        everybody: that of all ranks.
    """

    def __init__(self, inside: dist.ProcessGroup, across: dist.ProcessGroup, everybody: dist.ProcessGroup) -> None:
        self._inside, self._across, self._everybody = inside, across, everybody
        self._size = dist.get_world_size(inside)

    def sum(self, row: Tensor) -> None:
        """Replace a contiguous `row` `[d]` by its sum over all ranks, in place. Collective."""
        for piece in row.split(PIECE):
            numel = len(piece) // self._size * self._size
            slices, rest = piece[:numel], piece[numel:]
            if numel:
                received = torch.empty_like(slices)
                dist.all_to_all_single(received, slices, group=self._inside)
                own = received.view(self._size, -1).sum(dim=0)
                dist.all_reduce(own, group=self._across)
                dist.all_gather(list(slices.view(self._size, -1).unbind()), own, group=self._inside)
            if len(rest):
                dist.all_reduce(rest, group=self._everybody)
