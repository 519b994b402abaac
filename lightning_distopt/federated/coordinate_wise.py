"""What servers share that look at each coordinate of the clients' models for itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_distopt.federated.aggregator import Aggregator, Vector


class CoordinateWise(Aggregator):
    """A server that sorts what the clients send, coordinate by coordinate.

    Parameters and floating-point buffers go the same way: running statistics that were merely averaged would let a client
    spoil the model through them. Clients weigh the same, whatever their numbers of samples.

    Every rank keeps the models of the clients that it trains in a round, and gets those of the others in pieces. The result is
    the same, bit for bit, on any number of ranks.

    Example:
        >>> class Largest(CoordinateWise):
        ...     def reduce(self, ordered):
        ...         return ordered[-1]
        >>> Largest().reduce(torch.tensor([[1.0, 0.0], [2.0, 3.0]]))
        tensor([2., 3.])
    """

    needs_models = True

    def reduce(self, ordered: Tensor) -> Tensor:
        """Return a value for each coordinate.

        Args:
            ordered: the clients' values of some coordinates, `[clients, coordinates]`, in ascending order down each column.
        """
        raise NotImplementedError

    def finish_round(self, average: Vector) -> None:
        """Let each coordinate of the model, and of the floating-point buffers, be what `reduce` makes of the clients'."""
        received = list(self.server.received.values())
        for k, x in enumerate(self.server.model):
            self._gather(x, [model[k] for model, _ in received])
        buffers = self.server.buffers
        for dtype in sorted({b.dtype for b in buffers if b.is_floating_point()}, key=str):
            own = [k for k, b in enumerate(buffers) if b.dtype == dtype]  # together: many are short
            flat = torch.cat([buffers[k].reshape(-1) for k in own])
            self._gather(flat, [torch.cat([of[k].reshape(-1) for k in own]) for _, of in received])
            for k, values in zip(own, flat.split([buffers[k].numel() for k in own]), strict=True):
                buffers[k].copy_(values.view(buffers[k].shape))

    def _gather(self, x: Tensor, rows: Sequence[Tensor]) -> None:
        for columns, values in self.server.communicator.gather_pieces(rows, x):
            x[columns] = self.reduce(values.sort(dim=0).values)
