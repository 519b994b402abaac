"""Named spans among the words of a sentence, and how many of them are found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["SpanF1", "spans"]


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return the spans that tags describe: kind, first word, and the word after the last.

    `B-` (or `S-`) begins a span; `I-` (or `E-`) goes on with a span of its kind, or begins one where there is none, as CoNLL's
    evaluation has it; `S-` and `E-` end it. So this reads the schemes IOB1, IOB2 (BIO) and IOBES.

    Example:
        >>> sorted(spans(["B-person", "I-person", "O", "I-place", "B-place"]))
        [('person', 0, 2), ('place', 3, 4), ('place', 4, 5)]

    Args:
        tags: of the words of a sentence: `O`, or a letter, a hyphen and a kind.

    Returns:
        The spans.

    Reference: Tjong Kim Sang, De Meulder: Introduction to the CoNLL-2003 shared task. CoNLL 2003.
    """
    found, start, before = set(), 0, "O"
    for place, tag in enumerate([*tags, "O"]):
        goes_on = tag[0] in "IE" and before[0] in "BI" and tag[2:] == before[2:]
        if not goes_on:
            if before != "O":
                found.add((before[2:], start, place))
            start = place
        before = tag
    return found


class SpanF1(Metric):
    r"""How many spans are found, over all sentences and kinds (micro average).

    $$ F_1 = \frac{2 \cdot \text{right}}{\text{predicted} + \text{true}} $$

    A span is right if its kind and both ends are. Without any spans, it is 0.

    Example:
        >>> metric = SpanF1(["O", "B-x", "I-x"])
        >>> metric.update(torch.tensor([[1, 2, 0, 1]]), torch.tensor([[1, 2, 0, 0]]))
        >>> metric.compute()
        tensor(0.6667)

    Args:
        classes: names of the tags, in the order of their numbers.
    """

    full_state_update = False
    higher_is_better = True
    right: Tensor
    predicted: Tensor
    true: Tensor

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__()
        self.classes = list(classes)
        for name in ("right", "predicted", "true"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Count the spans of sentences.

        Args:
            predictions: numbers of tags, `[B, T]`.
            targets: the same; positions with negative numbers are no words, and left out.
        """
        for guess, truth in zip(predictions.cpu(), targets.cpu(), strict=True):
            words = truth >= 0
            ours, theirs = (spans([self.classes[k] for k in row[words].tolist()]) for row in (guess, truth))
            self.right += len(ours & theirs)
            self.predicted += len(ours)
            self.true += len(theirs)

    def compute(self) -> Tensor:
        """Return the score."""
        return 2 * self.right / (self.predicted + self.true).clamp(min=1)
