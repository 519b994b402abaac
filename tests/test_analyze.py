"""`lightning-distopt analyze`: from a configuration and checkpoints to a table and files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
import yaml
from torch import nn

from lightning_distopt import cli
from lightning_distopt.analysis.connectivity import Path as Curve
from lightning_distopt.analysis.interpolation import Interpolation
from lightning_distopt.analysis.landscape import Landscape1D, Landscape2D
from lightning_distopt.analysis.spectrum import Spectrum
from lightning_distopt.analyzer import _labels
from lightning_distopt.data import DigitsDataModule
from lightning_distopt.models import ImageClassifier
from tests.helpers import Forked, fresh_environment

OPTIONS = {"model": "lenet", "model_options": {"in_channels": 1, "image_size": 8}}
CONFIG = {
    "seed_everything": 0,
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "precision": "64-true",
        "limit_train_batches": 2,
        "limit_val_batches": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "strategy": {"class_path": "LocalSGDStrategy", "init_args": {"sync_period": 2, "replicas_per_device": 2}},
        "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": "ck", "filename": "trained"}}],
    },
    "model": {"class_path": "ImageClassifier", "init_args": OPTIONS},
    "data": {"class_path": "DigitsDataModule", "init_args": {"batch_size": 16}},
}
SHORT = ["--samples=24", "--output=out", "--progress=false", "--parameters=[model.fc3.*]"]


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in a folder with a configuration and three models, and drop what seeding leaves in the environment."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        torch.save({"state_dict": ImageClassifier(**OPTIONS).state_dict()}, f"{name}.ckpt")
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def analyze(capsys: pytest.CaptureFixture[str], name: str, ckpt: str, *args: str) -> str:
    cli.main(["analyze", name, "--config=config.yaml", "--ckpt", *ckpt.split(), *SHORT, *args])
    return capsys.readouterr().out


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(["analyze", *args])
    assert end.value.code == 2
    return capsys.readouterr().err


def number(text: str, name: str, column: int = 0) -> float:
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[1 + column])


def model(name: str) -> ImageClassifier:
    found = ImageClassifier(**OPTIONS)
    found.load_state_dict(torch.load(f"{name}.ckpt", weights_only=True)["state_dict"])
    return found.double().eval()


def batch(count: int = 24) -> Any:
    """Return the samples that are drawn from the training data."""
    data = DigitsDataModule(batch_size=16)
    data.prepare_data()
    data.setup("fit")
    dataset = data.train_dataloader().dataset
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count].sort().values
    x, y = torch.utils.data.default_collate([dataset[int(k)] for k in order])
    return x.double(), y


def loss(module: ImageClassifier) -> float:
    x, y = batch()
    return float(nn.functional.cross_entropy(module(x), y))


# -------------------------------------------------------------------------------------------------------------- analyses
def test_hessian(capsys):
    text = analyze(capsys, "hessian", "a.ckpt b.ckpt", "--k=2", "--trace=90", "--density=20", "--tol=1e-6", "--on=both")
    assert text.splitlines()[0].split() == ["a_train", "a_val", "b_train", "b_val"]
    names = [f"hessian_{m}_{d}.{kind}" for m in "ab" for d in ("train", "val") for kind in ("npz", "json", "png")]
    assert sorted(os.listdir("out")) == sorted(names)
    assert [f"Written: {Path('out', name)}" in text for name in names] == [True] * len(names)
    for column, name in ((0, "a"), (2, "b")):
        module, y = model(name), batch()[1]
        head, features = module.model.fc3, []
        handle = head.register_forward_pre_hook(lambda _, args, features=features: features.append(args[0].detach()))
        assert number(text, "loss", column) == pytest.approx(loss(module), rel=1e-5)
        handle.remove()
        sizes = [head.weight.numel(), head.bias.numel()]

        def of_head(w: torch.Tensor, h: Any = features[0], y: Any = y, sizes: Any = sizes) -> torch.Tensor:
            weight, bias = w.split(sizes)
            return nn.functional.cross_entropy(h @ weight.view(10, -1).T + bias, y)

        w = torch.cat([head.weight.detach().reshape(-1), head.bias.detach()])
        eigenvalues = np.linalg.eigvalsh(torch.autograd.functional.hessian(of_head, w).numpy())
        assert number(text, "top", column) == pytest.approx(eigenvalues[-1], rel=1e-5)
        spectrum = Spectrum.load(f"out/hessian_{name}_train.npz")
        assert (spectrum.samples, spectrum.dim) == (24, len(w))
        assert spectrum.trace == pytest.approx(eigenvalues.sum(), abs=max(1e-9, 6 * spectrum.trace_error))
        assert spectrum.density is not None
    assert matplotlib.image.imread("out/hessian_a_train.png").shape[:2] == (540, 960)


def test_interpolate(capsys):
    text = analyze(capsys, "interpolate", "a.ckpt b.ckpt c.ckpt", "--points=3", "--margin=0")
    found = Interpolation.load("out/interpolate.npz")
    assert found.curves("train").shape == (2, 3)
    assert found.curves("train")[0] == pytest.approx([loss(model("a")), found.curves("train")[0, 1], loss(model("b"))])
    assert found.curves("train")[1, 2] == pytest.approx(loss(model("c")))
    assert found.models == ["a", "b", "c"]
    for name in "bc":
        assert number(text, f"{name}/train/loss_0") == pytest.approx(loss(model("a")), rel=1e-5)
        assert number(text, f"{name}/train/loss_1") == pytest.approx(loss(model(name)), rel=1e-5)
    assert sorted(os.listdir("out")) == ["interpolate.json", "interpolate.npz", "interpolate.png"]


def test_landscape_on_lines(capsys):
    text = analyze(capsys, "landscape", "a.ckpt b.ckpt", "--points=3", "--directions=2", "--radius=0.5")
    found = Landscape1D.load("out/landscape.npz")
    assert (found.models, found.positions.tolist()) == (["a", "b"], [-0.5, 0.0, 0.5])
    for name in "ab":
        assert found.curves(name, "train")[:, 1] == pytest.approx([loss(model(name))] * 2)
        assert number(text, f"{name}/train/loss") == pytest.approx(loss(model(name)), rel=1e-5)


@pytest.mark.parametrize(
    ("ckpt", "args", "marks"),
    [("a.ckpt", [], 1), ("a.ckpt b.ckpt c.ckpt", [], 3), ("a.ckpt b.ckpt c.ckpt", ["--trajectory=true"], 3)],
)
def test_landscape_in_a_plane(capsys, ckpt, args, marks):
    analyze(capsys, "landscape", ckpt, "--points=3", "--dimensions=2", *args)
    found = Landscape2D.load("out/landscape.npz")
    assert found.values.shape[2:] == (3, 3)
    assert len(found.marks) == marks
    assert (len(found.explained) > 0) == bool(args)


def test_connect(capsys):
    options = [option for option in SHORT if not option.startswith("--parameters")]
    options += ["--points=3", "--steps=5", "--lr=0.01"]
    cli.main(["analyze", "connect", "--config=config.yaml", "--ckpt", "a.ckpt", "b.ckpt", *options])
    assert "train/loss_barrier" in capsys.readouterr().out
    found = Curve.load("out/connect.npz")
    assert found.values[0, found.metrics.index("loss"), [0, -1]] == pytest.approx([loss(model("a")), loss(model("b"))])
    assert len(found.training_loss) == 5
    assert found.models == ["a", "b"]


# ------------------------------------------------------------------------------------------- configurations, checkpoints
def test_what_fit_has_saved_can_be_read(capsys):
    """Its configuration, and the average of replicas that its checkpoint holds."""
    cli.main(["fit", "--config=config.yaml"])
    (saved,) = Path("lightning_logs").rglob("config.yaml")
    cli.main(["analyze", "hessian", f"--config={saved}", "--ckpt", "ck/trained.ckpt", *SHORT, "--k=1"])
    state = torch.load("ck/trained.ckpt", weights_only=True)["state_dict"]
    trained = ImageClassifier(**OPTIONS).double()
    trained.load_state_dict(state)
    assert number(capsys.readouterr().out, "loss") == pytest.approx(loss(trained.eval()), rel=1e-5)


def test_checkpoints_of_the_same_name(capsys):
    Path("other").mkdir()
    Path("a.ckpt").rename("other/b.ckpt")
    text = analyze(capsys, "hessian", "b.ckpt other/b.ckpt", "--k=1")
    assert text.splitlines()[0].split() == ["b_train", "other_b_train"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["r1/last.ckpt", "r2/last.ckpt", "last_1.ckpt"], ["r1_last", "r2_last", "last_1"]),
        (["/runs/a/1/last.ckpt", "/runs/b/1/last.ckpt", "first.pt"], ["a_1_last", "b_1_last", "first"]),
        (["runs/r1/last.ckpt", "runs/r2/last.ckpt", "r1_last.ckpt"], ["runs_r1_last", "r2_last", "r1_last"]),
        (["last.ckpt", "../last.ckpt"], ["last", ".._last"]),
    ],
)
def test_every_checkpoint_has_a_name(paths, names):
    assert _labels(paths) == dict(zip(names, paths, strict=True))


def test_a_checkpoint_that_is_given_twice(capsys):
    sentence = "'a.ckpt' and 'a.ckpt' have the same name: give each once, or rename one."
    assert sentence in fails(capsys, "hessian", *A[:3], "a.ckpt")


def test_a_plain_state_dict(capsys):
    torch.save(torch.load("a.ckpt", weights_only=True)["state_dict"], "plain.ckpt")
    text = analyze(capsys, "hessian", "a.ckpt plain.ckpt", "--k=1")
    assert number(text, "top") == number(text, "top", 1)


def test_own_loss_by_its_import_path(capsys, monkeypatch):
    lines = ["from torch.nn.functional import cross_entropy", "def twice(module, batch):"]
    lines.append("    return 2 * cross_entropy(module(batch[0]), batch[1])")
    Path("own_losses.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(os.getcwd())
    plain = analyze(capsys, "hessian", "a.ckpt", "--k=1", "--tol=1e-6")
    twice = analyze(capsys, "hessian", "a.ckpt", "--k=1", "--tol=1e-6", "--loss_fn=own_losses.twice")
    assert number(twice, "top") == pytest.approx(2 * number(plain, "top"), rel=1e-4)


@pytest.mark.launch
def test_two_processes(capsys):
    one = analyze(capsys, "hessian", "a.ckpt", "--k=2", "--trace=12", "--tol=1e-8")
    whole = Spectrum.load("out/hessian_a_train.npz")
    command = ["-m", "lightning_distopt", "analyze", "hessian", "--config=config.yaml", "--ckpt", "a.ckpt"]
    command += [*SHORT, "--k=2", "--trace=12", "--tol=1e-8", "--trainer.devices=2"]
    environment = fresh_environment(Path(__file__).parents[1])
    with Forked(command, Path.cwd(), environment) as process:
        said = process.finish(timeout=200)
    shared = Spectrum.load("out/hessian_a_train.npz")
    assert shared.eigenvalues == pytest.approx(whole.eigenvalues, rel=1e-9)
    assert shared.trace == pytest.approx(whole.trace, rel=1e-9)
    told = [line.split() for line in said.splitlines()]
    assert all(line.split() in told for line in one.splitlines()[:3])


# -------------------------------------------------------------------------------------------------------------- mistakes
A = ["--config=config.yaml", "--ckpt", "a.ckpt", *SHORT]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["hessian", "--config=config.yaml", "--ckpt", "none.ckpt"], "There is no checkpoint 'none.ckpt'."),
        (["hessian", "--config=config.yaml", "--ckpt", "config.yaml"], "'config.yaml' can't be read as a checkpoint"),
        (["hessian", "--config=config.yaml"], "There is nothing to analyse: give one checkpoint"),
        (["hessian", *A, "--model.model_options.image_size=16"], "'model.fc1.weight' is of shape [120, 64] there and of shape"),
        (["hessian", *A, "--k=none"], "`k`: expected int, got none."),
        (["hessian", *A, "--kk=3"], "there is no option `--kk=3` (did you mean `--k`?)."),
        (["hessian", *A, "--tol=0"], "`tol`"),
        (["hessian", *A, "--on=test"], "on"),
        (["hessian", *A, "--samples=0"], "`samples` must be a whole number, at least 1, or None for all; got 0."),
        (["hessian", *A, "--on=val", "--trainer.limit_val_batches=0"], "There is no validation data to measure on"),
        (["hessian", *A, "--parameters=[tail.*]"], "matches none of the trainable ones"),
        (["hessian", *A, "--output=a.ckpt"], "`output` leads through 'a.ckpt', which is a file and no folder: name another"),
        (["interpolate", *A], "A line has two ends: give two checkpoints or more, `--ckpt a.ckpt b.ckpt`."),
        (["connect", *A], "A curve has two ends: give two checkpoints, `--ckpt a.ckpt b.ckpt`; got 1."),
        (["landscape", "--config=config.yaml", "--ckpt", "a.ckpt", "b.ckpt", "--dimensions=2"], "one checkpoint or three"),
        (["landscape", *A, "--trajectory=true"], "use `--dimensions 2`, and list them"),
        (["landscape", *A, "--points=4"], "`points` must be an odd number"),
        (["curvature", *A], "invalid choice: 'curvature'"),
    ],
)
def test_mistakes_are_one_sentence(args, sentence, capsys):
    error = fails(capsys, *args)
    assert error.startswith("lightning-distopt: error: ")
    assert sentence in error
    assert error.count("\n") == 2
    assert not Path("out").exists()


def test_help_and_print_config(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main(["analyze"])
    text = capsys.readouterr().out
    for name in ("hessian", "landscape", "interpolate", "connect"):
        assert f"    {name}  " in text
    with pytest.raises(SystemExit):
        cli.main(["analyze", "hessian", "--config=config.yaml", "--ckpt", "a.ckpt", "--k=3", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["k"], printed["ckpt"], printed["model"]["init_args"]["model"]) == (3, ["a.ckpt"], "lenet")
