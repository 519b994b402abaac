"""The pages of the documentation site: those of `docs/`, and those that are made of other files of the repository.

Links lead from file to file of the repository, so that pages can be read there. In the site a script of `examples/` is a page
of `tutorials/`, and any other file outside `docs/` that a page links to is a page of `source/`.
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[2]
PLACES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "tutorials/index.md",
}
LANGUAGES = {
    "": "text",
    ".json": "json",
    ".md": "markdown",
    ".py": "python",
    ".sh": "bash",
    ".toml": "toml",
    ".txt": "text",
    ".yaml": "yaml",
    ".yml": "yaml",
}

_CODE_OR_LINK = re.compile(
    r"^[ ]*(?P<fence>`{3,}|~{3,})[^\n]*\n.*?^[ ]*(?P=fence)[ ]*$"  # fenced code
    r"|\$\$.*?\$\$"  # a formula
    r"|(?P<ticks>`+)(?!`)(?:(?!\n\n).)+?(?<!`)(?P=ticks)(?!`)"  # code in a line
    r"|(?<=\]\()(?P<target>[^()\s]+(?:\([^()\s]*\)[^()\s]*)*)",
    re.DOTALL | re.MULTILINE,
)
_FENCED = re.compile(r"^[ ]*(?P<fence>`{3,}|~{3,})[^\n]*\n.*?^[ ]*(?P=fence)[ ]*$", re.DOTALL | re.MULTILINE)
_PART_OF_README = re.compile(r'<!-- README\.md, before "(.+?)" -->\n')
_PUBLIC_NAMES = "<!-- public names -->\n"


def links(text: str) -> list[str]:
    """Return the targets of links and pictures, without those in code."""
    return [match["target"] for match in _CODE_OR_LINK.finditer(text) if match["target"]]


def without_code(text: str) -> str:
    """Return a text without its blocks of code."""
    return _FENCED.sub("", text)


def slug(heading: str, separator: str = "-") -> str:
    """Return the anchor of a heading, as services that show repositories make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def anchors(text: str) -> set[str]:
    """Return the anchors of a page."""
    headings = re.findall(r"^#{1,6} +(.+?)(?: +#+)?$", without_code(text), re.MULTILINE)
    plain = [re.sub(r"[`*]", "", re.sub(r"\[(.+?)\]\(.+?\)", r"\1", heading)) for heading in headings]
    return {slug(heading) for heading in plain}


def is_address(target: str) -> bool:
    """Return whether a link leaves the repository."""
    return bool(urlsplit(target).scheme) or target.startswith("//")


def wrong_address(target: str) -> str | None:
    """Return what is wrong about the syntax of an address, or None."""
    parts = urlsplit(target)
    if parts.scheme == "mailto":
        return None if re.fullmatch(r"[^@\s]+@[\w\-]+(\.[\w\-]+)+", parts.path) else "this is no mail address"
    if parts.scheme not in ("http", "https"):
        return "addresses begin with https:// or http://"
    host = parts.hostname or ""
    if not (re.fullmatch(r"[\w\-]+(\.[\w\-]+)+", host) or host == "localhost"):
        return f"{host!r} is no host"
    return None


def location(path: str) -> str | None:
    """Return where in the site a file or folder of the repository is, or None if there is no such file.

    Args:
        path: relative to the root of the repository, with slashes.
    """
    file = ROOT / path
    if path in PLACES:
        return PLACES[path]
    if path.startswith("docs/"):
        uri = path.removeprefix("docs/")
        if file.is_dir():
            return f"{uri}/index.md" if (file / "index.md").exists() else None
        return uri if file.is_file() else None
    if path.startswith("..") or not file.exists():
        return None
    folder, name = posixpath.split(path)
    stem, ending = posixpath.splitext(name)
    if folder == "examples" and ending in (".py", ".ipynb"):
        return f"tutorials/{stem}.md"
    if folder == "examples/configs" and (ROOT / "examples" / f"{stem}.py").exists():
        return f"tutorials/{stem}.md#configuration"
    if file.is_dir():
        return f"source/{path}/index.md"
    return f"source/{path}.md" if file.suffix in LANGUAGES else None


def resolve(target: str, folder: str) -> tuple[str, str]:
    """Return the file that a link in a file of `folder` leads to, relative to the root of the repository, and the anchor."""
    path, _, anchor = target.partition("#")
    return posixpath.normpath(posixpath.join(folder, unquote(path))), anchor


def relocate(text: str, folder: str, uri: str, shown: set[str]) -> str:
    """Return a text of `folder` of the repository with the links that it has as the page `uri` of the site.

    Links that lead nowhere stay as they are. Files and folders to show in `source/` are added to `shown`.
    """

    def of(match: re.Match[str]) -> str:
        target = match["target"]
        if not target or target.startswith("#") or is_address(target):
            return match[0]
        path, anchor = resolve(target, folder)
        place = location(path)
        if place is None:
            return match[0]
        place, _, own = place.partition("#")
        if place.startswith("source/"):
            shown.add(path)
            anchor = ""
        anchor = own or anchor
        return posixpath.relpath(place, posixpath.dirname(uri) or ".") + (f"#{anchor}" if anchor else "")

    return _CODE_OR_LINK.sub(of, text)


def code(text: str, language: str) -> str:
    """Return a block of code."""
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall(r"`{3,}", text)), 3)
    return f"{fence}{language}\n{text.strip()}\n{fence}\n"


def tutorial(path: str) -> str:
    """Return the page of a script of `examples/`: what its docstring says, the script, its configuration; or of a notebook."""
    file = ROOT / path
    if file.suffix == ".ipynb":
        return notebook(file)
    text = file.read_text()
    tree = ast.parse(text)
    said = ast.get_docstring(tree) or ""
    rest = "".join(text.splitlines(keepends=True)[tree.body[0].end_lineno if said else 0 :])
    page = f"# {file.name}\n\n{said}\n\n## Script\n\n`{path}`, after its docstring:\n\n{code(rest, 'python')}"
    config = ROOT / "examples" / "configs" / f"{file.stem}.yaml"
    if config.exists():
        page += f"\n## Configuration\n\n`examples/configs/{config.name}`:\n\n{code(config.read_text(), 'yaml')}"
    return page


def notebook(file: Path) -> str:
    """Return the page of a notebook: its texts and its code, without outputs."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(file.read_text())["cells"]]
    return "\n\n".join(text if kind == "markdown" else code(text, "python") for kind, text in cells if kind != "raw") + "\n"


def tutorials() -> dict[str, str]:
    """Return the scripts and notebooks by the places of their pages, in the order in which `examples/README.md` names them."""
    listed = [resolve(target, "examples")[0] for target in links((ROOT / "examples" / "README.md").read_text())]
    there = [f"examples/{file.name}" for file in sorted((ROOT / "examples").iterdir()) if file.suffix in (".py", ".ipynb")]
    ordered = dict.fromkeys([*(path for path in listed if path in there), *there])
    return {f"tutorials/{Path(path).stem}.md": path for path in ordered}


def source(path: str) -> str:
    """Return the page of a file or a folder that is shown as it is."""
    file = ROOT / path
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n"
    if file.is_file():
        return head + code(file.read_text(), LANGUAGES[file.suffix])
    inside = sorted(entry for entry in file.iterdir() if not entry.name.startswith((".", "__pycache__")))
    return head + "".join(f"- [{e.name}]({e.name})\n" if e.is_file() else f"- {e.name}/\n" for e in inside)


def public_names() -> str:
    """Return a table of the names of the package itself, with links to where they are described."""
    tree = ast.parse((ROOT / "lightning_distopt" / "__init__.py").read_text())
    rows = [
        f"| [{package}]({package.rpartition('.')[2]}.md) | {', '.join(f'[`{name}`][{package}.{name}]' for name in names)} |\n"
        for statement in tree.body
        if isinstance(statement, ast.ImportFrom) and (package := statement.module or "") and "__about__" not in package
        if (names := sorted(alias.name for alias in statement.names))
    ]
    return "| from | names |\n|---|---|\n" + "".join(rows)


def pages() -> dict[str, str]:
    """Return the texts of all pages of the site, by their places."""
    files = sorted((ROOT / "docs").rglob("*.md"))
    waiting = [
        (path.relative_to(ROOT / "docs").as_posix(), path.relative_to(ROOT).as_posix(), path.read_text()) for path in files
    ]
    waiting += [(uri, path, (ROOT / path).read_text()) for path, uri in PLACES.items() if path != "README.md"]
    waiting += [(uri, path, tutorial(path)) for uri, path in tutorials().items()]
    done: dict[str, str] = {}
    while waiting:
        uri, origin, text = waiting.pop()
        shown: set[str] = set()  # files that have no page yet, perhaps
        done[uri] = _finish(text, origin, uri, shown)
        for path in shown:
            place = f"source/{path}.md"
            if (ROOT / path).is_dir():
                place = f"source/{path}/index.md"
                if uri.startswith("source/"):
                    continue
            if place not in done:
                waiting.append((place, f"{path}/index" if (ROOT / path).is_dir() else path, source(path)))
    return done


def _finish(text: str, origin: str, uri: str, shown: set[str]) -> str:
    """Return the text of a page with what it includes from elsewhere, and all links as in the site."""
    folder = posixpath.dirname(origin)
    before, *parts = _PART_OF_README.split(text)
    page = relocate(before, folder, uri, shown)
    for heading, after in zip(parts[::2], parts[1::2], strict=True):
        readme, found, _ = (ROOT / "README.md").read_text().partition(f"\n{heading}\n")
        if not found:
            raise ValueError(f"docs/{uri} includes README.md up to {heading!r}: there is no such line.")
        page += relocate(readme.partition("\n")[2].strip() + "\n", "", uri, shown) + relocate(after, folder, uri, shown)
    page = page.replace(_PUBLIC_NAMES, public_names())
    return re.sub(r"^<details>", '<details markdown="1">', page, flags=re.MULTILINE)


def expand(entries: list[Any]) -> list[Any]:
    """Return a navigation with the pages of a folder that have no entry of their own for `folder/*`."""
    named = set(entries_of(entries))

    def expanded(entries: list[Any]) -> Iterator[Any]:
        for entry in entries:
            if isinstance(entry, dict):
                yield {title: list(expanded(inside)) if isinstance(inside, list) else inside for title, inside in entry.items()}
            elif entry == "tutorials/*":
                yield from (uri for uri in tutorials() if uri not in named)
            elif entry.endswith("/*"):
                yield from _of_folder(entry[:-2], named)
            else:
                yield entry

    return list(expanded(entries))


def _of_folder(folder: str, named: set[str]) -> Iterator[Any]:
    """Yield `index.md`, a group for each of its sections that leads to pages of the folder, and all other pages by name."""
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs" / folder).glob("*.md")} - named
    index = f"{folder}/index.md"
    if index in there:
        there.remove(index)
        yield index
        for section in without_code((ROOT / "docs" / index).read_text()).split("\n## ")[1:]:
            linked = dict.fromkeys(resolve(target, folder)[0] for target in links(section))
            if group := [uri for uri in linked if uri in there]:
                yield {section.partition("\n")[0]: group}
                there.difference_update(group)
    yield from sorted(there)


def entries_of(navigation: list[Any]) -> Iterator[str]:
    """Yield the pages of a navigation."""
    for entry in navigation:
        if isinstance(entry, dict):
            for inside in entry.values():
                yield from entries_of(inside if isinstance(inside, list) else [inside])
        else:
            yield entry
