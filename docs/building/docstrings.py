"""What docstrings look like in the API reference."""

from __future__ import annotations

import re
from typing import Any

import griffe

_SECTION = re.compile(r"^(Args|Attributes|Examples?|References?):\n((?:[ ]{4}.*(?:\n|$)|[ ]*\n)+)", re.MULTILINE)
_TOGETHER = re.compile(r"^[ ]{4}((?:\w+,\s+)+\w+): (.*(?:\n[ ]{5,}.*)*)", re.MULTILINE)


def adapted(docstring: str, is_tuple: bool = False) -> str:
    """Return a docstring with sections as Griffe knows them, and references as paragraphs.

    Args:
        docstring: what to adapt.
        is_tuple: whether it is that of a named tuple, whose arguments are attributes.
    """

    def of(match: re.Match[str]) -> str:
        title, body = match.groups()
        if title.startswith("Example"):
            return f"Examples:\n{body}"
        if title.startswith("Reference"):
            entries = [" ".join(entry.split()) for entry in re.split(r"(?<=\.)\n", body.strip())]
            if title == "Reference" or len(entries) == 1:
                return f"Reference: {' '.join(entries)}\n"
            return "References:\n\n" + "".join(f"- {entry}\n" for entry in entries)
        title = "Attributes" if is_tuple else title
        return f"{title}:\n{_TOGETHER.sub(_apart, body)}"

    return _SECTION.sub(of, docstring)


def _apart(match: re.Match[str]) -> str:
    """Return an entry for each of the names that are described together."""
    return "\n".join(f"    {name}: {match[2]}" for name in re.split(r",\s+", match[1]))


class Docstrings(griffe.Extension):
    """Adapt each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Adapt the docstring of an object."""
        if obj.docstring:
            bases = map(str, obj.bases) if isinstance(obj, griffe.Class) else ()
            obj.docstring.value = adapted(obj.docstring.value, any(base.endswith("NamedTuple") for base in bases))
