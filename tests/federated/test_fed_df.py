"""FedDF: the formulas, whole rounds of it, and what else may change while a server distils: nothing."""

from __future__ import annotations

import re
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_distopt import DropWorst, FedAvg, FedAvgM, FedDF, FederatedStrategy, FedProx, OneBit
from lightning_distopt.communication import derive_seed
from lightning_distopt.federated import cohorts, fed_df, make
from lightning_distopt.federated.distillation import Student, Unlabelled, avg_logits_loss, distil
from tests.conformance.problems import Augmented
from tests.federated.problem import BATCH, SEED, SIZES, fit_net, parts, run
from tests.federated.test_strategy import SaveAndFail, Stop, stop_and_resume
from tests.oracles import federated as oracle
from tests.oracles.local_sgd import SGD, Adam

FEATURES, CLASSES, ETAS, FRACTION = 5, 3, [0.5, 0.3, 0.1], 0.5
N, ETA, B = 7, 0.2, 4
COUNT = round(FRACTION * len(SIZES))


# --------------------------------------------------------------------------------------------------------------- the formulas
def logits_of(*shape, seed=0):
    return np.random.default_rng(seed).normal(scale=2, size=shape)


def test_gradient_and_teacher():
    z, teachers = logits_of(6, 4), logits_of(3, 6, 4, seed=1)
    student = torch.tensor(z, requires_grad=True)
    loss = avg_logits_loss(student, torch.from_numpy(teachers).mean(dim=0))
    loss.backward()
    np.testing.assert_allclose(student.grad, oracle.avg_logits_gradient(z, teachers), rtol=0, atol=1e-12)
    geometric = np.prod([oracle.softmax(t) for t in teachers], axis=0) ** (1 / 3)
    geometric /= geometric.sum(axis=1, keepdims=True)
    divergence = (geometric * (np.log(geometric) - np.log(oracle.softmax(z)))).sum(axis=1).mean()
    assert loss.item() == pytest.approx(divergence, abs=1e-12)


def test_identical_teachers_teach_their_average_nothing():
    z = torch.tensor(logits_of(6, 4), requires_grad=True)
    avg_logits_loss(z, torch.stack([z, z, z]).mean(dim=0)).backward()
    assert z.grad.abs().max() < 1e-16


# --------------------------------------------------------------------------------------------------------------- whole rounds
class Squares(nn.Linear):
    def forward(self, x):
        return super().forward(x * x)


class Softmax(L.LightningModule):
    """Softmax regression, on the features or on their squares, or clients of both kinds."""

    def __init__(self, names=("plain",), classes=(CLASSES, CLASSES)) -> None:
        super().__init__()
        made = {"plain": nn.Linear(FEATURES, classes[0]), "squares": Squares(FEATURES, classes[1], bias=False)}
        self.prototypes = nn.ModuleDict({name: made[name] for name in names})
        self.prototype = names[0]
        generator = torch.Generator().manual_seed(2)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, x):
        return self.prototypes[self.prototype](x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_accuracy", (self(batch[0]).argmax(dim=1) == batch[1]).double().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: ETAS[min(t, len(ETAS) - 1)])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def labelled():
    rng = np.random.default_rng(4)
    return rng.normal(size=(sum(SIZES), FEATURES)), rng.integers(CLASSES, size=sum(SIZES))


def unlabelled():
    return torch.from_numpy(np.random.default_rng(6).normal(size=(11, FEATURES)))


def fit(rank, world_size, aggregator, names=("plain",), strategy=None, module=None, **options):
    x, y = map(torch.from_numpy, labelled())
    own = {"aggregator": aggregator, "clients": len(SIZES), "fraction": FRACTION, "partition": parts(), **(strategy or {})}
    module = (module or Softmax(names)).double()
    return run(
        rank, world_size, module, DataLoader(TensorDataset(x, y), BATCH), own, options.pop("rounds", len(ETAS)), **options
    )


def expected(aggregator, names=("plain",), prototypes="even"):
    """Return what the transcription makes of the same problem, `[rounds, d]`."""
    x, y = labelled()
    prototype = [names[k % len(names)] if prototypes == "even" else prototypes[k] for k in range(len(SIZES))]

    def features(P, d):
        return np.hstack([d, np.ones((len(d), 1))]) if P == "plain" else d * d

    def shape(P, v):  # as torch has the parameters: the weights [classes, features], then the bias
        weight = v[: CLASSES * FEATURES].reshape(CLASSES, FEATURES)
        return np.hstack([weight, v[CLASSES * FEATURES :, None]]) if P == "plain" else weight

    def logits(P, v, d):
        return features(P, d) @ shape(P, v).T

    def pull_back(P, d, g):
        weight = g.T @ features(P, d)
        return np.concatenate([weight[:, :FEATURES].ravel(), weight[:, FEATURES:].ravel()])

    def gradient(k, h, v):
        own = parts()[k][h * BATCH : (h + 1) * BATCH]
        target = np.eye(CLASSES)[y[own]]
        return pull_back(prototype[k], x[own], (oracle.softmax(logits(prototype[k], v, x[own])) - target) / len(own))

    def batches(t, j):
        seed = derive_seed(SEED, "distillation", t)
        numbers = [n for _, n in Unlabelled(unlabelled(), B, dtype=torch.float64).batches(seed, N)]
        return unlabelled().numpy()[numbers[j]]

    problem = SimpleNamespace(
        samples=SIZES,
        steps=[-(-size // BATCH) for size in SIZES],
        cohorts=[cohorts.sample(len(SIZES), COUNT, t, SEED) for t in range(len(ETAS))],
        etas=ETAS,
        gradient=gradient,
        prototype=prototype,
        logits=logits,
        pull_back=pull_back,
    )
    networks = Softmax(names).double().prototypes.items()
    x0 = {name: np.concatenate([p.detach().numpy().ravel() for p in network.parameters()]) for name, network in networks}
    optimizer = {"adam": Adam, "sgd": SGD}[aggregator.optimizer]
    options = aggregator.start == "from_previous", aggregator.ensemble == "all"
    history = oracle.fed_df(x0, problem, batches, N, ETA, optimizer, *options)
    return np.array([np.concatenate([M[name] for name in names]) for M in history])


RARE = ["squares" if k == 1 else "plain" for k in range(len(SIZES))]
"""There are rounds without the only client of a prototype."""

ROUNDS = [
    (("plain",), "even", {}),
    (("plain",), "even", {"optimizer": "sgd"}),
    (("plain",), "even", {"start": "from_previous"}),
    (("plain", "squares"), "even", {}),
    (("plain", "squares"), "even", {"ensemble": "prototype", "optimizer": "sgd"}),
    (("plain", "squares"), RARE, {}),
]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("names", "prototypes", "options"), ROUNDS, ids=[str(k) for k in range(len(ROUNDS))])
def test_equals_the_equations(ranks, names, prototypes, options, world_size):
    aggregator = FedDF(unlabelled(), steps=N, lr=ETA, batch_size=B, **options)
    strategy = {"prototypes": prototypes} if len(names) > 1 else {}
    for result in ranks.run(world_size, fit, aggregator, names, strategy):
        np.testing.assert_allclose(result["models"].numpy(), expected(aggregator, names, prototypes), rtol=0, atol=1e-10)


def test_some_rounds_lack_a_prototype():
    present = [1 in cohorts.sample(len(SIZES), COUNT, t, SEED) for t in range(len(ETAS))]
    assert set(present) == {True, False}


# ------------------------------------------------------------------------------------------------------------- special cases
def feddf(**options):
    """Distils what `fit_net` trains."""
    data = torch.randn(10, 1, 6, 6, generator=torch.Generator().manual_seed(8))
    return FedDF(data, **{"steps": 6, "batch_size": 4, "lr": 0.01, **options})


@pytest.mark.parametrize(("inner", "plain"), [("fedavg", FedAvg()), (FedProx(0.1), FedProx(0.1)), (FedAvgM(0.5), FedAvgM(0.5))])
def test_no_steps_are_the_other_aggregator_bit_for_bit(inner, plain):
    one, other = fit_net(0, 1, plain, "plain"), fit_net(0, 1, feddf(aggregator=inner, steps=0), "plain")
    assert torch.equal(one["models"], other["models"])
    assert all(torch.equal(a, b) for a, b in zip(one["buffers"], other["buffers"], strict=True))
    assert (one["losses"], one["up"], one["down"]) == (other["losses"], other["up"], other["down"])


def test_identical_clients_teach_nothing():
    """With a learning rate of zero all clients are the server's model, and so is their average."""
    aggregator = FedDF(unlabelled(), steps=N, lr=1.0, batch_size=B, optimizer="sgd")
    start = Softmax().double()
    result = fit(0, 1, aggregator, module=Idle())
    for x in result["models"]:
        torch.testing.assert_close(x, nn.utils.parameters_to_vector(start.parameters()).detach(), rtol=0, atol=1e-14)


class Idle(Softmax):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_one_prototype_is_no_prototypes_bit_for_bit():
    aggregator = FedDF(unlabelled(), steps=N, lr=ETA, batch_size=B)
    one, other = fit(0, 1, aggregator), fit(0, 1, aggregator, strategy={"prototypes": lambda k: "plain"})
    assert torch.equal(one["models"], other["models"])
    assert (one["up"], one["down"]) == (other["up"], other["down"])


class Watch(L.Callback):
    """Looks at the module where anybody else would."""

    def __init__(self) -> None:
        self.streams = []

    def on_train_batch_end(self, trainer, module, *args):
        assert all(part.training for part in module.modules())
        assert [p.requires_grad for p in module.parameters()] == [name[:6] != "frozen" for name, _ in module.named_parameters()]
        assert all(p.grad is None for p in module.parameters())
        self.streams.append(torch.get_rng_state())


class Hopeless(Augmented):
    """Validation data on which nobody is ever right."""

    def __getitem__(self, k):
        return super().__getitem__(k)[0], -100


@pytest.mark.parametrize("world_size", [1, 2])
def test_changes_nothing_but_the_model(ranks, world_size):
    """Where validation finds no model better than the average, training is what it is without distillation, bit for bit."""
    options = {"validation": DataLoader(Hopeless(), 16)}
    plain = ranks.run(world_size, fit_watched, FedAvg(), **options)
    distilled = ranks.run(world_size, fit_watched, feddf(validate_every=2), **options)
    for (one, before), (other, after) in zip(plain, distilled, strict=True):
        assert torch.equal(one["models"], other["models"])
        assert all(torch.equal(a, b) for a, b in zip(one["buffers"], other["buffers"], strict=True))
        assert one["losses"] == other["losses"]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def fit_watched(rank, world_size, aggregator, **options):
    watch = Watch()
    return fit_net(rank, world_size, aggregator, callbacks=[watch], **options), watch.streams


@pytest.mark.parametrize("world_size", [2, 4])
def test_does_not_depend_on_the_number_of_ranks(ranks, world_size):
    """With dropout, batch norm and validation that stops early."""
    options = {"validation": DataLoader(Augmented(20), 4)}
    alone = fit_net(0, 1, feddf(patience=2, validate_every=1, steps=20), **options)
    assert not torch.equal(alone["models"], fit_net(0, 1, FedAvg(), **options)["models"])
    for result in ranks.run(world_size, fit_net, feddf(patience=2, validate_every=1, steps=20), **options):
        torch.testing.assert_close(result["models"], alone["models"], rtol=0, atol=1e-9)
        torch.testing.assert_close(result["buffers"], alone["buffers"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("world_size", "turns"), [(1, 2), (1, 6), (2, 4)])
def test_resumes_exactly(ranks, tmp_path, world_size, turns):
    whole = ranks.run(world_size, fit_net, feddf(start="from_previous"))
    rest = ranks.run(world_size, stop_and_resume, turns, str(tmp_path), aggregator=feddf(start="from_previous"))
    for a, b in zip(whole, rest, strict=True):
        assert torch.equal(a["models"][-1], b["models"][-1])
        assert all(torch.equal(x, y) for x, y in zip(a["buffers"], b["buffers"], strict=True))


def stop_prototypes_and_resume(rank, world_size, turns, path, **options):
    before, names = cohorts.STEPS_PER_TURN, ("plain", "squares")
    cohorts.STEPS_PER_TURN = 1
    try:
        with pytest.raises(Stop):
            fit(rank, world_size, names=names, callbacks=[SaveAndFail(turns, path)], **options)
        module = Softmax(names)
        nn.init.zeros_(module.prototypes["plain"].weight)
        return fit(rank, world_size, module=module, ckpt_path=path, **options)
    finally:
        cohorts.STEPS_PER_TURN = before


@pytest.mark.parametrize(("world_size", "turns"), [(1, 3), (1, 4), (2, 3)])
def test_prototypes_resume_exactly(ranks, tmp_path, world_size, turns):
    options = {"aggregator": FedDF(unlabelled(), steps=N, lr=ETA, batch_size=B), "strategy": {"prototypes": RARE}}
    whole = ranks.run(world_size, fit, names=("plain", "squares"), **options)
    rest = ranks.run(world_size, stop_prototypes_and_resume, turns, str(tmp_path / "stopped.ckpt"), **options)
    for a, b in zip(whole, rest, strict=True):
        assert len(b["models"]) == len(ETAS) - turns * world_size // COUNT
        assert torch.equal(a["models"][-1], b["models"][-1])
        assert (a["up"], a["down"], a["losses"][-1]) == (b["up"], b["down"], b["losses"][-1])


# ------------------------------------------------------------------------------------------------------------ early stopping
def distilled(accuracies, steps=100, patience=6, validate_every=2):
    """Distil with these accuracies, one for each validation; returns the student and its values after each step."""
    module, history = nn.Linear(2, 3), []
    student = Student(module, dict(module.named_parameters()), {})
    inputs = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    answers = iter(accuracies)

    def evaluate(student):
        history.append((student.steps, student.parameters["weight"].detach().clone()))
        return next(answers)

    batches = iter(lambda: (inputs, None), None)
    distil([student], batches, lambda *_: [inputs @ torch.ones(2, 3)], steps, 0.1, "sgd", evaluate, patience, validate_every)
    return student, dict(history)


def test_patience_counts_steps_and_the_best_is_kept():
    student, history = distilled([0.1, 0.2, 0.5, 0.5, 0.3, 0.4, 0.9])
    assert list(history) == [0, 2, 4, 6, 8, 10]  # 10 - 4 = 6 steps without a better one
    assert (student.steps, student.best_step, student.accuracy, student.stopped) == (10, 4, 0.5, True)
    assert torch.equal(student.parameters["weight"], history[4])
    assert not torch.equal(history[4], history[10])
    assert student.parameters["weight"].grad is None and not hasattr(student, "optimizer")


def test_the_start_may_be_the_best():
    student, history = distilled([0.5, 0.4, 0.3, 0.2])
    assert (student.steps, student.best_step) == (6, 0)
    assert torch.equal(student.parameters["weight"], history[0])


def test_validates_after_the_last_step():
    student, history = distilled([0.1, 0.2, 0.3, 0.4], steps=5)
    assert list(history) == [0, 2, 4, 5] and student.best_step == student.steps == 5


def test_students_stop_one_by_one():
    module = nn.Linear(2, 3)
    students = [Student(module, dict(module.named_parameters()), {}) for _ in range(2)]
    accuracies = {id(students[0]): iter([0.5] + [0.4] * 9), id(students[1]): iter(np.linspace(0, 1, 10))}
    inputs = torch.ones(4, 2)
    distil(
        students,
        iter(lambda: (inputs, None), None),
        lambda *_: [torch.zeros(4, 3)] * 2,
        steps=8,
        evaluate=lambda student: next(accuracies[id(student)]),
        patience=3,
        validate_every=1,
    )
    assert [student.steps for student in students] == [3, 8]


class Bar:
    """A progress bar for nobody to see."""

    def __init__(self, **options):
        self.options, self.steps, self.shown = options, 0, []

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.left = True

    def update(self):
        self.steps += 1

    def set_postfix(self, refresh, accuracy):
        self.shown.append(accuracy)


@pytest.mark.parametrize(("world_size", "wanted"), [(1, True), (1, False), (2, True)])
def test_the_first_rank_shows_a_progress_bar_where_the_trainer_has_one(ranks, world_size, wanted):
    for rank, bars in enumerate(ranks.run(world_size, fit_with_bars, wanted)):
        assert [bar["desc"] for bar, *_ in bars] == [f"Distillation in round {t}" for t in range(len(ETAS))]
        assert all(bar["disable"] == (rank > 0 or not wanted) and bar["total"] == N for bar, *_ in bars)
        assert all(steps == N and len(shown) == 3 and max(shown) <= 1 for _, steps, shown in bars)


def fit_with_bars(rank, world_size, wanted):
    bars = []

    def bar(**options):
        bars.append(Bar(**options))
        return bars[-1]

    original, fed_df.tqdm = fed_df.tqdm, bar
    try:
        validation = DataLoader(TensorDataset(*map(torch.from_numpy, labelled())), 10)
        teacher = FedDF(unlabelled(), steps=N, batch_size=B, validate_every=3)
        fit(rank, world_size, teacher, validation=validation, enable_progress_bar=wanted)
    finally:
        fed_df.tqdm = original
    return [(bar.options, bar.steps, bar.shown) for bar in bars if bar.left]


# ----------------------------------------------------------------------------------------------------------------------- data
class Pairs(Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, k):
        return self.x[k], 99


@pytest.mark.parametrize(
    "kind",
    [TensorDataset, Pairs, lambda x: DataLoader(Pairs(x), 3), lambda x: DataLoader(Pairs(x), num_workers=1)],
    ids=["tensors", "pairs", "loader", "workers"],
)
def test_all_kinds_of_datasets_are_the_same_samples(kind):
    """Asked anew in every step, teachers say what they have said before."""
    tensor, other = (
        fit(0, 1, FedDF(data, steps=N, lr=0.01, batch_size=B)) for data in (unlabelled().float(), kind(unlabelled().float()))
    )
    torch.testing.assert_close(tensor["models"], other["models"], rtol=0, atol=1e-12)


def test_a_generator_is_drawn_from_the_seed(ranks):
    sizes = []

    def generate(size):
        sizes.append(size)
        return torch.randn(size, FEATURES)

    aggregator = FedDF(generate, steps=N, lr=0.01, batch_size=B)
    models = [fit(0, 1, aggregator)["models"] for _ in range(2)]
    assert torch.equal(*models) and set(sizes) == {B}
    other = fit(0, 1, FedDF(lambda size: torch.randn(size, FEATURES) + 1, steps=N, lr=0.01, batch_size=B))
    assert not torch.equal(models[0], other["models"])
    for result in ranks.run(2, fit, aggregator):
        torch.testing.assert_close(result["models"], models[0], rtol=0, atol=1e-10)


def test_noise_is_shaped_like_training_inputs():
    seen = []

    class Seeing(Softmax):
        def forward(self, x):
            if len(x) == 50:
                seen.append(x)
            return super().forward(x)

    fit(0, 1, FedDF("noise", steps=N, batch_size=50), module=Seeing())
    first = labelled()[0][parts()[0]]
    values = torch.cat(seen)
    assert values.shape[1] == FEATURES and values.dtype == torch.float64
    # Uniform in the range of the first client's first batch, which is one of these seven samples' ranges.
    low, high = first[:BATCH].min(), first[:BATCH].max()
    assert low <= values.min() < low + 0.05 and high - 0.05 < values.max() <= high
    assert values.std().item() == pytest.approx((high - low) / 12**0.5, rel=0.05)


def test_every_sample_is_drawn_once_in_an_epoch():
    samples = Unlabelled(torch.arange(11.0), 4)
    numbers = [n for _, n in samples.batches(seed=3, count=6)]
    assert all(len(set(n.tolist())) == 4 for n in numbers)
    epochs = [torch.cat(numbers[i : i + 2]).tolist() for i in (0, 2, 4)]
    assert all(len(set(epoch)) == 8 for epoch in epochs) and epochs[0] != epochs[1]
    again = [n for _, n in samples.batches(seed=3, count=6)]
    assert all(torch.equal(a, b) for a, b in zip(numbers, again, strict=True))


# ----------------------------------------------------------------------------------------------------------------- prototypes
def test_only_a_prototype_is_sent():
    sizes = {"plain": CLASSES * (FEATURES + 1) * 8, "squares": CLASSES * FEATURES * 8}
    result = fit(0, 1, "fedavg", ("plain", "squares"), {"prototypes": RARE})
    chosen = [cohorts.sample(len(SIZES), COUNT, t, SEED) for t in range(len(ETAS))]
    assert result["up"] == result["down"] == sum(sizes[RARE[k]] for S in chosen for k in S)


@pytest.mark.parametrize("aggregator", ["fedavg", FedProx(0.3)], ids=str)
def test_prototypes_are_federations_of_their_own(aggregator):
    """Clients of one prototype, in the rounds in which they take part, are a federation that knows of no other."""
    result = fit(
        0, 1, aggregator, ("plain", "squares"), {"prototypes": RARE, "fraction": 1.0}, module=Decaying(("plain", "squares"))
    )
    own = [part for k, part in enumerate(parts()) if k != 1]
    alone = fit(0, 1, aggregator, strategy={"clients": 7, "fraction": 1.0, "partition": own}, module=Decaying(("plain",)))
    d = alone["models"].shape[1]
    torch.testing.assert_close(result["models"][:, :d], alone["models"], rtol=0, atol=1e-14)


class Decaying(Softmax):
    """With momentum and weight decay, which would move what has no gradient but zero."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def test_clients_train_their_prototype_alone():
    class Careful(Decaying):
        def on_train_batch_end(self, *args):
            assert self.prototype == "plain"

        def training_step(self, batch, batch_idx):
            others = [p.detach().clone() for name, p in self.named_parameters() if self.prototype not in name]
            if batch_idx == 0:
                self.others = others
            assert all(torch.equal(a, b) for a, b in zip(self.others, others, strict=True))
            return super().training_step(batch, batch_idx)

    result = fit(0, 1, FedProx(0.1), strategy={"prototypes": "even", "local_epochs": 2}, module=Careful(("plain", "squares")))
    assert result["models"].isfinite().all()


class InFront(Softmax):
    """A running mean, and a count, that clients of all prototypes share."""

    def __init__(self) -> None:
        super().__init__(("plain", "squares"))
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("batches", torch.tensor(0))

    def training_step(self, batch, batch_idx):
        self.mean.lerp_(batch[0].mean(dim=0), 0.1)
        self.batches += 1
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    "aggregator",
    [FedAvg(), FedDF(unlabelled(), steps=N, batch_size=B), DropWorst(chance=0.0, margin=0.42)],
    ids=lambda aggregator: type(aggregator).__name__,
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_buffers_outside_of_prototypes_are_averaged_over_all_clients(ranks, world_size, aggregator):
    validation = DataLoader(TensorDataset(*map(torch.from_numpy, labelled())), 44)
    options = {"aggregator": aggregator, "names": ("plain", "squares"), "validation": validation, "rounds": 1}
    for result in ranks.run(world_size, fit, strategy={"prototypes": "even"}, module=InFront(), **options):
        assert bool(result["dropped"][0]) == isinstance(aggregator, DropWorst)
        chosen = [k for k in cohorts.sample(len(SIZES), COUNT, 0, SEED) if k not in result["dropped"][0]]
        x = labelled()[0]
        means = [0.0] * len(SIZES)
        for k in chosen:
            for place in range(0, SIZES[k], BATCH):
                means[k] = 0.9 * means[k] + 0.1 * x[parts()[k][place : place + BATCH]].mean(axis=0)
        total = sum(SIZES[k] for k in chosen)
        mean, batches = result["buffers"]
        np.testing.assert_allclose(mean, sum(SIZES[k] / total * means[k] for k in chosen), rtol=0, atol=1e-12)
        assert batches == max(-(-SIZES[k] // BATCH) for k in chosen)
        sizes = {0: CLASSES * (FEATURES + 1) * 8, 1: CLASSES * FEATURES * 8}
        sampled = cohorts.sample(len(SIZES), COUNT, 0, SEED)
        assert result["up"] == result["down"] == sum(sizes[k % 2] + FEATURES * 8 + 8 for k in sampled)


# ------------------------------------------------------------------------------------------------------------ does it work?
class Arms(L.LightningModule):
    """A small network for points in the three arms of a spiral."""

    def __init__(self, seed=0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.network = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_accuracy", (self(batch[0]).argmax(dim=1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def spiral(count, generator):
    y = torch.arange(count) % 3
    r = torch.rand(count, generator=generator) ** 0.5
    angle = 2 * torch.pi * (y / 3 + 0.55 * r) + 0.12 * torch.randn(count, generator=generator) / (r + 0.3)
    return 2.5 * torch.stack([r * angle.cos(), r * angle.sin()], dim=1), y


def test_learns_more_than_the_average():
    """Two clients, who have few points of the first class, or of the last one."""
    accuracies = {}
    for seed in (1, 2, 3):
        generator = torch.Generator().manual_seed(seed)
        (x, y), test = spiral(300, generator), TensorDataset(*spiral(1000, generator))
        first = torch.rand(300, generator=generator) < torch.tensor([0.95, 0.5, 0.05])[y]
        options = {"clients": 2, "fraction": 1.0, "local_epochs": 20}
        options["partition"] = [first.nonzero().flatten().tolist(), (~first).nonzero().flatten().tolist()]
        points = 6 * torch.rand(60, 2, generator=generator) - 3
        for aggregator in (FedAvg(), FedDF(points, steps=300, patience=None, lr=0.01)):
            loader, validation = DataLoader(TensorDataset(x, y), 10, shuffle=True), DataLoader(test, 1000)
            result = run(0, 1, Arms(seed), loader, {"aggregator": aggregator, **options}, 1, validation=validation)
            accuracies[type(aggregator).__name__, seed] = result["metrics"]["val_accuracy"]
    gains = [accuracies["FedDF", seed] - accuracies["FedAvg", seed] for seed in (1, 2, 3)]
    assert sum(gains) / 3 > 0.03 and min(gains) > -0.01


def test_composes_with_a_server_that_drops_clients():
    validation = DataLoader(TensorDataset(*map(torch.from_numpy, labelled())), 44)
    inside = FedDF(unlabelled(), FedProx(0.1), steps=N, batch_size=B, validate_every=1)
    result = fit(0, 1, DropWorst(inside, chance=0.0, margin=0.42), validation=validation)
    assert any(result["dropped"]) and not any(len(own) == COUNT for own in result["dropped"])
    (student,) = inside.students
    assert student.accuracy == pytest.approx(result["metrics"]["val_accuracy"])
    assert not (student.parameters or student.buffers or hasattr(student, "optimizer"))  # which would stay while clients train


def test_drops_clients_of_prototypes_and_goes_on_without_them():
    """A prototype whose clients have all been dropped stays what it was."""
    names, validation = ("plain", "squares"), DataLoader(TensorDataset(*map(torch.from_numpy, labelled())), 44)
    inside = FedDF(unlabelled(), steps=N, lr=ETA, batch_size=B, patience=None)
    result = fit(0, 1, DropWorst(inside, chance=0.0, margin=0.36), names, {"prototypes": RARE}, validation=validation)
    chosen = [cohorts.sample(len(SIZES), COUNT, t, SEED) for t in range(len(ETAS))]
    left = [[k for k in S if k not in dropped] for S, dropped in zip(chosen, result["dropped"], strict=True)]
    assert any(result["dropped"]) and all(left)
    d, before = CLASSES * (FEATURES + 1), nn.utils.parameters_to_vector(Softmax(names).double().parameters()).detach()
    for own, after in zip(left, result["models"], strict=True):
        assert torch.equal(before[d:], after[d:]) == (1 not in own)
        assert torch.equal(before[:d], after[:d]) == (not set(own) - {1})
        before = after


@pytest.mark.parametrize("world_size", [3, 4])
def test_ranks_without_clients_help(ranks, world_size):
    options = {"aggregator": FedDF(unlabelled(), steps=N, lr=ETA, batch_size=B), "strategy": {"fraction": 0.25}}
    alone = fit(0, 1, **options)
    for result in ranks.run(world_size, fit, **options):
        torch.testing.assert_close(result["models"], alone["models"], rtol=0, atol=1e-10)


def test_distils_one_bit_clients():
    inside = FedDF(unlabelled(), steps=N, lr=ETA, batch_size=B)
    result, plain = fit(0, 1, OneBit(inside)), fit(0, 1, OneBit("fedavg"))
    assert result["up"] == plain["up"] < fit(0, 1, "fedavg")["up"]
    assert not torch.equal(result["models"], plain["models"])


class Mixed(Softmax):
    """Parameters of two dtypes, and so two blocks; a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES, dtype=torch.bfloat16)
        self.frozen = nn.Linear(FEATURES, FEATURES).requires_grad_(False)

    def forward(self, x):
        return super().forward(self.frozen(self.first(x.bfloat16()).float()))


def test_parameters_of_several_dtypes(monkeypatch):
    finish, dtypes = Student.finish, set()

    def noting(student):
        finish(student)
        dtypes.update(p.dtype for p in student.parameters.values())

    monkeypatch.setattr(Student, "finish", noting)
    x, y = labelled()
    loader = DataLoader(TensorDataset(torch.from_numpy(x).float(), torch.from_numpy(y)), BATCH)
    strategy, models = {"clients": len(SIZES), "fraction": FRACTION, "partition": parts()}, []
    for steps in (0, N):
        torch.manual_seed(1)
        aggregator = FedDF(unlabelled(), steps=steps, lr=ETA, batch_size=B)
        models.append(run(0, 1, Mixed(), loader, {"aggregator": aggregator, **strategy}, 1)["models"][0])
    assert dtypes == {torch.float32}
    assert (models[0] != models[1]).double().mean() > 0.9


# ----------------------------------------------------------------------------------------------------------------- bad input
class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(FEATURES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": None}, "give them, as in `FedDF\\(data=dataset\\)`"),
        ({"data": 3}, "must be a tensor, a map-style dataset, .* got 'int'"),
        ({"data": "digits"}, "got 'digits'"),
        ({"data": Stream()}, "got 'Stream'"),
        ({"data": DataLoader(Stream())}, "got 'Stream'"),
        ({"data": torch.zeros(0, 2)}, "has no sample"),
        ({"steps": -1}, "`steps` must be a whole number, at least 0; got -1"),
        ({"batch_size": 0}, "`batch_size` must be a whole number, at least 1"),
        ({"patience": 0}, "`patience` must be a whole number, at least 1"),
        ({"validate_every": 0.5}, "`validate_every` must be a whole number"),
        ({"lr": 0.0}, "`lr` must be a number above 0; got 0.0"),
        ({"optimizer": "rmsprop"}, "`optimizer` must be one of 'adam', 'sgd'; got 'rmsprop'"),
        ({"start": "zero"}, "`start` must be one of 'from_average', 'from_previous'"),
        ({"ensemble": "best"}, "`ensemble` must be one of 'all', 'prototype'"),
        ({"aggregator": "fedxyz"}, "There is no aggregator 'fedxyz'"),
    ],
    ids=lambda value: re.sub(r" at 0x[0-9a-f]+", "", str(value)),
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        FedDF(**{"data": torch.zeros(3, 2), **options})


def test_yaml():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--strategy", type=Strategy)
    data = {"class_path": "torchvision.datasets.FakeData", "init_args": {"size": 7}}
    aggregator = {"class_path": "lightning_distopt.FedDF", "init_args": {"data": data, "aggregator": "fedprox", "steps": 5}}
    options = {"aggregator": aggregator, "clients": 2, "fraction": 1.0, "prototypes": ["a", "b"]}
    parsed = parser.parse_object({"strategy": {"class_path": "lightning_distopt.FederatedStrategy", "init_args": options}})
    made = parser.instantiate_classes(parsed).strategy
    assert len(made.aggregator.data) == 7 and made.aggregator.steps == 5 and isinstance(made.aggregator.aggregator, FedProx)
    assert made.algorithm.prototypes == ["a", "b"]


def test_needs_data_by_its_name():
    with pytest.raises(ValueError, match="samples without labels"):
        make("feddf")


class Untrained(Softmax):
    def training_step(self, batch, batch_idx):
        raise AssertionError("a client has trained")


@pytest.mark.parametrize(
    ("data", "module", "message"),
    [
        (torch.zeros(4, 7), Untrained(), "do not fit the module, .* \\(4, 7\\) .* RuntimeError"),
        (lambda size: torch.zeros(size, 7), Untrained(), "do not fit the module"),
        ([torch.zeros(5), torch.zeros(6)], Untrained(), "can't be drawn in batches of 2: stack expects each tensor"),
        (
            torch.zeros(4, 3, FEATURES),
            Untrained(),
            "`FedDF` needs logits, but `forward` returns \\(4, 3, 3\\): .* `\\[samples, classes\\]`",
        ),
        (unlabelled(), Untrained(("plain", "squares"), (3, 4)), "same classes; their numbers are 'plain' 3, 'squares' 4"),
    ],
    ids=["width", "generator", "lengths", "dimensions", "prototypes"],
)
def test_data_that_does_not_fit(data, module, message):
    strategy = {"prototypes": "even"} if len(module.prototypes) > 1 else {}
    with pytest.raises(ValueError, match=message):
        fit(0, 1, FedDF(data, steps=N), strategy=strategy, module=module)


def test_validation_targets_that_are_no_classes():
    targets = TensorDataset(torch.zeros(4, FEATURES, dtype=torch.float64), torch.zeros(4))
    with pytest.raises(ValueError, match=r"`FedDF` compares predictions with class labels, .* or use `patience=None`"):
        fit(0, 1, FedDF(unlabelled(), steps=N), validation=DataLoader(targets, 2), module=Untrained())


def test_distillation_that_diverges_is_left_out():
    aggregator = FedDF(1e200 * unlabelled(), steps=N, lr=1e200, optimizer="sgd")
    result, plain = fit(0, 1, aggregator, rounds=1), fit(0, 1, "fedavg", rounds=1)
    assert torch.equal(result["models"], plain["models"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prototypes": "odd"}, '`prototypes` must be "even", a name for each client'),
        ({"prototypes": ["plain"] * 3}, "`prototypes` has 3 names, but there are 8 clients"),
        ({"prototypes": {0: "plain"}}, "`prototypes` names none for client 1"),
        ({"aggregator": "fedavgm"}, "FedAvgM.* mixes what clients of all prototypes send"),
        ({"aggregator": FedDF(torch.zeros(3, 2), "fedadam")}, "mixes what clients of all prototypes send"),
        ({"uplink": "sign"}, "`uplink` and `downlink` compress the whole model"),
    ],
    ids=str,
)
def test_prototypes_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        FederatedStrategy(**{"clients": 8, "fraction": 0.5, "prototypes": "even", **options})


class Sharing(Softmax):
    def __init__(self) -> None:
        super().__init__(("plain", "squares"))
        self.prototypes["squares"].weight = self.prototypes["plain"].weight


class Outside(Softmax):
    def __init__(self) -> None:
        super().__init__(("plain", "squares"))
        self.scale = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize(
    ("module", "prototypes", "message"),
    [
        (Arms(), "even", "Arms must have its networks in `self.prototypes`"),
        (Sharing(), "even", "'plain' and 'squares' share a parameter"),
        (Outside(), "even", "The parameter `scale` belongs to no prototype"),
        (Softmax(), lambda k: "cubes", "Client 0 shall have the prototype 'cubes'; those of the module are 'plain'"),
        (Softmax(("plain", "squares")), ["plain"] * 8, "No client has the prototype 'squares'"),
    ],
    ids=["none", "shared", "outside", "unknown", "unused"],
)
def test_modules_without_such_prototypes(module, prototypes, message):
    with pytest.raises(ValueError, match=message):
        fit(0, 1, "fedavg", strategy={"prototypes": prototypes}, module=module)
