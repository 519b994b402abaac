"""Masks as bits: exact, small, and refused by other models."""

from __future__ import annotations

import copy
import math
import os

import numpy as np
import pytest
import torch
from torch import nn

from lightning_distopt.sparsity.packed_masks import PackedMasks, digest
from lightning_distopt.sparsity.packing import pack_bits, unpack_bits
from lightning_distopt.sparsity.score_mask import ScoreMask
from lightning_distopt.sparsity.weights import attach


def model(classes: int = 3) -> nn.Sequential:
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU())
    net.append(nn.Linear(7, classes))
    return net


def masks_of(net: nn.Module, names: tuple[str, ...] = ("0", "2", "4"), seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(net.get_submodule(name).weight.shape, generator=generator) > 0.3 for name in names}


def packed(net: nn.Module, seed: int = 0) -> PackedMasks:
    return PackedMasks.of(net, masks_of(net, seed=seed), head=["4.weight", "4.bias"])


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 5), (4, 6, 3), (64, 33), (0,)])
def test_bits_come_back(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) > 0.5
    bits = pack_bits([mask])
    assert bits.dtype == torch.uint8 and bits.numel() == math.ceil(mask.numel() / 8)
    assert bits.tolist() == np.packbits(mask.numpy().ravel(), bitorder="little").tolist()
    for dtype in (torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.float64):
        (found,) = unpack_bits(bits, [shape], dtype)
        assert torch.equal(found, mask.to(dtype))


def test_bits_of_several_masks_follow_each_other() -> None:
    masks = [torch.rand(shape) > 0.5 for shape in ((3,), (2, 5), ())]
    bits = pack_bits([masks[0], masks[1].double(), masks[2]])
    assert len(bits) == 2
    for found, mask in zip(unpack_bits(bits, [m.shape for m in masks]), masks, strict=True):
        assert torch.equal(found, mask)
    with pytest.raises(ValueError, match="The masks have 17 bits, but 2 bytes were given"):
        unpack_bits(bits, [(17,)])


def test_no_masks_have_no_zeros() -> None:
    assert PackedMasks({}, {}, {}, {}).sparsity == 0


def test_layers_take_a_bit_for_each_weight(tmp_path) -> None:
    net = nn.Sequential(nn.Linear(500, 300), nn.Linear(300, 200))
    masks = PackedMasks.of(net, masks_of(net, ("0", "1")))
    assert masks.nbytes == (500 * 300 + 300 * 200) // 8
    masks.save(tmp_path / "masks.pt")
    assert masks.nbytes < os.path.getsize(tmp_path / "masks.pt") < masks.nbytes + 3000
    zeros = sum(int((~mask).sum()) for mask in masks_of(net, ("0", "1")).values())
    assert masks.sparsity == pytest.approx(zeros / (500 * 300 + 300 * 200), abs=1e-12)


def test_a_file_gives_the_same_logits(tmp_path) -> None:
    net, x = model(), torch.randn(11, 5)
    pretrained = copy.deepcopy(net.state_dict())
    layers = {name: net.get_submodule(name) for name in ("0", "2", "4")}
    scores = attach(layers, lambda name, layer: ScoreMask(layer.weight, sparsity=0.4, seed=int(name)))
    logits = net(x)
    base = model()
    base.load_state_dict(pretrained)
    PackedMasks.of(base, {name: each.mask() for name, each in scores.items()}, ["4.weight", "4.bias"]).save(
        tmp_path / "a" / "m"
    )
    assert os.listdir(tmp_path / "a") == ["m"]
    nn.init.zeros_(base[4].weight)  # the head is the file's, whatever the base has there
    loaded = PackedMasks.load(tmp_path / "a" / "m")
    loaded.apply(base)
    assert torch.equal(base(x), logits)
    for name, each in scores.items():
        assert torch.equal(loaded.masks(name), each.mask())


def test_a_head_of_another_size() -> None:
    net, x = model(3), torch.randn(4, 5)
    masks = packed(net)
    other = model(8)
    masks.apply(other)
    masks.apply(net)
    assert other[4].out_features == 3 and torch.equal(other(x), net(x))


def without(net: nn.Sequential) -> nn.Module:
    net[2] = nn.Identity()
    return net


def resized(net: nn.Sequential) -> nn.Module:
    net[2] = nn.Linear(9, 8)
    return net


def retrained(net: nn.Sequential) -> nn.Module:
    net[2].weight.data[0, 0] += 1e-6
    return net


def longer(net: nn.Sequential) -> nn.Module:
    return net.append(nn.Linear(3, 3))


def biasless(net: nn.Sequential) -> nn.Module:
    net[2].bias = None
    return net


def converted(net: nn.Sequential) -> nn.Module:
    return net.double()


def applied(net: nn.Sequential) -> nn.Module:
    packed(model()).apply(net)
    return net


def masked(net: nn.Sequential) -> nn.Module:
    attach({"2": net[2]}, lambda name, layer: ScoreMask(layer.weight))
    return net


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without, "no layer `2`"),
        (resized, r"`2` has the shape \[8, 9\], its mask \[7, 9\]"),
        (retrained, "`2.weight` has other values"),
        (longer, "which has no parameter `5.weight`"),
        (biasless, "no parameter `2.bias`"),
        (converted, "`0.weight` has other values"),
        (applied, "`0.weight` has other values"),
        (masked, "`2` of Sequential has a mask"),
    ],
)
def test_another_model_is_refused_with_the_first_mismatch(change, says) -> None:
    masks, other = packed(model()), change(model())
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=says):
        masks.apply(other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_masks_that_do_not_fit_are_not_packed() -> None:
    net = model()
    with pytest.raises(ValueError, match="no layer `9`"):
        PackedMasks.of(net, {"9": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="shape"):
        PackedMasks.of(net, {"0": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"no parameter `7\.bias`"):
        PackedMasks.of(net, {}, head=["7.bias"])


def test_damaged_and_other_files_are_refused(tmp_path) -> None:
    packed(model()).save(tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(content[: len(content) // 2])
    (tmp_path / "text").write_text("no masks")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state")
    torch.save([1, 2], tmp_path / "list")
    for name in ("cut", "text", "state", "list"):
        with pytest.raises(ValueError, match=f"{name} is no file"):
            PackedMasks.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        PackedMasks.load(tmp_path / "missing")


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_a_file_runs_no_code(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"masks": 1, "shapes": Harmful()}, "harmful")
    with pytest.raises(ValueError, match="is no file"):
        PackedMasks.load("harmful")
    assert not os.path.exists("harm")


def test_masks_of_a_part() -> None:
    whole = nn.ModuleDict({"model": model()})
    masks = PackedMasks.of(whole, {"model.0": torch.ones(9, 5)}, ["model.4.bias"])
    part = masks.relative_to("model")
    part.apply(model())
    assert list(part.bits) == ["0"] and list(part.head) == ["4.bias"]
    with pytest.raises(ValueError, match=r"`model\.0` lies outside of `other`"):
        masks.relative_to("other")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_a_digest_sees_type_shape_and_values(dtype: torch.dtype) -> None:
    one = torch.arange(6).to(dtype)
    assert digest(one) == digest(one.clone())
    different = {digest(one), digest(one.view(2, 3)), digest(one.double()), digest(one + 1), digest(one[:0]), digest(one[0])}
    assert len(different) == 6
