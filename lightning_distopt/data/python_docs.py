"""Sentences from the documentation of Python's standard library, labelled by where they stand."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lightning_distopt.data.cache import cache_folder
from lightning_distopt.data.texts import TextCorpus, TextPart
from lightning_distopt.files import replacing

__all__ = ["PYTHON_DOCS_TASKS", "load_python_docs"]

PYTHON_DOCS_TASKS = ("modules", "kind", "parameters")

# The number belongs to the recipe: raise it with any change of groups, sentences, split or seed, so that no old file is read.
_FILE_NAME = "python_docs_v1.json"
_SEED = 0

# Modules of all supported versions of Python; those that a version doesn't have are passed over.
GROUPS = {
    "text": "base64 codecs configparser csv difflib encodings gettext html json _markupbase locale plistlib quopri re shlex "
    "sre_parse string stringprep textwrap tomllib xml",
    "types": "_collections_abc _py_abc _sitebuiltins _weakrefset abc bisect collections contextlib contextvars copy copyreg "
    "ctypes dataclasses enum functools graphlib heapq operator pickle pickletools pprint reprlib shelve struct types typing "
    "weakref",
    "numbers": "_pydatetime _pydecimal _pylong _strptime calendar colorsys datetime decimal fractions hashlib hmac numbers "
    "random secrets statistics uuid zoneinfo",
    "files": "_compression _pyio bz2 dbm filecmp fileinput fnmatch genericpath glob gzip io linecache lzma mimetypes ntpath os "
    "pathlib platform posixpath shutil sqlite3 stat tarfile tempfile zipapp zipfile zipimport",
    "concurrency": "_threading_local asynchat asyncio asyncore concurrent multiprocessing pty queue sched selectors signal "
    "subprocess threading",
    "internet": "cgi email ftplib http imaplib ipaddress mailbox mailcap netrc nntplib poplib smtpd smtplib socket "
    "socketserver ssl telnetlib urllib webbrowser wsgiref xmlrpc",
    "language": "__future__ _aix_support _osx_support _pyrepl argparse ast cmd code codeop compileall dis getopt imp importlib "
    "inspect modulefinder opcode optparse pkgutil py_compile pyclbr pydoc rlcompleter runpy site symtable sysconfig token "
    "tokenize venv",
    "testing": "bdb cProfile cgitb doctest logging pdb profile pstats tabnanny timeit trace traceback tracemalloc unittest "
    "warnings",
}
KINDS = ("function", "method", "class")
TAGS = ("O", "B-parameter", "B-code", "I-code")

# Texts of each class for training, development and test.
QUOTAS = {"modules": (500, 100, 100), "kind": (400, 100, 100), "parameters": (1500, 300, 300)}

_END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'`*(])")
_WORD = re.compile(r"\w+|[^\w\s]")
_CODE = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)+(?:\(\))?|\w+\(\)|\w*_\w*|\b(?:None|True|False|self)\b")

Labelled = tuple[Any, Any, str]
"""A text, its target, and the file it is from."""


class Sentence(NamedTuple):
    """A sentence of a docstring: the file it is from, and what it documents."""

    text: str
    file: str
    group: str
    kind: str
    parameters: frozenset[str]
    first: bool


def load_python_docs(
    task: Literal["modules", "kind", "parameters"] = "modules", cache_dir: str | os.PathLike[str] | None = None
) -> TextCorpus:
    """Load sentences from the docstrings of Python's standard library, making the corpus at first use (some seconds).

    - `"modules"`: which of 8 groups of modules a sentence is from (text, types, numbers, files, concurrency, internet,
      language, testing); 500 sentences of each for training, 100 for development, 100 for testing. Names that give
      the group away, such as a module's own, stay in the sentences.
    - `"kind"`: whether the first sentence of a docstring describes a function, a method or a class; 400, 100 and
      100 of each.
    - `"parameters"`: which words of a sentence are names of parameters of the function that it documents, and which are code;
      1,500 sentences, 300 and 300. The tags are BIO. Code can be told by its form, parameters only by what is said.

    No source file is in two parts, and no sentence is there twice, be it with another class: those that two groups have are
    left out. Modules are parsed, not imported. The choice is deterministic for one version of Python.

    Docstrings change with Python, so the corpus is frozen: it is made from the Python that runs at first use, and read from
    its file ever after, by other versions too. Its SHA-256 stands in a file beside it, is checked at every load, and
    belongs to every result. The texts are those of Python's authors, under Python's license, and not part of this package.

    Example:
        >>> docs = load_python_docs("kind")
        >>> docs.classes, len(docs.train), len(docs.dev), len(docs.test)
        (('function', 'method', 'class'), 1200, 300, 300)
        >>> set(docs.train.sources) & set(docs.test.sources)
        set()

    Args:
        task: what is to be told from the sentences.
        cache_dir: folder of the frozen file (2 MB). None: `lightning_distopt` in `$XDG_CACHE_HOME`, or in `~/.cache`.

    Returns:
        The corpus, in shuffled order; `checksum` is that of the file, `origin` says which Python it is from.

    Raises:
        ValueError: if the task is unknown, the file is not what was frozen, or this Python's standard library has no sources.
        OSError: if the cache folder cannot be written.
    """
    if task not in PYTHON_DOCS_TASKS:
        raise ValueError(f"There is no task {task!r} on Python's documentation; use {', '.join(map(repr, PYTHON_DOCS_TASKS))}.")
    path = cache_folder(cache_dir) / _FILE_NAME
    note = path.with_name(f"{_FILE_NAME}.sha256")
    if not note.exists():  # it is written last
        content = make_corpus(Path(sysconfig.get_paths()["stdlib"]))
        for file, written in ((path, content), (note, f"{hashlib.sha256(content).hexdigest()}  {_FILE_NAME}\n".encode())):
            with replacing(file) as aside:
                aside.write_bytes(written)
    content = path.read_bytes() if path.exists() else b""
    frozen, checksum = note.read_text().split()[0], hashlib.sha256(content).hexdigest()
    if checksum != frozen:
        raise ValueError(
            f"{path} is not what was frozen: its SHA-256 begins with {checksum[:12]}, not with {frozen[:12]}. Restore it, or "
            f"delete both it and {note.name} for a new corpus, whose results can't be compared with earlier ones."
        )
    stored = json.loads(content)
    parts = {
        name: TextPart([row[0] for row in rows], [row[1] for row in rows], tuple(row[2] for row in rows))
        for name, rows in stored[task]["parts"].items()
    }
    return TextCorpus(tuple(stored[task]["classes"]), checksum=checksum, origin=stored["origin"], **parts)


def make_corpus(root: Path, quotas: dict[str, tuple[int, int, int]] | None = None) -> bytes:
    """Return the file of all tasks.

    Args:
        root: the folder of the standard library.
        quotas: by task, the texts of each class for training, development and test.
    """
    sentences = _without_repetitions(_read(root))
    tasks: dict[str, tuple[tuple[str, ...], list[Labelled], Callable[[Any], int]]] = {
        "modules": (tuple(GROUPS), [(s.text, list(GROUPS).index(s.group), s.file) for s in sentences], int),
        "kind": (KINDS, [(s.text, KINDS.index(s.kind), s.file) for s in sentences if s.first and s.kind in KINDS], int),
        "parameters": (TAGS, list(_tagged(sentences)), lambda tags: 0),
    }
    stored: dict[str, Any] = {"origin": f"docstrings of Python {platform.python_version()}"}
    for task, (classes, rows, class_of) in tasks.items():
        parts = _split(rows, class_of, (quotas or QUOTAS)[task])
        _check(task, parts, (quotas or QUOTAS)[task], 1 if task == "parameters" else len(classes), root)
        stored[task] = {"classes": classes, "parts": parts}
    return json.dumps(stored, ensure_ascii=False, indent=0).encode()


def _read(root: Path) -> Iterator[Sentence]:
    """Yield the sentences of all docstrings, in the order of groups, files and lines."""
    for group, modules in GROUPS.items():
        for module in modules.split():
            files = [root / f"{module}.py", *sorted((root / module).rglob("*.py"))]
            for file in files:
                name = file.relative_to(root)
                if file.exists() and not {"test", "tests"} & set(name.parts):
                    yield from _of_file(file, name.as_posix(), group)


def _of_file(file: Path, name: str, group: str) -> Iterator[Sentence]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old escapes in strings
        tree = ast.parse(file.read_bytes())
    todo: list[tuple[ast.AST, ast.AST | None]] = [(tree, None)]
    while todo:
        node, parent = todo.pop()
        blocks = [getattr(node, name, []) for name in ("body", "orelse", "handlers", "finalbody", "cases")]
        todo += [(child, node) for child in reversed([statement for block in blocks for statement in block])]
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        parameters: frozenset[str] = frozenset()
        if isinstance(node, ast.Module):
            kind = "module"
        elif isinstance(node, ast.ClassDef):
            kind = "class"
        else:
            kind = "method" if isinstance(parent, ast.ClassDef) else "function"
            names = {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)}
            parameters = frozenset(names - {"self", "cls", "a"})  # "a" is mostly the article
        for place, text in _sentences(ast.get_docstring(node) or ""):
            yield Sentence(text, name, group, kind, parameters, place == 0)


def _sentences(docstring: str) -> Iterator[tuple[int, str]]:
    """Yield the sentences of the paragraphs that are prose, not indented and no examples, with their places among all."""
    place = -1
    for paragraph in re.split(r"\n\s*\n", docstring):
        lines = paragraph.splitlines()
        if any(line.startswith((" ", "\t", ">>>", "...")) for line in lines):
            continue
        for sentence in _END_OF_SENTENCE.split(" ".join(paragraph.split())):
            place += 1
            words = len(sentence.split())
            prose = len(re.findall(r"[A-Za-z]{2,}", sentence)) >= 4 and sentence[-1] in ".!?:"
            if 4 <= words <= 60 and len(sentence) < 400 and prose:
                yield place, sentence


def _without_repetitions(sentences: Iterable[Sentence]) -> list[Sentence]:
    """Keep the first of equal sentences; none of them, if groups or kinds differ."""
    by_text: dict[str, list[Sentence]] = defaultdict(list)
    for sentence in sentences:
        by_text[sentence.text.casefold()].append(sentence)
    return [same[0] for same in by_text.values() if len({(s.group, s.kind) for s in same}) == 1]


def _tagged(sentences: Iterable[Sentence]) -> Iterator[Labelled]:
    """Yield the sentences that name a parameter, in words with tags."""
    for sentence in sentences:
        code = [match.span() for match in _CODE.finditer(sentence.text) if match[0] not in sentence.parameters]
        words, tags = [], []
        for word in _WORD.finditer(sentence.text):
            start = word.start()
            inside = [span for span in code if span[0] <= start < span[1]]
            if inside:
                tag = "B-code" if start == inside[0][0] else "I-code"
            else:
                tag = "B-parameter" if word[0] in sentence.parameters else "O"
            words.append(word[0])
            tags.append(TAGS.index(tag))
        if TAGS.index("B-parameter") in tags:
            yield words, tags, sentence.file


def _split(rows: list[Labelled], class_of: Callable[[Any], int], quota: tuple[int, int, int]) -> dict[str, list[Labelled]]:
    """Divide files at random, so that the small parts have what they need, and take the quota of each class at random."""
    random = np.random.RandomState(_SEED)  # its stream is the same in all versions of NumPy
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for _, target, file in rows:
        counts[file][class_of(target)] += 1
    needs = {"test": quota[2], "dev": quota[1]}
    has: dict[str, Counter[int]] = {side: Counter() for side in needs}
    side_of = {}
    files = sorted(counts)
    for file in (files[k] for k in random.permutation(len(files))):
        count, side_of[file] = counts[file], "train"
        for side, need in needs.items():
            # A file that would be nearly all of a class says little about other files.
            if max(count.values()) <= 0.8 * need and any(has[side][c] < need for c in count):
                side_of[file] = side
                has[side] += count
                break
    parts = {}
    for side, need in zip(("train", "dev", "test"), quota, strict=True):
        mixed = [rows[k] for k in random.permutation(len(rows)) if side_of[rows[k][2]] == side]
        taken: Counter[int] = Counter()
        chosen = []
        for row in mixed:
            if taken[class_of(row[1])] < need:
                taken[class_of(row[1])] += 1
                chosen.append(row)
        # Large classes have their quota sooner: mixed again, a prefix is a fair sample.
        parts[side] = [chosen[k] for k in random.permutation(len(chosen))]
    return parts


def _check(task: str, parts: dict[str, list[Labelled]], quota: tuple[int, int, int], classes: int, root: Path) -> None:
    for (side, rows), need in zip(parts.items(), quota, strict=True):
        if len(rows) < need * classes:
            raise ValueError(
                f"The standard library in {root} has {len(rows)} of {need * classes} sentences for the part {side!r} of the "
                f"task {task!r}: make the corpus with a Python that comes with the sources (.py files) of its whole library."
            )
