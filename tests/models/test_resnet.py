"""CIFAR-style ResNets, and networks by name."""

import ast
import doctest
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_distopt.models import CifarResNet, EvoNormS0, build_model, registry, resnet, resnet8, resnet20

torch.set_num_threads(1)


def _count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet8", 78_042),
        ("resnet20", 272_474),
        ("resnet32", 466_906),
        ("resnet44", 661_338),
        ("resnet56", 855_770),
        ("resnet110", 1_730_714),
    ],
)
def test_parameter_counts(name: str, count: int) -> None:
    net = build_model(name)
    assert _count(net) == count
    depth = int(name.removeprefix("resnet"))
    main_path = [m for m in net.modules() if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.padding == (1, 1))]
    assert len(main_path) == depth


@pytest.mark.parametrize("norm", ["batch", "group", "evonorm"])
@pytest.mark.parametrize(("in_channels", "side"), [(3, 32), (1, 16), (1, 8)])
def test_shapes(norm: resnet.Norm, in_channels: int, side: int) -> None:
    net = resnet8(num_classes=7, in_channels=in_channels, norm=norm)
    assert net(torch.randn(2, in_channels, side, side)).shape == (2, 7)


def test_stages_halve_the_image_and_double_the_channels() -> None:
    net = resnet20()
    x = net.conv(torch.zeros(1, 3, 32, 32))
    shapes = []
    for stage in (net.stage1, net.stage2, net.stage3):
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_width_scales_channels() -> None:
    wide, narrow = resnet20(width=2), resnet20(width=0.25)
    assert wide.linear.in_features == 128 and narrow.linear.in_features == 16
    # 3x3 convolutions grow with the square of the width, all but the first, which grows linearly
    convolutions = [sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Conv2d)) - net.conv.weight.numel()
                    for net in (wide, resnet20(), narrow)]  # fmt: skip
    assert convolutions[0] == 4 * convolutions[1] == 64 * convolutions[2]


def test_group_norm_has_the_same_parameters_and_no_buffers() -> None:
    net = resnet20(norm="group")
    assert list(net.buffers()) == [] and _count(net) == _count(resnet20())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert len(list(resnet20().buffers())) == 3 * 21


def _parameters(depth: int, norm: str) -> int:
    """Parameters of a network with 3 channels and 10 classes, counted layer by layer."""
    blocks, count = (depth - 2) // 6, 0

    def layer(inputs: int, outputs: int, kernel: int, activated: bool) -> int:
        return kernel**2 * inputs * outputs + (3 if norm == "evonorm" and activated else 2) * outputs

    count, inputs = layer(3, 16, 3, True), 16
    for channels in (16, 32, 64):
        for _ in range(blocks):
            count += layer(inputs, channels, 3, True) + layer(channels, channels, 3, False)
            count += layer(inputs, channels, 1, False) if inputs != channels else 0
            inputs = channels
    return count + 64 * 10 + 10


@pytest.mark.parametrize("norm", ["batch", "group", "evonorm"])
@pytest.mark.parametrize("depth", [8, 20, 32])
def test_parameters_by_formula(depth: int, norm: resnet.Norm) -> None:
    assert _count(CifarResNet(depth, norm=norm)) == _parameters(depth, norm)


def test_evonorm_takes_the_place_of_norm_and_relu() -> None:
    net = resnet20(norm="evonorm")
    assert list(net.buffers()) == []
    assert not any(isinstance(m, nn.BatchNorm2d | nn.GroupNorm) for m in net.modules())
    layers = {name: m for name, m in net.named_modules() if isinstance(m, EvoNormS0)}
    assert len(layers) == 21
    assert all(m.nonlinearity == name.endswith(("norm", "norm1")) for name, m in layers.items())
    assert [layers[name].groups for name in ("norm", "stage1.0.norm1", "stage2.0.norm1", "stage3.0.norm1")] == [16, 16, 32, 32]


def test_groups_of_evonorm() -> None:
    layers = [m for m in resnet8(norm="evonorm", groups=4).modules() if isinstance(m, EvoNormS0)]
    assert {m.groups for m in layers} == {4}


def test_evonorm_block() -> None:
    torch.manual_seed(0)
    net, x = resnet8(norm="evonorm"), torch.randn(2, 3, 8, 8)
    assert isinstance(net.norm, EvoNormS0)
    out = net.norm(net.conv(x))
    assert out.min() < 0  # no ReLU follows
    block = next(net.stage2.children())
    expected = block.norm2(block.conv2(block.norm1(block.conv1(net.stage1(out)))))
    expected = torch.relu(expected + block.shortcut(net.stage1(out)))
    torch.testing.assert_close(block(net.stage1(out)), expected)
    torch.testing.assert_close(net.linear(net.stage3(net.stage2(net.stage1(out))).mean((2, 3))), net(x))


@pytest.mark.parametrize("norm", ["group", "evonorm"])
def test_group_norm_and_evonorm_do_not_mix_images(norm: resnet.Norm) -> None:
    torch.manual_seed(0)
    net, images = resnet8(norm=norm), torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(net(images)[:1], net(images[:1]))
    assert not torch.allclose(resnet8()(images)[:1], net(images[:1]))


def test_initialization() -> None:
    torch.manual_seed(0)
    net = resnet20()
    conv = dict(net.named_parameters())["stage3.1.conv1.weight"]
    assert conv.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.03)
    assert net.linear.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert net.linear.bias.abs().max() == 0


def test_same_seed_same_network() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(1)
        weights.append(nn.utils.parameters_to_vector(resnet8().parameters()))
    assert torch.equal(*weights)


@pytest.mark.parametrize("norm", ["group", "evonorm"])
def test_every_parameter_gets_a_gradient(norm: resnet.Norm) -> None:
    net = resnet8(norm=norm)
    net(torch.randn(4, 3, 16, 16)).logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"depth": 18}, "depth=18"),
        ({"depth": 2}, "depth=2"),
        ({"depth": 8, "norm": "layer"}, "`norm` must be one of 'batch', 'group', 'evonorm'; got 'layer'"),
        ({"depth": 8, "width": 0.01}, "width=0.01"),
        ({"depth": 8, "norm": "group", "groups": 3}, "groups=3"),
        ({"depth": 8, "norm": "group", "groups": 0}, "groups=0"),
        ({"depth": 8, "norm": "group", "width": 1 / 16}, "groups=2"),
        ({"depth": 8, "norm": "evonorm", "groups": 5}, "groups=5"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        CifarResNet(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["batch", "group", "evonorm"])
def test_learns(norm: resnet.Norm) -> None:
    torch.manual_seed(0)
    patterns = torch.randn(10, 1, 8, 8)
    net = resnet8(in_channels=1, width=0.5, norm=norm, groups=2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(60):
        labels = torch.randint(10, (32,))
        loss = nn.functional.cross_entropy(net(patterns[labels] + torch.randn(32, 1, 8, 8)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    labels = torch.arange(10).repeat(20)
    predicted = net(patterns[labels] + torch.randn(200, 1, 8, 8)).argmax(1)
    assert (predicted == labels).float().mean() > 0.8


def test_unknown_name_lists_the_names() -> None:
    with pytest.raises(
        ValueError,
        match=r"There is no model 'resnet21' \(did you mean 'resnet\d+'\?\); .* lenet, resnet110, resnet20",
    ):
        build_model("resnet21")


def test_networks_import_no_lightning() -> None:
    for module in Path(resnet.__file__).parent.glob("*.py"):
        imported = set()
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
        assert ("lightning" in imported) == module.name.endswith("classifier.py"), module.name


@pytest.mark.parametrize("module", [resnet, registry])
def test_examples(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]
