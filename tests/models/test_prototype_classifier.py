"""PrototypeClassifier: several networks in one module, and clients that train them."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distopt import FedDF, FederatedStrategy
from lightning_distopt.models import LeNet, PrototypeClassifier

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def images(count=48):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % 10)


def classifier():
    torch.manual_seed(0)
    networks = {"resnet": "resnet8", "lenet": LeNet(image_size=8)}
    return PrototypeClassifier(networks, {"in_channels": 1, "width": 0.25}, lr=0.1)


def test_is_the_network_that_is_named():
    module, x = classifier().eval(), torch.randn(2, 1, 8, 8)
    for name, network in module.prototypes.items():
        module.prototype = name
        assert torch.equal(module(x), network(x))


def test_clients_train_different_networks_and_all_are_evaluated():
    """Both learn from the logits of all four clients, batch norm or not."""
    module, before = classifier(), classifier().state_dict()
    aggregator = FedDF(images()[:][0], steps=3, batch_size=16, patience=None)
    strategy = FederatedStrategy(aggregator, clients=4, fraction=1.0, prototypes="even")
    trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=1, max_epochs=1, **QUIET)
    trainer.fit(module, DataLoader(images(), 6), DataLoader(images(), 24))
    assert module.prototype == "resnet"
    assert {"val_accuracy", "val_accuracy_resnet", "val_accuracy_lenet"} <= trainer.callback_metrics.keys()
    after = module.state_dict()
    assert all((after[name] != before[name]).any() for name in before if name.endswith(("weight", "running_mean")))

    module.eval()
    x, y = images()[:]
    logits = [network(x) for network in module.prototypes.values()]
    for name, values in {"_resnet": logits[0], "_lenet": logits[1], "": logits[0] + logits[1]}.items():
        accuracy = (values.argmax(dim=1) == y).float().mean()
        assert trainer.callback_metrics[f"val_accuracy{name}"] == pytest.approx(accuracy.item())


def test_needs_a_network():
    with pytest.raises(ValueError, match="networks is empty"):
        PrototypeClassifier({})


def test_norms_and_biases_do_not_decay():
    module = PrototypeClassifier({"a": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))}, weight_decay=0.1)
    decaying, plain = module.configure_optimizers().param_groups
    assert (decaying["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert [p.shape for p in decaying["params"]] == [(4, 3)] and len(plain["params"]) == 3
