"""What the package costs on an NVIDIA GPU, against the least that the card can do it in.

- Compressors: `compress` and `decompress` of a vector (of a square matrix for `low_rank`), against a copy of the same values
  from one place of the card's memory to another, which reads and writes each once. Speed is that of the values: four bytes
  each over the time.
- Blocks: what a round does with the rows of `m` replicas that are on one card. Averages, mixing on three graphs (one-peer,
  ring, complete), and the update of error feedback, which subtracts from each row what the signs that were sent of it stand
  for. Against one pass over the same memory: a copy of the block, which reads and writes as much as they have to at least.
- Steps: ResNet-8 on 32x32 images in batches of 128 that are on the card already, in a full Lightning `Trainer`. One replica
  under `LocalSGDStrategy` against Lightning's single device; eight replicas, with a round every eight steps, against the same
  for each replica step. Their bars are those of `step_overhead` and `simulation`.

Contestants run in one process and take turns, A B A B, after a turn each that warms up; a turn is several calls, or a fit
of its own. Time is that between two CUDA events around a turn, so it holds what the card waits for the processor. How often it
is the other way round, and the processor waits for the card in a call, is counted too (as far as torch knows): training
can't run ahead of the card where it does.

It also runs on a CPU if told to, which exercises the code and measures nothing that `compression` and `simulation` don't.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import workloads
from benchmarks.report import Estimate, Report, estimate, progress, ratio
from lightning_distopt import LocalSGDStrategy
from lightning_distopt.communication import Communicator, Neighbourhood
from lightning_distopt.compression import Codec, make
from lightning_distopt.topologies import make as make_topology

COMPRESSORS = ("sign", "qsgd:4", "top_k:0.01", "random_k:0.01", "low_rank:2")
GRAPHS = ("one_peer_exponential", "ring", "complete")
STEP, REPLICA_STEP = 1.03, 1.10
NEVER, ROUND = 10**9, 8


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Args:
        pairs: turns of each contestant.
        calls: of a turn, of compressors and of what is done with blocks.
        device: where.
        values: lengths of vectors.
        rows: of blocks.
        columns: of blocks.
        fits: turns of training.
        steps: of a fit that are measured, of the single model and of each replica; a multiple of the round's eight.
        warm_up: steps before them; also a multiple.
        side: of the images.
        batch: images in a batch.
        replicas: that are simulated.
    """

    pairs: int = 20
    calls: int = 5
    device: str = "cuda"
    values: Sequence[int] = (25_000_000, 100_000_000)
    rows: Sequence[int] = (8, 32)
    columns: int = 10_000_000
    fits: int = 20
    steps: int = 96
    warm_up: int = 16
    side: int = 32
    batch: int = 128
    replicas: int = 8


FULL = Settings()
QUICK = Settings(pairs=8, calls=3, values=(25_000_000,), rows=(8,), fits=4, steps=48)


# ------------------------------------------------------------------------------------------------------------------- time
class Clock:
    """Reads the time of a device: CUDA events in its stream, or the processor's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        """Read it, without waiting for the device."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Return what lies between two marks; waits for the second one."""
        if self.device.type != "cuda":
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


def take_turns(text: str, methods: Mapping[str, Callable[[], Any]], settings: Settings) -> dict[str, list[float]]:
    """Return the seconds of a call of each method, turn by turn."""
    clock = Clock(torch.device(settings.device))
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for pair in range(settings.pairs + 1):
        progress(text, pair, settings.pairs)
        for name, method in methods.items():
            start = clock.mark()
            for _ in range(settings.calls):
                method()
            took = clock.seconds(start, clock.mark()) / settings.calls
            if pair:
                seconds[name].append(took)
    return seconds


def waits(method: Callable[[], Any]) -> int:
    """Return how often a call waits for the GPU, by torch's own count."""
    if not torch.cuda.is_available():
        return 0
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            method()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


# ------------------------------------------------------------------------------------------------------------ compressors
def codec(name: str, d: int) -> Codec:
    """Return the codec of a vector of `d` values, or of a square matrix of about as many."""
    compressor = make(name)
    side = math.isqrt(d)
    shape, stride = ((side, side), (side, 1)) if compressor.matrices else ((d,), (1,))
    return Codec(compressor, [(0, shape, stride)], torch.float32)


def compressors(report: Report, settings: Settings) -> None:
    """Measure compressors."""
    for d in settings.values:
        x = torch.randn(1, d, device=settings.device)
        out = torch.empty_like(x)
        methods: dict[str, Callable[[], Any]] = {"copy": partial(out.copy_, x)}
        for name in COMPRESSORS:
            one = codec(name, d)
            payload = one.encode(x, seeds=[0])
            methods[f"{name}, compress"] = partial(one.encode, x, seeds=[0])
            methods[f"{name}, decompress"] = partial(one.decode, payload, out)
        seconds = take_turns(f"d = {d:,}", methods, settings)
        for method, times in seconds.items():
            report.figure(f"d = {d:,}: {method}", estimate([4e-9 * d / t for t in times]), "GB/s")
        for name in COMPRESSORS:
            parts = [f"{name}, compress", f"{name}, decompress"]
            both = [sum(pair) for pair in zip(*(seconds[part] for part in parts), strict=True)]
            report.figure(f"d = {d:,}: {name}, both over a copy", ratio(both, seconds["copy"]))
            _note_waits(report, f"d = {d:,}: {name}", [methods[part] for part in parts])


# ----------------------------------------------------------------------------------------------------------------- blocks
def blocks(report: Report, settings: Settings) -> None:
    """Measure what is done with the rows of blocks."""
    for m in settings.rows:
        block = torch.randn(m, settings.columns, device=settings.device)
        communicator, signs = Communicator(m, settings.device), codec("sign", settings.columns)
        methods: dict[str, Callable[[], Any]] = {
            "copy": partial(torch.empty_like(block).copy_, block),
            "average": partial(communicator.mean, block),
        }
        for graph in GRAPHS:
            topology = make_topology(graph, m)
            hood = Neighbourhood.of(communicator.local_replicas, topology.weights, topology.listeners)
            methods[f"mixing, {graph}"] = partial(communicator.gossip, [block], hood)
        methods["error feedback"] = partial(signs.decode_add, signs.encode(block, range(m)), -torch.eye(m), block)
        seconds = take_turns(f"{m} rows", methods, settings)
        copy, *others = methods
        report.figure(f"m = {m}: copy", estimate([2e-9 * block.nbytes / t for t in seconds[copy]]), "GB/s, read and written")
        for name in others:
            report.figure(f"m = {m}: {name} over one pass", ratio(seconds[name], seconds[copy]))
            _note_waits(report, f"m = {m}: {name}", [methods[name]])


def _note_waits(report: Report, name: str, methods: Sequence[Callable[[], Any]]) -> None:
    count = float(sum(map(waits, methods)))
    report.figure(f"{name}, the processor waits", Estimate(count, count, count), "times")


# ------------------------------------------------------------------------------------------------------------------ steps
class Images(Dataset[Any]):
    """Random images that lie on the device, of which a batch is a slice: it takes the device nothing to draw it.

    Args:
        samples: how many it says that there are.
        settings: where they are, and what they look like.
    """

    def __init__(self, samples: int, settings: Settings) -> None:
        self.samples = samples
        there = 8 * settings.batch
        self.images = torch.randn(there, 3, settings.side, settings.side, device=settings.device)
        self.labels = torch.randint(10, (there,), device=settings.device)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index % len(self.images)], self.labels[index % len(self.labels)]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        start = indices[0] % (len(self.images) - len(indices) + 1)
        batch = slice(start, start + len(indices))
        return self.images[batch], self.labels[batch]


class Stopwatch(pl.Callback):
    """Marks the time after two steps.

    Args:
        clock: what to read.
        first, last: the steps.
    """

    def __init__(self, clock: Clock, first: int, last: int) -> None:
        self.clock, self.steps = clock, (first, last)
        self.marks: list[Any] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in self.steps:
            self.marks.append(self.clock.mark())


def fit(strategy: Any, settings: Settings, steps: int, replicas: int = 1) -> float:
    """Train, and return the seconds of a step of a replica."""
    clock = Clock(torch.device(settings.device))
    last = settings.warm_up + steps
    stopwatch = Stopwatch(clock, settings.warm_up, last)
    dataset = Images(settings.batch * replicas * (last + 1), settings)
    loader = DataLoader(dataset, batch_size=settings.batch, shuffle=True, collate_fn=lambda batch: batch)
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="gpu" if clock.device.type == "cuda" else "cpu",
        devices=1,
        max_steps=last,
        max_epochs=-1,
        callbacks=[stopwatch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(workloads.resnet8(), loader)
    return clock.seconds(*stopwatch.marks) / (steps * replicas)


def steps(report: Report, settings: Settings) -> None:
    """Measure steps of training."""
    m = settings.replicas
    few = -(-settings.steps // (m * ROUND)) * ROUND  # whole rounds, with at least as many steps of replicas
    contestants: dict[str, Callable[[], float]] = {
        "single": lambda: fit("auto", settings, settings.steps),
        "one": lambda: fit(LocalSGDStrategy(NEVER), settings, settings.steps),
        "simulated": lambda: fit(LocalSGDStrategy(ROUND, replicas_per_device=m), settings, few, m),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(settings.fits + 1):
        progress("training", turn, settings.fits)
        for name, contestant in contestants.items():
            took = contestant()
            if turn:
                seconds[name].append(took)
    report.figure("ResNet-8, single device", estimate([1e3 * t for t in seconds["single"]]), "ms/step")
    added = [1e6 * (a - b) for a, b in zip(seconds["one"], seconds["single"], strict=True)]
    report.figure("ResNet-8, added by local SGD", estimate(added), "us/step")
    report.bar("gpu: step, n = 1", ratio(seconds["one"], seconds["single"]), STEP)
    simulated = ratio(seconds["simulated"], seconds["single"])
    report.bar(f"gpu: replica step of {m} over single model", simulated, REPLICA_STEP)


# ----------------------------------------------------------------------------------------------------------- command line
def run(report: Report, settings: Settings) -> None:
    """Measure everything."""
    compressors(report, settings)
    blocks(report, settings)
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            steps(report, settings)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def cli(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--quick", action="store_true", help="fewer turns: about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args(argv)
    settings = QUICK if options.quick else FULL
    on_gpu = torch.device(settings.device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("benchmarks.gpu needs an NVIDIA GPU that torch can use, and there is none here: nothing has been measured.")
        return
    report = Report("gpu", options.quick)
    run(report, settings)
    name = torch.cuda.get_device_name() if on_gpu else "no GPU"
    print(f"{name}, CUDA {torch.version.cuda}\n{report.table()}")
    if options.json:
        result = {**report.as_dict(), "device": name, "cuda": torch.version.cuda}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    cli()
