"""Scores in place of weights: the paper's equations, and what the scores start from."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from lightning_distopt.sparsity.score_mask import ScoreMask, initial_scores
from lightning_distopt.sparsity.weights import attach, dense_weight
from tests.oracles.masking import MaskedNetwork


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 3, bias=False)).to(dtype)


def mask(net: nn.Module, sparsity: float = 0.3, threshold: float = 0.01, width: float = 0.2) -> dict[str, ScoreMask]:
    layers = {name: net.get_submodule(name) for name in ("0", "2")}
    masks = attach(layers, lambda name, layer: ScoreMask(layer.weight, sparsity, threshold, width, seed=int(name)))
    for layer in layers.values():
        dense_weight(layer).requires_grad_(False)
    return masks


def test_the_update_is_the_papers() -> None:
    net = network()
    masks = mask(net)
    weights = [dense_weight(net[k]).clone() for k in (0, 2)]
    oracle = MaskedNetwork([w.numpy() for w in weights], [masks[k].scores.detach().numpy() for k in "02"], tau=0.01)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
    rng = np.random.default_rng(0)
    flips = 0
    for eta in [0.5, 0.5, 0.2, 0.0, 0.2, 0.1, 0.1, 0.05]:
        x, y = rng.normal(size=(6, 5)), rng.normal(size=(6, 3))
        before = oracle.binary()
        loss = (net(torch.from_numpy(x)) - torch.from_numpy(y)).square().sum() / 12
        assert loss.item() == pytest.approx(oracle.step(x, y, eta), rel=1e-12)
        flips += sum(int((a != b).sum()) for a, b in zip(before, oracle.binary(), strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = eta
        optimizer.step()
        for k, scores in zip("02", oracle.M, strict=True):
            assert np.abs(masks[k].scores.detach().numpy() - scores).max() < 1e-10
    assert flips > 5
    for layer, weight in zip((net[0], net[2]), weights, strict=True):
        assert torch.equal(dense_weight(layer), weight)


def test_the_gradient_is_that_of_the_mask() -> None:
    net = network()
    masks, x = mask(net), torch.randn(4, 5, dtype=torch.float64)
    net(x).square().sum().backward()
    plain = network()
    for k in (0, 2):
        plain[k].weight.data.copy_(net[k].weight.detach())  # W_hat
    plain(x).square().sum().backward()
    for k in (0, 2):
        expected = dense_weight(net[k]) * plain[k].weight.grad
        torch.testing.assert_close(masks[str(k)].scores.grad, expected, rtol=0, atol=1e-12)
        assert expected.count_nonzero() == expected.numel()  # masked weights have a gradient, too


def test_without_a_threshold_it_is_the_pretrained_model() -> None:
    net, x = network(torch.float32), torch.randn(4, 5)
    expected = net(x)
    for each in mask(net).values():
        assert not torch.equal(net(x), expected)
        each.threshold = -float("inf")
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize("threshold", [0.0, 0.01, -3.0])
@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.5, 0.95])
def test_the_initial_sparsity_is_what_is_asked_for(sparsity: float, threshold: float) -> None:
    scores = initial_scores([300, 400], sparsity, threshold, width=0.5, seed=3, dtype=torch.float64)
    share = (scores < threshold).double().mean().item()
    assert abs(share - sparsity) <= 5 * (sparsity * (1 - sparsity) / scores.numel()) ** 0.5
    a, b = threshold - sparsity * 0.5, threshold + (1 - sparsity) * 0.5
    assert a <= scores.min() < a + 1e-3 and b - 1e-3 < scores.max() <= b


def test_scores_have_a_random_stream_of_their_own() -> None:
    state = torch.get_rng_state()
    first, again, other = (initial_scores([20], 0.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_vmap_over_scores() -> None:
    net, x = network(), torch.randn(4, 5, dtype=torch.float64)
    masks = mask(net)
    names = ["0.parametrizations.weight.0.scores", "2.parametrizations.weight.0.scores"]
    rows = {
        name: torch.stack([initial_scores(masks[name[0]].scores.shape, 0.5, seed=s, dtype=torch.float64) for s in (7, 8, 9)])
        for name in names
    }

    def loss(scores: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(net, scores, (x,)).square().sum()

    together = vmap(grad(loss))(rows)
    for row in range(3):
        alone = grad(loss)({name: values[row] for name, values in rows.items()})
        for name in names:
            torch.testing.assert_close(together[name][row], alone[name], rtol=0, atol=1e-12)


def test_shorter_types_do_not_round_the_scores() -> None:
    net = network(torch.float32)
    masks = mask(net)
    scores = {name: each.scores.detach().clone() for name, each in masks.items()}
    net.to(torch.bfloat16)
    for name, each in masks.items():
        assert each.scores.dtype == torch.float32 and torch.equal(each.scores, scores[name])
        assert net.get_submodule(name).weight.dtype == torch.bfloat16
    net(torch.randn(4, 5, dtype=torch.bfloat16)).square().sum().backward()
    assert all(each.scores.grad.dtype == torch.float32 for each in masks.values())


def test_autocast_and_bf16_weights_start_with_single_precision() -> None:
    net = network(torch.bfloat16)
    assert all(each.scores.dtype == torch.float32 for each in mask(net).values())
    net = network(torch.float32)
    masks = mask(net)
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(torch.randn(4, 5)).float().square().sum()
    loss.backward()
    assert all(each.scores.grad.dtype == torch.float32 and each.scores.grad.abs().sum() > 0 for each in masks.values())


def test_copies_have_scores_of_their_own() -> None:
    net = network()
    masks = mask(net)
    other = copy.deepcopy(net)
    with torch.no_grad():
        masks["0"].scores.fill_(-1)
    assert not net[0].weight.any() and other[0].weight.any()
