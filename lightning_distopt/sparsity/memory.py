"""What several tasks take with masks and with fine-tuned copies: the accounting of table 16.5."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from lightning_distopt.sparsity.encoder_layers import encoder_layers, find_encoders
from lightning_distopt.sparsity.weights import weight_of

FLOAT = 4
"""Bytes of a parameter."""


@dataclass(frozen=True)
class EncoderSize:
    """The numbers of an encoder that memory depends on.

    Example:
        >>> EncoderSize(109_482_240, masked_weights(), 768)
        EncoderSize(parameters=109482240, masked=71368704, hidden=768)

    Attributes:
        parameters: of the encoder.
        masked: weights of it that have a mask.
        hidden: inputs of a classifier.
    """

    parameters: int
    masked: int
    hidden: int

    @classmethod
    def of(cls, model: nn.Module, layers: Iterable[str] | None = None) -> EncoderSize:
        """Read the numbers off a model, which may be on the device "meta".

        Args:
            model: one of `transformers`, or one that holds it.
            layers: names of the masked layers; None: those that `WeightMasking` chooses. A classifier is not counted.

        Raises:
            ValueError: if there is not one encoder in it.
        """
        encoders = find_encoders(model)
        if len(encoders) != 1:
            raise ValueError(
                f"The size is that of one pretrained model of `transformers`, and {type(model).__name__} holds {len(encoders)}."
            )
        ((name, encoder),) = encoders.items()
        chosen = encoder_layers(model) if layers is None else layers
        inside = [layer for layer in chosen if not name or layer.startswith(f"{name}.")]
        masked = sum(weight_of(model.get_submodule(layer)).numel() for layer in inside)
        hidden: int = encoder.config.hidden_size  # type: ignore[union-attr, assignment]
        return cls(sum(p.numel() for p in encoder.parameters()), masked, hidden)


def masked_weights(blocks: int = 10, hidden: int = 768, intermediate: int = 3072, pooler: bool = True) -> int:
    r"""Return the number of masked weights: four attention matrices and two of the feed-forward part in each block.

    $$ \text{blocks} \cdot (4 h^2 + 2 h f) + h^2 $$

    Example:
        >>> masked_weights()  # blocks 2 to 11 of BERT-base, and the pooler
        71368704

    Args:
        blocks: that are masked.
        hidden: `h`.
        intermediate: `f`.
        pooler: whether it is masked too.
    """
    return blocks * (4 * hidden**2 + 2 * hidden * intermediate) + hidden**2 * pooler


@dataclass(frozen=True)
class TaskRow:
    """A row of the table: what a task adds.

    Attributes:
        task: its name, or "Pretrained".
        fine_tuning: floats that fine-tuning adds: the classifier, and from the second task on a copy of the encoder.
        floats: that masking adds: the classifier, unless a task with as many outputs has it.
        bits: that masking adds: of the encoder, of the classifier.
    """

    task: str
    fine_tuning: tuple[int, ...]
    floats: int
    bits: tuple[int, ...]

    @property
    def fine_tuning_kb(self) -> float:
        """Kilobytes (1000 bytes) of fine-tuning."""
        return sum(self.fine_tuning) * FLOAT / 1000

    @property
    def masking_kb(self) -> float:
        """Kilobytes (1000 bytes) of masking."""
        return (self.floats * FLOAT + sum(self.bits) / 8) / 1000


def task_rows(encoder: EncoderSize, outputs: Mapping[str, int]) -> list[TaskRow]:
    """Return the rows of table 16.5: the pretrained encoder, then each task.

    The pretrained weights are what masking shares, and the copy that fine-tuning makes for the first task. Classifiers are
    matrices without bias; with masking they are random and frozen, so tasks with as many outputs share one.

    Example:
        >>> rows = task_rows(EncoderSize(109_482_240, masked_weights(), 768), {"MRPC": 2, "SST2": 2})
        >>> [round(row.masking_kb, 3) for row in rows]
        [437928.96, 8927.424, 8921.28]
        >>> [round(row.fine_tuning_kb, 3) for row in rows]
        [437928.96, 6.144, 437935.104]

    Args:
        encoder: its numbers.
        outputs: of each task's classifier.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, table 16.5.
    """
    rows = [TaskRow("Pretrained", (encoder.parameters,), encoder.parameters, ())]
    known: set[int] = set()
    for k, (task, count) in enumerate(outputs.items()):
        classifier = encoder.hidden * count
        copies = (classifier, encoder.parameters) if k else (classifier,)
        rows.append(TaskRow(task, copies, 0 if count in known else classifier, (encoder.masked, classifier)))
        known.add(count)
    return rows


def cumulative_megabytes(encoder: EncoderSize, tasks: int) -> list[tuple[float, float]]:
    """Return what 1, 2, ... tasks take with fine-tuning and with masking, without classifiers, in MB (10^6 bytes).

    Example:
        >>> [(round(a, 1), round(b, 1)) for a, b in cumulative_megabytes(EncoderSize(109_482_240, masked_weights(), 768), 2)]
        [(437.9, 446.9), (875.9, 455.8)]

    Args:
        encoder: its numbers.
        tasks: how many there are in the end.
    """
    base, mask = encoder.parameters * FLOAT / 1e6, encoder.masked / 8 / 1e6
    return [(base * k, base + mask * k) for k in range(1, tasks + 1)]
