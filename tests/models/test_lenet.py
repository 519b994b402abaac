"""LeNet-5."""

import doctest

import pytest
import torch

from lightning_distopt.models import LeNet, lenet

torch.set_num_threads(1)


@pytest.mark.parametrize("image_size", [4, 8, 9, 16, 27, 28, 31, 32, 33])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_shapes(image_size: int, in_channels: int) -> None:
    net = LeNet(in_channels, num_classes=7, image_size=image_size)
    assert net(torch.zeros(2, in_channels, image_size, image_size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"image_size": 32}, 61_706),
        ({"image_size": 28}, 61_706),
        ({"image_size": 32, "in_channels": 3}, 62_006),
        ({"image_size": 16}, 44_426),
        ({"image_size": 8}, 21_386),
    ],
)
def test_parameter_counts(options: dict[str, int], count: int) -> None:
    assert sum(p.numel() for p in LeNet(**options).parameters()) == count


def test_too_small_images_are_refused() -> None:
    with pytest.raises(ValueError, match="image_size=3"):
        LeNet(image_size=3)


def test_examples() -> None:
    assert doctest.testmod(lenet).failed == 0
