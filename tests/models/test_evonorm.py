"""EvoNorm-S0."""

import copy
import doctest
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_distopt.models import EvoNormS0, evonorm

torch.set_num_threads(1)


def _oracle(x: Tensor, layer: EvoNormS0) -> np.ndarray[Any, Any]:
    """The paper's formula in NumPy, one group of one image at a time."""
    assert layer.v is not None
    v, gamma, beta = (p.detach().double().numpy() for p in (layer.v, layer.weight, layer.bias))
    values = x.detach().double().numpy()
    out = np.empty_like(values)
    size = layer.channels // layer.groups
    for image in range(len(values)):
        for first in range(0, layer.channels, size):
            std = np.sqrt(np.var(values[image, first : first + size]) + layer.eps)
            for c in range(first, first + size):
                z = values[image, c]
                sigmoid = (1 + np.tanh(v[c] * z / 2)) / 2
                out[image, c] = z * sigmoid / std * gamma[c] + beta[c]
    return out


def _random(channels: int, groups: int | None, dtype: torch.dtype = torch.float64, **options: Any) -> EvoNormS0:
    torch.manual_seed(0)
    layer = EvoNormS0(channels, groups, **options).to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("groups", [1, 2, 3, 6, None])
@pytest.mark.parametrize("space", [(7,), (5, 4), (3, 2, 2), (2, 1, 3, 2)])
def test_formula(groups: int | None, space: tuple[int, ...]) -> None:
    layer = _random(6, groups)
    x = 3 * torch.randn(4, 6, *space, dtype=torch.float64) + 1
    np.testing.assert_allclose(layer(x).detach().numpy(), _oracle(x, layer), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [0, 3])
def test_formula_without_spatial_dimensions(batch: int) -> None:
    layer, x = _random(6, 2), torch.randn(batch, 6, dtype=torch.float64)
    np.testing.assert_allclose(layer(x).detach().numpy(), _oracle(x, layer), rtol=1e-12, atol=1e-12)


def test_affine_form() -> None:
    layer, x = _random(6, 2, nonlinearity=False), torch.randn(4, 6, 5, dtype=torch.float64)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    torch.testing.assert_close(layer(x), x * layer.weight[:, None] + layer.bias[:, None])


@pytest.mark.parametrize("nonlinearity", [True, False])
def test_gradients(nonlinearity: bool) -> None:
    layer = _random(4, 2, nonlinearity=nonlinearity)
    inputs = [torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True), *layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_a_constant_group_is_finite() -> None:
    x = torch.full((2, 4, 3, 3), 0.5, requires_grad=True)
    y = EvoNormS0(4, 2, eps=0.25)(x)
    torch.testing.assert_close(y, x * torch.sigmoid(x) / 0.5)
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_a_large_mean_leaves_the_variance_exact() -> None:
    layer = _random(4, 2, torch.float32)
    x = torch.randn(2, 4, 16, 16) + 1000
    np.testing.assert_allclose(layer(x).detach().numpy(), _oracle(x, layer), rtol=1e-4)


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (16, 16), (32, 32), (48, 24), (64, 32), (66, 22), (37, 1), (100, 25)])
def test_default_groups(channels: int, groups: int) -> None:
    assert EvoNormS0(channels).groups == groups


@pytest.mark.parametrize("training", [True, False])
def test_images_are_not_mixed_and_evaluation_is_training(training: bool) -> None:
    layer, x = _random(6, 3), torch.randn(4, 6, 5, 5, dtype=torch.float64)
    expected = torch.cat([layer(image[None]) for image in x])
    torch.testing.assert_close(layer.train(training)(x), expected)
    assert list(layer.buffers()) == []


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("nonlinearity", [True, False])
def test_memory_format_is_kept(memory_format: torch.memory_format, nonlinearity: bool) -> None:
    layer, x = _random(6, 2, nonlinearity=nonlinearity), torch.randn(4, 6, 5, 3, dtype=torch.float64)
    y = layer(x.to(memory_format=memory_format))
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parameters", ["float32", "half"])
def test_half_precision_takes_the_variance_in_float32(dtype: torch.dtype, parameters: str) -> None:
    layer = _random(6, 2, torch.float32 if parameters == "float32" else dtype)
    x = (300 * torch.randn(2, 6, 8, 8)).to(dtype)  # squares overflow float16
    y = layer(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in layer.parameters())
    # the error of a few roundings of the output
    expected = _oracle(x, layer)
    tolerance = 4 * torch.finfo(dtype).eps * np.abs(expected).max()
    np.testing.assert_allclose(y.detach().double().numpy(), expected, rtol=0, atol=tolerance)


def test_bf16_autocast() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), EvoNormS0(8, 4), nn.Conv2d(8, 4, 3), EvoNormS0(4, nonlinearity=False))
    x = torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = net[1](net[0](x))
        y = net(x)
    assert hidden.dtype == y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), net(x), rtol=0.05, atol=0.05)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


def test_state_dict() -> None:
    layer, fresh = _random(6, 2), EvoNormS0(6, 2).double()
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    assert not torch.equal(layer(x), fresh(x))
    assert list(layer.state_dict()) == ["weight", "bias", "v"]
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), fresh(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_printed() -> None:
    assert repr(EvoNormS0(16, groups=2, eps=1e-3)) == "EvoNormS0(16, groups=2, eps=0.001)"
    assert repr(EvoNormS0(16, nonlinearity=False)) == "EvoNormS0(16, nonlinearity=False)"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"channels": 6, "groups": 4}, "groups=4 does not divide the 6 channels"),
        ({"channels": 6, "groups": 0}, "groups=0 does not divide the 6 channels"),
        ({"channels": 6, "groups": -2}, "groups=-2 does not divide the 6 channels"),
        ({"channels": 0}, "at least one channel, not channels=0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        EvoNormS0(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layer", "shape", "sentence"),
    [
        (EvoNormS0(4), (2, 6, 3, 3), r"takes \[B, 4, ...\], not an input of shape \[2, 6, 3, 3\]"),
        (EvoNormS0(4), (4,), r"not an input of shape \[4\]"),
        (EvoNormS0(4, 4), (2, 4, 1, 1), r"shape \[2, 4, 1, 1\].*fewer than groups=4, or larger images"),
        (EvoNormS0(4, 4), (2, 4), r"shape \[2, 4\].*fewer than groups=4"),
    ],
)
def test_impossible_inputs_are_refused(layer: EvoNormS0, shape: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        layer(torch.zeros(shape))


def test_examples() -> None:
    assert doctest.testmod(evonorm).failed == 0
