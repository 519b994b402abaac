"""The command line of this project: `python train.py fit --config config.yaml`."""

from lightning.pytorch.cli import LightningCLI

from datamodule import Digits
from model import Classifier

if __name__ == "__main__":
    LightningCLI(Classifier, Digits)
