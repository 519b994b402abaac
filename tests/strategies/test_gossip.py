"""Gossip: replicas talk to their neighbours and to nobody else, act on signals together, and refuse what can't be right."""

from __future__ import annotations

import math
import warnings
from collections import Counter

import lightning as L
import networkx as nx
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from lightning_distopt import CHOCO, DCD, DPSGD, DSGD, ECD, DeepSqueeze, EFSign, GossipStrategy, LocalSGDStrategy
from lightning_distopt.communication import Communicator
from lightning_distopt.compression import QSGD, Compressor, LowRank, RandomK
from lightning_distopt.strategies import ReplicaStrategy
from lightning_distopt.topologies import Ring
from tests.conformance.problems import QUIET, Augmented, SmallNet, all_rows, fit, fit_net, fit_quadratic
from tests.helpers import PoolEnvironment

ETAS = [0.2] * 5 + [0.1] * 4 + [0.0] + [0.05] * 4


class Row:
    """A row that is not in the table."""

    def __init__(self, *args, **kwargs):
        self.strategy = lambda **options: GossipStrategy(*args, **kwargs, **options)
        self.callbacks = list
        self.name = ", ".join(map(str, (*args, *kwargs.values())))

    def __str__(self):
        return self.name

    __repr__ = __str__


def same(first, second, atol=1e-12):
    torch.testing.assert_close(first["rows"], second["rows"], rtol=0, atol=atol)


# ------------------------------------------------------------------------------------------------------- degenerate cases
def test_the_complete_graph_is_parameter_averaging():
    averaging = Row()
    averaging.strategy = lambda **options: LocalSGDStrategy(3, average="parameters", **options)
    same(fit_net(0, 1, 4, Row("dsgd", topology="complete", sync_period=3)), fit_net(0, 1, 4, averaging))


@pytest.mark.parametrize("n", [2, 4, 8])
def test_one_peer_exponential_averages_exactly_after_log_n_rounds(n):
    rows = fit_quadratic(0, 1, n, Row("dsgd"), [0.1] * 3 + [0.0] * int(math.log2(n)))["rows"]
    assert n == 2 or rows[2].std(dim=0).max() > 1e-3  # two agree after every round
    torch.testing.assert_close(rows[-1], rows[2].mean(dim=0).expand_as(rows[-1]), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("algorithm", "plain"),
    [
        (lambda: CHOCO(gamma=1.0, compressor="identity"), "dpsgd"),
        (lambda: DCD("identity"), "dpsgd"),
        (lambda: ECD("identity"), "dpsgd"),
        (lambda: DeepSqueeze(gamma=1.0, compressor="identity"), "dsgd"),
    ],
)
def test_without_compression_they_are_plain_gossip(algorithm, plain):
    same(fit_net(0, 1, 4, Row(algorithm(), topology="ring")), fit_net(0, 1, 4, Row(plain, topology="ring")), atol=1e-10)


def test_the_order_of_compression_and_gossip_steps():
    """With two gossip steps CHOCO compresses the stepped iterate the second time: W (W x + Delta)."""
    two = fit_quadratic(0, 1, 4, Row(CHOCO(gamma=1.0, compressor="identity"), topology="ring", gossip_steps=2), ETAS)["rows"]
    one = fit_quadratic(0, 1, 4, Row("dpsgd", topology="ring"), ETAS)["rows"]
    torch.testing.assert_close(two[0], Ring(4).matrix() @ one[0], rtol=0, atol=1e-12)


def test_ef_sign_without_compression_is_minibatch_sgd():
    averaging = Row()
    averaging.strategy = lambda **options: LocalSGDStrategy(1, **options)
    same(fit_quadratic(0, 1, 4, Row(EFSign("identity")), ETAS), fit_quadratic(0, 1, 4, averaging, ETAS))


@pytest.mark.parametrize("compressor", ["sign", "top_k:0.3", "qsgd:2", "random_k:0.3", "low_rank:1"])
@pytest.mark.parametrize("make", [CHOCO, DeepSqueeze])
def test_the_mean_is_preserved_by_any_compressor(make, compressor):
    """Steps with learning rate zero gossip alone."""
    rows = fit_quadratic(0, 1, 4, Row(make(gamma=0.1, compressor=compressor)), [0.2] * 4 + [0.0] * 20)["rows"]
    means = rows[3:].mean(dim=1)
    torch.testing.assert_close(means, means[0].expand_as(means), rtol=0, atol=1e-13)
    assert rows[3].std(dim=0).max() > 1e-3


@pytest.mark.parametrize("compressor", ["sign", "top_k:0.3", "qsgd:4", "random_k:0.3", "low_rank:1"])
def test_choco_gossip_reaches_consensus_with_any_compressor(compressor):
    rows = fit_quadratic(0, 1, 4, Row(CHOCO(gamma=0.1, compressor=compressor)), [0.2] * 4 + [0.0] * 200)["rows"]
    spread = rows.std(dim=1).amax(dim=1)
    assert spread[-1] < 1e-2 * spread[3]


@pytest.mark.parametrize(
    "row", [Row("dsgd", topology="ring"), Row(CHOCO(gamma=0.4), topology="torus:4")], ids=["dsgd", "choco"]
)
def test_sixteen_replicas_are_the_same_on_one_four_and_eight_ranks(ranks, row):
    runs = [ranks.run(world, fit_quadratic, 16 // world, row, ETAS) for world in (1, 4, 8)]
    for run in runs[1:]:
        torch.testing.assert_close(all_rows(run), all_rows(runs[0]), rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------------------------ who talks to whom
class Wire:
    """Counts what `torch.distributed` is asked for while the body runs."""

    def __init__(self):
        self.messages, self.collectives, self.real = Counter(), Counter(), {}

    def __enter__(self):
        def batch(operations):
            for operation in operations:
                if operation.op is dist.isend:
                    self.messages[operation.peer] += 1
            return self.real["batch_isend_irecv"](operations)

        def counting(name):
            def call(*args, **kwargs):
                self.collectives[name] += 1
                return self.real[name](*args, **kwargs)

            return call

        names = ("all_reduce", "all_gather", "broadcast", "barrier", "reduce", "all_gather_into_tensor", "reduce_scatter")
        for name in names:
            self.real[name] = getattr(dist, name)
            setattr(dist, name, counting(name))
        self.real["batch_isend_irecv"] = dist.batch_isend_irecv
        dist.batch_isend_irecv = batch
        return self

    def __exit__(self, *_):
        for name, function in self.real.items():
            setattr(dist, name, function)


def on_the_wire(rank, world_size, row, steps):
    """Return messages by peer and collectives, between the first training batch and the last."""
    wire = Wire()

    class Between(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 1:  # the first step has settled what is left of the set-up
                wire.__enter__()

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == steps:
                wire.__exit__()

    fit_quadratic(rank, world_size, 1, row, [0.1] * (steps + 2), callbacks=(Between(),))
    return dict(wire.messages), dict(wire.collectives)


@pytest.mark.parametrize(
    ("row", "peers"),
    [
        (Row("dsgd", topology="ring"), lambda i: {(i + 1) % 4: 10, (i - 1) % 4: 10}),
        (Row("dpsgd", topology="chain"), lambda i: {j: 10 for j in (i - 1, i + 1) if 0 <= j < 4}),
        (Row(CHOCO(gamma=0.4), topology="star"), lambda i: dict.fromkeys((1, 2, 3) if i == 0 else (0,), 10)),
        (Row("dsgd"), lambda i: {(i + 1) % 4: 5, (i + 2) % 4: 5}),
        (Row(DeepSqueeze(), topology="ring"), lambda i: {(i + 1) % 4: 10, (i - 1) % 4: 10}),
    ],
    ids=["ring", "chain", "star", "one-peer", "deep-squeeze"],
)
def test_a_replica_sends_to_its_neighbours_alone(ranks, row, peers):
    """In ten rounds: a message for each edge, with the notice; no collective at all."""
    for rank, (messages, collectives) in enumerate(ranks.run(4, on_the_wire, row, 11)):
        assert collectives == {}
        assert messages == peers(rank)


def test_busy_replicas_are_charged_for_what_they_send(ranks):
    d = 16 * 8  # bytes of a row: 6 + 2 values, each tensor padded to 64 bytes
    results = ranks.run(4, fit_quadratic, 1, Row("dsgd", topology="star"), [0.1] * 5)
    assert [result["traffic"]["bytes_sent"] for result in results] == [5 * 3 * d, 5 * d, 5 * d, 5 * d]
    simulated = fit_quadratic(0, 1, 4, Row("dsgd", topology="star"), [0.1] * 5)["traffic"]
    assert simulated["bytes_by_row"] == [5 * 3 * d, 5 * d, 5 * d, 5 * d]
    assert simulated["bytes_sent"] == 5 * 6 * d // 4


# ----------------------------------------------------------------------------------------------------------- stopping
class StopsAt(Callback):
    """Asks for an end, on one rank only."""

    def __init__(self, rank, step):
        self.rank, self.step, self.ended = rank, step, None

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            trainer.should_stop = True

    def on_train_end(self, trainer, *_):
        self.ended = trainer.global_step


def stops(rank, world_size, m, row, who, step):
    stopper = StopsAt(who, step)
    result = fit_quadratic(rank, world_size, m, row, [0.1] * 40, callbacks=(stopper,))
    return stopper.ended, result["rows"]


@pytest.mark.parametrize(
    ("row", "world", "m", "who", "hops"),
    [
        (Row("dsgd", topology="chain"), 4, 1, 0, 3),  # from end to end
        (Row("dsgd", topology="chain"), 4, 1, 1, 2),
        (Row("dsgd", topology="ring"), 3, 1, 2, 1),
        (Row("dsgd"), 4, 1, 3, 2),
        (Row(CHOCO(gamma=0.4), topology="ring"), 4, 1, 2, 2),
        (Row("dpsgd", topology="ring"), 2, 2, 1, 2),
        (Row("dsgd", topology="random_matching:5"), 4, 1, 0, None),
    ],
    ids=str,
)
def test_a_wish_to_stop_reaches_all_with_the_messages(ranks, row, world, m, who, hops):
    """All stop after the same step, once the notice must have reached the last; the result is that of so many steps."""
    results = ranks.run(world, stops, m, row, who, 5)
    ended = {end for end, _ in results}
    assert len(ended) == 1
    if hops is not None:
        assert ended == {5 + hops}
    reference = ranks.run(world, stops, m, row, who, 1000)
    rows = torch.cat([rows for _, rows in results], dim=1)
    torch.testing.assert_close(rows, torch.cat([rows for _, rows in reference], dim=1)[: len(rows)], rtol=0, atol=0)


def test_a_wish_in_the_middle_of_a_round_waits_for_its_messages(ranks):
    results = ranks.run(4, stops, 1, Row("dsgd", topology="chain", sync_period=3), 0, 5)
    assert {end for end, _ in results} == {15}  # noted in round 2, told in rounds 3 to 5


def test_several_wishes_stop_at_the_earliest(ranks):
    def both(rank, world_size):
        first, second = StopsAt(0, 5), StopsAt(3, 6)
        fit_quadratic(rank, world_size, 1, Row("dsgd", topology="chain"), [0.1] * 40, callbacks=(first, second))
        return first.ended

    assert set(ranks.run(4, both)) == {8}


# ------------------------------------------------------------------------------------------------------------- policies
@pytest.mark.parametrize(
    "options", [{"buffers": "average"}, {"optimizer_state": "average"}, {"optimizer_state": "reset"}], ids=str
)
@pytest.mark.parametrize("topology", ["complete", "ring"])
def test_policies_act_as_the_round_does(ranks, options, topology):
    """What lies beside the parameters is mixed with the same weights, and the same in every layout."""
    row = Row("dsgd", topology=topology, sync_period=2)
    runs = [ranks.run(world, fit_net, m, row, strategy=options) for m, world in ((4, 1), (2, 2), (1, 4))]
    for run in runs[1:]:
        torch.testing.assert_close(all_rows(run), all_rows(runs[0]), rtol=0, atol=1e-10)
    if topology == "complete":
        averaging = Row()
        averaging.strategy = lambda **kw: LocalSGDStrategy(2, **kw)
        same(runs[0][0], fit_net(0, 1, 4, averaging, strategy=options), atol=1e-10)


class Statistics(Callback):
    """Keeps a buffer of every replica before and after rounds."""

    def __init__(self):
        self.before, self.after = [], []

    def rows(self, trainer):
        replicas = trainer.strategy.replicas
        return torch.stack([replicas._float_buffers(row)[0].clone() for row in range(replicas.replicas_per_rank)])

    def on_before_round(self, trainer, module):
        self.before.append(self.rows(trainer))

    def on_after_round(self, trainer, module, group):
        self.after.append(self.rows(trainer))


@pytest.mark.parametrize(
    "row", [Row("dsgd", topology="ring", sync_period=2), Row(CHOCO(gamma=0.4), sync_period=2)], ids=["dsgd", "choco"]
)
def test_buffers_are_mixed_with_the_weights_of_the_round(row):
    statistics = Statistics()
    fit_net(0, 1, 4, row, strategy={"buffers": "average"}, callbacks=(statistics,), max_epochs=1)
    assert len(statistics.before) > 2
    for before, after in zip(statistics.before, statistics.after, strict=True):
        torch.testing.assert_close(after, Ring(4).matrix() @ before, rtol=0, atol=1e-12)
        assert after.std(dim=0).max() > 1e-6  # not averaged


def test_a_wish_to_stop_counts_gossip_steps_alone(ranks):
    """Buffers that are mixed along do not carry notices further: their edges are those of the step before."""

    def stops_with_buffers(rank, world_size):
        stopper = StopsAt(3, 5)
        row = Row("dsgd")
        fit_net(rank, world_size, 1, row, strategy={"buffers": "average"}, callbacks=(stopper,), max_epochs=3)
        return stopper.ended

    assert set(ranks.run(4, stops_with_buffers)) == {7}


@pytest.mark.parametrize("algorithm", [CHOCO(gamma=0.4), ECD(), DeepSqueeze(), DCD(), EFSign(), DSGD(), DPSGD()], ids=str)
def test_an_algorithm_trains_twice_from_the_start(algorithm):
    """Memories and counts of the first training are forgotten."""
    topology = "ring" if algorithm.needs_graph else "auto"
    first, second = (fit_net(0, 1, 3, Row(algorithm, topology=topology), max_epochs=1) for _ in range(2))
    same(first, second, atol=0)


@pytest.mark.parametrize("algorithm", ["dsgd", "dpsgd", "choco", "dcd", "ecd", "deep_squeeze", "ef_sign"])
def test_half_precision(algorithm):
    """A third has no exact form in bfloat16, and memories would lose what is small: sums are in single precision."""
    loader = DataLoader(Augmented(dtype=torch.bfloat16), batch_size=3)
    rows = fit(0, 1, 4, Row(algorithm), SmallNet(), loader, precision="bf16-true", max_epochs=2)["rows"]
    assert rows.dtype == torch.bfloat16
    assert torch.isfinite(rows).all()


def test_half_precision_stays_in_consensus():
    """A thousand gossip steps in bfloat16 move nothing that is equal."""
    communicator = Communicator(5)
    block = torch.randn(1, 100, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).repeat(5, 1)
    before = block.clone()
    for _ in range(1000):
        communicator.mix(block, Ring(5).matrix())
    assert torch.equal(block, before)


# ------------------------------------------------------------------------------------------------ ends and resumes
@pytest.mark.parametrize("row", [Row("dpsgd", sync_period=4), Row(CHOCO(gamma=0.4), sync_period=4), Row("dsgd", overlap=True)])
def test_messages_under_way_arrive_before_training_ends(ranks, row):
    """Training ends in the middle of a round; what was sent is received, and the run is that of one process."""
    results = ranks.run(4, fit_quadratic, 1, row, [0.1] * 10)
    torch.testing.assert_close(all_rows(results), fit_quadratic(0, 1, 4, row, [0.1] * 10)["rows"], rtol=0, atol=1e-12)


class Saves(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 5:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("algorithm", ["choco", "dcd", "ecd", "deep_squeeze", "dpsgd", "ef_sign"])
def test_another_number_of_replicas_starts_from_the_average_with_new_memories(algorithm, tmp_path):
    path = str(tmp_path / "four.ckpt")
    fit_net(0, 1, 4, Row(algorithm), callbacks=(Saves(path),), max_epochs=1)
    average = torch.load(path, weights_only=True)["state_dict"]
    starts = []

    class Start(Callback):
        def on_train_batch_start(self, trainer, *_):
            starts.append(trainer.strategy.replica_parameters())

    rows = fit_net(0, 1, 3, Row(algorithm), callbacks=(Start(),), ckpt_path=path)["rows"]
    assert torch.equal(starts[0], starts[0][:1].expand_as(starts[0]))
    names = [name for name, p in SmallNet().named_parameters() if p.requires_grad]
    expected = torch.cat([average[name].flatten() for name in names])
    torch.testing.assert_close(starts[0][0], expected, rtol=0, atol=1e-7)  # Lightning reads it before the module is double
    assert torch.isfinite(rows).all()


# ------------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: GossipStrategy("dsdg"), r"no gossip algorithm 'dsdg' \(did you mean 'dsgd'\?\)"),
        (lambda: GossipStrategy(3), "no gossip algorithm 3"),
        (lambda: GossipStrategy(topology="rign"), r"no topology 'rign' \(did you mean 'ring'\?\)"),
        (lambda: GossipStrategy(gossip_steps=0), "`gossip_steps` must be a whole number, at least 1"),
        (lambda: GossipStrategy(sync_period=0), "`sync_period` must be a whole number"),
        (lambda: GossipStrategy(overlap="yes"), "`overlap` must be True, False or None"),
        (lambda: GossipStrategy("dcd", gossip_steps=2), "DCD makes one gossip step for each gradient step"),
        (lambda: GossipStrategy("ecd", overlap=True), "ECD needs its neighbours' messages at once"),
        (lambda: GossipStrategy("dsgd", overlap=True, gossip_steps=2), "`overlap=True` makes one gossip step"),
        (lambda: GossipStrategy("ef_sign", topology="ring"), "EFSign has no graph"),
        (lambda: GossipStrategy("ef_sign", sync_period=2), "EFSign makes a round at every step"),
        (lambda: CHOCO(gamma=0), "`gamma`, the consensus step size, must be above 0 and at most 1; got 0"),
        (lambda: CHOCO(gamma=1.5), "got 1.5"),
        (lambda: DeepSqueeze(gamma=float("nan")), "got nan"),
        (lambda: CHOCO(compressor=LowRank(2)), "No consensus step size is known for LowRank"),
        (lambda: CHOCO(compressor="top_k:0"), "ratio"),
        (lambda: CHOCO(compressor="top_k:1.5"), "ratio"),
        (lambda: CHOCO(compressor="qsgd:1"), "bits"),
        (lambda: CHOCO(compressor="sing"), "sign"),
        (lambda: CHOCO(scope="layer"), "`scope` must be one of 'tensor', 'row'"),
        (lambda: CHOCO(min_numel=-1), "`min_numel` must be a whole number"),
        (lambda: CHOCO(x_hat_init="mean"), "`x_hat_init` must be one of 'start', 'zero'"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        make()
    assert "\n" not in str(error.value)


def test_unknown_options_name_the_nearest():
    with pytest.raises(TypeError, match="did you mean `gossip_steps`"):
        GossipStrategy(gossip_step=2)
    with pytest.raises(TypeError, match="an option of torch's DDP, which is not used: leave it out"):
        GossipStrategy(find_unused_parameters=True)
    with pytest.raises(ValueError, match=r"GossipStrategy never averages gradients.*: leave `ddp_kwargs` out"):
        GossipStrategy(ddp_kwargs={"find_unused_parameters": True})
    GossipStrategy(ddp_kwargs={})


def trains(strategy):
    warnings.filterwarnings("ignore")
    trainer = L.Trainer(accelerator="cpu", devices=1, strategy=strategy, max_steps=1, enable_checkpointing=False, **QUIET)
    trainer.fit(SmallNet(), DataLoader(Augmented(dtype=torch.float32), batch_size=3))


@pytest.mark.parametrize(
    ("options", "n", "sentence"),
    [
        ({"topology": [(0, 1), (2, 3)]}, 4, "connected|reaches|reach"),
        ({"topology": [[0.5, 0.5], [0.25, 0.75]]}, 2, "sum to"),
        ({"topology": "torus"}, 7, "prime|torus"),
        ({"topology": "hypercube"}, 6, "A hypercube has 2, 4, 8"),
        ({"topology": "social_network"}, 8, "32"),
        ({"topology": Ring(8)}, 4, "8 replicas, but there are 4"),
        ({"algorithm": "choco", "topology": "one_peer_exponential"}, 4, "CHOCO needs a symmetric and static mixing matrix"),
        ({"algorithm": "dcd", "topology": "random_matching"}, 4, "DCD needs a static mixing matrix"),
        ({"algorithm": "deep_squeeze", "topology": "exponential"}, 8, "DeepSqueeze needs a symmetric"),
    ],
    ids=str,
)
def test_graphs_that_do_not_fit_are_refused_before_training(options, n, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        trains(GossipStrategy(replicas_per_device=n, **options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: DCD("qsgd:2"), "DCD has no error feedback and diverges.*CHOCO"),
        (lambda: DCD("random_k:0.1"), "DCD has no error feedback"),
        (lambda: ECD("sign"), "ECD has no error feedback"),
        (lambda: CHOCO(gamma=0.1, compressor=RandomK(0.1, unbiased=True)), "unbiased=False"),
        (lambda: DeepSqueeze(compressor=QSGD(2, unbiased=True)), "unbiased=False"),
    ],
)
def test_compressors_that_diverge_are_warned_of(make, sentence):
    with pytest.warns(UserWarning, match=sentence):
        make()


class Half(Compressor):
    """One of a user."""

    def compress(self, x, seeds):
        return x.half().reshape(len(x), -1).view(torch.uint8)

    def decompress(self, payload, shape, dtype):
        return payload.view(torch.half).to(dtype).view(-1, *shape)

    def nbytes(self, shape, dtype=torch.float32):
        return 2 * math.prod(shape)


@pytest.mark.parametrize(
    "make",
    [
        *(CHOCO, DCD, ECD, DeepSqueeze, lambda: DCD("top_k:0.1"), lambda: DCD("sign")),
        *(lambda: DCD(Half()), lambda: ECD(Half()), lambda: CHOCO(gamma=0.1, compressor=Half())),
    ],
)
def test_others_are_not(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make()


@pytest.mark.parametrize("algorithm", [DCD, ECD])
def test_compressors_without_feedback_are_unbiased(algorithm):
    """Names and objects alike."""
    for compressor in ("qsgd:8", QSGD(8), QSGD(8, unbiased=True)):
        assert algorithm(compressor).compressor.unbiased
    with pytest.warns(UserWarning, match="as coarse as RandomK"):
        assert algorithm(RandomK(0.1)).compressor.unbiased


def test_low_rank_has_no_rows():
    with pytest.raises(ValueError, match="compresses matrices, and a whole row is none"):
        CHOCO(gamma=0.1, compressor="low_rank", scope="row")


def test_a_networkx_graph_and_a_matrix_are_graphs():
    for topology in (nx.cycle_graph(4), Ring(4).matrix(), Ring(4).matrix().tolist(), [(0, 1), (1, 2), (2, 3), (3, 0)]):
        same(
            fit_quadratic(0, 1, 4, Row("dsgd", topology=topology), ETAS),
            fit_quadratic(0, 1, 4, Row(DSGD(), topology="ring"), ETAS),
        )


def test_ranks_with_other_graphs_are_refused(ranks):
    def different(rank, world_size):
        row = Row(DPSGD(), topology="ring" if rank else "chain")
        fit_quadratic(rank, world_size, 1, row, ETAS)

    with pytest.raises(AssertionError, match="other strategy options than rank 0"):
        ranks.run(4, different)


def test_names_for_the_trainer():
    for name in ("gossip", "gossip_spawn", "gossip_fork", "gossip_notebook"):
        trainer = L.Trainer(strategy=name, accelerator="cpu", devices=1, plugins=[PoolEnvironment(0, 1)], **QUIET)
        assert isinstance(trainer.strategy, GossipStrategy)


def test_a_gossip_algorithm_needs_a_strategy_with_a_graph():
    with pytest.raises(ValueError, match=r"DSGD talks to neighbours in a graph, .* use `GossipStrategy\(DSGD\(...\)\)`"):
        ReplicaStrategy(DSGD(), replicas_per_device=4)
