"""The local training of a client, by the user's `training_step` and optimizer, and the batches it is given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from lightning_distopt.communication import isolated_streams
from lightning_distopt.communication.rng import derive_seed, seed_streams
from lightning_distopt.communication.tensors import clone_tree
from lightning_distopt.federated import Client, Vector
from lightning_distopt.strategies import _lightning as private


def loss_of(output: Any) -> Any:
    """Return the loss in what `training_step` has returned; None for a batch that it skips."""
    return output["loss"] if isinstance(output, Mapping) else output


class Needs:
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
        self.zeroing = hooked("on_before_zero_grad", "optimizer_zero_grad")
        self.backward = hooked("backward", "on_before_backward", "on_after_backward")
        clips = bool(trainer.gradient_clip_val) or is_overridden("configure_gradient_clipping", module)
        self.clipping = clips or hooked("on_before_optimizer_step")


class LocalUpdatesMixin:
    """Local training for a strategy whose clients take turns."""

    def client_batches(self: Any, clients: Iterable[int]) -> Iterator[tuple[int, int, Any]]:
        """Give all training samples of some clients once, in batches, on the device of this rank.

        What loading draws at random follows from the client alone, and the random streams are left as they are.

        Args:
            clients: their numbers.

        Yields:
            The client, the number of samples in the batch, and the batch.

        Raises:
            RuntimeError: outside `trainer.fit`, and if the clients are on other machines.
        """
        if self._clients is None or self.replicas is None:
            raise RuntimeError("Clients have data only while `trainer.fit` runs.")
        numbers, device, seed = list(clients), self.root_device, self.algorithm.seed
        with isolated_streams(device):
            batches = self._clients.iterate(numbers, 0, seed, first_all=True, training=False)
        for number in numbers:
            for k, size in enumerate(self._clients.full_pass(number)):
                with isolated_streams(device):
                    seed_streams(derive_seed(seed, "all", number, k), device)
                    batch = self._take(batches)
                yield number, size, batch

    def _train(self: Any, number: int, batches: Iterator[Any], takes_number: bool) -> Tensor:
        """Train a client, and hand what it has learned to the server; returns the mean loss of its batches."""
        federation, needs = self.algorithm, self._needs
        aggregator, optimizer = federation.aggregator, self.optimizers[0]
        accumulated = self._accumulate
        client = federation.receive(number)
        if aggregator.needs_full_gradient:
            client.full_gradient = self._full_gradient(number, batches, takes_number)
        aggregator.begin_client(client)
        losses: list[Tensor] = []
        fresh = True
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
                losses.append(loss.detach())
            if not steps:
                continue
            if needs.clipping:
                private.clip_gradients(self, optimizer)
            if aggregator.transforms_gradients:
                self._transform(client)
            aggregator.before_update(client)
            optimizer.step()
            client.step += 1
        mean = torch.stack(losses).mean() if losses else torch.zeros((), device=self.root_device)
        federation.send(client, mean)
        return mean

    def _take(self: Any, batches: Iterator[Any]) -> Any:
        """Return the next batch, on the device."""
        batch = next(batches)
        return private.to_device(self.lightning_module.trainer, batch) if self._needs.transfer else batch

    def _client_loss(self: Any, batch: Any, k: int, takes_number: bool) -> Tensor | None:
        """Run the user's training step on a client's batch, its `k`-th in this round."""
        module: Any = self.lightning_module
        private.log_batch(module.trainer, batch)
        with self.precision_plugin.train_step_context():
            output = module.training_step(batch, k) if takes_number else module.training_step(batch)
        return loss_of(output)

    def _full_gradient(self: Any, number: int, batches: Iterator[Any], takes_number: bool) -> Vector:
        """Return the gradient of the mean loss over all samples of a client; only its random stream goes on."""
        replicas, sizes = self._require_replicas(), self._clients.full_pass(number)
        buffers = clone_tree(replicas.buffers(replicas.active))
        replicas.drop_gradients()
        with private.logs_apart(self.lightning_module.trainer):
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

    def _training_inputs(self: Any) -> Tensor:
        """Return the inputs of one batch of the first client."""
        batch = next(batch for _, _, batch in self.client_batches([0]))
        inputs = batch[0] if isinstance(batch, list | tuple) else batch
        if not isinstance(inputs, Tensor):
            raise MisconfigurationException(
                f"{self.aggregator!r} draws noise shaped like the training inputs, which have to be tensors; got "
                f"{type(inputs).__name__}."
            )
        return inputs

    def _validation_batches(self: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Give all validation data, whichever part of it this rank validates on."""
        trainer = self.lightning_module.trainer
        for loader in private.validation_loaders(trainer):
            for batch in loader:
                batch = private.to_device(trainer, batch)
                if not isinstance(batch, list | tuple) or len(batch) != 2:
                    raise MisconfigurationException(
                        f"{self.aggregator!r} evaluates models on validation data, whose batches have to be pairs of inputs "
                        f"and targets; got {type(batch).__name__}."
                    )
                yield batch[0], batch[1]

    def _zero_gradients(self: Any, optimizer: Optimizer, k: int) -> None:
        if not self._needs.zeroing:
            self._require_replicas().drop_gradients()
            return
        module = self.lightning_module
        for callback in module.trainer.callbacks:
            callback.on_before_zero_grad(module.trainer, module, optimizer)
        module.on_before_zero_grad(optimizer)
        module.optimizer_zero_grad(module.current_epoch, k, optimizer)

    def _backward(self: Any, loss: Tensor, optimizer: Optimizer) -> None:
        if not self._needs.backward:
            loss.backward()
            return
        loss = self.precision_plugin.pre_backward(loss, self.lightning_module)
        self.precision_plugin.backward(loss, self.lightning_module, optimizer)
        self.precision_plugin.post_backward(loss, self.lightning_module)

    def _transform(self: Any, client: Client) -> None:
        replicas = self._require_replicas()
        replicas.collect_gradients()
        if not client.gradients:
            client.gradients = tuple(block[replicas.active] for block in replicas.gradients)
        self.algorithm.aggregator.transform_gradients(client)
        if self.algorithm.prototypes is not None:  # optimizers leave alone what has no gradient
            own = set(self.algorithm.group(client.number).slots)
            replicas.drop_gradients(k for k in range(len(replicas.slots)) if k not in own)
