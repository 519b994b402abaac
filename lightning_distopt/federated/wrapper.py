"""Aggregators around another one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_distopt.federated.aggregator import Aggregator, Client, Vector

_TRAITS = [name for name, value in vars(Aggregator).items() if not name.startswith("_") and not callable(value)]
"""`needs_models`, `stateful` ...: what a federation asks of an aggregator."""


class Wrapper(Aggregator):
    """An aggregator that leaves to another one all that it does not do itself.

    Example:
        >>> class Halfway(Wrapper):
        ...     '''A server that goes half of the way that another one would.'''
        ...
        ...     def finish_round(self, average):
        ...         before = [x.clone() for x in self.server.model]
        ...         super().finish_round(average)
        ...         for x, start in zip(self.server.model, before):
        ...             x.lerp_(start, 0.5)
        >>> Halfway("fedprox"), Halfway("scaffold").stateful
        (Halfway(aggregator=FedProx(mu=0.01)), True)

    Args:
        aggregator: the other one, or its name.
    """

    def __init__(self, aggregator: Aggregator | str = "fedavg") -> None:
        from lightning_distopt.federated import make

        self.aggregator = make(aggregator)
        self._take_traits()

    def _take_traits(self) -> None:
        for name in _TRAITS:
            setattr(self, name, getattr(self.aggregator, name))

    @property
    def sums(self) -> dict[str, Vector]:  # type: ignore[override]
        """Those of the other aggregator."""
        return self.aggregator.sums

    @sums.setter
    def sums(self, sums: dict[str, Vector]) -> None:
        self.aggregator.sums = sums

    def setup(self, server: Any) -> None:
        """Bind both to a server."""
        self.server = server
        self.aggregator.setup(server)
        self._take_traits()

    def check_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Let the other one look at the optimizers."""
        self.aggregator.check_optimizers(optimizers)

    def weights(self, shares: Sequence[float], steps: Sequence[int]) -> list[float]:
        """Return the weights of the other one."""
        return self.aggregator.weights(shares, steps)

    def bytes_of_model(self, client: int) -> int | None:
        """Return what the other one knows of it."""
        return self.aggregator.bytes_of_model(client)

    def begin_round(self) -> None:
        """Begin a round."""
        self.aggregator.begin_round()

    def begin_client(self, client: Client) -> None:
        """Begin with a client."""
        self.aggregator.begin_client(client)

    def before_gradient(self, client: Client) -> None:
        """Go where the gradient is to be taken."""
        self.aggregator.before_gradient(client)

    def transform_gradients(self, client: Client) -> None:
        """Let the other one change the gradients."""
        self.aggregator.transform_gradients(client)

    def before_update(self, client: Client) -> None:
        """Go where the optimizer is to step."""
        self.aggregator.before_update(client)

    def end_client(self, client: Client) -> None:
        """End with a client."""
        self.aggregator.end_client(client)

    def finish_round(self, average: Vector) -> None:
        """Let the other one make the next model."""
        self.aggregator.finish_round(average)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the other one."""
        return self.aggregator.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the other one continue."""
        self.aggregator.load_state_dict(state)
