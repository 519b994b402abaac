"""Centralized SGD with compressed gradients and error feedback, exchanged by all-gather."""

from __future__ import annotations

from typing import Any, Literal

import torch

from lightning_distopt.algorithms.compressed import CompressedGossip, decode_add
from lightning_distopt.algorithms.gossip import Blocks
from lightning_distopt.communication import Communicator, Replicas
from lightning_distopt.compression import Compressor


class EFSign(CompressedGossip):
    r"""Average compressed gradients of all replicas at every step, and feed back what compression has lost.

    $$ p_i = g_i + \frac{\eta_{t-1}}{\eta_t} \, e_i, \qquad e_i \leftarrow p_i - C(p_i), \qquad
       g = \frac{1}{n} \sum_j C(p_j) $$

    The optimizer of every replica steps with `g`, after clipping of the `g_i`; replicas stay equal. It is the centralized
    counterpart of `CHOCO` in the thesis's datacenter experiment, where signs are exchanged by all-gather: each replica sends
    its own to `n - 1` others, so it suits few of them. There is no graph, and a round at every step.

    `e` is in units of gradients, so it is rescaled when the learning rate changes, as in the reference. A step with learning
    rate zero leaves it as it is. Unlike there, nothing is compressed a second time, and momentum comes after the exchange.

    Example:
        >>> EFSign()
        EFSign(compressor=Sign())

    Args:
        compressor: `C`, an object or its short form.
        scope: "tensor" compresses each parameter for itself; "row" all of a replica as one vector.
        min_numel: parameters with fewer values go as they are.

    Memory: gradients and `e`, beside the packed messages of all replicas.

    Raises:
        ValueError: for a compressor or scope that there is not, a negative `min_numel`, or "row" with a compressor of matrices.

    Reference: S. Zheng, Z. Huang, J. Kwok, *Communication-efficient distributed blockwise momentum SGD with error-feedback*,
    2019, arXiv:1905.10936; T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, section 4.8.
    """

    transforms_gradients = True
    needs_graph = False
    gossips_freely = False
    local_steps = False
    kept = ("e",)

    def __init__(
        self, compressor: Compressor | str = "sign", scope: Literal["tensor", "row"] = "tensor", min_numel: int = 0
    ) -> None:
        super().__init__(compressor, scope, min_numel)
        self.warn_without_contraction()
        self._e: Blocks = ()
        self._rates: list[float] = []  # the last learning rate of each parameter that was not zero

    def setup(self, replicas: Replicas, communicator: Communicator) -> None:
        """Forget the learning rates of an earlier training."""
        super().setup(replicas, communicator)
        self._rates = []

    def transform_gradients(self, step: int) -> None:
        """Compress the gradients, and replace them by the mean of all replicas' compressed ones."""
        if self.communicator.num_replicas == 1:
            return
        if not self._e:
            self._e = self.working_blocks(zero=True)
        rates = self.replicas.learning_rates()
        for slot, rate, last in zip(self.replicas.slots, rates, self._rates or rates, strict=True):
            if rate and rate != last:
                self._e[slot.block][:, slot.offset : slot.offset + slot.numel] *= last / rate
        self._rates = [rate or last for rate, last in zip(rates, self._rates or rates, strict=True)]
        still = [slot for slot, rate in zip(self.replicas.slots, rates, strict=True) if not rate]
        for k, (codec, g, e) in enumerate(zip(self.codecs, self.replicas.gradients, self._e, strict=True)):
            kept = [(s, e[:, s.offset : s.offset + s.numel].clone()) for s in still if s.block == k]
            e.add_(g)  # p_i = g_i + (eta_{t-1} / eta_t) e_i
            payload = self.communicator.gather_rows(self.residual(k, e))  # e_i <- p_i - C(p_i)
            for slot, before in kept:
                e[:, slot.offset : slot.offset + slot.numel] = before
            n = self.communicator.num_replicas
            g.zero_()
            decode_add(codec, payload, torch.full((len(g), n), 1 / n, dtype=torch.float64), g)  # g = 1/n sum_j C(p_j)
        self._gossip_step += 1

    def finish_round(self, step: int) -> int:
        """Count the step, whose gradients were averaged, as a round."""
        return self.communicator.num_replicas

    def state_dict(self) -> dict[str, Any]:
        """Return the learning rates as well."""
        return {**super().state_dict(), "rates": self._rates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with them."""
        super().load_state_dict(state)
        self._rates = [float(rate) for rate in state["rates"]]
