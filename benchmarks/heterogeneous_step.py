"""Time of a training step of algorithms for heterogeneous data, against decentralized SGD, and the bytes they send.

Two ranks train ResNet-8 on images and mix at every step, with D-SGD over plain SGD (D-SGD over momentum SGD beside it,
whose momentum these algorithms replace) and with quasi-global momentum, and the others for comparison. With two replicas
every graph is the same. Time is the process's own (see the harness).

Bytes are those that the package counts for a step on a ring of four.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from benchmarks import workloads
from benchmarks.harness import TakeTurns, Team, Turns, interleave, own_seconds, trainer
from benchmarks.report import Estimate, Report, estimate, main, ratio
from lightning_distopt import D2, DMSGD, DSGD, GossipStrategy, GradientTracking, QuasiGlobal
from lightning_distopt.algorithms import GossipAlgorithm
from lightning_distopt.communication import Communicator, Replicas
from lightning_distopt.models import ImageClassifier
from lightning_distopt.topologies import make

LIMIT = 1.05
ALGORITHMS: dict[str, Callable[[], GossipAlgorithm]] = {
    "D-SGD": DSGD,
    "QG-DSGDm": QuasiGlobal,
    "QG-DSGDm-N": partial(QuasiGlobal, nesterov=True),
    "DMSGD": DMSGD,
    "D2": D2,
    "D2+": partial(D2, plus=True),
    "gradient tracking": GradientTracking,
}
BARS = ("QG-DSGDm", "QG-DSGDm-N")


@dataclass(frozen=True)
class Settings:
    """Pairs, steps of a turn, the side of images, and the algorithms."""

    pairs: int
    steps: int = 6
    side: int = 32
    algorithms: Sequence[str] = tuple(ALGORITHMS)


FULL = Settings(pairs=25)
QUICK = Settings(pairs=6, steps=3, algorithms=("D-SGD", *BARS))


def body(turns: Turns, settings: Settings, name: str, momentum: float = 0.0) -> None:
    """Train as one of two ranks."""
    turns.connect()
    model = ImageClassifier("resnet8", lr=0.01, momentum=momentum)
    loader = workloads.images(2 * 4096, settings.side)
    strategy = GossipStrategy(ALGORITHMS[name](), topology="ring")
    trainer(strategy, turns.size, callbacks=[TakeTurns(turns, settings.steps)]).fit(model, loader)


def bytes_sent(algorithm: GossipAlgorithm, steps: int = 3) -> int:
    """Return the bytes that a replica on a ring of four sends in a few steps."""
    module = nn.Linear(64, 1, bias=False)
    replicas, communicator = Replicas(module, 4), Communicator(4)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    replicas.attach_optimizers([optimizer])
    algorithm.connect(make("ring", 4)).setup(replicas, communicator)
    for step in range(steps):
        algorithm.before_step(step)
        for row in reversed(range(4)):
            replicas.activate(row)
            module.weight.grad = torch.ones_like(module.weight)
            replicas.collect_gradients()
        if algorithm.transforms_gradients:
            algorithm.transform_gradients(step)
        for row in reversed(range(4)):
            replicas.activate(row)
            optimizer.step()
        algorithm.after_step(step)
    return communicator.traffic.bytes_sent


def run(report: Report, settings: Settings) -> None:
    """Measure all algorithms."""
    teams = {name: Team(name, partial(body, settings=settings, name=name), size=2) for name in settings.algorithms}
    teams["D-SGD, momentum"] = Team("D-SGD, momentum", partial(body, settings=settings, name="D-SGD", momentum=0.9), size=2)
    laps = {name: own_seconds(turns) for name, turns in interleave("ResNet-8", teams, settings.pairs).items()}
    report.figure("D-SGD", estimate([1e3 * t / settings.steps for t in laps["D-SGD"]]), "ms/step")
    plain = bytes_sent(DSGD())
    for name in [*settings.algorithms[1:], "D-SGD, momentum"]:
        measured = ratio(laps[name], laps["D-SGD"])
        if name not in BARS:
            report.figure(f"{name} over D-SGD", measured)
        else:
            report.bar(f"heterogeneous_step: {name} over D-SGD", measured, LIMIT)
            report.figure(f"{name} over D-SGD with momentum", ratio(laps[name], laps["D-SGD, momentum"]))
        if name in ALGORITHMS:
            sent = Estimate(*[bytes_sent(ALGORITHMS[name]()) / plain] * 3)
            if name in BARS:
                report.bar(f"heterogeneous_step: bytes of {name} over D-SGD", sent, 1.0)
            else:
                report.figure(f"{name} over D-SGD: bytes", sent)


def cli(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    main("heterogeneous_step", run, FULL, QUICK, argv)


if __name__ == "__main__":
    cli()
