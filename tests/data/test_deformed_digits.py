"""The deformed digits: recipe, determinism, cache, split, data module."""

import doctest
import multiprocessing
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distopt.data import (
    DeformedDigitsDataModule,
    ImageArrays,
    deform_digits,
    deformed_digits,
    digits,
    load_deformed_digits,
    split_digits,
)

torch.set_num_threads(1)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _arrays(arrays: ImageArrays) -> list[Tensor]:
    return list(vars(arrays).values())


def test_shapes_and_types(deformed: ImageArrays) -> None:
    assert deformed.train_images.shape == (50_000, 16, 16) and deformed.train_images.dtype == torch.uint8
    assert deformed.test_images.shape == (10_000, 16, 16) and deformed.test_images.dtype == torch.uint8
    assert deformed.train_targets.shape == (50_000,) and deformed.train_targets.dtype == torch.int64
    assert deformed.test_sources.shape == (10_000,) and deformed.test_sources.dtype == torch.int64


def test_no_original_on_both_sides(deformed: ImageArrays) -> None:
    train, _, test = split_digits()
    assert torch.equal(torch.unique(deformed.train_sources), train.sort().values)
    assert torch.equal(torch.unique(deformed.test_sources), test.sort().values)
    assert not torch.isin(deformed.test_sources, deformed.train_sources).any()


def test_targets_are_those_of_the_originals(deformed: ImageArrays) -> None:
    _, targets = digits.load_raw_digits()
    assert torch.equal(deformed.train_targets, targets[deformed.train_sources])
    assert torch.equal(deformed.test_targets, targets[deformed.test_sources])


def test_classes_and_originals_are_balanced(deformed: ImageArrays) -> None:
    for targets, sources in (
        (deformed.train_targets, deformed.train_sources),
        (deformed.test_targets, deformed.test_sources),
    ):
        share = torch.bincount(targets, minlength=10) / len(targets)
        assert share.min() > 0.09 and share.max() < 0.11
        uses = torch.unique(sources, return_counts=True)[1]
        assert uses.max() - uses.min() <= 1


def test_images_are_all_different(deformed: ImageArrays) -> None:
    assert len(torch.unique(deformed.test_images.flatten(1), dim=0)) == 10_000


def test_prefix_of_the_training_set_is_mixed(deformed: ImageArrays) -> None:
    assert torch.bincount(deformed.train_targets[:1000], minlength=10).min() > 60


def test_an_image_resembles_its_class_more_than_other_classes(deformed: ImageArrays) -> None:
    # guards the direction of the warp and the order of rows: images and targets that do not belong together give 10 %
    images = deformed.train_images[:20_000].float().flatten(1)
    targets = deformed.train_targets[:20_000]
    means = torch.stack([images[targets == label].mean(0) for label in range(10)])
    means = F.normalize(means - means.mean(0), dim=1)
    test = F.normalize(deformed.test_images.float().flatten(1), dim=1)
    accuracy = ((test @ means.T).argmax(1) == deformed.test_targets).float().mean()
    assert 0.18 < accuracy < 0.6


def test_deformation_depends_on_the_generator_only() -> None:
    images = torch.rand(10, 8, 8, generator=_generator())
    torch.manual_seed(5)
    first = deform_digits(images, _generator(1))
    torch.manual_seed(6)
    assert torch.equal(first, deform_digits(images, _generator(1)))
    assert not torch.equal(first, deform_digits(images, _generator(2)))


def test_generation_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    deform_digits(torch.rand(10, 8, 8, generator=_generator()), _generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_black_images_show_one_rectangle_and_noise() -> None:
    images = deform_digits(torch.zeros(4000, 8, 8), _generator()).float() / 255
    # on black only the noise's positive half survives the clip: mean sigma / sqrt(2 pi), and half the pixels are 0
    sides = torch.tensor([4.0, 5.0, 6.0, 7.0])
    covered = (sides.mean() / 16) ** 2
    assert (images == 0).float().mean().item() == pytest.approx((1 - covered.item()) / 2, abs=0.02)
    expected = (1 - covered) * 0.15 / (2 * torch.pi) ** 0.5 + covered * 0.5
    assert images.mean().item() == pytest.approx(expected.item(), abs=0.01)


def test_white_images_keep_contrast_and_stay_in_place() -> None:
    images = deform_digits(torch.ones(4000, 8, 8), _generator()).float() / 255
    # the centre is never warped out of a white square: contrast U(0.4, 1) outside the rectangle, grey U(0, 1) inside it
    centre = images[:, 7:9, 7:9].mean((1, 2))
    assert 0.55 < centre.mean() < 0.75
    assert centre.quantile(0.02) < 0.45 and centre.quantile(0.98) > 0.9
    # at +-25 degrees, shear and shift the corners are often black: darker than the centre
    assert images[:, 0, 0].mean() < 0.5 * centre.mean()


def test_shift_and_scale_move_the_centre_by_two_pixels_at_most() -> None:
    dot = torch.zeros(3000, 8, 8)
    dot[:, 3:5, 3:5] = 1
    images = deform_digits(dot, _generator()).float()
    position = torch.arange(16.0) - 7.5
    # average out noise and rectangles over images: symmetric laws leave the mean at the centre
    mass = (images - images.mean((1, 2), keepdim=True)).mean(0).clamp(min=0)
    assert abs((mass.sum(1) * position).sum() / mass.sum()) < 0.3
    assert abs((mass.sum(0) * position).sum() / mass.sum()) < 0.3
    # 4 pixels wide, times 1.2, plus shifts of 2 on both sides: nothing of the dot outside the middle 10x10 or so
    inner, outer = images[:, 3:13, 3:13].mean(), images[:, :2, :].mean()
    assert inner > outer + 20


def test_second_load_reads_the_cache(deformed: ImageArrays, deformed_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise AssertionError("made again in spite of the cache")

    monkeypatch.setattr(deformed_digits, "_generate", fail)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # the cached file alone is enough
    again = load_deformed_digits(deformed_cache)
    assert all(torch.equal(a, b) for a, b in zip(_arrays(deformed), _arrays(again), strict=True))
    assert [file.name for file in deformed_cache.iterdir()] == ["deformed_digits_v1.pt"]


def _load_and_compare(cache: Path, reference: Path, barrier: object) -> None:
    torch.set_num_threads(1)
    barrier.wait()  # type: ignore[attr-defined]
    loaded, expected = load_deformed_digits(cache), load_deformed_digits(reference)
    same = all(torch.equal(a, b) for a, b in zip(_arrays(loaded), _arrays(expected), strict=True))
    sys.exit(0 if same else 1)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_generate_the_same_at_the_same_time(deformed: ImageArrays, deformed_cache: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    cache = tmp_path / "not" / "there"
    processes = [
        context.Process(target=_load_and_compare, args=(cache, deformed_cache, barrier), daemon=True) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [file.name for file in cache.iterdir()] == ["deformed_digits_v1.pt"]


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half_write(arrays: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(deformed_digits, "_generate", lambda: {})
    monkeypatch.setattr(torch, "save", half_write)
    with pytest.raises(OSError, match="disk full"):
        load_deformed_digits(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_module_shapes_and_normalization(deformed: ImageArrays, deformed_cache: Path) -> None:
    data = DeformedDigitsDataModule(batch_size=5000, cache_dir=deformed_cache)
    data.prepare_data()
    data.setup()
    images, targets = next(iter(data.train_dataloader()))
    assert images.shape == (5000, 1, 16, 16) and targets.shape == (5000,)
    assert abs(images.mean().item()) < 0.03 and abs(images.std().item() - 1) < 0.03
    assert len(data.train_dataloader()) == 10 and len(data.test_dataloader()) == 2


def test_holdout_validation_shares_no_original_with_training_or_test(deformed: ImageArrays, deformed_cache: Path) -> None:
    data = DeformedDigitsDataModule(validation="holdout", cache_dir=deformed_cache)
    data.setup()
    assert data.train_set is not None and data.val_set is not None and data.test_set is not None
    assert len(data.train_set) + len(data.val_set) == 50_000 and 4900 < len(data.val_set) < 5100
    assert torch.equal(data.test_set.images, deformed.test_images)
    held = torch.isin(deformed.train_sources, split_digits()[1])
    assert torch.equal(data.val_set.images, deformed.train_images[held])
    assert torch.equal(data.train_set.images, deformed.train_images[~held])
    assert not torch.isin(deformed.train_sources[held], deformed.train_sources[~held]).any()
    assert not torch.isin(deformed.train_sources[held], deformed.test_sources).any()


def test_augmentation_shifts_by_two_pixels(deformed: ImageArrays, deformed_cache: Path) -> None:
    data = DeformedDigitsDataModule(augment=True, cache_dir=deformed_cache)
    data.setup()
    assert data.train_set is not None and data.train_set.max_shift == 2


def test_examples(deformed: ImageArrays, deformed_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lightning_distopt").symlink_to(deformed_cache)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert doctest.testmod(deformed_digits).failed == 0
