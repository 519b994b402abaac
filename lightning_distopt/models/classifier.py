"""An ordinary LightningModule for image classification."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD
from torchmetrics.classification import MulticlassAccuracy

from lightning_distopt.models.hyperparameters import keep_hyperparameters
from lightning_distopt.models.registry import build_model
from lightning_distopt.models.schedules import training_steps, warm_up, with_schedule
from lightning_distopt.options import check_choice

__all__ = ["ImageClassifier"]

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


class ImageClassifier(LightningModule):
    """Cross entropy and SGD for any network that maps images to logits.

    The learning rate of optimizer step `t` (from 0), with `w` steps of warm-up and `T` steps in all, is `lr * f(t)`:

    - `f(t) = (t + 1) / w` while `t < w`, then
    - `f(t) = 1` (`"constant"`), `(1 + cos(pi (t - w) / (T - w))) / 2` (`"cosine"`), or `0.1^k` after `k` milestones.

    Nothing in it knows about replicas or communication: it trains under any strategy. It logs `train_loss` at steps and
    `val_loss`, `val_accuracy`, `test_loss`, `test_accuracy` at the end of evaluation epochs.

    Example:
        >>> import torch
        >>> module = ImageClassifier("resnet8", model_options={"in_channels": 1}, lr=0.05, schedule="cosine")
        >>> module(torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 10])

    Args:
        model: a name that `build_model` knows, or a network mapping `[B, ...]` to logits `[B, num_classes]`. A network
            passed as an object is not written to the hyperparameters: `load_from_checkpoint` then needs `model=` again
            (not so with LightningCLI, which writes its configuration).
        model_options: arguments for a network given by name, such as `{"in_channels": 1}`.
        num_classes: number of classes.
        lr: peak learning rate.
        momentum: momentum of SGD.
        nesterov: Nesterov's form of the momentum.
        weight_decay: L2 coefficient, on every parameter but biases and the parameters of norm layers.
        schedule: `"constant"`, `"cosine"` (to zero at the end of training), or the epochs after which the rate is
            divided by 10, such as `[150, 225]`.
        warmup_epochs: epochs of linear warm-up, fractions allowed. Milestones count from the start of training all the
            same.

    Raises:
        ValueError: if the schedule is unknown, `warmup_epochs` is negative, or `model_options` comes with an object.

    Reference: Loshchilov, Hutter: SGDR. ICLR 2017 (cosine). Goyal et al.: Accurate, large minibatch SGD. 2017 (warm-up).
    """

    def __init__(
        self,
        model: str | nn.Module = "resnet20",
        model_options: dict[str, Any] | None = None,
        num_classes: int = 10,
        lr: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 1e-4,
        schedule: str | list[int] = "constant",
        warmup_epochs: float = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(schedule, str):
            check_choice("schedule", schedule, ("constant", "cosine"))
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must not be negative, but is {warmup_epochs}.")
        if model_options and not isinstance(model, str):
            raise ValueError("model_options are for a model given by name; set up the model object itself instead.")
        keep_hyperparameters(self, ignore=[] if isinstance(model, str) else ["model"])
        if isinstance(model, str):
            model = build_model(model, num_classes=num_classes, **(model_options or {}))
        self.model = model
        self.lr = lr
        self.momentum = momentum
        self.nesterov = nesterov
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.warmup_epochs = warmup_epochs
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits `[B, num_classes]`."""
        return cast(Tensor, self.model(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross entropy of a batch `(images, labels)`."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Update `val_loss` and `val_accuracy`."""
        self._evaluate("val", batch, self.val_accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Update `test_loss` and `test_accuracy`."""
        self._evaluate("test", batch, self.test_accuracy)

    def predict_step(self, batch: Tensor | Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the predicted classes `[B]` of images, or of the images of a batch `(images, labels)`."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return cast(Tensor, self(images).argmax(dim=1))

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor], accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        logits = self(images)
        accuracy(logits, labels)
        self.log(f"{stage}_loss", F.cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)
        self.log(f"{stage}_accuracy", accuracy, batch_size=len(labels), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return SGD, with a scheduler that acts at every step unless the learning rate is constant.

        Raises:
            ValueError: if the schedule needs the length of training and the trainer cannot tell it.
        """
        optimizer = SGD(
            parameter_groups(self.model, self.weight_decay), lr=self.lr, momentum=self.momentum, nesterov=self.nesterov
        )
        if self.schedule == "constant" and self.warmup_epochs == 0:
            return optimizer
        return with_schedule(optimizer, self._lr_factor())

    def _lr_factor(self) -> Callable[[int], float]:
        total = training_steps(self.trainer)
        if self.schedule == "cosine" and math.isinf(total):
            raise ValueError('schedule="cosine" needs to know when training ends: set max_epochs or max_steps.')
        epoch_steps = 0
        if self.warmup_epochs > 0 or not isinstance(self.schedule, str):
            # estimated_stepping_batches loads the data only where it needs the loader's length itself.
            self.trainer.fit_loop.setup_data()
            batches = self.trainer.num_training_batches
            if math.isinf(batches):
                raise ValueError("Warm-up and milestones count epochs: the training loader needs a length.")
            epoch_steps = math.ceil(batches / self.trainer.accumulate_grad_batches)
        warmup = round(self.warmup_epochs * epoch_steps)
        milestones = () if isinstance(self.schedule, str) else tuple(epoch * epoch_steps for epoch in self.schedule)

        def factor(step: int) -> float:
            if self.schedule == "cosine":
                # f(t) = (1 + cos(pi (t - w) / (T - w))) / 2
                progress = (step - warmup) / max(1.0, total - warmup)
                return (1 + math.cos(math.pi * min(1.0, progress))) / 2
            # f(t) = 0.1^k after k milestones
            return float(0.1 ** sum(step >= milestone for milestone in milestones))

        return warm_up(warmup, factor)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters into those that decay and those (biases, norm layers) that do not."""
    decay: dict[int, nn.Parameter] = {}
    plain: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            group = plain if isinstance(module, _NORMS) or parameter.ndim <= 1 else decay
            group[id(parameter)] = parameter
    plain = {key: parameter for key, parameter in plain.items() if key not in decay}
    groups = [
        {"params": list(decay.values()), "weight_decay": weight_decay},
        {"params": list(plain.values()), "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
