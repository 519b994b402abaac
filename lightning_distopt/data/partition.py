"""Partitioners: how a dataset is divided among replicas that are to see different data."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from lightning_distopt.data.labels import Labels, column, from_samples, labels_of
from lightning_distopt.data.shares import Indices, deal, fill, log_gamma, members_of_classes, scale, without_splitting
from lightning_distopt.lookup import short_form
from lightning_distopt.options import check_whole, is_number, is_whole

__all__ = ["IID", "PARTITIONERS", "ByClass", "ByKey", "Dirichlet", "LabelShards", "Partitioner", "make_partitioner"]

_DRAWS = 100


class Partitioner(ABC):
    """A function of a dataset and `n` that returns `n` lists of indices, in which each sample occurs once.

    The lists follow from the options alone: they are the same on every rank, and nothing is drawn from the global random
    streams. Each is in the order of the dataset. Any function like it, or lists, are a partition as well.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> class Halves(Partitioner):
        ...     def divide(self, dataset, n):
        ...         return np.array_split(np.arange(len(dataset)), n)
        >>> Halves()(TensorDataset(torch.zeros(5)), 2)
        [[0, 1, 2], [3, 4]]
    """

    def __call__(self, dataset: Dataset[Any], n: int) -> list[list[int]]:
        """Divide the dataset among `n` replicas.

        Args:
            dataset: any map-style dataset.
            n: number of replicas.

        Returns:
            The indices of each replica's samples.

        Raises:
            ValueError: if that is impossible: fewer samples, classes or groups than replicas, or no labels.
        """
        size = len(dataset)  # type: ignore[arg-type]
        if size < n:
            raise ValueError(f"There are {n} replicas but only {size} samples: every replica needs one.")
        lists = [np.sort(part).tolist() for part in self.divide(dataset, n)]
        for i, part in enumerate(lists):
            if not part:
                raise ValueError(f"{self!r} leaves replica {i} of {n} without a sample: use fewer replicas.")
        return lists

    @abstractmethod
    def divide(self, dataset: Dataset[Any], n: int) -> Sequence[Indices]:
        """Return the samples of each replica, in any order."""

    def __repr__(self) -> str:
        options = {name: getattr(self, name, None) for name in inspect.signature(type(self)).parameters}
        shown = [f"{name}={value!r}" for name, value in options.items() if isinstance(value, str | int | float)]
        return f"{type(self).__name__}({', '.join(shown)})"


class IID(Partitioner):
    """The same distribution for every replica: a random permutation, cut into equal parts.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> IID()(TensorDataset(torch.zeros(6)), 2)
        [[1, 2, 5], [0, 3, 4]]

    Args:
        seed: of the permutation.

    Raises:
        ValueError: if the seed is not a whole number between 0 and 2^32 - 1.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = _checked_seed(seed)

    def divide(self, dataset: Dataset[Any], n: int) -> Sequence[Indices]:
        """Return the parts."""
        return np.array_split(np.random.RandomState(self.seed).permutation(len(dataset)), n)  # type: ignore[arg-type]


class Dirichlet(Partitioner):
    r"""Shares of the classes that are drawn from a Dirichlet distribution: the smaller `alpha`, the more replicas differ.

    Papers mean two different things by the same `alpha`. With classes `c` of relative frequency `p_c`,

    $$ \text{over replicas:} \quad q_c \sim \mathrm{Dir}(\alpha 1_n), \qquad
    \text{over classes:} \quad q_i \sim \mathrm{Dir}(\alpha p) $$

    - "replicas": replica `i` gets the share `q_ci` of class `c`. This is what Yurochkin et al. (2019), Li et al. (2022) and the
      code published with chapters 8 and 9 of the thesis do; hence the default.
    - "classes": replica `i` has the share `q_ic` of its samples from class `c` (Hsu et al., 2019). The thesis prints this
      formula. The same `alpha` is far more heterogeneous here: of ten equal classes, each has a concentration of `alpha / 10`.

    `balanced` gives all replicas equally many samples, give or take one. Shares are independent `Gamma` variables, normalized;
    here for every class and every replica: the nearest numbers, in relative entropy, that add up to both (Sinkhorn).
    Replicas of equal size are what chapter 9 trains, and Hsu et al. The code of chapter 9 gets them otherwise: replicas that
    have enough get nothing of later classes, and the whole sequence is cut into equal pieces, by which neighbours come to share
    classes.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> labels = torch.arange(1000) % 4
        >>> parts = Dirichlet(alpha=0.1)(TensorDataset(labels), 4)
        >>> [torch.bincount(labels[part], minlength=4).tolist() for part in parts]
        [[0, 156, 94, 0], [174, 0, 0, 76], [75, 94, 81, 0], [1, 0, 75, 174]]

    Args:
        alpha: concentration, greater than 0: equal distributions as it goes to infinity, one class each as it goes to 0.
        over: what shares are drawn over.
        balanced: whether all replicas get equally many samples. If not, only for "replicas", sizes follow from the shares.
        min_samples: how many every replica has at least if sizes follow from the shares: they are drawn anew until it is so,
            at most 100 times.
        labels: as in `labels_of`: found by default.
        seed: of the shares, and of who gets which samples of a class.

    Raises:
        ValueError: for options out of range; when called, if 100 draws give no replica too few.

    Reference: Yurochkin et al.: Bayesian nonparametric federated learning of neural networks. ICML 2019. Hsu, Qi, Brown:
    Measuring the effects of non-identical data distribution for federated visual classification, 2019. Li, Diao, Chen, He:
    Federated learning on non-IID data silos. ICDE 2022.
    """

    def __init__(
        self,
        alpha: float,
        over: Literal["replicas", "classes"] = "replicas",
        balanced: bool = True,
        min_samples: int = 1,
        labels: Labels = None,
        seed: int = 0,
    ) -> None:
        if not (is_number(alpha) and 0 < alpha < math.inf):
            raise ValueError(f"`alpha` of a Dirichlet distribution must be a number greater than 0; got {alpha!r}.")
        if over not in ("replicas", "classes"):
            raise ValueError(f"`over` must be 'replicas' or 'classes'; got {over!r}.")
        if not isinstance(balanced, bool):
            raise ValueError(f"`balanced` must be true or false; got {balanced!r}.")
        if over == "classes" and not balanced:
            raise ValueError("Shares `over='classes'` say nothing about sizes, which are equal: leave `balanced=False` out.")
        self.alpha, self.over, self.balanced = float(alpha), over, balanced
        self.min_samples = check_whole("min_samples", min_samples)
        self.labels, self.seed = labels, _checked_seed(seed)

    def divide(self, dataset: Dataset[Any], n: int) -> Sequence[Indices]:
        """Return the samples of each replica."""
        members = members_of_classes(labels_of(dataset, self.labels))
        sizes = np.array([len(member) for member in members])
        if self.min_samples * n > sizes.sum():
            raise ValueError(f"`min_samples={self.min_samples}` for {n} replicas is more than the {sizes.sum()} samples.")
        random = np.random.RandomState(self.seed)
        for _ in range(_DRAWS):
            counts = self._counts(sizes, n, random)
            if counts.sum(axis=1).min() >= self.min_samples:
                return deal(members, counts, random)
        smaller = " or a smaller one" if self.min_samples > 1 else ""
        raise ValueError(
            f"In {_DRAWS} draws with `alpha={self.alpha:g}` one of {n} replicas always had less than `min_samples="
            f"{self.min_samples}`: use `balanced=True`, a larger `alpha`, fewer replicas{smaller}."
        )

    def _counts(self, sizes: Indices, n: int, random: np.random.RandomState) -> Indices:
        """Draw how many samples of each class each replica gets, `[n, classes]`."""
        total = sizes.sum()
        concentration = self.alpha * (sizes / total if self.over == "classes" else np.ones(len(sizes)))
        shares = log_gamma(np.tile(concentration, (n, 1)), random)
        room = np.full(n, total)
        if self.balanced:
            room = np.array([len(part) for part in np.array_split(np.arange(total), n)])
            shares = scale(shares, room, sizes)
        counts, owed = np.zeros(shares.shape, dtype=np.int64), np.zeros(n)
        for c in random.permutation(len(sizes)):
            counts[:, c] = fill(sizes[c], shares[:, c], room - counts.sum(axis=1), owed)
        return counts


class LabelShards(Partitioner):
    """Samples are sorted by label and cut into `n * per_replica` equal shards, of which each replica gets some at random.

    With two shards most replicas see two classes. Where a shard begins and ends between classes, it has some of both.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> labels = torch.arange(1000) % 4
        >>> parts = LabelShards(per_replica=2)(TensorDataset(labels), 4)
        >>> [torch.bincount(labels[part], minlength=4).tolist() for part in parts]
        [[0, 125, 0, 125], [125, 0, 0, 125], [125, 125, 0, 0], [0, 0, 250, 0]]

    Args:
        per_replica: shards of each replica.
        labels: as in `labels_of`: found by default.
        seed: of who gets which shards.

    Raises:
        ValueError: for options out of range; when called, if there are more shards than samples.

    Reference: McMahan et al.: Communication-efficient learning of deep networks from decentralized data. AISTATS 2017.
    """

    def __init__(self, per_replica: int = 2, labels: Labels = None, seed: int = 0) -> None:
        self.per_replica = check_whole("per_replica", per_replica)
        self.labels, self.seed = labels, _checked_seed(seed)

    def divide(self, dataset: Dataset[Any], n: int) -> Sequence[Indices]:
        """Return the samples of each replica."""
        order = np.concatenate(members_of_classes(labels_of(dataset, self.labels)))
        count = n * self.per_replica
        if count > len(order):
            raise ValueError(f"{self.per_replica} shards for each of {n} replicas are more than the {len(order)} samples.")
        shards = np.array_split(order, count)
        hands = np.random.RandomState(self.seed).permutation(count).reshape(n, self.per_replica)
        return [np.concatenate([shards[k] for k in hand]) for hand in hands]


class ByClass(Partitioner):
    """Each class belongs to one replica alone; or each replica has so many classes, and shares them with others.

    - By default classes go to replicas as in `ByKey`: the largest first, each to who has least.
    - With `per_replica`, each replica gets that many classes, at random among those that the fewest have so far; replicas with
      a class in common divide it equally.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> labels = torch.arange(1000) % 4
        >>> for partitioner in (ByClass(), ByClass(per_replica=3)):
        ...     parts = partitioner(TensorDataset(labels), 2)
        ...     print([torch.bincount(labels[part], minlength=4).tolist() for part in parts])
        [[250, 0, 250, 0], [0, 250, 0, 250]]
        [[125, 0, 125, 250], [125, 250, 125, 0]]

    Args:
        per_replica: classes of each replica. None: as many as it takes for each class to belong to one.
        labels: as in `labels_of`: found by default.
        seed: of who gets which classes, and which samples of one that is shared.

    Raises:
        ValueError: when called, if there are more replicas than classes, or too few of them to have all classes.
    """

    def __init__(self, per_replica: int | None = None, labels: Labels = None, seed: int = 0) -> None:
        self.per_replica = None if per_replica is None else check_whole("per_replica", per_replica)
        self.labels, self.seed = labels, _checked_seed(seed)

    def divide(self, dataset: Dataset[Any], n: int) -> Sequence[Indices]:
        """Return the samples of each replica."""
        members = members_of_classes(labels_of(dataset, self.labels))
        classes = len(members)
        if self.per_replica is None:
            if n > classes:
                raise ValueError(
                    f"There are {n} replicas but only {classes} classes: use at most {classes} replicas, or let them share "
                    "classes by 'by_class:1'."
                )
            return without_splitting(members, n)
        if self.per_replica > classes:
            raise ValueError(f"There are no {self.per_replica} classes for each replica, but only {classes}.")
        if n * self.per_replica < classes:
            raise ValueError(
                f"{n} replicas with `per_replica={self.per_replica}` leave out some of the {classes} classes: use at least "
                f"'by_class:{-(-classes // n)}'."
            )
        random = np.random.RandomState(self.seed)
        has = np.zeros((n, classes), dtype=bool)
        for i in range(n):
            has[i, np.lexsort((random.permutation(classes), has.sum(axis=0)))[: self.per_replica]] = True
        counts = np.zeros((n, classes), dtype=np.int64)
        for c, member in enumerate(members):
            owners = random.permutation(np.flatnonzero(has[:, c]))
            counts[owners, c] = [len(part) for part in np.array_split(member, len(owners))]
        return deal(members, counts, random)


class ByKey(Partitioner):
    """Groups of samples that belong together, such as those of a user, are never split.

    The largest first, each goes to the replica that has least so far.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> speakers = ["ann", "bob", "bob", "cyd", "cyd", "ann", "ann", "ann"]
        >>> ByKey(speakers)(TensorDataset(torch.zeros(8)), 2)
        [[0, 5, 6, 7], [1, 2, 3, 4]]

    Args:
        key: the group of each sample: a sequence, a function of the sample's number, or the name of an attribute or a column of
            the dataset, or of a key in its samples, which are all read then.

    Raises:
        ValueError: when called, if there are fewer groups than replicas, or not one key for each sample.
    """

    def __init__(self, key: str | Callable[[int], Hashable] | Sequence[Hashable] | Tensor) -> None:
        if not callable(key) and not isinstance(key, str | Sequence | Tensor | np.ndarray):
            raise ValueError(f"`key` must be a sequence, a function of a sample's number, or a name; got {key!r}.")
        if isinstance(key, str) and not key:
            raise ValueError("`key` must be a sequence, a function of a sample's number, or a name; got an empty one.")
        self.key = key

    def divide(self, dataset: Dataset[Any], n: int) -> Sequence[Indices]:
        """Return the samples of each replica."""
        size = len(dataset)  # type: ignore[arg-type]
        keys: Any = self.key
        if isinstance(self.key, str):
            keys = column(dataset, [self.key])
            if keys is None:
                keys = from_samples(dataset, [self.key], pairs=False, remedy="give a sequence as `key`")
        elif callable(keys):
            keys = [keys(k) for k in range(size)]
        if len(keys) != size:
            raise ValueError(f"There are {len(keys)} keys but {size} samples: one for each is needed.")
        groups: dict[Hashable, list[int]] = {}
        for k, key in enumerate(keys):
            if isinstance(key, Tensor | np.ndarray | list):  # which have no hash, or one of their own each
                key = repr(key if isinstance(key, list) else key.tolist())
            groups.setdefault(key, []).append(k)
        if len(groups) < n:
            raise ValueError(f"There are {n} replicas but only {len(groups)} different keys, and groups are not split.")
        return without_splitting([np.array(group) for group in groups.values()], n)


PARTITIONERS: dict[str, type[Partitioner]] = {
    "iid": IID,
    "dirichlet": Dirichlet,
    "shards": LabelShards,
    "by_class": ByClass,
    "by_key": ByKey,
}
"""Partitioners that `make_partitioner` takes by name."""

_OPTIONS = {"dirichlet": "alpha:0.1", "shards": "per_replica:2", "by_class": "per_replica:2", "by_key": "key:speaker"}


def make_partitioner(partition: str | Partitioner) -> Partitioner:
    """Return the partitioner of a name, with its first option after a colon; a partitioner is returned as it is.

    Example:
        >>> make_partitioner("dirichlet:0.1")
        Dirichlet(alpha=0.1, over='replicas', balanced=True, min_samples=1, seed=0)
        >>> make_partitioner("shards"), make_partitioner("by_class"), make_partitioner("by_key:speaker")
        (LabelShards(per_replica=2, seed=0), ByClass(seed=0), ByKey(key='speaker'))

    Args:
        partition: `"iid"`, `"dirichlet:0.1"`, `"shards:2"`, `"by_class"`, `"by_class:2"`, `"by_key:speaker"`, with numbers and
            names of your own, or a `Partitioner`.

    Raises:
        ValueError: if there is none of that name, or what follows the colon is missing or wrong.
    """
    if isinstance(partition, Partitioner):
        return partition
    cls, options = short_form(partition, PARTITIONERS, "partitioner", _OPTIONS)
    return cls(**options)


def _checked_seed(seed: Any) -> int:
    if not is_whole(seed, least=0) or seed >= 2**32:
        raise ValueError(f"`seed` must be a whole number from 0 to 2^32 - 1; got {seed!r}.")
    return seed
