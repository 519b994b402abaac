"""Text data sets in a local folder, in the files that they are distributed in."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightning_distopt.data.texts import TextCorpus, TextPart
from lightning_distopt.lookup import nearest

__all__ = ["TEXT_FILES", "load_ag_news", "load_glue", "load_tagged_words", "load_text_files", "load_trec"]

Folder = str | os.PathLike[str]


class _Layout(NamedTuple):
    """The columns of a task: their names in the first line, or their numbers in files without such a line."""

    texts: tuple[str | int, ...]
    label: str | int
    labels: tuple[str, ...]
    classes: tuple[str, ...]


_ENTAILMENT = ("entailment", "not_entailment")
_GLUE = {
    "sst2": _Layout(("sentence",), "label", ("0", "1"), ("negative", "positive")),
    "cola": _Layout((3,), 1, ("0", "1"), ("unacceptable", "acceptable")),
    "mrpc": _Layout(("#1 String", "#2 String"), "Quality", ("0", "1"), ("different", "equivalent")),
    "rte": _Layout(("sentence1", "sentence2"), "label", _ENTAILMENT, _ENTAILMENT),
    "qnli": _Layout(("question", "sentence"), "label", _ENTAILMENT, _ENTAILMENT),
}
_NEWS = ("World", "Sports", "Business", "Sci/Tech")
_QUESTIONS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")


def load_glue(folder: Folder, task: str) -> TextCorpus:
    """Load a task of GLUE from `train.tsv` and `dev.tsv`. The labels of its test set are not public, so there is no test part.

    Example:
        >>> load_glue("glue/RTE", "rte")  # doctest: +SKIP

    Args:
        folder: the folder of the task.
        task: `"sst2"`, `"cola"`, `"mrpc"`, `"rte"` or `"qnli"`.

    Returns:
        Sentences or pairs of them, in the order of the files.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if there is no such task, or a file has other columns or labels.

    Reference: Wang et al.: GLUE. ICLR 2019.
    """
    if task not in _GLUE:
        close = nearest(task, _GLUE)
        raise ValueError(f"There is no loader for the task {task!r} of GLUE{close}; use {', '.join(map(repr, _GLUE))}.")
    layout = _GLUE[task]
    train, dev = (_glue_part(path, layout) for path in _files(folder, "train.tsv", "dev.tsv"))
    return TextCorpus(layout.classes, train, dev, origin=f"GLUE, {task}")


def _glue_part(path: Path, layout: _Layout) -> TextPart:
    # Quotation marks are text in these files; lines end in \n only.
    lines = [line.rstrip("\r").split("\t") for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty.")
    columns: list[int] = []
    header = [] if isinstance(layout.label, int) else lines.pop(0)
    for column in (*layout.texts, layout.label):
        if isinstance(column, str) and column not in header:
            raise ValueError(f"{path} has no column {column!r}; its first line is {header}.")
        columns.append(header.index(column) if isinstance(column, str) else column)
    texts, targets = [], []
    for number, fields in enumerate(lines, start=2 if header else 1):
        if len(fields) <= max(columns):
            raise ValueError(f"{path}, line {number}, has {len(fields)} columns in place of at least {max(columns) + 1}.")
        *values, label = (fields[column] for column in columns)
        texts.append(values[0] if len(values) == 1 else tuple(values))
        targets.append(_number(label, layout.labels, path, number))
    return TextPart(texts, targets)


def load_ag_news(folder: Folder, dev_share: float = 0.2) -> TextCorpus:
    """Load AG News from `train.csv` and `test.csv`, whose columns are class, title and description.

    There is no development set: a share of the training set is taken for it at random, always the same.

    Example:
        >>> load_ag_news("ag_news")  # doctest: +SKIP

    Args:
        folder: the folder of the files.
        dev_share: share of the training set; a fifth leaves the 96,000 texts that masking was published with.

    Returns:
        Title and description in one text; four classes.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a line has other columns, or `dev_share` is not between 0 and 1.

    Reference: Zhang, Zhao, LeCun: Character-level convolutional networks for text classification. NeurIPS 2015.
    """

    def read(path: Path) -> TextPart:
        texts, targets = [], []
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.reader(file), start=1):
                if len(row) != 3:
                    raise ValueError(f"{path}, row {number}, has {len(row)} columns in place of class, title and description.")
                texts.append(" ".join(" ".join(row[1:]).replace("\\", " ").split()))  # backslashes stand for line ends
                targets.append(_number(row[0], ("1", "2", "3", "4"), path, number))
        return TextPart(texts, targets)

    train, test = map(read, _files(folder, "train.csv", "test.csv"))
    return TextCorpus(_NEWS, *_held_out(train, dev_share), test, origin="AG News")


def load_trec(folder: Folder, dev_share: float = 0.1) -> TextCorpus:
    """Load the six coarse classes of TREC's questions from `train_5500.label` and `TREC_10.label`.

    A line is `CLASS:subclass question`. There is no development set: a share of the training set is taken for it at
    random, always the same.

    Example:
        >>> load_trec("trec")  # doctest: +SKIP

    Args:
        folder: the folder of the files.
        dev_share: share of the training set.

    Returns:
        Questions.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a line has another class, or `dev_share` is not between 0 and 1.

    Reference: Li, Roth: Learning question classifiers. COLING 2002.
    """

    def read(path: Path) -> TextPart:
        texts, targets = [], []
        for number, line in enumerate(path.read_text(encoding="latin-1").splitlines(), start=1):
            label, _, question = line.partition(" ")
            texts.append(question)
            targets.append(_number(label.partition(":")[0], _QUESTIONS, path, number))
        return TextPart(texts, targets)

    train, test = map(read, _files(folder, "train_5500.label", "TREC_10.label"))
    return TextCorpus(_QUESTIONS, *_held_out(train, dev_share), test, origin="TREC")


def load_tagged_words(
    folder: Folder, column: int = -1, files: tuple[str, str, str] = ("train.txt", "valid.txt", "test.txt")
) -> TextCorpus:
    """Load words with tags, such as CoNLL-2003's or the Penn treebank's, from files with a word in each line.

    Columns are separated by white space, the word is the first, and an empty line ends a sentence. Lines that begin with
    `-DOCSTART-` are passed over.

    Example:
        >>> load_tagged_words("conll2003", column=1)  # doctest: +SKIP

    Args:
        folder: the folder of the files.
        column: where the tags are: of CoNLL-2003, 1 for parts of speech and 3 or -1 for names.
        files: for training, development and test.

    Returns:
        Sentences as lists of words; classes are the tags of all files, `O` first.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a line doesn't have the column.

    Reference: Tjong Kim Sang, De Meulder: Introduction to the CoNLL-2003 shared task. CoNLL 2003.
    """
    parts = [list(_tagged_sentences(path, column)) for path in _files(folder, *files)]
    tags = {tag for part in parts for _, tags in part for tag in tags}
    classes = tuple(sorted(tags, key=lambda tag: (tag != "O", tag)))
    number = {tag: k for k, tag in enumerate(classes)}
    train, dev, test = (TextPart([w for w, _ in part], [[number[t] for t in tags] for _, tags in part]) for part in parts)
    return TextCorpus(classes, train, dev, test, origin=f"{Path(folder).name}, column {column}")


def _tagged_sentences(path: Path, column: int) -> Iterator[tuple[list[str], list[str]]]:
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*path.read_text(encoding="utf-8").splitlines(), ""], start=1):
        fields = line.split()
        if not fields or fields[0] == "-DOCSTART-":
            if words:
                yield words, tags
            words, tags = [], []
            continue
        if not -len(fields) <= column < len(fields) or len(fields) == 1:
            raise ValueError(f"{path}, line {number}, has {len(fields)} columns, and no tag in column {column}.")
        words.append(fields[0])
        tags.append(fields[column])


TEXT_FILES: dict[str, Callable[[Folder], TextCorpus]] = {
    "ag_news": load_ag_news,
    "tagged_words": load_tagged_words,
    "trec": load_trec,
}
"""Loaders by name, beside the tasks of GLUE."""


def load_text_files(name: str, folder: Folder) -> TextCorpus:
    """Load a data set by its name.

    Example:
        >>> load_text_files("cola", "glue/CoLA")  # doctest: +SKIP

    Args:
        name: a task of GLUE (`load_glue`), or `"ag_news"`, `"trec"` or `"tagged_words"`.
        folder: the folder of its files.

    Returns:
        The corpus.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if there is no such data set, or a file is not as expected.
    """
    if name in _GLUE:
        return load_glue(folder, name)
    if name not in TEXT_FILES:
        names = sorted({*_GLUE, *TEXT_FILES})
        raise ValueError(f"There is no loader {name!r}{nearest(name, names)}; use {', '.join(map(repr, names))}.")
    return TEXT_FILES[name](folder)


def _files(folder: Folder, *names: str) -> list[Path]:
    paths = [Path(folder).expanduser() / name for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{Path(folder).expanduser()} has no file {' and no '.join(missing)}: nothing is downloaded, so put the data set's "
            f"own files there ({', '.join(names)})."
        )
    return paths


def _number(label: str, labels: tuple[str, ...], path: Path, line: int) -> int:
    if label not in labels:
        raise ValueError(f"{path}, line {line}, has the label {label!r}, which is none of {', '.join(labels)}.")
    return labels.index(label)


def _held_out(part: TextPart, share: float) -> tuple[TextPart, TextPart]:
    """Divide a training set into what stays and what is held out, each in the order of the file."""
    if not 0 < share < 1:
        raise ValueError(f"dev_share must be between 0 and 1, but is {share}.")
    order = np.random.RandomState(0).permutation(len(part))  # the same in all versions of NumPy
    size = round(share * len(part))

    def take(rows: Any) -> TextPart:
        return TextPart([part.texts[k] for k in rows], [part.targets[k] for k in rows])

    return take(sorted(order[size:])), take(sorted(order[:size]))
