"""`lightning-distopt plan`, and the page about it."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

import lightning_distopt
from lightning_distopt import cli
from lightning_distopt.plan import Cluster, Costs, Workload, enough, time_per_step
from lightning_distopt.plan import report as module
from lightning_distopt.plan.report import methods, plan, rows

PAGE = Path(__file__).parents[2] / "docs" / "plan.md"
COSTS = Costs(compressing={"sign": 2.3e-10, "qsgd": 5e-10, "top_k": 5e-10})


@pytest.fixture(autouse=True)
def constants(monkeypatch, request):
    """Constants that no new fit changes."""
    if "page" not in request.node.name:
        monkeypatch.setattr(module.Costs, "read", lambda: COSTS)


def test_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(
        shlex.split("plan --replicas 64 --parameters 25e6 --step 50 --bandwidth 1000 --latency 0.1 --output figures/a.png")
    )
    text = capsys.readouterr().out
    start, _, rest = text.partition("\n\n")
    assert start.splitlines() == [
        "64 replicas; 1,000 Mbit/s, 0.1 ms",
        "25,000,000 parameters (100 MB); 50 ms of computing a step",
    ]
    table, advice, left_out = rest.split("\n\n")
    lines = table.splitlines()
    assert lines[0].split("  ")[-1].strip() == "H for 5 %"
    assert [" ".join(line.split()) for line in (lines[1], lines[3], lines[8], lines[9], lines[12], lines[-1])] == [
        "all-reduce at every step (DDP) 196.9 MB 1.7 s 1.71 s 1x 679",
        "local SGD, H = 4 49.22 MB 1.7 s 474 ms 3.61x 679",
        "D-PSGD, one peer 100 MB 868 ms 918 ms 1.87x 348",
        "D-PSGD, one peer, overlapped 100 MB 868 ms 868 ms 1.97x 17",
        "CHOCO, signs, ring 6.25 MB 175 ms 225 ms 7.61x 70",
        "EF-sign, all-gather 196.9 MB 3.18 s 3.23 s 0.531x -",
    ]
    assert len({len(line) for line in lines}) == 1  # columns are aligned
    assert advice.splitlines() == [
        "With an all-reduce at every step, a step takes 34.3 times its computing.",
        "With local SGD communication stops mattering from H = 679 on.",
        "It does so soonest with D-PSGD, one peer, overlapped, from H = 17 on:",
        "    GossipStrategy(DPSGD(), topology='one_peer_exponential', overlap=True, sync_period=17)",
        "With a round at every step, CHOCO, top 1 %, ring, overlapped is the fastest (13.2x):",
        "    GossipStrategy(CHOCO(compressor='top_k:0.01'), topology='ring', overlap=True)",
    ]
    assert "accuracy" in left_out and left_out.endswith("Written: figures/a.png\n")
    assert max(map(len, text.splitlines())) <= 120
    assert (tmp_path / "figures" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_clusters(capsys, tmp_path):
    options = "--replicas 8 --bandwidth 10000 --clusters 2 --across 100 --across_latency 10 --bytes_per_parameter 2"
    cli.main(["plan", *options.split(), f"--output={tmp_path / 'a.png'}"])
    text = capsys.readouterr().out
    assert text.startswith("8 replicas; 2 clusters of 4: 10,000 Mbit/s, 0.1 ms inside, 100 Mbit/s, 10 ms across\n")
    assert "25,000,000 parameters (50 MB); 100 ms" in text
    assert "DDP in clusters, all every 16 steps" in text
    [code] = re.findall(r"Where clusters average among themselves, .* is the fastest \(.*\):\n    (.*)\n", text)
    strategy = eval(code, dict(vars(lightning_distopt)))
    assert strategy.algorithm.block_size == 4 and strategy.algorithm.block_period > 1


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (
            {"parameters": 1000, "replicas": 4},
            ["Communication hardly matters here: use Lightning's DDP.", "With an all-reduce at every step, a step takes 1.018"],
        ),
        ({"replicas": 1}, ["use Lightning's DDP", "a step takes 1.000 times its computing."]),
        (
            {"parameters": 1e6, "step": 50},
            [
                "stops mattering from H = 26 on.\nWith a round at every step, D-PSGD, one peer, overlapped is the fastest and "
                "hides communication (2.2x):\n    GossipStrategy(DPSGD(), topology='one_peer_exponential', overlap=True)\n\n"
            ],
        ),
    ],
)
def test_advice(options, lines, capsys, tmp_path):
    plan(**options, output=str(tmp_path / "a.png"))
    text = capsys.readouterr().out
    for line in lines:
        assert line in text


def test_the_largest_are_drawn(capsys, tmp_path):
    for k, options in enumerate(({"replicas": 20_000}, {"replicas": 6, "clusters": 3, "across": 1.0, "bandwidth": 1e5})):
        plan(**options, output=str(tmp_path / f"{k}.png"))
        assert (tmp_path / f"{k}.png").stat().st_size > 30_000
    assert "20,000 replicas; 1,000 Mbit/s" in capsys.readouterr().out


def test_rows_are_those_of_the_model():
    cluster, workload = Cluster(16, 1e8, clusters=2, across=1e7), Workload(1_000_000, 0.02)
    table = rows(cluster, workload, COSTS)
    assert [row.name for row in table] == list(methods(clusters=2))
    for row in table:
        assert row.step == time_per_step(row.method, cluster, workload, COSTS)
        assert row.speed == table[0].step / row.step
        assert row.enough == enough(row.method, cluster, workload, COSTS, 0.05)
    assert table[0].speed == 1


def test_every_strategy_is_one_of_the_package():
    strategies = [eval(method.code, dict(vars(lightning_distopt))) for method in methods(clusters=2).values()]
    overlapped = [strategy.algorithm.overlap for strategy in strategies if hasattr(strategy.algorithm, "overlap")]
    assert overlapped.count(True) == 5


def test_without_matplotlib_only_the_figure_is_missing(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plan(output=str(tmp_path / "figure.png"))
    text = capsys.readouterr().out
    assert "all-reduce at every step" in text
    assert "pip install 'lightning-distopt[plot]'" in text
    assert not (tmp_path / "figure.png").exists()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--replicas=0"], "`replicas` must be a whole number, at least 1; got 0."),
        (["--parameters=0.5"], "`parameters` must be a whole number, at least 1; got 0.5."),
        (["--parameters=.inf"], "`parameters` must be a whole number, at least 1; got inf."),
        (["--parameters=-3"], "`parameters` must be a whole number, at least 1; got -3."),
        (["--step=0"], "`step` must be above 0 ms; got 0."),
        (["--step=.inf"], "Computing a step takes some time, above 0 and finite; got inf seconds."),
        (["--bandwidth=-5"], "`bandwidth` must be above 0 Mbit/s; got -5."),
        (["--across=-20", "--clusters=2"], "`across` must be above 0 Mbit/s; got -20."),
        (["--latency=-1"], "`latency` must be 0 ms or more, and finite; got -1."),
        (["--across_latency=.inf", "--clusters=2"], "`across_latency` must be 0 ms or more, and finite; got inf."),
        (["--clusters=3"], "8 replicas can't be divided into 3 clusters of the same size: use a divisor."),
        (["--across=10"], "`across` and `across_latency` are those of links between clusters: give `clusters`, at least 2."),
        (["--bytes_per_parameter=3"], "`bytes_per_parameter` must be 2, 4 or 8; got 3."),
        (["--replicsa=4"], "there is no option `--replicsa=4` (did you mean `--replicas`?)"),
        (["--bandwidth=fast"], "`bandwidth`: expected float, got fast."),
    ],
)
def test_mistakes_are_one_sentence(args, sentence, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", *args])
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------------- page


def test_the_output_on_the_page_is_that_of_the_command(capsys, tmp_path):
    page = PAGE.read_text()
    shown = re.findall(r"```bash\nlightning-distopt (plan [^\n]*)\n```\n\n```\n(.*?)```", page, re.DOTALL)
    assert shown
    for command, output in shown:
        cli.main([*shlex.split(command), f"--output={tmp_path / 'a.png'}"])
        assert capsys.readouterr().out.partition("Written")[0] == output


def test_the_snippets_of_the_page_run():
    page = PAGE.read_text()
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), {"__name__": "page"})


def test_every_option_is_on_the_page():
    options = re.findall(r"^\| `--(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    assert options == list(plan.__annotations__)[: len(options)]
    assert len(options) == len(plan.__annotations__) - 1  # and what it returns
