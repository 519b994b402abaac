"""The sentences on the page of error messages are those of the package, and those of the run time are all there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_distopt"
PAGE = ROOT / "docs" / "error_messages.md"
HOW_TO = [page for page in sorted((ROOT / "docs" / "how_to").glob("*.md")) if page.stem != "yaml"]  # see test_how_to.py
GAP = "\0"  # what an f-string fills in

RUN_TIME = [
    *sorted(str(file.relative_to(PACKAGE)) for file in (PACKAGE / "communication").glob("*.py")),
    *(f"strategies/{name}.py" for name in ("base", "checkpoint", "faults", "loaders", "stopping", "training")),
]
"""What communicates, saves and resumes: each of its errors stands on the page."""

NOT_FOR_USERS = ("The group size",)
"""Beginnings of what only somebody who writes an algorithm can meet."""


def text_of(node: ast.AST) -> str | None:
    """Return what an expression says, with gaps where it depends; None if it is no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(GAP if isinstance(part, ast.FormattedValue) else part.value for part in node.values)
    return None


@cache
def all_texts() -> tuple[str, ...]:
    """Return all texts of the package but docstrings; an f-string's parts only as a whole."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text())
        skipped = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        skipped |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found |= {text_of(node) for node in ast.walk(tree) if id(node) not in skipped}
    return tuple(sorted(text.strip() for text in found if text))


def begins(text: str, quote: str) -> bool:
    """Return whether a text begins as it is quoted; `…` is anything, and a gap of the text can be nothing else."""
    pattern = ".*?".join(re.escape(part) for part in quote.split("…"))
    return re.match(pattern, text, re.DOTALL) is not None


def quotes(page: Path) -> list[str]:
    """Return what stands in the first column of tables, between two backticks and two backticks."""
    rows = re.findall(r"^\| (``.*)$", page.read_text(), re.MULTILINE)
    cells = [row.split(" | ")[0] for row in rows]
    return [quote.strip() for cell in cells for quote in re.findall(r"``(?!`)(.+?)``(?!`)", cell)]


QUOTES = quotes(PAGE)


def test_there_are_many():
    assert len(QUOTES) > 200
    assert len(set(QUOTES)) > len(QUOTES) - 10  # hardly any stands there twice


@pytest.mark.parametrize("page", [PAGE, *HOW_TO], ids=lambda page: page.stem)
def test_quotes_are_what_the_package_says(page):
    assert not [quote for quote in quotes(page) if len(quote.replace("…", "")) < 6]
    assert not [quote for quote in quotes(page) if not any(begins(text, quote) for text in all_texts())]


def test_a_quote_that_is_none_would_be_found():
    assert not any(begins(text, "Replica … is finite") for text in all_texts())
    assert begins(f"Replica {GAP} (rank {GAP}) is not finite in `{GAP}`, ", "Replica … (rank …) is not finite in …")
    assert not begins(f"Replica {GAP} (rank {GAP}) is not finite", "(rank …) is not finite")
    assert not begins(f"`{GAP}` must be at least {GAP}.", "`steps` must be at least 1")


def raised(file: str) -> list[str]:
    """Return the texts of a module's errors."""
    nodes = ast.walk(ast.parse((PACKAGE / file).read_text()))
    calls = [node.exc for node in nodes if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    return [text for call in calls for text in map(text_of, call.args) if text is not None]


@pytest.mark.parametrize("file", RUN_TIME)
def test_what_is_raised_at_run_time_is_on_the_page(file):
    for_users = [sentence for sentence in raised(file) if not sentence.startswith(NOT_FOR_USERS)]
    assert not [sentence for sentence in for_users if not any(begins(sentence, quote) for quote in QUOTES)]


def test_there_are_errors_at_run_time():
    assert sum(len(raised(file)) for file in RUN_TIME) > 15
