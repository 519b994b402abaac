"""The template that every federated algorithm fills in."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

Vector = tuple[Tensor, ...]
"""A value for each trainable parameter: `[d]` for each block of parameters, nearly always one."""


@dataclass
class Client:
    """A client in local training.

    Example:
        >>> import torch
        >>> client = Client(number=3, samples=100, steps=4, share=0.25, model=(torch.zeros(2),))
        >>> client.step, client.state
        (0, {})

    Args:
        number: `k`.
        samples: `n_k`.
        steps: `tau_k`, optimizer steps that it makes in this round.
        share: `p_k`, its share of the round's samples, or of the round's clients where all weigh the same.
        model: its parameters `y_k`, the row that it trains in; changes in place are changes of the model.
        gradients: those of its parameters, in a row likewise, if the aggregator `transforms_gradients`.
        state: what it keeps from round to round, if the aggregator is `stateful`: tensors and numbers by name.
        full_gradient: of the mean loss over all its samples, at the model that the server has sent, if the aggregator
            `needs_full_gradient`.
        step: steps that it has made in this round.
        refused: why the server does not take what it sends, where `end_client` says so; the client drops out then.
    """

    number: int
    samples: int
    steps: int
    share: float
    model: Vector
    gradients: Vector = ()
    state: dict[str, Any] = field(default_factory=dict)
    full_gradient: Vector = ()
    step: int = 0
    refused: str = ""


class Aggregator:
    r"""What a server makes of the models that clients send, and what clients do beside their own optimizer's steps.

    A round `t`, with the hooks in the order in which they run:

    ```
    begin_round()                       on the server
    for each client k in S_t:           on the rank that trains it; it starts from `server.sent`
        begin_client(client)
        for each of its steps:
            before_gradient(client)     go where the gradient is to be taken
            forward and backward pass, gradient clipping
            transform_gradients(client) after clipping: proximal term, control variates ...
            before_update(client)       and where the optimizer is to step
            optimizer step
        end_client(client)              `client.model` is what the server gets, if it is left finite
    finish_round(average)               on the server, on every rank alike: change `server.model`
    ```

    Here

    $$ \text{average} = \sum_{k \in S_t} c_k \, y_k + \Big(1 - \sum_{k \in S_t} c_k\Big) x_{\text{sent}} $$

    with the `c_k` of `weights`, summed up over all clients and ranks without keeping their models. What else is to be summed
    up over clients goes into `sums`. Hooks of clients must not touch other ranks.

    Example:
        >>> class FedSGD(Aggregator):
        ...     '''A server that makes half of the average step.'''
        ...
        ...     def finish_round(self, average):
        ...         for x, mean in zip(self.server.model, average):
        ...             x.lerp_(mean, 0.5)
        >>> FedSGD()
        FedSGD()

    Attributes:
        needs_models: whether `finish_round` needs the clients' models one by one, in `server.received`; else they are only
            summed up.
        stateful: whether clients keep state from round to round, in `client.state`.
        transforms_gradients: whether `transform_gradients` works on `client.gradients`, so that they must be kept in a row.
        needs_full_gradient: whether clients begin a round with a pass over all their samples, for `client.full_gradient`.
        takes_prototypes: whether it works where clients train different networks of the module: it does nothing to those that
            nobody has sent.
        changes_model_at_end: whether `end_client` changes the model before it is sent.
        needs_data_of_both: whether clients need data of the server, or the server data of the clients: nothing for clients on
            other machines.
        kept: names of the vectors that the server keeps between rounds: `("v",)` for those in `self._v`, which `setup` makes.
        vectors_up, vectors_down: vectors of `d` values that a client sends to the server and gets from it in a round.
        server: the `Federation`: its `model` (x), `sent`, `received`, `buffers`, `module`, `clients` (K), `round`,
            `communicator` ...
        sums: vectors that clients add to; `finish_round` finds the sums over all clients of the round. Begin a round as zeros.
    """

    needs_models: bool = False
    stateful: bool = False
    transforms_gradients: bool = False
    needs_full_gradient: bool = False
    takes_prototypes: bool = False
    changes_model_at_end: bool = False
    needs_data_of_both: bool = False
    kept: tuple[str, ...] = ()
    vectors_up: int = 1
    vectors_down: int = 1
    server: Any
    sums: dict[str, Vector]

    def setup(self, server: Any) -> None:
        """Bind the aggregator to a server, and allocate what it keeps."""
        self.server = server
        self.sums = {}

    def check_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Raise a `ValueError` for optimizers that the aggregator can't work with; called before training starts."""

    def weights(self, shares: Sequence[float], steps: Sequence[int]) -> list[float]:
        r"""Return the `c_k`, in FedAvg the shares `p_k` themselves.

        If some of the clients drop out, those of the others may change by a common factor alone.

        Args:
            shares: `p_k` of some clients; they add up to 1.
            steps: `tau_k` of these.
        """
        return list(shares)

    def bytes_of_model(self, client: int) -> int | None:
        """Return the bytes that a client's model takes on its way up, where these are not those of its values."""
        return None

    def begin_round(self) -> None:
        """Run before the first client of a round; `server.sent` is settled."""

    def begin_client(self, client: Client) -> None:
        """Run before a client's first step; its model is what the server has sent."""

    def before_gradient(self, client: Client) -> None:
        """Run before the forward pass of a step."""

    def transform_gradients(self, client: Client) -> None:
        """Change `client.gradients`; called if `transforms_gradients`."""

    def before_update(self, client: Client) -> None:
        """Run right before the optimizer steps."""

    def end_client(self, client: Client) -> None:
        """Run after a client's last step; not for one that is dropped. It may drop one, with a reason in `client.refused`."""

    def finish_round(self, average: Vector) -> None:
        """Change `server.model`; by default it becomes the average."""
        for x, mean in zip(self.server.model, average, strict=True):
            x.copy_(mean)

    def state_dict(self) -> dict[str, Any]:
        """Return what the server keeps between rounds, as tensors and plain numbers."""
        return {name: [x.clone() for x in getattr(self, f"_{name}")] for name in self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        for name in self.kept:
            for x, saved in zip(getattr(self, f"_{name}"), state[name], strict=True):
                x.copy_(saved)

    def __repr__(self) -> str:
        options = [f"{name}={getattr(self, name)!r}" for name in inspect.signature(type(self)).parameters]
        return f"{type(self).__name__}({', '.join(options)})"
