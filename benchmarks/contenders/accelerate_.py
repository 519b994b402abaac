"""accelerate's LocalSGD, as its documentation has it."""

from __future__ import annotations

from benchmarks.contenders.task import Pace, Task


def loop(task: Task, pace: Pace, period: int) -> None:
    """Train with rounds every `period` steps."""
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD

    accelerator = Accelerator(cpu=True)
    made = task.module.configure_optimizers()
    schedule = made["lr_scheduler"]["scheduler"]  # not prepared: it would make a step for every rank
    network, optimizer = accelerator.prepare(task.module.network, made["optimizer"])
    with LocalSGD(accelerator=accelerator, model=network, local_sgd_steps=period) as local_sgd:
        pace.begin()
        for images, labels in task.batches():
            optimizer.zero_grad()
            accelerator.backward(task.module.loss(network(images), labels))
            optimizer.step()
            schedule.step()
            local_sgd.step()
            pace.step()
