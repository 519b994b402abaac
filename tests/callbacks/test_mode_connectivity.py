"""`ModeConnectivity`: the curve of `connect`, at the end of training, which does not notice it; and what it refuses."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_distopt import GossipStrategy, LocalSGDStrategy, ModeConnectivity
from lightning_distopt.analysis import Objective, Path, connect
from tests.analysis.linear import accuracy, entropy, small_net
from tests.conformance.problems import Augmented, SmallNet
from tests.probes import disturbance, fit, images

SHORT = {"bends": 2, "steps": 5, "points": 3, "lr": 0.1}
STRATEGIES = {
    "single": (1, "auto", {}),
    "accumulated": (1, "auto", {"accumulate_grad_batches": 2}),
    "ddp": (2, "ddp_find_unused_parameters_true", {}),
    "local_sgd": (2, lambda: LocalSGDStrategy(2, replicas_per_device=2), {"max_epochs": 4}),
    "gossip": (2, lambda: GossipStrategy(topology="ring"), {}),
}


def batches():
    data = Augmented(14)
    return list(zip(data.x.split(4), data.y.split(4), strict=True))


def checkpoint(folder, **more):
    path = folder / "other.ckpt"
    torch.save({"state_dict": {**small_net(4).state_dict(), **more}, "epoch": 3}, path)
    return path


def train(rank, world, name, path, attached=True, callbacks=(), **options):
    strategy, of_trainer = STRATEGIES[name][1:]
    data = {"data": batches(), "metrics": accuracy, "loss_fn": entropy, "save": ()}
    probe = ModeConnectivity(path, **{**SHORT, **data, **options})
    module = SmallNet().double()
    module.frozen.load_state_dict(small_net(4).frozen.state_dict())  # what is not trained must be the same
    found = fit(rank, world, strategy, [probe] if attached else [], module, callbacks=callbacks, **of_trainer)
    return {**found, "module": module, "probe": probe}


@pytest.mark.parametrize("name", STRATEGIES)
def test_training_does_not_notice_it(ranks, tmp_path, name):
    world, path = STRATEGIES[name][0], checkpoint(tmp_path)
    before = path.read_bytes()

    def run(rank, world, attached):
        found = train(rank, world, name, path, attached)
        return {key: value for key, value in found.items() if key not in ("module", "probe")}

    plain, probed = (ranks.run(world, run, attached) for attached in (False, True))
    for a, b in zip(plain, probed, strict=True):
        assert disturbance(a, b, "connectivity") == ""
        (result,), (history,) = b["results"], b["histories"]
        for field, value in vars(result).items():
            np.testing.assert_array_equal(value, getattr(probed[0]["results"][0], field))
        assert [entry["step"] for entry in history] == [b["step"]]
        # From the other model, to the one that training ends with.
        weights = [torch.cat([s[k].reshape(-1) for k in TRAINED]).numpy() for s in (small_net(4).state_dict(), b["final"])]
        np.testing.assert_array_equal(result.nodes[0], weights[0])
        np.testing.assert_allclose(result.nodes[-1], weights[1], rtol=0, atol=1e-15)
        assert np.abs(result.nodes[1] - (2 * weights[0] + weights[1]) / 3).max() > 1e-6
    assert path.read_bytes() == before


TRAINED = [name for name, parameter in SmallNet().named_parameters() if parameter.requires_grad]


def test_it_is_the_curve_of_connect(tmp_path):
    path = checkpoint(tmp_path)
    found = train(0, 1, "single", path, seed=3)
    f = Objective(found["module"], entropy, batches(), metrics=accuracy)
    state = found["module"].state_dict()
    expected = connect(f, small_net(4).state_dict(), state, **SHORT, seed=3, progress=False)
    result = found["probe"].result
    np.testing.assert_array_equal(result.nodes, expected.nodes)
    np.testing.assert_array_equal(result.values, expected.values)
    assert result.metrics == ["loss", "accuracy"]
    logged = found["logged"][-1][1]
    assert logged["connectivity/data/loss_barrier"] == expected.numbers()["loss_barrier"]
    assert logged["connectivity/data/straight_accuracy_min"] == expected.numbers()["straight_accuracy_min"]


def test_data_of_the_trainer_and_files(tmp_path):
    path, module = checkpoint(tmp_path), SmallNet().double()
    module.frozen.load_state_dict(small_net(4).frozen.state_dict())
    probe = ModeConnectivity(path, data=["train", "val"], samples=6, curve="chain", save=["npz", "json", "png"], **SHORT)
    logger = CSVLogger(tmp_path, version="a")
    data = DataLoader(images(12), 3, shuffle=True)
    fit(probes=[probe], module=module, data=data, folder=tmp_path, logger=logger, max_epochs=1)
    assert probe.result.data == ["train", "val"]
    assert probe.result.values.shape == (2, 1, 3)
    found = {file.suffix: file for file in tmp_path.rglob("connectivity/step=000004.*")}
    assert set(found) == {".npz", ".json", ".png"}
    assert Path.load(found[".npz"]).numbers() == probe.result.numbers()
    np.testing.assert_array_equal(Path.load(found[".npz"]).nodes, probe.result.nodes)
    assert len(Path.load(found[".json"]).nodes) == 0
    assert probe.result.models == [path.stem, "step 4"]


def test_the_other_model_is_that_of_the_start_of_training(tmp_path):
    """Whether its file is another one, or gone, when training ends; and it may come as a state dict."""

    class Replaces(L.Callback):
        def on_train_epoch_end(self, *args):
            path.unlink(missing_ok=True)

    state = small_net(4).state_dict()
    given = train(0, 1, "single", state)["probe"]
    assert given.result.models[0] == "the other model"
    path = checkpoint(tmp_path)
    read = train(0, 1, "single", path, callbacks=[Replaces()])["probe"]
    assert not path.exists()
    np.testing.assert_array_equal(read.result.nodes, given.result.nodes)
    np.testing.assert_array_equal(read.result.values, given.result.values)
    assert read._other is None  # it is let go of


# ------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bends": 0}, "`bends` must be a whole number, at least 1; got 0"),
        ({"curve": "line"}, "`curve` must be one of 'bezier', 'chain'; got 'line'"),
        ({"lr": -1}, "`lr` must be a number above 0"),
        ({"batch_norm": "keep"}, "`batch_norm` must be one of 'reestimate', 'interpolate'"),
    ],
)
def test_options_that_make_no_sense(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        ModeConnectivity("other.ckpt", **options)


def test_what_is_refused_before_training(tmp_path):
    path = checkpoint(tmp_path)
    (tmp_path / "text.ckpt").write_text("This is no checkpoint.")
    torch.save([1, 2], tmp_path / "list.ckpt")
    torch.save(SmallNet().head.state_dict(), tmp_path / "head.ckpt")
    torch.save(nn.Sequential(), tmp_path / "code.ckpt")
    other = small_net(4).state_dict()
    torch.save({**other, "frozen.bias": other["frozen.bias"] + 1}, tmp_path / "frozen.ckpt")
    torch.save({**other, "head.bias": other["head.bias"] / 0}, tmp_path / "infinite.ckpt")
    for name, sentence in {
        "missing": r"There is no checkpoint .*missing\.ckpt'",
        "text": r"text\.ckpt' can't be read as a checkpoint of tensors and plain values",
        "list": r"list\.ckpt' holds list, not a checkpoint or a state dict",
        "head": r"The architecture of .*head\.ckpt' is another one: 'conv.weight' is missing there",
        "code": r"code\.ckpt' can't be read as a checkpoint",
        "frozen": "The ends have other values of 'frozen.bias'",
        "infinite": r"infinite\.ckpt' has values that are not finite",
    }.items():
        with pytest.raises(ValueError, match=sentence) as error:
            train(0, 1, "single", path.with_name(f"{name}.ckpt"))
        assert len(str(error.value).splitlines()) == 1


def lacking(rank, world, folder):
    kind = ValueError if rank else MisconfigurationException
    with pytest.raises(kind, match="There is no checkpoint" if rank else "Another rank can't read"):
        train(rank, world, "ddp", folder / ("other.ckpt" if rank == 0 else "missing.ckpt"))
    return rank


def test_a_checkpoint_that_one_rank_lacks(ranks, tmp_path):
    checkpoint(tmp_path)
    assert ranks.run(2, lacking, tmp_path) == [0, 1]
