"""Multiply-accumulates and parameters, of layers by hand and of the thesis's networks to their printed digits."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lightning_distopt.models import build_model
from lightning_distopt.sparsity.dpf import DPF
from lightning_distopt.sparsity.macs import MacCounter, count_elementwise, count_macs, count_parameters, sparse_macs
from lightning_distopt.sparsity.pruner import Pruner, default_layers
from lightning_distopt.sparsity.selection import largest, shares

SIDE = torch.zeros(1, 3, 32, 32)


def costs(name: str) -> tuple[nn.Module, dict[str, int], int]:
    net = build_model(name).eval()
    return net, count_macs(net, lambda: net(SIDE)), count_elementwise(lambda: net(SIDE))


def by_hand(layer: nn.Module, x: Tensor) -> int:
    """The multiplications of one output value after the other: those with weights of ones and inputs of ones, no padding."""
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(1.0)
        return int(layer(torch.ones_like(x)).sum())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(7, 5, bias=False), (2, 7)),
        (nn.Linear(7, 5, bias=False), (2, 3, 7)),
        (nn.Conv2d(4, 6, 3, bias=False), (2, 4, 8, 9)),
        (nn.Conv2d(4, 6, 3, stride=2, dilation=2, groups=2, bias=False), (2, 4, 9, 9)),
        (nn.Conv1d(4, 6, 5, groups=2, bias=False), (3, 4, 20)),
        (nn.Conv3d(2, 3, (1, 2, 3), bias=False), (1, 2, 4, 5, 6)),
        (nn.Conv2d(4, 4, 3, groups=4, bias=False), (4, 8, 8)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False), (2, 4, 5, 5)),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_layers(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    assert count_macs(layer, lambda: layer(x)) == {"": by_hand(layer, x)}


def test_layers_called_twice_and_never() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.never = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.twice(self.twice(x))
            return y

    net = Net()
    assert count_macs(net, lambda: net(torch.zeros(1, 3))) == {"twice": 18}
    assert not any(layer._forward_hooks for layer in net.modules())


@pytest.mark.parametrize("training", [True, False])
def test_projections_of_attention(training: bool) -> None:
    """Of queries, keys and values that differ in length and width, given by position and by name; also on the fast path."""
    attention = nn.MultiheadAttention(8, 2, kdim=3, vdim=5, batch_first=True).train(training)
    query, key, value = torch.randn(2, 4, 8), torch.randn(2, 6, 3), torch.randn(2, 6, 5)
    expected = {"": 2 * 8 * (4 * 8 + 6 * 3 + 6 * 5), "out_proj": 2 * 4 * 8 * 8}
    assert count_macs(attention, lambda: attention(query, value=value, key=key)) == expected
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).train(training)
    with torch.no_grad():
        found = count_macs(layer, lambda: layer(query))
    assert found == {"self_attn": 3 * 2 * 4 * 64, "self_attn.out_proj": 2 * 4 * 64, "linear1": 1024, "linear2": 1024}


def test_hooks_go_if_the_network_fails() -> None:
    net = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(RuntimeError), MacCounter(net):
        net(torch.zeros(1, 4))
    assert not net[0]._forward_hooks


def test_masks_do_not_change_the_count_of_dense_layers() -> None:
    net, dense, _ = costs("resnet8")
    pruner = Pruner(default_layers(net), DPF())
    pruner.update(0.9)
    assert count_macs(net, lambda: net(SIDE)) == dense


# --------------------------------------------------------------------------------------------------- the thesis's figures
def test_resnet20() -> None:
    """40.81 M in convolutions with the two 1x1 ones; 0.59 M: two for each value of a norm, one for each of a ReLU."""
    _, dense, elementwise = costs("resnet20")
    assert dense.pop("linear") == 640
    assert sum(dense.values()) == 40_812_544 and f"{sum(dense.values()) / 1e6:.2f}" == "40.81"
    # 7 norms of 16 x 32 x 32 values, 7 of 32 x 16 x 16 and 7 of 64 x 8 x 8; ReLU after 7, 6 and 6 of them
    assert elementwise == 2 * 7 * (16 * 1024 + 32 * 256 + 64 * 64) + 7 * 16 * 1024 + 6 * (32 * 256 + 64 * 64) == 589_824
    assert f"{elementwise / 1e6:.2f}" == "0.59"


@pytest.mark.parametrize(
    ("name", "macs", "parameters"), [("wrn28_2", "216", "1.47"), ("wrn28_4", "848", "5.85"), ("wrn28_8", "3366", "23.35")]
)
def test_wide_resnets(name: str, macs: str, parameters: str) -> None:
    net, dense, elementwise = costs(name)
    assert f"{(sum(dense.values()) + elementwise) / 1e6:.0f}" == macs
    assert f"{count_parameters(net) / 1e6:.2f}" == parameters


TABLE_15_2 = {0.5: "20.99", 0.6: "16.91", 0.7: "12.83", 0.8: "8.75", 0.9: "4.67", 0.95: "2.63"}


@pytest.mark.parametrize("sparsity", TABLE_15_2)
def test_layerwise_row(sparsity: float) -> None:
    """Every layer prunes what is not above the value at place `floor(s n)`: one weight more than that, as the digits tell."""
    net, dense, elementwise = costs("resnet20")
    density = {}
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d):
            values = layer.weight.detach().abs().flatten().double()
            limit = values.sort().values[int(sparsity * len(values) + 1e-9)]
            density[name] = float((values > limit).double().mean())
    macs = sparse_macs(dense, density) + elementwise
    assert f"{macs / 1e6:.2f}" == TABLE_15_2[sparsity]


@pytest.mark.parametrize("sparsity", TABLE_15_2)
def test_layerwise_row_with_our_masks(sparsity: float) -> None:
    """Ours prune `round(s N)` in all, one weight of a layer less: up to 1,024 multiply-accumulates each."""
    net, dense, elementwise = costs("resnet20")
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d)}
    masks = largest([layer.weight for layer in layers.values()], sparsity, "layer")
    density = {name: float(mask.mean(dtype=torch.float64)) for name, mask in zip(layers, masks, strict=True)}
    macs = sparse_macs(dense, density)
    assert abs((macs + elementwise) / 1e6 - float(TABLE_15_2[sparsity])) < 0.011
    # MACs = sum_l (1 - s) MACs_l, but for the rounding
    assert macs == pytest.approx(640 + 40_812_544 * (1 - sparsity), abs=22 * 1024)


@pytest.mark.parametrize(("sparsity", "remaining"), [(0.8, "6.79"), (0.9, "4.45")])
def test_remaining_parameters_of_resnet50(sparsity: float, remaining: str) -> None:
    """Table 6.3: all convolutions pruned, the rest dense."""
    with torch.device("meta"):
        net = torchvision.models.resnet50()
    convolutions = [tuple(layer.weight.shape) for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    assert f"{count_parameters(net) / 1e6:.2f}" == "25.56"
    left = count_parameters(net, zeros=sum(shares(convolutions, sparsity, "layer")))
    assert f"{left / 1e6:.2f}" == remaining
    reached = 1 - left / count_parameters(net)
    assert left / 1e6 == pytest.approx(25.56 * (1 - reached), abs=0.01)
    assert 100 * reached == pytest.approx({0.8: 73.5, 0.9: 82.6}[sparsity], abs=0.1)


def test_parameters_with_masks() -> None:
    net = build_model("resnet8")
    before = count_parameters(net)
    weights = [layer.weight for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    pruner = Pruner(default_layers(net), DPF())
    pruner.update(0.9)
    zeros = sum(pruner.pruned.values())
    assert count_parameters(net) == before and zeros == round(0.9 * sum(w.numel() for w in pruner.weights))
    pruner.make_permanent()
    others = before - sum(w.numel() for w in weights)
    assert count_parameters(net, zeros) == others + sum(int((w != 0).sum()) for w in weights)
