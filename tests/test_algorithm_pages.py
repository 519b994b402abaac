"""Each algorithm that can be chosen has a page with all its sections, whose options, Python, YAML and figures are right."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.pytorch.cli import LightningArgumentParser

import lightning_distopt
from lightning_distopt import ConsensusControl, LocalSGDStrategy, PostLocalSwitch, WeightMasking
from lightning_distopt.algorithms import ALGORITHMS
from lightning_distopt.federated import AGGREGATORS
from lightning_distopt.sparsity import METHODS

FOLDER = Path(__file__).parent.parent / "docs" / "algorithms"
SECTIONS = [
    "What it does",
    "Use",
    "Formula",
    "Options",
    "When it helps, and when not",
    "Bytes and memory",
    "Reference",
]
CHOICES: dict[str, type] = {
    **ALGORITHMS,
    **AGGREGATORS,
    **METHODS,
    "local_sgd": LocalSGDStrategy,
    "hierarchical_local_sgd": LocalSGDStrategy,
    "post_local_sgd": PostLocalSwitch,
    "consensus_control": ConsensusControl,
    "weight_masking": WeightMasking,
}
"""What users choose, by the names of the pages: the class whose options a page lists."""

OWN = "none of its own"
each_choice = pytest.mark.parametrize("key", CHOICES)


def text_of(key: str) -> str:
    page = FOLDER / f"{key}.md"
    if not page.exists():
        pytest.fail(
            f"`{key}` can be chosen and has no page: write docs/algorithms/{key}.md with the sections "
            f"{'; '.join(SECTIONS)}, in this order, as docs/algorithms/dsgd.md has them.",
            pytrace=False,
        )
    return page.read_text()


def sections_of(key: str) -> dict[str, str]:
    parts = re.split(r"^## (.+)\n", text_of(key), flags=re.MULTILINE)
    return {heading: text.strip() for heading, text in zip(parts[1::2], parts[2::2], strict=True)}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def made_of(strategy: Any, callbacks: Iterable[Any]) -> list[type]:
    """Return the classes of what was made: the strategy, what it runs, the callbacks, and what they run."""
    objects = [strategy, getattr(strategy, "algorithm", None), getattr(strategy, "aggregator", None), *callbacks]
    return [type(each) for each in [*objects, *(getattr(callback, "method", None) for callback in callbacks)]]


def test_names_of_pages_are_those_of_one_choice() -> None:
    registries = (ALGORITHMS, AGGREGATORS, METHODS)
    assert len(CHOICES) == sum(map(len, registries)) + 5 > 40
    assert {page.stem for page in FOLDER.glob("*.md")} - {"index"} <= set(CHOICES), "a page of something that can't be chosen"


# ------------------------------------------------------------------------------------------------------------ the pages


@each_choice
def test_sections_are_complete(key: str) -> None:
    text, sections = text_of(key), sections_of(key)
    assert list(sections) == SECTIONS, f"docs/algorithms/{key}.md has the sections {list(sections)}, not {SECTIONS}."
    assert re.match(r"# \S.*\n\n## ", text), "a page begins with its title"
    assert text.count("\n") <= 90, "a page is short: leave background to the page of the family, and link to it"
    for heading, section in sections.items():
        assert section, f"docs/algorithms/{key}.md: write the section `{heading}`."
    assert blocks(sections["What it does"], "text") or "](" in sections["What it does"], "draw a picture of what happens when"
    assert len(blocks(sections["Use"], "python")) == len(blocks(sections["Use"], "yaml")) == 1
    formula, *explained = re.split(r"^\$\$$(?!.*^\$\$$)", sections["Formula"], flags=re.DOTALL | re.MULTILINE)
    assert formula.strip() and explained and "`" in explained[-1], "explain the symbols after the formula"
    assert re.search(r"\b(19|20)\d\d\b|\(index\.md#sources\)", sections["Reference"]), "name the paper, with its year"


@each_choice
def test_options_are_those_of_the_constructor(key: str) -> None:
    section = sections_of(key)["Options"]
    parameters = [p for p in inspect.signature(CHOICES[key]).parameters.values() if p.kind is not p.VAR_KEYWORD]
    if not parameters:
        assert OWN in section, f"docs/algorithms/{key}.md: say that it has {OWN}."
        assert "\n|" not in f"\n{section}"
        return
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert lines[:2] == ["| option | default | meaning |", "|---|---|---|"]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]
    listed = {name.strip("`"): (default.strip("`"), meaning) for name, default, meaning in rows}
    assert list(listed) == [p.name for p in parameters], (
        f"docs/algorithms/{key}.md lists other options than {CHOICES[key].__name__} has"
    )
    for parameter in parameters:
        default, meaning = listed[parameter.name]
        if parameter.default is parameter.empty:
            assert default == "required", f"docs/algorithms/{key}.md: `{parameter.name}` is `required`."
        else:
            assert repr(ast.literal_eval(default)) == repr(parameter.default), f"docs/algorithms/{key}.md: `{parameter}`"
        assert meaning, f"docs/algorithms/{key}.md: say what `{parameter.name}` means."


@each_choice
def test_python_makes_it(key: str) -> None:
    (snippet,) = blocks(sections_of(key)["Use"], "python")
    names: dict[str, Any] = {}
    exec(compile(snippet, f"docs/algorithms/{key}.md", "exec"), names)
    strategy, callbacks = names.get("strategy"), names.get("callbacks", [])
    assert CHOICES[key] in made_of(strategy, callbacks)
    check_blocks(key, strategy)


@cache
def parser() -> LightningArgumentParser:
    made = LightningArgumentParser()
    made.add_lightning_class_args(L.Trainer, "trainer")  # type: ignore[arg-type]
    return made


@each_choice
def test_yaml_makes_it(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (text,) = blocks(sections_of(key)["Use"], "yaml")
    config = yaml.safe_load(text)
    config["trainer"] |= {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of a method that LightningCLI calls too
    trainer = L.Trainer(**parser().instantiate_classes(parser().parse_object(config)).trainer)
    assert CHOICES[key] in made_of(trainer.strategy, trainer.callbacks)
    check_blocks(key, trainer.strategy)


def check_blocks(key: str, strategy: Any) -> None:
    if isinstance(strategy, LocalSGDStrategy):
        assert (strategy.algorithm.block_period is not None) == (key == "hierarchical_local_sgd")


def sentences(text: str) -> list[str]:
    paragraphs = re.split(r"\n\s*\n|\n(?=- )", text)
    return [sentence for p in paragraphs for sentence in re.split(r"(?<=[.:;])\s+(?=[A-Z`])", " ".join(p.split()))]


def figures(sentence: str) -> list[str]:
    """Return numbers with decimals, and of megabytes."""
    return re.findall(r"(?<![\w.])\d+\.\d+(?!\w)|[\d.,]+(?= MB\b)", re.sub(r"\]\([^)]*\)|`[^`]*`", " ", sentence))


@each_choice
def test_figures_stand_where_the_page_says(key: str) -> None:
    wrong = list(wrong_figures(key))
    assert not wrong, "\n".join(wrong)


def wrong_figures(key: str) -> Iterable[str]:
    """Name the figures of a sentence that links to another page, and that the page does not have; the thesis has no page."""
    for sentence in sentences("\n\n".join(sections_of(key)[heading] for heading in SECTIONS[4:6])):
        targets = re.findall(r"\]\((\.\./[\w/]+\.md)", sentence)
        if targets and "thesis" not in sentence:
            there = " ".join((FOLDER / target).read_text() for target in targets)
            for figure in figures(sentence):
                if not re.search(rf"(?<![\d.,]){re.escape(figure)}(?![\d,]*\d)", there):
                    yield f"{figure} is not in {', '.join(targets)}: {sentence}"


def test_figures_are_found() -> None:
    assert figures("from 11,310 MB to 0.5 %, `a=0.9`, [b](c1.2.md), at 16") == ["11,310", "0.5"]
    assert sum(bool(figures(s)) for key in CHOICES for s in sentences(text_of(key)) if "](../" in s) > 40


# ------------------------------------------------------------------------------------------------------------ the index


def test_the_index_has_a_row_for_every_public_choice() -> None:
    text = (FOLDER / "index.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| [")]
    listed = [re.findall(r"\]\((\w+)\.md\)", row[0]) for row in rows]
    assert all(len(row) == 4 and all(row) for row in rows)
    assert all(len(links) == 1 for links in listed)
    keys = [links[0] for links in listed]
    assert len(keys) == len(set(keys))
    assert set(keys) <= set(CHOICES)
    public = [key for key, cls in CHOICES.items() if cls.__name__ in lightning_distopt.__all__]
    assert len(public) > 40
    for key in public:
        assert key in keys, (
            f"`lightning_distopt.{CHOICES[key].__name__}` is public: give docs/algorithms/index.md a row for {key}.md."
        )
