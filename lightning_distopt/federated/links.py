"""How models travel between a server and its clients: as they are, or compressed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_distopt.algorithms.compressed import codecs
from lightning_distopt.communication import Replicas
from lightning_distopt.compression import Codec, Compressor, Identity
from lightning_distopt.compression import make as make_compressor
from lightning_distopt.federated.aggregator import Vector

Seed = Callable[[int], int]
"""Returns the seed of a message's part that stands for a block, by the number of the block."""


class Links:
    r"""The links between a server and its clients, which feed back what compression loses.

    Up, each client sends `Q(y_k - x_sent + e_k)` and keeps the rest as `e_k`. Down, the server sends `Q(x - x_sent)`, so all
    clients have the same `x_sent`, which follows `x`; they and the aggregator go on from there, and what has not been sent yet
    stays part of `x`:

    $$ x_{\text{sent}} \leftarrow x_{\text{sent}} + Q(x - x_{\text{sent}}), \qquad
       x \leftarrow \text{aggregate} + (x - x_{\text{sent}}) $$

    A client that was absent from rounds gets the messages of these as well, or the whole `x_sent` if that is less, as it is for
    one that has never taken part; so it is counted.

    Args:
        uplink, downlink: compressors of what clients send and get. None: it travels as it is.

    Attributes:
        last: the rounds in which clients have last got a message, if these are compressed.
    """

    def __init__(self, uplink: Compressor | str | None = None, downlink: Compressor | str | None = None) -> None:
        self.uplink = None if uplink is None else make_compressor(uplink)
        self.downlink = None if downlink is None else make_compressor(downlink)
        for link in (self.uplink, self.downlink):
            if link is not None and link.unbiased and not isinstance(link, Identity):
                warnings.warn(
                    f"What {link!r} loses is fed back, which may make it grow without bound: use the version with "
                    "`unbiased=False`, which is scaled down.",
                    stacklevel=4,
                )
        self.last: dict[int, int] = {}
        self._up: list[Codec] = []
        self._down: list[Codec] = []

    def setup(self, replicas: Replicas) -> None:
        """Make codecs for the blocks of the parameters; nobody has got a message yet."""
        self.last = {}
        self._up = [] if self.uplink is None else codecs(replicas, self.uplink, "tensor", 0)
        self._down = [] if self.downlink is None else codecs(replicas, self.downlink, "tensor", 0)

    def send_down(self, model: Vector, sent: Vector, seed: Seed) -> None:
        """Send what the model differs by from what clients know of it."""
        for k, (codec, x, known) in enumerate(zip(self._down, model, sent, strict=False)):
            # x_sent <- x_sent + Q(x - x_sent)
            codec.encode_difference(x[None], known[None], [seed(k)])

    def send_up(self, model: Vector, sent: Vector, before: Sequence[Tensor] | None, seed: Seed) -> list[Tensor]:
        """Let a client's model be what arrives of it.

        Args:
            model: `y_k`, changed in place.
            sent: what it has started from.
            before: `e_k`, what was lost the last time. None: nothing.
            seed: of the message.

        Returns:
            What is lost on the way now.
        """
        errors = []
        for k, (codec, y, known) in enumerate(zip(self._up, model, sent, strict=True)):
            # q = Q(y - x_sent + e), e <- y - x_sent + e - q, and x_sent + q arrives
            error = torch.sub(y, known)
            if before is not None:
                error += before[k].to(error.device)
            arrived = torch.zeros_like(error)
            codec.encode_difference(error[None], arrived[None], [seed(k)])
            errors.append(error.sub_(arrived))
            y.copy_(arrived.add_(known))
        return errors

    @contextmanager
    def as_sent(self, model: Vector, sent: Vector) -> Iterator[None]:
        """Let the model be what clients know of it inside the body, and add what they don't to what becomes of it there."""
        owed: list[Tensor] = []
        if self._down:
            owed = [x - known for x, known in zip(model, sent, strict=True)]
            for x, known in zip(model, sent, strict=True):
                x.copy_(known)
        yield
        for x, rest in zip(model, owed, strict=False):
            x.add_(rest)

    def bytes_of_model(self, client: int, round_: int, full: int, packed: int | None) -> tuple[int, int]:
        """Return the bytes that a client sends, and those that it gets to know the server's model.

        Args:
            client: its number.
            round_: that is under way.
            full: bytes of the parameters as they are.
            packed: those of the client's model, where the aggregator makes something else of it.
        """
        up, down = sum(codec.nbytes for codec in self._up) or packed or full, full
        if client in self.last:
            # all messages since the client's last round, or x_sent as it is
            down = min((round_ - self.last[client]) * sum(codec.nbytes for codec in self._down), full)
        return up, down

    def note(self, clients: Iterable[int], round_: int) -> None:
        """Note who knows what was sent in a round."""
        if self._down:
            self.last |= dict.fromkeys(clients, round_)
