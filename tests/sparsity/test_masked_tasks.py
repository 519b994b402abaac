"""Several tasks over one set of weights: switching is exact, and what is shared is counted once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_distopt.sparsity.masked_tasks import MaskedTasks
from lightning_distopt.sparsity.packed_masks import PackedMasks
from tests.sparsity.test_packed_masks import masks_of, model, packed


def task(classes: int, seed: int, names: tuple[str, ...] = ("0", "2", "4")) -> PackedMasks:
    """Return masks of a task with a head of its own, over the weights of `model`."""
    net = model(classes)
    torch.manual_seed(classes)
    nn.init.normal_(net[4].weight)
    return PackedMasks.of(net, masks_of(net, names, seed), ["4.weight", "4.bias"])


def logits(masks: PackedMasks, x: torch.Tensor) -> torch.Tensor:
    net = model()
    masks.apply(net)
    return net(x)


def states_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_switching_is_exact(tmp_path) -> None:
    x, base = torch.randn(6, 5), model()
    before = copy.deepcopy(base.state_dict())
    made = {"a": task(3, 1), "b": task(3, 2), "c": task(8, 3, ("2", "4")), "d": task(2, 4, ("0",))}
    expected = {name: logits(masks, x) for name, masks in made.items()} | {None: model()(x)}
    tasks = MaskedTasks(base)
    for name, masks in made.items():
        masks.save(tmp_path / name)
        tasks.add(name, masks if name < "c" else tmp_path / name)
    assert tasks.names == ["a", "b", "c", "d"]
    pointers = {id(p) for p in base.parameters()}
    order = ["a", "b", "c", "d", "c", "a", None, "d", "b", None, "c", None]
    for name in order:
        tasks.activate(name)
        assert tasks.active == name and torch.equal(base(x), expected[name])
    assert states_equal(base.state_dict(), before) and {id(p) for p in base.parameters()} == pointers
    assert base[4].out_features == 3


def test_tasks_can_be_added_while_one_is_active() -> None:
    x, base = torch.randn(6, 5), model()
    tasks = MaskedTasks(base)
    tasks.add("a", PackedMasks.of(model(), masks_of(model(), ("0", "4"))))  # has the base's head, masked
    tasks.activate("a")
    tasks.add("b", task(8, 3))
    assert tasks.active == "a"
    with pytest.raises(ValueError, match="'a' is active"):
        tasks.add("a", task(3, 1))
    for name, expected in (("b", logits(task(8, 3), x)), (None, model()(x)), ("b", logits(task(8, 3), x))):
        tasks.activate(name)
        assert torch.equal(base(x), expected)
    tasks.activate("a")
    plain = model()
    PackedMasks.of(plain, masks_of(plain, ("0", "4"))).apply(plain)
    assert torch.equal(base(x), plain(x))


def test_inside_a_body() -> None:
    tasks = MaskedTasks(model())
    tasks.add("a", packed(model(), 1))
    tasks.add("b", packed(model(), 2))
    with tasks.using("a") as net:
        assert tasks.active == "a" and net is tasks.model
        with pytest.raises(KeyError), tasks.using("b"):
            raise KeyError
        assert tasks.active == "a"
    assert tasks.active is None and states_equal(tasks.model.state_dict(), model().state_dict())


def test_what_is_shared_counts_once() -> None:
    tasks = MaskedTasks(model())
    for name, masks in {"a": task(3, 1), "b": task(3, 2), "c": task(8, 3)}.items():
        tasks.add(name, masks)
    memory = tasks.memory()
    base, small, large = 4 * (5 * 9 + 9 + 9 * 7 + 7), 4 * (7 * 3 + 3), 4 * (7 * 8 + 8)
    assert (memory.base, memory.heads) == (base, small + large)
    assert memory.masks == {"a": 6 + 8 + 3, "b": 6 + 8 + 3, "c": 6 + 8 + 7}
    assert memory.fine_tuned == 3 * base + 2 * small + large
    assert memory.total == base + small + large + 55
    with tasks.using("c"):
        assert tasks.memory() == memory


def test_masks_of_another_model_are_refused() -> None:
    torch.manual_seed(6)
    other = model()
    nn.init.normal_(other[2].weight)
    tasks = MaskedTasks(other)
    with pytest.raises(ValueError, match=r"`2\.weight` has other values"):
        tasks.add("a", packed(model()))
    assert tasks.names == []
    whole = nn.ModuleDict({"model": nn.ModuleDict({"net": model()})})
    masks = PackedMasks.of(whole, {"model.net.2": torch.ones_like(other[2].weight)})
    with pytest.raises(ValueError, match=r"no layer `model\.net\.2` .* use `masks\.relative_to\('model\.net'\)`"):
        tasks.add("b", masks)
    with pytest.raises(ValueError, match=r"no parameter `model\.net\.0\.weight`\. They .* use `masks\.relative_to"):
        tasks.add("b", PackedMasks.of(whole, {}))
    MaskedTasks(whole["model"]["net"]).add("b", masks.relative_to("model.net"))
    with pytest.raises(ValueError, match="no task 'a'; the tasks are none"):
        tasks.activate("a")


def test_half_precision() -> None:
    base, x = model().bfloat16(), torch.randn(3, 5, dtype=torch.bfloat16)
    expected = model().bfloat16()
    masks = PackedMasks.of(base, masks_of(base, ("0", "2")))
    masks.apply(expected)
    tasks = MaskedTasks(base)
    tasks.add("a", masks)
    with tasks.using("a"):
        assert torch.equal(base(x), expected(x))
