"""CHOCO-SGD: gossip with compressed messages, and a copy of what the neighbours know to make up for what they lack."""

from __future__ import annotations

from typing import Literal

import torch

from lightning_distopt.algorithms.compressed import CompressedGossip, check_gamma
from lightning_distopt.algorithms.gossip import Blocks
from lightning_distopt.compression import Compressor
from lightning_distopt.options import check_choice


class CHOCO(CompressedGossip):
    r"""CHOCO-SGD (algorithm 2): replicas send compressed differences to what their neighbours know of them already.

    $$ q_i^t = Q(x_i^t - \hat x_i^t), \qquad \hat x_j^{t+1} = \hat x_j^t + q_j^t, \qquad
       x_i^{t+1} = x_i^t + \Delta_i^t + \gamma \sum_j w_{ij} ( \hat x_j^{t+1} - \hat x_i^{t+1} ) $$

    What is lost by `Q` stays in `x - x_hat` and is sent later, so biased compressors are fine, and the mean over replicas is
    preserved whatever `Q` does. A replica keeps its own `x_hat` and one weighted sum, whatever its degree:

    $$ r_i = \sum_j w_{ij} ( \hat x_j - \hat x_i ), \qquad r_i \leftarrow r_i + \sum_j w_{ij} ( q_j - q_i ), \qquad
       x_i \leftarrow x_i + \gamma \, r_i $$

    The `r_i` are small, and sum to zero over replicas. (Sums of the `x_hat` themselves would be rounded at their own size,
    which moves the mean a little in every step, always the same way.)

    The visible iterate is `x^(t+1)`, after the mix that follows the step; with `Identity` and `gamma=1` it is D-PSGD's. The
    messages travel while the gradient is computed. More gossip steps in a round repeat compression and mixing without a
    gradient in between (CHOCO-Gossip).

    Example:
        >>> CHOCO()
        CHOCO(gamma=0.45, compressor=Sign())
        >>> CHOCO(compressor="top_k:0.01")
        CHOCO(gamma=0.0375, compressor=TopK(ratio=0.01, method='sampled'))

    Args:
        gamma: the consensus step size; None: the value that the thesis tuned for this compressor (table 13.1: ring of 8,
            ResNet-20). Too large a value diverges; tune it together with the compressor.
        compressor: `Q`, an object or its short form.
        scope: "tensor" compresses each parameter for itself, as the thesis does; "row" all of a replica as one vector.
        min_numel: parameters with fewer values go as they are.
        x_hat_init: `x_hat^0`: "start" is the common start point, which costs nothing to know; "zero" is the listing's form.

    Memory: `x_hat` and `r`, beside the packed messages.

    Raises:
        ValueError: if `gamma` is not above 0 and at most 1, or not known for the compressor; for a compressor or scope that
            there is not, a negative `min_numel`, or "row" with a compressor of matrices.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, algorithms 2 and 15, table
    13.1; A. Koloskova et al., 2019, arXiv:1907.09356.
    """

    static_graph = True
    overlap_is_free = True
    kept = ("x_hat", "r")

    def __init__(
        self,
        gamma: float | None = None,
        compressor: Compressor | str = "sign",
        scope: Literal["tensor", "row"] = "tensor",
        min_numel: int = 0,
        x_hat_init: Literal["start", "zero"] = "start",
    ) -> None:
        super().__init__(compressor, scope, min_numel)
        if gamma is None:
            tuned = self.compressor.tuned_gamma
            if tuned is None:
                raise ValueError(
                    f"No consensus step size is known for {self.compressor!r}: give `gamma`, such as 0.1; the stronger the "
                    "compression, the smaller."
                )
            gamma = float(f"{tuned:.6g}")
        check_choice("x_hat_init", x_hat_init, ("start", "zero"))
        self.warn_without_contraction()
        self.gamma, self.x_hat_init = check_gamma(gamma), x_hat_init
        self._x_hat: Blocks = ()
        self._r: Blocks = ()

    def __repr__(self) -> str:
        start = "" if self.x_hat_init == "start" else f", x_hat_init={self.x_hat_init!r}"
        return f"CHOCO(gamma={self.gamma}, {self._options()}{start})"

    def begin_round(self, step: int) -> None:
        """Begin to know of each other while all replicas are equal, also where the first rounds do nothing."""
        if not self._r and self.communicator.num_replicas > 1:
            self._x_hat = self.working_blocks(zero=self.x_hat_init == "zero")
            self._r = self.working_blocks(zero=True)
        super().begin_round(step)

    def begin_gossip(self) -> None:
        """Compress the difference to `x_hat`, and send it."""
        x = self.replicas.parameters
        # q_i = Q(x_i - x_hat_i), x_hat_i <- x_hat_i + q_i
        payloads = [
            codec.encode_difference(block.to(known.dtype), known, self.seeds(k))
            for k, (codec, block, known) in enumerate(zip(self.codecs, x, self._x_hat, strict=True))
        ]
        self.share(payloads)
        if not self.overlap:
            self.wait()

    def finish_gossip(self) -> None:
        """Receive what neighbours have sent, and move towards what is known of them."""
        done = 0
        while self.wants_more(done):
            if done:
                self.begin_gossip()
            self.add_decoded(self._r, minus_own=True)  # r_i <- r_i + sum_j w_ij (q_j - q_i)
            for x, r in zip(self.replicas.parameters, self._r, strict=True):
                x.add_(r, alpha=self.gamma)  # x_i <- x_i + gamma r_i
            if self.measures:
                moved = [torch.linalg.vector_norm(r, dim=1, dtype=torch.float64).square() for r in self._r]
                self.moved = torch.stack(moved).sum(dim=0)
            done += 1
