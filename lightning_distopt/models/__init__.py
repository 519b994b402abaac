"""Networks of the papers, and a LightningModule that trains them."""

from lightning_distopt.models.classifier import ImageClassifier
from lightning_distopt.models.encoder_classifier import EncoderClassifier, EncoderTagger
from lightning_distopt.models.evonorm import EvoNormS0
from lightning_distopt.models.lenet import LeNet
from lightning_distopt.models.pretrained import find_encoder
from lightning_distopt.models.prototype_classifier import PrototypeClassifier
from lightning_distopt.models.registry import build_model
from lightning_distopt.models.resnet import CifarResNet, resnet8, resnet20, resnet32, resnet44, resnet56, resnet110
from lightning_distopt.models.spans import SpanF1
from lightning_distopt.models.wide_resnet import WideResNet, wrn28_2, wrn28_4, wrn28_8

__all__ = [
    "CifarResNet",
    "EncoderClassifier",
    "EncoderTagger",
    "EvoNormS0",
    "ImageClassifier",
    "LeNet",
    "PrototypeClassifier",
    "SpanF1",
    "WideResNet",
    "build_model",
    "find_encoder",
    "resnet8",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "wrn28_2",
    "wrn28_4",
    "wrn28_8",
]
