"""Communication between replicas, wherever they are: in this process, or in one that a process group reaches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_distopt.communication.exchange import NO_NOTICE, PACKED, PIECE, ExchangeMixin, Handle
from lightning_distopt.communication.levels import Levels
from lightning_distopt.communication.messages import pack, unpack
from lightning_distopt.communication.traffic import Traffic, all_reduce_bytes
from lightning_distopt.communication.watch import CommunicationError, Watch


class Communicator(ExchangeMixin):
    r"""Means, mixing and messages over `n = world_size * m` replicas, `m` of which live on this rank.

    Every method works on blocks `[m, d]` whose row `r` belongs to replica `rank * m + r`. With `world_size == 1` the same
    calls are tensor arithmetic inside the process and no process group is needed.

    The communicator has process groups of its own, so its traffic can't be mixed up with anybody else's.

    Example:
        >>> communicator = Communicator(replicas_per_rank=3)
        >>> block = torch.tensor([[0.0, 3.0], [1.0, 3.0], [2.0, 9.0]])
        >>> communicator.mean(block).wait()
        >>> block
        tensor([[1., 5.],
                [1., 5.],
                [1., 5.]])

    Args:
        replicas_per_rank: `m`, the replicas that this rank hosts.
        device: where blocks live.
        timeout: how long any operation may wait for another rank.
        backend: `torch.distributed` backend; by default that of the default group.
        watch: finds out which rank is at fault where one fails; by default nobody does.

    Attributes:
        traffic: what has been sent.
        notice: a number that spreads along the edges of `share`: every rank takes the least that it has heard of.
        started, shared: how many times rows have been shared, and have arrived; the same on all ranks.

    Raises:
        CommunicationError: from any method, when another rank does not answer within the timeout or has gone. This
            communicator is closed then, so that ranks that wait for this one learn of it.
    """

    def __init__(
        self,
        replicas_per_rank: int = 1,
        device: torch.device | str = "cpu",
        timeout: timedelta = timedelta(minutes=30),
        backend: str | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self.distributed else 0
        self.world_size = dist.get_world_size() if self.distributed else 1
        self.replicas_per_rank = replicas_per_rank
        self.num_replicas = self.world_size * replicas_per_rank
        self.device = torch.device(device)
        self.timeout = timeout
        self.traffic = Traffic(replicas_per_rank)
        self.notice = NO_NOTICE
        self.started = self.shared = 0
        self.watch = watch or Watch(rank=self.rank, timeout=timeout)
        self._backend = backend
        self._closed = False
        self._groups: dict[int, dist.ProcessGroup] = {}
        self._across: Any = None  # the group of this rank's peers in other blocks
        self._levels: Levels | None = None
        self._piece, self._packed = PIECE, PACKED
        self._buffers: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        self._exchanges: dict[int, int] = {}  # with each other rank, so far
        self._control: Any = None  # a group for small messages of the CPU, so that they never wait for a GPU's stream
        if self.distributed:
            self._control = self.process_group(self.num_replicas)
            if self.device.type != "cpu":
                self._control = dist.new_group(timeout=self.timeout, backend="gloo")

    @property
    def local_replicas(self) -> range:
        """Numbers of the replicas on this rank, in the order of a block's rows."""
        first = self.rank * self.replicas_per_rank
        return range(first, first + self.replicas_per_rank)

    def process_group(self, group_size: int) -> dist.ProcessGroup:
        """Return this rank's process group for groups of `group_size` consecutive replicas, whole ranks only.

        Collective on first use: every rank makes all groups of that size, in the same order, and warms them up.
        """
        self._check_open()
        if group_size not in self._groups:
            ranks_per_group = group_size // self.replicas_per_rank
            with self._failures("set up of process groups", range(self.world_size)):
                for first in range(0, self.world_size, ranks_per_group):
                    members = list(range(first, first + ranks_per_group))
                    group: Any = dist.new_group(members, timeout=self.timeout, backend=self._backend)
                    if self.rank in members:
                        self._groups[group_size] = group
                dist.all_reduce(torch.zeros(1, device=self.device), group=self._groups[group_size])
        return self._groups[group_size]

    def prepare(self, group_size: int) -> None:
        """Set up what means over groups of `group_size` replicas need, so that no training step waits for it. Collective.

        From then on means over all replicas go in two levels, as links inside these groups are taken to be the faster ones.
        """
        m, n = self.replicas_per_rank, self.num_replicas
        if not self.distributed or group_size <= m or group_size % m:
            return
        inside = self.process_group(group_size)
        if group_size < n and self._levels is None:
            ranks = group_size // m
            with self._failures("set up of process groups", range(self.world_size)):
                for place in range(ranks):
                    members = list(range(place, self.world_size, ranks))
                    group: Any = dist.new_group(members, timeout=self.timeout, backend=self._backend)
                    if self.rank in members:
                        self._across = group
                dist.all_reduce(torch.zeros(1, device=self.device), group=self._across)
            self._levels = Levels(inside, self._across, self.process_group(n))

    def mean(self, block: Tensor, group_size: int | None = None, async_op: bool = False, numel: int | None = None) -> Handle:
        r"""Replace every row by the mean over its group of `group_size` consecutive replicas, in place.

        $$ x_i \leftarrow \frac{1}{g} \sum_{j \in \text{group}(i)} x_j $$

        Args:
            block: contiguous `[m, d]`.
            group_size: `g`, a divisor of `n`; all `n` replicas by default.
            async_op: return at once; the result is in place after `wait`.
            numel: values to charge to the traffic, where they are not the whole row.

        Returns:
            A handle, already finished unless `async_op`.
        """
        m, n = self.replicas_per_rank, self.num_replicas
        g = n if group_size is None else group_size
        if g < 1 or n % g:
            raise ValueError(f"The group size {g} does not divide the number of replicas {n}.")
        if g == 1:
            return Handle()
        self.traffic.bytes_sent += all_reduce_bytes(numel or block.shape[1], block.element_size(), g)
        if m % g == 0:  # every group lies within a rank
            groups = block.view(m // g, g, -1)
            groups.copy_(groups.mean(dim=1, keepdim=True).expand_as(groups))
            return Handle()
        if g % m == 0:  # a group is a set of whole ranks
            total = block if m == 1 else block.sum(dim=0, keepdim=True)
            return self._all_reduce_mean(total, g, self.process_group(g), block, slice(0, m), async_op)
        # Groups straddle ranks, which only simulations with odd layouts do: reduce one sum for each group, over all ranks.
        totals = block.new_zeros(n // g, block.shape[1])
        rows = torch.tensor([i // g for i in self.local_replicas], device=block.device)
        totals.index_add_(0, rows, block)
        return self._all_reduce_mean(totals, g, self.process_group(n), block, rows, async_op)

    def _all_reduce_mean(
        self, total: Tensor, g: int, group: dist.ProcessGroup, block: Tensor, rows: Tensor | slice, async_op: bool
    ) -> Handle:
        members = dist.get_process_group_ranks(group)

        def finish() -> None:
            if work is not None:
                with self._failures("averaging", members), self.traffic.blocked(block.device):
                    work.wait()
            total.div_(g)  # SUM and divide: not every backend has AVG
            if total is not block:
                block.copy_(total[rows] if isinstance(rows, Tensor) else total.expand_as(block))

        work: Any = None
        with self._failures("averaging", members), self.traffic.blocked(block.device):
            if self._levels is not None and len(members) == self.world_size and not async_op:
                for row in total:
                    self._levels.sum(row)
            else:
                work = dist.all_reduce(total, group=group, async_op=async_op)
        handle = Handle(finish)
        if not async_op:
            handle.wait()
        return handle

    def sum(self, values: Tensor, largest: bool = False) -> None:
        """Add up a tensor over ranks, or take the largest of each value, in place. Collective."""
        if not self.distributed:
            return
        self.traffic.bytes_sent += all_reduce_bytes(values.numel(), values.element_size(), self.world_size)
        op = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
        with self._failures("summation", range(self.world_size)), self.traffic.blocked(values.device):
            dist.all_reduce(values, op=op, group=self.process_group(self.num_replicas))

    def average(self, block: Tensor) -> Tensor:
        """Return the mean of all `n` rows as a new tensor `[d]`; the block stays as it is.

        It is charged to `traffic.evaluation_bytes`: it serves evaluation and checkpoints, not training.
        """
        total = block.sum(dim=0)
        if self.distributed:
            with self._failures("averaging", range(self.world_size)):
                dist.all_reduce(total, group=self.process_group(self.num_replicas))
        self.traffic.evaluation_bytes += all_reduce_bytes(total.numel(), total.element_size(), self.num_replicas)
        return total.div_(self.num_replicas)

    def gather_rows(self, block: Tensor) -> Tensor:
        """Return the rows `[n, b]` of all replicas; every replica sends its own to all others."""
        m, n = self.replicas_per_rank, self.num_replicas
        self.traffic.bytes_sent += (n - 1) * block[0].nbytes
        if not self.distributed:
            return block
        gathered = block.new_empty(self.world_size, m, block.shape[1])
        group = self.process_group(n)
        with self._failures("gathering", range(self.world_size)), self.traffic.blocked(block.device):
            dist.all_gather(list(gathered.unbind()), block.contiguous(), group=group)
        return gathered.view(n, -1)

    def gather_pieces(self, rows: Sequence[Tensor], like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Give all rows of all ranks, some columns at a time, so that no rank ever holds more of them than a piece.

        Collective: every rank goes through all pieces.

        Args:
            rows: of this rank, `[d]` each, in any number; ranks may have different numbers of them.
            like: a tensor of their shape, type and device, for a rank that has none.

        Yields:
            The columns of a piece, and its values, `[rows of all ranks, columns]`, in the order of ranks.
        """
        counts = self.gather(len(rows))
        most, d = max(counts), like.numel()
        length = max(1, self._piece // max(1, most * self.world_size))
        for start in range(0, d, length):
            columns = slice(start, min(start + length, d))
            own = like.new_zeros(most, columns.stop - start)
            for target, row in zip(own, rows, strict=False):  # ranks that have fewer fill theirs up
                target.copy_(row[columns])
            if self.distributed:
                self.traffic.bytes_sent += (self.world_size - 1) * own.nbytes
                gathered = [torch.empty_like(own) for _ in counts]
                with self._failures("gathering", range(self.world_size)), self.traffic.blocked(own.device):
                    dist.all_gather(gathered, own, group=self.process_group(self.num_replicas))
                own = torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])
            yield columns, own

    def broadcast(self, block: Tensor, source: int = 0, async_op: bool = False) -> Handle:
        """Copy the row of replica `source` into every row of `block`, in place."""
        rank, row = divmod(source, self.replicas_per_rank)
        message = block[row].clone() if rank == self.rank else torch.empty_like(block[0])
        work: Any = None
        if self.distributed:
            group = self.process_group(self.num_replicas)
            with self._failures("broadcast", range(self.world_size)):
                work = dist.broadcast(message, rank, group=group, async_op=True)

        def finish() -> None:
            if work is not None:
                with self._failures("broadcast", range(self.world_size)), self.traffic.blocked(block.device):
                    work.wait()
            block.copy_(message.expand_as(block))

        handle = Handle(finish)
        if not async_op:
            handle.wait()
        return handle

    def gather(self, value: Any) -> list[Any]:
        """Return what each rank passed, in the order of ranks. For set-up and rare events, not for training.

        Args:
            value: numbers, strings, tensors and containers of them (see `messages`); nothing else is taken from the wire.
        """
        if not self.distributed:
            return [value]
        message = pack(value)
        sizes = torch.zeros(self.world_size, dtype=torch.int64)
        sizes[self.rank] = message.numel()
        with self._failures("gather", range(self.world_size)):
            dist.all_reduce(sizes, group=self._control_group)
            padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
            padded[: message.numel()] = message
            messages = [torch.empty_like(padded) for _ in range(self.world_size)]
            dist.all_gather(messages, padded, group=self._control_group)
        return [unpack(padded[:size]) for padded, size in zip(messages, sizes.tolist(), strict=True)]

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is true on any rank."""
        if not self.distributed:
            return list(flags)
        values = torch.tensor([float(flag) for flag in flags])
        with self._failures("agreement", range(self.world_size)), self.traffic.blocked(values.device):
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._control_group)
        return [bool(value) for value in values.tolist()]

    @property
    def _control_group(self) -> Any:
        self._check_open()
        return self._control

    def _check_open(self) -> None:
        if self._closed:
            raise CommunicationError(
                f"Rank {self.rank}: this communicator is closed, after a failure or at the end of training."
            )

    def close(self) -> None:
        """Give the process groups back."""
        groups = {id(group): group for group in (*self._groups.values(), self._across, self._control) if group is not None}
        self._groups, self._across, self._levels, self._control, self._closed = {}, None, None, None, True
        if groups and dist.is_initialized():
            # torch 2.6 joins gloo's threads with the GIL held; one that still has to free the tensor of its last operation
            # needs it, and both would wait for ever. Asleep, this thread lets it have the GIL.
            time.sleep(0.05)
            for group in groups.values():
                dist.destroy_process_group(group)

    def _failures(self, operation: str, peers: Any) -> AbstractContextManager[None]:
        return self.watch.guard(operation, peers, on_failure=self.close)
