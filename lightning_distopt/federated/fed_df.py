"""FedDF: the server learns from the ensemble of what clients send."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from lightning_distopt.communication import derive_seed, isolated_streams
from lightning_distopt.communication.rng import seed_streams
from lightning_distopt.communication.tensors import buffer_names, clone_tree, combine_tensors, finite
from lightning_distopt.federated.aggregator import Aggregator, Vector
from lightning_distopt.federated.distillation import (
    Network,
    Student,
    Unlabelled,
    check_data,
    check_labels,
    check_logits,
    distil,
    evaluating,
    prototype_kept,
)
from lightning_distopt.federated.prototypes import Group
from lightning_distopt.federated.wrapper import Wrapper
from lightning_distopt.options import check_choice, check_positive, check_whole

Data = Tensor | Dataset | DataLoader | Callable[[int], Any] | str
"""Samples without labels."""


class FedDF(Wrapper):
    r"""Distil the ensemble of the clients' models into their average, on samples without labels.

    $$ x_{t,0} = \sum_{k \in S_t} p_k \, \hat x^k_t, \qquad
       x_{t,j} = x_{t,j-1} - \eta_j \, \frac{\partial}{\partial x} \mathrm{KL}\Big( \mathrm{softmax}\Big( \frac{1}{|S_t|}
       \sum_{k \in S_t} f(\hat x^k_t, d_j) \Big) \,\Big\|\, \mathrm{softmax}\big( f(x_{t,j-1}, d_j) \big) \Big) $$

    for batches `d_1 ... d_N`, or until the accuracy on the server's validation data (that of all validation loaders of the
    Trainer) does not get better any more; the best model is kept, which may be the average. `f` is the module's `forward`,
    from inputs to logits `[B, classes]`. Teachers are in evaluation mode, the student in training mode, so that the running
    statistics of its norms follow the samples; all in the precision of the parameters. Clients, and the average, are another
    aggregator's; `weighting="uniform"` averages uniformly, as the text of the thesis has it in places.

    With several prototypes, each is distilled from the ensemble of all clients, whichever theirs are (algorithm 18; its line
    14 has those of the prototype alone, unlike the text). One that no client of the round has is left as it was.

    Every rank asks the teachers that it has trained, and logits are added up over ranks, `[B, classes]` in each step. All ranks
    make the same step of the student, on the whole batch: its parts would have other batch statistics, and gradients are
    longer than logits. Where the samples are a tensor, teachers are asked once for each of them.

    Example:
        >>> FedDF(torch.zeros(100, 3, 32, 32), aggregator="fedprox", steps=500)
        FedDF(data=Tensor, aggregator=FedProx(mu=0.01), steps=500, patience=1000, lr=0.001, batch_size=128, ...)

    Args:
        data: samples, as the module's `forward` takes them: a tensor; a map-style dataset of `x` or `(x, y)`, whose `y` is
            ignored, or a `DataLoader` over one; a function of a batch size that returns samples, such as a generative model; or
            "noise", uniform between the least and the largest value of the training inputs, and shaped like these.
        aggregator: what clients do, and the server before it distils: an `Aggregator`, or its name.
        steps: `N`, steps in a round at most; 0 leaves distillation out.
        patience: steps without a better accuracy after which distillation stops. None: all steps are made, and the last
            model is kept, as where there is no validation data.
        lr: `eta`, from which the learning rate falls to zero along a cosine, over `steps`.
        batch_size: `B`.
        validate_every: steps from one validation to the next.
        optimizer: "adam" or "sgd", a new one in each round.
        start: "from_average", or "from_previous": the student begins as what the server had before the round.
        ensemble: "all" clients teach each prototype, or those of the same "prototype".

    Attributes:
        students: of the last round, with the `steps` that they have made and the `accuracy` of what was kept.

    Raises:
        ValueError: for options out of range; before the first client trains, for data that does not fit the module.

    Reference: Lin, Kong, Stich, Jaggi: Ensemble distillation for robust model fusion in federated learning. NeurIPS 2020.
    T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, algorithms 5 and 18, tables 17.1-17.4.
    """

    def __init__(
        self,
        data: Data | None = None,
        aggregator: Aggregator | str = "fedavg",
        steps: int = 10_000,
        patience: int | None = 1_000,
        lr: float = 1e-3,
        batch_size: int = 128,
        validate_every: int = 100,
        optimizer: Literal["adam", "sgd"] = "adam",
        start: Literal["from_average", "from_previous"] = "from_average",
        ensemble: Literal["all", "prototype"] = "all",
    ) -> None:
        if data is None:
            raise ValueError("FedDF distils on samples without labels: give them, as in `FedDF(data=dataset)`.")
        _check_options(steps, patience, lr, batch_size, validate_every, optimizer, start, ensemble)
        check_data(data)
        self.data, self.steps, self.patience, self.lr, self.batch_size = data, steps, patience, float(lr), batch_size
        self.validate_every, self.optimizer, self.start, self.ensemble = validate_every, optimizer, start, ensemble
        super().__init__(aggregator)

    def _take_traits(self) -> None:
        super()._take_traits()
        self.needs_models = self.needs_models or self.steps > 0
        self.needs_data_of_both = self.needs_data_of_both or (self.steps > 0 and isinstance(self.data, str))

    def __repr__(self) -> str:
        names = list(inspect.signature(FedDF).parameters)[1:]
        data = repr(self.data) if isinstance(self.data, str) else type(self.data).__name__
        return f"FedDF({', '.join([f'data={data}', *(f'{name}={getattr(self, name)!r}' for name in names)])})"

    def setup(self, server: Any) -> None:
        """Bind to a server."""
        super().setup(server)
        self.students: list[Student] = []
        self._samples: Unlabelled | None = None
        self._classes = 0

    def begin_round(self) -> None:
        """Look at the data, the first time."""
        if self.steps:
            self._prepare()
        super().begin_round()

    def _prepare(self) -> Unlabelled:
        """Return the samples, and see whether all prototypes take them."""
        if self._samples is not None:
            return self._samples
        server = self.server
        device, dtype = server.replicas.device, server.replicas.parameters[0].dtype
        with isolated_streams(device):
            data = _noise(server.training_inputs()) if isinstance(self.data, str) else self.data
            samples = Unlabelled(data, self.batch_size, device, dtype)
            seed_streams(derive_seed(server.seed, "distillation"), device)
            try:
                inputs, _ = next(samples.batches(derive_seed(server.seed, "distillation"), 1))
            except Exception as error:
                raise ValueError(
                    f"The samples for distillation can't be drawn in batches of {samples.batch_size}: {error}"
                ) from error
            self._check_logits(inputs)
            next(self._validation(), None)
        self._samples = samples
        return samples

    def _check_logits(self, inputs: Any) -> None:
        server, shapes = self.server, {}
        for group in server.groups:
            network = Network(*self._of(group, server.model, server.buffers))
            try:
                with evaluating(server.module), prototype_kept(server.module):
                    logits = network(inputs)
            except Exception as error:
                shape = f" {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else ""
                raise ValueError(
                    f"The samples for distillation do not fit the module, whose `forward` fails for a batch{shape} of them "
                    f"with {type(error).__name__}: {error}"
                ) from error
            check_logits("FedDF", logits)
            shapes[group.name] = logits.shape[1]
        if len(set(shapes.values())) > 1:
            classes = ", ".join(f"{name!r} {number}" for name, number in shapes.items())
            raise ValueError(
                f"Prototypes learn from each other's logits, which must be for the same classes; their numbers are {classes}."
            )
        self._classes = next(iter(shapes.values()))

    def _of(self, group: Group, model: Vector, buffers: Sequence[Tensor]) -> tuple[Any, ...]:
        """Return what makes a network of a model and buffers."""
        replicas = self.server.replicas
        slots = [replicas.slots[k] for k in group.slots]
        parameters = {slot.name: slot.view(model[slot.block]) for slot in slots}
        own = {name: buffer.clone() for name, buffer in zip(buffer_names(replicas.module), buffers, strict=True)}
        return (
            replicas.module,
            parameters,
            own,
            group.name,
            {slot.name: replicas.parameters[slot.block].dtype for slot in slots},
        )

    # ------------------------------------------------------------------------------------------------------- distillation
    def finish_round(self, average: Vector) -> None:
        """Let the other aggregator make a model, and distil it."""
        server = self.server
        model, buffers = server.model, server.buffers
        if self.start == "from_previous":  # buffers are averaged by now, but the module has not got them yet
            model, buffers = [x.clone() for x in model], clone_tree(server.replicas.buffers(0))
        super().finish_round(average)
        if self.steps == 0:
            return
        samples = self._prepare()
        received = [float(sum(server.group(k) is group for k in server.received)) for group in server.groups]
        counts = torch.tensor(received, device=server.replicas.device)
        server.communicator.sum(counts)
        numbers = [i for i, count in enumerate(counts.tolist()) if count]
        groups = [server.groups[i] for i in numbers]
        self.students = [Student(*self._of(group, model, buffers)) for group in groups]
        ensembles = numbers if self.ensemble == "prototype" else [0] * len(numbers)
        with isolated_streams(server.replicas.device), torch.enable_grad(), prototype_kept(server.module):
            self._distil(samples, _Teachers(self, counts, ensembles, samples))
        for group, student in zip(groups, self.students, strict=True):
            self._adopt(group, student)

    def _distil(self, samples: Unlabelled, teachers: _Teachers) -> None:
        server = self.server
        device, communicator = server.replicas.device, server.communicator
        seed = derive_seed(server.seed, "distillation", server.round)
        seed_streams(seed, device)
        # Every rank looks at its part of the validation data.
        own = [batch for j, batch in enumerate(self._validation()) if j % communicator.world_size == communicator.rank]
        total = torch.tensor([float(sum(len(targets) for _, targets in own))], device=device)
        communicator.sum(total)
        title = f"Distillation in round {server.round}"
        distil(
            self.students,
            samples.batches(seed, self.steps),
            teachers,
            self.steps,
            self.lr,
            self.optimizer,
            partial(self._accuracy, own, total.item()) if total.item() else None,
            self.steps if self.patience is None else self.patience,
            self.validate_every,
            before_step=lambda j: seed_streams(derive_seed(seed, "students", j), device),
            bar=partial(tqdm, desc=title, disable=not server.shows_progress),
        )

    def _validation(self) -> Iterator[tuple[Any, Tensor]]:
        if self.patience is None or not self.server.validates:
            return
        for inputs, targets in self.server.validation_batches():
            check_labels("FedDF", targets, ", or use `patience=None`")
            yield inputs, targets

    def _accuracy(self, batches: list[tuple[Any, Tensor]], total: float, student: Student) -> float:
        right = torch.zeros(1, device=self.server.replicas.device)
        with evaluating(self.server.module):
            for inputs, targets in batches:
                right += (student(inputs).argmax(dim=1) == targets).sum()
        self.server.communicator.sum(right)
        return right.item() / total

    def _adopt(self, group: Group, student: Student) -> None:
        """Let a student be the server's model: that of the first rank, as other ranks may have rounded differently."""
        server, names = self.server, buffer_names(self.server.module)
        slots = [server.replicas.slots[k] for k in group.slots]
        targets = [slot.view(server.model[slot.block]) for slot in slots] + [server.buffers[b] for b in group.buffers]
        parameters, buffers = [p.detach() for p in student.parameters.values()], [student.buffers[name] for name in names]
        student.parameters, student.buffers = {}, {}  # not to be kept until the next round
        values = parameters + [buffers[b] for b in group.buffers]
        combine_tensors([values], lambda block: server.communicator.broadcast(block.view(torch.uint8)))
        if not all(finite([*parameters, *server.watched(buffers, group.buffers)])):
            warnings.warn(
                f"Distillation in round {server.round} has led to values that are not finite, so it is left out: lower `lr`.",
                stacklevel=2,
            )
            return
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)


class _Teachers:
    """The mean logits of the clients' models on all ranks, which are asked once where samples are always the same.

    Args:
        fed_df: whose server has them.
        counts: how many there are, of each group.
        ensembles: of each student: the number of the group that teaches it, or 0 for all, where `fed_df` says so.
        samples: that they are asked.
    """

    def __init__(self, fed_df: FedDF, counts: Tensor, ensembles: Sequence[int], samples: Unlabelled) -> None:
        server, together = fed_df.server, fed_df.ensemble == "all"
        self.communicator, self.module, self.ensembles = server.communicator, server.module, ensembles
        self.counts = counts.sum(dim=0, keepdim=True) if together else counts.clamp(min=1)
        self.teachers = [
            (0 if together else server.groups.index(server.group(k)), Network(*fed_df._of(server.group(k), model, buffers)))
            for k, (model, buffers) in sorted(server.received.items())
        ]
        size = samples.size if samples.fixed else 0
        self.means = server.model[0].new_zeros(len(self.counts), size, fed_df._classes)
        self.known = torch.zeros(size, dtype=torch.bool)

    def __call__(self, inputs: Any, numbers: Tensor | None) -> list[Tensor]:
        """Return the mean of the logits of each student's teachers, `[B, classes]`."""
        if numbers is None:
            means = self._ask(inputs)
        else:
            new = ~self.known[numbers]
            if new.any():
                self.means[:, numbers[new]] = self._ask(inputs[new.to(inputs.device)])
                self.known[numbers] = True
            means = self.means[:, numbers]
        return [means[number] for number in self.ensembles]

    def _ask(self, inputs: Any) -> Tensor:
        length = len(next(iter(inputs.values()))) if isinstance(inputs, dict) else len(inputs)
        total = self.means.new_zeros(len(self.counts), length, self.means.shape[2])
        with evaluating(self.module):
            for ensemble, teacher in self.teachers:
                total[ensemble] += teacher(inputs)
        self.communicator.sum(total)
        return total / self.counts[:, None, None]


def _noise(inputs: Tensor) -> Callable[[int], Tensor]:
    """Return a generator of uniform noise in the range of some inputs, shaped like these."""
    low, high, values = inputs.min(), inputs.max(), inputs if inputs.is_floating_point() else inputs.float()
    return lambda size: torch.rand(size, *inputs.shape[1:], dtype=values.dtype).to(inputs.device) * (high - low) + low


def _check_options(
    steps: Any, patience: Any, lr: Any, batch_size: Any, validate_every: Any, optimizer: Any, start: Any, ensemble: Any
) -> None:
    least = {"steps": (steps, 0), "batch_size": (batch_size, 1), "validate_every": (validate_every, 1)}
    if patience is not None:
        least["patience"] = (patience, 1)
    for name, (value, lowest) in least.items():
        check_whole(name, value, lowest)
    check_positive("lr", lr)
    check_choice("optimizer", optimizer, ("adam", "sgd"))
    check_choice("start", start, ("from_average", "from_previous"))
    check_choice("ensemble", ensemble, ("all", "prototype"))
