"""Messages between replicas that are neighbours, and gossip steps made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_distopt.communication.neighbours import Edge, Neighbourhood, add_weighted

NO_NOTICE = 2**62
"""What goes along with messages while there is nothing to tell."""

PIECE = 2**22
"""Values of a row that travel while others are mixed."""

PACKED = 2**20
"""Bytes up to which messages from one rank to another travel as one: to copy them costs less than another message."""

Message = tuple[Edge, Tensor]
"""What travels along an edge, or where it is received."""


class Handle:
    """Communication under way. `wait` returns once its result is in place, and raises where it failed.

    Example:
        >>> handle = Handle(lambda: print("it is here"))
        >>> handle.wait()
        it is here

    Args:
        finish: puts the result in place. None: it is there already.
    """

    def __init__(self, finish: Callable[[], None] | None = None) -> None:
        self._finish = finish

    def wait(self) -> None:
        """Block until the result is in place; calling it again does nothing, or fails as it did before."""
        if self._finish is not None:
            self._finish()
            self._finish = None


class Shared:
    """Rows of neighbours that are on their way. `wait` returns, for each block shared, a list of rows `[b]`.

    Example:
        >>> Shared(Handle(), [[torch.ones(2)]]).wait()
        [[tensor([1., 1.])]]

    Args:
        handle: on which they arrive.
        received: where.
    """

    def __init__(self, handle: Handle, received: list[list[Tensor]]) -> None:
        self._handle, self._received = handle, received

    def wait(self) -> list[list[Tensor]]:
        """Block until all rows are here, and return them; calling it again returns them again."""
        self._handle.wait()
        return self._received


class _Notices(Handle):
    """Notices of a gossip step, for the messages that are to carry them; to be waited for after these."""

    def __init__(
        self, finish: Callable[[], None] | None = None, sends: Sequence[Message] = (), receives: Sequence[Message] = ()
    ) -> None:
        super().__init__(finish)
        self.sends, self.receives = sends, receives


class ExchangeMixin:
    """What a communicator does between neighbours."""

    def exchange(
        self: Any,
        sends: Mapping[Edge, Tensor],
        receives: Mapping[Edge, Tensor],
        async_op: bool = False,
        hood: Neighbourhood | None = None,
    ) -> Handle:
        """Send tensors along edges of replicas and receive others into given buffers.

        Every rank names the messages of its own replicas, and both ends must name an edge for it to work. Messages between
        replicas of one rank are copies. Two ranks make the exchanges between them in the same order; others need not call.

        Args:
            sends: contiguous tensors by edge `(source, destination)`; the source is on this rank.
            receives: buffers by edge; the destination is on this rank.
            async_op: return at once; buffers are filled after `wait`.
            hood: who hears whom, if this is a gossip step: notices travel along then, as in `share`.
        """
        m, first = self.replicas_per_rank, self.local_replicas.start
        notices = _Notices() if hood is None else self._begin_gossip_step([], hood, notices=True)
        for (i, j), tensor in sends.items():
            self.traffic.add_messages(i - first, tensor.nbytes * (i != j))
        for edge, buffer in receives.items():
            if edge[0] // m == self.rank:
                buffer.copy_(sends[edge])
        posted = self._post(
            [*((edge, tensor) for edge, tensor in sends.items() if edge[1] // m != self.rank), *notices.sends],
            [*((edge, buffer) for edge, buffer in receives.items() if edge[0] // m != self.rank), *notices.receives],
        )

        def finish() -> None:
            posted.wait()
            notices.wait()

        handle = Handle(finish)
        if not async_op:
            handle.wait()
        return handle

    def _post(self: Any, sends: Iterable[Message], receives: Iterable[Message], group: Any = None) -> Handle:
        """Begin to send and receive messages to and from other ranks, several of an edge in the order given.

        Short ones between two ranks travel as one.
        """
        m, n = self.replicas_per_rank, self.num_replicas
        outgoing, incoming = _by_rank(sends, lambda edge: edge[1] // m), _by_rank(receives, lambda edge: edge[0] // m)
        peers = sorted(outgoing.keys() | incoming.keys())
        works: list[Any] = []
        packed: list[tuple[Tensor, list[Tensor]]] = []
        if peers:
            group = group or self.process_group(n)
            for peer in peers:
                self._exchanges[peer] = self._exchanges.get(peer, 0) + 1

            # Within a pair of ranks the tag tells edges apart; the pair's count tells calls apart. Several messages of an edge
            # with one tag arrive in their order.
            def tag(edge: Edge, peer: int) -> int:
                return (self._exchanges[peer] * n**2 + edge[0] * n + edge[1]) % 2**30

            # Receives first: a gloo send may wait for its receive.
            operations = []
            for peer, messages in incoming.items():
                if _is_short(messages, self._packed):
                    buffers = [buffer for _, buffer in messages]
                    packed.append((buffers[0].new_empty(sum(b.nbytes for b in buffers), dtype=torch.uint8), buffers))
                    messages = [(messages[0][0], packed[-1][0])]
                operations += [dist.P2POp(dist.irecv, buffer, peer, group, tag(edge, peer)) for edge, buffer in messages]
            for peer, messages in outgoing.items():
                if _is_short(messages, self._packed):
                    messages = [(messages[0][0], torch.cat([_as_bytes(tensor) for _, tensor in messages]))]
                operations += [dist.P2POp(dist.isend, tensor, peer, group, tag(edge, peer)) for edge, tensor in messages]
            with self._failures("exchange", peers):
                works = dist.batch_isend_irecv(operations)

        def finish() -> None:
            with self._failures("exchange", peers), self.traffic.blocked(self.device):
                for work in works:
                    work.wait()
            for pack, buffers in packed:
                for buffer, part in zip(buffers, pack.split([b.nbytes for b in buffers]), strict=True):
                    _as_bytes(buffer).copy_(part)

        return Handle(finish)

    def share(self: Any, rows: Sequence[Tensor], hood: Neighbourhood, buffers: Sequence[Sequence[Tensor]] = ()) -> Shared:
        """Begin to send a gossip step's rows to all neighbours, and to receive theirs.

        The least `notice` of a rank and of those it hears becomes its own; it travels with the rows, eight bytes to a rank.

        Args:
            rows: blocks `[m, b]`, contiguous; they must stay as they are until `wait` returns.
            hood: who hears whom.
            buffers: for each block tensors to receive into, such as those of an earlier call; new ones where they do not fit.

        Returns:
            What arrives: `wait` gives for each block the rows of `hood.incoming`.
        """
        first, notices = self.local_replicas.start, self._begin_gossip_step(rows, hood, notices=True)
        received = []
        for k, block in enumerate(rows):
            old = buffers[k] if k < len(buffers) else ()
            fits = [tensor for tensor in old if tensor.shape == block[0].shape and tensor.dtype == block.dtype]
            fits = fits[: len(hood.incoming)]
            received.append([*fits, *(torch.empty_like(block[0]) for _ in range(len(hood.incoming) - len(fits)))])
        sends = [(edge, block[edge[0] - first]) for block in rows for edge in hood.outgoing]
        receives = [message for tensors in received for message in zip(hood.incoming, tensors, strict=True)]
        posted = self._post([*sends, *notices.sends], [*receives, *notices.receives])

        def finish() -> None:
            posted.wait()
            notices.wait()

        return Shared(Handle(finish), received)

    def _begin_gossip_step(self: Any, rows: Sequence[Tensor], hood: Neighbourhood, notices: bool) -> _Notices:
        """Charge the messages of a gossip step. Returns the notices that go along with them, if it carries any."""
        m, first = self.replicas_per_rank, self.local_replicas.start
        for row, messages in enumerate(hood.messages):
            self.traffic.add_messages(row, messages * sum(block[row].nbytes for block in rows))
        if not notices:
            return _Notices()
        self.started += 1
        # Notices are between ranks: their edges are those from the first replica of one to the first of another.
        own = torch.tensor([self.notice])
        heard = {rank: torch.empty_like(own) for rank in sorted({j // m for j, _ in hood.incoming})}
        sends = [((first, rank * m), own) for rank in sorted({i // m for _, i in hood.outgoing})]
        receives = [((rank * m, first), notice) for rank, notice in heard.items()]
        posted = Handle()
        if self.device.type != "cpu":  # by themselves, so that nobody waits for a GPU to read them
            posted = self._post(sends, receives, self._control_group)
            sends, receives = [], []

        def finish() -> None:
            posted.wait()
            self.shared += 1
            self.notice = min([self.notice, *(int(notice) for notice in heard.values())])

        return _Notices(finish, sends, receives)

    def gossip(
        self: Any,
        blocks: Sequence[Tensor],
        hood: Neighbourhood,
        factor: float = 1.0,
        measure: bool = False,
        notices: bool = True,
    ) -> Tensor | None:
        r"""Make a gossip step: replace every row by a weighted sum of its neighbours' rows, in place.

        $$ x_i \leftarrow x_i + \alpha \sum_j w_{ij} (x_j - x_i) $$

        Long rows go in pieces: while one is mixed, the next one is on its way, and no rank holds its neighbours' whole rows.

        Args:
            blocks: contiguous, `[m, d]` each.
            hood: who hears whom.
            factor: `alpha`.
            measure: whether to return how far the rows have moved.
            notices: whether notices travel along; not where edges repeat those of the last step, on which they get no further.

        Returns:
            `[m]`, squared lengths, if `measure` (see `add_weighted`).
        """
        first, noticed = self.local_replicas.start, self._begin_gossip_step(blocks, hood, notices)
        pieces = [block[:, k : k + self._piece] for block in blocks for k in range(0, block.shape[1], self._piece)]
        if not pieces or not (hood.incoming or hood.outgoing):  # rows without values still carry notices
            pieces = list(blocks)
        moved: list[Tensor | None] = []
        under_way: tuple[Handle, Tensor, list[Tensor]] | None = None
        for k in range(len(pieces) + 1):
            begun = None
            if k < len(pieces):
                received = self._kept_buffers(k % 2, pieces[k], len(hood.incoming))
                sends = [(edge, pieces[k][edge[0] - first]) for edge in hood.outgoing]
                receives = list(zip(hood.incoming, received, strict=True))
                if k == 0:
                    sends, receives = [*sends, *noticed.sends], [*receives, *noticed.receives]
                begun = self._post(sends, receives), pieces[k], received
            if under_way is not None:
                handle, piece, received = under_way
                handle.wait()
                moved.append(add_weighted(piece, hood, piece, received, factor, measure))
            under_way = begun
        noticed.wait()
        return torch.stack([m for m in moved if m is not None]).sum(dim=0) if measure else None

    def _kept_buffers(self: Any, which: int, piece: Tensor, count: int) -> list[Tensor]:
        """Return tensors to receive pieces into, the same ones in every gossip step: new memory costs as much as the mixing."""
        kept = self._buffers.setdefault((which, piece.dtype), [])
        length = piece.shape[1]
        for k in range(count):
            if k == len(kept):
                kept.append(piece.new_empty(length))
            elif len(kept[k]) < length:
                kept[k] = piece.new_empty(length)
        return [buffer[:length] for buffer in kept[:count]]

    def mix(self: Any, block: Tensor, weights: Tensor | Neighbourhood, async_op: bool = False) -> Handle:
        r"""Replace every row by a weighted sum of its neighbours' rows, in place.

        $$ x_i \leftarrow \sum_j w_{ij} x_j $$

        Only rows with a non-zero weight travel, and each at most once to a replica.

        Args:
            block: contiguous `[m, d]`.
            weights: `[n, n]`, the same on every rank, whose row `i` holds what replica `i` makes of the others; or the part of
                it that this rank has to know.
            async_op: return at once. The rows that are sent are those of this moment; on `wait` the result replaces the
                block.
        """
        hood = weights if isinstance(weights, Neighbourhood) else Neighbourhood.of_matrix(self.local_replicas, weights)
        if not async_op:
            self.gossip([block], hood, notices=False)
            return Handle()
        rows = block.clone()
        shared = self.share([rows], hood)

        def finish() -> None:
            (received,) = shared.wait()
            block.copy_(rows)
            add_weighted(block, hood, rows, received)

        return Handle(finish)


def _by_rank(messages: Iterable[Message], rank: Callable[[Edge], int]) -> dict[int, list[Message]]:
    """Return the messages of each other rank, by edges on both sides: NCCL has no tags, and takes them in that order."""
    found: dict[int, list[Message]] = {}
    for message in sorted(messages, key=lambda message: message[0]):
        found.setdefault(rank(message[0]), []).append(message)
    return found


def _is_short(messages: Sequence[Message], limit: int) -> bool:
    """Return whether messages from one rank to another are to be packed; both find the same."""
    return len(messages) > 1 and sum(tensor.nbytes for _, tensor in messages) <= limit


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
