"""What gossip algorithms with compressed messages share."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distopt.algorithms.gossip import Blocks, GossipAlgorithm
from lightning_distopt.communication import Communicator, Replicas, derive_seed
from lightning_distopt.compression import Codec, Compressor, Identity
from lightning_distopt.compression import make as make_compressor
from lightning_distopt.compression.codec import check_scope
from lightning_distopt.compression.compressor import working_type
from lightning_distopt.options import is_number


class CompressedGossip(GossipAlgorithm):
    """A gossip algorithm whose messages are compressed.

    Args:
        compressor: a `Compressor`, or its short form, such as "sign" or "top_k:0.01".
        scope: "tensor" compresses each parameter for itself, as the papers do; "row" all of a replica as one vector.
        min_numel: parameters with fewer values go as they are.
    """

    def __init__(self, compressor: Compressor | str, scope: Literal["tensor", "row"], min_numel: int) -> None:
        super().__init__()
        self.compressor: Compressor = make_compressor(compressor)
        check_scope(self.compressor, scope, min_numel)
        self.scope, self.min_numel = scope, min_numel
        self.codecs: list[Codec] = []

    def warn_without_contraction(self) -> None:
        """Warn of a compressor whose error the error feedback can't hold."""
        if self.compressor.unbiased and not isinstance(self.compressor, Identity):
            warnings.warn(
                f"{type(self).__name__} feeds back what compression loses, which {self.compressor!r} may make grow without "
                "bound: use the version with `unbiased=False`, which is scaled down.",
                stacklevel=4,
            )

    def warn_without_feedback(self, works: tuple[type[Compressor], ...] = ()) -> None:
        """Warn of a compressor that is too coarse without error feedback; `works` may be as coarse as they like."""
        if not (self.compressor.fine or isinstance(self.compressor, works)):
            warnings.warn(
                f"{type(self).__name__} has no error feedback and diverges with compressors as coarse as {self.compressor!r} "
                "(thesis, table 4.1): use CHOCO, or at least 8 bits (`compressor='qsgd:8'`).",
                stacklevel=4,
            )

    def _options(self) -> str:
        scope = "" if self.scope == "tensor" else f", scope={self.scope!r}"
        return f"compressor={self.compressor!r}{scope}{f', min_numel={self.min_numel}' * bool(self.min_numel)}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._options()})"

    def setup(self, replicas: Replicas, communicator: Communicator) -> None:
        """Make a codec for each block."""
        super().setup(replicas, communicator)
        self.codecs = codecs(replicas, self.compressor, self.scope, self.min_numel)

    def seeds(self, k: int) -> list[int]:
        """Return the seeds of the replicas here for the compression of block `k` in the next gossip step."""
        t = self.next_gossip_step
        return [derive_seed(self.seed, "compression", i, t, k) for i in self.communicator.local_replicas]

    def working_blocks(self, zero: bool = False) -> Blocks:
        """Return copies of the parameters' blocks, or zeros, in single precision at least, as sums of many rounds need it."""
        blocks = [b.to(working_type(b.dtype), copy=True) for b in self.replicas.parameters]
        return tuple(torch.zeros_like(block) if zero else block for block in blocks)

    def residual(self, k: int, block: Tensor) -> Tensor:
        """Compress block `k` and subtract from it, in place, what the payload that is returned holds."""
        payload = self.codecs[k].encode(block, self.seeds(k))
        self.codecs[k].decode_add(payload, -torch.eye(len(block), dtype=torch.float64), block)
        return payload

    def add_decoded(self, outs: Sequence[Tensor], minus_own: bool = False, factor: float = 1.0) -> None:
        """Add `factor * sum_j w_ij q_j` to blocks, with the `q_j` from the payloads under way; `minus_own` subtracts `q_i`."""
        hood, sent, received = self.arrived()
        weights = factor * (hood.shift if minus_own else hood.weights)[:, hood.order]
        for codec, out, payloads, others in zip(self.codecs, outs, sent, received, strict=True):
            rows = [*payloads, *others]
            decode_add(codec, [rows[k] for k in hood.order], weights, out)


class CompressedSums(CompressedGossip):
    r"""Compressed gossip of replicas that keep, in place of their neighbours' rows, the weighted sum of these.

    $$ s_i = \sum_j w_{ij} \, \tilde x_j $$

    with what is known of replica `j` for `x~_j`. Beside it they keep the iterate at which gradients are computed.

    Args:
        compressor: a `Compressor`, or its short form; one that can be unbiased is made so.
        scope: "tensor" or "row", see `CompressedGossip`.
        min_numel: parameters with fewer values go as they are.
    """

    static_graph = True
    gossips_freely = False
    kept = ("s", "start")  # the latter for a save between the steps of a round

    def __init__(self, compressor: Compressor | str, scope: Literal["tensor", "row"], min_numel: int) -> None:
        super().__init__(make_compressor(compressor).as_unbiased(), scope, min_numel)
        self._s: Blocks = ()
        self._start: Blocks = ()

    def begin_gossip(self) -> None:
        """Keep the iterate, and begin with sums of what all replicas are at first."""
        if not self._s:
            self._s = self.working_blocks()
            self._start = self.working_blocks()
        for start, x in zip(self._start, self.replicas.parameters, strict=True):
            start.copy_(x)


def codecs(replicas: Replicas, compressor: Compressor, scope: Literal["tensor", "row"], min_numel: int) -> list[Codec]:
    """Return a codec for each block of the replicas; it takes blocks of at least single precision."""
    pieces: list[list[Any]] = [[] for _ in replicas.parameters]
    for slot in replicas.slots:
        pieces[slot.block].append((slot.offset, slot.shape, slot.stride))
    blocks = zip(pieces, replicas.parameters, strict=True)
    return [Codec(compressor, of_block, working_type(block.dtype), scope, min_numel) for of_block, block in blocks]


def decode_add(codec: Codec, payload: Tensor | Sequence[Tensor], weights: Tensor, out: Tensor) -> None:
    """Add weighted sums of what payloads stand for to a block, of half precision too."""
    values = out.to(codec.dtype)  # the block itself, if it is of that type
    codec.decode_add(payload, weights, values)
    if values is not out:
        out.copy_(values)


def check_gamma(gamma: float) -> float:
    """Raise a `ValueError` unless `0 < gamma <= 1`."""
    if not (is_number(gamma) and 0 < gamma <= 1):
        raise ValueError(
            f"`gamma`, the consensus step size, must be above 0 and at most 1; got {gamma!r}. The stronger the compression, "
            "the smaller it has to be; 1 is right without compression."
        )
    return float(gamma)
