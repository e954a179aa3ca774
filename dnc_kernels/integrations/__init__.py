"""Other people's networks with a DNC head: each adapter is a network without its class layer.

    backbone = TorchvisionFeatures.create("deeplabv3_resnet50")
    network = DNCSegmenter(backbone, DNCHead(backbone.channels, num_classes=19))

Nothing is downloaded: you build a network from its configuration, or hand over one with the weights that you loaded. The
packages (extra ``networks``: transformers, torchvision, timm) are imported when a network is created, not with this module.
"""

from ._optional import declare_missing_torchvision_ops
from .huggingface import SegformerFeatures, UperNetFeatures
from .segmenter import DNCSegmenter
from .timm_backbones import TimmFeatures
from .torchvision_networks import TorchvisionFeatures

__all__ = [
    "DNCSegmenter",
    "SegformerFeatures",
    "TimmFeatures",
    "TorchvisionFeatures",
    "UperNetFeatures",
    "declare_missing_torchvision_ops",
]
