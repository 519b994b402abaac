"""Many wrong configurations, generated from a fixed seed: each is refused in one sentence, before a step is trained."""

from __future__ import annotations

import difflib
import inspect
import io
import os
import random
import re
import string
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch import callbacks as pl_callbacks
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from lightning_distopt import (
    CHOCO,
    DCD,
    ECD,
    ByClass,
    ByKey,
    CommunicationMonitor,
    ConsensusControl,
    DeepSqueeze,
    Dirichlet,
    EFSign,
    GossipStrategy,
    LabelShards,
    LinearWarmup,
    LocalSGDStrategy,
    PostLocalSwitch,
    cli,
)
from lightning_distopt.algorithms import ALGORITHMS
from lightning_distopt.compression import COMPRESSORS
from lightning_distopt.data import PARTITIONERS
from lightning_distopt.strategies import ReplicaStrategy
from lightning_distopt.topologies import TOPOLOGIES

OWN = ["sync_period", "block_size", "block_period", "average"]
COMMON = ["replicas_per_device", "evaluate", "buffers", "optimizer_state", "nonfinite", "partition", "ddp_kwargs"]
DDP = ["find_unused_parameters", "gradient_as_bucket_view", "static_graph", "bucket_cap_mb", "broadcast_buffers"]
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "max_steps": 3,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Mistake(NamedTuple):
    """What is done, and words of which the sentence has each."""

    name: str
    action: Callable[[], Any]
    words: tuple[str, ...]


def misspelt(rng: random.Random, name: str, known: list[str]) -> str:
    """One or two letters are left out, doubled, swapped, or replaced; what results is no other name."""
    while True:
        letters = list(name)
        for _ in range(rng.choice([1, 1, 2])):
            at = rng.randrange(1, len(letters) - 1)
            edit = rng.choice(["drop", "double", "swap", "replace"])
            if edit == "drop":
                del letters[at]
            elif edit == "double":
                letters.insert(at, letters[at])
            elif edit == "swap":
                letters[at : at + 2] = letters[at : at + 2][::-1]
            else:
                letters[at] = rng.choice(string.ascii_lowercase)
        wrong = "".join(letters)
        if wrong not in known and difflib.get_close_matches(wrong, known, n=1) == [name]:
            return wrong


# ---------------------------------------------------------------------------------------------------------- constructor


def constructors(rng: random.Random) -> Iterator[Mistake]:
    known = [*inspect.signature(LocalSGDStrategy.__init__).parameters, *inspect.signature(ReplicaStrategy.__init__).parameters]
    for name in [*OWN, *COMMON] * 3:
        wrong = misspelt(rng, name, [*known, *inspect.signature(DistributedDataParallel.__init__).parameters])
        yield made(LocalSGDStrategy, {wrong: rng.choice([1, 2, "average", None])}, f"`{wrong}`", f"`{name}`")
    for name in DDP:
        yield made(LocalSGDStrategy, {name: True}, f"`{name}`", "ddp_kwargs")
        wrong = misspelt(rng, name, DDP)
        yield made(LocalSGDStrategy, {"ddp_kwargs": {wrong: True}}, f"`{wrong}`", "ddp_kwargs")
    not_whole = [
        0,
        -1,
        -rng.randrange(2, 99),
        rng.uniform(0.01, 9),
        float("nan"),
        str(rng.randrange(9)),
        True,
        [4],
        {"a": 1},
        (),
    ]
    for name in ("sync_period", "block_size", "block_period", "replicas_per_device"):
        for value in rng.sample(not_whole, 6):
            yield made(LocalSGDStrategy, {name: value}, f"`{name}`")
    for name in ("average", "evaluate", "buffers", "optimizer_state", "nonfinite", "partition"):
        for value in rng.sample(["mean", "Average", "", 3, -0.5, ["x"], True, None], 3):
            yield made(LocalSGDStrategy, {name: value}, f"`{name}")
    for name in PARTITIONERS:
        wrong = misspelt(rng, name, list(PARTITIONERS)) if len(name) > 4 else f"{name}:{rng.randrange(9)}"
        yield made(LocalSGDStrategy, {"partition": wrong}, "`partition=", repr(name))
    for value in ("dirichlet", "dirichlet:0", "dirichlet:-0.1", "dirichlet:nan", "dirichlet:inf", "dirichlet:x", "dirichlet:"):
        yield made(LocalSGDStrategy, {"partition": value}, repr(value), "`alpha`")
    for value in ("shards:0", "shards:-2", "shards:1.5", "shards:", "by_class:0", "by_class:many"):
        yield made(LocalSGDStrategy, {"partition": value}, repr(value), "`per_replica`")
    yield made(LocalSGDStrategy, {"partition": "by_key"}, "'by_key:speaker'")
    yield made(LocalSGDStrategy, {"partition": Dirichlet}, "Dirichlet", "object")
    for value in rng.sample([0, -1, float("nan"), float("inf"), "0.1", None, True, [1]], 6):
        yield made(Dirichlet, {"alpha": value}, "`alpha`")
    for name, values in (
        ("over", ["replica", None, 1]),
        ("min_samples", [0, 2.5, "3", True]),
        ("seed", [-1, 2**32, 0.5, None]),
        ("balanced", [1, "yes"]),
    ):
        yield made(Dirichlet, {"alpha": 0.1, name: rng.choice(values)}, f"`{name}`")
    for value in rng.sample([-1, -0.2, 1.5, True, None, [3], "soon", "epoch:", "epoch:-1", "step:x", "0.5", ""], 9):
        yield made(PostLocalSwitch, {"at": value}, "`at=")
    for value in rng.sample([-1, 2.5, "10", True, None, [3]], 4):
        yield made(CommunicationMonitor, {"consensus_every": value}, "`consensus_every`")
    for value in (0, -3, 2.5, "8"):
        yield made(PostLocalSwitch, {"sync_period": value}, "`sync_period`")
        yield made(LinearWarmup, {"sync_period": value, "steps": 10}, "`sync_period`")
    for value in (0, -10, 1.5, "100", None):
        yield made(LinearWarmup, {"sync_period": 8, "steps": value}, "steps=")
    for size in rng.sample(range(1, 20), 3):
        yield made(LocalSGDStrategy, {"block_size": size}, "`block_size", "`block_period`")


def gossip(rng: random.Random) -> Iterator[Mistake]:
    own = ["algorithm", "topology", "gossip_steps", "sync_period", "overlap"]
    known = [*own, *inspect.signature(ReplicaStrategy.__init__).parameters]
    for name in own:
        wrong = misspelt(rng, name, [*known, *inspect.signature(DistributedDataParallel.__init__).parameters])
        yield made(GossipStrategy, {wrong: rng.choice([1, "ring", None])}, f"`{wrong}`", f"`{name}`")
    for option, names in (("algorithm", list(ALGORITHMS)), ("topology", list(TOPOLOGIES))):
        for name in rng.sample([name for name in names if len(name) > 4], min(5, sum(len(name) > 4 for name in names))):
            wrong = misspelt(rng, name, names)
            yield made(GossipStrategy, {option: wrong}, repr(wrong), repr(name))
    for value in rng.sample([0, -1, 1.5, "2", True, None, [2]], 4):
        yield made(GossipStrategy, {"gossip_steps": value}, "`gossip_steps`")
    for value in rng.sample(["yes", 2, 0.5, "auto", [True]], 3):
        yield made(GossipStrategy, {"overlap": value}, "`overlap`")
    for value in rng.sample([0, -0.1, 1.01, float("nan"), "0.5", True, [0.5]], 5):
        yield made(CHOCO, {"gamma": value}, "`gamma`")
        yield made(DeepSqueeze, {"gamma": value}, "`gamma`")
    for cls in (CHOCO, DCD, ECD, DeepSqueeze, EFSign):
        wrong = misspelt(rng, "random_k", list(COMPRESSORS))
        yield made(cls, {"compressor": wrong}, repr(wrong), "random_k")
        yield made(cls, {"compressor": f"top_k:{rng.choice([0, -0.5, 1.5])}"}, "ratio")
        yield made(cls, {"compressor": f"qsgd:{rng.choice([0, 1, 9, 15, 32])}"}, "bits")
        yield made(cls, {"scope": rng.choice(["layer", "", None, 1])}, "`scope`")
        yield made(cls, {"min_numel": rng.choice([-1, 2.5, "10", None])}, "`min_numel`")
    for value in rng.sample(["smart", "", None, 3, True], 3):
        yield made(ConsensusControl, {"target": value}, "`target`")
        yield made(ConsensusControl, {"outside": value}, "`outside`")
    for value in rng.sample(["epoch", "epoch:5-2", "lr_decay:0", "step:x-3", "", [], 3, "epochs:0-5"], 6):
        yield made(ConsensusControl, {"phases": value}, "`phases`")
    for name in ("min_steps", "max_steps"):
        for value in rng.sample([0, -3, 2.5, "8", True], 3):
            yield made(ConsensusControl, {name: value}, f"`{name}`")


def made(cls: type, options: dict[str, Any], *words: str) -> Mistake:
    return Mistake(f"{cls.__name__}({', '.join(f'{k}={v!r}' for k, v in options.items())})", lambda: cls(**options), words)


# ----------------------------------------------------------------------------------------------------------- Trainer.fit


class Net(L.LightningModule):
    """Refuses to train."""

    def __init__(self, norm: nn.Module | None = None, manual: bool = False, interval: str = "") -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 2), norm or nn.Identity()
        self.automatic_optimization, self.interval = not manual, interval

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise AssertionError("a step was trained")

    def configure_optimizers(self) -> Any:
        if self.interval == "lbfgs":
            return torch.optim.LBFGS(self.parameters())
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        if not self.interval:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval, "monitor": "loss"}}


def fits(rng: random.Random) -> Iterator[Mistake]:
    for n in rng.sample(range(3, 9), 5):
        size = rng.choice([g for g in range(2, 2 * n) if n % g])
        blocks = {"block_size": size, "block_period": rng.randrange(1, 5)}
        yield fitted({**blocks, "replicas_per_device": n}, f"`block_size={size}`", f"the {n} replicas")
    for partition, words in (
        ([[0, 1], [2]], ("`partition", "2 index lists", "3 replicas")),
        ([[0], [], [1]], ("`partition", "replica 1")),
        ([[0], [99], [1]], ("`partition", "replica 1", "99")),
        (lambda dataset, n: [[0]], ("`partition", "1 index lists")),
        ("dirichlet:0.1", ("labels", "one number or name")),  # the dataset has features alone
        (Dirichlet(0.1, labels=[0] * 23), ("`labels`", "23", "24 samples")),
        (Dirichlet(1e-9, balanced=False, labels=[0] * 24), ("100 draws", "`balanced=True`")),
        (LabelShards(9, labels=[0] * 24), ("9 shards", "3 replicas", "24 samples")),
        (ByClass(labels=[0, 1] * 12), ("3 replicas", "2 classes", "'by_class:1'")),
        (ByClass(1, labels=range(24)), ("3 replicas", "24 classes", "'by_class:8'")),
        (ByClass(3, labels=[0, 1] * 12), ("3 classes", "only 2")),
        (ByKey([0, 1] * 12), ("3 replicas", "2 different keys")),
        (ByKey([0, 1, 2]), ("3 keys", "24 samples")),
        ("by_key:speaker", ("`speaker`", "`key`")),
    ):
        yield fitted({"partition": partition, "replicas_per_device": 3}, *words)

    several = {"replicas_per_device": rng.randrange(2, 5)}
    yield fitted(several, "SyncBatchNorm", "`sync_batchnorm=False`", sync_batchnorm=True)
    yield fitted(several, "SyncBatchNorm", module=lambda: Net(nn.SyncBatchNorm(2)))
    yield fitted(several, "Manual optimization", "`replicas_per_device=1`", module=lambda: Net(manual=True))
    yield fitted({"buffers": "recalibrate", **several}, "`buffers='recalibrate'`", module=lambda: Net(manual=True))
    yield fitted(several, "`interval='step'`", module=lambda: Net(interval="step"))
    yield fitted(several, "LBFGS", module=lambda: Net(interval="lbfgs"))
    yield fitted(several, "lazy", module=lambda: Net(nn.LazyLinear(4)))
    yield fitted(several, "no trainable parameter", module=lambda: Net().requires_grad_(False))
    yield fitted(several, "StochasticWeightAveraging", callbacks=lambda: [pl_callbacks.StochasticWeightAveraging(0.1)])
    if hasattr(pl_callbacks, "WeightAveraging"):
        yield fitted(several, "WeightAveraging", callbacks=lambda: [pl_callbacks.WeightAveraging()])
    yield fitted(several, "`precision='16-mixed'`", plugins=lambda: [MixedPrecision("16-mixed", "cpu")])
    yield fitted(several, "gradient_clip_val", gradient_clip_val="much")

    yield fitted("auto", "PostLocalSwitch", "LocalSGDStrategy", callbacks=lambda: [PostLocalSwitch(at=3)])
    endless = {"max_steps": -1, "max_epochs": -1}
    yield fitted({}, "PostLocalSwitch(at=0.5)", "`max_steps`", callbacks=lambda: [PostLocalSwitch(at=0.5)], **endless)


def fitted(strategy: str | dict[str, Any], *words: str, module: Callable[[], Any] = Net, **options: Any) -> Mistake:
    def action() -> None:
        made = LocalSGDStrategy(**strategy) if isinstance(strategy, dict) else strategy
        trainer = L.Trainer(strategy=made, **QUIET | {k: v() if callable(v) else v for k, v in options.items()})
        trainer.fit(module(), DataLoader(TensorDataset(torch.zeros(24, 4)), batch_size=2))

    return Mistake(f"fit({strategy}, {words[0]})", action, words)


# --------------------------------------------------------------------------------------------------- command line, YAML


def command_lines(rng: random.Random, folder: Path) -> Iterator[Mistake]:
    strategy = ["--trainer.strategy=LocalSGDStrategy"]
    for name in rng.sample([*OWN, *COMMON], 5):
        wrong = misspelt(rng, name, [*OWN, *COMMON])
        yield typed([*strategy, f"--trainer.strategy.{wrong}=2"], f"`{wrong}`", f"`{name}`")
    for name in ("max_epochs", "accumulate_grad_batches", "gradient_clip_val"):
        wrong = misspelt(rng, name, [name])
        yield typed([f"--trainer.{wrong}=2"], f"--trainer.{wrong}", f"--trainer.{name}")
    for option, value in (
        ("sync_period", rng.choice(["often", "1.5", "[2]"])),
        ("block_size", rng.choice(["half", "2.5"])),
        ("replicas_per_device", rng.choice(["many", "1.5"])),
        ("replicas_per_device", str(-rng.randrange(9))),
        ("sync_period", str(-rng.randrange(1, 9))),
        ("evaluate", "best"),
        ("buffers", "mean"),
        ("average", "gradients"),
        ("optimizer_state", "2"),
        ("block_size", "2"),
        ("ddp_kwargs", "{find_unused: true}"),
        ("partition", "random"),
        ("partition", "dirichlet:0"),
    ):
        said = ["expected int"] if option == "sync_period" and not value.startswith("-") else []
        yield typed([*strategy, f"--trainer.strategy.{option}={value}"], option, *said)
    for name in ("local_sgd", "LocalSGDStrategy"):
        wrong = misspelt(rng, name, [name])
        yield typed([f"--trainer.strategy={wrong}"], f"`{wrong.lower()}`", f"(did you mean `{name}`?)")
    wrong = misspelt(rng, "PostLocalSwitch", ["PostLocalSwitch"])
    yield typed([f"--trainer.callbacks+={wrong}"], f"`{wrong}`", "`PostLocalSwitch`")
    yield typed(["--trainer.callbacks+=PostLocalSwitch", "--trainer.callbacks.at=soon"], "`at='soon'`")
    yield typed(["--trainer.callbacks+=PostLocalSwitch"], "PostLocalSwitch", "LocalSGDStrategy")
    yield typed([misspelt(rng, "validate", ["validate"])], "validate", command=None)

    unknown, unfinished = ({"class_path": name, "init_args": {"sync_period": 8}} for name in ("LinearWarmpu", "LinearWarmup"))
    for number, (section, words) in enumerate(
        (
            ({"sync_perod": 4}, ("`sync_perod`", "`sync_period`")),
            ({"sync_period": 0}, ("`sync_period`",)),
            (
                {"sync_period": unknown},
                ("LinearWarmpu", "LinearWarmup"),
            ),
            ({"sync_period": unfinished}, ("sync_period", "steps")),
            ({"block_period": 2, "block_size": 3, "replicas_per_device": 4}, ("`block_size=3`", "4 replicas")),
            ({"sync_period": None}, ("sync_period",)),
            ({"block_period": [1, 2]}, ("block_period",)),
        )
    ):
        file = folder / f"{number}.yaml"
        config = {"trainer": {"strategy": {"class_path": "LocalSGDStrategy", "init_args": section}}}
        file.write_text(yaml.safe_dump(config))
        yield typed([f"--config={file}"], *words)
    for number, (text, words) in enumerate(
        (("trainer: {stratgey: local_sgd}", ("stratgey",)), ("trainer: [", ("parsing config",)))
    ):
        file = folder / f"text{number}.yaml"
        file.write_text(text)
        yield typed([f"--config={file}"], *words)


MODEL = ["--model=ImageClassifier", "--model.model=lenet", "--model.model_options={in_channels: 1, image_size: 8}"]


def typed(args: list[str], *words: str, command: str | None = "fit") -> Mistake:
    def action() -> None:
        start = [command, *MODEL, "--data=DigitsDataModule", *(f"--trainer.{k}={v}" for k, v in QUIET.items())]
        errors = io.StringIO()
        with redirect_stderr(errors), redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
            cli.main([*(start if command else []), *args])
        assert end.value.code == 2
        lines = [line for line in errors.getvalue().splitlines() if not line.startswith("Seed set to")]
        assert "Traceback" not in errors.getvalue()
        assert len(lines) == 2, lines  # the mistake, and where help is
        assert lines[1].startswith("(`lightning-distopt COMMAND --help`")
        raise ValueError(lines[0].removeprefix("lightning-distopt: error: "))

    return Mistake(f"lightning-distopt {' '.join(args)}", action, words)


# ------------------------------------------------------------------------------------------------------------- all of it


def sentence(mistake: Mistake) -> str:
    """Do it; return what is said, or what is wrong with what is said."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mistake.action()
    except AssertionError as error:
        return f"FAILED: {error}"
    except Exception as error:
        text = str(error)
        for condition, complaint in (
            ("\n" in text, "several lines"),
            (len(text) >= 450, f"{len(text)} characters"),
            (len(re.split(r"[.!?]\s+[A-Z]", text)) > 2, "several sentences"),
            (any(word not in text for word in mistake.words), f"lacks one of {mistake.words}"),
            (isinstance(error, AttributeError | KeyError | IndexError), f"is a {type(error).__name__}"),
        ):
            if condition:
                return f"FAILED, {complaint}: {text}"
        return text
    return "FAILED: was not refused"


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in an empty folder, and drop what seeding leaves in the environment; a trained step would be a failure."""

    def trained(*_: Any) -> None:
        raise AssertionError("a step was trained")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning_distopt.models.ImageClassifier.training_step", trained)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("kind", "at_least"),
    [("constructors", 60), ("gossip", 60), ("fits", 20), ("command_lines", 30)],
    ids=["python", "gossip", "fit", "command line"],
)
def test_mistakes(kind: str, at_least: int, tmp_path: Path) -> None:
    rng = random.Random(2024)
    if kind == "command_lines":
        mistakes = list(command_lines(rng, tmp_path))
    else:
        mistakes = list({"constructors": constructors, "gossip": gossip, "fits": fits}[kind](rng))
    assert len({mistake.name for mistake in mistakes}) >= at_least
    wrong = {mistake.name: said for mistake in mistakes if (said := sentence(mistake)).startswith("FAILED")}
    assert not wrong, "\n".join(f"{name}\n    {said}" for name, said in wrong.items())
