"""`lightning-distopt partition`: how many samples of each class every replica gets, as text and as a figure."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_distopt.data.deformed_digits import DeformedDigitsDataModule
from lightning_distopt.data.labels import labels_of
from lightning_distopt.data.partition import Partitioner, make_partitioner
from lightning_distopt.figures import BLUE, tidy, write_file

__all__ = ["class_counts", "effective_classes", "partition", "total_variation"]


def partition(name: str, replicas: int = 8, data: LightningDataModule | None = None, output: str = "partition.png") -> None:
    """Show how many samples of each class every replica gets.

    Prints samples per class and replica, how many classes that amounts to and how far each replica is from the whole, and draws
    bubbles whose areas are the numbers of samples.

    Example:
        >>> partition("dirichlet:0.1", replicas=16)  # doctest: +SKIP

    Args:
        name: a partitioner, such as `dirichlet:0.1`, `shards:2`, `by_class` or `iid`; `lightning-distopt partitioners` has all.
            Several, with commas between them, are drawn side by side.
        replicas: how many there are.
        data: a data module; the training data is divided. Deformed digits by default.
        output: the figure, a PNG file.

    Raises:
        ValueError: if there is no such partitioner, or the data cannot be divided so.
    """
    if replicas < 1:
        raise ValueError(f"--replicas must be at least 1; got {replicas}.")
    partitioners = [make_partitioner(part.strip()) for part in name.split(",")]
    data = data or DeformedDigitsDataModule()
    dataset = _training_set(data)
    counted = [(partitioner, class_counts(dataset, partitioner(dataset, replicas))) for partitioner in partitioners]
    names = [str(label) for label in np.unique(labels_of(dataset))]
    for partitioner, counts in counted:
        print(f"{partitioner!r}, {replicas} replicas, {counts.sum():,} samples of {type(data).__name__}")
        print(_text(counts, names))
    write_file(output, lambda path: _draw(counted, names, path))


def class_counts(dataset: Dataset[Any], lists: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Return how many samples of each class every replica has.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> class_counts(TensorDataset(torch.tensor([0, 0, 1, 2])), [[0, 1], [2, 3]])
        array([[2, 0, 0],
               [0, 1, 1]])

    Args:
        dataset: any map-style dataset with labels, see `labels_of`.
        lists: the indices of each replica's samples.

    Returns:
        `[n, classes]`, the classes in order.
    """
    _, codes = np.unique(labels_of(dataset), return_inverse=True)
    classes = int(codes.max()) + 1
    return np.stack([np.bincount(codes[np.asarray(part, dtype=np.int64)], minlength=classes) for part in lists])


def effective_classes(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    r"""Return how many equally frequent classes have the entropy of each replica's: `exp(-sum_c p_ic log p_ic)`.

    Example:
        >>> effective_classes(np.array([[5, 5, 0], [8, 0, 0]]))
        array([2., 1.])

    Args:
        counts: samples of each class, `[n, classes]`.
    """
    p = counts / counts.sum(axis=1, keepdims=True)
    result: NDArray[np.float64] = np.exp(-(p * np.log(np.where(p > 0, p, 1))).sum(axis=1))
    return result


def total_variation(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    r"""Return the distance of each replica's classes from those of the whole, `1/2 sum_c |p_ic - p_c|`, from 0 to 1.

    Example:
        >>> total_variation(np.array([[5, 5], [10, 0], [0, 10]]))
        array([0. , 0.5, 0.5])

    Args:
        counts: samples of each class, `[n, classes]`.
    """
    result: NDArray[np.float64] = (
        abs(counts / counts.sum(axis=1, keepdims=True) - counts.sum(axis=0) / counts.sum()).sum(axis=1) / 2
    )
    return result


def _training_set(data: LightningDataModule) -> Dataset[Any]:
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            f"`{type(data).__name__}.train_dataloader` must return a `DataLoader` over a map-style dataset, to be divided."
        )
    return loader.dataset


def _text(counts: NDArray[np.int64], names: Sequence[str]) -> str:
    sizes, classes, distances = counts.sum(axis=1), effective_classes(counts), total_variation(counts)
    cells = [["." if count == 0 else str(count) for count in row] for row in counts]
    width = max(len(text) for text in (*names, *(cell for row in cells for cell in row))) + 2
    shown = names if 39 + width * len(names) <= max(100, shutil.get_terminal_size().columns) else []
    lines = ["  replica   samples" + "".join(f"{name:>{width}}" for name in shown) + "   classes  distance"]
    for i, row in enumerate(cells):
        middle = "".join(f"{cell:>{width}}" for cell in row[: len(shown)])
        lines.append(f"  {i:>7}{sizes[i]:>10,}{middle}{classes[i]:>10.2f}{distances[i]:>10.3f}")
    largest = (counts.max(axis=1) / sizes).mean()
    for name, text in (
        ("samples", f"{sizes.min():,} to {sizes.max():,}"),
        (
            "classes",
            f"{classes.mean():.2f} of {len(names)} in the mean, by entropy; {classes.min():.2f} to {classes.max():.2f}",
        ),
        ("distance", f"{distances.mean():.3f} in the mean, total variation from the whole; up to {distances.max():.3f}"),
        ("largest class", f"{100 * largest:.1f} % of a replica in the mean"),
    ):
        lines.append(f"  {name:16}{text}")
    return "\n".join(lines)


def _draw(counted: Sequence[tuple[Partitioner, NDArray[np.int64]]], names: Sequence[str], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    replicas, classes = counted[0][1].shape
    cell = 0.3 if max(replicas, classes) <= 32 else 9.6 / max(replicas, classes)  # inches
    width, height = max(2.6, cell * replicas), max(2.0, cell * classes)
    figure = Figure(figsize=(len(counted) * (width + 0.5) + 0.4, height + 1.0), layout="constrained")
    largest = max(counts.max() for _, counts in counted)
    # The largest bubble fills its cell; a bubble's size is its diameter in points, squared.
    full = (72 * 0.95 * min(width / replicas, height / classes)) ** 2
    for axes, (partitioner, counts) in zip(figure.subplots(1, len(counted), squeeze=False)[0], counted, strict=True):
        replica, c = np.nonzero(counts)
        axes.scatter(replica, c, s=full * counts[replica, c] / largest, color=BLUE, linewidths=0)
        axes.set(xlabel="replica", title=_title(partitioner), xlim=(-0.7, replicas - 0.3), ylim=(-0.7, classes - 0.3))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        if classes <= 20:
            axes.set_yticks(range(classes), names)
        axes.set_axisbelow(True)
        tidy(axes)
    figure.axes[0].set_ylabel("class")
    figure.savefig(path, format="png", dpi=150)


def _title(partitioner: Partitioner) -> str:
    shown = [f"{name} = {value:g}" for name, value in vars(partitioner).items() if name in ("alpha", "per_replica") and value]
    return ", ".join([type(partitioner).__name__, *shown])
