"""The same code on GPUs. Skipped, with the reason, where there is none."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_distopt import CHOCO, D2, DCD, DMSGD, ECD, DeepSqueeze, EFSign, GossipStrategy, LocalSGDStrategy, QuasiGlobal
from lightning_distopt.communication import Neighbourhood, add_weighted
from tests.conformance.problems import QUIET, Augmented, SmallNet

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices, for NCCL between them")


GOSSIP = {
    "dsgd": lambda: "dsgd",
    "dpsgd": lambda: "dpsgd",
    "choco": lambda: CHOCO(gamma=0.3, compressor="top_k:0.3"),
    "dcd": lambda: DCD("top_k:0.5"),
    "ecd": lambda: ECD("identity"),
    "deep_squeeze": lambda: DeepSqueeze(gamma=0.1, compressor="top_k:0.3"),
    "ef": lambda: EFSign("top_k:0.3"),
    "dmsgd": lambda: DMSGD(),
    "d2": lambda: D2(plus=True),
    "gradient_tracking": lambda: "gradient_tracking",
    "quasi_global": lambda: QuasiGlobal(nesterov=True),
    "quasi_global_adam": lambda: "quasi_global_adam",
}
OPTIMIZERS = {"dmsgd": "plain", "quasi_global": "plain", "quasi_global_adam": "adamw"}


def train(accelerator: str, of: int | str, m: int, devices: int = 1, **options):
    """Train by local SGD with the period `of`, or by the gossip algorithm of that name."""
    warnings.filterwarnings("ignore")
    L.seed_everything(7, verbose=False)
    module = SmallNet(OPTIMIZERS.get(str(of), "sgd"))
    module.dropout = torch.nn.Identity()  # CPU and GPU draw different masks
    kwargs = {"replicas_per_device": m, "start_method": "spawn"}
    strategy = LocalSGDStrategy(of, **kwargs) if isinstance(of, int) else GossipStrategy(GOSSIP[of](), **kwargs)
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        max_epochs=2,
        enable_checkpointing=False,
        **{**QUIET, "precision": "64-true", **options},
    )
    data = torch.utils.data.TensorDataset(Augmented().x, Augmented().y)
    trainer.fit(module, DataLoader(data, batch_size=3, shuffle=True), DataLoader(data, batch_size=10))
    return {key: value.cpu() for key, value in module.state_dict().items()}, strategy.traffic


@needs_gpu
@pytest.mark.parametrize("of", [1, 3, *GOSSIP])
def test_simulation_on_a_gpu_equals_that_on_the_cpu(of):
    gpu, traffic = train("gpu", of, 4)
    cpu, expected = train("cpu", of, 4)
    torch.testing.assert_close(gpu, cpu, rtol=0, atol=1e-9)
    assert (traffic.bytes_sent, traffic.rounds) == (expected.bytes_sent, expected.rounds)


@needs_gpu
def test_mixed_precision_on_a_gpu():
    state, _ = train("gpu", 3, 4, precision="bf16-mixed")
    assert all(torch.isfinite(value).all() for value in state.values())


@needs_gpu
@pytest.mark.parametrize("columns", [1000, 2**21], ids=["one piece", "several pieces"])
def test_mixing_of_replicas_that_nearly_agree_is_not_rounded(columns):
    """Also where matrix products in single precision are, as Lightning recommends on cards that can."""
    n, weights = 16, torch.full((16, 16), 1 / 16, dtype=torch.float64)
    rows = 1 + 1e-4 * torch.randn(n, columns)
    hood, before = Neighbourhood.of_matrix(range(n), weights), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        on_card = rows.cuda()
        add_weighted(on_card, hood, on_card)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(on_card.cpu(), rows.mean(dim=0).expand_as(rows), rtol=0, atol=1e-6)


@needs_two_gpus
@pytest.mark.parametrize("of", [1, 3, *GOSSIP])
def test_nccl_equals_the_simulation(of):
    nccl, _ = train("gpu", of, 2, devices=2)
    simulated, _ = train("cpu", of, 4)
    torch.testing.assert_close(nccl, simulated, rtol=0, atol=1e-9)
