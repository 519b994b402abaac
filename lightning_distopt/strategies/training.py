"""A training step of all replicas of a rank, with the algorithm's hooks around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import Optimizer

from lightning_distopt.strategies import _lightning as private
from lightning_distopt.strategies.gradients import AveragingDDP
from lightning_distopt.strategies.loaders import CyclingLoader, ReplicaLoader


class TrainingMixin:
    """Forward and backward passes, gradients, optimizer steps and rounds, for a strategy."""

    _ddp: AveragingDDP | None

    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> None:
        """Collect the batches of the other rows."""
        self._round = False
        if batch_idx == 0:  # an epoch may have brought new loaders, and trains what the first one did
            if self.num_replicas > 1:
                self._require_replicas().check_frozen()
            current: list[Any] = []
            kinds = (ReplicaLoader, CyclingLoader)
            apply_to_collection(self.lightning_module.trainer.train_dataloader, kinds, current.append)
            self._loaders = current
        if self.replicas_per_device > 1:
            loaders = self.lightning_module.trainer.train_dataloader
            self._batches = [batch]
            for row in range(1, self.replicas_per_device):
                one = apply_to_collection(loaders, ReplicaLoader, lambda of, r=row: of.queue[0][r - 1] if of.queue else None)
                self._batches.append(one)
            for loader in self._loaders:
                if loader.queue:
                    loader.queue.popleft()

    def _transfer_batch(self: Any, row: int) -> None:
        """Bring the batch of a row to the device with the user's hooks, as Lightning did with that of row 0."""
        if row:
            self._batches[row] = private.to_device(self.lightning_module.trainer, self._batches[row])

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the user's `training_step` on the active replica."""
        if not self._in_step:
            self._begin_step()
        if self.replicas_per_device > 1:  # Lightning knows one batch, that of row 0
            args = (self._batches[self._require_replicas().active], *args[1:])
        if self._recalibration is not None:
            self._recalibration.remember(self.replicas.active, args, kwargs)
        output = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self._manual:
            self._end_step()
        return output

    def _begin_step(self: Any) -> None:
        self._in_step = True
        self.algorithm.before_step(self.steps)
        if self._can_use_ddp:
            group = self.algorithm.gradient_group(self.steps)
            if group > 1 or self._ddp is not None:
                self._select_ddp(group)

    def _select_ddp(self: Any, group: int) -> None:
        """Forward through torch's DDP where gradients are averaged, else around it."""
        if self._ddp is not None and self._ddp.group_size != group:
            self._drop_ddp()
        if self._ddp is None and group > 1:
            self._ddp = AveragingDDP(self.lightning_module, self.communicator, group, self._ddp_kwargs)
            self.model = self._ddp.module

    def _drop_ddp(self: Any) -> None:
        """Forward around torch's DDP again, and free it."""
        if self._ddp is not None:
            self._ddp.close()
            self._ddp, self.model = None, self.lightning_module

    @contextmanager
    def block_backward_sync(self: Any) -> Iterator[None]:
        """Keep the gradients of accumulating batches on the rank, for which DDP has to be there already."""
        if not self._in_step:
            self._begin_step()
        with super().block_backward_sync():  # type: ignore[misc]
            yield

    def pre_backward(self: Any, closure_loss: Tensor) -> None:
        """Prepare DDP, where it is used."""
        if self._ddp is not None:
            super().pre_backward(closure_loss)  # type: ignore[misc]

    def post_backward(self: Any, closure_loss: Tensor) -> None:
        """Note how long the backward pass has waited for gradients of others."""
        if self._ddp is not None:
            self._ddp.note_waiting()
            super().post_backward(closure_loss)  # type: ignore[misc]

    @property
    def handles_gradient_accumulation(self: Any) -> bool:
        """True while gradients accumulate with `m > 1`: Lightning would run the batch of one replica only."""
        return (
            self.replicas_per_device > 1
            and self.lightning_module is not None
            and private.more_batches_follow(self.lightning_module.trainer)
        )

    def optimizer_step(self: Any, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Step every replica of this rank, with the algorithm's hooks around it."""
        if self._manual:
            return Strategy.optimizer_step(self, optimizer, closure, model, **kwargs)
        if self.replicas_per_device > 1:
            return self._step_rows(optimizer, closure)
        if not self._in_step:
            self._begin_step()
        if self.algorithm.transforms_gradients:
            closure = self._reducing(closure)
        output = Strategy.optimizer_step(self, optimizer, closure, model, **kwargs)
        self._end_step()
        return output

    def _reducing(self: Any, closure: Callable[[], Any]) -> Callable[[], Any]:
        def reduced() -> Any:
            output = closure()
            self._require_replicas().collect_gradients()
            if self._ddp is None:
                self.algorithm.reduce_gradients(self.steps)
            return output

        return reduced

    def _step_rows(self: Any, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
        """One step of all rows. Rows run backwards, so that row 0, which everybody sees between steps, is left active."""
        replicas, trainer = self._require_replicas(), self.lightning_module.trainer
        accumulating = private.is_accumulating(trainer)
        if not self._in_step:
            self._begin_step()
        keep = self.algorithm.transforms_gradients or self.algorithm.gradient_group(self.steps) > 1
        fused = not keep and not accumulating
        logs: list[dict[str, Any]] = []
        output = None
        rows = range(self.replicas_per_device - 1, -1, -1)
        for row in rows:
            replicas.activate(row)
            self._transfer_batch(row)
            private.log_batch(trainer, self._batches[row])
            output = closure()
            logs.append(private.step_logs(trainer))
            if keep and not accumulating:
                replicas.collect_gradients()
            elif fused:
                self._step_row(optimizer, row)
        private.set_step_logs(trainer, _means(logs))
        if accumulating:
            return output
        if keep:
            self.algorithm.reduce_gradients(self.steps)
            unused = self._unused()
            for row in rows:
                replicas.activate(row)
                replicas.drop_gradients(unused[row])
                private.clip_gradients(self, optimizer)
            if self.algorithm.transforms_gradients:
                self.algorithm.transform_gradients(self.steps)
            for row in rows:
                replicas.activate(row)
                self._step_optimizer(optimizer)
        self._end_step()
        return output

    def _unused(self: Any) -> list[set[int]]:
        """Return the parameters of each row to which the average has no gradient; optimizers leave them alone, as with DDP.

        Several ranks compare notes if DDP's `find_unused_parameters` asks for it; else all parameters count as used.
        """
        if self.algorithm.transforms_gradients or (self.world_size > 1 and not self._ddp_kwargs.get("find_unused_parameters")):
            return [set() for _ in range(self.replicas_per_device)]
        group = self.algorithm.gradient_group(self.steps)
        return self._require_replicas().unused(self._require_communicator(), group)

    def _step_row(self: Any, optimizer: Optimizer, row: int) -> None:
        private.clip_gradients(self, optimizer)
        self._step_optimizer(optimizer)
        if row:
            self._require_replicas().drop_gradients()

    def _step_optimizer(self: Any, optimizer: Optimizer) -> None:
        """Step the active replica, at the point that the algorithm wants it to be stepped from."""
        if not self.algorithm.steps_elsewhere:
            return self._step_active(optimizer)
        self.algorithm.before_update()
        try:
            return self._step_active(optimizer)
        finally:
            self.algorithm.after_update()

    def _step_active(self: Any, optimizer: Optimizer) -> None:
        """Step; the first time shows whether the optimizer keeps state where replicas would share it."""
        if self._stepped:
            optimizer.step()
            return
        before = [dict(group) for group in optimizer.param_groups]
        optimizer.step()
        self._stepped = True
        for old, new in zip(before, optimizer.param_groups, strict=True):
            changed = [key for key in new if key != "params" and old.get(key) is not new[key] and old.get(key) != new[key]]
            if changed:
                name = type(getattr(optimizer, "optimizer", optimizer)).__name__
                raise MisconfigurationException(
                    f"{name} keeps `{changed[0]}`, which changes with every step, in its `param_groups`, which the replicas "
                    "of one process share: use `replicas_per_device=1`."
                )

    def _end_step(self: Any) -> None:
        if self.algorithm.ends_round(self.steps) and self.num_replicas > 1:
            if self.algorithm.gradient_group(self.steps) < self.num_replicas:
                self._check_finite()
            self._call_round_hook("on_before_round")
        group = self.algorithm.after_step(self.steps)
        if group:
            self._finish_round(group)
            if self.num_replicas > 1:
                self._call_round_hook("on_after_round", group)
        self.steps += 1
        self._in_step = False

    def _call_round_hook(self: Any, name: str, *args: Any) -> None:
        """Call a hook that callbacks for this package have beside Lightning's."""
        for callback in self._round_callbacks:
            if hasattr(callback, name):
                getattr(callback, name)(self.lightning_module.trainer, self.lightning_module, *args)

    def _finish_round(self: Any, group: int) -> None:
        """Apply the policies to the replicas that have just come to agree."""
        replicas, communicator = self._require_replicas(), self._require_communicator()
        self._round = True
        if self.num_replicas == 1:
            return
        replicas.check_frozen()

        def combine(block: Tensor) -> None:
            self.algorithm.combine(block, group)

        if self.buffers == "average":
            replicas.average_buffers(combine)
        if self.algorithm.gradient_group(self.steps) != group:  # where gradients were averaged over it, states are equal
            if self.optimizer_state_policy == "average":
                replicas.average_optimizer_state(communicator, combine)
            elif self.optimizer_state_policy == "average_all":
                replicas.average_optimizer_state(communicator, communicator.mean)
            elif self.optimizer_state_policy == "reset":
                replicas.reset_optimizer_state()
        for loader in self._loaders:
            if isinstance(loader, CyclingLoader):
                loader.agree(communicator)


def _means(logs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of every value over the rows that logged it."""
    keys = {key for row in logs for key in row}
    return {key: torch.stack([row[key].float() for row in logs if key in row]).mean() for key in keys}
