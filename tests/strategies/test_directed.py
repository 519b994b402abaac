"""Push-sum, RelaySum and PowerGossip in training: who sends to whom, what is evaluated, what is refused."""

from __future__ import annotations

import lightning as L
import networkx as nx
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from lightning_distopt import ConsensusControl, GossipStrategy, PowerGossip, PushSum, RelaySum
from lightning_distopt.topologies import Ring
from tests.conformance.directed_rows import UNEVEN
from tests.conformance.problems import Augmented, Quadratic, SmallNet, all_rows, fit, fit_net, fit_quadratic
from tests.strategies.test_gossip import Row, Saves, on_the_wire, same, stops, trains

ETAS = [0.2] * 5 + [0.1] * 4 + [0.0] + [0.05] * 4
PUSHED = Row(PushSum(), topology=UNEVEN)


def replica_bytes(numel: int) -> int:
    return 8 * numel


# ------------------------------------------------------------------------------------------------------ who talks to whom
@pytest.mark.parametrize(
    ("row", "peers"),
    [
        (PUSHED, lambda i: {listener: 10 for sender, listener in UNEVEN if sender == i}),
        (Row("relay_sum", topology="chain"), lambda i: {j: 10 for j in (i - 1, i + 1) if 0 <= j < 4}),
        (Row("relay_sum", topology="star"), lambda i: dict.fromkeys((1, 2, 3) if i == 0 else (0,), 10)),
        (Row("power_gossip"), lambda i: {(i + 1) % 4: 10, (i - 1) % 4: 10}),
    ],
    ids=["push-sum", "chain", "star", "power-gossip"],
)
def test_a_replica_sends_to_its_neighbours_alone(ranks, row, peers):
    """In ten rounds: a message for each edge, with the notice; no collective at all."""
    for rank, (messages, collectives) in enumerate(ranks.run(4, on_the_wire, row, 11)):
        assert collectives == {}
        assert messages == peers(rank)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PUSHED, [5 * 16 * edges for edges in (3, 1, 1, 1)]),  # rows with padding: 6 and 2 values in 16
        (Row("relay_sum", topology="star"), [5 * 16 * edges for edges in (3, 1, 1, 1)]),
        (Row("power_gossip"), [2 * (3 * (2 + 2) + 2 * (3 + 2))] * 4),  # q and p of a 3 x 2 matrix, and a bias of 2
        (Row("power_gossip", topology="star"), [edges * (3 * (2 + 2) + 2 * (3 + 2)) for edges in (3, 1, 1, 1)]),
    ],
    ids=["push-sum", "relay-sum", "power-gossip", "power-gossip-star"],
)
def test_bytes_of_five_rounds(ranks, row, expected):
    expected = [replica_bytes(numel) for numel in expected]
    sent = [result["traffic"]["bytes_sent"] for result in ranks.run(4, fit_quadratic, 1, row, [0.1] * 5)]
    assert sent == expected
    assert fit_quadratic(0, 1, 4, row, [0.1] * 5)["traffic"]["bytes_by_row"] == expected


@pytest.mark.parametrize(
    ("row", "world", "m", "who", "hops"),
    [
        (PUSHED, 4, 1, 1, 3),  # 1 -> 2 -> 3 -> 0
        (Row("relay_sum", topology="chain"), 4, 1, 0, 3),
        (Row("relay_sum", topology="chain"), 2, 2, 1, 2),
        (Row("power_gossip"), 4, 1, 2, 2),
    ],
    ids=["push-sum", "relay-sum", "relay-sum-two-ranks", "power-gossip"],
)
def test_a_wish_to_stop_reaches_all_with_the_messages(ranks, row, world, m, who, hops):
    results = ranks.run(world, stops, m, row, who, 5)
    assert {end for end, _ in results} == {5 + hops}


@pytest.mark.parametrize("row", [Row("power_gossip", topology="torus:4"), Row("relay_sum"), Row("push_sum")], ids=str)
def test_sixteen_replicas_are_the_same_on_one_and_on_eight_ranks(ranks, row):
    runs = [ranks.run(world, fit_quadratic, 16 // world, row, ETAS) for world in (1, 8)]
    torch.testing.assert_close(all_rows(runs[1]), all_rows(runs[0]), rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ what is evaluated
class Looks(Callback):
    """Keeps what replicas and their average are after each step, and the weights."""

    def __init__(self):
        self.rows, self.averages, self.weights, self.before = [], [], [], []

    def on_before_round(self, trainer, module):
        self.before.append(trainer.strategy.replicas.matrix())

    def on_train_batch_end(self, trainer, module, *_):
        self.rows.append(trainer.strategy.replica_parameters())
        self.weights.append(trainer.strategy.algorithm.push_weights)
        with trainer.strategy.average_parameters():
            self.averages.append(torch.cat([p.detach().flatten() for p in module.parameters()]))


def looked(rank, world_size, m, **options):
    looks = Looks()
    fit_quadratic(rank, world_size, m, PUSHED, ETAS, callbacks=(looks,), **options)
    return looks


def test_the_model_of_push_sum_is_the_mean_of_the_numerators():
    looks = looked(0, 1, 4)
    for z, w, average in zip(looks.rows, looks.weights, looks.averages, strict=True):
        torch.testing.assert_close(average, (w[:, None] * z).mean(dim=0), rtol=0, atol=1e-12)
    assert (looks.averages[-1] - looks.rows[-1].mean(dim=0)).abs().max() > 1e-3


def test_a_checkpoint_of_push_sum_holds_it(tmp_path):
    looks, path = Looks(), str(tmp_path / "push_sum.ckpt")
    fit_quadratic(0, 1, 4, PUSHED, ETAS, callbacks=(looks, Saves(path)))
    saved = torch.load(path, weights_only=True)["state_dict"]
    torch.testing.assert_close(torch.cat([saved["weight"].flatten(), saved["bias"]]), looks.averages[4], rtol=0, atol=1e-12)


def test_callbacks_see_the_debiased_rows_before_a_round():
    """Rows differ there by the step that was made, not by the weights, of which the least is below one half."""
    looks = looked(0, 1, 4)
    assert looks.weights[-1].min() < 0.6
    for before, rows in zip(looks.before[9:10], looks.rows[8:9], strict=True):  # the step with learning rate zero
        torch.testing.assert_close(before, rows, rtol=0, atol=1e-12)


class Manual(Quadratic):
    """Steps twice for each batch."""

    def __init__(self, *args):
        super().__init__(*args)
        self.automatic_optimization = False
        self.points, self.gradients, self.weights = [], [], []

    def training_step(self, batch, batch_idx):
        for _ in range(2):
            optimizer = self.optimizers()
            self.points.append(self.bias.detach().clone())
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.gradients.append(self.bias.grad.clone())
            self.weights.append(self.trainer.strategy.algorithm.push_weights[self.trainer.global_rank])
            optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def manual(rank, world_size):
    a = torch.ones(world_size * 8, 8, dtype=torch.float64)
    loader = DataLoader(torch.utils.data.TensorDataset(a, a.cumsum(0)), batch_size=2)
    module = Manual(ETAS)
    rows = fit(rank, world_size, 1, PUSHED, module, loader, precision="64-true", max_epochs=1)["rows"]
    return rows[:, 0, 6:], *(torch.stack(values) for values in (module.points, module.gradients, module.weights))


def test_with_manual_optimization_every_step_starts_at_the_debiased_point(ranks):
    for rows, points, gradients, weights in ranks.run(4, manual):
        torch.testing.assert_close(points[2::2], rows[:-1], rtol=0, atol=1e-12)  # the first step of each batch
        stepped = points - 0.1 * gradients / weights[:, None]
        torch.testing.assert_close(points[1::2], stepped[::2], rtol=0, atol=1e-12)  # the second
        assert weights.std() > 0.1


@pytest.mark.parametrize("layout", [(4, 1), (1, 4)], ids=str)
def test_a_replica_that_is_not_finite_goes_on_from_the_debiased_rows_of_others(ranks, layout):
    m, world_size = layout

    def broken(rank, world_size, m):
        class Breaks(Looks):
            def on_before_zero_grad(self, trainer, module, optimizer):
                here = trainer.strategy.replicas
                if trainer.strategy.steps == 6 and here.first_replica + here.active == 1:
                    module.bias.data.fill_(float("nan"))

        looks = Breaks()
        row = Row(PushSum(), topology=UNEVEN)
        fit_quadratic(rank, world_size, m, row, ETAS, callbacks=(looks,), strategy={"nonfinite": "skip"})
        return looks.before[6], looks.rows

    results = ranks.run(world_size, broken, m)
    before = torch.cat([rows for rows, _ in results])
    torch.testing.assert_close(before[1], before[[0, 2, 3]].mean(dim=0), rtol=0, atol=1e-12)
    assert all(torch.isfinite(torch.stack(rows)).all() for _, rows in results)


def test_consensus_control_measures_debiased_rows():
    """With many gossip steps the distance goes to zero, though the numerators never agree."""
    control = ConsensusControl("efficient", 1e-3, max_steps=400)
    rows = fit_quadratic(0, 1, 4, PUSHED, ETAS, callbacks=(control,))["rows"]
    assert control.rounds_missed == 0
    assert control.steps_spent > len(ETAS)
    assert rows[3].std(dim=0).max() < 0.05


# ------------------------------------------------------------------------------------------------------- life of a training
@pytest.mark.parametrize(
    "row", [PUSHED, Row(RelaySum()), Row(RelaySum(), topology="chain"), Row(PowerGossip()), Row(PowerGossip(2))], ids=repr
)
def test_an_algorithm_trains_twice_from_the_start(row):
    first, second = (fit_net(0, 1, 4, row, max_epochs=1) for _ in range(2))
    same(first, second, atol=0)


@pytest.mark.parametrize("row", [PUSHED, Row("relay_sum"), Row("power_gossip")], ids=repr)
def test_half_precision(row):
    loader = DataLoader(Augmented(dtype=torch.bfloat16), batch_size=3)
    rows = fit(0, 1, 4, row, SmallNet(), loader, precision="bf16-true", max_epochs=2)["rows"]
    assert rows.dtype == torch.bfloat16
    assert torch.isfinite(rows).all()


@pytest.mark.parametrize("algorithm", ["push_sum", "relay_sum", "power_gossip"])
def test_another_number_of_replicas_starts_from_the_average_with_new_memories(algorithm, tmp_path):
    path, starts = str(tmp_path / "four.ckpt"), []

    class Start(Callback):
        def on_train_batch_start(self, trainer, *_):
            starts.append(trainer.strategy.replica_parameters())

    fit_net(0, 1, 4, Row(algorithm), callbacks=(Saves(path),), max_epochs=1)
    rows = fit_net(0, 1, 3, Row(algorithm), callbacks=(Start(),), ckpt_path=path)["rows"]
    assert torch.equal(starts[0], starts[0][:1].expand_as(starts[0]))
    assert torch.isfinite(rows).all()
    # Two replicas agree after every round of RelaySum; what an old memory held would show.
    pair = fit_net(0, 1, 2, Row(algorithm), ckpt_path=path)["rows"]
    assert (pair[0, 0] - starts[0][0]).abs().max() < 0.5


@pytest.mark.parametrize("options", [{"buffers": "average"}, {"optimizer_state": "average"}], ids=str)
@pytest.mark.parametrize("row", [PUSHED, Row("relay_sum"), Row("power_gossip")], ids=repr)
def test_policies_are_the_same_in_every_layout(ranks, row, options):
    runs = [ranks.run(world, fit_net, m, row, strategy=options, max_epochs=2) for m, world in ((4, 1), (1, 4))]
    torch.testing.assert_close(all_rows(runs[1]), all_rows(runs[0]), rtol=0, atol=1e-10)


def test_the_default_graph_of_relay_sum_is_a_tree():
    same(fit_quadratic(0, 1, 4, Row("relay_sum"), ETAS), fit_quadratic(0, 1, 4, Row("relay_sum", topology="binary_tree"), ETAS))
    row = Row("relay_sum", topology=nx.minimum_spanning_tree(nx.complete_graph(4)))
    same(fit_quadratic(0, 1, 4, row, ETAS), fit_quadratic(0, 1, 4, Row("relay_sum", topology="star"), ETAS))


# ------------------------------------------------------------------------------------------------------------- bad input
ROWS = [[0.5, 0.25, 0.25], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]  # their sums are 1
COLUMNS = [[0.5, 0.5, 0.0], [0.25, 0.5, 0.5], [0.25, 0.0, 0.5]]


@pytest.mark.parametrize(
    ("options", "n", "sentence"),
    [
        ({"algorithm": "push_sum", "topology": ROWS}, 3, r"push-sum would be biased. Transpose it: entry \[i, j\]"),
        ({"algorithm": "dsgd", "topology": COLUMNS}, 3, "each column do: push-sum alone can use it .`algorithm='push_sum'`"),
        ({"algorithm": "dpsgd", "topology": nx.DiGraph(UNEVEN)}, 4, "Replica 0 sends to 3 replicas .* Use push-sum"),
        ({"algorithm": "push_sum", "topology": [(0, 1), (1, 2)]}, 3, "not connected: there is no path from replica 1 to 0"),
        ({"algorithm": "push_sum", "topology": [[0.5, 0.6], [0.4, 0.6]]}, 2, "each column must sum to 1"),
        ({"algorithm": "relay_sum", "topology": "ring"}, 4, "RelaySum relays sums along a tree, and Ring.4. has a cycle"),
        ({"algorithm": "relay_sum", "topology": Ring(3).matrix()}, 3, "has a cycle: use 'chain', 'star' or 'binary_tree'"),
        ({"algorithm": "power_gossip", "topology": "random_matching"}, 4, "PowerGossip needs a static mixing matrix"),
        ({"algorithm": "power_gossip", "topology": "exponential"}, 8, "PowerGossip needs a symmetric"),
    ],
    ids=lambda value: ", ".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_graphs_that_do_not_fit_are_refused_before_training(options, n, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        trains(GossipStrategy(replicas_per_device=n, **options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"algorithm": "relay_sum", "gossip_steps": 2}, "RelaySum makes one gossip step for each gradient step"),
        ({"algorithm": "relay_sum", "overlap": True}, "RelaySum needs its neighbours' messages at once"),
        ({"algorithm": "push_sum", "overlap": True}, "PushSum needs its neighbours' messages at once"),
        ({"algorithm": "power_gossip", "overlap": True}, "PowerGossip needs its neighbours' messages at once"),
        ({"algorithm": "pushsum"}, r"no gossip algorithm 'pushsum' \(did you mean 'push_sum'\?\)"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        GossipStrategy(**options)


class Fails(torch.optim.SGD):
    """Fails in its sixth step."""

    count = 0

    def step(self, closure=None):
        if closure is not None:
            closure()
        Fails.count += 1
        if Fails.count == 6:
            raise RuntimeError("The sixth step fails.")
        super().step()


class Failing(Quadratic):
    """Trains with it."""

    def configure_optimizers(self):
        return Fails(self.parameters(), lr=0.1)


def failed(rank, world_size, m):
    class Look(Looks):
        def on_exception(self, trainer, module, exception):
            self.left = trainer.strategy.replicas.matrix()

    Fails.count = 0
    looks, n = Look(), m * world_size
    a = torch.ones(n * 8, 8, dtype=torch.float64)
    loader = DataLoader(torch.utils.data.TensorDataset(a, a.cumsum(0)), batch_size=2)
    with pytest.raises(RuntimeError, match="sixth step fails"):
        fit(rank, world_size, m, PUSHED, Failing(ETAS), loader, callbacks=(looks,), precision="64-true", max_epochs=5)
    return (looks.left - looks.rows[-1])[: max(1, m - 1)]


@pytest.mark.parametrize("layout", [(4, 1), (1, 4)], ids=str)
def test_a_step_that_fails_leaves_the_debiased_point(ranks, layout):
    """With four in one process, the last of which steps first, the sixth step is the third's in the second batch."""
    for left in ranks.run(layout[0], failed, layout[1]):
        assert left.abs().max() < 1e-12


def test_lbfgs_is_refused_where_push_sum_takes_gradients_elsewhere(ranks):
    class Quasi(SmallNet):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    def start(rank, world_size):
        loader = DataLoader(Augmented(), batch_size=3)
        L.seed_everything(0, verbose=False)
        fit(rank, world_size, 1, PUSHED, Quasi(), loader, precision="64-true", max_epochs=1)

    with pytest.raises(AssertionError, match="LBFGS takes gradients at the point that it steps from"):
        ranks.run(4, start)
