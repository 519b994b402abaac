"""Data sets that need no download, as LightningDataModules."""

from lightning_distopt.data.deformed_digits import DeformedDigitsDataModule, deform_digits, load_deformed_digits
from lightning_distopt.data.digits import DigitsDataModule, load_digits_tensors, split_digits
from lightning_distopt.data.image_data import ImageArrays, ImageDataModule, ImageDataset

__all__ = [
    "DeformedDigitsDataModule",
    "DigitsDataModule",
    "ImageArrays",
    "ImageDataModule",
    "ImageDataset",
    "deform_digits",
    "load_deformed_digits",
    "load_digits_tensors",
    "split_digits",
]
