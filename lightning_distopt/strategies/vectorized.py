"""Several clients at once: their models are rows of a block, and `torch.func.vmap` runs a training step for all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten
from torchmetrics import Metric

from lightning_distopt.communication import first_line
from lightning_distopt.communication.rng import derive_seed, seed_streams
from lightning_distopt.communication.tensors import buffer_names, named_buffers
from lightning_distopt.federated import Aggregator, Client
from lightning_distopt.strategies import _lightning as private
from lightning_distopt.strategies.local_updates import loss_of


def groups(clients: Sequence[int], kind: Callable[[int], Any], m: int) -> list[list[int]]:
    """Cut clients into groups of at most `m` of the same kind.

    Example:
        >>> groups([0, 1, 2, 3, 4, 6], kind=lambda k: k % 2, m=3)
        [[0, 2, 4], [6], [1, 3]]

    Args:
        clients: their numbers.
        kind: what those that are trained at once have to have in common.
        m: how many can be trained at once.
    """
    if m == 1:
        return [[k] for k in clients]
    alike: dict[Any, list[int]] = {}
    for k in clients:
        alike.setdefault(kind(k), []).append(k)
    return [own[i : i + m] for own in alike.values() for i in range(0, len(own), m)]


class Vectorized:
    """Trains groups of clients with equally many samples and the same network, each client in a row of its own.

    Parameters and buffers of the rows are stacked, `[g, ...]`. The gradient of the sum of the clients' losses is that of each
    loss, as no client's parameters enter another one's. A twin of the user's optimizer steps all rows.

    The numbers are those of one client after the other, except for what `training_step` draws from random streams: with dropout
    each client has masks of its own, but other ones. All batches of a group are loaded before it is trained.

    Args:
        strategy: a `FederatedStrategy` that is set up.
    """

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        module = strategy.lightning_module
        self._step = _Step(module)
        self._metrics = [part for part in module.modules() if isinstance(part, Metric)]
        self._parameter_names = [f"module.{slot.name}" for slot in strategy.replicas.slots]
        self._buffer_names = [f"module.{name}" for name in buffer_names(module)]
        self._models: list[Tensor] = []  # of all rows, for each parameter
        self._gradients: list[Tensor] = []
        self._buffers: list[Tensor] = []

    def train(self, numbers: Sequence[int], batches: Iterator[Any], takes_number: bool) -> list[Tensor]:
        """Train clients, and let the server have what they have learned; returns the mean losses of their batches.

        Args:
            numbers: of the clients.
            batches: of one client after the other.
            takes_number: whether `training_step` takes the number of a batch.

        Raises:
            MisconfigurationException: if `training_step` can't be run for several clients at once.
        """
        strategy, replicas = self.strategy, self.strategy.replicas
        federation, optimizer = strategy.algorithm, strategy.optimizers[0]
        aggregator, round_, g = federation.aggregator, federation.plan.round, len(numbers)
        schedule = list(strategy._clients.steps_of(numbers[0]))
        sizes = strategy._clients.full_pass(numbers[0]) if aggregator.needs_full_gradient else []
        loaded = []
        for number in numbers:
            seed_streams(derive_seed(federation.seed, "client", round_, number), strategy.root_device)
            loaded.append([strategy._take(batches) for _ in range(len(sizes) + len(schedule))])
        together = map(_Batch.stack, zip(*loaded, strict=True))
        seed_streams(derive_seed(federation.seed, "clients", round_, *numbers), strategy.root_device)

        replicas.drop_gradients()
        optimizer.step()  # without gradients this does nothing, but schedulers see that there are steps
        if not replicas.gradients and (aggregator.transforms_gradients or sizes):
            replicas.gradients = replicas.new_blocks()
        clients = [federation.receive(number, row) for row, number in enumerate(numbers)]
        self._models = [model.requires_grad_() for model in self._stacked(replicas.parameters, g)]
        self._gradients = self._stacked(replicas.gradients, g)
        self._buffers = [torch.stack(rows) for rows in zip(*(replicas.buffers(row) for row in range(g)), strict=True)]
        twin = self._twin(optimizer)
        if sizes:
            self._full_gradients(clients, together, sizes, takes_number)
        for client in clients:
            aggregator.begin_client(client)
        mean = self._train(clients, together, schedule, twin, takes_number)
        for row, client in enumerate(clients):
            for buffer, stacked in zip(replicas.buffers(row), self._buffers, strict=True):
                buffer.copy_(stacked[row])
            if type(aggregator).end_client is not Aggregator.end_client:
                replicas.activate(row)  # the aggregator may want to run the module
            federation.send(client, mean[row], row)
        replicas.activate(0)
        self._models, self._gradients, self._buffers = [], [], []
        return list(mean)

    def _stacked(self, blocks: Sequence[Tensor], g: int) -> list[Tensor]:
        """Return each parameter's views of the first rows of blocks, `[g, ...]`."""
        if not blocks:
            return []
        return [
            (block := blocks[slot.block]).as_strided(
                (g, *slot.shape), (block.stride(0), *slot.stride), block.storage_offset() + slot.offset
            )
            for slot in self.strategy.replicas.slots
        ]

    def _twin(self, optimizer: Optimizer) -> Optimizer:
        """Return a new optimizer like the user's, which steps all rows."""
        trained = [p for p in self.strategy.lightning_module.parameters() if p.requires_grad]
        models = dict(zip(map(id, trained), self._models, strict=True))
        plain = {"foreach": None, "fused": None}  # kernels that take every tensor for contiguous are not for rows of a block
        groups = []
        for group in optimizer.param_groups:
            options = {key: plain.get(key, value) for key, value in group.items()}
            groups.append({**options, "params": [models[id(p)] for p in group["params"] if id(p) in models]})
        twin: Optimizer = cast(Any, type(optimizer))(groups)
        for parameter in trained:  # what optimizers have before their first step
            model = models[id(parameter)]
            for name, value in optimizer.state.get(parameter, {}).items():
                twin.state[model][name] = value.clone() if name == "step" else value.expand_as(model).clone()
        return twin

    def _train(
        self,
        clients: Sequence[Client],
        batches: Iterator[_Batch],
        schedule: Sequence[tuple[int, bool]],
        twin: Optimizer,
        takes_number: bool,
    ) -> Tensor:
        """Let clients make their steps; returns their mean losses, `[g]`."""
        aggregator, accumulated = self.strategy.aggregator, self.strategy._accumulate
        total, fresh = torch.zeros(len(clients), device=self.strategy.root_device), True
        own = set(self.strategy.algorithm.group(clients[0].number).slots)
        for k, steps in schedule:
            if fresh:
                for client in clients:
                    aggregator.before_gradient(client)
                self._drop_gradients()
            fresh = steps
            losses = self._losses(next(batches), k, takes_number)
            (losses / accumulated if accumulated > 1 else losses).sum().backward()
            total = total + losses.detach()
            if not steps:
                continue
            self._clip(twin)
            if aggregator.transforms_gradients:
                self._collect_gradients()
            for client in clients:
                if aggregator.transforms_gradients:
                    aggregator.transform_gradients(client)
                aggregator.before_update(client)
            for slot, model in enumerate(self._models):
                if slot not in own:  # of another prototype: optimizers leave alone what has no gradient
                    model.grad = None
            twin.step()
            for client in clients:
                client.step += 1
        return total / len(schedule)

    # --------------------------------------------------------------------------------------------------------- gradients
    def _drop_gradients(self) -> None:
        for model in self._models:
            model.grad = None

    def _collect_gradients(self) -> None:
        """Move gradients into their block, as `Replicas.collect_gradients` does for one row."""
        for model, gradient in zip(self._models, self._gradients, strict=True):
            if model.grad is None:
                gradient.zero_()
            else:
                gradient.copy_(model.grad)
            model.grad = gradient

    def _clip(self, twin: Optimizer) -> None:
        """Clip each client's gradient, as the `Trainer` clips that of a model."""
        trainer = self.strategy.lightning_module.trainer
        limit = trainer.gradient_clip_val
        gradients = [p.grad for group in twin.param_groups for p in group["params"] if p.grad is not None]
        if not limit or not gradients:
            return
        if trainer.gradient_clip_algorithm == "value":
            for gradient in gradients:
                gradient.clamp_(-limit, limit)
            return
        # g_k <- g_k min(1, c / (|g_k| + 1e-6)), as torch does
        norms = torch.stack([gradient.reshape(len(gradient), -1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        factors = (limit / (norms + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))

    def _full_gradients(
        self, clients: Sequence[Client], batches: Iterator[_Batch], sizes: Sequence[int], takes_number: bool
    ) -> None:
        """Let clients have the gradients of their mean losses over all their samples; buffers stay what they are."""
        buffers = [buffer.clone() for buffer in self._buffers]
        self._drop_gradients()
        with private.logs_apart(self.strategy.lightning_module.trainer):
            for k, size in enumerate(sizes):
                (self._losses(next(batches), k, takes_number) * (size / sum(sizes))).sum().backward()
        self._collect_gradients()
        for client in clients:
            client.full_gradient = tuple(gradient.clone() for gradient in client.gradients)
        self._buffers = buffers

    # ------------------------------------------------------------------------------------------------------------ losses
    def _losses(self, batch: _Batch, k: int, takes_number: bool) -> Tensor:
        """Return the losses of all clients on their `k`-th batches, `[g]`; buffers change, and values are logged."""
        logged: list[dict[str, Any]] = []

        def loss_of_one(model: list[Tensor], buffers: list[Tensor], tensors: list[Tensor]) -> Any:
            state = dict(zip((*self._parameter_names, *self._buffer_names), (*model, *buffers), strict=True))
            args = (batch.of(tensors), k) if takes_number else (batch.of(tensors),)
            with self._noting_logs(logged) as values:
                loss, changed = functional_call(self._step, state, args)
            return loss, changed, values

        private.log_batch(self.strategy.lightning_module.trainer, batch.first)
        updates = [metric.update_count for metric in self._metrics]
        losses: Tensor
        try:
            with self.strategy.precision_plugin.train_step_context():
                run: Callable[..., Any] = vmap(loss_of_one, randomness="different")
                losses, self._buffers, values = run(self._models, self._buffers, batch.tensors)
        except RuntimeError as error:
            raise MisconfigurationException(
                "`replicas_per_device > 1` runs `training_step` for several clients at once, by `torch.func.vmap`. It fails "
                f"there ({first_line(error)}): use `replicas_per_device=1`, or leave out what looks at single values "
                "(`.item()`, `if loss > 1`)."
            ) from error
        if updates != [metric.update_count for metric in self._metrics]:
            raise MisconfigurationException(
                "`training_step` updates a metric of torchmetrics, which can't take in the values of several clients at once: "
                "use `replicas_per_device=1`, or log the value itself."
            )
        self._log(logged, values, batch)
        return losses

    @contextmanager
    def _noting_logs(self, logged: list[dict[str, Any]]) -> Iterator[list[Tensor]]:
        """Let `self.log` note its options in `logged`, and values in what the body gets."""
        module, values = self.strategy.lightning_module, list[Tensor]()
        signature = inspect.signature(module.log)

        def log(*args: Any, **kwargs: Any) -> None:
            options = signature.bind(*args, **kwargs).arguments
            value = options.pop("value")
            if isinstance(value, Metric):
                raise MisconfigurationException(
                    f"`self.log({options['name']!r}, ...)` gets a metric of torchmetrics, which can't take in the values of "
                    "several clients at once: use `replicas_per_device=1`, or log the value itself."
                )
            logged.append(options)
            values.append(torch.as_tensor(value, device=self.strategy.root_device).detach())

        module.log = log
        try:
            yield values
        finally:
            del module.log

    def _log(self, logged: list[dict[str, Any]], values: list[Tensor], batch: _Batch) -> None:
        """Log what all clients have logged: where it is averaged anyway, the mean of it."""
        module = self.strategy.lightning_module
        for options, of_clients in zip(logged, values, strict=True):
            if options.get("reduce_fx", "mean") not in ("mean", "avg", torch.mean):
                for value in of_clients:
                    module.log(**options, value=value)
                continue
            if options.get("on_epoch"):
                size = options.get("batch_size") or extract_batch_size(batch.first)
                options["batch_size"] = size * len(of_clients)
            module.log(**options, value=of_clients.float().mean())


class _Step(nn.Module):
    """A module's training step as a forward pass, which is what `functional_call` runs; returns the buffers as well."""

    def __init__(self, module: pl.LightningModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> tuple[Tensor, list[Tensor]]:
        output: Any = self.module.training_step(*args)
        loss = loss_of(output)
        if loss is None:
            raise MisconfigurationException(
                "`training_step` skips a batch, which `replicas_per_device > 1` can't do for one of several clients: use "
                "`replicas_per_device=1`, or a loss of zero."
            )
        return loss.reshape(()), [buffer for _, _, buffer in named_buffers(self.module)]


@dataclass
class _Batch:
    """Batches of several clients: their tensors stacked, `[g, ...]`, and all else, which they have in common."""

    tensors: list[Tensor]
    leaves: list[Any]
    spec: Any

    @classmethod
    def stack(cls, batches: Sequence[Any]) -> _Batch:
        """Stack batches.

        Raises:
            MisconfigurationException: if they are not alike.
        """
        flat = [tree_flatten(batch) for batch in batches]
        kinds = [([_kind(leaf) for leaf in leaves], spec) for leaves, spec in flat]
        for other in kinds:
            if other != kinds[0]:
                raise MisconfigurationException(
                    "`replicas_per_device > 1` stacks the batches of several clients, and theirs differ in shape, or hold more "
                    "than tensors: pad all samples to the same size and leave the rest out, or use `replicas_per_device=1`."
                )
        rows = [[leaf for leaf in leaves if isinstance(leaf, Tensor)] for leaves, _ in flat]
        return cls([torch.stack(own) for own in zip(*rows, strict=True)], *flat[0])

    def of(self, tensors: Sequence[Tensor]) -> Any:
        """Return the batch of one client."""
        own = iter(tensors)
        return tree_unflatten([next(own) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves], self.spec)

    @property
    def first(self) -> Any:
        """The batch of the first client."""
        return tree_unflatten(self.leaves, self.spec)


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return leaf if leaf is None or isinstance(leaf, str | int | float) else id(leaf)
