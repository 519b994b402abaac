"""The server of a federation: who takes part in a round, what clients get and send, and what becomes of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_distopt.algorithms.base import Algorithm
from lightning_distopt.communication import Communicator, Replicas, derive_seed, isolated_streams
from lightning_distopt.communication.tensors import clone_tree, combine_tensors, finite
from lightning_distopt.compression import Compressor
from lightning_distopt.federated import cohorts
from lightning_distopt.federated.aggregator import Aggregator, Client, Vector
from lightning_distopt.federated.checkpoint import CheckpointMixin
from lightning_distopt.federated.client_states import ClientStates
from lightning_distopt.federated.distillation import evaluating
from lightning_distopt.federated.links import Links
from lightning_distopt.federated.prototypes import Group, Prototypes, assign, check_prototypes, groups_of, one_group

ERROR = "error_of_uplink"
NOT_FINITE = (
    "the loss, parameters or buffers are not finite. Lower the learning rate, clip gradients (`gradient_clip_val`), or look at "
    "its data"
)


class Federation(CheckpointMixin, Algorithm):
    r"""Rounds of `C K` clients, trained on the ranks at hand, one after the other in the rows of their blocks.

    $$ x \leftarrow \text{aggregate} \Big( x_{\text{sent}} + \sum_{k \in S_t} c_k (y_k - x_{\text{sent}}) \Big) $$

    `x_sent`, what clients start from, is `x`, unless what they get is compressed: see `Links`, which models travel by.

    With prototypes, clients train different networks of the module, each of them its own: what is averaged, and what is sent,
    is that network's alone, and a network that nobody has sent stays what it was.

    Example:
        >>> from lightning_distopt.federated import FedAvg
        >>> federation = Federation(FedAvg(), clients=2, fraction=1.0)
        >>> federation.setup(Replicas(nn.Linear(1, 1, bias=False)), Communicator())
        >>> federation.begin_round(cohorts.plan(0, [0, 1], [1, 1], ranks=1, turns=1), samples=[1, 3], steps=[1, 1])
        >>> for k in (0, 1):
        ...     client = federation.receive(k)
        ...     client.model[0][:] = 4.0 * k  # where its optimizer has led it
        ...     federation.send(client, loss=torch.tensor(0.5))
        >>> federation.finish_round()
        >>> federation.model[0][0], federation.losses
        (tensor(3.), {0: 0.5, 1: 0.5})

    Args:
        aggregator: what the server does.
        clients: `K`.
        fraction: `C`, the share of them that takes part in a round.
        weighting: whether clients weigh by their "samples", or are all the same ("uniform").
        uplink, downlink: compressors of what clients send and get.
        keep_optimizers: whether clients keep the state of their optimizers from round to round.
        buffer_policy: "average": floating-point buffers are averaged as the parameters are; "local": each client keeps its own.
        state_folder: where the states of clients are kept, rather than in memory; in each a folder of each rank.
        prototypes: which client has which of the module's `prototypes`: "even" (client `k` has prototype `k mod p`), names, or
            a dictionary or function of the client's number.

    Attributes:
        model: `x`, the server's model; what is assigned to it is copied.
        sent: `x_sent`, what clients start from.
        buffers: of the server's model.
        received: models of the clients on this rank, by number, with their buffers, if the aggregator needs them; outside of a
            client's prototype they are what was sent.
        groups: clients that train the same network: all, or those of each prototype.
        round: the round that is under way, or comes next.
        turn: the turn of it that comes next.
        samples: of all clients, `[K]`, once there was a round.
        division: stands for which samples each has; "" where that is not known here.
        losses, dropped: of the clients of the last round: mean losses of their batches, and who had a loss, parameters or
            buffers that are not finite, or was refused by the aggregator.
        taken: the rounds in which clients have last sent something that was taken.

    Raises:
        ValueError: for `prototypes` that do not fit the clients, or what else is chosen.
    """

    acts_alone = True

    validation_batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    """Gives (inputs, targets) of all validation data, on the device, the same on every rank; set by the strategy."""

    validates: bool = False
    """Whether there is validation data; set by the strategy."""

    shows_progress: bool = False
    """Whether this rank shows progress bars; set by the strategy."""

    training_inputs: Callable[[], Tensor]
    """Gives the inputs of some training samples, the same on every rank; set by the strategy."""

    def __init__(
        self,
        aggregator: Aggregator,
        clients: int,
        fraction: float,
        weighting: Literal["samples", "uniform"] = "samples",
        uplink: Compressor | str | None = None,
        downlink: Compressor | str | None = None,
        keep_optimizers: bool = False,
        buffer_policy: Literal["average", "local"] = "average",
        state_folder: str | None = None,
        prototypes: Prototypes = None,
    ) -> None:
        self.aggregator, self.clients, self.fraction, self.weighting = aggregator, clients, fraction, weighting
        self.links = Links(uplink, downlink)
        self.keep_optimizers, self.buffer_policy, self.state_folder = keep_optimizers, buffer_policy, state_folder
        self.prototypes = prototypes
        check_prototypes(prototypes, clients)
        if prototypes is not None and not aggregator.takes_prototypes:
            raise ValueError(f"{aggregator!r} mixes what clients of all prototypes send: use FedAvg, FedProx or FedDF.")
        if prototypes is not None and (uplink is not None or downlink is not None):
            raise ValueError(
                "`uplink` and `downlink` compress the whole model, of which clients of a prototype have a part: "
                "leave them out, or `prototypes`."
            )

    def __repr__(self) -> str:
        options = (self.aggregator, self.clients, self.fraction, self.weighting, self.links.uplink, self.links.downlink)
        return f"Federation{(*options, self.keep_optimizers, self.buffer_policy, self.prototypes)!r}"

    @property
    def count(self) -> int:
        """`C K`, the clients of a round."""
        return max(1, round(self.fraction * self.clients))

    @property
    def stateful(self) -> bool:
        """Whether clients keep anything from round to round."""
        keeps = self.keep_optimizers or self.buffer_policy == "local"
        return keeps or self.aggregator.stateful or self.links.uplink is not None

    @property
    def model(self) -> Vector:
        """`x`, the server's model."""
        return self._model

    @model.setter
    def model(self, model: Vector) -> None:
        for x, value in zip(self._model, model, strict=True):  # the same tensors stay: `sent` may be these
            x.copy_(value.detach())

    @property
    def module(self) -> nn.Module:
        """The module, which shows the server's model wherever no client is in training."""
        return self.replicas.module

    def setup(self, replicas: Replicas, communicator: Communicator) -> None:
        """Take the module's parameters as the server's model."""
        super().setup(replicas, communicator)
        self._model: Vector = tuple(torch.empty_like(b[0], dtype=_working_type(b)).copy_(b[0]) for b in replicas.parameters)
        self.sent: Vector = self.model if self.links.downlink is None else _copy(self.model)
        self.buffers = clone_tree(replicas.buffers(0))
        self.round = self.turn = 0
        self.samples: list[int] = []
        self.division = ""
        self.plan: cohorts.Plan | None = None
        self.losses: dict[int, float] = {}
        self.dropped: list[int] = []
        self.taken: dict[int, int] = {}
        self.received: dict[int, tuple[Vector, list[Tensor]]] = {}
        folder = None if self.state_folder is None else f"{self.state_folder}/rank-{communicator.rank:05d}"
        self.states = ClientStates(folder)
        self._results: dict[int, float | str] = {}  # mean losses of this rank's clients, or why they are dropped
        self._weights: dict[int, float] = {}
        self._average: Vector = ()
        self._buffer_sums: list[Tensor] = []
        self.groups = (one_group(replicas),) if self.prototypes is None else groups_of(replicas)
        names = [str(group.name) for group in self.groups]
        self._of = None if self.prototypes is None else assign(self.prototypes, self.clients, names)
        self._shown: str | None = None if self.prototypes is None else str(replicas.module.prototype)
        self.links.setup(replicas)
        self.aggregator.setup(self)

    def check_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Let the aggregator look at the optimizers."""
        self.aggregator.check_optimizers(optimizers)

    def group(self, client: int) -> Group:
        """Return the group of a client."""
        return self.groups[0] if self._of is None else next(group for group in self.groups if group.name == self._of[client])

    # ------------------------------------------------------------------------------------------------------------ a round
    def begin_round(self, plan: cohorts.Plan, samples: Sequence[int], steps: Sequence[int]) -> None:
        """Send the model to the clients of a round; one that was stopped inside goes on.

        Args:
            plan: who takes part.
            samples: of all clients, `[K]`.
            steps: of all clients, `[K]`.
        """
        self.plan, self.samples, self._steps = plan, list(samples), steps
        self._weights, self._client_shares = self._weigh(plan.clients)
        self._shares_of_all = self._shares(plan.clients)
        floats = [b for b, buffer in enumerate(self.buffers) if buffer.is_floating_point()]
        self._watched = {b for b, good in zip(floats, finite(self.buffers[b] for b in floats), strict=True) if good}
        if self.turn > 0:
            return
        self.losses, self.dropped, self._results, self.received = {}, [], {}, {}
        self._average = tuple(torch.zeros_like(x) for x in self.model)
        self._buffer_sums = [torch.zeros_like(b) for b in self.buffers]
        self.links.send_down(self.model, self.sent, partial(derive_seed, self.seed, "downlink", self.round))
        self.aggregator.sums = {}
        self.aggregator.begin_round()

    def _shares(self, clients: Sequence[int]) -> dict[int, float]:
        """Return `p_k`, which add up to 1."""
        sizes = [self.samples[k] if self.weighting == "samples" else 1 for k in clients]
        return {k: size / sum(sizes) for k, size in zip(clients, sizes, strict=True)}

    def _weigh(self, clients: Sequence[int]) -> tuple[dict[int, float], dict[int, float]]:
        """Return `c_k` and `p_k`, each group's by itself."""
        weights: dict[int, float] = {}
        shares: dict[int, float] = {}
        for group in self.groups:
            own = [k for k in clients if self.group(k) is group]
            if own:
                of_group = self._shares(own)
                c = self.aggregator.weights(list(of_group.values()), [self._steps[k] for k in own])
                weights, shares = weights | dict(zip(own, c, strict=True)), shares | of_group
        return weights, shares

    def receive(self, number: int, row: int = 0) -> Client:
        """Let a row be a client that has just got the server's model."""
        state = self.states.get(number) if self.stateful else {}
        for block, sent in zip(self.replicas.parameters, self.sent, strict=True):
            block[row].copy_(sent)
        for buffer, own in zip(self.replicas.buffers(row), state.get("buffers", self.buffers), strict=True):
            buffer.copy_(own)
        self.replicas.load_optimizers(row, state.get("optimizers"))
        self._activate(self.group(number).name)
        model, gradients = (
            tuple(block[row] for block in blocks) for blocks in (self.replicas.parameters, self.replicas.gradients)
        )
        samples, steps, share = self.samples[number], self._steps[number], self._client_shares[number]
        return Client(number, samples, steps, share, model, gradients, state.get("own", {}))

    def send(self, client: Client, loss: Tensor, row: int = 0) -> None:
        """Let a client send what it has learned; nothing is taken from one that has come to what is not finite.

        Args:
            client: it.
            loss: the mean over its batches.
            row: where it was trained.
        """
        group, buffers = self.group(client.number), self.replicas.buffers(row)
        parameters = [client.model[b][columns] for b, columns in group.columns]
        if not all(finite([loss, *parameters, *client.full_gradient, *self.watched(buffers, group.all_buffers)])):
            self._results[client.number] = NOT_FINITE
            return
        self.aggregator.end_client(client)
        if client.refused:
            self._results[client.number] = client.refused
            return
        state: dict[str, Any] = {"own": client.state}
        if self.links.uplink is not None:
            before = self.states.get(client.number).get(ERROR)
            seed = partial(derive_seed, self.seed, "uplink", self.round, client.number)
            state[ERROR] = self.links.send_up(client.model, self.sent, before, seed)
        if self.buffer_policy == "local":
            state["buffers"] = clone_tree(buffers)
        if self.keep_optimizers:
            state["optimizers"] = self.replicas.pack_optimizers(row)
        if self.stateful:
            self.states[client.number] = state
        self.take(client.number, client.model, buffers, loss.item())

    def watched(self, buffers: Sequence[Tensor], which: Sequence[int]) -> list[Tensor]:
        """Return which of some buffers have to be finite, as they were before the round: masks may hold infinities for good."""
        return [buffers[b] for b in which if b in self._watched]

    def take(self, number: int, model: Vector, buffers: Sequence[Tensor], loss: float) -> None:
        """Add what a client has sent to what has arrived in this round.

        Args:
            number: of the client.
            model: its parameters.
            buffers: its buffers.
            loss: the mean over its batches.
        """
        c, group = self._weights[number], self.group(number)
        for b, columns in group.columns:
            # sum of c_k (y_k - x_sent): exactly zero where no client has moved
            self._average[b][columns].add_(model[b][columns] - self.sent[b][columns], alpha=c)
        for which, share in ((group.buffers, self._client_shares[number]), (group.common, self._shares_of_all[number])):
            for total, buffer in ((self._buffer_sums[b], buffers[b]) for b in which):
                if buffer.is_floating_point():
                    total.add_(buffer, alpha=share)
                elif _counts(buffer):
                    torch.maximum(total, buffer, out=total)  # counts go on from the largest
        if self.aggregator.needs_models:
            self.received[number] = _copy(model), clone_tree(list(buffers))
        self._results[number] = loss

    @contextmanager
    def showing(self, model: Vector, buffers: Sequence[Tensor]) -> Iterator[nn.Module]:
        """Let the module be a model inside the body, for its forward pass alone; everything is put back after.

        Args:
            model: its parameters.
            buffers: its buffers.
        """
        row = self.replicas.active
        places = [*(block[row] for block in self.replicas.parameters), *self.replicas.buffers(row)]
        before = clone_tree(places)
        try:
            for place, value in zip(places, [*model, *buffers], strict=True):
                place.copy_(value)
            with isolated_streams(self.replicas.device), evaluating(self.module):
                yield self.module
        finally:
            for place, value in zip(places, before, strict=True):
                place.copy_(value)

    def show_model(self, row: int = 0) -> None:
        """Let a row be the server's model, so that the module is that whenever no client is in training."""
        for block, x in zip(self.replicas.parameters, self.model, strict=True):
            block[row].copy_(x)
        for buffer, own in zip(self.replicas.buffers(row), self.buffers, strict=True):
            buffer.copy_(own)
        self._activate(self._shown)

    def _activate(self, prototype: str | None) -> None:
        if prototype is not None:
            self.module.prototype = prototype  # type: ignore[assignment]

    def finish_round(self) -> None:
        """Make the next model of what the clients have sent. Collective."""
        assert self.plan is not None
        results: dict[int, float | str] = {}
        for of_rank in self.communicator.gather(self._results):
            results |= of_rank
        reasons = {k: result for k, result in sorted(results.items()) if isinstance(result, str)}
        self.dropped = list(reasons)
        self.losses = {k: result for k, result in sorted(results.items()) if not isinstance(result, str)}
        for reason in dict.fromkeys(reasons.values()):
            names = ", ".join(str(k) for k in reasons if reasons[k] == reason)
            warnings.warn(f"Round {self.round} goes on without client {names}: {reason}.", stacklevel=2)
        for total in (*self._average, *(v for vector in self.aggregator.sums.values() for v in vector)):
            self.communicator.sum(total)
        combine_tensors([[b for b in self._buffer_sums if b.is_floating_point()]], self.communicator.sum)
        combine_tensors([[b for b in self._buffer_sums if _counts(b)]], partial(self.communicator.sum, largest=True))
        good = list(self.losses)
        if good:
            self._weigh_anew(good)
            for buffer, total in zip(self.buffers, self._buffer_sums, strict=True):
                if buffer.is_floating_point() or _counts(buffer):
                    buffer.copy_(total)
            with self.links.as_sent(self.model, self.sent):
                self.aggregator.finish_round(self._average)
        self._count_bytes()
        self.communicator.traffic.rounds += 1
        self._average, self._buffer_sums, self.received = (), [], {}
        self.aggregator.sums = {}
        self.taken |= dict.fromkeys(good, self.round)
        self.round, self.turn = self.round + 1, 0

    def _weigh_anew(self, good: Sequence[int]) -> None:
        """Let the sums be weighted averages over the clients that are left."""
        weights, shares = self._weigh(good)
        for group in self.groups:
            own = [k for k in good if self.group(k) is group]
            if not own:  # it keeps what it had
                for b in group.buffers:
                    self._buffer_sums[b].copy_(self.buffers[b])
            elif self.dropped:
                k = own[0]
                for b, columns in group.columns:
                    self._average[b][columns] *= weights[k] / self._weights[k]
                self._scale_buffers(group.buffers, shares[k] / self._client_shares[k])
        if self.dropped:
            self._scale_buffers(self.groups[0].common, self._shares(good)[good[0]] / self._shares_of_all[good[0]])
        for total, sent in zip(self._average, self.sent, strict=True):
            total.add_(sent)  # x_sent + sum of c_k (y_k - x_sent)

    def _scale_buffers(self, which: Sequence[int], factor: float) -> None:
        for total in (self._buffer_sums[b] for b in which):
            if total.is_floating_point():
                total *= factor

    def _count_bytes(self) -> None:
        assert self.plan is not None
        traffic, aggregator, clients = self.communicator.traffic, self.aggregator, self.plan.clients
        for k in clients:
            d = self.group(k).nbytes
            buffers = self.group(k).nbytes_of_buffers if self.buffer_policy == "average" else 0
            up, down = self.links.bytes_of_model(k, self.round, d, aggregator.bytes_of_model(k))
            traffic.bytes_up += up + (aggregator.vectors_up - 1) * d + buffers
            traffic.bytes_down += down + (aggregator.vectors_down - 1) * d + buffers
        self.links.note(clients, self.round)


def _working_type(block: Tensor) -> torch.dtype:
    return torch.promote_types(block.dtype, torch.float32)


def _counts(buffer: Tensor) -> bool:
    """Return whether a buffer holds integers, such as the number of batches that a norm has seen; other kinds never change."""
    return buffer.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _copy(vector: Vector) -> Vector:
    return tuple(x.clone() for x in vector)
