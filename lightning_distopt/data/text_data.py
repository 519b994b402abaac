"""Texts as tokens: a tokenizer made from words, a dataset in memory, batches padded to their longest text, the loaders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from lightning_distopt.data.loaders import InMemoryDataModule
from lightning_distopt.data.python_docs import PYTHON_DOCS_TASKS, load_python_docs
from lightning_distopt.data.text_files import load_text_files
from lightning_distopt.data.texts import TextCorpus, TextPart
from lightning_distopt.options import check_whole

__all__ = ["NO_TAG", "PaddedBatch", "TextDataModule", "TokenizedTexts", "make_tokenizer"]

NO_TAG: int = torch.nn.CrossEntropyLoss().ignore_index
"""The label of tokens that have none, -100: torch's losses pass over it."""

_SHORTEST = 3  # of the tokens of a text two are special
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def make_tokenizer(texts: Iterable[Any], size: int = 2000) -> Any:
    """Make a tokenizer in the manner of BERT's, whose word pieces are the frequent words of some texts and all characters.

    For tests and small networks that start at random; a pretrained network needs its own.

    Example:
        >>> import pytest
        >>> transformers = pytest.importorskip("transformers")
        >>> tokenizer = make_tokenizer(["to be or not to be"], size=30)
        >>> tokenizer.tokenize("To beet")
        ['to', 'be', '##e', '##t']

    Args:
        texts: strings, pairs of strings, or lists of words.
        size: the largest number of pieces; characters are kept in any case.

    Returns:
        A `transformers.PreTrainedTokenizerFast`.

    Raises:
        ImportError: if transformers is missing.
    """
    _need_transformers()
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in texts:
        line = text if isinstance(text, str) else " ".join(text)
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(line)))
    characters = sorted(set("".join(words)))
    pieces = [*_SPECIAL, *characters, *(f"##{c}" for c in characters)]
    frequent = sorted((word for word in words if len(word) > 1), key=lambda word: (-words[word], word))
    pieces += frequent[: max(0, size - len(pieces))]
    numbers = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", numbers["[SEP]"]), ("[CLS]", numbers["[CLS]"]))
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=inputs, **dict(zip(names, _SPECIAL, strict=True))
    )


class TokenizedTexts(Dataset[dict[str, Tensor]]):
    """Texts as numbers of tokens, each with its class or, for tagging, with a class at the last token of every word.

    Example:
        >>> import pytest
        >>> transformers = pytest.importorskip("transformers")
        >>> tokenizer = make_tokenizer(["it rains"], size=8)
        >>> tagged = TokenizedTexts(TextPart([["it", "rains"]], [[0, 1]]), tokenizer)
        >>> [tokenizer.decode([token]) for token in tagged[0]["input_ids"]][3:]
        ['r', '##a', '##i', '##n', '##s', '[SEP]']
        >>> tagged[0]["labels"]
        tensor([-100, -100,    0, -100, -100, -100, -100,    1, -100])

    Args:
        part: the texts.
        tokenizer: a fast tokenizer of transformers.
        max_length: tokens after which texts are cut, special ones included; words that are cut have no class.

    Attributes:
        targets: classes, int64 `[N]`, which is where partitioners look for labels; for tagging, None.

    Raises:
        ValueError: if `max_length` leaves no room for a token, or words come with a tokenizer that doesn't know their tokens.
    """

    def __init__(self, part: TextPart, tokenizer: Any, max_length: int = 128) -> None:
        check_whole("max_length", max_length, _SHORTEST)
        tagging = bool(part.targets) and isinstance(part.targets[0], list)
        if tagging and not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                "Tags need a fast tokenizer, which knows the word that a token is of: keep tokenizer.json beside it."
            )
        self.has_types = "token_type_ids" in tokenizer.model_input_names
        rows: list[Any] = []
        labels: list[Any] = []
        for start in range(0, len(part), 10_000):  # bounds the memory of what the tokenizer returns
            texts = part.texts[start : start + 10_000]
            first: list[Any] = [text[0] for text in texts] if isinstance(texts[0], tuple) else list(texts)
            second = [text[1] for text in texts] if isinstance(texts[0], tuple) else None
            encoded = tokenizer(first, second, truncation=True, max_length=max_length, is_split_into_words=tagging)
            types = encoded["token_type_ids"] if self.has_types else [None] * len(first)
            rows += zip(encoded["input_ids"], types, strict=True)
            for number, words in enumerate(texts if tagging else ()):
                last = _last_tokens(encoded.word_ids(number), words, tokenizer, max_length)
                tags = part.targets[start + number]
                labels.append([NO_TAG if word is None else tags[word] for word in last])
        self.ends = torch.tensor([len(ids) for ids, _ in rows]).cumsum(0)
        self.tokens = torch.tensor([token for ids, _ in rows for token in ids], dtype=torch.int32)
        self.types = torch.tensor([kind for _, types in rows for kind in types or ()], dtype=torch.int8)
        self.tags = torch.tensor([tag for tags in labels for tag in tags], dtype=torch.int16)
        self.targets = None if tagging else torch.tensor(part.targets, dtype=torch.int64)

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.ends)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `input_ids`, `token_type_ids` if the network has them, both int64 `[T]`, and `labels`, int64 `[]` or `[T]`."""
        here = slice(int(self.ends[index - 1]) if index % len(self) else 0, int(self.ends[index]))
        sample = {"input_ids": self.tokens[here].long()}
        if self.has_types:
            sample["token_type_ids"] = self.types[here].long()
        sample["labels"] = self.tags[here].long() if self.targets is None else self.targets[index]
        return sample


def _last_tokens(word_ids: Sequence[int | None], words: Sequence[str], tokenizer: Any, max_length: int) -> list[int | None]:
    """Return, for each token, the word whose last token it is."""
    following = [*word_ids[1:], None]
    last = [word if word != after else None for word, after in zip(word_ids, following, strict=True)]
    place = next((k for k in reversed(range(len(last))) if last[k] is not None), None)
    if len(word_ids) == max_length and place is not None:  # the text was cut, and perhaps its last word
        word = last[place]
        whole = tokenizer([words[word]], is_split_into_words=True, add_special_tokens=False)["input_ids"]  # type: ignore[index]
        if word_ids.count(word) < len(whole):
            last[place] = None
    return last


class PaddedBatch:
    """Makes a batch of samples, padded to the longest of them.

    Example:
        >>> samples = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(0)} for ids in ([7, 8, 9], [7, 9])]
        >>> batch = PaddedBatch(pad_token=0)(samples)
        >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist()
        ([[7, 8, 9], [7, 9, 0]], [[1, 1, 1], [1, 1, 0]], [0, 0])

    Args:
        pad_token: the number of the token that fills up.

    Returns:
        When called: `input_ids`, `attention_mask` and `token_type_ids`, int64 `[B, T]`, and `labels`, `[B]` or `[B, T]`.
    """

    def __init__(self, pad_token: int = 0) -> None:
        self.pad_token = pad_token

    def __call__(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the batch."""
        fill = {"input_ids": self.pad_token, "labels": NO_TAG}
        batch = {}
        for name, value in samples[0].items():
            values = [sample[name] for sample in samples]
            padded = value.dim() > 0
            batch[name] = (
                pad_sequence(values, batch_first=True, padding_value=fill.get(name, 0)) if padded else torch.stack(values)
            )
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return batch


class TextDataModule(InMemoryDataModule):
    """Loaders over a corpus of labelled texts, tokenized once.

    Validation is on the development part, testing and prediction on the test part.

    Example:
        >>> import pytest
        >>> transformers = pytest.importorskip("transformers")
        >>> part = TextPart(["it rains", "it does not rain"], [1, 0])
        >>> data = TextDataModule(TextCorpus(("dry", "wet"), part, part), make_tokenizer(part.texts, size=99), batch_size=2)
        >>> data.setup()
        >>> next(iter(data.val_dataloader()))["input_ids"].shape
        torch.Size([2, 6])

    Args:
        source: a corpus; a task of `load_python_docs` (`"modules"`, `"kind"`, `"parameters"`), whose corpus is made at first
            use; or the name of a data set of `load_text_files`, in `folder`.
        tokenizer: a fast tokenizer of transformers, or the folder that holds one; that of the network. Nothing is downloaded.
        batch_size: texts per batch, for training as for evaluation.
        max_length: tokens after which texts are cut.
        folder: where the files of a data set are.
        seed: of the order of training texts. None: the order is drawn from torch's global generator, as loaders usually do.
        num_train: train on the first so many texts only. None: all.
        num_workers: worker processes of every loader.
        cache_dir: folder of the frozen corpus of Python's documentation, see `load_python_docs`.

    Attributes:
        corpus: the texts, from `setup` on.
        tokenizer: the tokenizer; an object from `setup` on.

    Raises:
        FileNotFoundError: in `setup`, if the tokenizer's folder or files of the data set are missing.
        ImportError: in `setup`, if transformers is missing.
        ValueError: if a number is not positive, or `folder` is missing or not needed; in `setup`, for a bad file.
    """

    def __init__(
        self,
        source: str | TextCorpus,
        tokenizer: Any,
        batch_size: int = 32,
        max_length: int = 128,
        folder: str | os.PathLike[str] | None = None,
        seed: int | None = None,
        num_train: int | None = None,
        num_workers: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, num_train=num_train)
        in_files = isinstance(source, str) and source not in PYTHON_DOCS_TASKS
        if in_files and folder is None:
            raise ValueError(f"source={source!r} is read from files: say where they are with folder=.")
        if folder is not None and not in_files:
            raise ValueError("folder= is for data sets in files; this source needs none.")
        self.source = source
        self.tokenizer = tokenizer
        self.max_length = check_whole("max_length", max_length, _SHORTEST)
        self.folder = folder
        self.num_train = num_train
        self.cache_dir = cache_dir
        self.corpus: TextCorpus | None = None
        self.train_set: TokenizedTexts | None = None
        self.val_set: TokenizedTexts | None = None
        self.test_set: TokenizedTexts | None = None

    def load_corpus(self) -> TextCorpus:
        """Return the texts."""
        if isinstance(self.source, TextCorpus):
            return self.source
        if self.source in PYTHON_DOCS_TASKS:
            return load_python_docs(self.source, self.cache_dir)  # type: ignore[arg-type]
        return load_text_files(self.source, self.folder or ".")

    def prepare_data(self) -> None:
        """Make the corpus if it is to be made; the Trainer calls this once per machine."""
        if isinstance(self.source, str):
            self.load_corpus()

    def setup(self, stage: str | None = None) -> None:
        """Load the corpus and tokenize it, as `train_set`, `val_set` and `test_set`."""
        if self.train_set is not None:
            return
        corpus = self.load_corpus()
        if not callable(self.tokenizer):
            self.tokenizer = _load_tokenizer(self.tokenizer)
        self.collate = PaddedBatch(self.tokenizer.pad_token_id or 0)
        self.val_set = TokenizedTexts(corpus.dev, self.tokenizer, self.max_length)
        self.test_set = TokenizedTexts(corpus.test, self.tokenizer, self.max_length) if corpus.test is not None else None
        self.train_set = TokenizedTexts(corpus.train.first(self.num_train), self.tokenizer, self.max_length)
        self.corpus = corpus


def _load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    _need_transformers()
    from transformers import AutoTokenizer

    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"There is no folder {path} with a tokenizer; nothing is downloaded, so name a local one.")
    return AutoTokenizer.from_pretrained(str(path), local_files_only=True)


def _need_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Tokenizers come with transformers, which is missing: pip install 'lightning-distopt[nlp]'."
        ) from error
