"""No two modules of algorithms, strategies or callbacks have the same ten lines in a row."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lightning_distopt"
FAMILIES = ("algorithms", "strategies", "callbacks", "federated", "sparsity", "compression", "analysis")
LINES = 10


def significant(text: str) -> list[tuple[int, str]]:
    """Return numbered lines without indentation; not those that are empty or import something."""
    text = re.sub(r"^from [\w.]+ import \([^)]*\)$", lambda match: "\n" * match[0].count("\n"), text, flags=re.MULTILINE)
    lines = ((k, line.strip()) for k, line in enumerate(text.split("\n"), start=1))
    return [(k, line) for k, line in lines if line and not re.match(r"(from|import) [\w.]+", line)]


def repeated(texts: dict[str, str]) -> Iterator[str]:
    """Tell the first block of each pair of texts that both have."""
    seen: dict[Sequence[str], tuple[str, int]] = {}
    told = set()
    for name, text in texts.items():
        lines = significant(text)
        for start in range(len(lines) - LINES + 1):
            block = tuple(line for _, line in lines[start : start + LINES])
            before, at = seen.setdefault(block, (name, lines[start][0]))
            if before != name and (before, name) not in told:
                told.add((before, name))
                yield f"{before}:{at} and {name}:{lines[start][0]}"


def test_it_finds_what_is_repeated() -> None:
    block = "\n".join(f"x{k} = {k}" for k in range(LINES))
    texts = {"a": f"import os\n\ny = 1\n{block}\n", "b": "def f():\n" + block.replace("x", "\n    x") + "\n    return x1"}
    assert list(repeated(texts)) == ["a:4 and b:3"]
    assert not list(repeated({"a": block, "b": block.replace("x5 = 5", "x5 = 6")}))
    assert not list(repeated(dict.fromkeys("ab", "from a import (\n" + 12 * "    b,\n" + ")\n")))


def test_nothing_is_written_twice() -> None:
    files = [path for family in FAMILIES for path in sorted((PACKAGE / family).rglob("*.py")) if path.name != "__init__.py"]
    assert len(files) > 100
    assert not list(repeated({str(path.relative_to(PACKAGE)): path.read_text() for path in files}))
