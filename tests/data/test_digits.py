"""The plain digits: tensors, split, data module."""

import doctest
import sys

import pytest
import torch

from lightning_distopt.data import DigitsDataModule, digits, load_digits_tensors, split_digits

torch.set_num_threads(1)


def test_tensors_are_scaled_and_complete() -> None:
    images, targets = load_digits_tensors()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    assert targets.shape == (1797,) and targets.dtype == torch.int64
    assert images.min() == 0 and images.max() == 1
    assert set(targets.tolist()) == set(range(10))


def test_split_is_a_partition() -> None:
    train, held_out, test = split_digits()
    assert (len(train), len(held_out), len(test)) == (1437, 144, 360)
    assert torch.cat([train, test]).sort().values.equal(torch.arange(1797))
    assert torch.isin(held_out, train).all() and len(torch.unique(held_out)) == 144


def test_split_is_fixed() -> None:
    for first, second in zip(split_digits(), split_digits(), strict=True):
        assert torch.equal(first, second)


def test_split_is_stratified() -> None:
    _, targets = load_digits_tensors()
    for rows in split_digits():
        share = torch.bincount(targets[rows], minlength=10) / len(rows)
        assert (share - torch.bincount(targets) / 1797).abs().max() < 1 / len(rows)


def test_split_order_is_shuffled() -> None:
    train, _, test = split_digits()
    _, targets = load_digits_tensors()
    for rows in (train, test):
        # a class-sorted order would put one or two classes into the first tenth
        assert len(torch.unique(targets[rows[: len(rows) // 10]])) > 7


def test_train_and_test_tensors_follow_the_split() -> None:
    images, targets = load_digits_tensors()
    train, _, test = split_digits()
    assert torch.equal(load_digits_tensors("train")[0], images[train])
    assert torch.equal(load_digits_tensors("test")[1], targets[test])


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="`split` must be one of 'all', 'train', 'test'"):
        load_digits_tensors("validation")  # type: ignore[arg-type]


def test_module_is_normalized_with_its_constants() -> None:
    pixels, _ = digits.load_raw_digits()
    assert pixels.float().mean().item() == pytest.approx(DigitsDataModule.mean, abs=1e-3)
    assert pixels.float().std().item() == pytest.approx(DigitsDataModule.std, abs=1e-3)
    data = DigitsDataModule(batch_size=1437)
    data.setup()
    images, _ = next(iter(data.train_dataloader()))
    assert abs(images.mean().item()) < 0.02 and abs(images.std().item() - 1) < 0.02


def test_validation_on_test_set_or_on_held_out_originals() -> None:
    on_test = DigitsDataModule()
    on_test.setup()
    assert on_test.train_set is not None and on_test.val_set is not None and on_test.test_set is not None
    assert len(on_test.train_set) == 1437
    assert torch.equal(on_test.val_set.images, on_test.test_set.images)

    holdout = DigitsDataModule(validation="holdout")
    holdout.setup()
    assert holdout.train_set is not None and holdout.val_set is not None and holdout.test_set is not None
    assert (len(holdout.train_set), len(holdout.val_set), len(holdout.test_set)) == (1293, 144, 360)
    assert torch.equal(holdout.test_set.images, on_test.test_set.images)
    together = torch.cat([holdout.train_set.images, holdout.val_set.images]).flatten(1)
    assert _sorted_rows(together).equal(_sorted_rows(on_test.train_set.images.flatten(1)))


def _sorted_rows(pixels: torch.Tensor) -> torch.Tensor:
    return torch.tensor(sorted(pixels.tolist()))


def test_missing_scikit_learn_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-distopt\[data\]'"):
        DigitsDataModule().setup()


def test_examples() -> None:
    assert doctest.testmod(digits).failed == 0
