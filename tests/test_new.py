"""`lightning-distopt new`: what it writes runs as it says, and it writes all or nothing."""

from __future__ import annotations

import ast
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

from lightning_distopt import new as module
from lightning_distopt.cli import main
from lightning_distopt.new import new
from tests.helpers import Forked, fresh_environment

ROOT = Path(__file__).parent.parent
FILES = {"README.md", "config.yaml", "datamodule.py", "local_sgd.yaml", "model.py", "train.py"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["my_project", "my-project 2", "class", "42", "new/and/deep", "ünï.code"])
def test_any_name_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["new", name])
    assert names(tmp_path / name) == FILES
    assert names((tmp_path / name).parent) == {Path(name).name}
    assert (tmp_path / name / "README.md").read_text().startswith(f"# {Path(name).name}\n")
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("Try it: ").split(" && ")
    assert shlex.split(command[0]) == ["cd", name]
    assert f"\n{command[1]}\n" in (tmp_path / name / "README.md").read_text()


@pytest.mark.parametrize("where", [".", "empty"])
def test_an_empty_folder_stays_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    (tmp_path / "here" / "empty").mkdir(parents=True)
    folder = tmp_path / "here" / "empty"
    monkeypatch.chdir(folder if where == "." else folder.parent)
    before = folder.stat().st_ino
    new(where)
    assert folder.stat().st_ino == before
    assert names(folder) == FILES
    assert names(folder.parent) == {"empty"}
    assert (folder / "README.md").read_text().startswith("# empty\n")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    taken = tmp_path / "taken"
    mine = taken / "mine" if kind == "folder" else taken
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(SystemExit) as end:
        main(["new", str(taken)])
    assert end.value.code == 2
    error = capsys.readouterr().err.splitlines()[0]
    assert error == f"lightning-distopt: error: {taken} exists and is not an empty folder: give another name."
    assert mine.read_text() == "mine"
    assert names(tmp_path) == {"taken"}
    assert not taken.is_dir() or names(taken) == {"mine"}


def test_a_folder_that_can_not_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/project can't be written \(.+\): give another folder\.$"):
        new(str(tmp_path / "file" / "project"))
    assert names(tmp_path) == {"file"}


@pytest.mark.parametrize("empty", [False, True], ids=["new", "empty"])
@pytest.mark.parametrize("fails", ["write", "rename"])
def test_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty: bool, fails: str) -> None:
    owner, name = (Path, "write_text") if fails == "write" else (os, "replace")
    original, calls = getattr(owner, name), []

    def third_time_full(*args: object) -> object:
        calls.append(args)
        if len(calls) == 3 or (fails == "rename" and not empty):
            raise OSError(28, "No space left on device")
        return original(*args)

    target = tmp_path / "project"
    if empty:
        target.mkdir()
    monkeypatch.setattr(owner, name, third_time_full)
    with pytest.raises(ValueError, match="No space left on device"):
        new(str(target))
    assert calls
    assert names(tmp_path) == ({"project"} if empty else set())
    assert not empty or not names(target)


def test_the_templates_are_complete_and_parse() -> None:
    templates = module._TEMPLATES
    assert {path.name for path in templates.iterdir() if path.is_file()} == FILES
    for path in templates.glob("*.py"):
        ast.parse(path.read_text())
    readme = (templates / "README.md").read_text()
    for name in FILES - {"README.md"}:
        assert f"| `{name}` |" in readme
    config = yaml.safe_load((templates / "config.yaml").read_text())
    other = yaml.safe_load((templates / "local_sgd.yaml").read_text())
    strategies = [part["trainer"]["strategy"]["class_path"] for part in (config, other)]
    assert strategies == ["lightning_distopt.GossipStrategy", "lightning_distopt.LocalSGDStrategy"]


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.timeout(600)
def test_its_readme_can_be_followed(tmp_path: Path) -> None:
    """Every command of the README, as it stands there, in the folder that has been written."""
    new(str(tmp_path / "my_project"))
    project = tmp_path / "my_project"
    blocks = re.findall(r"```bash\n(.*?)```", (project / "README.md").read_text(), re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) == 5
    environment = fresh_environment(ROOT)
    processes, rounds = [], []
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "python"
        with Forked(arguments, project, environment) as process:
            said = process.finish(timeout=120)
        if arguments[1] == "fit":
            processes.append(max([1, *(int(n) for n in re.findall(r"MEMBER: \d+/(\d+)", said))]))
            rounds.append(re.search(r"Communication of 4 replica\(s\) in (\d+) steps:\s+rounds +(\d+)", said).groups())
            assert (project / "checkpoints" / "best.ckpt").stat().st_mtime_ns > 0
        else:
            accuracy = float(re.search(r"val_accuracy\W+([\d.]+)", said)[1])
    assert processes == [1, 2, 1, 1]
    steps = 10 * 23  # 1,437 images in batches of 16 for four replicas, ten epochs
    assert rounds == [(str(steps), str(steps // H)) for H in (1, 1, 8, 1)]
    assert accuracy > 0.9
