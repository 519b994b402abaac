"""Loaders of text data sets, on small files in their formats."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_distopt.data.text_files import load_ag_news, load_glue, load_tagged_words, load_text_files, load_trec

GLUE = {
    "sst2": (
        "sentence\tlabel\nit 's a \"charming journey \t1\na waste\t0\n",
        [("it 's a \"charming journey ", 1), ("a waste", 0)],
        ("negative", "positive"),
    ),
    "cola": (
        "gj04\t1\t\tThey drank it.\ngj04\t0\t*\tThey drank it dry pub.\n",
        [("They drank it.", 1), ("They drank it dry pub.", 0)],
        ("unacceptable", "acceptable"),
    ),
    "mrpc": (
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\tHe said "no .\tNo , he said .\r\n',
        [(('He said "no .', "No , he said ."), 1)],
        ("different", "equivalent"),
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tnot_entailment\n1\tC.\tD.\tentailment\n",
        [(("A.", "B."), 1), (("C.", "D."), 0)],
        ("entailment", "not_entailment"),
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel\n0\tWho?\tShe.\tentailment\n",
        [(("Who?", "She."), 0)],
        ("entailment", "not_entailment"),
    ),
}


@pytest.mark.parametrize("task", GLUE)
def test_glue(tmp_path: Path, task: str) -> None:
    content, expected, classes = GLUE[task]
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_bytes(content.encode())
    corpus = load_glue(tmp_path, task)
    assert list(zip(corpus.train.texts, corpus.train.targets, strict=True)) == expected
    assert corpus.dev == corpus.train and corpus.test is None and corpus.classes == classes
    assert load_text_files(task, tmp_path) == corpus


def test_ag_news(tmp_path: Path) -> None:
    rows = [f'"{k % 4 + 1}","Title {k}","Some ""quoted"" text\\nof {k}"' for k in range(20)]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    (tmp_path / "test.csv").write_text(rows[3])
    corpus = load_ag_news(tmp_path)
    assert (len(corpus.train), len(corpus.dev)) == (16, 4)
    assert sorted(corpus.train.texts + corpus.dev.texts) == sorted(f'Title {k} Some "quoted" text nof {k}' for k in range(20))
    assert corpus.test is not None
    assert (corpus.test.texts, corpus.test.targets) == (['Title 3 Some "quoted" text nof 3'], [3])
    assert corpus.classes == ("World", "Sports", "Business", "Sci/Tech")
    assert load_text_files("ag_news", tmp_path) == corpus  # the same are held out
    assert all(int(text.split()[1]) % 4 == k for text, k in zip(corpus.dev.texts, corpus.dev.targets, strict=True))


def test_trec(tmp_path: Path) -> None:
    lines = [f"{name}:other How many {k} ?" for k in range(2) for name in ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")]
    (tmp_path / "train_5500.label").write_text("\n".join(lines) + "\n")
    (tmp_path / "TREC_10.label").write_bytes("LOC:city Où ?\n".encode("latin-1"))
    corpus = load_trec(tmp_path, dev_share=0.25)
    assert (len(corpus.train), len(corpus.dev)) == (9, 3)
    assert sorted(corpus.train.targets + corpus.dev.targets) == sorted(list(range(6)) * 2)
    assert corpus.test is not None and (corpus.test.texts, corpus.test.targets) == (["Où ?"], [4])


CONLL = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

New NNP B-NP B-LOC
York NNP I-NP I-LOC"""


def test_tagged_words(tmp_path: Path) -> None:
    for name in ("train.txt", "valid.txt"):
        (tmp_path / name).write_text(CONLL)
    (tmp_path / "test.txt").write_text(CONLL.replace("B-ORG", "B-MISC") + "\n\n\n")
    corpus = load_tagged_words(tmp_path)
    assert corpus.tagging and corpus.classes == ("O", "B-LOC", "B-MISC", "B-ORG", "I-LOC")
    assert corpus.train.texts == [["EU", "rejects"], ["New", "York"]]
    assert corpus.train.targets == [[3, 0], [1, 4]]
    assert corpus.test is not None and corpus.test.targets == [[2, 0], [1, 4]]
    assert load_text_files("tagged_words", tmp_path) == corpus
    speech = load_tagged_words(tmp_path, column=1)
    assert speech.classes == ("NNP", "VBZ") and speech.train.targets == [[0, 1], [0, 0]]


def test_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").touch()
    with pytest.raises(FileNotFoundError, match=r"has no file dev.tsv: nothing is downloaded, .*\(train.tsv, dev.tsv\)"):
        load_glue(tmp_path, "cola")
    with pytest.raises(FileNotFoundError, match=r"has no file train.txt and no valid.txt and no test.txt"):
        load_tagged_words(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no file train_5500.label and no TREC_10.label"):
        load_trec(tmp_path)


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("sst2", "text\tlabel\na\t1\n", r"has no column 'sentence'; its first line is \['text', 'label'\]"),
        ("sst2", "sentence\tlabel\na\t1\nb\tgood\n", r"train.tsv, line 3, has the label 'good', which is none of 0, 1"),
        ("cola", "a\t1\n", r"train.tsv, line 1, has 2 columns in place of at least 4"),
        ("sst2", "\n", r"train.tsv is empty"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, task: str, content: str, message: str) -> None:
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_glue(tmp_path, task)


def test_other_columns_are_refused(tmp_path: Path) -> None:
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text('"1","only a title"\n')
    with pytest.raises(ValueError, match="row 1, has 2 columns in place of class, title and description"):
        load_ag_news(tmp_path)
    for name in ("train.txt", "valid.txt", "test.txt"):
        (tmp_path / name).write_text("word O\n")
    with pytest.raises(ValueError, match="line 1, has 2 columns, and no tag in column 3"):
        load_tagged_words(tmp_path, column=3)


def test_unknown_names_and_shares_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no loader for the task 'wnli' of GLUE"):
        load_glue(tmp_path, "wnli")
    with pytest.raises(ValueError, match="There is no loader 'imdb'; use 'ag_news', 'cola', 'mrpc', 'qnli', 'rte', 'sst2', "):
        load_text_files("imdb", tmp_path)
    with pytest.raises(ValueError, match=r"There is no loader 'ag-news' \(did you mean 'ag_news'\?\); use"):
        load_text_files("ag-news", tmp_path)
    for name in ("train_5500.label", "TREC_10.label"):
        (tmp_path / name).write_text("LOC:city Where ?\n")
    with pytest.raises(ValueError, match="dev_share must be between 0 and 1, but is 1"):
        load_trec(tmp_path, dev_share=1)
