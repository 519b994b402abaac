"""Federated learning: rounds of clients inside one `Trainer.fit`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from lightning_distopt.communication import isolated_streams
from lightning_distopt.communication.rng import derive_seed, seed_streams
from lightning_distopt.communication.tensors import clone_tree
from lightning_distopt.compression import Compressor
from lightning_distopt.federated import Aggregator, Client, Federation, Vector, cohorts
from lightning_distopt.federated import make as make_aggregator
from lightning_distopt.strategies import _lightning as private
from lightning_distopt.strategies.base import ReplicaStrategy
from lightning_distopt.strategies.checks import check_keywords, option_names
from lightning_distopt.strategies.clients import Clients, RoundLoader, Turn
from lightning_distopt.strategies.shards import Partition, check_partition

_OWN = ("algorithm", "evaluate", "optimizer_state", "buffers", "nonfinite", "partition")


class FederatedStrategy(ReplicaStrategy):
    r"""Train a model on clients that keep their data: federated averaging and its relatives.

    $$ \hat x^k_t = \text{LocalUpdate}_k(x_{t-1}) \;\; \text{for } k \in S_t, \qquad
       x_t = \sum_{k \in S_t} \frac{n_k}{\sum_{j \in S_t} n_j} \, \hat x^k_t $$

    An epoch of the `Trainer` is a round: `C K` of the `K` clients start from the server's model, each trains it on its own
    samples with the module's optimizer, and an aggregator makes the next model of what they have learned. The ranks at hand
    train the clients one after the other; the result does not depend on how many ranks there are.

    - `max_epochs` counts rounds. `global_step` counts optimizer steps of the rank that makes most of them, and grows when a
      round ends; so `max_steps` and whatever acts every so many steps act at ends of rounds.
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
        **kwargs: options of every strategy, see `ReplicaStrategy`: replicas_per_device, and Lightning's own.

    Raises:
        ValueError: for options out of range, such as `C K < 1`.
        TypeError: for an unknown option.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, chapter 8.
    """

    algorithm: Federation

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
        **kwargs: Any,
    ) -> None:
        own, inherited = option_names(FederatedStrategy), option_names(ReplicaStrategy)
        check_keywords(type(self), kwargs, own, [name for name in inherited if name not in _OWN])
        _check_options(clients, fraction, local_epochs, local_steps, weighting, optimizer_state, buffers)
        if isinstance(partition, str) and partition == "reshuffle":
            raise ValueError("`partition='reshuffle'` deals data out anew each epoch, but clients keep theirs: use 'iid'.")
        check_partition(partition)
        self.local_epochs, self.local_steps = local_epochs, local_steps
        federation = Federation(
            make_aggregator(aggregator),
            clients,
            fraction,
            weighting,
            uplink,
            downlink,
            optimizer_state == "keep",
            buffers,
            state_folder,
        )
        super().__init__(algorithm=federation, nonfinite="skip", partition=partition, **kwargs)

    def _reset(self) -> None:
        super()._reset()
        self._clients: Clients | None = None
        self._needs: _Needs | None = None

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
            _check_trainer(self, trainer)
        super().setup(trainer)
        if self.replicas is None:
            return
        assert self.lightning_module is not None
        self._needs = _Needs(trainer, self.precision_plugin, self.root_device)
        self.algorithm.validation_batches = self._validation_batches
        self._patches.leave_turns_alone(self.lightning_module, lambda batch: isinstance(batch, Turn))

    def _options(self) -> tuple[Any, ...]:
        return (*super()._options(), self.local_epochs, self.local_steps)

    def _shard(self, loader: Any, original: Callable[[Any], Any]) -> Any:
        """Divide the training data among clients, and let Lightning go through the turns of a round."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if self._clients is None:
            self._limit, self._accumulate = trainer.limit_train_batches, trainer.accumulate_grad_batches
        limit: Any = self._limit
        self._clients = Clients(
            loader, self.partition, self.clients, self.local_epochs, self.local_steps, limit, self._accumulate
        )
        turns = cohorts.turns_of_round(self.algorithm.count, self._clients.steps, self.world_size)
        # To Lightning a round is one optimizer step, for which it accumulates the turns.
        self._patches.set_attribute(trainer, "accumulate_grad_batches", turns)
        self._patches.set_attribute(trainer, "limit_train_batches", 1.0)
        return RoundLoader(turns, self._turns)

    def on_train_start(self) -> None:
        """Let rounds go on where training does."""
        resumed = self._resume is not None or self.algorithm.round > 0 or self.algorithm.turn > 0
        super().on_train_start()
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if not resumed:  # from a checkpoint without clients
            self.algorithm.round = trainer.current_epoch
        if isinstance(trainer.train_dataloader, dict | list | tuple):
            raise MisconfigurationException(
                "There are several training loaders, and clients get parts of one: return a single `DataLoader`."
            )

    # ------------------------------------------------------------------------------------------------------------ rounds
    def _turns(self) -> Iterator[Turn]:
        """Begin a round, or go on in it, and give this rank's turns."""
        federation, clients = self.algorithm, self._clients
        assert clients is not None
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

    def training_step(self, turn: Turn, *args: Any) -> Tensor:
        """Train the clients of a turn, and end the round after the last one.

        Returns:
            The mean loss of the turn's batches on this rank.
        """
        assert self._clients is not None and self.lightning_module is not None
        federation, trainer = self.algorithm, self.lightning_module.trainer
        losses: list[Tensor] = []
        with isolated_streams(self.root_device):
            first_all = federation.aggregator.needs_full_gradient
            batches = self._clients.iterate(turn.clients, turn.round, federation.seed, first_all)
            for number in turn.clients:
                seed_streams(derive_seed(federation.seed, "client", turn.round, number), self.root_device)
                losses.append(self._train(number, batches, takes_number=bool(args)))
            federation.show_model()
            self._require_replicas().drop_gradients()
        federation.turn = turn.index + 1
        if federation.turn == len(trainer.train_dataloader):  # type: ignore[arg-type]
            self._finish(trainer)
        good = [loss for loss in losses if loss.isfinite()]
        return torch.stack(good).mean() if good else torch.zeros((), device=self.root_device)

    def _train(self, number: int, batches: Iterator[Any], takes_number: bool) -> Tensor:
        """Train a client, and hand what it has learned to the server; returns the mean loss of its batches."""
        assert self._clients is not None and self._needs is not None
        federation, needs = self.algorithm, self._needs
        aggregator, optimizer = federation.aggregator, self.optimizers[0]
        accumulated = self._accumulate
        client = federation.receive(number)
        if aggregator.needs_full_gradient:
            client.full_gradient = self._full_gradient(number, batches, takes_number)
        aggregator.begin_client(client)
        total, count, fresh = torch.zeros((), device=self.root_device), 0, True
        for k, steps in self._clients.steps_of(number):
            batch = self._take(batches)
            if fresh:
                aggregator.before_gradient(client)
            loss = self._client_loss(batch, k, takes_number)
            if fresh:
                self._zero_gradients(optimizer, k)
            fresh = steps
            if loss is not None:
                self._backward(loss / accumulated if accumulated > 1 else loss, optimizer)
                total, count = total + loss.detach(), count + 1
            if not steps:
                continue
            if needs.clipping:
                private.clip_gradients(self, optimizer)
            if aggregator.transforms_gradients:
                self._transform(client)
            aggregator.before_update(client)
            optimizer.step()
            client.step += 1
        federation.send(client, total / max(count, 1))
        return total / max(count, 1)

    def _take(self, batches: Iterator[Any]) -> Any:
        """Return the next batch, on the device."""
        assert self._needs is not None and self.lightning_module is not None
        batch = next(batches)
        if self._needs.transfer:
            batch = self.precision_plugin.convert_input(batch)
            batch = self.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = self.batch_to_device(batch, dataloader_idx=0)
        return batch

    def _client_loss(self, batch: Any, k: int, takes_number: bool) -> Tensor | None:
        """Run the user's training step on a client's batch, its `k`-th in this round."""
        module: Any = self.lightning_module
        private.log_batch(module.trainer, batch)
        with self.precision_plugin.train_step_context():
            output = module.training_step(batch, k) if takes_number else module.training_step(batch)
        return output["loss"] if isinstance(output, dict) else output

    def _full_gradient(self, number: int, batches: Iterator[Any], takes_number: bool) -> Vector:
        """Return the gradient of the mean loss over all samples of a client; only its random stream goes on."""
        assert self._clients is not None
        replicas, sizes = self._require_replicas(), self._clients.full_pass(number)
        buffers = clone_tree(replicas.buffers(replicas.active))
        replicas.drop_gradients()
        for k, size in enumerate(sizes):
            loss = self._client_loss(self._take(batches), k, takes_number)
            if loss is not None:
                (loss * (size / sum(sizes))).backward()
        replicas.collect_gradients()
        gradient = tuple(block[replicas.active].clone() for block in replicas.gradients)
        replicas.drop_gradients()
        for buffer, before in zip(replicas.buffers(replicas.active), buffers, strict=True):
            buffer.copy_(before)
        return gradient

    def _validation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Give all validation data, whichever part of it this rank validates on."""
        assert self.lightning_module is not None
        for loader in private.validation_loaders(self.lightning_module.trainer):
            for batch in loader:
                batch = self.precision_plugin.convert_input(batch)
                batch = self.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
                batch = self.batch_to_device(batch, dataloader_idx=0)
                if not isinstance(batch, list | tuple) or len(batch) != 2:
                    raise MisconfigurationException(
                        f"{self.aggregator!r} evaluates models on validation data, whose batches have to be pairs of inputs "
                        f"and targets; got {type(batch).__name__}."
                    )
                yield batch[0], batch[1]

    def _zero_gradients(self, optimizer: Optimizer, k: int) -> None:
        assert self._needs is not None and self.lightning_module is not None
        if self._needs.zeroing:
            self.lightning_module.optimizer_zero_grad(self.lightning_module.current_epoch, k, optimizer)
        else:
            optimizer.zero_grad()

    def _backward(self, loss: Tensor, optimizer: Optimizer) -> None:
        assert self._needs is not None
        if not self._needs.backward:
            loss.backward()
            return
        loss = self.precision_plugin.pre_backward(loss, self.lightning_module)  # type: ignore[arg-type]
        self.precision_plugin.backward(loss, self.lightning_module, optimizer)  # type: ignore[arg-type]
        self.precision_plugin.post_backward(loss, self.lightning_module)  # type: ignore[arg-type]

    def _transform(self, client: Client) -> None:
        replicas = self._require_replicas()
        replicas.collect_gradients()
        if not client.gradients:
            client.gradients = tuple(block[replicas.active] for block in replicas.gradients)
        self.algorithm.aggregator.transform_gradients(client)

    def _finish(self, trainer: pl.Trainer) -> None:
        """Make the next model, and count what Lightning does not see."""
        federation = self.algorithm
        assert federation.plan is not None
        self._call_round_hook("on_before_round")
        steps = federation.plan.steps
        federation.finish_round()
        federation.show_model()
        self._round = True
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


class _Needs:
    """What has to be done for every batch of a client: only what the user, or a device, asks for.

    Attributes:
        transfer: whether batches are moved to a device, or changed on the way.
        zeroing, backward, clipping: whether somebody has hooks there, or clips.
    """

    def __init__(self, trainer: pl.Trainer, plugin: Precision, device: torch.device) -> None:
        module, callbacks = trainer.lightning_module, trainer.callbacks  # type: ignore[attr-defined]
        data: Any = getattr(trainer, "datamodule", None)
        owners = [module] if data is None else [module, data]

        def hooked(*names: str) -> bool:
            of_module = any(is_overridden(name, module) for name in names)
            return of_module or any(is_overridden(name, c) for name in names for c in callbacks if hasattr(pl.Callback, name))

        transfers = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
        moved = any(is_overridden(name, owner) for name in transfers for owner in owners)
        converts = type(plugin).convert_input is not Precision.convert_input
        self.transfer = moved or converts or device.type != "cpu"
        self.zeroing = is_overridden("optimizer_zero_grad", module)
        self.backward = hooked("backward", "on_before_backward", "on_after_backward")
        clips = bool(trainer.gradient_clip_val) or is_overridden("configure_gradient_clipping", module)
        self.clipping = clips or hooked("on_before_optimizer_step")


def _check_options(
    clients: Any, fraction: Any, local_epochs: Any, local_steps: Any, weighting: Any, optimizer_state: Any, buffers: Any
) -> None:
    counts = {"clients": clients, "local_epochs": local_epochs, "local_steps": 1 if local_steps is None else local_steps}
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` must be a whole number, at least 1; got {value!r}.")
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise ValueError(f"`fraction`, the share of the clients in a round, must be above 0 and at most 1; got {fraction!r}.")
    if fraction * clients < 1:
        raise ValueError(
            f"`fraction={fraction}` of {clients} clients is less than one: nobody would train; use at least {1 / clients:.3g}."
        )
    if local_steps is not None and local_epochs != 1:
        raise ValueError("`local_epochs` and `local_steps` both say how long clients train: give one of them.")
    choices = {
        "weighting": (weighting, ("samples", "uniform")),
        "optimizer_state": (optimizer_state, ("reset", "keep")),
        "buffers": (buffers, ("average", "local")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}; got {value!r}.")


def _check_trainer(strategy: FederatedStrategy, trainer: pl.Trainer) -> None:
    """Refuse what rounds of clients can't have."""
    module = trainer.lightning_module
    if not module.automatic_optimization:
        raise MisconfigurationException(
            "Clients train inside one of Lightning's steps, which manual optimization can't: use automatic optimization."
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise MisconfigurationException(
            "`precision='16-mixed'` scales losses by what earlier steps have shown, and clients begin anew in every round: use "
            "`precision='bf16-mixed'`."
        )
    if any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks):  # type: ignore[attr-defined]
        raise MisconfigurationException(
            "GradientAccumulationScheduler changes how many batches make a step, which is settled when training starts: use "
            "`accumulate_grad_batches`."
        )
    if trainer.val_check_interval != 1.0:
        raise MisconfigurationException(
            f"`val_check_interval={trainer.val_check_interval}` would validate inside a round, where there is no new model: "
            "use `check_val_every_n_epoch`, which counts rounds."
        )
    if strategy.replicas_per_device > 1:
        warnings.warn("`replicas_per_device` has no effect yet.", stacklevel=2)
