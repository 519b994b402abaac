"""The benchmark `gpu`: it says so where there is no GPU, and its code runs on a CPU."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Settings

TINY = Settings(
    pairs=2,
    calls=1,
    device="cpu",
    values=(300_000,),  # more than a piece
    rows=(3,),
    columns=4000,
    fits=1,
    steps=2,
    warm_up=1,
    side=8,
    batch=2,
    replicas=2,
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.cli(["--json", str(tmp_path / "out.json")])
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "needs an NVIDIA GPU" in out
    assert not (tmp_path / "out.json").exists()


def _check(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    monkeypatch.setattr(gpu, "QUICK", settings)
    gpu.cli(["--quick", "--json", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["benchmark"] == "gpu" and result["quick"] is True and result["device"]
    bars = {bar["name"]: (bar["value"], bar["limit"]) for bar in result["bars"]}
    m = settings.replicas
    assert list(bars) == ["gpu: step, n = 1", f"gpu: replica step of {m} over single model"]
    assert [limit for _, limit in bars.values()] == [1.03, 1.1] and all(value > 0 for value, _ in bars.values())
    figures = {figure["name"]: figure["value"] for figure in result["figures"]}
    for d in settings.values:
        for name in gpu.COMPRESSORS:
            parts = [figures[f"d = {d:,}: {name}, {part}"] for part in ("compress", "decompress", "both over a copy")]
            assert all(value > 0 for value in parts)
    for m in settings.rows:
        for name in ("average", "error feedback", *(f"mixing, {graph}" for graph in gpu.GRAPHS)):
            assert figures[f"m = {m}: {name} over one pass"] > 0
    return figures


def test_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = _check(TINY, tmp_path, monkeypatch)
    if not torch.cuda.is_available():
        assert all(value == 0 for name, value in figures.items() if name.endswith("waits"))


@needs_gpu
def test_runs_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _check(Settings(**{**vars(TINY), "device": "cuda"}), tmp_path, monkeypatch)


@needs_gpu
def test_waits_for_a_gpu_are_counted() -> None:
    x = torch.ones(3, device="cuda")
    assert gpu.waits(lambda: x.add_(1)) == 0
    assert gpu.waits(lambda: [x.sum().item() for _ in range(2)]) == 2


def test_waits_are_those_that_torch_warns_of(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[object] = [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def method() -> None:
        assert modes[-1] == "warn"
        for text in ("called a synchronizing CUDA operation", "something else", "called a synchronizing CUDA operation"):
            warnings.warn(text, stacklevel=1)

    assert gpu.waits(method) == 2
    assert modes == [0, "warn", 0]


def test_batches_are_slices_of_images_with_their_labels() -> None:
    images = gpu.Images(1000, TINY)
    assert len(images) == 1000
    for index in (0, 3, 13, 14, 15, 16, 999):
        x, y = images.__getitems__([index, 7])
        assert x.shape == (2, 3, 8, 8) and y.shape == (2,)
        place = next(k for k in range(16) if torch.equal(images[k][0], x[0]))
        assert torch.equal(images[place + 1][0], x[1])
        assert [images[place][1], images[place + 1][1]] == list(y)
        assert x.untyped_storage().data_ptr() == images.images.untyped_storage().data_ptr()
