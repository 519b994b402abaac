"""Adding an algorithm by the page alone takes five files, and the suites take it in without being told."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers import fresh_environment
from tests.installed import run

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "adding_an_algorithm.md"
LEFT_OUT = {"build", "data", "dist", "htmlcov", "lightning_logs", "outputs", "site"}
BLOCK = re.compile(
    r"^(?:`(?P<path>[\w./]+)`:\n\n)?(?P<fence>`{3,})(?P<language>\w+)\n(?P<text>.*?)^(?P=fence)$", re.DOTALL | re.MULTILINE
)


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def add(text: str, diff: str) -> str:
    """Add the lines with a plus to those without; these must be there exactly once."""
    lines = text.splitlines()
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        marked = hunk.splitlines()
        assert all(line[:1] in ("", " ", "+") for line in marked), "the page adds lines, and changes none"
        around = [line[1:] for line in marked if line[:1] != "+"]
        at = [k for k in range(len(lines)) if around and lines[k : k + len(around)] == around]
        assert len(at) == 1, f"the page adds to lines that are there {len(at)} times:\n{around}"
        lines[at[0] : at[0] + len(around)] = [line[1:] for line in marked]
    return "".join(f"{line}\n" for line in lines)


def follow(folder: Path) -> list[str]:
    """Do in `folder` what the page says; return the commands that it ends with."""
    commands = []
    for block in BLOCK.finditer(PAGE.read_text()):
        path, language, text = block["path"], block["language"], block["text"]
        if language == "bash":
            commands += text.splitlines()
        elif language == "diff":
            (folder / path).write_text(add((folder / path).read_text(), text))
        else:
            assert path, f"the page does not say which file this is:\n{text}"
            assert not (folder / path).exists()
            (folder / path).write_text(text)
    return commands


def test_lines_are_added_where_the_page_says() -> None:
    assert add("a\nb\nc\n", " b\n+x\n@@\n+y\n c\n") == "a\nb\nx\ny\nc\n"
    assert add("a\nb\n", "+x\n a\n") == "x\na\nb\n"
    for wrong in (" d\n+x\n", "-a\n+x\n", "+x\n"):
        with pytest.raises(AssertionError):
            add("a\nb\n", wrong)
    with pytest.raises(AssertionError):
        add("a\na\n", " a\n+x\n")


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.timeout(900)
def test_a_toy_takes_five_files_and_passes_the_battery(tmp_path: Path) -> None:
    for entry in ROOT.iterdir():
        if entry.is_dir() and entry.name not in LEFT_OUT and not entry.name.startswith("."):
            shutil.copytree(entry, tmp_path / entry.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif entry.is_file():
            shutil.copy(entry, tmp_path)
    before = digests(tmp_path)
    commands = follow(tmp_path)
    after = digests(tmp_path)
    assert before.keys() <= after.keys()
    changed = {path for path, digest in after.items() if before.get(path) != digest}
    new = sorted(changed - before.keys())
    (name,) = [Path(path).stem for path in new if path.startswith("lightning_distopt/")]
    assert new == [f"docs/algorithms/{name}.md", f"lightning_distopt/algorithms/{name}.py"]
    assert sorted(changed & before.keys()) == [
        "CHANGELOG.md",
        "lightning_distopt/algorithms/__init__.py",
        "tests/conformance/gossip_rows.py",
    ]

    outputs = []
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "python"
        options = ["-p", "no:cacheprovider"] if arguments[1] == "pytest" else []
        outputs.append(run([sys.executable, *arguments, *options], tmp_path, fresh_environment(tmp_path), timeout=250))
    assert len(outputs) == 3
    battery, listing, pages = outputs
    assert passed(battery) >= 20
    assert "HeavyBallGossip: Step, then move towards the neighbours with a momentum." in listing
    assert "omega=0.5\n    how much of the last move is repeated" in listing
    assert passed(pages) >= 3

    if importlib.util.find_spec("ruff") is not None:
        python = [path for path in changed if path.endswith(".py")]
        for check in (["check"], ["format", "--check"]):
            command = [sys.executable, "-m", "ruff", *check, "--no-cache", *python]
            run(command, tmp_path, fresh_environment(tmp_path), timeout=60)


def passed(output: str) -> int:
    (counts,) = re.findall(r"^=* ?(.* in [\d.]+s.*?) ?=*$", output, re.MULTILINE)
    assert "skipped" not in counts
    return int(re.search(r"(\d+) passed", counts)[1])
