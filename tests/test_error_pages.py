"""The sentences on the page of error messages are those of the package, and those of many modules are all there."""

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
"""What communicates, saves and resumes."""

_FOR_COMMUNICATION = ("communication_monitor", "consensus_control", "consensus_reference", "post_local_switch")
WHOLE = [
    *RUN_TIME,
    *(f"callbacks/{name}.py" for name in _FOR_COMMUNICATION),
    *(
        str(file.relative_to(PACKAGE))
        for folder in ("algorithms", "compression", "plan", "topologies")
        for file in sorted((PACKAGE / folder).glob("*.py"))
    ),
    "lookup.py",
]
"""Of these modules each error and each warning stands on the page, but those that say what an option must be."""

NOT_FOR_USERS = ("The group size", "unreachable")
"""Beginnings of what only somebody who writes an algorithm can meet."""

_LIMITS = re.compile(r"(`[^`]*`|--\w+)( and (`[^`]*`|--\w+))? must (be|not be) [^:]*; got ")
"""What says it all: how an option is called, what it may be and what it is."""


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


def said(file: str) -> list[str]:
    """Return the texts of a module's errors and warnings, wherever they are made."""
    calls = [node for node in ast.walk(ast.parse((PACKAGE / file).read_text())) if isinstance(node, ast.Call)]
    names = [call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "") for call in calls]
    chosen = [call for call, name in zip(calls, names, strict=True) if name.endswith(("Error", "Exception", "warn"))]
    return [text.strip() for call in chosen for text in map(text_of, call.args) if text is not None]


@pytest.mark.parametrize("file", WHOLE)
def test_all_that_these_modules_say_is_on_the_page(file):
    needed = [sentence for sentence in said(file) if not sentence.startswith(NOT_FOR_USERS) and not _LIMITS.match(sentence)]
    assert not [sentence for sentence in needed if not any(begins(sentence, quote) for quote in QUOTES)]


def test_the_reasons_why_there_is_no_reference_are_on_the_page():
    """They travel to the other ranks as texts before they are raised."""
    tree = ast.parse((PACKAGE / "callbacks" / "consensus_reference.py").read_text())
    (read,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "read_reference")
    texts = [text_of(node) or "" for node in ast.walk(read) if isinstance(node, ast.JoinedStr)]
    texts = [text for text in texts if text.startswith("The")]
    assert len(texts) == 4
    assert not [text for text in texts if not any(begins(text, quote) for quote in QUOTES)]


def test_limits_of_options_are_told_from_what_has_to_be_explained():
    assert _LIMITS.match("`points` must be an odd number from 3 on; got \0.")
    assert not _LIMITS.match("`target='constant'` needs `reference`: `Xi_max` as a number above 0; got \0.")
    assert not _LIMITS.match("\0.compress must return bytes")


def test_there_are_errors_at_run_time():
    assert sum(len(said(file)) for file in RUN_TIME) > 15
