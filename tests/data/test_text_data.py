"""Tokenizers, tokenized texts, padded batches, and the data module under Lightning and the strategies."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_distopt import LocalSGDStrategy
from lightning_distopt.data import Dirichlet, labels_of
from lightning_distopt.data.text_data import NO_TAG, PaddedBatch, TextDataModule, TokenizedTexts, make_tokenizer
from lightning_distopt.data.texts import TextCorpus, TextPart

transformers = pytest.importorskip("transformers", reason="tokenizers come with transformers")

TEXTS = [f"word{k % 7} is {'not ' * (k % 3)}here." for k in range(30)]
TARGETS = [k % 3 for k in range(30)]
PART = TextPart(TEXTS, TARGETS)
CORPUS = TextCorpus(("a", "b", "c"), PART, PART.first(6), PART.first(5))


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return make_tokenizer(TEXTS, size=60)


def test_tokenizer_knows_frequent_words_and_all_characters(tokenizer: object) -> None:
    assert tokenizer.tokenize("word3 IS not whore") == [  # type: ignore[attr-defined]
        *("word3", "is", "not", "w", "##h", "##o", "##r", "##e")
    ]
    assert tokenizer("is here")["input_ids"] == tokenizer.convert_tokens_to_ids(  # type: ignore[operator,attr-defined]
        ["[CLS]", "is", "here", "[SEP]"]
    )
    assert tokenizer.convert_tokens_to_ids("[PAD]") == 0  # type: ignore[attr-defined]


def test_samples_are_what_the_tokenizer_says(tokenizer: object) -> None:
    dataset = TokenizedTexts(PART, tokenizer)
    assert len(dataset) == 30
    for k in (0, 1, 29, -1):
        sample = dataset[k]
        assert sample["input_ids"].tolist() == tokenizer(TEXTS[k])["input_ids"]  # type: ignore[operator]
        assert sample["labels"].item() == TARGETS[k]
        assert sample["token_type_ids"].eq(0).all()


def test_pairs_have_types_and_are_cut_together(tokenizer: object) -> None:
    pairs = TextPart([("word1 is here", "is it"), ("not " * 50, "here " * 50)], [0, 1])
    dataset = TokenizedTexts(pairs, tokenizer, max_length=21)
    assert dataset[0]["token_type_ids"].tolist() == [0] * 5 + [1] * (len(dataset[0]["input_ids"]) - 5)
    assert len(dataset[1]["input_ids"]) == 21
    assert dataset[1]["token_type_ids"].tolist() == [0] * 11 + [1] * 10  # both are cut: 9 tokens of each are left


def test_tags_stand_at_the_last_token_of_a_word(tokenizer: object) -> None:
    words = ["here", "whore", "!?", "is"]
    dataset = TokenizedTexts(TextPart([words], [[3, 1, 2, 0]]), tokenizer)
    pieces = tokenizer.convert_ids_to_tokens(dataset[0]["input_ids"].tolist())  # type: ignore[attr-defined]
    assert pieces == ["[CLS]", "here", "w", "##h", "##o", "##r", "##e", "[UNK]", "[UNK]", "is", "[SEP]"]
    n = NO_TAG
    assert dataset[0]["labels"].tolist() == [n, 3, n, n, n, n, 1, n, 2, 0, n]
    assert dataset.targets is None


@pytest.mark.parametrize(
    ("max_length", "labels"),
    [(8, [NO_TAG, 3, NO_TAG, NO_TAG, NO_TAG, NO_TAG, 1, NO_TAG]), (7, [NO_TAG, 3] + [NO_TAG] * 5), (3, [NO_TAG, 3, NO_TAG])],
)
def test_words_that_are_cut_have_no_tag(tokenizer: object, max_length: int, labels: list[int]) -> None:
    dataset = TokenizedTexts(TextPart([["here", "whore", "is"]], [[3, 1, 0]]), tokenizer, max_length)
    assert dataset[0]["labels"].tolist() == labels


def test_batches_are_padded_to_their_longest_text(tokenizer: object) -> None:
    words = [["here"], ["is", "not", "here"]]
    dataset = TokenizedTexts(TextPart(words, [[1], [0, 2, 1]]), tokenizer)
    batch = PaddedBatch(pad_token=5)([dataset[0], dataset[1]])
    assert {name: value.shape for name, value in batch.items()} == dict.fromkeys(batch, (2, 5))
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["input_ids"][0, 3:].tolist() == [5, 5]
    assert batch["token_type_ids"][0].tolist() == [0] * 5
    assert batch["labels"].tolist() == [[NO_TAG, 1, NO_TAG, NO_TAG, NO_TAG], [NO_TAG, 0, 2, 1, NO_TAG]]
    single = PaddedBatch()([TokenizedTexts(PART, tokenizer)[k] for k in (0, 1)])
    assert single["labels"].tolist() == [0, 1]


def test_loaders(tokenizer: object) -> None:
    data = TextDataModule(CORPUS, tokenizer, batch_size=4, num_train=10)
    data.setup()
    assert [len(loader) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())] == [3, 2, 2]
    labels = torch.cat([batch["labels"] for batch in data.test_dataloader()])
    assert labels.tolist() == TARGETS[:5]
    assert data.corpus is CORPUS


def test_the_order_follows_the_seed(tokenizer: object) -> None:
    def order(seed: int | None, torch_seed: int) -> list[list[int]]:
        data = TextDataModule(CORPUS, tokenizer, batch_size=30, seed=seed)
        data.setup()
        torch.manual_seed(torch_seed)
        loader = data.train_dataloader()
        return [next(iter(loader))["input_ids"].flatten().tolist() for _ in range(2)]

    assert order(1, 0) == order(1, 5) != order(2, 0)
    assert order(None, 0) == order(None, 0) != order(None, 5)
    assert order(1, 0)[0] != order(1, 0)[1]  # another one in each epoch


def test_partitioners_find_the_classes(tokenizer: object) -> None:
    dataset = TokenizedTexts(PART, tokenizer)
    assert labels_of(dataset).tolist() == TARGETS
    parts = Dirichlet(0.1, seed=0)(dataset, 3)
    assert sorted(k for part in parts for k in part) == list(range(30))


class Bag(L.LightningModule):
    """The mean of token vectors, which knows nothing of transformers; it notes the texts that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.output = torch.nn.Embedding(60, 4), torch.nn.Linear(4, 3)
        self.seen: list[int] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen += batch["attention_mask"].sum(1).tolist()
        mask = batch["attention_mask"].unsqueeze(2)
        mean = (self.embedding(batch["input_ids"]) * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.cross_entropy(self.output(mean), batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("seed", [None, 3])
def test_replicas_share_the_texts(tokenizer: object, seed: int | None) -> None:
    module, data = Bag(), TextDataModule(CORPUS, tokenizer, batch_size=5, seed=seed)
    trainer = L.Trainer(
        strategy=LocalSGDStrategy(2, replicas_per_device=2),
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    lengths = [len(tokenizer(text)["input_ids"]) for text in TEXTS]  # type: ignore[operator]
    assert sorted(module.seen) == sorted(lengths)  # each text once, wherever it was


def test_worker_processes(tokenizer: object) -> None:
    data = TextDataModule(CORPUS, tokenizer, batch_size=6, num_workers=1)
    data.setup()
    (batch,) = data.val_dataloader()
    assert batch["labels"].tolist() == TARGETS[:6]


def test_tokenizer_from_a_folder(tokenizer: object, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    one, two = TextDataModule(CORPUS, str(tmp_path)), TextDataModule(CORPUS, tokenizer)
    for data in (one, two):
        data.setup()
    (a,), (b,) = one.val_dataloader(), two.val_dataloader()
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert isinstance(one.train_dataloader(), DataLoader)


def test_files_in_a_folder(tokenizer: object, tmp_path: Path) -> None:
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("sentence\tlabel\nword1 is here\t1\n")
    data = TextDataModule("sst2", tokenizer, folder=tmp_path)
    data.prepare_data()
    data.setup()
    (batch,) = data.val_dataloader()
    assert batch["labels"].tolist() == [1]
    with pytest.raises(ValueError, match=r"labels of this data set are not public: call trainer.validate in place of"):
        data.test_dataloader()


def test_bad_input_is_one_sentence(tokenizer: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`batch_size` must be a whole number, at least 1; got 0"):
        TextDataModule(CORPUS, tokenizer, batch_size=0)
    with pytest.raises(ValueError, match="source='cola' is read from files: say where they are with folder="):
        TextDataModule("cola", tokenizer)
    with pytest.raises(ValueError, match="folder= is for data sets in files; this source needs none"):
        TextDataModule("modules", tokenizer, folder=tmp_path)
    with pytest.raises(ValueError, match="`max_length` must be a whole number, at least 3; got 2"):
        TextDataModule(CORPUS, tokenizer, max_length=2)
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere with a tokenizer; nothing is downloaded"):
        TextDataModule(CORPUS, tmp_path / "nowhere").setup()
    with pytest.raises(RuntimeError, match=r"Call setup\(\) before asking for a loader"):
        TextDataModule(CORPUS, tokenizer).train_dataloader()
    with pytest.raises(ValueError, match="There are 2 texts but 1 targets"):
        TextPart(["a", "b"], [0])
    with pytest.raises(ValueError, match="There are 2 words but 1 tags in the sentence 'a b'"):
        TextPart([["a", "b"]], [[0]])


def test_missing_transformers_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-distopt\[nlp\]'"):
        make_tokenizer(TEXTS)
    with pytest.raises(ImportError, match=r"pip install 'lightning-distopt\[nlp\]'"):
        TextDataModule(CORPUS, "anywhere").setup()
