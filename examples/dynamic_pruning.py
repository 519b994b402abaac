"""A sparse network in one training run: dynamic pruning with feedback, on two replicas whose rounds send what is alive.

Masks keep the largest fifth of the weights and change while the network trains; a weight that is pruned goes on learning
and may come back. The module and its optimizer know nothing of it, and a checkpoint loads into the plain module.
"""

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_distopt import DynamicPruning, LocalSGDStrategy
from lightning_distopt.data import DigitsDataModule
from lightning_distopt.models import ImageClassifier

FOLDER = "outputs/dynamic_pruning"


class Returns(L.Callback):
    """Counts weights that come back."""

    def __init__(self, pruning):
        self.pruning, self.updates, self.count = pruning, 0, 0

    def on_train_batch_end(self, *args):
        if self.pruning.pruner.updates > self.updates:
            self.updates = self.pruning.pruner.updates
            self.count += sum(self.pruning.pruner.regrown.values())


def train(*callbacks):
    L.seed_everything(0)
    strategy = LocalSGDStrategy(sync_period=4, replicas_per_device=2)
    saver = ModelCheckpoint(FOLDER, "last", enable_version_counter=False)
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_epochs=8,
        gradient_clip_val=1.0,  # what is pruned goes on learning, and is held back by nothing else
        callbacks=[*callbacks, saver],
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        check_val_every_n_epoch=8,
    )
    module = ImageClassifier("lenet", model_options={"in_channels": 1, "image_size": 8}, lr=0.1, schedule=[6])
    trainer.fit(module, DigitsDataModule(batch_size=16))
    accuracy = 100 * trainer.callback_metrics["val_accuracy"]
    return accuracy, strategy.traffic.bytes_sent / 1e6, saver.best_model_path


if __name__ == "__main__":
    torch.set_num_threads(1)
    dense_accuracy, dense_megabytes, _ = train()
    print(f"Dense: {dense_accuracy:.1f} % right, {dense_megabytes:.1f} MB sent by each replica")

    pruning = DynamicPruning(sparsity=0.8, ramp=0.5, sparse_rounds=True)
    returns = Returns(pruning)
    accuracy, megabytes, path = train(pruning, returns)
    print(f"{returns.count} weights came back in {returns.updates} updates of the masks")

    module = ImageClassifier.load_from_checkpoint(path)  # the plain module, with its pruned weights at zero
    weights = [layer.weight for layer in module.modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)][:-1]
    zeros, total = (sum(int(count(w)) for w in weights) for count in (lambda w: (w == 0).sum(), torch.numel))
    print(f"{100 * zeros / total:.1f} % of {total} weights are zero; {megabytes:.1f} MB sent by each replica")
    print(f"{accuracy:.1f} % of the validation digits are right")
    assert zeros == round(0.8 * total)
    assert returns.count > 0
    assert megabytes < 0.7 * dense_megabytes
    assert accuracy > dense_accuracy - 5
