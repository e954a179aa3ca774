"""Other people's networks with a DNC head: each adapter is a network without its class layer.

    backbone = TorchvisionFeatures.create("deeplabv3_resnet50")
    network = DNCSegmenter(backbone, DNCHead(backbone.channels, num_classes=19))
    classifier = image_classifier("torchvision:resnet50", num_classes=1000)

Nothing is downloaded: you build a network from its configuration, or hand over one with the weights that you loaded. The
packages (extra ``networks``: transformers, torchvision, timm) are imported when a network is created, not with this module.
"""

from ._optional import declare_missing_torchvision_ops
from .classifier import (
    DNCImageClassifier,
    HuggingFaceClassifierFeatures,
    SoftmaxClassifier,
    SoftmaxImageClassifier,
    image_classifier,
    pooled_features,
    softmax_classifier,
)
from .huggingface import SegformerFeatures, UperNetFeatures
from .segmenter import DNCSegmenter
from .timm_backbones import TimmFeatures
from .torchvision_networks import TorchvisionFeatures

__all__ = [
    "DNCImageClassifier",
    "DNCSegmenter",
    "HuggingFaceClassifierFeatures",
    "SegformerFeatures",
    "SoftmaxClassifier",
    "SoftmaxImageClassifier",
    "TimmFeatures",
    "TorchvisionFeatures",
    "UperNetFeatures",
    "declare_missing_torchvision_ops",
    "image_classifier",
    "pooled_features",
    "softmax_classifier",
]
