"""Gradient averaging by torch's DDP, counted."""

# Annotations stay objects here: torch checks those of the communication hook.
import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_distopt.communication import Communicator, all_reduce_bytes
from lightning_distopt.communication.traffic import now


class AveragingDDP:
    """torch's DDP around a module over groups of replicas, with its traffic charged to the communicator.

    Args:
        module: the module, whose replicas are equal inside a group.
        communicator: with one replica per rank.
        group_size: ranks over which gradients are averaged.
        options: for `DistributedDataParallel`.
    """

    def __init__(self, module: nn.Module, communicator: Communicator, group_size: int, options: dict[str, Any]) -> None:
        self.group_size = group_size
        self._traffic = communicator.traffic
        self._group = communicator.process_group(group_size)
        self._launched: Any = None  # a time, on CUDA an event
        device = self._device = communicator.device
        # Replicas own their buffers. Newer versions of torch have another name for the option.
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        if "broadcast_buffers" not in options:
            options = {name: False, **options}
        if "init_sync" in known:  # replicas are equal already, and own their buffers
            options = {"init_sync": False, **options}
        ids = [device.index] if device.type == "cuda" else None
        buffers = [buffer.clone() for buffer in module.buffers()]
        self.module = DistributedDataParallel(module, device_ids=ids, process_group=self._group, **options)
        for buffer, own in zip(module.buffers(), buffers, strict=True):
            buffer.copy_(own)  # which older versions have just replaced by those of the first rank
        self.module.register_comm_hook(None, self._all_reduce)
        self._settling = True  # nothing travels
        # A static graph is what the first pass shows, and that must be the user's; there a resume may differ in the last bit.
        if not options.get("static_graph"):
            self._settle_buckets(module)
        self._settling = False

    def _settle_buckets(self, module: nn.Module) -> None:
        """Let DDP lay out its buckets now, in an order that follows from the module alone.

        DDP does so after its first backward pass, in the order in which gradients came. The sums of an all-reduce depend on
        where a value lies, so a resumed run, whose first pass is a later one, would differ in the last bit.
        """
        parameters = [p for p in module.parameters() if p.requires_grad]
        forward = module.__dict__.get("forward")
        module.__dict__["forward"] = lambda: sum((p * 0).sum() for p in parameters)
        try:
            with torch.enable_grad():
                self.module().backward()
        finally:
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward
            for parameter in parameters:
                parameter.grad = None

    def _all_reduce(self, _: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        gradients = bucket.buffer()
        if self._settling:  # zeros, on all ranks
            future: torch.futures.Future[Tensor] = torch.futures.Future()
            future.set_result(gradients)
            return future
        self._traffic.bytes_sent += all_reduce_bytes(gradients.numel(), gradients.element_size(), self.group_size)
        if bucket.is_last():
            self._launched = now(self._device)
        future = dist.all_reduce(gradients.div_(self.group_size), group=self._group, async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    def close(self) -> None:
        """Let go of the group, which the frames of an exception would keep, and of what keeps this object and its buckets."""
        for owner, names in ((self, ["_group"]), (self.module, ["process_group", "reducer", "logger"])):
            for name in names:
                setattr(owner, name, None)

    def note_waiting(self) -> None:
        """Charge the time from the launch of the last bucket to now, the end of the backward pass, as waiting."""
        if self._launched is not None:
            self._traffic.add_interval(self._launched, now(self._device))
            self._launched = None
