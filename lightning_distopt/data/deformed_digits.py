"""Deformed digits: 60,000 images at 16x16 made from scikit-learn's digits, hard enough to tell algorithms apart."""

from __future__ import annotations

import math
import os
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distopt.data.cache import cache_folder
from lightning_distopt.data.digits import load_raw_digits, split_digits
from lightning_distopt.data.image_data import ImageArrays, ImageDataModule
from lightning_distopt.files import replacing

__all__ = ["DeformedDigitsDataModule", "deform_digits", "load_deformed_digits"]

NUM_TRAIN = 50_000
NUM_TEST = 10_000
SIDE = 16
_SEED = 0
_CHUNK = 10_000  # bounds the memory of generation to about 100 MB
# The number belongs to the recipe: raise it with any change of split, seed or deformation, so that no old file is read.
_FILE_NAME = "deformed_digits_v1.pt"


def deform_digits(images: Tensor, generator: torch.Generator) -> Tensor:
    """Deform digits at random, each image with its own parameters.

    Resize to 16x16 (bicubic); warp by `x -> R(a) K(b) diag(s1, s2) x + t` with the rotation angle `a` in +-25 degrees,
    the shear `K(b) = [[1, tan b], [0, 1]]`, `b` in +-15 degrees, scales `1.2^u`, `u` in +-1, and the shift `t` in +-2
    pixels per axis (bilinear, black outside); multiply by a contrast in [0.4, 1]; lay over it one rectangle with sides
    of 4 to 7 pixels and a grey value in [0, 1]; add `N(0, 0.15^2)` per pixel; clip, and round to 256 levels. All draws
    but the noise are uniform.

    Example:
        >>> digits = torch.rand(5, 8, 8)
        >>> first = deform_digits(digits, torch.Generator().manual_seed(0))
        >>> first.shape, first.dtype
        (torch.Size([5, 16, 16]), torch.uint8)
        >>> torch.equal(first, deform_digits(digits, torch.Generator().manual_seed(0)))
        True

    Args:
        images: digits, float `[N, height, width]` in [0, 1].
        generator: a CPU generator, advanced by the call.

    Returns:
        Deformed digits, uint8 `[N, 16, 16]`.
    """
    count = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    x = F.interpolate(images.unsqueeze(1), size=(SIDE, SIDE), mode="bicubic", align_corners=False)

    angle = uniform(-math.radians(25), math.radians(25), count)
    shear = uniform(-math.radians(15), math.radians(15), count).tan()
    scale = 1.2 ** uniform(-1, 1, count, 2)
    shift = uniform(-2, 2, count, 2) * (2 / SIDE)  # affine_grid's unit is half the image's side
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([cos, -sin, sin, cos], dim=1).view(count, 2, 2)
    shearing = torch.eye(2).repeat(count, 1, 1)
    shearing[:, 0, 1] = shear
    warp = rotation @ shearing @ torch.diag_embed(scale)
    # grid_sample asks where an output pixel comes from: x = A^-1 (y - t)
    inverse = torch.linalg.inv(warp)
    theta = torch.cat([inverse, -inverse @ shift.unsqueeze(2)], dim=2)
    grid = F.affine_grid(theta, [count, 1, SIDE, SIDE], align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False).squeeze(1)

    x = x * uniform(0.4, 1.0, count, 1, 1)

    sides = torch.randint(4, 8, (count, 2), generator=generator)
    corner = (torch.rand(count, 2, generator=generator) * (SIDE - sides + 1)).long()
    pixel = torch.arange(SIDE)
    inside = (pixel >= corner.unsqueeze(2)) & (pixel < (corner + sides).unsqueeze(2))  # [N, 2, 16]
    rectangle = inside[:, 0, :, None] & inside[:, 1, None, :]
    x = torch.where(rectangle, uniform(0, 1, count, 1, 1), x)

    x = x + 0.15 * torch.randn(x.shape, generator=generator)
    return x.clamp_(0, 1).mul_(255).round_().to(torch.uint8)


def load_deformed_digits(cache_dir: str | os.PathLike[str] | None = None) -> ImageArrays:
    """Load the deformed digits, making them (a second or two) if they are not in the cache.

    scikit-learn's digits are split first, 1,437 for training and 360 for testing; then 50,000 training images are made
    from the former and 10,000 test images from the latter, so that no original is on both sides. Every original is used
    equally often, give or take one. The seed is fixed; images made on another machine may differ by float rounding.

    Processes may call this at the same time: the file appears under its name complete or not at all.

    Example:
        >>> digits = load_deformed_digits()
        >>> digits.train_images.shape, digits.test_images.shape
        (torch.Size([50000, 16, 16]), torch.Size([10000, 16, 16]))

    Args:
        cache_dir: folder of the cached file (16 MB). None: `lightning_distopt` in `$XDG_CACHE_HOME`, or in `~/.cache`.

    Returns:
        The images, their classes, and the originals they were made from.

    Raises:
        ImportError: if the images must be made and scikit-learn is missing.
        OSError: if the cache folder cannot be written.
    """
    path = cache_folder(cache_dir) / _FILE_NAME
    if not path.exists():
        with replacing(path) as aside:
            torch.save(_generate(), aside)
    stored = torch.load(path, weights_only=True)
    images = {name: stored[name] for name in ("train_images", "test_images")}
    numbers = {name: tensor.to(torch.int64) for name, tensor in stored.items() if name not in images}
    return ImageArrays(**images, **numbers)


def _generate() -> dict[str, Tensor]:
    pixels, targets = load_raw_digits()
    originals = pixels.to(torch.float32).div_(16)
    train, _, test = split_digits()
    generator = torch.Generator().manual_seed(_SEED)
    arrays = {}
    for name, rows, count in (("train", train, NUM_TRAIN), ("test", test, NUM_TEST)):
        sources = rows[torch.randperm(count, generator=generator) % len(rows)]
        chunks = [deform_digits(originals[chunk], generator) for chunk in torch.split(sources, _CHUNK)]
        arrays[f"{name}_images"] = torch.cat(chunks)
        arrays[f"{name}_targets"] = targets[sources].to(torch.uint8)
        arrays[f"{name}_sources"] = sources.to(torch.int16)
    return arrays


class DeformedDigitsDataModule(ImageDataModule):
    """Deformed digits: 50,000 training and 10,000 test images, one channel of 16x16 pixels, 10 classes, normalized.

    Logistic regression reaches about 41 % and ResNet-8 about 90 % after ten epochs, so accuracy tells algorithms apart.
    `prepare_data` makes the images once and caches them on disk; that needs scikit-learn. See `load_deformed_digits`.

    Example:
        >>> data = DeformedDigitsDataModule(batch_size=64, num_train=1000)
        >>> data.prepare_data()
        >>> data.setup()
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([64, 1, 16, 16]), torch.Size([64]))

    Args:
        batch_size: images per batch, for training as for evaluation.
        num_workers: worker processes of every loader.
        validation: `"test"` validates on the test images: right for curves of a configuration settled before.
            `"holdout"` keeps the images of 144 training originals out of training and validates on those, about 5,000:
            right for tuning.
        num_train: train on the first so many images only. None: all.
        num_test: test and validate on the first so many images only. None: all.
        augment: shift each training image at random, by up to two pixels per axis.
        cache_dir: folder of the cached file. None: `lightning_distopt` in `$XDG_CACHE_HOME`, or in `~/.cache`.

    Raises:
        ImportError: in `prepare_data` and `setup`, if the images must be made and scikit-learn is missing.
        ValueError: if `validation` is unknown or a number is not positive.

    Reference: The originals: Alpaydin, Kaynak: Optical recognition of handwritten digits. UCI repository, 1998.
    """

    mean = 66.0  # of the training pixels, which run from 0 to 255
    std = 70.0

    def __init__(
        self,
        batch_size: int = 32,
        num_workers: int = 0,
        validation: Literal["test", "holdout"] = "test",
        num_train: int | None = None,
        num_test: int | None = None,
        augment: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, validation, num_train, num_test, augment)
        self.cache_dir = cache_dir

    def prepare_data(self) -> None:
        """Make the images if they are not in the cache; the Trainer calls this once per machine."""
        load_deformed_digits(self.cache_dir)

    def load_arrays(self) -> tuple[ImageArrays, Tensor]:
        """Return the arrays, and the rows of the held-out training originals, int64 `[144]`."""
        return load_deformed_digits(self.cache_dir), split_digits()[1]
