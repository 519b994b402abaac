"""Networks of the papers, and a LightningModule that trains them."""

from lightning_distopt.models.classifier import ImageClassifier
from lightning_distopt.models.evonorm import EvoNormS0
from lightning_distopt.models.lenet import LeNet
from lightning_distopt.models.prototype_classifier import PrototypeClassifier
from lightning_distopt.models.registry import build_model
from lightning_distopt.models.resnet import CifarResNet, resnet8, resnet20, resnet32, resnet44, resnet56, resnet110

__all__ = [
    "CifarResNet",
    "EvoNormS0",
    "ImageClassifier",
    "LeNet",
    "PrototypeClassifier",
    "build_model",
    "resnet8",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
]
