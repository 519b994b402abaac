"""ECD-PSGD: extrapolation compression for decentralized SGD."""

from __future__ import annotations

from typing import Any, Literal

from lightning_distopt.algorithms.compressed import CompressedSums
from lightning_distopt.compression import Compressor


class ECD(CompressedSums):
    r"""ECD-PSGD: neighbours estimate a replica from compressed extrapolations, whose noise averages out over time.

    In round `t = 1, 2, ...`

    $$ x_i^t = \sum_j w_{ij} \tilde x_j^{t-1} + \Delta_i^{t-1}, \qquad
       z_i^t = (1 - t/2) \, x_i^{t-1} + (t/2) \, x_i^t, \qquad
       \tilde x_i^t = (1 - 2/t) \, \tilde x_i^{t-1} + (2/t) \, C(z_i^t) $$

    The estimates are kept as `s_i = sum_j w_ij x~_j`. `z` grows with `t`, and so does the noise of a compressor: the thesis
    found all but QSGD of 8 bits and more to diverge (table 4.1); there use `CHOCO`.

    Example:
        >>> ECD(compressor="qsgd:16")
        ECD(compressor=QSGD(bits=16, unbiased=True))

    Args:
        compressor: `C`, an object or its short form; one that can be unbiased is made so, which the theory needs.
        scope: "tensor" compresses each parameter for itself; "row" all of a replica as one vector.
        min_numel: parameters with fewer values go as they are.

    Memory: `s`, and `x^(t-1)` while gradients are computed, beside the packed messages. (As printed, a row for each
    neighbour.)

    Raises:
        ValueError: for a compressor or scope that there is not, a negative `min_numel`, or "row" with a compressor of matrices.

    Reference: H. Tang et al., *Communication compression for decentralized training*, 2018, arXiv:1803.06443, algorithm 2.
    """

    def __init__(
        self, compressor: Compressor | str = "qsgd:16", scope: Literal["tensor", "row"] = "tensor", min_numel: int = 0
    ) -> None:
        super().__init__(compressor, scope, min_numel)
        self.warn_without_feedback()
        self._t = 0

    def begin_gossip(self) -> None:
        """Keep `x^(t-1)`, and begin with the first round where nothing is known yet."""
        if not self._s:
            self._t = 0
        super().begin_gossip()

    def finish_gossip(self) -> None:
        """Move to the estimates' average, and send the extrapolation."""
        self._t += 1
        t, payloads = self._t, []
        for k, (codec, x, start, s) in enumerate(zip(self.codecs, self.replicas.parameters, self._start, self._s, strict=True)):
            # x_i^t = s_i + Delta_i, with Delta_i = x_i after the steps - x_i^(t-1); summed up before it is rounded
            x.copy_(x.to(s.dtype).sub_(start).add_(s))
            z = start.mul_(1 - t / 2).add_(x, alpha=t / 2)
            payloads.append(codec.encode(z, self.seeds(k)))
            s.mul_((1 - 2 / t) / (2 / t))
        self.share(payloads)
        self.add_decoded(self._s)
        for s in self._s:
            s.mul_(2 / t)  # s_i <- (1 - 2/t) s_i + (2/t) sum_j w_ij C(z_j)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of the round as well."""
        return {**super().state_dict(), "t": self._t}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the round after it."""
        super().load_state_dict(state)
        self._t = int(state["t"])
