"""The cost model: its bytes are those that training counts, its times those of the formulas."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_distopt
from lightning_distopt.plan import (
    Cluster,
    Costs,
    Method,
    Workload,
    bytes_per_step,
    communication,
    enough,
    time_per_round,
    time_per_step,
)
from lightning_distopt.plan.costs import COSTS
from lightning_distopt.plan.report import methods
from lightning_distopt.topologies import make
from tests.conformance.problems import QUIET
from tests.helpers import PoolEnvironment

FREE = Costs(efficiency=1, overhead=0, message=0, sending=0, mixing=0)
"""Nothing but links takes time."""

WORKLOAD = Workload(parameters=10_000_000, step_seconds=0.1)


# ------------------------------------------------------------------------------------------------------------------ bytes
class Net(L.LightningModule):
    """Two tensors of whole 64 bytes, so that rows have no gaps, which an average of parameters sends too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 32)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


STEPS = 16
NUMEL = 16 * 32 + 32


def bytes_counted(rank: int, world_size: int, chosen: list[tuple[Method, int]], precision: str) -> list[float]:
    """Train with each strategy, written as the plan writes it; returns bytes per step."""
    counted = []
    for method, group in chosen:
        code = method.code.replace("block_period", f"block_size={group}, block_period")
        code = code.replace("compressor=", "scope='row', compressor=")  # one vector, as the plan takes the model
        trainer = L.Trainer(
            strategy=eval(code, dict(vars(lightning_distopt))),
            accelerator="cpu",
            devices=world_size,
            plugins=[PoolEnvironment(rank, world_size)],
            max_steps=STEPS,
            precision=precision,
            limit_val_batches=0,
            enable_checkpointing=False,
            **QUIET,
        )
        dtype = torch.float64 if precision == "64-true" else torch.float32
        trainer.fit(Net(), DataLoader(TensorDataset(torch.randn(STEPS * world_size, 16, dtype=dtype)), batch_size=1))
        assert trainer.global_step == STEPS
        counted.append(trainer.strategy.traffic.bytes_sent / STEPS)
    return counted


EVERY = [Method("dsgd", topology="torus"), Method("dpsgd", 4, topology="exponential"), Method("local_sgd", 1, block_period=4)]
EVERY += [Method("local_sgd", average="parameters"), Method("local_sgd", 1, block_period=4, average="parameters")]
EVERY += [Method("local_sgd", 2, block_period=2), Method("choco", 2, "ring", "random_k:0.1"), *methods(clusters=2).values()]
EVERY = [method for method in EVERY if STEPS % (method.sync_period * method.block_period) == 0]


@pytest.mark.parametrize(("n", "itemsize"), [(4, 4), (2, 8), (3, 4)])
def test_bytes_are_those_that_training_counts(n, itemsize, ranks):
    clusters = 2 if n % 2 == 0 else 1
    cluster = Cluster(n, bandwidth=1e9, clusters=clusters)
    workload = Workload(NUMEL, step_seconds=1, bytes_per_parameter=itemsize)
    chosen = EVERY if n == 4 else [m for m in EVERY[::2] if m.topology != "torus" and not (m.blocks and clusters == 1)]
    precision = "64-true" if itemsize == 8 else "32-true"
    counted = ranks.run(n, bytes_counted, [(m, cluster.group) for m in chosen], precision, timeout=240)
    expected = [bytes_per_step(m, cluster, workload) for m in chosen]
    assert len(expected) >= 8
    for measured in counted:  # by every rank
        assert dict(zip(map(repr, chosen), measured, strict=True)) == dict(zip(map(repr, chosen), expected, strict=True))


def formulas_of_the_page(row: str) -> list[str]:
    """Return what a row of the table on local SGD says, as Python, with P for `H^b`."""
    page = (Path(__file__).parents[2] / "docs" / "local_sgd.md").read_text()
    (cell,) = re.findall(rf"^\| {re.escape(row)} \| (.*?) \|", page, re.MULTILINE)
    texts = [text.replace("H^b", "P") for text in re.findall(r"`(2 [^`]*)`", cell)]
    return [re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", text) for text in texts]


@pytest.mark.parametrize(
    ("row", "method"),
    [
        ("mini-batch SGD (`H = 1`)", Method("local_sgd")),
        ("hierarchical", Method("local_sgd", 4, block_period=3)),
        ("hierarchical", Method("local_sgd", 1, block_period=3, average="parameters")),
        ("the same with `H = 1`", Method("local_sgd", 1, block_period=3)),
    ],
)
def test_the_page_on_local_sgd_has_the_same_bytes(row, method):
    n = {"K": 12, "K_b": 4, "B": 3, "d": WORKLOAD.parameters, "s": 4, "H": method.sync_period, "P": method.block_period}
    parts = [eval(formula, {}, n) for formula in formulas_of_the_page(row)]
    sent = bytes_per_step(method, Cluster(12, bandwidth=1e9, clusters=3), WORKLOAD)
    assert sum(parts[:2]) == pytest.approx(sent)  # a third one says what of the second goes to other blocks


def test_gossip_sends_what_the_topology_says():
    for name in ("star", "grid", "one_peer_exponential", "binary_tree"):
        method, cluster = Method("dsgd", topology=name), Cluster(12, bandwidth=1e9)
        mean, _ = make(name, 12).bytes_per_step(WORKLOAD.row_bytes)
        assert bytes_per_step(method, cluster, WORKLOAD) == pytest.approx(mean)


def test_half_precision_is_compressed_in_single_precision():
    workload = Workload(1000, step_seconds=1, bytes_per_parameter=2)
    assert (workload.row_bytes, workload.payload_bytes(""), workload.payload_bytes("sign")) == (2000, 2000, 129)


# ------------------------------------------------------------------------------------------------------------------ times
@pytest.mark.parametrize(
    ("method", "cluster", "parameters", "seconds"),
    [  # gloo on throttled links
        (Method("local_sgd", 2), Cluster(4, bandwidth=1e9), 10_000_000, 0.52),
        (Method("local_sgd", 2), Cluster(4, bandwidth=100e6), 10_000_000, 5.05),
        (Method("local_sgd", 2), Cluster(4, bandwidth=20e6), 1_000_000, 2.67),
        (Method("local_sgd", 2), Cluster(4, bandwidth=10e9, clusters=2, across=100e6), 2_500_000, 1.259),
        (Method("local_sgd", 2), Cluster(4, bandwidth=1e12, latency=5e-3), 1, 0.0312),
        (Method("local_sgd", 2), Cluster(4, bandwidth=100e6, latency=5e-3), 10_000_000, 5.47),
        (Method("dsgd", topology="ring"), Cluster(4, bandwidth=100e6), 2_500_000, 1.75),
        (Method("dsgd", topology="ring"), Cluster(4, bandwidth=1e9), 10_000_000, 0.68),
    ],
)
def test_rounds_that_were_measured(method, cluster, parameters, seconds):
    workload = Workload(parameters, step_seconds=0.1)
    assert time_per_round(method, cluster, workload, Costs()) == pytest.approx(seconds, rel=0.1)


def seconds(method: Method, cluster: Cluster, costs: Costs = FREE) -> float:
    return time_per_step(method, cluster, WORKLOAD, costs)


def test_an_all_reduce_and_gossip_as_n_grows():
    averaging, ring = Method("local_sgd", 2), Method("dpsgd", topology="ring")
    one_peer = Method("dpsgd", topology="one_peer_exponential")
    for latency in (0.0, 1e-3):
        small, large = (Cluster(n, bandwidth=1e9, latency=latency) for n in (3, 10_000))
        grown = communication(averaging, large, WORKLOAD, FREE)
        assert grown.sent == pytest.approx(2 * WORKLOAD.row_bytes, rel=1e-3)
        assert grown.wire == pytest.approx(8 * grown.sent / 1e9 + 2 * 9_999 * latency)
        for method in (ring, one_peer):
            assert communication(method, small, WORKLOAD, FREE) == pytest.approx(communication(method, large, WORKLOAD, FREE))
    assert communication(ring, small, WORKLOAD, FREE).wire == pytest.approx(0.64 + 1e-3)
    assert communication(one_peer, small, WORKLOAD, FREE).wire == pytest.approx(0.32 + 1e-3)


def test_one_replica_sends_nothing():
    for method in methods(clusters=2).values():
        assert communication(method, Cluster(1, bandwidth=1e6), WORKLOAD, Costs.read()) == (0, 0, 0)
        assert seconds(method, Cluster(1, bandwidth=1e6)) == WORKLOAD.step_seconds


@pytest.mark.parametrize("H", [1, 2, 8])
def test_overlap_takes_the_longer_of_the_two(H):
    plain = Method("dpsgd", H, topology="one_peer_exponential")  # 40 MB
    for bandwidth in (100e6, 3.2e9, 100e9):
        cluster, wire = Cluster(8, bandwidth=bandwidth), 8 * 40e6 / bandwidth
        assert seconds(plain, cluster) == pytest.approx(0.1 + wire / H)
        assert seconds(replace(plain, overlap=True), cluster) == pytest.approx(max(0.1, wire / H))


def test_what_the_processor_does_is_not_hidden():
    cluster = Cluster(8, bandwidth=1e12)
    costs = Costs(efficiency=1, overhead=0, message=0, sending=0, mixing=1e-9, compressing={"sign": 2e-9, "top_k": 3e-9})
    D = WORKLOAD.row_bytes
    for overlap in (False, True):
        for method, work in (
            (Method("dpsgd", topology="ring", overlap=overlap), 3e-9 * D),  # the own row and two others
            (Method("choco", 1, "ring", "sign", overlap), (2e-9 * 4 + 2e-9) * D),  # compressed, and three payloads added
            (Method("choco", 1, "ring", "top_k:0.01", overlap), (3e-9 + 2e-9) * D),  # of which these have few values
        ):
            assert seconds(method, cluster, costs) == pytest.approx(0.1 + work, rel=2e-2)
    gathered = communication(Method("ef_sign", compressor="sign"), cluster, WORKLOAD, costs)
    assert gathered.work == pytest.approx((2e-9 * (1 + 8) + 1e-9) * D)


def test_the_backward_pass_hides_what_ddp_sends_but_for_the_last_bucket():
    ddp, workload = Method("local_sgd"), Workload(1_000_000, step_seconds=0.1)
    slow, cluster = communication(ddp, Cluster(8, bandwidth=1e9), workload, FREE).wire, Cluster(8, bandwidth=1e9)
    assert time_per_step(ddp, cluster, workload, FREE) == pytest.approx(0.1 + slow)  # a single bucket
    workload = Workload(100_000_000, step_seconds=100)
    hidden, exposed = communication(ddp, cluster, workload, FREE).wire, 25 * 2**20 / 400e6
    assert time_per_step(ddp, cluster, workload, FREE) == pytest.approx(100 + exposed * hidden)
    assert time_per_step(ddp, Cluster(8, bandwidth=1e6), workload, FREE) == pytest.approx(100 / 3 + 1000 * hidden, rel=1e-3)


def test_averages_of_parameters_hide_nothing():
    cluster, workload = Cluster(8, bandwidth=1e9), Workload(100_000_000, step_seconds=100)
    method = Method("local_sgd", average="parameters")
    wire = communication(method, cluster, workload, FREE).wire
    assert time_per_step(method, cluster, workload, FREE) == pytest.approx(100 + wire)
    assert time_per_step(Method("local_sgd"), cluster, workload, FREE) < 100 + wire


def test_every_round_has_an_overhead():
    cluster, costs = Cluster(8, bandwidth=1e12, cores=0.5), replace(FREE, overhead=0.01)
    for method in methods().values():
        assert communication(method, cluster, WORKLOAD, costs).work == pytest.approx(0.02)


def test_clusters():
    uniform = Cluster(8, bandwidth=1e9)
    slow = Cluster(8, bandwidth=1e9, clusters=2, across=1e8, across_latency=0.01)
    same = Cluster(8, bandwidth=1e9, clusters=2)
    for method in methods().values():
        assert seconds(method, same) == seconds(method, uniform)
        assert communication(method, uniform, WORKLOAD, FREE).wire < communication(method, slow, WORKLOAD, FREE).wire
    # Of 14 hops round the ring of 8, as many of each kind as there are links of it: 2 of 8 cross.
    whole = communication(Method("local_sgd", 2), slow, WORKLOAD, FREE)
    assert whole.wire == pytest.approx(1.75 * 40e6 * 8 / 1e8 + 14 * 0.01 * 2 / 8)
    # The ring's replicas at the border send one of their two messages across.
    ring = communication(Method("dsgd", topology="ring"), slow, WORKLOAD, FREE)
    assert ring.wire == pytest.approx(40e6 * 8 / 1e8 + 0.01)
    # One inside, and at each fourth round one over all.
    inside = 1.5 * 40e6 * 8 / 1e9
    hierarchical = Method("local_sgd", 2, block_period=4)
    levels = inside + 2 * 0.5 * 10e6 * 8 / 1e8 + 3 * 2 * 0.01  # a quarter of the row across, in three pieces
    assert levels < 0.25 * whole.wire
    assert time_per_round(hierarchical, slow, WORKLOAD, FREE) == pytest.approx((3 * inside + levels) / 4)
    assert seconds(hierarchical, slow) == pytest.approx(0.1 + (3 * inside + levels) / 8)
    alone = replace(slow, clusters=8)  # nothing is averaged inside
    whole_alone = communication(Method("local_sgd", 2), alone, WORKLOAD, FREE)
    assert time_per_round(hierarchical, alone, WORKLOAD, FREE) == pytest.approx(whole_alone.wire / 4)
    ddp_inside = 0.1 + inside * 25 * 2**20 / 40e6  # the rest beside the backward pass, which takes longer
    assert seconds(Method("local_sgd", 1, block_period=4), slow) == pytest.approx(
        max(ddp_inside, 0.1 * (1 - Costs().backward) + inside) + levels / 4
    )


def test_replicas_that_share_cores_work_more_slowly():
    costs = Costs(efficiency=1, overhead=0, message=0, sending=1e-8, mixing=1e-9)
    method = Method("dpsgd", topology="one_peer_exponential", overlap=True)
    own, one, half = (Cluster(8, bandwidth=1e9, cores=cores) for cores in (2.0, 1.0, 0.5))
    workload = Workload(10_000_000, step_seconds=1)
    mixing, sending = 2 * 0.04, 0.4  # of two rows; of one
    assert time_per_step(method, own, workload, costs) == pytest.approx(1 + mixing)
    assert time_per_step(method, one, workload, costs) == pytest.approx(1 + sending + mixing)
    assert time_per_step(method, half, workload, costs) == pytest.approx(1 + 2 * sending + 2 * mixing)


@pytest.mark.parametrize("tolerance", [0.01, 0.05, 0.5])
@pytest.mark.parametrize("method", [m for m in methods(clusters=2).values() if m.algorithm != "ef_sign"], ids=repr)
def test_enough_is_the_smallest(method, tolerance):
    for cluster in (
        Cluster(8, bandwidth=1e9),
        Cluster(64, bandwidth=1e7, latency=1e-3, clusters=4, across=1e6),
        Cluster(2, bandwidth=1e12),
    ):
        H = enough(method, cluster, WORKLOAD, Costs.read(), tolerance)
        times = [seconds(replace(method, sync_period=h), cluster, Costs.read()) for h in (H, max(1, H - 1))]
        assert times[0] <= (1 + tolerance) * 0.1
        assert H == 1 or times[1] > (1 + tolerance) * 0.1


def test_a_round_at_every_step_is_enough_or_nothing_is():
    method = Method("ef_sign", compressor="sign")
    assert enough(method, Cluster(8, bandwidth=1e7), WORKLOAD, FREE) is None
    assert enough(method, Cluster(8, bandwidth=1e12), WORKLOAD, FREE) == 1


def test_times_fall_with_faster_links():
    for method in methods(clusters=2).values():
        clusters = [Cluster(16, bandwidth=10.0**k, clusters=2, across=10.0 ** (k - 1), latency=1e-4) for k in range(5, 13)]
        times = [seconds(method, cluster, Costs.read()) for cluster in clusters]
        assert all(a >= b for a, b in pairwise(times))
        assert times[0] > 2 * times[-1]


# -------------------------------------------------------------------------------------------------------------- constants
def test_the_constants_come_with_the_package(tmp_path):
    costs = Costs.read()
    assert 0.5 < costs.efficiency <= 1
    assert {"sign", "qsgd", "top_k"} <= set(costs.compressing)
    costs.write(tmp_path / "costs.json")
    assert Costs.read(tmp_path / "costs.json") == costs
    assert (tmp_path / "costs.json").read_text() == COSTS.read_text()


# -------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("make_it", "sentence"),
    [
        (lambda: Cluster(0, 1e9), "`replicas` must be a whole number, at least 1; got 0."),
        (lambda: Cluster(True, 1e9), "`replicas` must be a whole number, at least 1; got True."),
        (lambda: Cluster(4, 0), "`bandwidth` must be above 0; got 0."),
        (lambda: Cluster(4, float("nan")), "`bandwidth` must be above 0; got nan."),
        (lambda: Cluster(4, 1e9, latency=-1), "`latency` must be 0 or more, and finite; got -1."),
        (lambda: Cluster(4, 1e9, clusters=2, across=-5), "`across` must be above 0; got -5."),
        (lambda: Cluster(7, 1e9, clusters=2), "7 replicas can't be divided into 2 clusters of the same size: use a divisor."),
        (lambda: Cluster(4, 1e9, across=1e8), "give `clusters`, at least 2."),
        (lambda: Workload(0, 1), "`parameters` must be a whole number, at least 1; got 0."),
        (lambda: Workload(10, 0), "Computing a step takes some time, above 0 and finite; got 0 seconds."),
        (lambda: Workload(10, 1, 3), "`bytes_per_parameter` must be 2, 4 or 8; got 3."),
        (lambda: Method("adam"), "There is no cost model for 'adam'; there is for local_sgd, dsgd,"),
        (lambda: Method("local_sgd", 0), "`sync_period` must be a whole number, at least 1; got 0."),
        (lambda: Method("local_sgd", topology="ring"), "'local_sgd' has no `topology`; got 'ring'."),
        (lambda: Method("dpsgd"), "'dpsgd' needs a `topology`; got ''."),
        (lambda: Method("choco", topology="ring"), "'choco' needs a `compressor`; got ''."),
        (lambda: Method("dpsgd", topology="ring", block_period=4), "'dpsgd' has no `block_period`; got 4."),
        (lambda: Method("dpsgd", topology="ring", average="parameters"), "'dpsgd' has no `average`; got 'parameters'."),
        (lambda: Method("local_sgd", overlap=True), "'local_sgd' has no `overlap`"),
        (lambda: Method("ef_sign", 2, compressor="sign"), "'ef_sign' makes a round at every step: use `sync_period=1`."),
        (lambda: seconds(Method("dpsgd", topology="rign"), Cluster(4, 1e9)), "There is no topology 'rign' (did you mean"),
        (lambda: seconds(Method("choco", 1, "ring", "sing"), Cluster(4, 1e9)), "There is no compressor 'sing' (did you mean"),
    ],
)
def test_what_makes_no_sense_is_refused(make_it, sentence):
    with pytest.raises(ValueError) as refused:
        make_it()
    assert sentence in str(refused.value)
