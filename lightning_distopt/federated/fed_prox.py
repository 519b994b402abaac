"""FedProx: clients that are held near the server's model."""

from __future__ import annotations

from lightning_distopt.federated.aggregator import Aggregator, Client
from lightning_distopt.options import is_number


class FedProx(Aggregator):
    r"""FedAvg, with a proximal term in every client's loss.

    $$ \min_w F_k(w) + \frac{\mu}{2} \| w - w_0 \|^2, \qquad g \leftarrow g + \mu \, (w - w_0) $$

    with the model `w_0` that the server has sent. The norm is squared, and the term enters the gradient after clipping, so
    the user's loss and its logs stay what they are. The factor is missing where the thesis prints it (section 17.2).

    Example:
        >>> FedProx(mu=0.1)
        FedProx(mu=0.1)

    Args:
        mu: proximal factor, at least 0; 0 is FedAvg. The thesis tries 0.001, 0.01, 0.1 and 1.

    Raises:
        ValueError: for a negative `mu`.

    Reference: Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: Federated optimization in heterogeneous networks. MLSys 2020.
    """

    takes_prototypes = True

    def __init__(self, mu: float = 0.01) -> None:
        if not (is_number(mu) and 0 <= mu < float("inf")):
            raise ValueError(f"`mu`, the proximal factor, must be a number, at least 0; got {mu!r}.")
        self.mu = float(mu)
        self.transforms_gradients = self.mu > 0

    def transform_gradients(self, client: Client) -> None:
        """Add the gradient of the proximal term."""
        for g, w, w_0 in zip(client.gradients, client.model, self.server.sent, strict=True):
            # g <- g + mu (w - w_0)
            g.add_(w, alpha=self.mu).sub_(w_0, alpha=self.mu)
