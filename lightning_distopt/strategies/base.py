"""The strategy that all families share: the life cycle of replicas inside a Lightning `Trainer`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_distopt.algorithms import Algorithm, GossipAlgorithm
from lightning_distopt.communication import Communicator, Replicas, Traffic, Watch
from lightning_distopt.data import Partitioner
from lightning_distopt.strategies import _lightning as private
from lightning_distopt.strategies.checkpoint import CheckpointMixin
from lightning_distopt.strategies.checks import check_ddp_options, check_fit, check_optimizers, check_options
from lightning_distopt.strategies.faults import FaultsMixin
from lightning_distopt.strategies.gradients import AveragingDDP
from lightning_distopt.strategies.loaders import LoadingMixin
from lightning_distopt.strategies.local_metrics import mean_of_replicas
from lightning_distopt.strategies.recalibration import Recalibration
from lightning_distopt.strategies.shards import Partition, check_partition
from lightning_distopt.strategies.stopping import StoppingMixin
from lightning_distopt.strategies.training import TrainingMixin
from lightning_distopt.topologies import Topology


class ReplicaStrategy(CheckpointMixin, FaultsMixin, LoadingMixin, StoppingMixin, TrainingMixin, DDPStrategy):
    r"""Trains `n = world_size * replicas_per_device` replicas with one algorithm; the base of all strategies here.

    Example:
        >>> from lightning_distopt.algorithms import LocalSGD
        >>> strategy = ReplicaStrategy(LocalSGD(sync_period=8), replicas_per_device=4)  # as `LocalSGDStrategy` does
        >>> strategy.algorithm
        LocalSGD(sync_period=8)

    Args:
        algorithm: what is done with the replicas around every optimizer step.
        replicas_per_device: `m`, replicas that each rank hosts. 1 is production; more simulates many replicas on few devices.
        evaluate: what validation sees: the "average" of all replicas, or the "local" (first) replica of each rank. "both":
            the average, and every replica by itself before it; the mean of their metrics is logged as `<name>_local`.
        buffers: running statistics and other buffers: "local" (each replica its own; evaluation and checkpoints average the
            floating-point ones), "average" (also averaged at rounds), "recalibrate" (batch-norm statistics are estimated anew
            for the average model, from the last training batches).
        optimizer_state: at rounds that average parameters: "keep", "average" (as the round does parameters, so gossip mixes it
            with that of neighbours), "average_all" (over all replicas, whatever the round) or "reset".
        nonfinite: what is done about a replica with NaN or infinite parameters before a round: "raise" an error that names it,
            or "skip" it, so that it goes on from the average of the others. Where gradients are averaged, one that is not
            finite has reached all replicas: there "raise" looks at the loss, and "skip" does nothing.
        partition: how the training data is divided: "reshuffle" (globally each epoch), "fixed" (equal parts, kept), a
            partitioner such as "dirichlet:0.1", "shards:2", "by_class", "iid", a function of (dataset, n), or `n` index lists.
        ddp_kwargs: options of torch's `DistributedDataParallel`, used where gradients are averaged.
        accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin, process_group_backend, timeout,
            start_method: as in Lightning's `DDPStrategy`.

    Raises:
        ValueError: for options that are none of these.
        TypeError: for an option that DDP lacks.
    """

    settled_options: ClassVar[tuple[str, ...]] = ("algorithm",)
    """Options of this class that a family settles itself, so that they are none of its users'."""

    averages_gradients: ClassVar[bool] = True
    """Whether some algorithm of the family averages gradients, so that there are options of torch's DDP."""

    def __init__(
        self,
        algorithm: Algorithm,
        replicas_per_device: int = 1,
        evaluate: Literal["average", "local", "both"] = "average",
        buffers: Literal["local", "average", "recalibrate"] = "local",
        optimizer_state: Literal["keep", "average", "average_all", "reset"] = "keep",
        nonfinite: Literal["raise", "skip"] = "raise",
        partition: Partition = "reshuffle",
        ddp_kwargs: dict[str, Any] | None = None,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        check_options(replicas_per_device, evaluate, buffers, optimizer_state, nonfinite, timeout, start_method)
        check_partition(partition)
        check_ddp_options(type(self), ddp_kwargs or {})
        if isinstance(algorithm, GossipAlgorithm) and type(self)._graph is ReplicaStrategy._graph:
            name, own = type(algorithm).__name__, type(self).__name__
            raise ValueError(f"{name} talks to neighbours in a graph, and {own} has none: use `GossipStrategy({name}(...))`.")
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            **(ddp_kwargs or {}),
        )
        self.algorithm = algorithm
        self.replicas_per_device = replicas_per_device
        self.evaluate, self.buffers, self.optimizer_state_policy = evaluate, buffers, optimizer_state
        self.nonfinite = nonfinite
        self.partition = partition
        self._watch = Watch()
        self.steps = 0  # attempted optimizer steps
        self._reset()

    def _reset(self) -> None:
        self.communicator: Communicator | None = None
        self.replicas: Replicas | None = None
        self._traffic = Traffic()
        self._patches = private.Patches()
        self._ddp: AveragingDDP | None = None
        self._recalibration: Recalibration | None = None
        self._tokens: dict[str, str] = {}  # of the last checkpoint under each name
        self._batches: list[Any] = []  # of the rows, in the batch under way
        self._loaders: list[Any] = []
        self._seed = 0
        self._in_step = False
        self._manual = self._can_use_ddp = self._stepped = False
        self._device: torch.device | None = None
        self._world_size: int | None = None
        self._round = self._agreed_to_stop = False
        self._watches_loss = False
        self._loss: Tensor | None = None
        self._showing_average = False
        self._local_metrics: private.Metrics | None = None  # of the replicas, in the last validation
        self._round_callbacks: list[Any] = []  # that have a hook of ours beside Lightning's

    # ------------------------------------------------------------------------------------------------------ public names
    @property
    def num_replicas(self) -> int:
        """`n`, the number of replicas over all ranks."""
        return self.world_size * self.replicas_per_device

    @property
    def _has_copies(self) -> bool:
        """Whether there are several copies of the model to be kept apart."""
        return self.num_replicas > 1

    @property
    def traffic(self) -> Traffic:
        """What training has sent so far: `bytes_sent` per replica, `rounds`, `seconds_blocked`."""
        return self.communicator.traffic if self.communicator is not None else self._traffic

    def replica_parameters(self) -> Tensor:
        """Return a copy of the parameters of this rank's replicas.

        Returns:
            `[m, d]`, the trainable parameters in the order of `model.parameters()`; row `r` is replica `rank * m + r`.

        Raises:
            RuntimeError: outside `trainer.fit`.
        """
        return self._require_replicas().matrix(self.algorithm.iterates())

    @contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Let the module be the average of all replicas inside the body. Collective: every rank enters it.

        Replicas are untouched. Inside, the random streams are isolated, so nothing in it changes training.
        """
        replicas, communicator = self._require_replicas(), self._require_communicator()
        if self._showing_average:
            yield
            return
        with replicas.showing_average(communicator, *self._finite_replicas(), self.algorithm.models()):
            self._showing_average = True
            try:
                if self._recalibration is not None:
                    self._recalibration.run(self)
                yield
            finally:
                self._showing_average = False

    def _require_replicas(self) -> Replicas:
        if self.replicas is None:
            raise RuntimeError("There are replicas only while `trainer.fit` runs; after it the module is their average.")
        return self.replicas

    def _require_communicator(self) -> Communicator:
        self._require_replicas()
        assert self.communicator is not None
        return self.communicator

    @property
    def root_device(self) -> torch.device:
        """The device of this rank; asked for at every batch, so it is looked up once."""
        if self._device is None:
            return super().root_device
        return self._device

    @property
    def world_size(self) -> int:
        """The number of ranks, looked up once like the device."""
        return self._world_size or super().world_size

    # ------------------------------------------------------------------------------------------------------------ set-up
    def _configure_launcher(self) -> None:
        """Launch processes; a single one needs no launcher, whose variables would stay in the environment."""
        if self.num_nodes * self.num_processes > 1:
            super()._configure_launcher()
            private.end_in_order(self._launcher, self._start_method)

    def setup(self, trainer: pl.Trainer) -> None:
        """Move the module into the block of replicas, then make the optimizers."""
        assert self.accelerator is not None and self.model is not None and self.lightning_module is not None
        if trainer.state.fn != TrainerFn.FITTING:  # there are no replicas, only the module as it is on rank 0
            self.accelerator.setup(trainer)
            self.model = self.precision_plugin.convert_module(self.model)
            self.model_to_device()
            if self.world_size > 1:
                private.broadcast_module(self.lightning_module)
            self.setup_precision_plugin()
            return
        clipped = self.algorithm.transforms_gradients or type(self.algorithm).before_update is not Algorithm.before_update
        needs = clipped, self.evaluate == "both"
        private.check_private_names(trainer, self.replicas_per_device, *needs)
        check_fit(self, trainer)
        self._reset()
        self._manual, self._device = not self.lightning_module.automatic_optimization, super().root_device
        self._world_size = super().world_size
        self._can_use_ddp = self.replicas_per_device == 1 and self.world_size > 1
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self._setup_replicas()
        self._patches.shard_training_data(trainer, self._shard)
        self.setup_optimizers(trainer)  # may ask for the length of training, and so for the sharded data
        self.setup_precision_plugin()
        private.move_optimizers(self.optimizers, self.root_device)
        check_optimizers(self)
        self.algorithm.check_optimizers(self.optimizers)
        assert self.replicas is not None
        self.replicas.attach_optimizers(self.optimizers)
        hooks = ("on_before_round", "on_after_round")
        self._round_callbacks = [c for c in trainer.callbacks if any(hasattr(c, hook) for hook in hooks)]  # type: ignore[attr-defined]
        if self.num_replicas > 1:
            self.replicas.seed(self._seed)
            self._patches.agree_on_monitored_values(trainer, self._mean_over_ranks)
        if self._has_copies:
            self._note_signals(trainer)
        if self.world_size > 1:
            self._patches.flags_only_at_rounds(trainer, lambda: self._round)
        if self.algorithm.transforms_gradients and self.replicas_per_device == 1:
            self._patches.after_clipping(self.precision_plugin, lambda: self.algorithm.transform_gradients(self.steps))
        if self.algorithm.steps_elsewhere and self.replicas_per_device == 1:
            self._patches.around_update(self.precision_plugin, self.algorithm.before_update, self.algorithm.after_update)
        self._patches.validate_inside(trainer, self._evaluation, self._isolated)
        if self.evaluate == "both":
            self._patches.add_validation_metrics(trainer, lambda: self._local_metrics)
        scaler = getattr(self.precision_plugin, "scaler", None)  # skips steps whose gradients are not finite
        self._watches_loss = self.nonfinite == "raise" and self.num_replicas > 1 and scaler is None
        if self.buffers == "recalibrate":
            self._recalibration = Recalibration()

    def _graph(self) -> Topology | None:
        """Return the graph of those replicas that talk to neighbours; None where there is none."""
        return None

    def _setup_replicas(self) -> None:
        assert self.lightning_module is not None
        m = self.replicas_per_device
        communicator = Communicator(m, self.root_device, self._timeout or timedelta(minutes=30), watch=self._watch)
        self.communicator = communicator
        self._watch.position = lambda: (communicator.traffic.rounds + 1, self.steps)
        module = self.lightning_module
        self.replicas = Replicas(module, m, first_replica=self.communicator.local_replicas.start)
        signatures = self.communicator.gather((self.replicas.signature(), m, self._described_options()))
        for rank, signature in enumerate(signatures):
            if signature != signatures[0]:
                raise MisconfigurationException(
                    f"Rank {rank} has another model or other strategy options than rank 0: build the same module, with the "
                    "same trainable parameters and buffers, on every rank."
                )
        self._seed = self.communicator.gather(torch.initial_seed())[0]
        self.replicas.start_equal(self.communicator)
        self.algorithm.seed = self._seed
        self.algorithm.setup(self.replicas, self.communicator)
        self.steps = 0

    def _options(self) -> tuple[Any, ...]:
        """Return what must be the same on all ranks, with a `repr` that says so."""
        named = isinstance(self.partition, str | Partitioner)
        partition = self.partition if named else type(self.partition).__name__
        return (self.algorithm, self.evaluate, self.buffers, self.optimizer_state_policy, self.nonfinite, partition)

    def _described_options(self) -> str:
        """Return them as text, without addresses, which differ between processes: a schedule may be any function."""
        return re.sub(r" at 0x[0-9a-f]+", "", repr(self._options()))

    def _mean_over_ranks(self, value: Tensor) -> Tensor:
        mean = self.reduce(value.to(self.root_device, torch.get_default_dtype()).clone())
        return mean if isinstance(mean, Tensor) else value

    # -------------------------------------------------------------------------------------------------------- evaluation
    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        """What surrounds every validation during `fit`."""
        replicas = self._require_replicas()
        module = self.lightning_module
        assert module is not None
        model, self.model = self.model, module
        try:
            if self.evaluate == "both" and self.num_replicas > 1 and not module.trainer.sanity_checking:
                self._local_metrics = mean_of_replicas(self)
            if self.evaluate != "local" and self.num_replicas > 1:
                with self.average_parameters():
                    yield
            else:
                replicas.activate(0)
                with self._isolated():
                    yield
        finally:
            self.model = model

    def _isolated(self) -> AbstractContextManager[None]:
        """Undo what the body draws from the random streams, where they are ours."""
        return self._require_replicas().isolated_streams() if self.num_replicas > 1 else nullcontext()

    def on_train_end(self) -> None:
        """Leave the average of all replicas in the module."""
        self.algorithm.finish()
        if self.num_replicas > 1:
            self._require_replicas().drop_gradients()
            with self.average_parameters():
                self._require_replicas().adopt()

    def teardown(self) -> None:
        """Undo everything: methods replaced, parameters in the block, process groups."""
        if self._resume is not None and self.replicas is not None and not self._has_failed():
            self.on_train_end()  # training had come to its end in the checkpoint, so it has not begun, and won't end by itself
        self._resume = None
        self._patches.undo()
        self._drop_ddp()
        if self.replicas is not None:
            self.replicas.release()
            self.replicas = None
        if self.communicator is not None:
            self._traffic = self.communicator.traffic
            self.communicator.close()
            self.communicator = None
        self._watch.stop()
        self._loaders, self._batches, self._recalibration = [], [], None
        self._device = self._world_size = None
        super().teardown()

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Lightning calls this for its own strategies; ours are registered when the package is imported."""
