"""Speed and memory of compressors on one core, beside a plain copy and torch's own selection of the largest values.

A turn compresses the difference of two vectors of 25 million float32 values, adds what the payload stands for to the one that
is the estimate, as error feedback does, and adds it with a weight to a third vector, as a neighbour does: everything that a
round of CHOCO-SGD does beside sending. Speed is the 100 MB of the vector over the time of all that. `torch.topk`, against
which the sampled top-k is held, only selects, from magnitudes that are there already. All methods take turns in one process.

The same turn is held against one that compresses each tensor of a model for itself: the ratios "per tensor over per row", of
which none has a bar. Three vectors in rows of a block lie as the parameters of replicas do.

Memory is the peak of resident memory of such a turn without the three vectors and the payload, in multiples of a vector.
Large tensors are mapped (`mallopt`), so that resident memory follows live tensors closely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torchvision
from torch import nn

from benchmarks.harness import Team, Turns, fix_malloc, memory, now, own_seconds, reset_peak
from benchmarks.report import Report, estimate, main, progress, ratio
from lightning_distopt.communication.layout import lay_out
from lightning_distopt.compression import Codec, make
from lightning_distopt.models import resnet20

COMPRESSORS = ("identity", "sign", "qsgd:2", "qsgd:4", "qsgd:8", "top_k:0.01", "random_k:0.01")
SCOPED = ("sign", "qsgd:4", "qsgd:8", "top_k:0.01", "random_k:0.1")
SIGN, QSGD, TOP_K = 2.0, 0.4, 0.5
Model = tuple[str, Callable[[], nn.Module], int]
MODELS: tuple[Model, ...] = (
    ("ResNet-20", resnet20, 1),
    ("32 rows of ResNet-20", resnet20, 32),
    ("ResNet-50", torchvision.models.resnet50, 1),
)


@dataclass(frozen=True)
class Settings:
    """Pairs of the comparisons, values in a vector, and models with their number of rows."""

    pairs: int
    values: int = 25_000_000
    models: Sequence[Model] = MODELS


FULL = Settings(pairs=40)
QUICK = Settings(pairs=8)


def formulas(d: int) -> dict[str, int]:
    """Return the bytes that a float32 vector takes by the papers' formulas."""
    k = d // 100
    return {
        "identity": 4 * d,
        "sign": -(-d // 8) + 4,
        "qsgd:2": -(-2 * d // 8) + 4,
        "qsgd:4": -(-4 * d // 8) + 4,
        "qsgd:8": d + 4,
        "top_k:0.01": k * (4 + 4),
        "random_k:0.01": k * 4 + 8,
    }


class Round:
    """What replicas compute in a round, besides their own vectors."""

    def __init__(self, codec: Codec, rows: int = 1) -> None:
        self.codec, self.rows = codec, rows
        self.weights = 0.5 * torch.eye(rows)
        self.sent = 0

    def __call__(self, x: torch.Tensor, x_hat: torch.Tensor, out: torch.Tensor) -> None:
        payload = self.codec.encode_difference(x, x_hat, seeds=range(self.rows))
        self.codec.decode_add(payload, self.weights, out)
        self.sent = payload.numel()


def vector(name: str, d: int) -> Codec:
    """Return the codec of a single vector."""
    return Codec(make(name), [(0, (d,), (1,))], torch.float32)


def vectors(d: int, rows: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `x`, an estimate of it and where a neighbour adds up."""
    x = torch.randn(rows, d)
    return x, 0.9 * x, torch.zeros(rows, d)


def speed(turns: Turns, d: int, order: Sequence[str]) -> None:
    """Let methods take turns."""
    x, start, out = vectors(d)
    x_hat, magnitudes = start.clone(), (x - start)[0].abs()
    rounds = {name: Round(vector(name, d)) for name in COMPRESSORS}
    methods: dict[str, Callable[[], object]] = {name: partial(method, x, x_hat, out) for name, method in rounds.items()}
    methods["copy"] = lambda: out.copy_(x)
    methods["torch.topk"] = lambda: magnitudes.topk(d // 100)
    for name in order:
        x_hat.copy_(start)
        turns.wait()
        begin = now()
        methods[name]()
        turns.report(begin, now(), rounds[name].sent if name in rounds else None)
    turns.wait()


def scopes(turns: Turns, model: Model, order: Sequence[tuple[str, Literal["tensor", "row"]]]) -> None:
    """Let the scopes of compressors take turns."""
    _, make_model, rows = model
    slots, blocks = lay_out([*make_model().named_parameters()], 1)
    pieces = [(slot.offset, slot.shape, slot.stride) for slot in slots]
    x, start, out = vectors(blocks[0].shape[1], rows)
    x_hat = start.clone()
    rounds = {case: Round(Codec(make(case[0]), pieces, torch.float32, case[1]), rows) for case in order}
    for case in order:
        x_hat.copy_(start)
        turns.wait()
        begin = now()
        rounds[case](x, x_hat, out)
        turns.report(begin, now())
    turns.wait()


def peak(turns: Turns, name: str, d: int) -> None:
    """Report what a compressor takes in multiples of the vector, beside its payload."""
    fix_malloc()
    data = vectors(d)
    Round(vector(name, 1000))(*vectors(1000))
    method = Round(vector(name, d))
    turns.wait()
    before = memory(peak=False)
    reset_peak()
    method(*data)
    turns.report_value(((memory() - before) * 2**20 - method.sent) / (4 * d))
    turns.wait()


def run(report: Report, settings: Settings) -> None:
    """Measure all compressors."""
    d = settings.values
    names = ["copy", *COMPRESSORS, "torch.topk"]
    order = names * (settings.pairs + 1)
    times: dict[str, list[float]] = {name: [] for name in names}
    sent = {}
    with Team("compressors", partial(speed, d=d, order=order)) as team:
        for k, name in enumerate(order):
            progress(f"{d:,} values", k + 1, len(order))
            lap = team.turn()
            sent[name] = lap[0].value
            times[name] += own_seconds([lap])
    times = {name: values[1:] for name, values in times.items()}
    extra = {}
    for name in COMPRESSORS:
        with Team("memory", partial(peak, name=name, d=d)) as team:
            extra[name] = team.turn()[0].value

    for model in settings.models:
        cases: list[tuple[str, Literal["tensor", "row"]]] = [(name, scope) for name in SCOPED for scope in ("tensor", "row")]
        seconds: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
        with Team("scopes", partial(scopes, model=model, order=cases * (settings.pairs + 1))) as team:
            for k, case in enumerate(cases * (settings.pairs + 1)):
                progress(model[0], k + 1, len(cases) * (settings.pairs + 1))
                seconds[case] += own_seconds([team.turn()])
        for name in SCOPED:
            per_tensor, per_row = (seconds[name, scope][1:] for scope in ("tensor", "row"))
            report.figure(f"{name}: per tensor over per row, {model[0]}", ratio(per_tensor, per_row))

    rate = {name: estimate([4e-9 * d / t for t in values]) for name, values in times.items()}
    for name in names:
        report.figure(f"{name}: speed", rate[name], "GB/s")
    for name in COMPRESSORS:
        report.figure(f"{name}: time over a copy", ratio(times[name], times["copy"]))
    for name in COMPRESSORS:
        report.figure(f"{name}: extra memory", estimate([extra[name]]), "x vector")
    wrong = sum(sent[name] != nbytes for name, nbytes in formulas(d).items())
    report.bar("compression: sign (GB/s)", rate["sign"], SIGN, at_least=True)
    report.bar("compression: QSGD of 4 bits (GB/s)", rate["qsgd:4"], QSGD, at_least=True)
    report.bar("compression: sampled top 1 % over torch.topk", ratio(times["top_k:0.01"], times["torch.topk"]), TOP_K)
    report.bar("compression: payloads of another size than the formula's", estimate([wrong]), 0.0)


def cli(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    main("compression", run, FULL, QUICK, argv)


if __name__ == "__main__":
    cli()
