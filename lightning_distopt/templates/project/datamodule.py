"""The data. The strategy deals the training samples out to the replicas, so nothing here divides them."""

from __future__ import annotations

import lightning as L
from lightning_distopt.data import load_digits_tensors
from torch.utils.data import DataLoader, TensorDataset


class Digits(L.LightningDataModule):
    """Scikit-learn's 1,797 handwritten digits.

    Args:
        batch_size: Images in a batch of each replica.
        num_workers: Processes that load data, of each loader.
    """

    def __init__(self, batch_size: int = 16, num_workers: int = 0) -> None:
        super().__init__()
        self.batch_size, self.num_workers = batch_size, num_workers

    def setup(self, stage: str) -> None:
        """Make the datasets."""
        # Your own data goes here: any two datasets with a length, `torch.utils.data.Dataset`.
        self.train_set = TensorDataset(*load_digits_tensors("train"))
        self.val_set = TensorDataset(*load_digits_tensors("test"))

    def train_dataloader(self) -> DataLoader:
        """Return the loader of training data; what is shuffled is shuffled over all replicas."""
        return DataLoader(self.train_set, self.batch_size, shuffle=True, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """Return the loader of validation data."""
        return DataLoader(self.val_set, self.batch_size, num_workers=self.num_workers)
