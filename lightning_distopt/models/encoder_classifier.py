"""Ordinary LightningModules that fine-tune an encoder of `transformers`: one class for a text, or one for each word."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassMatthewsCorrCoef

from lightning_distopt.models.classifier import parameter_groups
from lightning_distopt.models.hyperparameters import keep_hyperparameters
from lightning_distopt.models.schedules import training_steps, warm_up, with_schedule
from lightning_distopt.models.spans import SpanF1
from lightning_distopt.options import check_choice

__all__ = ["EncoderClassifier", "EncoderTagger"]

Batch = dict[str, Tensor]

_LOSS = nn.CrossEntropyLoss()
"""It passes over tokens whose label is its `ignore_index`, -100: those that are not the last of a word."""


class EncoderModule(LightningModule):
    """What `EncoderClassifier` and `EncoderTagger` share: an encoder with a head, trained by cross entropy and AdamW.

    The learning rate of step `t` (from 0), with `w` steps of warm-up and `T` steps in all, is `lr * f(t)`:

    - `f(t) = (t + 1) / w` while `t < w`, then
    - `f(t) = 1` (`"constant"`) or `(T - t) / (T - w)` (`"linear"`).

    Nothing in it knows about replicas, masks or pruning. What callbacks freeze is left to them: only parameters that require
    gradients when training starts get an optimizer.

    Example:
        >>> issubclass(EncoderTagger, EncoderModule)
        True

    Args:
        model: the folder of a pretrained encoder (see `find_encoder`), or for random weights a configuration of transformers,
            as an object or a dictionary with its `model_type`; or a network that returns an object with `logits`, which is not
            written to the hyperparameters unless it has a `config` of transformers.
        classes: names of the classes, or their number.
        lr: peak learning rate.
        weight_decay: of AdamW, on every parameter but biases and norms; 0 is Adam.
        schedule: `"constant"`, or `"linear"` to zero at the end of training.
        warmup_share: share of the steps in which the learning rate grows linearly.

    Raises:
        FileNotFoundError: if the folder is no pretrained encoder's.
        ImportError: if transformers is missing.
        ValueError: if an option is out of its range.
    """

    auto_class: str
    """The class of transformers that adds the right head to an encoder."""

    def __init__(
        self,
        model: str | os.PathLike[str] | dict[str, Any] | Any,
        classes: int | Sequence[str],
        lr: float = 5e-5,
        weight_decay: float = 0.0,
        schedule: str = "constant",
        warmup_share: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("schedule", schedule, ("constant", "linear"))
        if not 0 <= warmup_share < 1:
            raise ValueError(f"warmup_share is a share of all steps, from 0 up to 1, but is {warmup_share}.")
        names = [str(k) for k in range(classes)] if isinstance(classes, int) else list(classes)
        if len(names) < 2:
            raise ValueError(f"There must be at least two classes, but classes={classes!r}.")
        keep_hyperparameters(self, ignore=["model"])
        self.model = _build(self.auto_class, model, len(names))
        if "model" not in self.hparams and hasattr(self.model, "config"):
            # The configuration is enough to load a checkpoint, which has the weights: the folder needn't be there any more.
            config: Any = self.model.config
            self.hparams["model"] = json.loads(config.to_json_string(use_diff=False))
        self.classes = names
        self.lr = lr
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.warmup_share = warmup_share
        self.metrics = nn.ModuleDict({f"{stage}_scores": nn.ModuleDict(self.make_metrics()) for stage in ("val", "test")})

    def make_metrics(self) -> dict[str, Metric]:
        """Return the metrics of evaluation, by the name that they are logged under."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Tensor:
        """Map a batch to logits, `[B, classes]`, or `[B, T, classes]` for tagging."""
        return cast(Tensor, self.model(**{name: value for name, value in batch.items() if name != "labels"}).logits)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean cross entropy of a batch."""
        loss = _cross_entropy(self(batch), batch["labels"])
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update `val_loss` and the metrics."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Update `test_loss` and the metrics."""
        self._evaluate("test", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the logits."""
        return cast(Tensor, self(batch))

    def _evaluate(self, stage: str, batch: Batch) -> None:
        labels, logits = batch["labels"], self(batch)
        # Of a batch of sentences, each word counts the same, in the loss as in the accuracy.
        weight = int((labels != _LOSS.ignore_index).sum())
        self.log(f"{stage}_loss", _cross_entropy(logits, labels), batch_size=weight, sync_dist=True)
        for name, metric in cast(nn.ModuleDict, self.metrics[f"{stage}_scores"]).items():
            metric(logits.argmax(dim=-1), labels)
            self.log(f"{stage}_{name}", cast(Metric, metric), batch_size=weight, prog_bar=name == "accuracy")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW for the parameters that require gradients, with a scheduler unless the learning rate is constant.

        Raises:
            ValueError: if the schedule needs the length of training and the trainer cannot tell it.
        """
        groups = parameter_groups(self.model, self.weight_decay)
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
        optimizer = AdamW([group for group in groups if group["params"]], lr=self.lr)
        if self.schedule == "constant" and self.warmup_share == 0:
            return optimizer
        total = training_steps(self.trainer)
        if math.isinf(total):
            raise ValueError("The schedule needs to know when training ends: set max_epochs or max_steps.")
        warmup = round(self.warmup_share * total)

        def factor(step: int) -> float:
            # f(t) = 1, or (T - t) / (T - w)
            return 1.0 if self.schedule == "constant" else max(0.0, (total - step) / max(1, total - warmup))

        return with_schedule(optimizer, warm_up(warmup, factor))


class EncoderClassifier(EncoderModule):
    """An encoder with a classifier on what its pooler makes of the first token ([CLS]).

    It logs `train_loss` at steps, and at the end of evaluation epochs `val_loss`, `val_accuracy` and `val_mcc` (Matthews'
    correlation, which CoLA is measured by), or `test_...`.

    Example:
        >>> import pytest, torch
        >>> transformers = pytest.importorskip("transformers")
        >>> tiny = transformers.BertConfig(
        ...     vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        ... )
        >>> module = EncoderClassifier(tiny, classes=3)
        >>> module({"input_ids": torch.ones(2, 5, dtype=torch.int64)}).shape
        torch.Size([2, 3])

    Args:
        model: the folder of a pretrained encoder (see `find_encoder`), or for random weights a configuration of transformers,
            as an object or a dictionary with its `model_type`; or a network that returns an object with `logits`, which is not
            written to the hyperparameters unless it has a `config` of transformers.
        classes: names of the classes, or their number.
        lr: peak learning rate.
        weight_decay: of AdamW, on every parameter but biases and norms; 0 is Adam.
        schedule: `"constant"`, or `"linear"` to zero at the end of training.
        warmup_share: share of the steps in which the learning rate grows linearly.

    Raises:
        FileNotFoundError: if the folder is no pretrained encoder's.
        ImportError: if transformers is missing.
        ValueError: if an option is out of its range.

    Reference: Devlin et al.: BERT. NAACL 2019. T. Lin: Optimization for deep learning in distributed and heterogeneous systems,
    section 7.2.
    """

    auto_class = "AutoModelForSequenceClassification"

    def make_metrics(self) -> dict[str, Metric]:
        """Return accuracy and Matthews' correlation."""
        count = len(self.classes)
        return {"accuracy": MulticlassAccuracy(count, average="micro"), "mcc": MulticlassMatthewsCorrCoef(count)}


class EncoderTagger(EncoderModule):
    """An encoder with a linear classifier at the last token of every word, for parts of speech or names.

    Labels are -100 at all other tokens, where neither the loss nor the metrics look. There are no dependencies between tags.
    It logs what `EncoderClassifier` logs, with accuracy over words, and `val_f1` of spans in place of `val_mcc` if classes have
    names such as `B-person` (see `SpanF1`).

    Example:
        >>> import pytest, torch
        >>> transformers = pytest.importorskip("transformers")
        >>> tiny = transformers.BertConfig(
        ...     vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        ... )
        >>> module = EncoderTagger(tiny, classes=["O", "B-name", "I-name"])
        >>> module({"input_ids": torch.ones(2, 5, dtype=torch.int64)}).shape
        torch.Size([2, 5, 3])

    Args:
        model: the folder of a pretrained encoder (see `find_encoder`), or for random weights a configuration of transformers,
            as an object or a dictionary with its `model_type`; or a network that returns an object with `logits`, which is not
            written to the hyperparameters unless it has a `config` of transformers.
        classes: names of the tags, or their number.
        lr: peak learning rate.
        weight_decay: of AdamW, on every parameter but biases and norms; 0 is Adam.
        schedule: `"constant"`, or `"linear"` to zero at the end of training.
        warmup_share: share of the steps in which the learning rate grows linearly.

    Raises:
        FileNotFoundError: if the folder is no pretrained encoder's.
        ImportError: if transformers is missing.
        ValueError: if an option is out of its range.

    Reference: T. Lin: Optimization for deep learning in distributed and heterogeneous systems, section 7.2.
    """

    auto_class = "AutoModelForTokenClassification"

    def make_metrics(self) -> dict[str, Metric]:
        """Return the accuracy over words, and the F1 score of spans if tags describe them."""
        words = MulticlassAccuracy(len(self.classes), average="micro", ignore_index=_LOSS.ignore_index)
        metrics: dict[str, Metric] = {"accuracy": words}
        if any(name.startswith(("B-", "I-")) for name in self.classes):
            metrics["f1"] = SpanF1(self.classes)
        return metrics


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return cast(Tensor, _LOSS(logits.flatten(0, -2), labels.flatten()))


def _build(auto_class: str, model: Any, count: int) -> nn.Module:
    """Return the network; one that is read from a folder is in training mode like all others."""
    if isinstance(model, nn.Module):
        return model
    try:
        import transformers
    except ImportError as error:
        raise ImportError("Encoders come from transformers, which is missing: pip install 'lightning-distopt[nlp]'.") from error
    auto = getattr(transformers, auto_class)
    if isinstance(model, dict):
        if "model_type" not in model:
            raise ValueError("A configuration that is a dictionary needs its `model_type`, such as 'bert'.")
        options = {name: value for name, value in model.items() if name != "model_type"}
        model = transformers.AutoConfig.for_model(model["model_type"], **options)
    if isinstance(model, str | os.PathLike):
        folder = Path(model).expanduser()
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder} has no config.json, so it is no folder of a pretrained encoder; nothing is downloaded, so name a "
                "local one, or give a configuration for random weights."
            )
        with _quiet(transformers):  # that the head is new is what we want
            network = auto.from_pretrained(str(folder), num_labels=count, local_files_only=True)
    else:
        model = copy.deepcopy(model)
        model.num_labels = count
        network = auto.from_config(model)
    return cast(nn.Module, network.train())


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    logging = transformers.utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
