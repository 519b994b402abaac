"""Messages between replicas that are neighbours, and gossip steps made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_distopt.communication.neighbours import Edge, Neighbourhood, add_weighted

NO_NOTICE = 2**62
"""What goes along with messages while there is nothing to tell."""

PIECE = 2**22
"""Values of a row that travel while others are mixed."""


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
        notices = Handle() if hood is None else self._begin_gossip_step([], hood, notices=True)
        for (i, j), tensor in sends.items():
            self.traffic.add_messages(i - first, tensor.nbytes * (i != j))
        for edge, buffer in receives.items():
            if edge[0] // m == self.rank:
                buffer.copy_(sends[edge])
        posted = self._post(
            [(edge, tensor) for edge, tensor in sorted(sends.items()) if edge[1] // m != self.rank],
            [(edge, buffer) for edge, buffer in sorted(receives.items()) if edge[0] // m != self.rank],
        )

        def finish() -> None:
            posted.wait()
            notices.wait()

        handle = Handle(finish)
        if not async_op:
            handle.wait()
        return handle

    def _post(
        self: Any, sends: Sequence[tuple[Edge, Tensor]], receives: Sequence[tuple[Edge, Tensor]], group: Any = None
    ) -> Handle:
        """Begin to send and receive messages to and from other ranks, several of an edge in the order given."""
        m, n = self.replicas_per_rank, self.num_replicas
        peers = sorted({edge[1] // m for edge, _ in sends} | {edge[0] // m for edge, _ in receives})
        works: list[Any] = []
        if peers:
            group = group or self.process_group(n)
            for peer in peers:
                self._exchanges[peer] = self._exchanges.get(peer, 0) + 1

            # Within a pair of ranks the tag tells edges apart; the pair's count tells calls apart. Several messages of an edge
            # with one tag arrive in their order.
            def tag(edge: Edge, peer: int) -> int:
                return (self._exchanges[peer] * n**2 + edge[0] * n + edge[1]) % 2**30

            # By edges on both sides, as NCCL knows no tags and takes a pair's messages in the order of calls.
            sends, receives = (sorted(messages, key=lambda message: message[0]) for messages in (sends, receives))
            # Receives first: a gloo send may wait for its receive.
            operations = [dist.P2POp(dist.irecv, t, e[0] // m, group, tag(e, e[0] // m)) for e, t in receives]
            operations += [dist.P2POp(dist.isend, t, e[1] // m, group, tag(e, e[1] // m)) for e, t in sends]
            with self._failures("exchange", peers):
                works = dist.batch_isend_irecv(operations)

        def finish() -> None:
            with self._failures("exchange", peers), self.traffic.blocked(self.device):
                for work in works:
                    work.wait()

        return Handle(finish)

    def share(self: Any, rows: Sequence[Tensor], hood: Neighbourhood, buffers: Sequence[Sequence[Tensor]] = ()) -> Shared:
        """Begin to send a gossip step's rows to all neighbours, and to receive theirs.

        The least `notice` of a rank and of those it hears becomes its own; it travels beside the rows, eight bytes to a rank.

        Args:
            rows: blocks `[m, b]`, contiguous; they must stay as they are until `wait` returns.
            hood: who hears whom.
            buffers: for each block tensors to receive into, such as those of an earlier call; new ones where they do not fit.

        Returns:
            What arrives: `wait` gives for each block the rows of `hood.incoming`.
        """
        first, handles = self.local_replicas.start, [self._begin_gossip_step(rows, hood, notices=True)]
        received = []
        for k, block in enumerate(rows):
            old = buffers[k] if k < len(buffers) else ()
            fits = [tensor for tensor in old if tensor.shape == block[0].shape and tensor.dtype == block.dtype]
            fits = fits[: len(hood.incoming)]
            received.append([*fits, *(torch.empty_like(block[0]) for _ in range(len(hood.incoming) - len(fits)))])
        handles.append(
            self._post(
                [(edge, block[edge[0] - first]) for block in rows for edge in hood.outgoing],
                [(e, buffer) for tensors in received for e, buffer in zip(hood.incoming, tensors, strict=True)],
            )
        )

        def finish() -> None:
            for handle in handles:
                handle.wait()

        return Shared(Handle(finish), received)

    def _begin_gossip_step(self: Any, rows: Sequence[Tensor], hood: Neighbourhood, notices: bool) -> Handle:
        """Charge the messages of a gossip step, and begin to exchange notices, if it carries them."""
        m, first = self.replicas_per_rank, self.local_replicas.start
        for row, messages in enumerate(hood.messages):
            self.traffic.add_messages(row, messages * sum(block[row].nbytes for block in rows))
        if not notices:
            return Handle()
        self.started += 1
        # Notices are between ranks: their edges are those from the first replica of one to the first of another.
        own = torch.tensor([self.notice])
        heard = {rank: torch.empty_like(own) for rank in sorted({j // m for j, _ in hood.incoming})}
        posted = Handle()
        if self.distributed:
            listeners = sorted({i // m for _, i in hood.outgoing})
            receives = [((rank * m, first), notice) for rank, notice in heard.items()]
            posted = self._post([((first, rank * m), own) for rank in listeners], receives, self._control_group)

        def finish() -> None:
            posted.wait()
            self.shared += 1
            self.notice = min([self.notice, *(int(notice) for notice in heard.values())])

        return Handle(finish)

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
        first, begun_notices = self.local_replicas.start, self._begin_gossip_step(blocks, hood, notices)
        pieces = [block[:, k : k + self._piece] for block in blocks for k in range(0, block.shape[1], self._piece)]
        if not hood.incoming and not hood.outgoing:
            pieces = list(blocks)
        moved: list[Tensor | None] = []
        under_way: tuple[Handle, Tensor, list[Tensor]] | None = None
        for k in range(len(pieces) + 1):
            begun = None
            if k < len(pieces):
                received = self._kept_buffers(k % 2, pieces[k], len(hood.incoming))
                sends = [(edge, pieces[k][edge[0] - first]) for edge in hood.outgoing]
                begun = self._post(sends, list(zip(hood.incoming, received, strict=True))), pieces[k], received
            if under_way is not None:
                handle, piece, received = under_way
                handle.wait()
                moved.append(add_weighted(piece, hood, piece, received, factor, measure))
            under_way = begun
        begun_notices.wait()
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
