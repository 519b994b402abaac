"""Where the labels of a dataset are: in an attribute, a column, a tensor, or in its samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from tqdm.auto import tqdm

from lightning_distopt.communication import isolated_streams

__all__ = ["Labels", "labels_of"]

Labels = str | Sequence[Any] | Tensor | NDArray[Any] | None
"""One label for each sample, the name of the attribute or column that holds them, or None: wherever they usually are."""

_NAMES = ("targets", "labels", "target", "label")


def labels_of(dataset: Dataset[Any], labels: Labels = None) -> NDArray[Any]:
    """Return the label of every sample.

    They are looked for in attributes and columns `targets`, `labels`, `target` and `label`, in the last tensor of a
    `TensorDataset`, and through `Subset` and `ConcatDataset`. If they are nowhere there, all samples are read, which are pairs
    `(x, y)` or have a key of these names; a progress bar shows it if it takes long. That draws nothing from the global random
    streams.

    Example:
        >>> from lightning_distopt.data import ImageDataset
        >>> digits = ImageDataset(torch.zeros(4, 8, 8), torch.tensor([3, 1, 1, 0]), mean=0.0, std=1.0)
        >>> labels_of(torch.utils.data.Subset(digits, [0, 3]))
        array([3, 0])

    Args:
        dataset: any map-style dataset, of `N` samples.
        labels: the labels themselves, or the name of an attribute or a column. None: found as above.

    Returns:
        Numbers or names, `[N]`.

    Raises:
        ValueError: if there are none, not one for each sample, or if they are no classes.
    """
    size = len(dataset)  # type: ignore[arg-type]
    if labels is None or isinstance(labels, str):
        values = column(dataset, _NAMES if labels is None else (labels,))
        if values is None:
            remedy = "give `labels`, a name or one for each sample, such as `Dirichlet(0.1, labels='species')`"
            values = from_samples(dataset, _NAMES if labels is None else (labels,), pairs=labels is None, remedy=remedy)
        found = "The labels of the dataset"
    else:
        values, found = labels, "`labels`"
    array = _array(values)
    if array is not None and array.shape == (size, 1):
        array = array[:, 0]
    if array is None or array.ndim != 1 or array.dtype.kind not in "biufUS":
        raise ValueError(f"{found} must be one number or name for each sample: give such as `labels`.")
    if len(array) != size:
        raise ValueError(f"{found} are {len(array)}, but there are {size} samples: give one for each as `labels`.")
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == array.round()).all()):
        raise ValueError(f"{found} are fractions, which are no classes: give classes as `labels`.")
    return array


def column(dataset: Dataset[Any], names: Iterable[str]) -> Any:
    """Return what a dataset holds under the first of `names` that it has, without reading samples; None without any.

    Example:
        >>> column(torch.utils.data.TensorDataset(torch.zeros(3, 2), torch.arange(3)), ["targets", "labels"])
        tensor([0, 1, 2])

    Args:
        dataset: any map-style dataset; of a `TensorDataset`, the last tensor goes by the name of `targets`.
        names: of attributes or columns.
    """
    for name in names:
        value = getattr(dataset, name, None)
        if hasattr(value, "__len__") and not isinstance(value, str) and not callable(value):
            return value
    if isinstance(dataset, Subset):
        values = _array(column(dataset.dataset, names))
        return None if values is None else values[np.asarray(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        parts = [_array(column(part, names)) for part in dataset.datasets]
        return None if any(part is None for part in parts) else np.concatenate(parts)  # type: ignore[arg-type]
    for name in names:
        if name in (getattr(dataset, "column_names", None) or ()):
            return dataset[name]  # type: ignore[index]
    if isinstance(dataset, TensorDataset) and "targets" in names:
        return dataset.tensors[-1]
    return None


def _array(values: Any) -> NDArray[Any] | None:
    """Return an array of what can be one, None otherwise."""
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    if values is None or isinstance(values, np.ndarray):
        return values
    try:
        return np.array([value.item() if isinstance(value, Tensor) and value.numel() == 1 else value for value in values])
    except ValueError:  # of different lengths
        return None


def from_samples(dataset: Dataset[Any], names: Sequence[str], pairs: bool, remedy: str) -> list[Any]:
    """Return what stands in every sample under one of some names, or, in pairs `(x, y)`, second."""

    def label(sample: Any) -> Any:
        if isinstance(sample, Mapping):
            for name in names:
                if name in sample:
                    return sample[name]
        elif pairs and isinstance(sample, tuple | list) and len(sample) == 2:
            return sample[1]
        where = "its samples are no pairs (x, y)" if pairs else "neither have its samples"
        if isinstance(sample, Mapping):
            where = f"its samples have the keys {', '.join(f'`{key}`' for key in sample)}"
        raise ValueError(f"The dataset has no {' or '.join(f'`{name}`' for name in names)}, and {where}: {remedy}.")

    with isolated_streams(torch.device("cpu")):
        numbers = tqdm(
            range(len(dataset)),  # type: ignore[arg-type]
            "Reading labels",
            delay=2,
            leave=False,
            disable=getattr(rank_zero_only, "rank", 0) != 0,
        )
        return [label(dataset[k]) for k in numbers]
