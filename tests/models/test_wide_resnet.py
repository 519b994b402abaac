"""Wide ResNets."""

import pytest
import torch
from torch import nn

from lightning_distopt.models import WideResNet, build_model


@pytest.mark.parametrize(("name", "count"), [("wrn28_2", 1_467_610), ("wrn28_4", 5_849_050), ("wrn28_8", 23_354_842)])
def test_parameters(name: str, count: int) -> None:
    """As in the authors' table: 1.5 M, 5.8 M and 23.4 M."""
    net = build_model(name)
    assert sum(p.numel() for p in net.parameters()) == count
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 28 and sum(m.kernel_size == (1, 1) for m in convolutions) == 3


@pytest.mark.parametrize(("in_channels", "side"), [(3, 32), (1, 16)])
def test_shapes(in_channels: int, side: int) -> None:
    net = WideResNet(10, 1, num_classes=7, in_channels=in_channels)
    assert net(torch.randn(2, in_channels, side, side)).shape == (2, 7)


def test_first_norm_and_activation_of_a_block_come_before_its_shortcut() -> None:
    """Where the shape changes, the projection gets what the first convolution gets; elsewhere the sum goes straight on."""
    net = WideResNet(16, 2).eval()
    first, second = net.stage2
    x = torch.randn(2, 32, 8, 8)
    active = torch.relu(first.norm1(x))
    out = first.conv2(torch.relu(first.norm2(first.conv1(active))))
    assert torch.equal(first(x), first.shortcut(active) + out)
    y = torch.randn(2, 64, 4, 4)
    with torch.no_grad():
        second.conv2.weight.zero_()
    assert torch.equal(second(y), y)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    net, x = WideResNet(10, 1, dropout=0.5), torch.randn(2, 3, 8, 8)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


@pytest.mark.parametrize("options", [{"depth": 20}, {"depth": 4}, {"width": 0}])
def test_bad_options(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        WideResNet(**options)
