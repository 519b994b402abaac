"""What the image data modules share: images in memory, and what of them is for what."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_distopt.data.loaders import InMemoryDataModule
from lightning_distopt.options import check_choice

__all__ = ["ImageArrays", "ImageDataModule", "ImageDataset"]


class ImageDataset(Dataset[tuple[Tensor, Tensor]]):
    """Grey images in memory, normalized when they are fetched: `x = (pixel - mean) / std`.

    `torch.utils.data.DataLoader` fetches a whole batch with one call of `__getitems__`. With `max_shift > 0` every
    fetch shifts each image by whole pixels, drawn uniformly and independently per axis from torch's global generator;
    pixels from outside the image are 0 (black). One fetch of a batch draws the same numbers as single fetches in that
    order.

    Example:
        >>> images = torch.full((4, 8, 8), 16, dtype=torch.uint8)
        >>> dataset = ImageDataset(images, torch.arange(4), mean=8.0, std=4.0)
        >>> image, label = dataset[3]
        >>> image.shape, image.max().item(), label.item()
        (torch.Size([1, 8, 8]), 2.0, 3)

    Args:
        images: pixels, uint8 `[N, height, width]`.
        targets: classes, int64 `[N]`. Also an attribute, which is where partitioners look for labels.
        mean: mean of the pixels, in the unit of `images`.
        std: standard deviation of the pixels, in the unit of `images`.
        max_shift: largest shift in pixels; 0 turns the augmentation off.

    Raises:
        ValueError: if there are not as many images as targets.
    """

    def __init__(self, images: Tensor, targets: Tensor, mean: float, std: float, max_shift: int = 0) -> None:
        if len(images) != len(targets):
            raise ValueError(f"There are {len(images)} images but {len(targets)} targets.")
        self.images = images
        self.targets = targets
        self.mean = mean
        self.std = std
        self.max_shift = max_shift

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an image, float32 `[1, height, width]`, and its class, int64 `[]`."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Return the pairs at `indices`; their tensors are views of one batch."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        images = self.images[index]
        if self.max_shift > 0:
            images = _random_shift(images, self.max_shift)
        normalized = images.to(torch.float32).sub_(self.mean).div_(self.std).unsqueeze(1)
        return list(zip(normalized.unbind(), self.targets[index].unbind(), strict=True))


def _random_shift(images: Tensor, max_shift: int) -> Tensor:
    count, height, width = images.shape
    padded = torch.nn.functional.pad(images, (max_shift,) * 4)
    start = torch.randint(0, 2 * max_shift + 1, (count, 2))
    rows = start[:, 0, None] + torch.arange(height)
    columns = start[:, 1, None] + torch.arange(width)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


@dataclass(frozen=True)
class ImageArrays:
    """Images of a training and a test set, with the original that each image was made from.

    Example:
        >>> images, zeros = torch.zeros(2, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
        >>> ImageArrays(images, zeros, torch.tensor([0, 1]), images, zeros, torch.tensor([2, 3])).train_images.shape
        torch.Size([2, 8, 8])

    Args:
        train_images: uint8 `[N, height, width]`.
        train_targets: int64 `[N]`.
        train_sources: int64 `[N]`, the row of the original among scikit-learn's 1,797 digits.
        test_images: uint8 `[M, height, width]`.
        test_targets: int64 `[M]`.
        test_sources: int64 `[M]`.
    """

    train_images: Tensor
    train_targets: Tensor
    train_sources: Tensor
    test_images: Tensor
    test_targets: Tensor
    test_sources: Tensor


class ImageDataModule(InMemoryDataModule, ABC):
    """Loaders over `ImageArrays`; subclasses say where the arrays come from.

    Example:
        >>> from lightning_distopt.data import DigitsDataModule
        >>> issubclass(DigitsDataModule, ImageDataModule)
        True

    Args:
        batch_size: images per batch, for training as for evaluation.
        num_workers: worker processes of every loader.
        validation: `"test"` validates on the test set, which is right for curves of a configuration settled before;
            `"holdout"` takes the images of 144 training originals (a tenth) out of training and validates on them,
            which is right for tuning.
        num_train: train on the first so many images only. None: all.
        num_test: test and validate on the first so many images only. None: all.
        augment: shift each training image at random, by up to an eighth of its side.

    Raises:
        ValueError: if `validation` is unknown or a number is not positive.
    """

    mean: float
    std: float

    def __init__(
        self,
        batch_size: int = 32,
        num_workers: int = 0,
        validation: Literal["test", "holdout"] = "test",
        num_train: int | None = None,
        num_test: int | None = None,
        augment: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, num_train=num_train, num_test=num_test)
        check_choice("validation", validation, ("test", "holdout"))
        self.validation = validation
        self.num_train = num_train
        self.num_test = num_test
        self.augment = augment
        self.train_set: ImageDataset | None = None
        self.val_set: ImageDataset | None = None
        self.test_set: ImageDataset | None = None

    @abstractmethod
    def load_arrays(self) -> tuple[ImageArrays, Tensor]:
        """Return the arrays, and the rows of the held-out training originals, int64 `[144]`."""

    def setup(self, stage: str | None = None) -> None:
        """Load the arrays and build `train_set`, `val_set` and `test_set`."""
        if self.train_set is not None:
            return
        arrays, held_out = self.load_arrays()
        test_images, test_targets = arrays.test_images[: self.num_test], arrays.test_targets[: self.num_test]
        train_images, train_targets = arrays.train_images, arrays.train_targets
        val_images, val_targets = test_images, test_targets
        if self.validation == "holdout":
            held = torch.isin(arrays.train_sources, held_out)
            val_images, val_targets = train_images[held][: self.num_test], train_targets[held][: self.num_test]
            train_images, train_targets = train_images[~held], train_targets[~held]
        max_shift = train_images.shape[-1] // 8 if self.augment else 0
        self.test_set = ImageDataset(test_images, test_targets, self.mean, self.std)
        self.val_set = ImageDataset(val_images, val_targets, self.mean, self.std)
        self.train_set = ImageDataset(
            train_images[: self.num_train], train_targets[: self.num_train], self.mean, self.std, max_shift
        )
