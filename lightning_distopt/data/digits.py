"""scikit-learn's 1,797 handwritten digits, 8x8 pixels, 10 classes."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_distopt.data.image_data import ImageArrays, ImageDataModule
from lightning_distopt.options import check_choice

__all__ = ["DigitsDataModule", "load_digits_tensors", "split_digits"]

_SPLIT_SEED = 0


def split_digits() -> tuple[Tensor, Tensor, Tensor]:
    """Return the fixed split of the digits into training, held-out and test originals.

    The digits are shuffled once with a fixed seed; every fifth of each class (in the shuffled order, counting on from
    class to class) is for testing, and every tenth of the others is held out, a part of the training originals.

    Example:
        >>> train, held_out, test = split_digits()
        >>> len(train), len(held_out), len(test)
        (1437, 144, 360)

    Returns:
        Rows of the training originals in shuffled order, int64 `[1437]`; of these, the ones held out where validation
        must not touch the test set, int64 `[144]`; rows of the test originals in shuffled order, int64 `[360]`.

    Raises:
        ImportError: if scikit-learn is missing.
    """
    _, targets = load_raw_digits()
    # RandomState's stream is frozen by NumPy's compatibility policy: the split is the same with every version.
    shuffled = torch.from_numpy(np.random.RandomState(_SPLIT_SEED).permutation(len(targets))).to(torch.int64)
    train, test = _split_every(5, shuffled, targets)
    _, held_out = _split_every(10, train, targets)
    return train, held_out, test


def _split_every(k: int, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Take every `k`-th row out, counted class by class; both parts keep the order of `rows`."""
    by_class = rows[torch.argsort(targets[rows], stable=True)]
    taken = torch.isin(rows, by_class[::k])
    return rows[~taken], rows[taken]


def load_digits_tensors(split: Literal["all", "train", "test"] = "all") -> tuple[Tensor, Tensor]:
    """Load the digits as tensors.

    Example:
        >>> images, targets = load_digits_tensors("train")
        >>> images.shape, images.min().item(), images.max().item()
        (torch.Size([1437, 1, 8, 8]), 0.0, 1.0)

    Args:
        split: all 1,797 digits in scikit-learn's order, or the 1,437 for training or 360 for testing in `split_digits`'
            order.

    Returns:
        Images, float32 `[N, 1, 8, 8]` in [0, 1], and classes, int64 `[N]`.

    Raises:
        ImportError: if scikit-learn is missing.
        ValueError: if there is no such split.

    Reference: Alpaydin, Kaynak: Optical recognition of handwritten digits. UCI machine learning repository, 1998.
    """
    check_choice("split", split, ("all", "train", "test"))
    pixels, targets = load_raw_digits()
    images = pixels.to(torch.float32).div_(16).unsqueeze(1)
    if split == "all":
        return images, targets
    train, _, test = split_digits()
    rows = train if split == "train" else test
    return images[rows], targets[rows]


def load_raw_digits() -> tuple[Tensor, Tensor]:
    """Return all pixels, uint8 `[1797, 8, 8]` from 0 to 16, and classes, int64 `[1797]`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The digits come with scikit-learn, which is missing: pip install 'lightning-distopt[data]'."
        ) from error
    bunch = load_digits()
    return torch.from_numpy(bunch.images.astype(np.uint8)), torch.from_numpy(bunch.target.astype(np.int64))


class DigitsDataModule(ImageDataModule):
    """The 1,797 digits: 1,437 for training, 360 for testing, one channel of 8x8 pixels, normalized.

    Small enough for tests and first steps, too easy for comparisons: logistic regression reaches 96 %. For those see
    `DeformedDigitsDataModule`. Needs scikit-learn.

    Example:
        >>> data = DigitsDataModule(batch_size=64)
        >>> data.setup()
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([64, 1, 8, 8]), torch.Size([64]))

    Args:
        batch_size: images per batch, for training as for evaluation.
        num_workers: worker processes of every loader.
        validation: `"test"` validates on the 360 test digits; `"holdout"` on 144 of the training digits, which then
            leaves 1,293 for training.
        num_train: train on the first so many images only. None: all.
        num_test: test and validate on the first so many images only. None: all.
        augment: shift each training image at random, by up to one pixel per axis.

    Raises:
        ImportError: in `setup`, if scikit-learn is missing.
        ValueError: if `validation` is unknown or a number is not positive.

    Reference: Alpaydin, Kaynak: Optical recognition of handwritten digits. UCI machine learning repository, 1998.
    """

    mean = 4.884  # of all pixels, which run from 0 to 16
    std = 6.017

    def load_arrays(self) -> tuple[ImageArrays, Tensor]:
        """Return the arrays, and the rows of the held-out training originals, int64 `[144]`."""
        pixels, targets = load_raw_digits()
        train, held_out, test = split_digits()
        return ImageArrays(pixels[train], targets[train], train, pixels[test], targets[test], test), held_out
