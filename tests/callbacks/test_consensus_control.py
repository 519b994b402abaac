"""`ConsensusControl`: its decisions are those of the equations, in every layout, and nobody else notices it."""

from __future__ import annotations

import json
import math
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_distopt import CHOCO, DCD, DPSGD, DSGD, ConsensusControl, GossipStrategy, LocalSGDStrategy
from lightning_distopt.callbacks import consensus_control
from lightning_distopt.communication import all_reduce_bytes
from tests.conformance.case import Case
from tests.conformance.problems import (
    LAYOUTS,
    QUIET,
    Augmented,
    SmallNet,
    all_rows,
    fit,
    fit_net,
    fit_quadratic,
    quadratic_gradients,
)
from tests.conformance.test_equations import start
from tests.oracles import local_sgd, topologies
from tests.strategies.test_coupling import Collectives

N = 4
ETAS = [0.2] * 5 + [0.1] * 4 + [0.0] + [0.05] * 4  # decays before steps 5, 9; then up, and down to no more
W = topologies.chain(N)
BYTES = 16 * 8  # of a row: 6 + 2 parameters in doubles, each padded to 64 bytes


def gossip(name: str = "controlled", **options) -> Case:
    options = {"algorithm": "dsgd", "topology": "chain", **options}
    return Case(name, lambda **kw: GossipStrategy(**options, **kw), oracle=None, rounds=None)


PLAIN = gossip("plain")


class Notes(L.Callback):
    """Notes after every batch what the control has logged, and what it has counted."""

    def __init__(self, control):
        self.control, self.logged, self.totals = control, [], []

    def on_train_batch_end(self, trainer, *args):
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("consensus/")})
        self.totals.append((self.control.rounds, self.control.steps_spent, self.control.rounds_missed))


def controlled(rank, world_size, m, case, options, etas=ETAS, train=fit_quadratic, **more):
    control = ConsensusControl(**options)
    notes = Notes(control)
    arguments = (etas,) if train is fit_quadratic else ()
    more = {"log_every_n_steps": 1, **more, "callbacks": (control, notes, *more.get("callbacks", ()))}
    result = train(rank, world_size, m, case, *arguments, **more)
    return {**result, "logged": notes.logged, "totals": notes.totals, "xi_max": control.xi_max, "phi": control._phi}


def here(case, options, **more):
    """Train in this process."""
    return controlled(0, 1, N, case, options, **more)


# ------------------------------------------------------------------------------------------------------------- equations
def xi(X):
    return np.sqrt(np.mean(np.sum((X - X.mean(axis=0)) ** 2, axis=1)))


def transcription(target, factor, xi_max=None, phase=lambda t, epoch: 0, outside="gossip", H=1, k=1, least=1, most=100):
    """Section 5.4.3 in matrix form, on the quadratics; returns the iterates, and for every round what was spent and seen."""
    gradients, optimizer = quadratic_gradients(N, len(ETAS), 2), local_sgd.SGD(0.9, 0.01)
    X, history, seen = np.tile(start(), (N, 1)), [], []
    ema, current = None, "none yet"
    for t, eta in enumerate(ETAS):
        if t % H == 0:
            if phase(t, 0) != current:
                current, ema = phase(t, 0), None
            phis = []
        G = np.array([gradients(i, t, X[i]) for i in range(N)])
        phis.append(np.mean(np.linalg.norm(G, axis=1)))
        X = optimizer.step(X, G, eta)
        if (t + 1) % H == 0 and current is None:
            if outside == "average":
                X = np.tile(X.mean(axis=0), (N, 1))
            for _ in range(k if outside == "gossip" else 0):
                X = W @ X
            seen.append((k if outside == "gossip" else 0, None, None))
        elif (t + 1) % H == 0:
            for phi in phis:
                ema = phi if ema is None else 0.9 * ema + 0.1 * phi
            goal = factor * (xi_max[current] if target == "constant" else ema)
            done, measure = 0, math.inf
            while done < least or (measure > goal and done < most):
                Y, done = W @ X, done + 1
                measure = np.sqrt(np.mean(np.sum((Y - X) ** 2, axis=1))) if target == "efficient" else xi(Y)
                X = Y
            seen.append((done, measure, goal))
        history.append(X)
    return np.array(history), seen


CASES = {
    "constant": ({"target": "constant", "factor": 0.5, "reference": 0.4}, {"xi_max": {0: 0.4}}, {}),
    "adaptive": ({"target": "adaptive", "factor": 0.02}, {}, {}),
    "efficient": ({"target": "efficient", "factor": 0.01}, {}, {}),
    "adaptive_local_steps": ({"target": "adaptive", "factor": 0.03}, {"H": 3}, {"sync_period": 3}),
    "efficient_two_or_three_steps": (
        {"target": "efficient", "factor": 0.01, "min_steps": 2, "max_steps": 3},
        {"least": 2, "most": 3},
        {},
    ),
    "phases_reset_the_average": (
        {"target": "adaptive", "factor": 0.02, "phases": ["step:0-4", "step:4-7", "step:9-"], "outside": "average"},
        {"phase": lambda t, _: 0 if t < 4 else 1 if t < 7 else None if t < 9 else 2, "outside": "average"},
        {},
    ),
    "gossip_outside": (
        {"target": "efficient", "factor": 0.005, "phases": "step:3-8"},
        {"phase": lambda t, _: 0 if 3 <= t < 8 else None, "k": 2},
        {"gossip_steps": 2},
    ),
    "nothing_outside": (
        {"target": "adaptive", "factor": 0.05, "phases": "lr_decay:2", "outside": "nothing"},
        {"phase": lambda t, _: 0 if 5 <= t < 9 else None, "outside": "nothing"},
        {},
    ),
    "local_steps_straddle_phases": (  # rounds start at 0, 3, 6, 9
        {"target": "efficient", "factor": 0.01, "phases": "step:4-7", "outside": "average"},
        {"phase": lambda t, _: 0 if t == 6 else None, "outside": "average", "H": 3},
        {"sync_period": 3},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS[N], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_equations(ranks, name, layout):
    options, told, strategy = CASES[name]
    m, world_size = layout
    results = ranks.run(world_size, controlled, m, gossip(**strategy), options)
    expected, seen = transcription(options["target"], options["factor"], **told)
    np.testing.assert_allclose(all_rows(results).numpy(), expected, rtol=0, atol=1e-10)
    H, kind = told.get("H", 1), "estimate" if options["target"] == "efficient" else "distance"
    spent = [done for done, _, _ in seen]
    if "two_or_three" not in name:
        assert len({done for done, measure, _ in seen if measure is not None}) > (name != "local_steps_straddle_phases")
    for result in results:
        for r, (done, measure, goal) in enumerate(seen):
            logged = result["logged"][H * r + H - 1]
            assert logged["consensus/gossip_steps"] == done
            if measure is None:  # nothing of an earlier round
                assert all(math.isnan(value) for key, value in logged.items() if key != "consensus/gossip_steps")
            else:
                assert logged[f"consensus/{kind}"] == pytest.approx(measure, rel=1e-9, abs=1e-12)
                assert logged["consensus/target"] == pytest.approx(goal, rel=1e-12)
                if options["target"] != "constant":
                    assert logged["consensus/phi"] == pytest.approx(goal / options["factor"], rel=1e-12)
        controlled_rounds = [one for one in seen if one[1] is not None]
        missed = sum(measure > goal for _, measure, goal in controlled_rounds)
        totals = (len(controlled_rounds), sum(done for done, _, _ in controlled_rounds), missed)
        assert result["totals"][-1] == totals
        # In a chain of four the two in the middle send two messages, the others one, in each gossip step.
        averages = sum(told.get("outside") == "average" and measure is None for _, measure, _ in seen)
        sent = [degree * sum(spent) * BYTES + averages * all_reduce_bytes(16, 8, N) for degree in (1, 2, 2, 1)]
        assert result["traffic"]["bytes_by_row"] in [sent[k : k + m] for k in range(0, N, m)]


def test_min_steps_are_made_where_none_is_needed():
    result = here(PLAIN, {"factor": math.inf, "min_steps": 3})
    assert [line["consensus/gossip_steps"] for line in result["logged"]] == [3.0] * len(ETAS)
    expected = here(gossip(gossip_steps=3), {"target": "record"})
    torch.testing.assert_close(result["rows"], expected["rows"], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------- degenerate cases
@pytest.mark.parametrize("algorithm", [DSGD, lambda: CHOCO(0.4, "sign")], ids=["dsgd", "choco"])
@pytest.mark.parametrize("layout", LAYOUTS[N], ids=str)
def test_any_distance_is_fine_is_no_control(ranks, layout, algorithm):
    m, world_size = layout
    case = gossip(algorithm=algorithm(), topology="ring")
    without = ranks.run(world_size, fit_net, m, case)
    for target, reference in (("constant", 1.0), ("adaptive", None), ("efficient", None)):
        options = {"target": target, "factor": math.inf, "reference": reference}
        results = ranks.run(world_size, controlled, m, case, options, train=fit_net)
        for one, other in zip(results, without, strict=True):
            torch.testing.assert_close(one["rows"], other["rows"], rtol=0, atol=0)
            torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=0)
            assert one["traffic"]["bytes_sent"] == other["traffic"]["bytes_sent"]
            assert one["metrics"]["loss"] == other["metrics"]["loss"]


def test_xi_max_itself_is_no_control():
    recorded = here(PLAIN, {"target": "record"})
    result = here(PLAIN, {"target": "constant", "factor": 1.0, "reference": recorded["xi_max"]["always"]})
    torch.testing.assert_close(result["rows"], recorded["rows"], rtol=0, atol=0)
    assert result["totals"][-1] == (len(ETAS), len(ETAS), 0)


def test_a_tiny_target_is_exact_averaging():
    case = Case("local_sgd", lambda **kw: LocalSGDStrategy(1, average="parameters", **kw), oracle=None, rounds=None)
    exact = fit_quadratic(0, 1, N, case, ETAS)["rows"]
    for options in ({"target": "constant", "factor": 1e-13, "reference": 1.0}, {"factor": 1e-14}):
        rows = here(PLAIN, {**options, "max_steps": 400})["rows"]
        torch.testing.assert_close(rows, exact, rtol=0, atol=1e-11)


@pytest.mark.parametrize("layout", LAYOUTS[N], ids=str)
def test_outside_average_is_parameter_averaging(ranks, layout):
    m, world_size = layout
    case = Case("local_sgd", lambda **kw: LocalSGDStrategy(2, average="parameters", **kw), oracle=None, rounds=None)
    expected = ranks.run(world_size, fit_net, m, case)
    options = {"phases": "step:1000-", "outside": "average"}
    results = ranks.run(world_size, controlled, m, gossip(sync_period=2), options, train=fit_net)
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one["rows"], other["rows"], rtol=0, atol=0)
        assert one["traffic"]["rounds"] == other["traffic"]["rounds"]
        assert one["traffic"]["bytes_sent"] == other["traffic"]["bytes_sent"]


def test_outside_nothing_is_independence():
    alone = here(gossip(sync_period=1000), {"target": "record"}, train=fit_net)
    result = here(gossip(sync_period=2), {"phases": "step:1000-", "outside": "nothing"}, train=fit_net)
    torch.testing.assert_close(result["rows"], alone["rows"], rtol=0, atol=0)
    assert result["traffic"]["rounds"] == result["traffic"]["bytes_sent"] == 0
    assert result["logged"][-1] == {"consensus/gossip_steps": 0.0}


def test_efficient_control_of_dpsgd_looks_at_gossip_alone():
    gradients, optimizer = quadratic_gradients(N, len(ETAS), 2), local_sgd.SGD(0.9, 0.01)
    X, history, spent, ema = np.tile(start(), (N, 1)), [], [], None
    for t, eta in enumerate(ETAS):
        G = np.array([gradients(i, t, X[i]) for i in range(N)])
        phi = np.mean(np.linalg.norm(G, axis=1))
        ema = phi if ema is None else 0.9 * ema + 0.1 * phi
        Delta, theta, done = optimizer.step(X, G, eta) - X, math.inf, 0
        while theta > 0.01 * ema:
            theta, X, done = np.sqrt(np.mean(np.sum((W @ X - X) ** 2, axis=1))), W @ X, done + 1
        X = X + Delta
        history.append(X)
        spent.append(done)
    result = here(gossip(algorithm=DPSGD()), {"factor": 0.01})
    np.testing.assert_allclose(result["rows"].numpy(), history, rtol=0, atol=1e-10)
    assert [line["consensus/gossip_steps"] for line in result["logged"]] == spent
    assert len(set(spent)) > 1


def test_one_replica_has_nobody_to_gossip_with():
    plain = fit_net(0, 1, 1, PLAIN)
    result = controlled(0, 1, 1, PLAIN, {}, train=fit_net)
    torch.testing.assert_close(result["rows"], plain["rows"], rtol=0, atol=0)
    assert result["totals"][-1] == (0, 0, 0)


# --------------------------------------------------------------------------------------------------------------- phases
class Scheduled(SmallNet):
    """With a learning rate given step by step."""

    def __init__(self, rates):
        super().__init__()
        self.rates = rates

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: self.rates[min(t, len(self.rates) - 1)])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def phases_of(phases, rates=(0.1,), accumulate=1):
    """Return the batches whose round was controlled, in three epochs of six batches."""
    control = ConsensusControl(factor=math.inf, phases=phases, outside="gossip" if phases is None else "average")
    seen = []

    class See(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(control._phase)

    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=GossipStrategy(replicas_per_device=2),
        callbacks=[control, See()],
        max_epochs=3,
        enable_checkpointing=False,
        accumulate_grad_batches=accumulate,
        **QUIET,
    )
    trainer.fit(Scheduled(rates), DataLoader(Augmented(36, torch.float32), batch_size=3))
    return {k: [t for t, phase in enumerate(seen) if phase == k] for k in set(seen) - {None}}


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        (None, {0: range(18)}),
        ("step:0-5", {0: range(5)}),
        ("step:4-", {0: range(4, 18)}),
        ("step:7", {0: [7]}),
        ("epoch:1", {0: range(6, 12)}),
        ("epoch:1-3", {0: range(6, 18)}),
        (["epoch:0", "step:3-8", "epoch:2-"], {0: range(6), 1: range(6, 8), 2: range(12, 18)}),
        ("epoch:7-9", {}),
    ],
)
def test_phases_by_step_and_epoch(phases, expected):
    assert phases_of(phases) == {k: list(steps) for k, steps in expected.items()}


WARMUP = [0.02, 0.06, 0.1]
RATES = [*WARMUP, *[0.1] * 3, *[0.05] * 6, *[0.01] * 6]  # decays before steps 6 and 12


def test_phases_between_decays_of_the_learning_rate():
    between = {1: range(6), 2: range(6, 12), 3: range(12, 18)}
    for phase, steps in between.items():
        assert phases_of(f"lr_decay:{phase}", RATES) == {0: list(steps)}
    assert phases_of(["lr_decay:1", "lr_decay:2-"], RATES) == {0: list(range(6)), 1: list(range(6, 18))}
    assert phases_of("lr_decay:1", WARMUP) == {0: list(range(18))}
    assert phases_of("lr_decay:3", [0.1] * 4 + [0.05] * 2 + [0.07] * 2 + [0.03]) == {0: list(range(8, 18))}  # it rises between
    assert phases_of("lr_decay:2", [0.1] * 4 + [0.09] * 4 + [0.05] * 2 + [0.03]) == {0: list(range(8, 18))}  # steps add up
    cosine = [(1 + math.cos(math.pi * t / 18)) / 2 for t in range(18)]
    assert phases_of("lr_decay:1", cosine) == {0: list(range(9))}


def test_a_phase_starts_with_a_step_not_within_one():
    # Accumulating four batches makes steps of 4 and 2 batches in each epoch; the rate decays after the second.
    assert phases_of("lr_decay:1", [0.1, 0.1, 0.05], accumulate=4) == {0: list(range(6))}
    assert phases_of("step:1-4", accumulate=4) == {0: list(range(4, 12))}


# ------------------------------------------------------------------------------------------------------------ references
def test_recording_and_controlling(ranks, tmp_path):
    file = str(tmp_path / "deep" / "xi_max.json")
    phases = ["lr_decay:1", "lr_decay:2"]
    for m, world_size in LAYOUTS[N]:
        options = {"target": "record", "reference": file, "phases": phases}
        results = ranks.run(world_size, controlled, m, PLAIN, options)
        without = ranks.run(world_size, fit_quadratic, m, PLAIN, ETAS)
        rows = all_rows(results)
        torch.testing.assert_close(rows, all_rows(without), rtol=0, atol=0)
        distances = [xi(X) for X in rows.numpy()]
        expected = {"always": max(distances), "lr_decay:1": max(distances[:5]), "lr_decay:2": max(distances[5:9])}
        for result in results:
            assert result["xi_max"] == pytest.approx(expected, rel=1e-12)
            logged = [line["consensus/distance"] for line in result["logged"]]
            assert logged == pytest.approx(distances, rel=1e-12)
            sent = (all_reduce_bytes(16, 8, N) + all_reduce_bytes(1, 8, N)) * len(ETAS)
            charged = [run["traffic"]["evaluation_bytes"] for run in (result, without[0])]
            assert charged[0] - charged[1] == sent
        saved = json.loads((tmp_path / "deep" / "xi_max.json").read_text())
        assert saved == {"replicas": 4, "xi_max": pytest.approx(expected, rel=1e-12)}
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["xi_max.json"]
    options = {"target": "constant", "factor": 0.25, "reference": file, "phases": phases, "outside": "average"}
    spent = transcription(
        "constant",
        0.25,
        [saved["xi_max"][phase] for phase in phases],
        lambda t, _: 0 if t < 5 else 1 if t < 9 else None,
        "average",
    )[1]
    for result in ranks.run(2, controlled, 2, PLAIN, options):
        assert [line["consensus/gossip_steps"] for line in result["logged"]] == [done for done, _, _ in spent]


@pytest.mark.parametrize("outside", ["average", "nothing"])
def test_recording_one_phase_of_a_run_that_does_not_gossip_in_others(outside):
    case, where = gossip(gossip_steps=2), {"phases": "step:3-8", "outside": outside}
    recorded = here(case, {"target": "record", **where})
    uncontrolled = {"target": "constant", "factor": math.inf, "reference": 1.0, "min_steps": 2}
    torch.testing.assert_close(recorded["rows"], here(case, {**uncontrolled, **where})["rows"], rtol=0, atol=0)
    distances = [xi(X.numpy()) for X in recorded["rows"]]
    within, always = max(distances[3:8]), max(distances if outside == "average" else distances[3:8])
    assert recorded["xi_max"] == pytest.approx({"step:3-8": within, "always": always}, rel=1e-12)
    same = here(case, {"target": "constant", "factor": 1.0, "reference": within, "min_steps": 2, **where})
    torch.testing.assert_close(recorded["rows"], same["rows"], rtol=0, atol=0)


@pytest.mark.parametrize("algorithm", [DPSGD, lambda: CHOCO(0.4, "sign"), lambda: DSGD()], ids=["dpsgd", "choco", "dsgd"])
def test_recording_is_not_noticed(algorithm):
    case = gossip(algorithm=algorithm(), topology="ring", sync_period=2)
    plain = fit_net(0, 1, N, case)
    recorded = here(case, {"target": "record", "phases": ["epoch:0", "epoch:1-"]}, train=fit_net)
    torch.testing.assert_close(recorded["rows"], plain["rows"], rtol=0, atol=0)
    rounds = [xi(X.numpy()) for X in recorded["rows"][1::2]]  # six steps an epoch, H = 2
    expected = {"always": max(rounds), "epoch:0": max(rounds[:3]), "epoch:1-": max(rounds[3:])}
    assert recorded["xi_max"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no reference '.*xi_max.json': train once with"),
        ("{", "is no file that"),
        ("[1, 2]", "is no file that"),
        ('{"xi_max": {"always": "much"}, "replicas": 4}', "is no file that"),
        ('{"xi_max": {"always": 1.0}, "replicas": 8}', "was recorded with 8 replicas, not 4"),
        ('{"xi_max": {"always": 1.0}, "replicas": 4}', "has no distance for 'epoch:0', only for 'always'"),
        ('{"xi_max": {"epoch:0": 0.0}, "replicas": 4}', "has no distance for 'epoch:0', only for 'epoch:0'"),
        ('{"xi_max": {}, "replicas": 4}', "only for nothing"),
    ],
)
def test_bad_references(ranks, tmp_path, content, message):
    file = tmp_path / "xi_max.json"
    if content is not None:
        file.write_text(content)
    options = {"target": "constant", "reference": str(file), "phases": "epoch:0"}
    assert here_refuses(options, message)
    if content is None:
        assert all(ranks.run(2, refuses, 2, options, message))  # all ranks, although rank 0 alone has looked


def refuses(rank, world_size, m, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        controlled(rank, world_size, m, PLAIN, options)
    return True


def here_refuses(options, message):
    return refuses(0, 1, N, options, message)


# ------------------------------------------------------------------------------------------------------------ reductions
def reductions(rank, world_size, options):
    collectives, control = Collectives(), ConsensusControl(**options)
    notes = Notes(control)
    fit_quadratic(
        rank, world_size, 1, gossip(sync_period=2), ETAS, callbacks=(collectives, control, notes), log_every_n_steps=1
    )
    calls = [[name for batch, name in collectives.calls if batch == t] for t in range(len(ETAS))]
    return calls, [line.get("consensus/gossip_steps", 0) for line in notes.logged]


@pytest.mark.parametrize(
    ("options", "of_parameters"),
    [
        ({"target": "efficient", "factor": 0.01}, 0),
        ({"target": "adaptive", "factor": 0.02}, 1),
        ({"target": "constant", "reference": 0.4}, 1),
        ({"target": "efficient", "factor": 0.01, "min_steps": 3}, 0),
    ],
)
def test_reductions(ranks, options, of_parameters):
    """One small all-reduce for each gossip step that is measured, one of the parameters more for the exact distance."""
    results = ranks.run(4, reductions, options)
    for calls, steps in results:
        assert steps == results[0][1]
        for t, names in enumerate(calls):
            if t % 2 == 0:
                assert names == []  # nothing between rounds
            else:
                measured = steps[t] - options.get("min_steps", 1) + 1
                assert names.count("all_reduce") == measured * (1 + of_parameters)
                # Rows and notices travel by themselves; nothing else is said to all.
                assert set(names) <= {"all_reduce", "batch_isend_irecv", "isend", "irecv"}


def test_what_is_measured_is_charged_to_evaluation():
    plain = fit_quadratic(0, 1, N, PLAIN, ETAS)["traffic"]
    for options, numel in (({"factor": 0.01}, [3]), ({"target": "constant", "reference": 0.4}, [16, 1])):
        result = here(PLAIN, options)
        steps = result["totals"][-1][1]
        charged = result["traffic"]["evaluation_bytes"] - plain["evaluation_bytes"]
        # Theta, and once in a round the norm of the gradients with the share of those that are finite; or the mean, and Xi.
        first, rest = sum(all_reduce_bytes(k, 8, N) for k in numel), sum(all_reduce_bytes(k, 8, N) for k in (numel[1:] or [1]))
        if options.get("target") == "constant":
            rest = first
        assert charged == len(ETAS) * first + (steps - len(ETAS)) * rest


# ------------------------------------------------------------------------------------------------- targets out of reach
def test_a_target_out_of_reach(caplog):
    with pytest.warns(
        UserWarning, match="could not bring replicas from .* within 2 gossip steps, in the round after step 0"
    ) as w:
        result = here_with_warnings({"factor": 1e-9, "max_steps": 2})
    assert len([one for one in w if "could not bring" in str(one.message)]) == 1
    assert result.rounds == result.rounds_missed == 4
    assert result.steps_spent == 8


def here_with_warnings(options, steps=4, module=None):
    control = ConsensusControl(**options)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=GossipStrategy(topology="chain", replicas_per_device=N),
        callbacks=[control],
        max_steps=steps,
        enable_checkpointing=False,
        **QUIET,
    )
    trainer.fit(module or SmallNet(), DataLoader(Augmented(dtype=torch.float32), batch_size=3))
    return control


class Exploding(SmallNet):
    """One replica has a gradient that is not finite, which its optimizer ignores as fp16 scaling would."""

    def on_before_optimizer_step(self, optimizer):
        if self.trainer.strategy.replicas.active == 1:
            for parameter in self.parameters():
                parameter.grad = None

    def on_after_backward(self):
        if self.trainer.strategy.replicas.active == 1:
            self.hidden.weight.grad.fill_(float("inf"))


def test_gradients_that_are_not_finite_do_not_count():
    control = here_with_warnings({"target": "adaptive"}, steps=3, module=Exploding())
    assert math.isfinite(control._phi) and control._phi > 0
    assert control.rounds == 3


class Two(SmallNet):
    """Two optimizers, each with a part of the parameters, stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.norms = []

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        gradients = torch.cat([p.grad.flatten() for p in self.parameters() if p.requires_grad])
        self.norms.append(float(torch.linalg.vector_norm(gradients)))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(parameters[:3], lr=0.1), torch.optim.SGD(parameters[3:], lr=0.1)


def two_optimizers(rank, world_size):
    module, control = Two(), ConsensusControl("adaptive")
    data = DataLoader(Augmented(), batch_size=3)
    fit(rank, world_size, 1, PLAIN, module, data, callbacks=(control,), precision="64-true", max_steps=4)
    return module.norms, control._phi


def test_several_optimizers_make_one_gradient(ranks):
    results = ranks.run(2, two_optimizers)
    steps = [np.mean(norms) for norms in zip(*[norms for norms, _ in results], strict=True)]
    assert len(steps) == 2  # `max_steps` counts what both optimizers do
    for _, phi in results:
        assert phi == pytest.approx(0.9 * steps[0] + 0.1 * steps[1], rel=1e-12)


# --------------------------------------------------------------------------------------------------------------- resume
def resumed(rank, world_size, m, case, options, folder, stop):
    whole = controlled(rank, world_size, m, case, options, train=fit_net)
    saver = ModelCheckpoint(dirpath=folder, filename="stopped", save_top_k=-1, every_n_train_steps=stop)
    more = {"callbacks": (saver,), "enable_checkpointing": True, "max_steps": stop, "train": fit_net}
    controlled(rank, world_size, m, case, options, **more)
    rest = controlled(rank, world_size, m, case, options, train=fit_net, ckpt_path=f"{folder}/stopped.ckpt", seed=8)
    return whole, rest


@pytest.mark.parametrize("layout", LAYOUTS[N], ids=str)
@pytest.mark.parametrize(
    ("case", "options"),
    [
        (gossip(sync_period=3), {"factor": 0.05, "phases": ["step:0-7", "lr_decay:2-"], "outside": "average"}),
        (gossip(sync_period=3), {"target": "adaptive", "factor": 0.2}),
        (gossip(sync_period=3), {"target": "record", "phases": "epoch:1-"}),
        (
            gossip(algorithm=CHOCO(0.4, "sign"), topology="ring", sync_period=3),
            {"target": "constant", "reference": 0.3, "phases": "lr_decay:1"},
        ),
    ],
    ids=["efficient", "adaptive", "record", "constant_choco"],
)
def test_resume_in_the_middle_of_a_round(ranks, tmp_path, case, options, layout):
    m, world_size = layout
    # 18 steps; rounds end after steps 3, 6, 9, 12: step 11 is in the middle of one, and past the decay after 5 and 10.
    results = ranks.run(world_size, resumed, m, case, options, str(tmp_path), 11, timeout=90)
    for whole, rest in results:
        assert len(rest["rows"]) == 7
        torch.testing.assert_close(rest["rows"], whole["rows"][11:], rtol=0, atol=0)
        for after, before in zip(rest["logged"], whole["logged"][11:], strict=True):
            shown = {**before, **after}  # Lightning still shows what was logged long before
            assert after and before == pytest.approx(shown, rel=0, abs=0, nan_ok=True)
        assert rest["totals"] == whole["totals"][11:]
        assert rest["xi_max"] == whole["xi_max"]
        assert rest["phi"] == whole["phi"]
        assert rest["traffic"]["bytes_sent"] == whole["traffic"]["bytes_sent"]


def test_resume_with_another_number_of_replicas(ranks, tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, filename="four", every_n_train_steps=4)
    case = gossip(sync_period=3)
    more = {"callbacks": (saver,), "enable_checkpointing": True, "max_steps": 4, "train": fit_net}
    ranks.run(4, controlled, 1, case, {"target": "adaptive"}, **more)
    for result in ranks.run(
        2, controlled, 1, case, {"target": "adaptive"}, train=fit_net, ckpt_path=str(tmp_path / "four.ckpt")
    ):
        assert result["phi"] > 0


@pytest.mark.parametrize(
    ("before", "after", "goes_on"),
    [
        (["step:0-1", "step:1-"], ["step:0-2", "step:2-"], False),  # as many, but others
        (["step:0-1", "step:1-"], "epoch:0-", False),  # fewer
        (["step:0-1", "step:1-"], ["epoch:7-", "step:0-1", "step:1-"], True),  # the same, elsewhere
    ],
)
def test_resume_in_the_middle_of_a_round_with_other_phases(tmp_path, before, after, goes_on):
    saver = ModelCheckpoint(dirpath=tmp_path, filename="four", every_n_train_steps=4)
    case, options = gossip(sync_period=3), {"target": "adaptive", "factor": 0.05}
    more = {"callbacks": (saver,), "enable_checkpointing": True, "max_steps": 4, "train": fit_net}
    whole = here(case, {**options, "phases": before}, train=fit_net)
    here(case, {**options, "phases": before}, **more)
    rest = here(case, {**options, "phases": after}, train=fit_net, ckpt_path=str(tmp_path / "four.ckpt"))
    assert len(rest["rows"]) == 14
    # The round under way is controlled, with the moving average so far, only if its phase is still there.
    assert (rest["totals"][1] == whole["totals"][5]) == goes_on
    assert rest["totals"][1][0] == 1 + goes_on
    assert rest["totals"][-1][0] == 5 + goes_on


class Evaluated(SmallNet):
    def validation_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx))


def test_evaluation_with_a_checkpoint_leaves_the_totals_of_training(tmp_path):
    control = ConsensusControl()
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": 3, "limit_train_batches": 2}
    strategy = GossipStrategy(topology="ring", replicas_per_device=N)
    trainer = L.Trainer(strategy=strategy, callbacks=[control, saver], **options, **QUIET)
    module, loader = Evaluated(), DataLoader(Augmented(dtype=torch.float32), batch_size=3)
    trainer.fit(module, loader)
    totals = control.rounds, control.steps_spent
    trainer.validate(module, loader, ckpt_path=str(tmp_path / "epoch=0.ckpt"), verbose=False)
    assert (control.rounds, control.steps_spent) == totals
    assert control.rounds == 6


def test_the_reference_is_read_on_rank_0(ranks, tmp_path):
    def run(rank, world_size):
        folder = tmp_path / str(rank)  # which rank 0 alone has
        options = {"target": "constant", "reference": str(folder / "xi_max.json")}
        if rank == 0:
            folder.mkdir()
            (folder / "xi_max.json").write_text(json.dumps({"replicas": 2, "xi_max": {"always": 1.0}}))
        read = []
        with pytest.MonkeyPatch.context() as patch:
            original = consensus_control.read_reference
            patch.setattr(consensus_control, "read_reference", lambda *args: read.append(rank) or original(*args))
            result = controlled(rank, world_size, 1, PLAIN, options)
        return read, result["totals"][-1]

    (first, totals), (second, others) = ranks.run(2, run)
    assert (first, second) == ([0], [])
    assert totals == others


# ------------------------------------------------------------------------------------------------------- logs and undoing
def test_logs_come_at_lightnings_interval():
    result = here(PLAIN, {"factor": 0.01}, log_every_n_steps=4)
    assert result["logged"][2] == {}
    assert set(result["logged"][3]) == {f"consensus/{name}" for name in ("gossip_steps", "estimate", "target", "phi")}
    assert result["logged"][3] == result["logged"][4] == result["logged"][6] != result["logged"][7]


def test_what_a_round_has_not_measured_is_not_logged_as_if_it_had():
    measured = {"consensus/estimate", "consensus/target", "consensus/phi"}
    for outside in ("gossip", "average", "nothing"):
        logged = here(PLAIN, {"factor": 0.01, "phases": ["step:2-4", "step:6-8"], "outside": outside})["logged"]
        assert logged[0].keys() == logged[1].keys() == {"consensus/gossip_steps"}
        for step, line in enumerate(logged[2:], start=2):
            now = {key for key, value in line.items() if not math.isnan(value)}
            assert now == {"consensus/gossip_steps", *(measured if step in (2, 3, 6, 7) else ())}
    for outside in ("average", "nothing"):
        logged = here(PLAIN, {"target": "record", "phases": "step:2-4", "outside": outside})["logged"]
        assert [math.isnan(line.get("consensus/distance", math.nan)) for line in logged] == [
            outside == "nothing" and step not in (2, 3) for step in range(len(logged))
        ]
        assert [line["consensus/gossip_steps"] for line in logged[:5]] == [0, 0, 1, 1, 0]


def test_control_is_given_back():
    algorithm = DSGD()
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "limit_train_batches": 3}
    loader = DataLoader(Augmented(dtype=torch.float32), batch_size=3)

    class Fails(SmallNet):
        def training_step(self, batch, batch_idx):
            assert algorithm.control is control
            assert algorithm.measures
            if batch_idx == 1 and fails:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    for fails in (True, False):
        control = ConsensusControl()
        strategy = GossipStrategy(algorithm, topology="ring", replicas_per_device=N)
        trainer = L.Trainer(strategy=strategy, callbacks=[control], enable_checkpointing=False, **options, **QUIET)
        if fails:
            with pytest.raises(ZeroDivisionError):
                trainer.fit(Fails(), loader)
        else:
            trainer.fit(Fails(), loader)
            trainer.fit_loop.max_epochs = 2
            trainer.fit(Fails(), loader)  # a second time with the same objects
            assert control.rounds == 3
        assert algorithm.control is None
        assert not algorithm.measures


# -------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "fast"}, "`target` must be one of 'constant', 'adaptive', 'efficient', 'record'; got 'fast'"),
        ({"outside": "average"}, "`outside='average'` says what happens outside of `phases`"),
        ({"outside": "sum", "phases": "epoch:0"}, "`outside` must be one of 'gossip', 'average', 'nothing'"),
        ({"factor": 0}, "`factor` must be a number above 0; got 0"),
        ({"factor": -1.0}, "above 0"),
        ({"factor": float("nan")}, "above 0"),
        ({"factor": True}, "above 0"),
        ({"factor": "much"}, "above 0"),
        ({"min_steps": 0}, "`min_steps` must be a whole number of gossip steps, at least 1; got 0"),
        ({"max_steps": 2.5}, "`max_steps` must be a whole number"),
        ({"max_steps": True}, "`max_steps` must be a whole number"),
        ({"min_steps": 5, "max_steps": 4}, "`min_steps=5` is more than `max_steps=4`"),
        ({"target": "constant"}, "needs `reference`"),
        ({"target": "constant", "reference": 0.0}, "above 0"),
        ({"target": "constant", "reference": True}, "needs `reference`"),
        ({"target": "record", "reference": 1.0}, "`reference` is the file to write"),
        ({"target": "record", "reference": "."}, "`reference` is the path of a file, and '.' is a folder"),
        ({"target": "record", "factor": 0.5}, "watches rounds without control"),
        ({"target": "record", "max_steps": 5}, "watches rounds without control"),
        ({"target": "adaptive", "reference": 1.0}, "leave `reference` out"),
        ({"phases": "epochs:1"}, "does not understand 'epochs:1'"),
        ({"phases": "epoch:x"}, "does not understand"),
        ({"phases": "epoch:5-2"}, "does not understand"),
        ({"phases": "epoch:-3"}, "does not understand"),
        ({"phases": "lr_decay:0"}, "does not understand"),
        ({"phases": ["epoch:0", "later"]}, "does not understand 'later'"),
        ({"phases": []}, "is empty"),
        ({"phases": 5}, "does not understand 5"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ConsensusControl(**options)


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        (lambda: LocalSGDStrategy(2, replicas_per_device=2), {}, "the strategy is LocalSGDStrategy: use"),
        (lambda: "auto", {}, "use `Trainer\\(strategy=GossipStrategy"),
        (lambda: GossipStrategy("ef_sign", replicas_per_device=2), {}, "EFSign makes one gossip step for each gradient step"),
        (lambda: GossipStrategy(DCD("qsgd:8"), replicas_per_device=2), {}, "DCD makes one gossip step"),
        (lambda: GossipStrategy("deep_squeeze", replicas_per_device=2), {"target": "record"}, "nothing to control"),
        (lambda: GossipStrategy("dsgd", overlap=True, replicas_per_device=2), {}, "DSGD with `overlap=True` makes one"),
        (lambda: GossipStrategy("dpsgd", replicas_per_device=2), {"target": "adaptive"}, "DPSGD adds the optimizer's steps"),
    ],
)
def test_what_cannot_be_controlled(strategy, options, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        control = ConsensusControl(**options)
        run = {"accelerator": "cpu", "devices": 1, "max_steps": 1, "enable_checkpointing": False, **QUIET}
        trainer = L.Trainer(strategy=strategy(), callbacks=[control], **run)
        with pytest.raises(MisconfigurationException, match=message):
            trainer.fit(SmallNet(), DataLoader(Augmented(dtype=torch.float32), batch_size=3))


class Another(ConsensusControl):
    pass


@pytest.mark.parametrize(
    ("kind", "target"), [(Another, "efficient"), (ConsensusControl, "efficient"), (ConsensusControl, "record")]
)
def test_two_controls_are_refused(kind, target):
    run = {"accelerator": "cpu", "devices": 1, "max_steps": 1, "enable_checkpointing": False, **QUIET}
    strategy = GossipStrategy(replicas_per_device=2)
    trainer = L.Trainer(strategy=strategy, callbacks=[ConsensusControl(target), kind(target)], **run)
    with pytest.raises(MisconfigurationException, match="two callbacks that control gossip"):
        trainer.fit(SmallNet(), DataLoader(Augmented(dtype=torch.float32), batch_size=3))
    assert strategy.algorithm.control is None
