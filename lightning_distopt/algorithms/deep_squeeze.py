"""DeepSqueeze: decentralized SGD with compressed iterates and error feedback."""

from __future__ import annotations

from typing import Literal

from lightning_distopt.algorithms.compressed import CompressedGossip, check_gamma
from lightning_distopt.algorithms.gossip import Blocks
from lightning_distopt.compression import Compressor


class DeepSqueeze(CompressedGossip):
    r"""DeepSqueeze: replicas send their compressed iterates, to which they add what compression has lost before.

    $$ v_i = x_i^t + \Delta_i^t + e_i, \qquad e_i \leftarrow v_i - C(v_i), \qquad
       x_i^{t+1} = x_i^t + \Delta_i^t + \gamma \sum_j (w_{ij} - \delta_{ij}) \, C(v_j) $$

    The mean over replicas is preserved whatever `C` does.

    Example:
        >>> DeepSqueeze(gamma=0.01, compressor="top_k:0.1")
        DeepSqueeze(gamma=0.01, compressor=TopK(ratio=0.1, method='sampled'))

    Args:
        gamma: the consensus step size; much smaller than CHOCO's, since whole iterates are compressed, not differences. The
            thesis tuned 0.05 for top 50 %, 0.01 for signs, top 10 % and QSGD of 4 bits, 0.005 for top 1 % and QSGD of 2 bits,
            0.0005 for random 1 % (table 13.3).
        compressor: `C`, an object or its short form.
        scope: "tensor" compresses each parameter for itself; "row" all of a replica as one vector.
        min_numel: parameters with fewer values go as they are.

    Memory: `e`, beside the packed messages.

    Raises:
        ValueError: if `gamma` is not above 0 and at most 1; for a compressor or scope that there is not, a negative
            `min_numel`, or "row" with a compressor of matrices.

    Reference: H. Tang et al., *DeepSqueeze: decentralization meets error-compensated compression*, 2019, arXiv:1907.07346.
    """

    static_graph = True
    gossips_freely = False
    kept = ("e",)

    def __init__(
        self,
        gamma: float = 0.01,
        compressor: Compressor | str = "sign",
        scope: Literal["tensor", "row"] = "tensor",
        min_numel: int = 0,
    ) -> None:
        super().__init__(compressor, scope, min_numel)
        self.warn_without_contraction()
        self.gamma = check_gamma(gamma)
        self._e: Blocks = ()

    def __repr__(self) -> str:
        return f"DeepSqueeze(gamma={self.gamma}, {self._options()})"

    def finish_gossip(self) -> None:
        """Send the compressed iterates with what was lost, and move towards those of the neighbours."""
        if not self._e:
            self._e = self.working_blocks(zero=True)
        x, payloads = self.replicas.parameters, []
        for k, (block, e) in enumerate(zip(x, self._e, strict=True)):
            e.add_(block)  # v_i = x_i + Delta_i + e_i
            payloads.append(self.residual(k, e))  # e_i <- v_i - C(v_i)
        self.share(payloads)
        self.add_decoded(x, minus_own=True, factor=self.gamma)  # x_i <- x_i + gamma sum_j (w_ij - delta_ij) C(v_j)
