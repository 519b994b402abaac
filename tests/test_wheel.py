"""The wheel holds the package and nothing else, and works where the repository is not."""

from __future__ import annotations

import re
import shutil
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.installed import ROOT, build, environment, run

SHORT = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_checkpointing=false",
    "--data.num_train=600",
    "--data.num_test=100",
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build(tmp_path_factory.mktemp("dist"))


def test_the_wheel_holds_the_package_alone(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = wheel.namelist()
        (entry_points,) = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
        assert "lightning-distopt = lightning_distopt.cli:main" in wheel.read(entry_points).decode()
    metadata = [name for name in names if ".dist-info/" in name]
    assert {name.partition("/")[2] for name in metadata} >= {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE"}
    files = {path.relative_to(ROOT) for path in (ROOT / "lightning_distopt").rglob("*") if path.is_file()}
    files = {path for path in files if not any(re.match(r"__pycache__$|\.|ruff\.toml$", part) for part in path.parts)}
    assert {Path(name) for name in names} - {Path(name) for name in metadata} == files
    assert {path.name for path in files} >= {"py.typed", "costs.json", "README.md", "config.yaml", "train.py"}


def test_the_source_distribution_has_what_its_tests_need(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as sdist:
        tops = {Path(name).parts[1] for name in sdist.getnames()}
    assert tops >= {"lightning_distopt", "tests", "benchmarks", "examples", "docs", "pyproject.toml", "Makefile", "README.md"}


@pytest.mark.slow
@pytest.mark.launch
def test_it_works_elsewhere(built: tuple[Path, Path], tmp_path: Path) -> None:
    """Command line, examples and configurations, with the wheel's files and without the repository."""
    unpacked, work = tmp_path / "unpacked", tmp_path / "work"
    with zipfile.ZipFile(built[1]) as wheel:
        wheel.extractall(unpacked)
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    variables = environment(tmp_path / "dependencies", unpacked) | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    shutil.copytree(ROOT / "examples", work)

    where = "import importlib.util as u, lightning_distopt; print(lightning_distopt.__file__, u.find_spec('benchmarks'))"
    said = run([python, "-c", where], work, variables, 60)
    assert said.split() == [str(unpacked / "lightning_distopt" / "__init__.py"), "None"]
    assert "GossipStrategy: " in run([python, "-m", "lightning_distopt", "strategies"], work, variables, 60)
    assert "Written: README.md" in run([python, "-m", "lightning_distopt", "new", "my_project"], work, variables, 60)
    assert "of the test digits right after 36 rounds" in run([python, "simulate_replicas.py"], work, variables, 120)
    run([python, "-m", "lightning_distopt", "fit", "--config=configs/gossip.yaml", *SHORT], work, variables, 120)
    assert list(work.glob("lightning_logs/version_0/config.yaml"))
