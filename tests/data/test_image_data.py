"""The dataset in memory and what the data modules share."""

import doctest

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset

from lightning_distopt.data import DigitsDataModule, ImageDataset, image_data

torch.set_num_threads(1)


def _dataset(max_shift: int = 0) -> ImageDataset:
    images = torch.randint(0, 256, (20, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageDataset(images, torch.arange(20), mean=100.0, std=50.0, max_shift=max_shift)


def test_item_is_normalized() -> None:
    dataset = _dataset()
    image, target = dataset[7]
    assert image.shape == (1, 16, 16) and image.dtype == torch.float32
    torch.testing.assert_close(image[0], (dataset.images[7].float() - 100) / 50)
    assert target.item() == 7 and target.dtype == torch.int64


def test_stored_images_stay_untouched() -> None:
    dataset = _dataset(max_shift=2)
    before = dataset.images.clone()
    dataset[3][0].zero_()
    assert torch.equal(dataset.images, before)


def test_index_out_of_range_is_an_error() -> None:
    with pytest.raises(IndexError):
        _dataset()[20]


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="4 images but 3 targets"):
        ImageDataset(torch.zeros(4, 8, 8, dtype=torch.uint8), torch.zeros(3), 0.0, 1.0)


@pytest.mark.parametrize("max_shift", [0, 2])
def test_batched_fetch_equals_single_fetches(max_shift: int) -> None:
    dataset = _dataset(max_shift)
    torch.manual_seed(3)
    batch = dataset.__getitems__([5, 0, 5, 19])
    torch.manual_seed(3)
    singles = [dataset[i] for i in (5, 0, 5, 19)]
    for (image, target), (image_, target_) in zip(batch, singles, strict=True):
        assert torch.equal(image, image_) and torch.equal(target, target_)


def test_loader_fetches_batches_at_once_also_through_a_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ImageDataset, "__getitem__")
    images, targets = next(iter(DataLoader(Subset(_dataset(), [4, 2, 9]), batch_size=3)))
    assert images.shape == (3, 1, 16, 16) and targets.tolist() == [4, 2, 9]


def test_shift_is_a_translation_over_black() -> None:
    marked = torch.zeros(1, 16, 16, dtype=torch.uint8)
    marked[0, 8, 8] = 1
    dataset = ImageDataset(marked.repeat(500, 1, 1), torch.zeros(500, dtype=torch.int64), 0.0, 1.0, max_shift=2)
    torch.manual_seed(0)
    places = {tuple(image[0].nonzero()[0].tolist()) for image, _ in dataset.__getitems__(range(500))}
    assert places == {(row, column) for row in range(6, 11) for column in range(6, 11)}
    dataset.images[:, 8, 8] = 0
    dataset.images[:, 0, 0] = 1
    total = torch.stack([image for image, _ in dataset.__getitems__(range(500))])
    assert set(total.flatten(1).sum(1).tolist()) == {0.0, 1.0}  # shifted out, never wrapped around


def test_shift_draws_from_the_global_generator() -> None:
    dataset = _dataset(max_shift=2)
    torch.manual_seed(0)
    first, second = dataset.__getitems__(range(20)), dataset.__getitems__(range(20))
    torch.manual_seed(0)
    again = dataset.__getitems__(range(20))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))


def test_no_augmentation_draws_nothing() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    _dataset().__getitems__(range(20))
    assert torch.equal(torch.get_rng_state(), state)


def test_only_training_is_shuffled_and_augmented() -> None:
    data = DigitsDataModule(augment=True, validation="holdout")
    data.setup()
    assert isinstance(data.train_dataloader().sampler, RandomSampler)
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert isinstance(loader.sampler, SequentialSampler)
    assert data.train_set is not None and data.val_set is not None and data.test_set is not None
    assert (data.train_set.max_shift, data.val_set.max_shift, data.test_set.max_shift) == (1, 0, 0)


def test_reduced_sets_are_prefixes() -> None:
    full, small = DigitsDataModule(), DigitsDataModule(num_train=100, num_test=30)
    full.setup()
    small.setup()
    assert full.train_set is not None and full.test_set is not None
    assert small.train_set is not None and small.val_set is not None and small.test_set is not None
    assert (len(small.train_set), len(small.val_set), len(small.test_set)) == (100, 30, 30)
    assert torch.equal(small.train_set.images, full.train_set.images[:100])
    assert torch.equal(small.test_set.targets, full.test_set.targets[:30])


def test_setup_twice_keeps_the_sets() -> None:
    data = DigitsDataModule()
    data.setup("fit")
    first = data.train_set
    data.setup("test")
    assert data.train_set is first


def test_loader_before_setup_is_one_clear_sentence() -> None:
    with pytest.raises(RuntimeError, match="Call setup"):
        DigitsDataModule().train_dataloader()


@pytest.mark.parametrize(
    "options",
    [{"validation": "train"}, {"batch_size": 0}, {"num_train": 0}, {"num_test": -1}, {"batch_size": True}, {"num_train": 2.5}],
)
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        DigitsDataModule(**options)  # type: ignore[arg-type]


def test_worker_processes_deliver_the_same_images() -> None:
    batches = []
    for workers in (0, 1):
        data = DigitsDataModule(batch_size=360, num_workers=workers)
        data.setup()
        batches.append(next(iter(data.test_dataloader())))
    assert torch.equal(batches[0][0], batches[1][0])


def test_examples() -> None:
    assert doctest.testmod(image_data).failed == 0
