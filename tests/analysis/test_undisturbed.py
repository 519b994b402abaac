from __future__ import annotations

import copy
import random
from collections import Counter, deque
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map
from torchmetrics.classification import MulticlassAccuracy

from lightning_distopt.analysis import CurvatureOperator, Objective, hessian_spectrum
from lightning_distopt.analysis.undisturbed import undisturbed
from tests.analysis.matrices import entropy


class Diary(nn.Module):
    """Changes about everything that a module can have, whenever it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 3))
        self.metric = MulticlassAccuracy(3)
        self.calls, self.losses, self.recent, self.seen = 0, [0.0], deque([1, 2], maxlen=3), Counter(a=1)
        self.nested: dict[str, Any] = {"lists": [[1.0]], "tensor": torch.zeros(2)}
        self.array, self.cycle = np.zeros(3), [1]
        self.streams = [torch.Generator(), np.random.default_rng(0), np.random.RandomState(0), random.Random(0)]
        self.cycle.append(self.cycle)  # type: ignore[arg-type]
        self.register_buffer("wide", torch.ones(1).expand(3))
        self.layers[0].bias.requires_grad_(False)
        self.layers[1].eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)

    def loss(self, batch: Any) -> torch.Tensor:
        out = self(batch[0])
        loss = nn.functional.cross_entropy(out, batch[1])
        self.calls += 1
        self.losses.append(loss.item())
        self.recent.append(self.calls)
        self.seen["a"] += 1
        self.nested["lists"][0].append(loss.detach())
        self.nested["tensor"].add_(1)
        self.nested["new"] = 1
        self.array += 1
        self.new_attribute = loss
        self.metric(out.detach(), batch[1])
        random.random(), np.random.rand(), torch.rand(1)
        draw(self.streams)
        return loss


def draw(streams: Any) -> list[float]:
    generator, *others = streams
    return [torch.rand(1, generator=generator).item(), *(float(other.random()) for other in others)]


def state(module: nn.Module) -> dict[str, Any]:
    return {
        "state": {key: value.clone() for key, value in module.state_dict().items()},
        "modes": [child.training for child in module.modules()],
        "grad": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "needed": [p.requires_grad for p in module.parameters()],
        "random": (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()),
        "own": (module.calls, list(module.losses), list(module.recent), dict(module.seen), module.array.tolist()),
        "streams": draw([module.streams[0].clone_state(), *copy.deepcopy(module.streams[1:])]),
        "nested": (list(module.nested), list(module.nested["lists"][0]), module.nested["tensor"].tolist()),
        "metric": (module.metric._update_count, module.metric._computed, module.metric.tp.clone()),
        "names": [sorted(vars(child)) for child in module.modules()],
        "hooks": [len(p._backward_hooks or ()) for p in module.parameters()],
        "global": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in one.items():
        assert plain(value) == plain(other[key]), key


def plain(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf, value)


@pytest.fixture
def module() -> Diary:
    module = Diary()
    batch = torch.randn(5, 4), torch.randint(0, 3, (5,))
    module.loss(batch).backward()
    return module


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("around", ["training", "inference", "no_grad", "autocast"])
def test_nothing_is_left_behind(module: Diary, mode: Any, around: str) -> None:
    contexts = {
        "training": torch.enable_grad(),
        "inference": torch.inference_mode(),
        "no_grad": torch.no_grad(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }
    with contexts[around]:
        batches = [(torch.randn(5, 4), torch.randint(0, 3, (5,))) for _ in range(2)]
        identities = [id(value) for value in (module.losses, module.recent, module.nested, module.layers[1].running_mean)]
        before = state(module)
        f = Objective(module, lambda module, batch: module.loss(batch), batches, mode=mode, check=mode == "eval")
        f.loss(f.vector() + 1)
        f.gradient(f.vector() - 1)
        for keep_graph in (False, True):
            hessian_spectrum(f, k=2, trace=9, density=4, per_layer=True, keep_graph=keep_graph, progress=False)
        same(state(module), before)
        same(state(module), before)
    assert identities == [id(v) for v in (module.losses, module.recent, module.nested, module.layers[1].running_mean)]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_nothing_is_left_behind_by_an_error(module: Diary, mode: Any) -> None:
    before = state(module)
    with pytest.raises(KeyboardInterrupt), undisturbed(module, mode):
        module.loss((torch.randn(5, 4), torch.randint(0, 3, (5,))))
        module.layers[0].bias.requires_grad_(True)
        module.layers[1].train(mode != "train")
        raise KeyboardInterrupt
    same(state(module), before)


def test_inside(module: Diary) -> None:
    draws = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for seed in (1, 1, 2):
            with undisturbed(module, "train", seed):
                assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
                assert not torch.is_autocast_enabled("cpu") and all(child.training for child in module.modules())
                draws.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert draws[0] == draws[1]
    assert all(a != b for a, b in zip(draws[0], draws[2], strict=True))


def test_hooks_of_gradients_do_not_fire_and_stay() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    fired: list[str] = []
    kept = [net[0].weight.expand_as(net[0].weight).grad_fn.next_functions[0][0]]
    kept[0].register_hook(lambda *args: fired.append("accumulate"))  # as torch's DDP does
    net[0].weight.register_hook(lambda g: fired.append("tensor") or 2 * g)
    net[0].weight.register_post_accumulate_grad_hook(lambda p: fired.append("post"))
    net[1].register_full_backward_hook(lambda *args: fired.append("module"))
    batch = torch.randn(5, 4), torch.randint(0, 3, (5,))
    f = Objective(net, entropy, [batch])
    plain = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    plain.load_state_dict(net.state_dict())
    expected = CurvatureOperator(Objective(plain, entropy, [batch])).matvec(torch.ones(f.dim))
    torch.testing.assert_close(CurvatureOperator(f).matvec(torch.ones(f.dim)), expected)
    assert not fired and net[0].weight.grad is None
    entropy(net, batch).backward()
    assert sorted(fired) == ["accumulate", "module", "post", "tensor"]


def test_replicas_of_ddp_are_not_reduced(ranks: Any) -> None:
    def probe(rank: int, world_size: int) -> tuple[int, bool]:
        net = nn.Linear(4, 3)
        wrapped = nn.parallel.DistributedDataParallel(net)
        reductions: list[int] = []

        def count(state, bucket):  # torch objects to annotations that are texts
            reductions.append(1)
            future = dist.all_reduce(bucket.buffer().div_(world_size), async_op=True).get_future()
            return future.then(lambda done: done.value()[0])

        wrapped.register_comm_hook(None, count)
        batch = torch.randn(3, 4) + rank, torch.randint(0, 3, (3,))
        nn.functional.cross_entropy(wrapped(batch[0]), batch[1]).backward()
        before = [p.grad.clone() for p in net.parameters()]
        f = Objective(net, entropy, [batch], reduce=dist.all_reduce)
        hessian_spectrum(f, k=2, trace=6, progress=False)
        untouched = all(p.grad.equal(g) for p, g in zip(net.parameters(), before, strict=True))
        return len(reductions), untouched

    assert ranks.run(2, probe) == [(1, True)] * 2
