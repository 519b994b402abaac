"""OneBit: clients that train a binary model."""

from __future__ import annotations

import math
from typing import Any

import torch

from lightning_distopt.communication.layout import Slot
from lightning_distopt.federated.aggregator import Aggregator, Client, Vector
from lightning_distopt.federated.wrapper import Wrapper


class OneBit(Wrapper):
    r"""Let clients train, and send, models of one bit a weight; the server works in full precision.

    $$ B(w) = \frac{\|w\|_1}{d} \operatorname{sgn}(w), \qquad w \leftarrow w - \eta \, \nabla F_k(B(w)) $$

    for each tensor `w` of `d` values with more than one dimension, with `sgn(0) = +1`; norms and biases stay what they are.
    Clients take gradients at the binary model, and let their optimizer step the full-precision weights behind it by these: the
    straight-through estimator, without a bound on the weights. They begin with the full-precision model of the server, and
    send `B(w)`: a bit a weight, a scale for each tensor, and the other parameters as they are. The full-precision weights of
    a client end with the round.

    What becomes of the binary models is the other aggregator's business: FedAvg averages them, FedDF distills them.

    Example:
        >>> OneBit("fedprox")
        OneBit(aggregator=FedProx(mu=0.01))

    Args:
        aggregator: what the server makes of the binary models.

    Raises:
        ValueError: for an aggregator whose clients send more than their models, such as Scaffold.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, table 8.4; Courbariaux,
    Bengio, David: BinaryConnect. NeurIPS 2015; for the scale, Rastegari, Ordonez, Redmon, Farhadi: XNOR-Net. ECCV 2016,
    equation 6, here for each tensor rather than for each filter.
    """

    def __init__(self, aggregator: Aggregator | str = "fedavg") -> None:
        super().__init__(aggregator)
        if self.vectors_up > 1:
            raise ValueError(
                f"The clients of {self.aggregator!r} send vectors of full precision beside their models, so that one bit a "
                "weight saves little: use another aggregator with `OneBit`, such as 'fedavg'."
            )

    def _take_traits(self) -> None:
        super()._take_traits()
        self.changes_model_at_end = True

    def setup(self, server: Any) -> None:
        """Find what is to be binary.

        Raises:
            ValueError: if there is nothing, or models are to be compressed once more.
        """
        super().setup(server)
        if server.links.uplink is not None:
            raise ValueError(
                f"The clients of `OneBit` send one bit a weight already: leave out `uplink={server.links.uplink!r}`."
            )
        replicas = server.replicas
        if all(len(slot.shape) < 2 for slot in replicas.slots):
            raise ValueError(
                "`OneBit` makes tensors of more than one dimension binary, and the module trains none: use another aggregator."
            )
        self._weights: dict[int, Vector] = {}  # of full precision, of clients whose models are binary just now

    def _slots(self, client: int) -> list[tuple[Slot, bool]]:
        """Return the parameters of a client's network, and whether they are binary."""
        slots = [self.server.replicas.slots[k] for k in self.server.group(client).slots]
        return [(slot, len(slot.shape) > 1) for slot in slots]

    def bytes_of_model(self, client: int) -> int:
        """Return a bit for each weight that is binary, and the scales and other parameters as they are."""
        total = 0
        for slot, binary in self._slots(client):
            itemsize = self.server.replicas.parameters[slot.block].element_size()
            total += math.ceil(slot.numel / 8) + itemsize if binary else slot.numel * itemsize
        return total

    def _binarize(self, client: Client) -> None:
        for slot, binary in self._slots(client.number):
            if binary:
                w = client.model[slot.block][slot.offset : slot.offset + slot.numel]
                # B(w) = |w|_1 / d sgn(w)
                scale = w.abs().mean()
                torch.where(w >= 0, scale, -scale, out=w)

    def before_gradient(self, client: Client) -> None:
        """Go to the binary model."""
        super().before_gradient(client)
        self._weights[client.number] = tuple(y.clone() for y in client.model)
        self._binarize(client)

    def _restore(self, client: Client) -> None:
        for kept, y in zip(self._weights.pop(client.number), client.model, strict=True):
            y.copy_(kept)

    def transform_gradients(self, client: Client) -> None:
        """Let the other aggregator see the weights that the gradients are going to change."""
        self._restore(client)
        super().transform_gradients(client)

    def before_update(self, client: Client) -> None:
        """Come back to the weights of full precision."""
        if not self.transforms_gradients:
            self._restore(client)
        super().before_update(client)

    def end_client(self, client: Client) -> None:
        """Send the binary model."""
        self._binarize(client)
        super().end_client(client)
