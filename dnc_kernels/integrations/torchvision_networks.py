"""Adapter for torchvision: FCN and DeepLabV3."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._optional import class_layer, require


class TorchvisionFeatures(nn.Module):
    """Features [B,channels,H/8,W/8] of images [B,3,H,W]: backbone and decode head of FCN or DeepLabV3, without the class layer.

    The auxiliary classifier is dropped; it only adds a loss. The names in the state dict are those of the network.

    Args:
        network: a segmentation network of torchvision whose ``classifier`` ends in a 1x1 convolution (FCN, DeepLabV3). The
            adapter shares its modules; the network itself stays whole.

    Attributes:
        channels: of the features: 256 for DeepLabV3, 512 for FCN on ResNet-50 or ResNet-101.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.backbone = network.backbone
        *layers, last = network.classifier.children()
        self.channels = class_layer("TorchvisionFeatures", last, "the last layer of network.classifier")
        self.classifier = nn.Sequential(*layers)

    @classmethod
    def create(cls, name: str, **options: Any) -> TorchvisionFeatures:
        """A network with random weights.

        Args:
            name: function in ``torchvision.models.segmentation``: ``fcn_resnet50``, ``deeplabv3_resnet50`` and the like.
            options: its further arguments.
        """
        build = getattr(require("torchvision.models.segmentation", "TorchvisionFeatures"), name)
        return cls(build(weights=None, weights_backbone=None, **options))

    def forward(self, images: Tensor) -> Tensor:
        """Features of images."""
        return self.classifier(self.backbone(images)["out"])
