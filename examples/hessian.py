"""How sharp is the loss while a network trains? The largest and the smallest eigenvalue of its Hessian, trace and density.

Local SGD with four replicas, whose average is measured at the start and after every epoch, on training and test digits. At
the end the eigenvalues of the last layer are compared with those of its Hessian written down by autograd.
"""

import lightning as L
import numpy as np
import torch
from torch.func import functional_call
from torch.nn import functional as F

from lightning_distopt import HessianProbe, LocalSGDStrategy
from lightning_distopt.analysis import Objective, hessian_spectrum
from lightning_distopt.data import DigitsDataModule
from lightning_distopt.models import ImageClassifier

FOLDER = "outputs/hessian"


def loss(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    L.seed_everything(0)
    module = ImageClassifier("lenet", model_options={"in_channels": 1, "image_size": 8}, lr=0.1, schedule="cosine")
    data = DigitsDataModule(batch_size=16)
    probe = HessianProbe(["start", "epoch"], k=2, data=["train", "val"], samples=64, progress=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=LocalSGDStrategy(sync_period=8, replicas_per_device=4),
        max_epochs=4,
        callbacks=[probe],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, data)
    for entry in probe.history:
        print(f"step {entry['step']:3}: {entry['train/bottom']:7.2f} to {entry['train/top']:6.2f} on train,", end=" ")
        print(f"{entry['val/bottom']:7.2f} to {entry['val/top']:6.2f} on validation data")
    print(f"{probe.series().save(f'{FOLDER}/over_training.png')}: the eigenvalues over training")

    batches = [tuple(batch) for batch in data.test_dataloader()]
    whole = hessian_spectrum(Objective(module, loss, batches), k=4, which="BE", trace=30, density=40, progress=False)
    print(f"{whole.save(f'{FOLDER}/spectrum.png')}: the density of all {whole.dim} eigenvalues on the test digits")
    print(f"Their sum is {whole.trace:.1f} +- {whole.trace_error:.1f}")

    # The last layer's block, in double precision and with all samples, beside the matrix itself.
    module.double().eval()
    batches = [(x.double(), y) for x, y in batches]
    last = hessian_spectrum(Objective(module, loss, batches, "model.fc3.bias"), k=3, tol=1e-8, progress=False)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    bias = module.model.fc3.bias.detach()
    dense = torch.autograd.functional.hessian(
        lambda b: F.cross_entropy(functional_call(module, {"model.fc3.bias": b}, (x,)), y), bias
    )
    expected = np.linalg.eigvalsh(dense.numpy())[: -len(last.eigenvalues) - 1 : -1]
    same = np.allclose(last.eigenvalues, expected, rtol=1e-6)
    print(f"The eigenvalues of the last bias are those of its {len(bias)} x {len(bias)} Hessian: {same}")
    assert same
    assert len(probe.history) == 5
    assert probe.history[-1]["train/top"] > 0 > probe.history[-1]["train/bottom"]
