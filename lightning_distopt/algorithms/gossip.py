"""What gossip algorithms share: a graph, gossip steps, rounds, and messages that travel while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lightning_distopt.algorithms.base import PeriodicAlgorithm
from lightning_distopt.algorithms.schedules import check_schedule
from lightning_distopt.communication import Communicator, Handle, Neighbourhood, Replicas, Shared, add_weighted
from lightning_distopt.options import check_whole
from lightning_distopt.topologies import Topology

Mode = Literal["gossip", "average", "nothing"]
Blocks = tuple[Tensor, ...]


class GossipControl(Protocol):
    """Decides what a round does; the same on every rank."""

    def mode(self, step: int) -> Mode:
        """Return what the round that starts at `step` does: gossip, average all replicas exactly, or nothing."""

    def another(self, done: int) -> bool:
        """Return whether a gossip step follows, after `done` in this round. The algorithm's `moved` is that of the last one."""


class GossipAlgorithm(PeriodicAlgorithm):
    r"""An algorithm whose replicas talk to their neighbours in a graph alone.

    A round is `gossip_steps` gossip steps after `sync_period` optimizer steps. In the formulas of these algorithms

    $$ \Delta_i = -\sum_{h=1}^{H} (\text{what the optimizer subtracts in local step } h) $$

    takes the place of the papers' `-eta g`: their case is plain SGD with `H = 1`. So any optimizer goes, and weight decay
    enters where it does in the optimizer.

    `plan` says when replicas talk, `connect` to whom.

    Example:
        >>> class LazyGossip(GossipAlgorithm):
        ...     def finish_gossip(self) -> None:
        ...         self.share(self.replicas.parameters)
        ...         self.mix(self.replicas.parameters, factor=0.5)
        >>> algorithm = LazyGossip().plan(sync_period=4)

    Attributes:
        topology: the graph.
        gossip_steps: in a round.
        control: decides what rounds do, if there is one.
        measures: whether `moved` is to be measured.
        moved: `[m]`, how far the last gossip step has moved each replica here: the squared length of `sum_j w_ij x_j - x_i`.
    """

    static_graph: bool = False
    """Whether the graph must be symmetric and the same in every step."""

    column_stochastic: bool = False
    """Whether only the columns of the matrix need sum to 1."""

    needs_graph: bool = True
    """Whether there is a graph at all."""

    overlap_is_free: bool = False
    """Whether messages may be under way during the gradient computation without changing the mathematics."""

    overlap_delays: bool = False
    """Whether they may be at the price of a delay of one round."""

    gossips_freely: bool = True
    """Whether further gossip steps can follow the first of a round."""

    local_steps: bool = True
    """Whether a round may have several optimizer steps."""

    kept: tuple[str, ...] = ()
    """Names of the blocks that an exact resume needs: `("m",)` for those in `self._m`."""

    topology: Topology

    def __init__(self) -> None:
        super().__init__()
        self.gossip_steps = 1
        self.overlap = self.overlap_is_free
        self.control: GossipControl | None = None
        self.measures = False
        self.moved: Tensor | None = None
        self._gossip_step = 0  # t, over all rounds
        self._mode: Mode = "gossip"
        self._hoods: dict[int, Neighbourhood] = {}
        self._sent: list[Tensor] = []  # what the messages under way hold
        self._received: list[list[Tensor]] = []  # what earlier ones have held
        self._pending: Shared | None = None

    def plan(
        self, gossip_steps: int = 1, sync_period: int | Callable[[int], int] = 1, overlap: bool | None = None
    ) -> GossipAlgorithm:
        """Say when replicas talk.

        Args:
            gossip_steps: in a round.
            sync_period: `H`, optimizer steps in a round; a number, or a callable of the step at which a round starts.
            overlap: whether messages travel while gradients are computed; None: where that changes nothing.

        Returns:
            This algorithm.

        Raises:
            ValueError: if one of these is nothing that the algorithm can do.
        """
        name = type(self).__name__
        check_schedule(sync_period)
        check_whole("gossip_steps", gossip_steps)
        if overlap not in (None, True, False):
            raise ValueError(f"`overlap` must be True, False or None; got {overlap!r}.")
        if gossip_steps > 1 and not self.gossips_freely:
            raise ValueError(
                f"{name} makes one gossip step for each gradient step: use `gossip_steps=1`, or DSGD, DPSGD or CHOCO, which "
                "can make several."
            )
        if not self.local_steps and sync_period != 1:
            raise ValueError(f"{name} makes a round at every step: use `sync_period=1`, or DSGD, which can make local steps.")
        if overlap and not (self.overlap_is_free or self.overlap_delays):
            raise ValueError(
                f"{name} needs its neighbours' messages at once: leave `overlap` out, or use DPSGD or CHOCO, whose messages "
                "travel while gradients are computed."
            )
        if overlap and gossip_steps > 1 and not self.overlap_is_free:
            raise ValueError(f"{name} with `overlap=True` makes one gossip step in a round: use `gossip_steps=1`, or DPSGD.")
        self.gossip_steps, self.sync_period = gossip_steps, sync_period
        self.overlap = self.overlap_is_free if overlap is None else overlap
        return self

    @property
    def default_topology(self) -> str:
        """The graph for `topology="auto"`: one message in a gossip step where the algorithm allows it."""
        return "ring" if self.static_graph else "one_peer_exponential"

    def connect(self, topology: Topology) -> GossipAlgorithm:
        """Say who talks to whom; comes before `setup`.

        Returns:
            This algorithm.

        Raises:
            ValueError: if the graph is none that the algorithm can use.
        """
        topology.require(self.static_graph, self.static_graph, not self.column_stochastic, by=type(self).__name__)
        self.topology = topology
        return self

    def setup(self, replicas: Replicas, communicator: Communicator) -> None:
        """Start at the first gossip step."""
        super().setup(replicas, communicator)
        self._gossip_step = 0
        self._hoods, self._sent, self._received, self._pending, self.moved = {}, [], [], None, None
        self.load_blocks(dict.fromkeys(self.blocks(), ()))

    # ------------------------------------------------------------------------------------------------------------ rounds
    def begin_round(self, step: int) -> None:
        """Settle what the round does, and begin to talk where messages may be under way."""
        self._mode = self.control.mode(step) if self.control is not None else "gossip"
        if self._mode == "gossip" and self.communicator.num_replicas > 1:
            self.begin_gossip()

    def finish_round(self, step: int) -> int:
        """Gossip, or do what the control has decided."""
        n = self.communicator.num_replicas
        if n == 1 or self._mode == "nothing":
            return n if n == 1 else 0
        if self._mode == "average":
            self.drop_messages()
            for block in self.replicas.parameters:
                self.communicator.mean(block)
        else:
            self.finish_gossip()
        return n

    def begin_gossip(self) -> None:
        """Start what may run during the round's gradient computations."""

    def finish_gossip(self) -> None:
        """Make the gossip steps of the round."""
        raise NotImplementedError

    def wants_more(self, done: int) -> bool:
        """Return whether a gossip step follows, after `done` in this round."""
        return done < self.gossip_steps if self.control is None else self.control.another(done)

    # ---------------------------------------------------------------------------------------------------------- messages
    @property
    def next_gossip_step(self) -> int:
        """The number `t` of the gossip step whose messages go out next."""
        return self._gossip_step

    def neighbourhood(self, t: int) -> Neighbourhood:
        """Return what the replicas here send and hear in gossip step `t`."""
        period = self.topology.period
        key = t if period is None else t % period
        if key not in self._hoods:
            if period is None:
                self._hoods.clear()
            topology = self.topology
            self._hoods[key] = Neighbourhood.of(
                self.communicator.local_replicas, lambda i: topology.weights(i, t), lambda j: topology.listeners(j, t)
            )
        return self._hoods[key]

    def share(self, rows: Sequence[Tensor]) -> None:
        """Begin to send blocks to the neighbours of the next gossip step; `rows` must stay as they are until `arrived`."""
        self._sent = list(rows)
        self._pending = self.communicator.share(self._sent, self.neighbourhood(self._gossip_step), self._received)
        self._gossip_step += 1

    def arrived(self) -> tuple[Neighbourhood, list[Tensor], list[list[Tensor]]]:
        """Wait for the messages under way: who hears whom, what was sent, and for each block the rows that came."""
        assert self._pending is not None
        received, sent = self._pending.wait(), self._sent
        self._pending, self._sent, self._received = None, [], received  # to receive into again
        return self.neighbourhood(self._gossip_step - 1), sent, received

    def gossip(self, blocks: Sequence[Tensor], factor: float = 1.0) -> None:
        """Make a gossip step with blocks, at once: `x_i += factor (sum_j w_ij x_j - x_i)`."""
        hood = self.neighbourhood(self._gossip_step)
        self._gossip_step += 1
        self.moved = self.communicator.gossip(blocks, hood, factor, self.measures)

    def wait(self) -> None:
        """Wait for what is under way, and leave it for `arrived`."""
        assert self._pending is not None
        self._pending.wait()

    def drop_messages(self) -> None:
        """Receive what is under way, and forget it."""
        if self._pending is not None:
            self.arrived()

    def finish(self) -> None:
        """Receive what is still under way."""
        self.drop_messages()

    def mix(self, blocks: Sequence[Tensor], factor: float = 1.0) -> None:
        r"""Add to blocks what neighbours make of the rows under way: `x_i += factor (sum_j w_ij y_j - y_i)`."""
        hood, sent, received = self.arrived()
        moved = [
            add_weighted(block, hood, rows, others, factor, self.measures)
            for block, rows, others in zip(blocks, sent, received, strict=True)
        ]
        self.moved = torch.stack([m for m in moved if m is not None]).sum(dim=0) if self.measures else None

    def combine(self, block: Tensor, group: int) -> None:
        """Mix values that lie beside the parameters as the last gossip step did, or average them as the round did."""
        if self._mode == "average":
            self.communicator.mean(block)
        else:
            self.communicator.mix(block, self.neighbourhood(self._gossip_step - 1))

    # -------------------------------------------------------------------------------------------------------- checkpoint
    def blocks(self) -> dict[str, Blocks]:
        """Return the blocks that an exact resume needs, by name: those that are `kept`."""
        return {name: getattr(self, f"_{name}") for name in self.kept}

    def load_blocks(self, blocks: dict[str, Blocks]) -> None:
        """Continue with the blocks of a checkpoint, or, where training starts, with none."""
        for name, of_name in blocks.items():
            setattr(self, f"_{name}", of_name)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the blocks, and what was under way, which is received first."""
        state = {**super().state_dict(), "gossip_step": self._gossip_step, "mode": self._mode, "seed": self.seed}
        state["blocks"] = {name: [block.clone() for block in blocks] for name, blocks in self.blocks().items()}
        state["sent"], state["received"] = [], []
        if self._pending is not None:
            state["received"] = [[row.clone() for row in rows] for rows in self._pending.wait()]
            state["sent"] = [block.clone() for block in self._sent]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        super().load_state_dict(state)
        self._gossip_step, self._mode, self.seed = int(state["gossip_step"]), state["mode"], int(state["seed"])
        device = self.communicator.device
        blocks = {name: tuple(block.to(device) for block in saved) for name, saved in state["blocks"].items()}
        if blocks:
            self.load_blocks(blocks)
        if state["sent"]:
            self._sent = [block.to(device) for block in state["sent"]]
            self._pending = Shared(Handle(), [[row.to(device) for row in rows] for rows in state["received"]])
