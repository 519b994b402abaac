"""Speed and memory of compressors on one core, beside a plain copy and torch's own selection of the largest values.

A turn compresses the difference of two vectors of 25 million float32 values, adds what the payload stands for to the one that
is the estimate, as error feedback does, and adds it with a weight to a third vector, as a neighbour does: everything that a
round of CHOCO-SGD does beside sending. Speed is the 100 MB of the vector over the time of all that. `torch.topk`, against
which the sampled top-k is held, only selects, from magnitudes that are there already. All methods take turns in one process.

Memory is the peak of resident memory of such a turn without the three vectors and the payload, in multiples of a vector.
Large tensors are mapped (`mallopt`), so that resident memory follows live tensors closely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.harness import (
    Report,
    Team,
    Turns,
    estimate,
    fix_malloc,
    main,
    memory,
    now,
    own_seconds,
    progress,
    ratio,
    reset_peak,
)
from lightning_distopt.compression import Codec, make

COMPRESSORS = ("identity", "sign", "qsgd:2", "qsgd:4", "qsgd:8", "top_k:0.01", "random_k:0.01")
SIGN, QSGD, TOP_K = 2.0, 0.4, 0.5


@dataclass(frozen=True)
class Settings:
    """Pairs of the comparisons, and values in a vector."""

    pairs: int
    values: int = 25_000_000


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
    """What a replica computes in a round, besides its own vectors."""

    def __init__(self, name: str, d: int) -> None:
        self.codec = Codec(make(name), [(0, (d,), (1,))], torch.float32)
        self.weights = torch.tensor([[0.5]])
        self.sent = 0

    def __call__(self, x: torch.Tensor, x_hat: torch.Tensor, out: torch.Tensor) -> None:
        payload = self.codec.encode_difference(x, x_hat, seeds=[0])
        self.codec.decode_add(payload, self.weights, out)
        self.sent = payload.numel()


def vectors(d: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `x`, an estimate of it and where a neighbour adds up."""
    x = torch.randn(1, d)
    return x, 0.9 * x, torch.zeros(1, d)


def speed(turns: Turns, d: int, order: Sequence[str]) -> None:
    """Let methods take turns."""
    x, start, out = vectors(d)
    x_hat, magnitudes = start.clone(), (x - start)[0].abs()
    rounds = {name: Round(name, d) for name in COMPRESSORS}
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


def peak(turns: Turns, name: str, d: int) -> None:
    """Report what a compressor takes in multiples of the vector, beside its payload."""
    fix_malloc()
    data = vectors(d)
    Round(name, 1000)(*vectors(1000))
    method = Round(name, d)
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
