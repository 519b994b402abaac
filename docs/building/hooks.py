"""What is done to the documentation site while it is built: generated pages, formulas, a check of all links."""

from __future__ import annotations

import html
import logging
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import formulas
import pages

log = logging.getLogger("mkdocs.hooks.building")


def on_config(config: Any) -> Any:
    """Complete the navigation; make anchors as services that show repositories do."""
    config.nav = pages.expand(config.nav)
    config.mdx_configs.setdefault("toc", {})["slugify"] = pages.slug
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, and give the others their links in the site."""
    from mkdocs.structure.files import File

    for uri, text in pages.pages().items():
        for target in pages.links(text):
            if pages.is_address(target) and (reason := pages.wrong_address(target)):
                log.warning("%s links to %s: %s.", uri, target, reason)
        file = files.get_file_from_path(uri)
        if file is None:
            files.append(File.generated(config, uri, content=text))
        else:
            file.content_string = text
    return files


def on_page_content(content: str, page: Any, **kwargs: Any) -> str:
    """Write formulas as MathML; let long names in tables break."""
    content, wrong = formulas.with_mathml(content)
    for reason in wrong:
        log.warning("%s: %s", page.file.src_uri, reason)
    return re.sub(r"<td>.*?</td>", lambda cell: breakable(cell[0]), content, flags=re.DOTALL)


def breakable(cell: str) -> str:
    """Return a cell of a table with a place to break after each underscore of names that are longer than 30 characters."""
    return re.sub(r"(?<=[>\s.])\w{31,}(?=[<\s.()])", lambda name: name[0].replace("_", "_<wbr>"), cell)


def on_post_build(config: Any) -> None:
    """Look at every link of the site that is built."""
    for reason in broken_links(Path(config.site_dir)):
        log.warning("%s", reason)


def broken_links(site: Path) -> list[str]:
    """Return a sentence for each link or file of a page that is not there, has no such anchor, or comes from a network."""
    texts = {path: path.read_text() for path in site.rglob("*.html") if path.name != "404.html"}
    ids = {path: set(map(html.unescape, re.findall(r'\s(?:id|name)="([^"]*)"', text))) for path, text in texts.items()}
    wrong = []
    for path, text in texts.items():
        page = path.relative_to(site)
        for tag, attribute, target in set(re.findall(r'<(\w+)[^>]*?\s(href|src)="([^"]*)"', text)):
            address, _, anchor = html.unescape(target).partition("#")
            if re.match(r"[a-z]+:|//", address):
                if tag != "a":
                    wrong.append(f"{page} loads {target}: the site must do without a network.")
                continue
            file = (path.parent / unquote(address)).resolve() if address else path
            if file.is_dir():
                file /= "index.html"
            if not file.is_file():
                wrong.append(f"{page}: {attribute} {target!r} leads nowhere.")
            elif anchor and file in ids and unquote(anchor) not in ids[file] and not anchor.startswith("__"):
                wrong.append(f"{page}: there is no anchor {target!r}.")
    return sorted(wrong)
