"""The wheel holds the package and nothing else, and works where the repository is not."""

from __future__ import annotations

import re
import shutil
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.examples.test_configs import CASES, SHORT
from tests.examples.test_examples import LAST_LINES
from tests.helpers import exhaustive
from tests.installed import ROOT, build, environment, run

FIRST = ("simulate_replicas.py", "weight_masking.py")


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


@pytest.fixture(scope="module")
def elsewhere(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], str]:
    """Run Python in a copy of the examples, with the wheel's files and without the repository."""
    folder = tmp_path_factory.mktemp("elsewhere")
    unpacked, work = folder / "unpacked", folder / "work"
    with zipfile.ZipFile(built[1]) as wheel:
        wheel.extractall(unpacked)
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = str(folder / "venv" / "bin" / "python")
    variables = environment(folder / "dependencies", unpacked) | {"XDG_CACHE_HOME": str(folder / "cache")}
    shutil.copytree(ROOT / "examples", work)

    where = "import importlib.util as u, lightning_distopt; print(lightning_distopt.__file__, u.find_spec('benchmarks'))"
    said = run([python, "-c", where], work, variables, 60)
    assert said.split() == [str(unpacked / "lightning_distopt" / "__init__.py"), "None"]
    return lambda arguments: run([python, *arguments], work, variables, 180)


@pytest.mark.slow
@pytest.mark.launch
def test_the_command_line_works_elsewhere(elsewhere: Callable[[list[str]], str]) -> None:
    assert "GossipStrategy: " in elsewhere(["-m", "lightning_distopt", "strategies"])
    assert "Written: README.md" in elsewhere(["-m", "lightning_distopt", "new", "my_project"])


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize("name", [name if name in FIRST else exhaustive(name) for name in LAST_LINES])
def test_examples_work_elsewhere(elsewhere: Callable[[list[str]], str], name: str) -> None:
    assert LAST_LINES[name] in elsewhere([name]).strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize("name", [name if name == "gossip.yaml" else exhaustive(name) for name in CASES])
def test_configurations_work_elsewhere(elsewhere: Callable[[list[str]], str], name: str) -> None:
    overrides, _ = CASES[name]
    elsewhere(["-m", "lightning_distopt", "fit", f"--config=configs/{name}", *SHORT, *overrides])
