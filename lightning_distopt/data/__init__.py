"""Data sets that need no download, as LightningDataModules; partitioners, which divide any dataset among replicas."""

from lightning_distopt.data.deformed_digits import DeformedDigitsDataModule, deform_digits, load_deformed_digits
from lightning_distopt.data.digits import DigitsDataModule, load_digits_tensors, split_digits
from lightning_distopt.data.image_data import ImageArrays, ImageDataModule, ImageDataset
from lightning_distopt.data.labels import labels_of
from lightning_distopt.data.partition import (
    IID,
    PARTITIONERS,
    ByClass,
    ByKey,
    Dirichlet,
    LabelShards,
    Partitioner,
    make_partitioner,
)
from lightning_distopt.data.partition_report import class_counts, effective_classes, total_variation
from lightning_distopt.data.python_docs import load_python_docs
from lightning_distopt.data.text_data import PaddedBatch, TextDataModule, TokenizedTexts, make_tokenizer
from lightning_distopt.data.text_files import load_ag_news, load_glue, load_tagged_words, load_text_files, load_trec
from lightning_distopt.data.texts import TextCorpus, TextPart

__all__ = [
    "IID",
    "PARTITIONERS",
    "ByClass",
    "ByKey",
    "DeformedDigitsDataModule",
    "DigitsDataModule",
    "Dirichlet",
    "ImageArrays",
    "ImageDataModule",
    "ImageDataset",
    "LabelShards",
    "PaddedBatch",
    "Partitioner",
    "TextCorpus",
    "TextDataModule",
    "TextPart",
    "TokenizedTexts",
    "class_counts",
    "deform_digits",
    "effective_classes",
    "labels_of",
    "load_ag_news",
    "load_deformed_digits",
    "load_digits_tensors",
    "load_glue",
    "load_python_docs",
    "load_tagged_words",
    "load_text_files",
    "load_trec",
    "make_partitioner",
    "make_tokenizer",
    "split_digits",
    "total_variation",
]
