"""The documentation site: every page has its place, every link leads somewhere, and it is built without a warning."""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
BUILDING = ROOT / "docs" / "building"
FILES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md")]
FILES += sorted((ROOT / "docs").rglob("*.md"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BUILDING / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


pages = load("pages")
formulas = load("formulas")
hooks = load("hooks")


@functools.cache
def site() -> dict[str, str]:
    """Return the texts of all pages, by their places."""
    return pages.pages()


def navigation() -> list[Any]:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]


# ---------------------------------------------------------------------------------------------------------- navigation


def test_every_page_has_one_place_in_the_navigation() -> None:
    entries = list(pages.entries_of(pages.expand(navigation())))
    assert sorted(entries) == sorted(set(entries))
    assert set(entries) == {uri for uri in site() if not uri.startswith("source/")}


def test_the_first_page_names_every_page() -> None:
    """But those of algorithms, which `algorithms/index.md` names: see `test_algorithm_pages.py`."""
    named = {target.partition("#")[0] for target in pages.links((ROOT / "docs" / "index.md").read_text())}
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")} - {"index.md"}
    wanted = {uri for uri in there if not uri.startswith("algorithms/")} | {"algorithms/index.md"}
    assert not wanted - named, f"give docs/index.md a link to {sorted(wanted - named)}"


def test_titles_differ() -> None:
    """A search shows nothing else of a page."""
    titles = [text.removeprefix("# ").partition("\n")[0] for uri, text in site().items() if not uri.startswith("source/")]
    assert not {title for title in titles if titles.count(title) > 1}


def test_pages_of_a_folder_stand_in_the_sections_of_its_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs" / "folder").mkdir(parents=True)
    for name in ("a", "b", "c", "d", "e"):
        (tmp_path / "docs" / "folder" / f"{name}.md").touch()
    sections = ["First\n\n[c](c.md#x), [b](b.md)\n", "Empty\n\n[x](../x.md)\n", "Last\n\n[b](b.md), [e](e.md)\n"]
    text = "\n## ".join(["# Title\n\n[a](a.md)\n", *sections])
    (tmp_path / "docs" / "folder" / "index.md").write_text(text)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    groups = [{"First": ["folder/c.md", "folder/b.md"]}, {"Last": ["folder/e.md"]}]
    assert pages.expand(["folder/*", "folder/d.md"]) == ["folder/index.md", *groups, "folder/a.md", "folder/d.md"]


def test_folders_in_the_navigation_have_their_index_first_and_named_pages_once() -> None:
    expanded = pages.expand(["api/callbacks.md", {"Title": ["api/*", {"More": "api/data.md"}]}])
    inside = expanded[1]["Title"]
    assert inside[0] == "api/index.md"
    assert "api/strategies.md" in inside
    assert (
        list(pages.entries_of(expanded)).count("api/callbacks.md") == list(pages.entries_of(expanded)).count("api/data.md") == 1
    )


def test_every_package_has_a_page_of_its_names() -> None:
    packages = {path.parent.name for path in (ROOT / "lightning_distopt").glob("*/__init__.py")}
    described = set(
        re.findall(r"^::: lightning_distopt\.(\w+)", "\n".join(site()[uri] for uri in site() if uri.startswith("api/")), re.M)
    )
    assert described == packages


def test_every_public_name_leads_to_its_description() -> None:
    tree = ast.parse((ROOT / "lightning_distopt" / "__init__.py").read_text())
    (names,) = (
        ast.literal_eval(statement.value)
        for statement in tree.body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__"
    )
    linked = re.findall(r"\[`(\w+)`\]\[lightning_distopt\.\w+\.\1\]", site()["api/index.md"])
    assert sorted([*linked, "__version__"]) == sorted(names)


# --------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_anchors_are_there_and_addresses_are_well_formed(file: Path) -> None:
    folder = file.parent.relative_to(ROOT).as_posix()
    for target in pages.links(file.read_text()):
        if pages.is_address(target):
            assert pages.wrong_address(target) is None, target
            continue
        path, anchor = pages.resolve(target, folder)
        page = file if target.startswith("#") else ROOT / path
        if anchor and page.suffix == ".md":
            assert anchor in pages.anchors(page.read_text()), target


def test_links_and_anchors_lead_somewhere_in_the_site() -> None:
    files = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*") if path.is_file()}
    count = 0
    for uri, text in site().items():
        for target in pages.links(text):
            if pages.is_address(target):
                continue
            path, anchor = pages.resolve(target, posixpath.dirname(uri)) if not target.startswith("#") else (uri, target[1:])
            assert path in site() or path in files, f"{uri}: {target}"
            if anchor:
                assert anchor in pages.anchors(site()[path]), f"{uri}: {target}"
            count += 1
    assert count > 200


def test_links_in_code_and_formulas_are_none() -> None:
    text = (
        "[a](b.md) `[c](d.md)` ``[`e`](f.md)`` $$ x[g](h) $$ ![i](j.png)\n\n````md\n```\n[k](l.md)\n```\n````\n[`m`](n.md#o)\n"
    )
    assert pages.links(text) == ["b.md", "j.png", "n.md#o"]
    assert pages.links("[a](https://example.org/b_(c)) and (d)") == ["https://example.org/b_(c)"]


def test_anchors_are_those_of_repositories() -> None:
    text = "# A `b_c` and *d*: [e](f.md)!\n\n```\n# no heading\n```\n\n## What's new?\n"
    assert pages.anchors(text) == {"a-b_c-and-d-e", "whats-new"}


@pytest.mark.parametrize("address", ["https://lightning.ai", "http://localhost:6006/x", "mailto:someone@example.org"])
def test_good_addresses(address: str) -> None:
    assert pages.is_address(address) and pages.wrong_address(address) is None


@pytest.mark.parametrize("address", ["https:/lightning.ai", "htps://lightning.ai", "https://lightning", "//lightning.ai"])
def test_bad_addresses(address: str) -> None:
    assert pages.is_address(address) and pages.wrong_address(address)


def test_links_that_leave_the_folder_lead_to_pages_of_the_site() -> None:
    shown: set[str] = set()

    def moved(target: str) -> str:
        return pages.links(pages.relocate(f"[x]({target})", "docs/results", "results/page.md", shown))[0]

    assert moved("../gossip.md#bytes") == "../gossip.md#bytes"
    assert moved("../../examples/gossip.py") == "../tutorials/gossip.md"
    assert moved("../../examples/configs/gossip.yaml") == "../tutorials/gossip.md#configuration"
    assert moved("../../CHANGELOG.md") == "../changelog.md"
    assert moved("demo.png") == "demo.png"
    assert not shown
    assert moved("../../tests/oracles/") == "../source/tests/oracles/index.md"
    assert moved("../../lightning_distopt/lookup.py") == "../source/lightning_distopt/lookup.py.md"
    assert shown == {"tests/oracles", "lightning_distopt/lookup.py"}
    assert moved("../../nothing.py") == "../../nothing.py"
    assert moved("#here") == "#here"


# ----------------------------------------------------------------------------------------------------- generated pages


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda script: script.stem)
def test_every_script_is_a_tutorial(script: Path) -> None:
    page = site()[f"tutorials/{script.stem}.md"]
    text = script.read_text()
    assert str(ast.get_docstring(ast.parse(text))).partition("\n")[0] in page
    assert text.rpartition("if __name__")[2].strip() in page
    config = ROOT / "examples" / "configs" / f"{script.stem}.yaml"
    assert ("## Configuration" in page) == config.exists()


def test_files_that_are_linked_to_are_shown() -> None:
    page = pages.source("lightning_distopt/lookup.py")
    assert (ROOT / "lightning_distopt" / "lookup.py").read_text().strip() in page
    listing = pages.source("tests/oracles")
    assert all(f"[{file.name}]({file.name})" in listing for file in (ROOT / "tests" / "oracles").glob("*.py"))


def test_code_that_holds_fences_gets_a_longer_one() -> None:
    assert pages.code("a\n````\nb", "text") == "`````text\na\n````\nb\n`````\n"


def test_the_front_page_has_the_beginning_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme.partition("\n\n")[2].partition("\n\n")[0] in site()["index.md"]
    assert "<!--" not in site()["index.md"]


# --------------------------------------------------------------------------------------------------------------- built


def test_broken_links_of_the_built_site_are_found(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "index.html").write_text('<h1 id="a&amp;b">x</h1><a href="../one.html">x</a>')
    good = '<a href="folder/#a%26b">x</a><a href="#here" id="here">x</a><a href="https://example.org">x</a>'
    (tmp_path / "one.html").write_text(good)
    assert hooks.broken_links(tmp_path) == []
    bad = '<img src="no.png"><a class="x" href="folder/#b">x</a><a href="#there">x</a><script src="https://example.org/x.js"></script>'
    (tmp_path / "one.html").write_text(good + bad)
    found = "\n".join(hooks.broken_links(tmp_path))
    assert found.count("\n") == 3
    assert all(part in found for part in ("'no.png' leads nowhere", "no anchor 'folder/#b'", "no anchor '#there'", "a network"))


def test_long_names_in_tables_break_after_underscores() -> None:
    name = "_".join(["part"] * 8)
    cell = f'<td><a href="{name}.html">x</a> <code>{name}</code>, <code>short_name</code></td>'
    assert hooks.breakable(cell) == cell.replace(f">{name}<", ">" + name.replace("_", "_<wbr>") + "<")


def test_formulas_that_cannot_be_shown_are_found() -> None:
    pytest.importorskip("latex2mathml", reason="needs the packages of the extra `docs`")
    page = '<div class="arithmatex">\\[x_i &lt; \\frac{1}{2}\\]</div>'
    shown, wrong = formulas.with_mathml(page)
    assert wrong == []
    assert 'display="block"' in shown and "<mfrac>" in shown and "arithmatex" not in shown
    _, wrong = formulas.with_mathml(page.replace("frac", "fraction"))
    assert len(wrong) == 1 and "\\fraction" in wrong[0]
    assert formulas.with_mathml('<span class="arithmatex">\\(\\frac{1}{\\)</span>')[1]


def test_formulas_are_set_as_in_tex() -> None:
    pytest.importorskip("latex2mathml", reason="needs the packages of the extra `docs`")
    assert "<munder><mo" in formulas.to_mathml(r"\max_i x_i", display=True)
    assert "<msub><mo" in formulas.to_mathml(r"\max_i x_i", display=False)
    assert "argmin</mo>" in formulas.to_mathml(r"\arg\min_x f(x)", display=True)
    assert formulas.to_mathml(r"\begin{aligned} a &= b \\ c &= d \end{aligned}", display=True).count("<mtr>") == 2
    assert re.search(
        "<msup><mrow><mo[^>]*>\\(</mo><mi>x</mi><mo[^>]*>\\)</mo></mrow>", formulas.to_mathml(r"\Bigl( x \Bigr)^2", True)
    )


def test_docstrings_are_adapted() -> None:
    pytest.importorskip("griffe", reason="needs the packages of the extra `docs`")
    adapted = load("docstrings").adapted
    assert adapted("One.\n\nExample:\n    >>> 1\n    1\n") == "One.\n\nExamples:\n    >>> 1\n    1\n"
    assert adapted("Args:\n    a, b: two\n        lines.\n    c: one.\n") == (
        "Args:\n    a: two\n        lines.\n    b: two\n        lines.\n    c: one.\n"
    )
    assert adapted("Args:\n    a: one.\n", is_tuple=True) == "Attributes:\n    a: one.\n"
    assert adapted("Reference:\n    A. Uthor,\n    2020.\n") == "Reference: A. Uthor, 2020.\n"
    assert (
        adapted("References:\n    A: B. 2020,\n    page 1.\n    C: D.\n") == "References:\n\n- A: B. 2020, page 1.\n- C: D.\n"
    )


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_shows_what_is_meant(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the packages of the extra `docs`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert not re.search("^(WARNING|ERROR)", done.stderr, re.MULTILINE), done.stderr
    for uri, text in site().items():
        check_page(uri, text, (tmp_path / uri).with_suffix(".html").read_text())
    for package in sorted((ROOT / "lightning_distopt").glob("*/__init__.py")):
        check_reference(package, (tmp_path / "api" / f"{package.parent.name}.html").read_text())


def check_page(uri: str, text: str, page: str) -> None:
    """Check that nothing on a page was taken for text that is something else."""
    article = page.partition("<article")[2].partition("</article>")[0]
    plain = re.sub(r"<(pre|code)\b.*?</\1>", "", article, flags=re.DOTALL)
    assert "</h1>" in plain, uri
    assert "$$" not in plain, uri  # a formula
    assert "\n|" not in plain, uri  # a table
    assert "```" not in plain, uri  # code
    assert not re.search(r"<p>\s*(-|\d+\.) ", plain), uri  # a list
    assert plain.count("<math") >= len(re.findall(r"^\$\$$", pages.without_code(text), re.MULTILINE)) // 2, uri


def check_reference(package: Path, page: str) -> None:
    """Check that each name that a package exports is described."""
    name = f"lightning_distopt.{package.parent.name}"
    exported = re.search(r"^__all__ = (\[.*?\])", package.read_text(), re.DOTALL | re.MULTILINE)
    for public in ast.literal_eval(exported[1]) if exported else []:
        home = f".{public}" if (package.parent / f"{public}.py").exists() else ""  # a function that is named as its module
        assert f'id="{name}{home}.{public}"' in page, f"{name}.{public}"
