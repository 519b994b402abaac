"""The paper-to-code map names what there is: files, classes, functions, rows of conformance tables, examples, pages."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

import lightning_distopt
from tests.conformance.cases import CASES
from tests.test_algorithm_pages import CHOICES

ROOT = Path(__file__).parent.parent
MAP = ROOT / "docs" / "paper_to_code.md"
COLUMNS = ["code", "proof", "example", "page"]
LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<path>[^)#]+)(?:#(?P<anchor>[^)]+))?\)")


def tables() -> Iterator[tuple[list[str], list[list[str]]]]:
    """Yield the head and the rows of each table."""
    for table in re.findall(r"(?:^\|.*\n)+", MAP.read_text(), re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
        yield [cell.strip("| ") for cell in head], [[cell.strip("| ") for cell in row] for row in rows]


ROWS = [row for head, rows in tables() if head[1:] == COLUMNS for row in rows]
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])


def links(cell: str) -> list[re.Match[str]]:
    found = list(LINK.finditer(cell))
    assert found, f"no link in {cell!r}"
    for link in found:
        assert (MAP.parent / link["path"]).exists(), f"{link['path']} is not there: {cell}"
    return found


@cache
def defined(file: Path) -> set[str]:
    """Return what a file defines: functions and classes, those of classes as `Class.name` too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


@cache
def rows_of(file: Path) -> set[str]:
    """Return the names of a file's table of tests, if it has one."""
    module = importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
    table = getattr(module, "ROWS", [])
    return set(table) if isinstance(table, Mapping) else set(map(str, table))


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }


def test_the_map_has_tables() -> None:
    assert len(ROWS) > 100
    assert len({row[0] for row in ROWS}) == len(ROWS)
    assert {len(head) for head, _ in tables()} == {5, 3, 2}
    assert [len(rows) > 10 for head, rows in tables() if head == ["in the documents", "why not"]] == [True]
    assert all(len(row) == len(head) and all(row) for head, rows in tables() for row in rows), "a cell is empty"


@each_row
def test_code_is_there(row: list[str]) -> None:
    for link in links(row[1]):
        assert link["path"].startswith("../lightning_distopt/")
        assert link["text"].strip("`") in defined(MAP.parent / link["path"]), link["text"]


@each_row
def test_proofs_are_there(row: list[str]) -> None:
    for link in links(row[2]):
        assert link["path"].startswith("../tests/")
        file, name = (MAP.parent / link["path"]).resolve(), link["text"].strip("`")
        if name.startswith("test_"):
            assert name in defined(file), name
        else:
            assert name in rows_of(file), f"{file.name} has no row {name!r}"


@each_row
def test_examples_and_pages_are_there(row: list[str]) -> None:
    for link in links(row[3]):
        assert link["text"] in ("snippet", Path(link["path"]).name)
        assert link["path"].startswith("../examples/") == (link["text"] != "snippet")
    for link in [*links(row[3]), *links(row[4])]:
        if link["anchor"]:
            assert link["anchor"] in anchors(MAP.parent / link["path"]), link[0]
    assert all(link["path"].endswith(".md") for link in links(row[4]))


def test_links_of_the_other_tables_lead_somewhere() -> None:
    cells = [cell for head, rows in tables() if head[1:] != COLUMNS for row in rows for cell in row if "](" in cell]
    assert len(cells) > 10
    assert all(links(cell) for cell in cells)


def test_every_public_algorithm_is_in_it() -> None:
    shown = [(links(row[1]), links(row[4])) for row in ROWS]
    public = {key: cls.__name__ for key, cls in CHOICES.items() if cls.__name__ in lightning_distopt.__all__}
    assert len(public) > 40
    for key, name in public.items():
        pages = [
            {link["path"] for link in pages}
            for code, pages in shown
            if name in {link["text"].strip("`").partition(".")[0] for link in code} or name == "LocalSGDStrategy"
        ]
        assert any(f"algorithms/{key}.md" in of_row for of_row in pages), (
            f"`lightning_distopt.{name}` is public: give docs/paper_to_code.md a row that links to algorithms/{key}.md."
        )


def test_every_row_of_the_conformance_suite_proves_something() -> None:
    named = {link["text"].strip("`") for row in ROWS for link in links(row[2]) if link["path"].endswith("_rows.py")}
    public = set(lightning_distopt.__all__)
    for case in CASES:
        algorithm = type(case.strategy(replicas_per_device=1).algorithm).__name__
        assert case.name in named or algorithm not in public, f"docs/paper_to_code.md does not name the row `{case.name}`."
