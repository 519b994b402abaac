"""Python's documentation as a corpus: what it holds, that nothing is on two sides, that it is frozen."""

from __future__ import annotations

import ast
import doctest
import hashlib
import json
import multiprocessing
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lightning_distopt.data import python_docs
from lightning_distopt.data.python_docs import GROUPS, KINDS, PYTHON_DOCS_TASKS, TAGS, load_python_docs, make_corpus
from lightning_distopt.data.texts import TextCorpus

SMALL = {"modules": (8, 5, 5), "kind": (4, 2, 2), "parameters": (4, 3, 3)}


@pytest.fixture(scope="session")
def docs_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder in which the corpus of this Python is made once per session."""
    folder = tmp_path_factory.mktemp("python_docs")
    load_python_docs("modules", folder)
    return folder


@pytest.fixture(scope="session")
def corpora(docs_cache: Path) -> dict[str, TextCorpus]:
    return {task: load_python_docs(task, docs_cache) for task in PYTHON_DOCS_TASKS}  # type: ignore[arg-type]


def parts(corpus: TextCorpus) -> dict[str, object]:
    assert corpus.test is not None
    return {"train": corpus.train, "dev": corpus.dev, "test": corpus.test}


def library(root: Path, files: int = 8) -> Path:
    """Write a small library: in every module of a few lines the same sort of sentences."""
    for modules in GROUPS.values():
        module = modules.split()[0]
        (root / module).mkdir(parents=True)
        (root / module / "tests").mkdir()
        (root / module / "tests" / "a.py").write_text('"""Nobody reads the sentences of tests."""')
        for k in range(files):
            (root / module / f"f{k}.py").write_text(
                f'"""The file of {module} with number f{k}.\n\nTrailing text without an end"""\n'
                f'raise SystemExit("a module is never imported")\n'
                f'class C:\n    """The class of {module} with number f{k}."""\n'
                f'    def m(self, width):\n        """Set the width of {module} to f{k}."""\n'
                f'if True:\n    def f(*names, key=None):\n        """Sort some names by key in {module}.f{k}.\n\n'
                f'        >>> this is an example, and no sentence.\n\n            Nor is what is indented here."""\n'
            )
    return root


def made(root: Path) -> dict[str, dict[str, dict[str, list[list[object]]]]]:
    result: dict[str, dict[str, dict[str, list[list[object]]]]] = json.loads(make_corpus(root, SMALL))
    return result


def test_sentences_of_a_small_library(tmp_path: Path) -> None:
    stored = made(library(tmp_path))
    rows = [row for part in stored["modules"]["parts"].values() for row in part]
    assert len(rows) == 8 * (8 + 5 + 5)
    kinds = {
        r"The file of (\w+) with number f\d\.",
        r"The class of (\w+) with number f\d\.",
        r"Set the width of (\w+) to f\d\.",
        r"Sort some names by key in (\w+)\.f\d\.",
    }
    for text, target, source in rows:
        module = next(match[1] for kind in kinds if (match := re.fullmatch(kind, str(text))))
        assert GROUPS[list(GROUPS)[int(str(target))]].split()[0] == module == str(source).split("/")[0]


def test_kinds_and_parameters_of_a_small_library(tmp_path: Path) -> None:
    stored = made(library(tmp_path))
    for text, target, _ in (row for part in stored["kind"]["parts"].values() for row in part):
        assert KINDS[int(str(target))] == {"Sort": "function", "Set": "method", "The": "class"}[str(text).split()[0]]
    seen = set()
    for words, tags, _ in (row for part in stored["parameters"]["parts"].values() for row in part):
        named = {w: TAGS[t] for w, t in zip(words, tags, strict=True)}  # type: ignore[call-overload]
        if "Sort" in named:
            expected = {"names": "B-parameter", "key": "B-parameter", "Sort": "O", "in": "O"}
            assert expected.items() <= named.items()
            code = [TAGS[t] for t in tags[-4:]]  # type: ignore[index]
            assert code == ["B-code", "I-code", "I-code", "O"]  # module . file and the full stop
        else:
            assert named["width"] == "B-parameter" and named["."] == "O"
        seen.add(words[0])  # type: ignore[index]
    assert seen == {"Sort", "Set"}


def test_a_sentence_of_two_groups_is_left_out_and_one_of_the_same_group_kept_once(tmp_path: Path) -> None:
    root = library(tmp_path)
    (root / "base64" / "f0.py").write_text('"""This sentence is in two groups. This sentence is in one group twice."""')
    (root / "base64" / "f1.py").write_text('"""this SENTENCE is in one group twice."""')
    (root / "bdb" / "f0.py").write_text('"""This sentence is in two groups."""')
    texts = [s.text for s in python_docs._without_repetitions(python_docs._read(root))]
    assert "This sentence is in one group twice." in texts
    assert not {"This sentence is in two groups.", "this SENTENCE is in one group twice."} & set(texts)


def test_too_small_a_library_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 128 of 800 sentences for the part 'train' of the task 'modules'"):
        make_corpus(library(tmp_path), SMALL | {"modules": (100, 5, 5)})
    with pytest.raises(ValueError, match=r"a Python that comes with the sources \(.py files\)"):
        make_corpus(tmp_path / "nothing")


def test_as_many_of_each_class(corpora: dict[str, TextCorpus]) -> None:
    for task, classes, train in (("modules", tuple(GROUPS), 500), ("kind", KINDS, 400)):
        assert corpora[task].classes == classes
        for part, count in zip(parts(corpora[task]).values(), (train, 100, 100), strict=True):
            assert Counter(part.targets) == dict.fromkeys(range(len(classes)), count)  # type: ignore[attr-defined]


def test_no_file_and_no_sentence_on_two_sides(corpora: dict[str, TextCorpus]) -> None:
    for corpus in corpora.values():
        rows = list(parts(corpus).values())
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert not set(rows[a].sources) & set(rows[b].sources)  # type: ignore[attr-defined]
        texts = [str(text).casefold() for part in rows for text in part.texts]  # type: ignore[attr-defined]
        assert len(set(texts)) == len(texts)
        # ten files at least, so that no part is about one thing only
        assert all(len(set(part.sources)) >= 10 for part in rows)  # type: ignore[attr-defined]


def test_sentences_stand_in_the_files_that_are_named(corpora: dict[str, TextCorpus]) -> None:
    import sysconfig

    root = Path(sysconfig.get_paths()["stdlib"])
    for text, source in list(zip(corpora["kind"].dev.texts, corpora["kind"].dev.sources, strict=True))[::60]:
        docstrings = [
            ast.get_docstring(node) or ""
            for node in ast.walk(ast.parse((root / source).read_bytes()))
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        assert any(" ".join(docstring.split()).startswith(text) for docstring in docstrings), text


def test_tagged_sentences_name_a_parameter(corpora: dict[str, TextCorpus]) -> None:
    corpus = corpora["parameters"]
    assert corpus.tagging and corpus.classes == TAGS
    assert all(TAGS.index("B-parameter") in tags for tags in corpus.train.targets)
    share = Counter(tag for tags in corpus.train.targets for tag in tags)
    assert share[0] > 0.8 * sum(share.values())


def test_a_prefix_is_mixed(corpora: dict[str, TextCorpus]) -> None:
    assert min(Counter(corpora["modules"].train.targets[:400]).values()) > 25


def test_same_library_same_bytes(tmp_path: Path) -> None:
    np.random.seed(1)
    first = make_corpus(library(tmp_path / "one"), SMALL)
    np.random.seed(2)
    assert make_corpus(library(tmp_path / "two"), SMALL) == first  # wherever it is


def test_second_load_reads_the_frozen_file(docs_cache: Path, corpora: dict[str, TextCorpus], monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> bytes:
        raise AssertionError("made again in spite of the cache")

    monkeypatch.setattr(python_docs, "make_corpus", fail)
    again = load_python_docs("modules", docs_cache)
    assert again == corpora["modules"]
    content = (docs_cache / "python_docs_v1.json").read_bytes()
    assert again.checksum == hashlib.sha256(content).hexdigest()
    assert again.origin == "docstrings of Python " + sys.version.split()[0]
    # in the form that `sha256sum --check` reads
    assert (docs_cache / "python_docs_v1.json.sha256").read_text() == f"{again.checksum}  python_docs_v1.json\n"


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_changed_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    root = library(tmp_path / "library")
    monkeypatch.setattr(python_docs, "make_corpus", lambda _: make_corpus(root, SMALL))
    load_python_docs("modules", tmp_path)
    file = tmp_path / "python_docs_v1.json"
    if damage == "changed":
        file.write_bytes(file.read_bytes().replace(b"width", b"height"))
    else:
        file.unlink()
    with pytest.raises(ValueError, match=r"python_docs_v1.json is not what was frozen: its SHA-256 begins with"):
        load_python_docs("kind", tmp_path)
    file.unlink(missing_ok=True)
    (tmp_path / "python_docs_v1.json.sha256").unlink()
    assert len(load_python_docs("kind", tmp_path).train) == 12  # as the message says


def _load(cache: Path, root: Path, barrier: object) -> None:
    python_docs.make_corpus = lambda _: make_corpus(root, SMALL)  # type: ignore[assignment]
    barrier.wait()  # type: ignore[attr-defined]
    sys.exit(0 if len(load_python_docs("kind", cache).train) == 12 else 1)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_freeze_the_same_at_the_same_time(tmp_path: Path) -> None:
    root, cache = library(tmp_path / "library"), tmp_path / "not" / "there"
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_load, args=(cache, root, barrier), daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert {file.name for file in cache.iterdir()} == {"python_docs_v1.json", "python_docs_v1.json.sha256"}


def test_unknown_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no task 'topics' on Python's documentation; use 'modules', 'kind', 'param"):
        load_python_docs("topics", tmp_path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_examples(docs_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lightning_distopt").symlink_to(docs_cache)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert doctest.testmod(python_docs).failed == 0
