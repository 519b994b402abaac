"""Ensemble distillation: students learn what several teachers say, together, of samples without labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from tqdm.auto import tqdm

from lightning_distopt.communication import derive_seed
from lightning_distopt.communication.rng import seed_streams


def avg_logits_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    r"""Return how far a student is from its teachers, in the mean over samples.

    $$ \mathrm{KL}\big(t \,\|\, \mathrm{softmax}(z)\big), \qquad
       t = \mathrm{softmax}\Big(\frac{1}{|S|} \sum_{k \in S} z_k\Big) \propto \prod_{k \in S} \mathrm{softmax}(z_k)^{1/|S|} $$

    with gradient `(softmax(z) - t) / B` in the student's logits `z`. Logits are averaged, not probabilities: so `t` is the
    geometric mean of what the teachers say, normalised.

    Example:
        >>> z = torch.tensor([[0.0, 0.0]], requires_grad=True)
        >>> avg_logits_loss(z, torch.tensor([[math.log(3.0), 0.0]])).backward()
        >>> z.grad
        tensor([[-0.2500,  0.2500]])

    Args:
        logits: the student's, `[B, classes]`.
        teacher: the mean of the teachers' logits, `[B, classes]`.

    Reference: Lin, Kong, Stich, Jaggi: Ensemble distillation for robust model fusion in federated learning. NeurIPS 2020.
    """
    targets = F.log_softmax(teacher.detach(), dim=1)
    return F.kl_div(F.log_softmax(logits, dim=1), targets, reduction="batchmean", log_target=True)


class Network:
    """What a module computes with other parameters and buffers, which leaves its own alone.

    Example:
        >>> module = nn.Linear(2, 1)
        >>> Network(module, {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, {})(torch.tensor([[2.0, 3.0]]))
        tensor([[5.]])

    Args:
        module: maps inputs to logits.
        parameters: by name; those that are missing are the module's.
        buffers: by name, changed in place as a module does in training.
        prototype: which of the module's prototypes is active, if it has any.
        dtypes: of the module's parameters by name, where these are kept in another one here.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: dict[str, Tensor],
        buffers: dict[str, Tensor],
        prototype: str | None = None,
        dtypes: dict[str, torch.dtype] | None = None,
    ) -> None:
        self.module, self.parameters, self.buffers = module, parameters, buffers
        self.prototype, self.dtypes = prototype, dtypes or {}

    def __call__(self, inputs: Any) -> Tensor:
        """Return the logits of inputs."""
        values = {name: p.to(self.dtypes.get(name, p.dtype)) for name, p in self.parameters.items()} | self.buffers
        if self.prototype is not None:
            self.module.prototype = self.prototype  # type: ignore[assignment]
        logits: Tensor = functional_call(self.module, values, (inputs,))
        self.buffers = {name: values[name] for name in self.buffers}  # a module may have assigned other tensors
        half = isinstance(logits, Tensor) and logits.dtype in (torch.float16, torch.bfloat16)
        return logits.float() if half else logits


class Student(Network):
    """A network that is distilled; arguments as for `Network`.

    Attributes:
        steps: that it has made.
        accuracy: of its best state on validation data; NaN where there is none.
        best_step: after which it was that, 0 being the start.
        stopped: whether it has been without progress for too long.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parameters = {name: p.detach().clone().requires_grad_() for name, p in self.parameters.items()}
        self.steps = self.best_step = 0
        self.accuracy, self.stopped = math.nan, False
        self._best: list[Tensor] = []

    def begin(self, optimizer: Literal["adam", "sgd"]) -> None:
        """Make an optimizer."""
        leaves = list(self.parameters.values())
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(leaves) if optimizer == "adam" else torch.optim.SGD(leaves, lr=0.0)
        )

    def step(self, inputs: Any, teacher: Tensor, lr: float) -> None:
        """Make a step towards the teachers."""
        self.optimizer.zero_grad()
        avg_logits_loss(self(inputs), teacher).backward()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.steps += 1

    def judge(self, accuracy: float, patience: int) -> None:
        """Remember the state if it is the best so far; stop where none has been better for `patience` steps."""
        if not self._best or accuracy > self.accuracy:
            self.accuracy, self.best_step = accuracy, self.steps
            self._best = [value.detach().clone() for value in self._values()]
        elif self.steps - self.best_step >= patience:
            self.stopped = True

    def finish(self) -> None:
        """Return to the best state, where any was looked at."""
        with torch.no_grad():
            for value, best in zip(self._values(), self._best, strict=False):
                value.copy_(best)
        self._best = []
        del self.optimizer
        for parameter in self.parameters.values():
            parameter.grad = None

    def _values(self) -> list[Tensor]:
        return [*self.parameters.values(), *self.buffers.values()]


def distil(
    students: Sequence[Student],
    batches: Iterator[tuple[Any, Any]],
    teach: Callable[[Any, Any], Sequence[Tensor]],
    steps: int,
    lr: float = 1e-3,
    optimizer: Literal["adam", "sgd"] = "adam",
    evaluate: Callable[[Student], float] | None = None,
    patience: int = 1000,
    validate_every: int = 100,
    before_step: Callable[[int], None] = lambda step: None,
    bar: Callable[..., Any] = tqdm,
) -> None:
    r"""Let students learn from teachers, all of them from the same batches.

    The learning rate of step `j = 0 ... N - 1` is `lr (1 + cos(pi j / N)) / 2`.

    Example:
        >>> student = Student(nn.Linear(1, 2), {"weight": torch.zeros(2, 1), "bias": torch.zeros(2)}, {})
        >>> inputs, teacher = torch.ones(4, 1), torch.tensor([[1.0, -1.0]]).expand(4, 2)
        >>> distil([student], iter([(inputs, None)] * 200), lambda *batch: [teacher], steps=200, lr=0.1)
        >>> student(inputs[:1]).softmax(dim=1).detach()  # as teachers say
        tensor([[0.88, 0.12]])

    Args:
        students: to be changed.
        batches: inputs, and what else tells them apart.
        teach: returns, for a batch, the mean of the logits of each student's teachers.
        steps: `N`.
        lr: the first learning rate.
        optimizer: "adam" or "sgd", made anew.
        evaluate: returns a student's accuracy on validation data; where there is none, all steps are made and the last state
            is kept.
        patience: steps without a better accuracy after which a student stops; it returns to its best state, which may be the
            one that it started in.
        validate_every: steps from one validation to the next; there is one before the first step and after the last, too.
        before_step: called before the students make a step.
        bar: makes the progress bar.
    """
    for student in students:
        student.begin(optimizer)
        if evaluate is not None:
            student.judge(evaluate(student), patience)
    with bar(total=steps, delay=2, leave=False) as progress:
        for j, (inputs, key) in zip(range(steps), batches, strict=False):
            # eta_j = eta (1 + cos(pi j / N)) / 2
            rate = lr * (1 + math.cos(math.pi * j / steps)) / 2
            teachers = teach(inputs, key)
            before_step(j)
            for student, teacher in zip(students, teachers, strict=True):
                if not student.stopped:
                    student.step(inputs, teacher, rate)
            progress.update()
            if evaluate is None or ((j + 1) % validate_every and j + 1 < steps):
                continue
            for student in students:
                if not student.stopped:
                    student.judge(evaluate(student), patience)
            progress.set_postfix(refresh=False, accuracy=max(student.accuracy for student in students))
            if all(student.stopped for student in students):
                break
    for student in students:
        student.finish()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Let a module and its parts be in evaluation mode, without gradients."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def prototype_kept(module: nn.Module) -> Iterator[None]:
    """Let a module that has prototypes be the same one after the body."""
    before: Any = getattr(module, "prototype", None)
    try:
        yield
    finally:
        if before is not None:
            module.prototype = before


def check_labels(name: str, targets: Any, instead: str = "") -> None:
    """Raise a `ValueError` unless targets are class labels, one whole number for each sample.

    Args:
        name: of the aggregator that needs them.
        targets: of a batch of validation data.
        instead: the end of the sentence, if it can do without.
    """
    if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point():
        raise ValueError(
            f"`{name}` compares predictions with class labels, one whole number for each sample: let the validation loader "
            f"give (inputs, labels){instead}."
        )


def check_logits(name: str, logits: Any, samples: int | None = None) -> None:
    """Raise a `ValueError` unless a module has returned logits.

    Args:
        name: of the aggregator that needs them.
        logits: what `forward` has returned.
        samples: that it got. None: it is not known how many.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or samples not in (None, len(logits)):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        of = "" if samples is None else f" for {samples} samples"
        raise ValueError(f"`{name}` needs logits, but `forward` returns {got}{of}: let it return `[samples, classes]`.")


class Unlabelled:
    """Samples without labels, in batches that follow from a seed.

    Example:
        >>> samples = Unlabelled(torch.arange(6.0).view(6, 1), batch_size=4)
        >>> [inputs.shape[0] for inputs, numbers in samples.batches(seed=0, count=3)]
        [4, 4, 4]

    Args:
        data: a tensor of samples; a map-style dataset, or a `DataLoader` over one, of samples `x` or `(x, y)`, whose `y` is
            ignored; or a function of a batch size that returns samples.
        batch_size: `B`; fewer if there are not as many.
        device, dtype: of the inputs; numbers that are no floats stay what they are.

    Attributes:
        fixed: whether a sample is the same each time it is drawn, as its number says.

    Raises:
        ValueError: for anything else, and for data without samples.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._loader: dict[str, Any] = {}
        check_data(data)
        if isinstance(data, TensorDataset):
            data = data.tensors[0]
        self.fixed = isinstance(data, Tensor)
        if isinstance(data, DataLoader):
            self._loader = {"collate_fn": data.collate_fn, "num_workers": data.num_workers}
            data = data.dataset
        self.data, self.batch_size, self.device, self.dtype = data, batch_size, device, dtype
        self.size = len(data) if _has_samples(data) else 0  # type: ignore[arg-type]
        if self.size:
            self.batch_size = min(batch_size, self.size)

    def batches(self, seed: int, count: int) -> Iterator[tuple[Any, Tensor | None]]:
        """Give inputs, with the numbers of their samples where these are `fixed`; reads from the global random streams.

        Datasets are gone through in a random order, again and again, leaving out what is too few for a batch.
        """
        if self.fixed:
            for numbers in self._numbers(seed, count):
                yield self._ready(self.data[torch.as_tensor(numbers, device=self.data.device)]), torch.as_tensor(numbers)
        elif not self.size:
            for j in range(count):
                seed_streams(derive_seed(seed, "samples", j), torch.device(self.device))
                yield self._ready(self.data(self.batch_size)), None
        else:
            sampler: Any = self._numbers(seed, count)
            generator = torch.Generator().manual_seed(derive_seed(seed, "workers"))
            batches = iter(DataLoader(self.data, batch_sampler=sampler, generator=generator, **self._loader))
            for j in range(count):
                seed_streams(derive_seed(seed, "samples", j), torch.device(self.device))
                yield self._ready(next(batches)), None

    def _numbers(self, seed: int, count: int) -> Iterator[list[int]]:
        each, order = self.size // self.batch_size, torch.empty(0)
        for j in range(count):
            epoch, place = divmod(j, each)
            if place == 0:
                generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
                order = torch.randperm(self.size, generator=generator)
            yield order[place * self.batch_size : (place + 1) * self.batch_size].tolist()

    def _ready(self, batch: Any) -> Any:
        inputs = batch[0] if isinstance(batch, list | tuple) else batch
        return on_device(inputs, self.device, self.dtype)


def on_device(inputs: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
    """Return inputs on a device, floating-point ones in a dtype."""
    if isinstance(inputs, dict):
        return {key: on_device(value, device, dtype) for key, value in inputs.items()}
    if not isinstance(inputs, Tensor):
        return inputs
    return inputs.to(device, dtype) if inputs.is_floating_point() else inputs.to(device)


def _has_samples(data: Any) -> bool:
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


def check_data(data: Any) -> None:
    """Raise a `ValueError` for data that batches can't be drawn from."""
    if isinstance(data, DataLoader):
        data = data.dataset
    if isinstance(data, str) and data == "noise":
        return
    if isinstance(data, str | IterableDataset) or not (_has_samples(data) or callable(data)):
        got = data if isinstance(data, str) else type(data).__name__
        raise ValueError(
            "`data`, the samples for distillation, must be a tensor, a map-style dataset, a `DataLoader` over one, a function "
            f'of a batch size that returns samples, or "noise"; got {got!r}.'
        )
    if _has_samples(data) and len(data) == 0:
        raise ValueError("`data`, the samples for distillation, has no sample: leave distillation out with `FedAvg()`.")
