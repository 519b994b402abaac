from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_distopt.analysis import CurvatureOperator, Objective, Spectrum, hessian_spectrum
from tests.analysis.matrices import classified, dense, ends, entropy, matrix_of, perceptron


@pytest.fixture
def objective() -> Objective:
    torch.manual_seed(1)
    return classified(perceptron(), (4,), size=30)


def test_whole(objective: Objective) -> None:
    H = dense(objective)
    found = hessian_spectrum(objective, k=4, which="BE", trace=60, density=43, tol=1e-6, progress=False)
    np.testing.assert_allclose(found.eigenvalues, ends(np.linalg.eigvalsh(H), 4, "BE"), rtol=1e-6)
    assert (found.errors <= 1e-6 * np.abs(found.eigenvalues)).all() and found.converged
    assert abs(found.trace - np.trace(H)) <= 4 * found.trace_error + 1e-12
    assert found.dim == 43 and found.weights @ found.nodes * 43 == pytest.approx(np.trace(H), rel=0.5)
    assert found.density.sum() * (found.grid[1] - found.grid[0]) == pytest.approx(1, abs=1e-7)
    assert found.gradient_norm == pytest.approx(float(objective.gradient().norm()), rel=1e-12)
    assert found.loss == pytest.approx(objective.loss(), rel=1e-12) and found.samples == 30
    numbers = found.numbers()
    assert list(numbers) == ["top", "bottom", "gradient_norm", "trace", "trace_error"]
    assert (numbers["top"], numbers["bottom"]) == (found.eigenvalues[0], found.eigenvalues[-1])


@pytest.mark.parametrize(("which", "names"), [("LA", ["top"]), ("SA", ["bottom"]), ("LM", ["top"]), ("BE", ["top", "bottom"])])
def test_numbers_of_the_ends(objective: Objective, which: Any, names: list[str]) -> None:
    found = hessian_spectrum(objective, k=2, which=which, progress=False).numbers()
    values = np.linalg.eigvalsh(dense(objective))
    assert list(found) == [*names, "gradient_norm"]
    assert found.get("bottom", values[0]) == pytest.approx(values[0], rel=1e-3)
    assert found.get("top", values[-1]) == pytest.approx(values[-1], rel=1e-3)


@pytest.mark.parametrize(("engine", "kind"), [("lanczos", "hessian"), ("lanczos", "gauss_newton"), ("lobpcg", "hessian")])
def test_layers(objective: Objective, engine: Any, kind: Any) -> None:
    H = matrix_of(CurvatureOperator(objective, kind))
    found = hessian_spectrum(
        objective, k=2, which="LA", trace=90, engine=engine, kind=kind, per_layer=True, tol=1e-6, progress=False
    )
    blocks = {"0": H[:25, :25], "2": H[25:, 25:]}
    assert found.layers.keys() == blocks.keys()
    for name, block in blocks.items():
        assert found.layers[name]["top"] == pytest.approx(np.linalg.eigvalsh(block)[-1], rel=1e-6)
        assert found.layers[name]["trace"] == pytest.approx(np.trace(block), rel=1e-6)  # the sketch holds it all
        assert found.numbers()[f"{name}/top"] == found.layers[name]["top"]
    chosen = hessian_spectrum(objective, k=2, per_layer=["*.weight"], tol=1e-6, progress=False)
    keep = np.r_[0:20, 25:40]
    expected = np.linalg.eigvalsh(dense(objective)[np.ix_(keep, keep)])[-1]
    assert chosen.layers == {"*.weight": {"top": pytest.approx(expected, rel=1e-6)}}


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_graphs_are_released(objective: Objective, error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[int] = []
    release, matvec = CurvatureOperator.release, CurvatureOperator.matvec

    def count(self: CurvatureOperator) -> None:
        released.append(len(self._kept))
        release(self)

    def fail(self: CurvatureOperator, vector: torch.Tensor) -> torch.Tensor:
        product = matvec(self, vector)
        if error is not None and self.products == 3:
            raise error
        return product

    monkeypatch.setattr(CurvatureOperator, "release", count)
    monkeypatch.setattr(CurvatureOperator, "matvec", fail)
    if error is None:
        hessian_spectrum(objective, keep_graph=True, progress=False)
    else:
        with pytest.raises(error):
            hessian_spectrum(objective, keep_graph=True, progress=False)
    assert released == [len(objective.batches)]


@pytest.mark.parametrize("suffix", ["npz", "json"])
def test_saves(objective: Objective, suffix: str, tmp_path: Path) -> None:
    for options in ({}, {"trace": 9, "density": 20, "per_layer": True}):
        found = hessian_spectrum(objective, k=2, progress=False, **options)  # type: ignore[arg-type]
        again = Spectrum.load(found.save(tmp_path / f"spectrum.{suffix}"))
        for name, value in vars(found).items():
            np.testing.assert_equal(getattr(again, name), value)
        assert again.numbers() == found.numbers()


def test_figures(objective: Objective, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bars = hessian_spectrum(objective, k=3, progress=False)
    (axes,) = bars.figure().axes
    np.testing.assert_allclose([patch.get_height() for patch in axes.patches], bars.eigenvalues)
    density = hessian_spectrum(objective, k=3, density=20, progress=False)
    (axes,) = density.figure().axes
    assert axes.get_yscale() == "log"
    np.testing.assert_allclose(axes.lines[1].get_xdata(), density.eigenvalues)
    assert density.save(tmp_path / "spectrum.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"engine": "arpack"}, "`engine` must be"),
        ({"engine": "lobpcg", "which": "BE"}, "LOBPCG finds one end"),
        ({"per_layer": "0.*"}, "`per_layer` must be"),
        ({"per_layer": ["nothing.*"]}, "matches none"),
        ({"k": 0}, "`k` must be"),
        ({"trace": 3}, "`trace` must be 0, or 6 products or more"),
        ({"trace": 1, "engine": "pyhessian"}, "`trace` must be 0, or 6 products or more"),
        ({"trace": -1}, "`trace` must be a whole number, at least 0"),
        ({"density": -1}, "`density` must be a whole number, at least 0"),
        ({"kind": "fisher"}, "`kind` must be one of"),
    ],
)
def test_options_that_make_no_sense(objective: Objective, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        hessian_spectrum(objective, progress=False, **options)


@pytest.mark.parametrize(("package", "engine"), [("pyhessian", "pyhessian"), ("scipy.sparse.linalg", "lobpcg")])
def test_a_missing_package(objective: Objective, package: str, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "lightning_distopt.analysis._pyhessian", raising=False)
    hessian_spectrum(objective, k=2, trace=6, density=4, progress=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-distopt\[hessian\]'"):
        hessian_spectrum(objective, engine=engine, progress=False)


@pytest.mark.parametrize("world", [2, 4])  # the fourth rank has no batch
def test_ranks(ranks: Any, world: int) -> None:
    torch.manual_seed(1)
    net = perceptron()
    f = classified(net, (4,))
    options: dict[str, Any] = {"k": 3, "which": "BE", "trace": 12, "density": 10, "per_layer": True, "progress": False}

    def found(rank: int, world_size: int) -> Spectrum:
        return hessian_spectrum(Objective(net, entropy, f.batches[rank::world_size], reduce=dist.all_reduce), **options)

    expected = hessian_spectrum(f, **options)
    for result in ranks.run(world, found):
        assert result.products == expected.products
        np.testing.assert_allclose(result.eigenvalues, expected.eigenvalues, rtol=0, atol=1e-10)
        np.testing.assert_allclose(result.density, expected.density, rtol=0, atol=1e-9)
        assert result.numbers() == pytest.approx(expected.numbers(), rel=1e-9, abs=1e-10)


def test_nan_appears_as_a_sentence() -> None:
    net = nn.Linear(2, 1, bias=False)
    f = Objective(net, lambda net, x: net(x).square().mean(), [torch.ones(3, 2)])
    with torch.no_grad():
        net.weight.fill_(float("nan"))
    f.batches[0] = f.batches[0] * float("nan")
    with pytest.raises(ValueError, match="not finite"):
        hessian_spectrum(f, progress=False)
