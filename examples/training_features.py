"""What you use already works as before: mixed precision, accumulation, clipping, schedulers, early stopping, checkpoints.

An ordinary LightningModule with batch norm and dropout, four replicas of it in one process. `H` counts optimizer steps,
whatever is accumulated; metrics, and so early stopping and the choice of the best checkpoint, are the average model's.
"""

import tempfile

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distopt import LocalSGDStrategy
from lightning_distopt.data import load_digits_tensors


class Classifier(L.LightningModule):
    def __init__(self, hidden=128, lr=0.1):
        super().__init__()
        self.save_hyperparameters()
        layers = nn.Linear(64, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.2), nn.Linear(hidden, 10)
        self.net = nn.Sequential(nn.Flatten(), *layers)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_accuracy", (self.net(x).argmax(dim=1) == y).float().mean(), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)
        steps = self.trainer.estimated_stepping_batches  # of one replica
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=self.hparams.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loader(split, batch_size):
    return DataLoader(TensorDataset(*load_digits_tensors(split)), batch_size, shuffle=split == "train")


if __name__ == "__main__":
    L.seed_everything(0)
    torch.set_num_threads(1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with tempfile.TemporaryDirectory() as folder:
        strategy = LocalSGDStrategy(sync_period=4, replicas_per_device=4)
        best = ModelCheckpoint(folder, monitor="val_accuracy", mode="max")
        enough = EarlyStopping("val_accuracy", mode="max", stopping_threshold=0.95, patience=10)
        trainer = L.Trainer(
            strategy=strategy,
            precision="bf16-mixed",
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            callbacks=[best, enough],
            accelerator="cpu",
            devices=1,
            max_epochs=30,
            log_every_n_steps=1,
            **quiet,
        )
        trainer.fit(Classifier(), loader("train", 8), loader("test", 360))

        # 1,437 images over 4 replicas in batches of 8: 45 batches, two of them a step, the last one a step by itself.
        steps, rounds, epochs = trainer.global_step, strategy.traffic.rounds, trainer.current_epoch
        print(f"{rounds} rounds in {steps} optimizer steps; stopped after {epochs} of {trainer.max_epochs} epochs")
        assert steps == 23 * epochs
        assert rounds == steps // 4
        assert epochs < trainer.max_epochs

        # The checkpoint needs neither the strategy nor this package.
        module = Classifier.load_from_checkpoint(best.best_model_path)
        plain = L.Trainer(accelerator="cpu", devices=1, precision="bf16-mixed", **quiet)
        (metrics,) = plain.validate(module, loader("test", 360), verbose=False)
    score = float(best.best_model_score)
    print(f"The best checkpoint had {100 * score:.1f} % right, and has {100 * metrics['val_accuracy']:.1f} % after reloading")
    assert metrics["val_accuracy"] == score >= 0.95
