"""Ensembles and the dissimilarity of masks."""

from __future__ import annotations

import pytest
import torch

from lightning_distopt.sparsity.ensembles import combine_predictions, mask_dissimilarity
from lightning_distopt.sparsity.packed_masks import PackedMasks
from lightning_distopt.sparsity.packing import pack_bits


def test_labels_logits_and_probabilities_may_differ() -> None:
    # Two models are slightly for class 1, against class 0; one is nearly sure of class 0, and the sum of logits is for class 2.
    logits = torch.tensor([[[10.0, -9.0, 8.0]], [[-1.0, 0.2, 0.1]], [[-1.0, 0.2, 0.1]]])
    assert [combine_predictions(logits, by).item() for by in ("labels", "logits", "probabilities")] == [1, 2, 0]
    assert torch.equal(combine_predictions(list(logits), "logits"), combine_predictions(logits, "logits"))


def test_one_model_or_equal_ones_predict_what_they_do_alone() -> None:
    logits = torch.randn(4, 6, 5)
    for by in ("labels", "logits", "probabilities"):
        assert torch.equal(combine_predictions(logits[None], by), logits.argmax(-1))
        assert torch.equal(combine_predictions([logits] * 3, by), logits.argmax(-1))


def test_probabilities_decide_among_equal_votes() -> None:
    logits = torch.tensor([[[0.0, 5.0, 0.0]], [[1.0, 0.0, 0.9]]])
    assert combine_predictions(logits, "labels").item() == 1
    assert combine_predictions(logits.flip(0), "labels").item() == 1
    # Class 2 has the largest mean probability, but no vote.
    logits = torch.tensor([[[5.0, 0.0, 4.9]], [[0.0, 5.0, 4.9]]])
    assert combine_predictions(logits, "labels").item() in (0, 1)
    assert combine_predictions(logits, "probabilities").item() == 2


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ValueError, match="`by` must be"):
        combine_predictions(torch.zeros(1, 1, 2), "mean")


def masks(*seeds: int, shape: tuple[int, ...] = (13, 7)) -> list[dict[str, torch.Tensor]]:
    return [{"a": torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5} for seed in seeds]


def test_it_is_between_0_and_1() -> None:
    for seed in range(50):
        first, second, start = masks(seed, seed + 100, seed + 200)
        s = mask_dissimilarity(first, second, start)["a"]
        expected = (first["a"] != second["a"]).sum() / ((first["a"] != start["a"]).sum() + (second["a"] != start["a"]).sum())
        assert s == pytest.approx(expected.item(), abs=1e-7) and 0 < s <= 1
        assert s == mask_dissimilarity(second, first, start)["a"]
        assert mask_dissimilarity(first, first, start)["a"] == 0


def test_it_is_1_where_the_changed_bits_are_disjoint() -> None:
    start = {"a": torch.tensor([1, 1, 0, 0, 1])}
    first, second = {"a": torch.tensor([0, 1, 1, 0, 1])}, {"a": torch.tensor([1, 0, 0, 1, 1])}
    assert mask_dissimilarity(first, second, start) == {"a": 1.0}


def test_masks_that_did_not_change() -> None:
    first, second = masks(1, 2)
    assert mask_dissimilarity(first, first, first) == {"a": 0.0}
    assert mask_dissimilarity(first, second, first, second) == {"a": float("inf")}


def test_packed_masks_are_masks_as_well() -> None:
    plain = masks(1, 2, 3)
    packed = [PackedMasks({"a": pack_bits([each["a"]])}, {"a": (13, 7)}, {}, {}) for each in plain]
    assert mask_dissimilarity(*packed) == mask_dissimilarity(*plain)
    with pytest.raises(ValueError, match="one of `b`"):
        mask_dissimilarity(plain[0], {**plain[1], "b": torch.ones(2)}, plain[2])
