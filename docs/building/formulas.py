"""Formulas as MathML, which browsers show by themselves: without scripts, and without a network."""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ET

_FORMULA = re.compile(r'<(?P<tag>div|span) class="arithmatex">\\[\[(](?P<tex>.*?)\\[\])]</(?P=tag)>', re.DOTALL)
_NAMESPACE = "{http://www.w3.org/1998/Math/MathML}"

# What the converter does not know, by what it does.
_SAME = {
    r"\\(begin|end)\{aligned\}": r"\\\1{align*}",
    r"\\arg\s*\\(max|min)": r"\\operatorname{arg\1}",
    r"\\\|": "\N{DOUBLE VERTICAL LINE}",
    r"\\[lr]Vert(?![A-Za-z])": "\N{DOUBLE VERTICAL LINE}",
    r"\\lfloor(?![A-Za-z])": "\N{LEFT FLOOR}",
    r"\\rfloor(?![A-Za-z])": "\N{RIGHT FLOOR}",
    r"\\lceil(?![A-Za-z])": "\N{LEFT CEILING}",
    r"\\rceil(?![A-Za-z])": "\N{RIGHT CEILING}",
}
_BARS = {"|", "\N{DOUBLE VERTICAL LINE}"}
_PAIRS = {")": "(", "]": "[", "}": "{", "\N{RIGHT FLOOR}": "\N{LEFT FLOOR}", "\N{RIGHT CEILING}": "\N{LEFT CEILING}"}
_BELOW = {"max", "min", "argmax", "argmin", "sup", "inf", "lim"}


def to_mathml(tex: str, display: bool) -> str:
    """Return a formula as MathML.

    Raises:
        ValueError: if something in it is not understood.
    """
    from latex2mathml.converter import convert

    known = tex.strip()
    for pattern, same in _SAME.items():
        known = re.sub(pattern, same, known)
    try:
        root = ET.fromstring(convert(known, display="block" if display else "inline"))
    except Exception as error:  # of many kinds, one for each mistake
        raise ValueError(f"This formula can't be read ({type(error).__name__}): {tex.strip()}") from error
    unknown = [text for element in root.iter() if "\\" in (text := element.text or "") or text == "&"]
    if unknown:
        raise ValueError(f"{', '.join(unknown)} can't be shown in this formula: {tex.strip()}")
    for element in root.iter():
        element.tag = element.tag.removeprefix(_NAMESPACE)
        if element.tag == "mo" and len(element):  # \mathrel{+}
            element.text = "".join(element.itertext())
            del element[:]
        if element.tag == "mo" and element.text in _BARS:
            element.attrib |= {"lspace": "0", "rspace": "0"}
        if element.tag == "mo" and (element.text or "").isalpha() and element.text != "mod":  # a function's name, such as tr
            element.attrib |= {"lspace": "0.167em", "rspace": "0.167em"}
        if element.tag == "mi" and re.fullmatch(
            "[\N{GREEK CAPITAL LETTER ALPHA}-\N{GREEK CAPITAL LETTER OMEGA}]", element.text or ""
        ):
            element.set("mathvariant", "normal")
        if element.tag == "mover":
            element.set("accent", "true")
        if display and element.tag == "msub" and element[0].text in _BELOW:
            element.tag = "munder"
    for element in list(root.iter()):
        _join_large_parentheses(element)
    root.set("xmlns", _NAMESPACE[1:-1])
    return ET.tostring(root, encoding="unicode")


def _join_large_parentheses(row: ET.Element) -> None:
    """Let an exponent be that of all that stands in large parentheses, so that both of them are of one size."""
    for power in list(row):
        if power.tag not in ("msub", "msup", "msubsup") or "minsize" not in power[0].attrib or power[0].text not in _PAIRS:
            continue
        before = list(row)[: list(row).index(power)]
        for k in reversed(range(len(before))):
            if "minsize" in before[k].attrib and before[k].text == _PAIRS[power[0].text]:
                inside = ET.Element("mrow")
                inside.extend([*before[k:], power[0]])
                for element in before[k:]:
                    row.remove(element)
                power[0] = inside
                break


def with_mathml(page: str) -> tuple[str, list[str]]:
    """Return a page of HTML with its formulas as MathML, and what is wrong about some of them."""
    wrong: list[str] = []

    def of(match: re.Match[str]) -> str:
        try:
            mathml = to_mathml(html.unescape(match["tex"]), display=match["tag"] == "div")
        except ValueError as error:
            wrong.append(str(error))
            return match[0]
        return f'<{match["tag"]} class="formula">{mathml}</{match["tag"]}>'

    return _FORMULA.sub(of, page), wrong
