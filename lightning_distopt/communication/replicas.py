"""The replicas of one rank: their parameters in one contiguous block, and everything else that makes them different."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_distopt.communication.averages import AveragesMixin
from lightning_distopt.communication.communicator import Communicator
from lightning_distopt.communication.layout import lay_out
from lightning_distopt.communication.optimizers import OptimizersMixin
from lightning_distopt.communication.rng import (
    derive_seed,
    get_streams,
    pack_streams,
    seed_streams,
    set_streams,
    unpack_streams,
)
from lightning_distopt.communication.tensors import named_buffers


class Replicas(AveragesMixin, OptimizersMixin):
    """`m` replicas of a module on this rank; the module is always one of them, the active one.

    The trainable parameters of all replicas are the rows of contiguous blocks `[m, d]`, one block for each dtype and
    device (nearly always one). From construction to `release` the module's parameters are views of the active replica's
    row, so a block can be communicated without packing anything. Tied parameters share one slice, frozen ones stay outside,
    strides are kept. With `m == 1` nothing is re-pointed while training.

    Parameters, gradients, buffers, optimizer state and random streams follow `activate`.

    Rounds send all parameters, or those of `columns`: an index tensor for each block, where it is not None.

    Example:
        >>> replicas = Replicas(nn.Linear(2, 1), replicas_per_rank=3)
        >>> replicas.parameters[0].shape[0]
        3
        >>> replicas.activate(2)
        >>> nn.init.constant_(replicas.module.weight, 7.0).sum().item()
        14.0
        >>> replicas.matrix()[2, :2]
        tensor([7., 7.])

    Args:
        module: its parameters are moved into the block; all replicas start as copies of it.
        replicas_per_rank: `m`.
        first_replica: number of the replica in row 0.

    Raises:
        ValueError: if there is nothing to train, or a parameter has no shape yet.
    """

    def __init__(self, module: nn.Module, replicas_per_rank: int = 1, first_replica: int = 0) -> None:
        lazy = [("parameter", *p) for p in module.named_parameters()] + [("buffer", *b) for b in module.named_buffers()]
        for kind, name, tensor in lazy:
            if nn.parameter.is_lazy(tensor):
                raise ValueError(
                    f"The {kind} `{name}` is lazy and has no shape yet: run one batch through the module before training."
                )
        trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if not trainable:
            raise ValueError(
                "The module has no trainable parameter, so there is nothing to average: "
                "set `requires_grad=True` on the parameters to train."
            )
        self.module = module
        self.replicas_per_rank = replicas_per_rank
        self.first_replica = first_replica
        self.active = 0
        self.device = trainable[0][1].device
        self.optimizers: list[Optimizer] = []
        self.gradients: tuple[Tensor, ...] = ()
        self.columns: tuple[Tensor, ...] | None = None
        self._unused: list[set[int]] = [set() for _ in range(replicas_per_rank)]  # slots without a gradient, by row
        self._parameters = [p for _, p in trainable]
        frozen = [(name, p) for name, p in module.named_parameters() if not p.requires_grad]
        self._frozen = [(name, p.dtype, tuple(p.shape)) for name, p in frozen]
        self._frozen_parameters = frozen
        self.slots, self.parameters = lay_out(trainable, replicas_per_rank)
        self.numel = tuple(sum(s.numel for s in self.slots if s.block == k) for k in range(len(self.parameters)))
        self._views = [[s.view(self.parameters[s.block][row]) for s in self.slots] for row in range(replicas_per_rank)]
        for row in self._views:
            for parameter, view in zip(self._parameters, row, strict=True):
                view.copy_(parameter.detach())
        self._point(self._views[0])

        owners = [(owner, name.rpartition(".")[2]) for name, owner, _ in named_buffers(module)]
        self._buffers = owners
        current = [self._buffer(owner, name) for owner, name in owners]
        self._buffer_rows = [[b.data if row == 0 else b.data.clone() for b in current] for row in range(replicas_per_rank)]
        self._gradient_rows: list[list[Tensor | None]] = [[None] * len(self.slots) for _ in range(replicas_per_rank)]
        self._state_rows: list[list[Any]] = [[] for _ in range(replicas_per_rank)]
        self._first_states: list[dict[Any, Any]] = []
        self._streams: list[dict[str, Any]] = []
        self._active_streams = 0
        self._held_streams: dict[int, dict[str, Any]] = {}  # of rows whose streams are isolated just now
        self._shows_average = False

    # ------------------------------------------------------------------------------------------------------- switching
    def activate(self, row: int) -> None:
        """Make the module, its gradients and buffers, the optimizers and the random streams those of `row`."""
        self.activate_streams(row)
        if row == self.active:
            return
        old, self.active = self.active, row
        self._gradient_rows[old] = [p.grad for p in self._parameters]
        self._buffer_rows[old] = [self._buffer(owner, name).data for owner, name in self._buffers]
        self._point(self._views[row])
        for parameter, gradient in zip(self._parameters, self._gradient_rows[row], strict=True):
            parameter.grad = gradient
        self._point_buffers(self._buffer_rows[row])
        for k, optimizer in enumerate(self.optimizers):
            self._state_rows[old][k] = optimizer.state
            optimizer.state = self._state_rows[row][k]

    def activate_streams(self, row: int) -> None:
        """Switch the random streams alone, as loading the replica's data needs it."""
        if row != self._active_streams and self._streams:
            self._streams[self._active_streams] = get_streams(self.device)
            set_streams(self._streams[row], self.device)
        self._active_streams = row

    def _point(self, views: Sequence[Tensor]) -> None:
        for parameter, view in zip(self._parameters, views, strict=True):
            parameter.data = view

    def _point_buffers(self, tensors: Sequence[Tensor]) -> None:
        for (owner, name), tensor in zip(self._buffers, tensors, strict=True):
            self._buffer(owner, name).data = tensor

    @staticmethod
    def _buffer(owner: nn.Module, name: str) -> Tensor:
        buffer = owner._buffers[name]  # looked up anew: a module may have assigned another tensor
        assert buffer is not None, f"the buffer {name} of {type(owner).__name__} was set to None during training"
        return buffer

    # ------------------------------------------------------------------------------------------------ what belongs to it
    def seed(self, seed: int) -> None:
        """Start the random streams of every replica, each from `seed` and the replica's number."""
        self._streams = []
        for row in reversed(range(self.replicas_per_rank)):
            seed_streams(derive_seed(seed, "replica", self.first_replica + row))
            self._streams.insert(0, get_streams(self.device))
        self._active_streams = 0
        self.activate_streams(self.active)

    def start_equal(self, communicator: Communicator) -> None:
        """Make every replica what replica 0 is: its parameters, trained or frozen, and its buffers. Collective."""
        self.activate(0)
        for block in self.parameters:
            communicator.broadcast(block)
        trained = {id(p) for p in self._parameters}
        frozen = [p.data for p in self.module.parameters() if id(p) not in trained]
        for tensor in [t for t in frozen + self.buffers(0) if t.numel()]:
            message = tensor.reshape(1, -1).repeat(self.replicas_per_rank, 1)
            communicator.broadcast(message.view(torch.uint8))  # as bytes: backends do not know all dtypes
            tensor.copy_(message[0].view(tensor.shape))
        for row in range(1, self.replicas_per_rank):
            for buffer, first in zip(self._buffer_rows[row], self.buffers(0), strict=True):
                buffer.copy_(first)

    def new_blocks(self) -> tuple[Tensor, ...]:
        """Return blocks of zeros in the layout of `parameters`: momentum, error memories and the like."""
        return tuple(torch.zeros_like(block) for block in self.parameters)

    def signature(self) -> str:
        """Return a hash of the layout; replicas can only be averaged where it agrees."""
        tensors = [(name, self._buffer(owner, name)) for owner, name in self._buffers]
        buffers = [(name, buffer.dtype, tuple(buffer.shape)) for name, buffer in tensors]
        blocks = [(block.dtype, block.shape[1]) for block in self.parameters]
        return hashlib.md5(repr((self.slots, blocks, buffers, self._frozen)).encode()).hexdigest()

    def check_frozen(self) -> None:
        """Raise a `RuntimeError` if a parameter is trained by now that is not in the block, and so is never averaged."""
        for name, parameter in self._frozen_parameters:
            if parameter.requires_grad:
                raise RuntimeError(
                    f"The parameter `{name}` was frozen when training started, so it has no replicas: train in several calls "
                    "of `trainer.fit`, or give it a learning rate of zero until then."
                )

    def matrix(self, blocks: Sequence[Tensor] = ()) -> Tensor:
        """Return a copy of all replicas' parameters, `[m, d]` without padding, in the order of `module.parameters()`.

        Args:
            blocks: where to read them, in the layout of `parameters`, if not there.
        """
        blocks = blocks or self.parameters
        views = ([s.view(blocks[s.block][row]) for s in self.slots] for row in range(self.replicas_per_rank))
        return torch.stack([torch.cat([view.reshape(-1) for view in row]) for row in views])

    # -------------------------------------------------------------------------------------------------------- gradients
    def collect_gradients(self) -> None:
        """Move the active replica's gradients into its row of `gradients`, and let `.grad` be views of that row.

        A parameter without a gradient counts as zero there, as it does in an average over replicas that used it.
        """
        if not self.gradients:
            self.gradients = self.new_blocks()
        self._unused[self.active] = {k for k, parameter in enumerate(self._parameters) if parameter.grad is None}
        for slot, parameter in zip(self.slots, self._parameters, strict=True):
            view = slot.view(self.gradients[slot.block][self.active])
            if parameter.grad is None:
                view.zero_()
            elif parameter.grad.data_ptr() != view.data_ptr():
                view.copy_(parameter.grad)
            parameter.grad = view

    def drop_all_gradients(self) -> None:
        """Let no parameter of any row have a gradient, so that optimizers do nothing."""
        for row in reversed(range(self.replicas_per_rank)):
            self.activate(row)
            self.drop_gradients()

    def unused(self, communicator: Communicator, group_size: int) -> list[set[int]]:
        """Return, for each row, the parameters that no replica of its group had a gradient of. Collective."""
        everywhere = [slots for rows in communicator.gather(self._unused) for slots in rows]
        starts = [(self.first_replica + row) // group_size * group_size for row in range(self.replicas_per_rank)]
        return [set.intersection(*everywhere[start : start + group_size]) for start in starts]

    def drop_gradients(self, slots: Iterable[int] | None = None) -> None:
        """Free the active replica's gradients, all or those of some parameters."""
        for k in range(len(self._parameters)) if slots is None else slots:
            self._parameters[k].grad = None

    def parts(self, values: Sequence[Any]) -> Iterator[tuple[int, slice, Any]]:
        """Cut blocks into parts whose slots have the same value.

        Example:
            >>> replicas = Replicas(nn.Linear(2, 1))
            >>> replicas.attach_optimizers([torch.optim.SGD(replicas.module.parameters(), lr=0.1)])
            >>> list(replicas.parts(replicas.learning_rates()))
            [(0, slice(0, 32, None), 0.1)]

        Args:
            values: one for each slot.

        Yields:
            The number of a block, columns of it, and the value of its slots there.
        """
        for k, block in enumerate(self.parameters):
            own = [(slot.offset, value) for slot, value in zip(self.slots, values, strict=True) if slot.block == k]
            stops = [*(offset for offset, _ in own[1:]), block.shape[1]]
            for value, run in itertools.groupby(zip(own, stops, strict=True), key=lambda place: place[0][1]):
                places = list(run)
                yield k, slice(places[0][0][0], places[-1][1]), value

    # ------------------------------------------------------------------------------------------------------ averaging
    @contextmanager
    def showing_average(
        self,
        communicator: Communicator,
        good: Sequence[bool] = (),
        count: int | None = None,
        blocks: Sequence[Tensor] = (),
    ) -> Iterator[None]:
        """Let the module be the average of the good replicas inside the body, by default of all; they stay untouched.

        What is averaged are the rows of `blocks`, by default of the parameters.

        Collective. Floating-point buffers are averaged too, others are those of this rank's first replica. There are no
        gradients inside, and random streams are isolated. A `state_dict` taken inside is that of the replicas.
        """
        start = self.active, self._active_streams
        self.activate(0)
        rows, means = self._means(good, count or communicator.num_replicas, communicator, blocks)
        buffers = [b.data.clone() for b in self.buffers(0)]
        for mean, buffer in zip(means, (b for b in buffers if b.is_floating_point()), strict=True):
            buffer.copy_(mean)
        self._buffer_rows[0] = self.buffers(0)
        gradients = [p.grad for p in self._parameters]
        self._shows_average = True
        try:
            self.drop_gradients()
            self._point([slot.view(rows[slot.block]) for slot in self.slots])
            self._point_buffers(buffers)
            with self.isolated_streams() if self._streams else nullcontext():
                yield
        finally:
            self._shows_average = False
            self._point(self._views[0])
            self._point_buffers(self._buffer_rows[0])
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
            self.activate(start[0])
            self.activate_streams(start[1])

    @contextmanager
    def isolated_streams(self) -> Iterator[None]:
        """Undo on exit what the body draws from the random streams; a `state_dict` inside has them as they were."""
        row, state = self._active_streams, get_streams(self.device)
        outermost = row not in self._held_streams
        self._held_streams.setdefault(row, state)
        try:
            yield
        finally:
            if outermost:
                del self._held_streams[row]
            set_streams(state, self.device)

    def adopt(self) -> None:
        """Let row 0 be what the module shows now (inside `showing_average`), so that the module keeps it."""
        for view, parameter in zip(self._views[0], self._parameters, strict=True):
            view.copy_(parameter.data)
        self._buffer_rows[0] = [self._buffer(owner, name).data for owner, name in self._buffers]

    def release(self) -> None:
        """Give the module's parameters storage of their own, with the values they show now."""
        self.activate(0)
        for parameter in self._parameters:
            parameter.data = parameter.data.clone()
            parameter.grad = None

    # ------------------------------------------------------------------------------------------------------ one of them
    def buffers(self, row: int) -> list[Tensor]:
        """Return the buffers of a row, to be read or written in place."""
        if row == self.active and not self._shows_average:
            return [self._buffer(owner, name).data for owner, name in self._buffers]
        return self._buffer_rows[row]

    # ------------------------------------------------------------------------------------------------------ checkpoint
    def state_dict(self) -> dict[str, Any]:
        """Return all that is different between replicas, as copies: rows, buffers, optimizer state, random streams."""
        buffers, optimizers, streams = [], [], []
        for row in range(self.replicas_per_rank):  # nothing is activated: the module may show the average
            buffers.append([b.detach().clone() for b in self.buffers(row)])
            optimizers.append(self.pack_optimizers(row))
            streams.append(pack_streams(self._stream(row)))
        return {
            "signature": self.signature(),
            "parameters": [block.clone() for block in self.parameters],
            "buffers": buffers,
            "optimizers": optimizers,
            "streams": streams,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict` of replicas with the same layout; random streams wait for `resume_streams`."""
        for block, saved in zip(self.parameters, state["parameters"], strict=True):
            block.copy_(saved)
        for row in range(self.replicas_per_rank):
            self.activate(row)
            for buffer, saved in zip(self.buffers(row), state["buffers"][row], strict=True):
                buffer.data.copy_(saved)
            self.load_optimizers(row, state["optimizers"][row])
        self.activate(0)

    def resume_streams(self, streams: Sequence[dict[str, Any]]) -> None:
        """Continue the random streams of a `state_dict`."""
        self._streams = [unpack_streams(state) for state in streams]
        set_streams(self._streams[self._active_streams], self.device)

    # ------------------------------------------------------------------------------------------------------- internals
    def _float_buffers(self, row: int) -> list[Tensor]:
        return [b for b in self.buffers(row) if b.is_floating_point()]

    def _stream(self, row: int) -> dict[str, Any]:
        if row in self._held_streams:
            return self._held_streams[row]
        return self._streams[row] if self._streams and row != self._active_streams else get_streams(self.device)
