"""What a federation saves, and goes on from."""

from __future__ import annotations

from typing import Any

from lightning_distopt.communication.tensors import clone_tree
from lightning_distopt.federated.aggregator import Aggregator


def kind(aggregator: Aggregator) -> str:
    """Return the class of an aggregator, with that of the one inside it.

    Example:
        >>> from lightning_distopt.federated import FedAvgM, OneBit
        >>> kind(FedAvgM()), kind(OneBit("fedavgm"))
        ('FedAvgM', 'OneBit(FedAvgM)')
    """
    name, inside = type(aggregator).__name__, getattr(aggregator, "aggregator", None)
    return f"{name}({kind(inside)})" if isinstance(inside, Aggregator) else name


class CheckpointMixin:
    """The state of a federation, as tensors and plain numbers, for `Federation`."""

    def server_state(self: Any) -> dict[str, Any]:
        """Return what all ranks know."""
        return {
            "seed": self.seed,
            "round": self.round,
            "turn": self.turn,
            "samples": list(self.samples),
            "division": self.division,
            "model": [x.clone() for x in self.model],
            "sent": [x.clone() for x in self.sent],
            "buffers": clone_tree(self.buffers),
            "losses": dict(self.losses),
            "dropped": list(self.dropped),
            "taken": dict(self.taken),
            "last": dict(self.links.last),
            "traffic": self.communicator.traffic.state_dict(),
            "aggregator": self.aggregator.state_dict(),
            "kind": kind(self.aggregator),
        }

    def check_kind(self: Any, state: dict[str, Any]) -> None:
        """Refuse the server's state of another aggregator, unless neither of the two keeps anything.

        Raises:
            ValueError: if the aggregator is not the one that the state is of.
        """
        saved, own = state["aggregator"], self.aggregator.state_dict()
        known, here = state.get("kind"), kind(self.aggregator)  # older checkpoints do not know
        if (known == here or known is None) and set(saved) == set(own):
            return
        if saved or own or self.aggregator.stateful:
            raise ValueError(
                f"The federation was saved with {known or 'another aggregator'}, and is resumed with {here}: resume with the "
                "same aggregator; to go on from its model with this one, read that by `load_from_checkpoint`, and fit without "
                "`ckpt_path`."
            )

    def load_server_state(self: Any, state: dict[str, Any]) -> None:
        """Continue from `server_state`, on however many ranks."""
        self.seed, self.round = int(state["seed"]), int(state["round"])
        self.samples, self.division = list(state["samples"]), str(state["division"])
        for own, saved in ((self.model, state["model"]), (self.sent, state["sent"]), (self.buffers, state["buffers"])):
            for tensor, value in zip(own, saved, strict=True):
                tensor.copy_(value)
        self.losses = {int(k): float(loss) for k, loss in state["losses"].items()}
        self.dropped = [int(k) for k in state["dropped"]]
        self.taken = dict(state["taken"])
        self.links.last = dict(state["last"])
        self.communicator.traffic.load_state_dict(state["traffic"])
        self.aggregator.load_state_dict(state["aggregator"])
        self.show_model()

    def state_dict(self: Any) -> dict[str, Any]:
        """Return the server's state, what has arrived in a round under way, and the states of this rank's clients."""
        return {
            **self.server_state(),
            "average": [x.clone() for x in self._average],
            "buffer_sums": clone_tree(self._buffer_sums),
            "sums": clone_tree(self.aggregator.sums),
            "results": dict(self._results),
            "received": clone_tree(self.received),
            "states": self.states.state_dict(),
        }

    def load_state_dict(self: Any, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.load_server_state(state)
        self.turn = int(state["turn"])
        device = self.replicas.device
        self._average = tuple(x.to(device, copy=True) for x in state["average"])
        self._buffer_sums = [x.to(device, copy=True) for x in state["buffer_sums"]]
        self.aggregator.sums = {key: tuple(x.to(device, copy=True) for x in of) for key, of in state["sums"].items()}
        self._results = dict(state["results"])
        self.received = {
            int(k): (tuple(x.to(device, copy=True) for x in y), [x.to(device, copy=True) for x in buffers])
            for k, (y, buffers) in state["received"].items()
        }
        self.states.load_state_dict(state["states"])
