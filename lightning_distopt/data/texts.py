"""Labelled texts, as loaders hand them over: a corpus in training, development and test parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

__all__ = ["TextCorpus", "TextPart"]


@dataclass(frozen=True)
class TextPart:
    """Texts and their targets.

    Example:
        >>> len(TextPart(["It rains.", "It snows."], [0, 1]))
        2

    Args:
        texts: strings, pairs of strings, or for tagging lists of words.
        targets: the class of each text, or for tagging the classes of each text's words.
        sources: what each text was taken from, such as a file; empty if that isn't known.

    Raises:
        ValueError: if there are not as many targets as texts, or as many tags as words.
    """

    texts: list[Any]
    targets: list[Any]
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.targets):
            raise ValueError(f"There are {len(self.texts)} texts but {len(self.targets)} targets.")
        for words, tags in zip(self.texts, self.targets, strict=True):
            if isinstance(tags, list) and len(words) != len(tags):
                raise ValueError(f"There are {len(words)} words but {len(tags)} tags in the sentence {' '.join(words)!r}.")

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.texts)

    def first(self, count: int | None) -> TextPart:
        """Return the first so many; None: all."""
        return TextPart(self.texts[:count], self.targets[:count], self.sources[:count])


@dataclass(frozen=True)
class TextCorpus:
    """Labelled texts in three parts.

    Example:
        >>> part = TextPart([["It", "rains"]], [[0, 1]])
        >>> corpus = TextCorpus(("other", "verb"), part, part)
        >>> corpus.tagging, corpus.test is None
        (True, True)

    Args:
        classes: names of the classes, in the order of their numbers.
        train: for training.
        dev: for choosing among configurations.
        test: for what is reported; None where its labels are not public.
        checksum: SHA-256 of the file that the corpus was read from, where it has one.
        origin: in words, what it was made from.
    """

    classes: tuple[str, ...]
    train: TextPart
    dev: TextPart
    test: TextPart | None = None
    checksum: str = ""
    origin: str = ""

    @property
    def tagging(self) -> bool:
        """Whether words have classes, rather than texts."""
        return bool(self.train.targets) and isinstance(self.train.targets[0], list)

    def first(self, train: int | None = None, other: int | None = None) -> TextCorpus:
        """Return the corpus with so many texts for training, and so many in each of the other parts; None: all.

        Example:
            >>> part = TextPart(["a", "b", "c"], [0, 1, 0])
            >>> small = TextCorpus(("x", "y"), part, part).first(2, 1)
            >>> len(small.train), len(small.dev)
            (2, 1)
        """
        test = None if self.test is None else self.test.first(other)
        return replace(self, train=self.train.first(train), dev=self.dev.first(other), test=test)
