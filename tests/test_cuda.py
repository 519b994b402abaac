"""The same code on GPUs. Skipped, with the reason, where there is none."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_distopt import LocalSGDStrategy
from tests.conformance.problems import QUIET, Augmented, SmallNet

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices, for NCCL between them")


def train(accelerator: str, sync_period: int, m: int, devices: int = 1, **options):
    warnings.filterwarnings("ignore")
    L.seed_everything(7, verbose=False)
    module = SmallNet()
    module.dropout = torch.nn.Identity()  # CPU and GPU draw different masks
    strategy = LocalSGDStrategy(sync_period, replicas_per_device=m, start_method="spawn")
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
@pytest.mark.parametrize("sync_period", [1, 3])
def test_simulation_on_a_gpu_equals_that_on_the_cpu(sync_period):
    gpu, traffic = train("gpu", sync_period, 4)
    cpu, expected = train("cpu", sync_period, 4)
    torch.testing.assert_close(gpu, cpu, rtol=0, atol=1e-9)
    assert (traffic.bytes_sent, traffic.rounds) == (expected.bytes_sent, expected.rounds)


@needs_gpu
def test_mixed_precision_on_a_gpu():
    state, _ = train("gpu", 3, 4, precision="bf16-mixed")
    assert all(torch.isfinite(value).all() for value in state.values())


@needs_two_gpus
@pytest.mark.parametrize("sync_period", [1, 3])
def test_nccl_equals_the_simulation(sync_period):
    nccl, _ = train("gpu", sync_period, 2, devices=2)
    simulated, _ = train("cpu", sync_period, 4)
    torch.testing.assert_close(nccl, simulated, rtol=0, atol=1e-9)
