"""`HessianProbe`: the eigenvalues of dense Hessians, on any number of ranks, logged and drawn, without a trace in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from lightning_distopt import GossipStrategy, HessianProbe, LocalSGDStrategy
from lightning_distopt.analysis import History
from lightning_distopt.analysis.spectrum import Spectrum
from tests.conformance.problems import SmallNet
from tests.probes import Net, WithoutMetrics, disturbance, fit, images

HEAD = {"parameters": "head.*", "samples": None, "progress": False}
"""111 parameters, whose Hessian is small enough to be written down."""


def probe(every: Any = "start", **options: Any) -> HessianProbe:
    return HessianProbe(every, **{"save": [], **HEAD, **options})


def dense(size: int = 12, parameters: str = "head.", start: Any = None) -> np.ndarray:
    """Return the eigenvalues of the Hessian that autograd gives, in rising order."""
    torch.manual_seed(1)
    module = Net().double().eval()
    if start is not None:
        module.load_state_dict(start)
    x, y = images(size).tensors
    chosen = {name: p.detach() for name, p in module.named_parameters() if name.startswith(parameters)}
    shapes, sizes = [p.shape for p in chosen.values()], [p.numel() for p in chosen.values()]

    def loss(w: torch.Tensor) -> torch.Tensor:
        pieces = {n: v.view(shape) for n, v, shape in zip(chosen, w.split(sizes), shapes, strict=True)}
        return nn.functional.cross_entropy(functional_call(module, pieces, (x,)), y)

    w = torch.cat([p.reshape(-1) for p in chosen.values()])
    return np.linalg.eigvalsh(torch.autograd.functional.hessian(loss, w).numpy())


def train(rank: int = 0, world: int = 1, strategy: Any = "auto", **options: Any) -> Any:
    attached = options.pop("probe")
    settings = {"data": DataLoader(images(), 3), "max_steps": 1, "val_check_interval": 1.0, **options}
    result = fit(rank, world, strategy, probes=[attached], **settings)
    return attached, result


# ---------------------------------------------------------------------------------------------------------------- numbers
def test_both_ends_trace_and_density_are_those_of_the_dense_hessian():
    attached, _ = train(probe=probe(k=6, trace=150, density=160, tol=1e-8))
    expected, (entry,) = dense(), attached.history
    assert set(entry) == {"step", "epoch", "top", "bottom", "gradient_norm", "trace", "trace_error"}
    assert entry["top"] == pytest.approx(expected[-1], rel=1e-7)
    assert entry["bottom"] == pytest.approx(expected[0], abs=1e-7 * expected[-1])
    spectrum = attached.result["train"]
    assert spectrum.eigenvalues[:3] == pytest.approx(expected[:-4:-1], rel=1e-6)
    assert entry["trace"] == pytest.approx(expected.sum(), abs=max(1e-10, 5 * entry["trace_error"]))
    assert spectrum.density is not None
    trapezoids = (spectrum.density[1:] + spectrum.density[:-1]) / 2 * np.diff(spectrum.grid)
    assert trapezoids.sum() == pytest.approx(1, abs=1e-6)


def test_gauss_newton_by_the_module_s_output():
    """That of the last layer is its Hessian, since the loss is convex in the outputs, which are linear in it."""
    attached, _ = train(probe=probe(kind="gauss_newton", tol=1e-8, outputs="head"), module=WithoutMetrics)
    assert attached.history[0]["top"] == pytest.approx(dense()[-1], rel=1e-7)


@pytest.mark.parametrize("engine", ["lobpcg", "pyhessian"])
def test_engines(engine):
    pytest.importorskip({"lobpcg": "scipy", "pyhessian": "pyhessian"}[engine])
    attached, _ = train(probe=probe(engine=engine, k=2, tol=1e-5))
    assert attached.history[0]["top"] == pytest.approx(dense()[-1], rel=1e-2)
    assert "bottom" not in attached.history[0]


def test_layers():
    attached, _ = train(probe=probe(per_layer=True, parameters=["head.*", "conv.*"], k=2, tol=1e-8))
    (entry,) = attached.history
    for layer in ("head", "conv"):
        expected = dense(parameters=f"{layer}.")
        assert entry[f"{layer}/top"] == pytest.approx(expected[-1], rel=1e-7)
        assert entry[f"{layer}/bottom"] == pytest.approx(expected[0], abs=1e-7 * expected[-1])
        assert entry["top"] >= entry[f"{layer}/top"] * (1 - 1e-9)


def test_both_data():
    attached, result = train(probe=probe(data=["train", "val"], tol=1e-8))
    (entry,) = attached.history
    assert entry["train/top"] == pytest.approx(dense(12)[-1], rel=1e-7)
    assert entry["val/top"] == pytest.approx(dense(7)[-1], rel=1e-7)
    (logged,) = [values for _, values in result["logged"] if "hessian/train/top" in values]
    assert logged["hessian/val/top"] == entry["val/top"]


def test_two_kinds_side_by_side_and_what_they_have_found(tmp_path):
    """Each logs under a name of its own, writes files of its own, and can be saved."""
    whole, part = probe(save=["npz"], k=2), probe(save=["npz"], k=2, kind="gauss_newton", outputs="head", name="gauss_newton")
    options = {"data": DataLoader(images(), 3), "max_steps": 1, "val_check_interval": 1.0, "folder": tmp_path}
    result = fit(probes=[whole, part], module=WithoutMetrics, logger=CSVLogger(tmp_path), **options)
    assert whole.state_key != part.state_key
    for one, name in ((whole, "hessian"), (part, "gauss_newton")):
        files = sorted(file.name for file in tmp_path.rglob(f"{name}/*"))
        assert files == ["step=000000.npz", "step=000001_over_training.npz"]
        found = Spectrum.load(next(tmp_path.rglob(f"{name}/step=000000.npz")))
        assert (found.kind, found.numbers()["top"]) == (one.kind, one.history[0]["top"])
        assert one.result.save(tmp_path / f"{name}.png") == [tmp_path / f"{name}.png"]
    assert result is not None


STRATEGIES = {"ddp": "ddp_find_unused_parameters_true", "gossip": lambda: GossipStrategy("dsgd")}


@pytest.mark.parametrize(("name", "world"), [("ddp", 2), ("gossip", 4)])
def test_ranks_give_the_numbers_of_one(ranks, name, world):
    def measured(rank: int, world: int, strategy: Any) -> list[dict[str, float]]:
        return train(rank, world, strategy, probe=probe(trace=30, density=40, tol=1e-10))[0].history

    (one,) = measured(0, 1, "auto")
    for (history,) in ranks.run(world, measured, STRATEGIES[name]):
        assert history == pytest.approx(one, rel=1e-8, abs=1e-12)
        assert history["top"] == pytest.approx(one["top"], rel=1e-10)


def test_the_average_of_replicas_is_measured():
    attached = probe("2 steps", tol=1e-8)
    strategy = LocalSGDStrategy(4, replicas_per_device=2)
    _, result = train(strategy=strategy, probe=attached, max_steps=2, max_epochs=2, validation=[])
    assert attached.history[0]["top"] == pytest.approx(dense(start=result["final"])[-1], rel=1e-7)


# --------------------------------------------------------------------------------------------------- training, and files
@pytest.mark.parametrize("strategy", ["auto", lambda: LocalSGDStrategy(2, replicas_per_device=2)], ids=["alone", "local"])
def test_training_does_not_notice_it(strategy, tmp_path):
    attached = probe(["2 steps", "validation"], k=2, trace=9, density=4, samples=4, check=False)
    without = fit(strategy=strategy, folder=tmp_path)
    watched = fit(strategy=strategy, folder=tmp_path, probes=[attached])
    assert disturbance(without, watched, "hessian") == ""
    assert len(attached.history) >= 4


def test_files_and_the_picture_over_training(tmp_path):
    attached = HessianProbe(["start", "epoch"], data=["train", "val"], trace=6, k=2, save=["npz", "png"], **HEAD)
    fit(probes=[attached], data=DataLoader(images(), 3), folder=tmp_path, logger=False)
    folder = tmp_path / "hessian"
    parts = [f"step={step:06d}_{data}.{kind}" for step in (0, 4, 8) for data in ("train", "val") for kind in ("npz", "png")]
    over = [f"step=000008_over_training.{kind}" for kind in ("npz", "png")]
    assert sorted(path.name for path in folder.iterdir()) == sorted(parts + over)
    spectrum = Spectrum.load(folder / "step=000008_val.npz")
    assert spectrum.numbers()["top"] == attached.history[-1]["val/top"]
    history = History.load(folder / over[0])
    assert history.step.tolist() == [0, 4, 8]
    assert history.values["val/top"] == [entry["val/top"] for entry in attached.history]
    ends = ["train/top", "train/bottom", "val/top", "val/bottom"]
    assert history.panels == {"eigenvalue": ends, "trace": ["train/trace", "val/trace"]}
    height, width, _ = matplotlib.image.imread(folder / over[1]).shape
    assert (height, width) == (870, 960)  # two panels
    figure = history.figure()
    labels = [text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()]
    assert labels == ["top, train", "bottom, train", "top, val", "bottom, val", "trace, train", "trace, val"]


def test_one_data_has_short_names(tmp_path):
    attached = HessianProbe("end", k=1, save=["json"], **HEAD)
    fit(probes=[attached], data=DataLoader(images(), 3), folder=tmp_path, max_epochs=1)
    names = {path.name for path in Path(tmp_path, "hessian").iterdir()}
    assert names == {"step=000004.json", "step=000004_over_training.json"}
    assert set(attached.history[0]) == {"step", "epoch", "top", "gradient_norm"}


# ---------------------------------------------------------------------------------------------------------------- refusal
class Once(SmallNet):
    """Has a loss that torch differentiates once only."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.multi_margin_loss(self(batch[0]), batch[1], p=2)


def test_a_layer_without_second_derivative_is_refused_before_training():
    attached = probe("end")
    with pytest.raises(ValueError, match="no second derivative in some layer: use `derivatives='finite_differences'`"):
        train(probe=attached, module=Once)
    assert attached.history == []
    by_differences, _ = train(probe=probe(derivatives="finite_differences", tol=1e-6), module=Once)

    def squares(module: nn.Module, batch: Any) -> torch.Tensor:
        outputs = module(batch[0])
        margins = (1 - outputs.gather(1, batch[1][:, None]) + outputs).clamp(min=0) ** 2
        return (margins.sum(dim=1) - 1).mean() / 3  # without that of the right class

    twice, _ = train(probe=probe(loss_fn=squares, tol=1e-6))
    assert by_differences.history[0]["top"] == pytest.approx(twice.history[0]["top"], rel=1e-5)


def test_gauss_newton_without_outputs():
    class Inner(SmallNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.cross_entropy(self.forward(batch[0]), batch[1])

    with pytest.raises(ValueError, match="Name it by `outputs`"):
        train(probe=probe(kind="gauss_newton"), module=Inner)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"k": 0}, "`k` must be a whole number, at least 1; got 0."),
        ({"k": 2.0}, "got 2.0"),
        ({"trace": 5}, "`trace` must be 0, or 6 products or more, such as 99; got 5."),
        ({"trace": True}, "got True"),
        ({"density": -1}, "`density` must be a whole number, at least 0; got -1."),
        ({"tol": 0}, "`tol` must be above 0 and below 1; got 0."),
        ({"kind": "fisher"}, "`kind` must be one of 'hessian', 'gauss_newton'; got 'fisher'."),
        ({"derivatives": "forward"}, "`derivatives` must be one of"),
        ({"kind": "gauss_newton", "derivatives": "finite_differences"}, "use `derivatives='double_backward'`"),
        ({"metrics": lambda module, batch: {}}, "HessianProbe measures the curvature of the loss, and nothing of `metrics`"),
        ({"name": ""}, "`name` must be a text, such as 'head'; got ''."),
        ({"engine": "power"}, "`engine` must be one of 'lanczos', 'lobpcg', 'pyhessian'; got 'power'."),
        ({"per_layer": "head"}, "`per_layer` must be True or a list of patterns; got 'head'."),
        ({"every": "now"}, "`every` does not understand 'now'"),
    ],
)
def test_options(options, sentence):
    with pytest.raises(ValueError) as caught:
        HessianProbe(**options)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kind": "gauss_newton", "outputs": "model"}, "`outputs` names the submodule 'model', which there is not"),
        ({"per_layer": ["tail.*"]}, "matches none of the trainable ones"),
    ],
)
def test_options_that_do_not_go_with_the_module(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        train(probe=probe("end", **options))


def test_an_engine_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs pyhessian: pip install 'lightning-distopt\[hessian\]'"):
        HessianProbe(engine="pyhessian")
