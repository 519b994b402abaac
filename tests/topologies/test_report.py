"""`lightning-distopt topology`, and the page about topologies."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from lightning_distopt import cli
from lightning_distopt.topologies import TOPOLOGIES, Complete, OnePeerExponential, RandomMatching, Ring, Star, make
from lightning_distopt.topologies.report import consensus_curve, steps_to_agree, topology
from tests.topologies.cases import possible

PAGE = Path(__file__).parents[2] / "docs" / "topologies.md"


def test_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["topology", "ring", "--replicas=16", "--parameters=500", "--output=figures/ring.png"])
    text = capsys.readouterr().out
    assert text.splitlines() == [
        "Ring(16)",
        "  degree          2 messages sent per step; busiest replica 2, in one step 2",
        "  period          1, static; symmetric",
        "  spectral gap    0.05075",
        "  contraction     0.09892 (of the squared consensus distance per step, at least)",
        "  reaches all     8 steps bring what any replica knows to all",
        "  agreement       112 steps take the consensus distance to 1/1000 of the start",
        "  bytes per step  4 kB mean, 4 kB busiest, for 500 parameters in float32",
        "  all-reduce      3.75 kB by each replica, for comparison",
        "Written: figures/ring.png",
    ]
    assert (tmp_path / "figures" / "ring.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_topology_is_drawn(name, capsys, tmp_path):
    n = next(n for n in (6, 8, 32) if possible(name, n))
    topology(name, replicas=n, steps=5, output=str(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert capsys.readouterr().out.startswith(repr(make(name, n)))


def test_small_and_large_ones_are_drawn(tmp_path):
    for n in (2, 70):
        for name in ("complete", "one_peer_exponential", "grid"):
            topology(name, replicas=n, steps=3, output=str(tmp_path / f"{name}{n}.png"))
    assert len(list(tmp_path.iterdir())) == 6


def test_what_averages_exactly_says_so(capsys, tmp_path):
    for name in ("one_peer_exponential", "complete"):
        topology(name, replicas=8, output=str(tmp_path / "figure.png"))
    text = capsys.readouterr().out
    assert "contraction     1 (3 steps average exactly)" in text
    assert "contraction     1 (a step averages exactly)" in text


@pytest.mark.parametrize("graph", ["[[0, 1], [1, 2]]", "[(0,1),(1,2)]", "[[0.75,0.25,0],[0.25,0.5,0.25],[0,0.25,0.75]]"])
def test_edges_and_matrices(graph, capsys, tmp_path):
    cli.main(["topology", graph, "--replicas=3", f"--output={tmp_path / 'figure.png'}"])
    text = capsys.readouterr().out
    assert text.startswith("<Custom topology of 3 replicas with 2 edges>\n  degree          1.333 messages")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_without_matplotlib_only_the_figure_is_missing(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    topology("ring", output=str(tmp_path / "figure.png"))
    text = capsys.readouterr().out
    assert "spectral gap    0.1953" in text
    assert "pip install 'lightning-distopt[plot]'" in text
    assert not (tmp_path / "figure.png").exists()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["rign"], "There is no topology 'rign' (did you mean 'ring'?)"),
        (
            ["[[0, 1], [1, 2]", "--replicas=3"],
            "Edges are written as '[[0, 1], [1, 2]]', and a matrix as its rows; got '[[0, 1],",
        ),
        (["[[0, 1], [1, 3]]", "--replicas=3"], "The edge (1, 3) leads to a replica that does not exist: there are 0 to 2."),
        (["torus", "--replicas=7"], "7 is prime: use 'ring' or 'grid'"),
        (["ring", "--replicas=1"], "--replicas must be at least 2"),
        (["ring", "--steps=0"], "--steps and --parameters must be at least 1; got 0 and 1000000."),
        (["ring", "--replicsa=4"], "there is no option `--replicsa=4` (did you mean `--replicas`?)"),
    ],
)
def test_mistakes_are_one_sentence(args, sentence, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["topology", *args])
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err


def test_topologies_are_listed(capsys):
    cli.main(["topologies"])
    assert set(re.findall(r"^(\w+)$", capsys.readouterr().out, re.MULTILINE)) == set(TOPOLOGIES)
    cli.main(["topologies", "torus"])
    assert "rows=None\n    a divisor of `n`" in capsys.readouterr().out


@pytest.mark.parametrize(
    "chosen",
    [Ring(9), Ring(32), Star(7), Complete(5), OnePeerExponential(8), OnePeerExponential(7), RandomMatching(8)],
    ids=repr,
)
@pytest.mark.parametrize("tolerance", [1e-1, 1e-3])
def test_steps_to_agree_are_counted_as_the_curve_has_them(chosen, tolerance):
    curve = torch.tensor(consensus_curve(chosen, 500))
    assert steps_to_agree(chosen, tolerance) == int((curve <= tolerance * curve[0]).int().argmax())


def test_a_long_ring_is_counted_without_walking_it():
    # The slowest mode is left in the end: every e-fold takes -1 / log(lambda_2) steps.
    ring = Ring(256)
    steps = steps_to_agree(ring, 1e-6) - steps_to_agree(ring, 1e-3)
    assert steps == pytest.approx(6.9078 / ring.spectral_gap, rel=1e-3)


def test_consensus_curve_starts_as_uniform_numbers():
    # The variance of U[0, 10] is 100 / 12; 100 problems of 64 replicas: the root is known to about one percent.
    assert consensus_curve(Ring(64), 0)[0] == pytest.approx((100 / 12 * 63 / 64) ** 0.5, rel=0.03)


# ----------------------------------------------------------------------------------------------------------------- page


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", text)]


def test_the_table_of_the_page_is_what_its_snippet_prints(capsys):
    page = PAGE.read_text()
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), {"__name__": "page"})
    printed = capsys.readouterr().out
    (table,) = re.findall(r"^\| gap / contraction .*?(?=\n\n)", page, re.MULTILINE | re.DOTALL)
    assert [row.split("|")[1] for row in table.splitlines()] == [row.split("|")[1] for row in printed.splitlines()]
    assert numbers(table) == pytest.approx(numbers(printed), rel=6e-3)  # the third digit may be rounded either way
    assert len(numbers(table)) > 90


def test_the_output_on_the_page_is_that_of_the_command(capsys, tmp_path):
    topology("one_peer_exponential", replicas=16, output=str(tmp_path / "figure.png"))
    assert capsys.readouterr().out.partition("Written")[0] in PAGE.read_text()


def test_every_topology_is_on_the_page():
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(2 * list(TOPOLOGIES))  # what it is, and how fast
