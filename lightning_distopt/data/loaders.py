"""Loaders over data sets in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lightning_distopt.options import check_whole

__all__ = ["InMemoryDataModule"]


class InMemoryDataModule(LightningDataModule):
    """Loaders over a training, a validation and a test set, which `setup` of a subclass makes; prediction is on the test set.

    Example:
        >>> class Numbers(InMemoryDataModule):
        ...     def setup(self, stage=None):
        ...         self.train_set = self.val_set = self.test_set = torch.arange(10)
        >>> numbers = Numbers(batch_size=4)
        >>> numbers.setup()
        >>> [len(batch) for batch in numbers.val_dataloader()]
        [4, 4, 2]

    Args:
        batch_size: samples per batch, for training as for evaluation.
        num_workers: worker processes of every loader.
        seed: of the order of training samples. None: it is drawn from torch's global generator, as loaders usually do.
        **counts: other options that are numbers of samples, which have to be positive, or None.

    Attributes:
        train_set: from `setup` on.
        val_set: from `setup` on.
        test_set: from `setup` on; None, if there are no labels to test with.
        collate: what makes a batch of samples. None: torch's way.

    Raises:
        ValueError: if a number is not whole and positive.
    """

    def __init__(self, batch_size: int = 32, num_workers: int = 0, seed: int | None = None, **counts: int | None) -> None:
        super().__init__()
        self.batch_size = check_whole("batch_size", batch_size)
        for name, value in counts.items():
            if value is not None:
                check_whole(name, value)
        self.num_workers = num_workers
        self.seed = seed
        self.train_set: Dataset[Any] | None = None
        self.val_set: Dataset[Any] | None = None
        self.test_set: Dataset[Any] | None = None
        self.collate: Callable[[list[Any]], Any] | None = None

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the shuffled training loader."""
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation loader."""
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test loader."""
        return self._loader(self.test_set)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the test loader."""
        return self._loader(self.test_set)

    def _loader(self, dataset: Dataset[Any] | None, shuffle: bool = False) -> DataLoader[Any]:
        if self.train_set is None:
            raise RuntimeError("Call setup() before asking for a loader; the Trainer does so itself.")
        if dataset is None:
            raise ValueError("The test labels of this data set are not public: call trainer.validate in place of trainer.test.")
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=self.collate,
            generator=torch.Generator().manual_seed(self.seed) if shuffle and self.seed is not None else None,
            persistent_workers=self.num_workers > 0,
        )
