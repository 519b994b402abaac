"""Federated learning: rounds of clients inside one `Trainer.fit`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_distopt.communication import isolated_streams
from lightning_distopt.communication.rng import derive_seed, seed_streams
from lightning_distopt.compression import Compressor
from lightning_distopt.federated import Aggregator, Federation, cohorts
from lightning_distopt.federated import make as make_aggregator
from lightning_distopt.federated.prototypes import Prototypes
from lightning_distopt.strategies import _lightning as private
from lightning_distopt.strategies.base import ReplicaStrategy
from lightning_distopt.strategies.checks import (
    check_federated_trainer,
    check_federation,
    check_keywords,
    check_same_clients,
    check_vectorized,
)
from lightning_distopt.strategies.clients import Clients, RoundLoader, Turn, warn_of_lone_samples
from lightning_distopt.strategies.local_updates import LocalUpdatesMixin, Needs
from lightning_distopt.strategies.server_checkpoint import ServerCheckpointMixin
from lightning_distopt.strategies.shards import Partition, check_partition
from lightning_distopt.strategies.vectorized import Vectorized, groups


class FederatedStrategy(LocalUpdatesMixin, ServerCheckpointMixin, ReplicaStrategy):
    r"""Train a model on clients that keep their data: federated averaging and its relatives.

    $$ \hat x^k_t = \text{LocalUpdate}_k(x_{t-1}) \;\; \text{for } k \in S_t, \qquad
       x_t = \sum_{k \in S_t} \frac{n_k}{\sum_{j \in S_t} n_j} \, \hat x^k_t $$

    An epoch of the `Trainer` is a round: `C K` of the `K` clients start from the server's model, each trains it on its own
    samples with the module's optimizer, and an aggregator makes the next model of what they have learned. The ranks at hand
    train the clients one after the other; the result does not depend on how many ranks there are.

    - `max_epochs` counts rounds. `global_step` counts optimizer steps of the rank that makes most of them, and grows when a
      round ends; so `max_steps` and whatever acts every so many steps act at ends of rounds. Loggers count rounds.
    - Schedulers of learning rates step once a round, whichever their `interval`: during a round they are constant.
    - Lightning's batches are turns, in which every rank trains some of the round's clients. Hooks that get a batch get a
      `Turn`, except `training_step` and those that move a batch to its device, which get the clients' batches.
    - Validation and checkpoints see the server's model. Validation happens at ends of rounds.
    - `limit_train_batches` limits each client's epochs, `accumulate_grad_batches` counts batches of a client.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_distopt import FederatedStrategy
        >>> strategy = FederatedStrategy("fedavg", clients=8, fraction=0.5, local_epochs=2)
        >>> quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=1, max_epochs=3, limit_val_batches=0, **quiet)
        >>> trainer.fit(BoringModel())
        >>> strategy.traffic.rounds, trainer.current_epoch, trainer.global_step
        (3, 3, 192)

    Args:
        aggregator: what the server makes of the clients' models: an `Aggregator`, or its name.
        clients: `K`.
        fraction: `C`, the share of the clients that takes part in a round; `C K` is rounded.
        local_epochs: epochs that a client trains in a round.
        local_steps: optimizer steps that it trains, in place of epochs.
        weighting: "samples" weighs clients by their numbers of samples, "uniform" all the same.
        optimizer_state: "reset" lets clients begin each round with a new optimizer, "keep" with the one that they had.
        buffers: "average" averages floating-point buffers (running statistics) as it does the parameters; with "local" each
            client keeps its own, and the server has their average.
        partition: how the training data is divided among clients: "iid", "dirichlet:0.1", "shards:2", "by_class", "by_key:...",
            "fixed", a partitioner, a function of (dataset, K), or `K` index lists.
        uplink, downlink: compressors of what clients send and get, such as "top_k:0.01", with error feedback.
        state_folder: where what clients keep between rounds is written, rather than held in memory.
        prototypes: for clients with different networks, which are in the module's `prototypes` (a `ModuleDict`), while its
            attribute `prototype` names the one that it is just now. "even" lets client `k` have network `k mod p`; else a name
            for each client, or a dictionary or function from a client's number to a name.
        **kwargs: options of every strategy, see `ReplicaStrategy`: Lightning's own; replicas_per_device: how many clients of
            equal size a rank trains at once, which is faster for small modules (`Vectorized`).

    Raises:
        ValueError: for options out of range, such as `C K < 1`.
        TypeError: for an unknown option.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, chapter 8.
    """

    algorithm: Federation

    averages_gradients = False

    settled_options = ("algorithm", "evaluate", "optimizer_state", "buffers", "nonfinite", "partition")
    """Options of the base class that are not the user's, or another one here."""

    def __init__(
        self,
        aggregator: Aggregator | str = "fedavg",
        clients: int = 100,
        fraction: float = 0.1,
        local_epochs: int = 1,
        local_steps: int | None = None,
        weighting: Literal["samples", "uniform"] = "samples",
        optimizer_state: Literal["reset", "keep"] = "reset",
        buffers: Literal["average", "local"] = "average",
        partition: Partition = "iid",
        uplink: Compressor | str | None = None,
        downlink: Compressor | str | None = None,
        state_folder: str | None = None,
        prototypes: Prototypes = None,
        **kwargs: Any,
    ) -> None:
        chosen = make_aggregator(aggregator)
        check_keywords(type(self), FederatedStrategy, kwargs, chosen)
        check_federation(clients, fraction, local_epochs, local_steps, weighting, optimizer_state, buffers)
        if isinstance(partition, str) and partition == "reshuffle":
            raise ValueError("`partition='reshuffle'` deals data out anew each epoch, but clients keep theirs: use 'iid'.")
        check_partition(partition)
        if state_folder is not None and not (isinstance(state_folder, str | os.PathLike) and str(state_folder)):
            raise ValueError(f"`state_folder` must be the path of a folder, such as 'clients'; got {state_folder!r}.")
        self.local_epochs, self.local_steps = local_epochs, local_steps
        federation = Federation(
            chosen,
            clients,
            fraction,
            weighting,
            uplink,
            downlink,
            optimizer_state == "keep",
            buffers,
            state_folder,
            prototypes,
        )
        # What is settled here is named, so that the command line does not take it for the user's.
        super().__init__(
            algorithm=federation,
            evaluate="average",
            buffers="local",
            optimizer_state="keep",
            nonfinite="skip",
            partition=partition,
            **kwargs,
        )

    def _reset(self) -> None:
        super()._reset()
        self._clients: Clients | None = None
        self._resumed, self._round_steps = False, 0
        self._needs: Needs | None = None
        self._vectorized: Vectorized | None = None
        self._in_turn = False

    @property
    def clients(self) -> int:
        """`K`, the number of clients."""
        return self.algorithm.clients

    @property
    def aggregator(self) -> Aggregator:
        """What the server does."""
        return self.algorithm.aggregator

    # ------------------------------------------------------------------------------------------------------------ set-up
    def setup(self, trainer: pl.Trainer) -> None:
        """Look at what federated training can't have, then set up."""
        if trainer.state.fn == pl.trainer.states.TrainerFn.FITTING:
            check_federated_trainer(trainer)
        super().setup(trainer)
        if self.replicas is None:
            return
        if any(isinstance(optimizer, LBFGS) for optimizer in self.optimizers):
            raise MisconfigurationException(
                "LBFGS evaluates the loss several times in a step, and clients make one pass for each: use another optimizer."
            )
        assert self.lightning_module is not None
        self._needs = Needs(trainer, self.precision_plugin, self.root_device)
        if self.replicas_per_device > 1:
            check_vectorized(self, trainer)
            self._vectorized = Vectorized(self)
        self.algorithm.validation_batches = self._validation_batches
        self.algorithm.training_inputs = self._training_inputs
        self.algorithm.validates = trainer.enable_validation
        self.algorithm.shows_progress = trainer.is_global_zero and trainer.progress_bar_callback is not None
        self._patches.steps_at_rounds(trainer, self._passed)
        self._patches.leave_turns_alone(self.lightning_module, lambda batch: isinstance(batch, Turn))

    def _passed(self, n: int) -> bool:
        """Return whether the round that this batch has ended counts the `n`-th step, or a multiple of it."""
        assert self.lightning_module is not None
        now = self.lightning_module.trainer.global_step
        return self._round and now // n > (now - self._round_steps) // n

    @property
    def _has_copies(self) -> bool:
        return True

    def _options(self) -> tuple[Any, ...]:
        return (*super()._options(), self.local_epochs, self.local_steps)

    def _shard(self, loader: Any) -> Any:
        """Divide the training data among clients, and let Lightning go through the turns of a round."""
        assert self.lightning_module is not None
        trainer: Any = self.lightning_module.trainer
        if self._clients is None:
            self._limit, self._accumulate = trainer.limit_train_batches, trainer.accumulate_grad_batches
            self._log_every = trainer.log_every_n_steps
        self._clients = self._divide(loader)
        self._check_division((self._clients.division, self._clients.samples, self._clients.steps))
        turns = self._turns_of_round(self._clients.steps)
        # To Lightning a round is one optimizer step, for which it accumulates the turns.
        self._patches.set_attribute(trainer, "accumulate_grad_batches", turns)
        self._patches.set_attribute(trainer, "limit_train_batches", 1.0)
        steps = self.algorithm.count * sum(self._clients.steps) / self.clients / self.world_size  # of a round, about
        every = max(1, round(self._log_every / steps)) if self._log_every else 0  # 0 is never
        self._patches.set_attribute(trainer, "log_every_n_steps", every)
        return RoundLoader(turns, self._turns, loader)

    def _divide(self, loader: Any) -> Clients:
        """Return the clients, who have parts of this loader's data."""
        limit: Any = self._limit
        epochs, steps = self.local_epochs, self.local_steps
        clients = Clients(loader, self.partition, self.clients, epochs, steps, limit, self._accumulate)
        assert self.lightning_module is not None
        warn_of_lone_samples(clients, self.lightning_module, self.aggregator.needs_full_gradient)
        return clients

    def _turns_of_round(self, steps: Sequence[int]) -> int:
        """Return into how many turns rounds are cut, given the steps of all clients."""
        turns = cohorts.turns_of_round(self.algorithm.count, steps, self.world_size)
        whole = self.algorithm.count // (self.world_size * self.replicas_per_device)  # turns in which every row has a client
        return max(1, min(turns, whole)) if self.replicas_per_device > 1 else turns

    def on_train_start(self) -> None:
        """Let rounds go on where training does."""
        super().on_train_start()
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if not self._resumed:  # nothing is known of the round: it begins anew
            self.algorithm.round, self.algorithm.turn = trainer.current_epoch, 0
            private.begin_epoch_anew(trainer)
        loaders: Any = trainer.train_dataloader
        if isinstance(loaders, dict | list | tuple):
            if len(loaders) == 1:
                kind = type(loaders).__name__
                raise MisconfigurationException(
                    f"`train_dataloader` returns a {kind} with one training loader in it: return that `DataLoader` itself."
                )
            raise MisconfigurationException(
                "There are several training loaders, and clients get parts of one: return a single `DataLoader`."
            )
        if trainer.max_epochs == -1 and trainer.lr_scheduler_configs:
            rank_zero_warn(
                "`max_steps` counts steps of clients, and schedulers go by rounds: one that needs to know how long training is "
                "(`trainer.estimated_stepping_batches`, as a cosine) needs `max_epochs`, the number of rounds."
            )

    # ------------------------------------------------------------------------------------------------------------ rounds
    def _turns(self) -> Iterator[Turn]:
        """Begin a round, or go on in it, and give this rank's turns."""
        federation, clients = self.algorithm, self._clients
        assert clients is not None
        self._require_replicas().check_frozen()
        if federation.samples and not self._round_steps:  # those of a checkpoint
            divisions = {federation.division, clients.division} - {""}  # a server does not know that of clients elsewhere
            check_same_clients(federation.samples, clients.samples, len(divisions) <= 1)
        federation.division = clients.division
        chosen = cohorts.sample(federation.clients, federation.count, federation.round, federation.seed)
        turns = len(self.lightning_module.trainer.train_dataloader)  # type: ignore[union-attr, arg-type]
        plan = cohorts.plan(federation.round, chosen, clients.steps, self.world_size, turns, federation.stateful)
        federation.begin_round(plan, clients.samples, clients.steps)
        for index in range(federation.turn, turns):
            yield Turn(plan.round, index, plan.turns[self.global_rank][index])

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move the batch of a client; a turn has nothing to be moved."""
        return batch if isinstance(batch, Turn) else super().batch_to_device(batch, device, dataloader_idx)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Nothing is fetched for a turn before its clients are trained."""
        self._round = False

    @property
    def handles_gradient_accumulation(self) -> bool:
        """True: every turn comes to the strategy, and the last one of a round counts as its step."""
        return self.lightning_module is not None

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Run a turn; what Lightning takes for a training step holds the optimizer steps of its clients."""
        return closure()

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Nothing to do: clients have made their backward passes."""
        return closure_loss

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._in_turn = True
        try:
            yield
        finally:
            self._in_turn = False

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce over ranks, but inside a turn, where clients have different numbers of batches: there a rank keeps its own."""
        if self._in_turn:
            return tensor
        if isinstance(tensor, Tensor) and not tensor.is_floating_point() and reduce_op in ("mean", "avg"):
            tensor = tensor.double()  # numbers of samples, the mean of which Lightning would cut off
        return super().reduce(tensor, group, reduce_op)

    def training_step(self, turn: Turn, *args: Any) -> Tensor:
        """Train the clients of a turn, and end the round after the last one.

        Returns:
            The mean loss of the turn's batches on this rank.
        """
        assert self._clients is not None and self.lightning_module is not None
        federation, trainer = self.algorithm, self.lightning_module.trainer
        losses: list[Tensor] = []
        with isolated_streams(self.root_device), self._alone():
            first_all = federation.aggregator.needs_full_gradient
            alike = groups(turn.clients, self._kind, self.replicas_per_device)
            batches = self._clients.iterate([k for group in alike for k in group], turn.round, federation.seed, first_all)
            for group in alike:
                if len(group) > 1:
                    assert self._vectorized is not None
                    losses += self._vectorized.train(group, batches, takes_number=bool(args))
                    continue
                seed_streams(derive_seed(federation.seed, "client", turn.round, group[0]), self.root_device)
                losses.append(self._train(group[0], batches, takes_number=bool(args)))
            federation.show_model()
            self._require_replicas().drop_gradients()
        federation.turn = turn.index + 1
        if federation.turn == len(trainer.train_dataloader):  # type: ignore[arg-type]
            self._finish(trainer)
        return torch.stack(losses).nanmean() if losses else torch.zeros((), device=self.root_device)

    def _kind(self, number: int) -> tuple[int, str | None]:
        """Return what clients that are trained at once have in common."""
        assert self._clients is not None
        return self._clients.samples[number], self.algorithm.group(number).name

    def _finish(self, trainer: pl.Trainer) -> None:
        """Make the next model, and count what Lightning does not see."""
        federation = self.algorithm
        assert federation.plan is not None
        self._call_round_hook("on_before_round")
        if self.world_size > 1:
            with self._alone():
                private.agree_on_logs(trainer, self._require_communicator().gather)
        steps = federation.plan.steps
        federation.finish_round()
        for row in range(self.replicas_per_device):
            federation.show_model(row)
        self._round, self._round_steps = True, steps
        self.steps += steps
        private.count_steps(trainer, steps - 1)
        self._call_round_hook("on_after_round", self.num_replicas)

    # -------------------------------------------------------------------------------------------------------- evaluation
    @contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Let the module be the server's model inside the body, which it is anyway between turns."""
        self._require_replicas()
        with self._isolated():
            yield
