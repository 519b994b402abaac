"""DCD-PSGD: difference compression for decentralized SGD."""

from __future__ import annotations

from typing import Literal

from lightning_distopt.algorithms.compressed import CompressedSums
from lightning_distopt.compression import Compressor, LowRank, Sign, TopK


class DCD(CompressedSums):
    r"""DCD-PSGD: replicas move by what they send, so that neighbours know them exactly.

    $$ z_i^t = \sum_j w_{ij} x_j^t + \Delta_i^t - x_i^t, \qquad x_i^{t+1} = x_i^t + C(z_i^t) $$

    The neighbours' rows are not kept one by one, but as `s_i = sum_j w_ij x_j`, which grows by `sum_j w_ij C(z_j)`.

    There is no feedback of what `C` loses: the noise must be small. The thesis found it to diverge with QSGD of 4 bits and less
    and with random 10 % of the values (table 4.1); there use `CHOCO`.

    Example:
        >>> DCD(compressor="qsgd:8")
        DCD(compressor=QSGD(bits=8, unbiased=True))

    Args:
        compressor: `C`, an object or its short form; one that can be unbiased is made so, which the theory needs.
        scope: "tensor" compresses each parameter for itself; "row" all of a replica as one vector.
        min_numel: parameters with fewer values go as they are.

    Memory: `s`, and `x^t` while gradients are computed, beside the packed messages. (As printed, a row for each neighbour.)

    Raises:
        ValueError: for a compressor or scope that there is not, a negative `min_numel`, or "row" with a compressor of matrices.

    Reference: H. Tang et al., *Communication compression for decentralized training*, 2018, arXiv:1803.06443, algorithm 1.
    """

    def __init__(
        self, compressor: Compressor | str = "qsgd:8", scope: Literal["tensor", "row"] = "tensor", min_numel: int = 0
    ) -> None:
        super().__init__(compressor, scope, min_numel)
        self.warn_without_feedback(works=(TopK, Sign, LowRank))

    def finish_gossip(self) -> None:
        """Send the compressed difference, and move by it."""
        payloads = []
        for k, (codec, x, start, s) in enumerate(zip(self.codecs, self.replicas.parameters, self._start, self._s, strict=True)):
            z = x.to(s.dtype)  # the parameters themselves, but for half precision
            z.add_(s).sub_(start, alpha=2)  # z_i = s_i + Delta_i - x_i, with Delta_i = x_i after the steps - x_i
            payloads.append(codec.encode(z, self.seeds(k)))
            codec.decode(payloads[-1], z)
            x.copy_(z.add_(start))  # x_i <- x_i + C(z_i)
        self.share(payloads)
        self.add_decoded(self._s)  # s_i <- s_i + sum_j w_ij C(z_j)
