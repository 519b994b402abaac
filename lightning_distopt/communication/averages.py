"""Averages of what replicas have beside the block, and of replicas that are finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distopt.communication.communicator import Communicator
from lightning_distopt.communication.tensors import averages, combine_tensors

Combine = Callable[[Tensor], None]
"""Replaces the rows `[m, d]` of a block by averages over replicas, in place: a mean over groups, or a gossip step."""


class AveragesMixin:
    """What replicas make of each other's buffers, optimizer state and parameters, for `Replicas`."""

    columns: tuple[Tensor, ...] | None

    def columns_of(self: Any, masks: Mapping[nn.Parameter, Tensor]) -> tuple[Tensor, ...]:
        """Return the columns of blocks where masks are not zero, and those of parameters without a mask; never the padding.

        Example:
            >>> from lightning_distopt.communication import Replicas
            >>> module = nn.Linear(3, 1)
            >>> Replicas(module).columns_of({module.weight: torch.tensor([[1.0, 0.0, 1.0]])})
            (tensor([ 0,  2, 16]),)

        Args:
            masks: for each of some parameters a tensor of its shape.

        Returns:
            An index tensor for each block.
        """
        sent = [torch.zeros(block.shape[1], dtype=torch.bool, device=block.device) for block in self.parameters]
        for slot, parameter in zip(self.slots, self._parameters, strict=True):
            view = slot.view(sent[slot.block])
            if parameter in masks:
                view.copy_(masks[parameter] != 0)
            else:
                view.fill_(True)
        return tuple(block.nonzero().view(-1) for block in sent)

    @contextmanager
    def sent(self: Any) -> Iterator[tuple[Tensor, ...]]:
        """Give what a round sends: the blocks of parameters, or their `columns`, which go back to their places at the end."""
        if self.columns is None:
            yield self.parameters
            return
        places = [(block, columns) for block, columns in zip(self.parameters, self.columns, strict=True) if len(columns)]
        packed = tuple(block.index_select(1, columns) for block, columns in places)
        yield packed
        for (block, columns), values in zip(places, packed, strict=True):
            block.index_copy_(1, columns, values)

    def average_buffers(self: Any, combine: Combine) -> None:
        """Replace the floating-point buffers by what `combine` makes of them, in place; others stay as they are."""
        combine_tensors([self._float_buffers(row) for row in range(self.replicas_per_rank)], combine)

    def finite_rows(self: Any) -> list[bool]:
        """Return for each row whether all its parameters are finite (neither NaN nor infinite)."""
        # A sum is finite only if all terms are, and costs one pass; halves would overflow.
        sums = [block.sum(dim=1, dtype=torch.promote_types(block.dtype, torch.float32)) for block in self.parameters]
        return torch.stack([torch.isfinite(s) for s in sums]).all(dim=0).tolist()

    def nonfinite_parameter(self: Any, row: int) -> str:
        """Return the name of the first parameter of a row that is not finite, or ''."""
        found = zip(self.slots, self._views[row], strict=True)
        return next((slot.name for slot, view in found if not torch.isfinite(view).all()), "")

    def replace_rows(self: Any, good: Sequence[bool], count: int, communicator: Communicator) -> None:
        """Give every row that is not good the mean of all that are, and forget its optimizer state. Collective.

        Args:
            good: for each row of this rank.
            count: good rows over all ranks.
            communicator: reaches the other ranks; what is sent counts as evaluation, not as training.
        """
        bad = [row for row, is_good in enumerate(good) if not is_good]
        parameters, buffers = self._means(good, count, communicator)
        for row in bad:
            for block, mean in zip(self.parameters, parameters, strict=True):
                block[row] = mean
            for buffer, mean in zip(self._float_buffers(row), buffers, strict=True):
                buffer.copy_(mean)
            self._reset_states(row)

    def _means(
        self: Any, good: Sequence[bool], count: int, communicator: Communicator, blocks: Sequence[Tensor] = ()
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the mean of the good rows of each block, and of each of their floating-point buffers. Collective."""
        bad = [row for row, is_good in enumerate(good) if not is_good]
        blocks, rows = list(blocks or self.parameters), [self._float_buffers(row) for row in range(self.replicas_per_rank)]
        if count < communicator.num_replicas:
            blocks = [block.clone() for block in blocks]
            for block in blocks:
                block[bad] = 0
            rows = [[torch.zeros_like(b) if row in bad else b for b in rows[row]] for row in range(len(rows))]
        means = [communicator.average(block) for block in blocks], list(averages(rows, communicator)) if rows[0] else []
        if count < communicator.num_replicas:
            for mean in (*means[0], *means[1]):
                mean *= communicator.num_replicas / count
        return means
