"""Adapters for Hugging Face transformers: SegFormer, and UPerNet on any backbone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._optional import class_layer, require


class SegformerFeatures(nn.Module):
    """Features [B,channels,H/4,W/4] of images [B,3,H,W]: SegFormer's encoder and all-MLP decoder, without the class layer.

    The names in the state dict are those of the network.

    Args:
        network: a ``SegformerForSemanticSegmentation``. The adapter takes over its modules and replaces its class layer by
            the identity, in the network itself.

    Attributes:
        channels: of the features (``decoder_hidden_size``).
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.segformer, self.decode_head = network.segformer, network.decode_head
        self.channels = class_layer("SegformerFeatures", self.decode_head.classifier, "network.decode_head.classifier")
        self.decode_head.classifier = nn.Identity()

    @classmethod
    def create(cls, **options: Any) -> SegformerFeatures:
        """A network with random weights, from the options of a ``SegformerConfig``; the defaults are those of SegFormer-B0."""
        transformers = require("transformers", "SegformerFeatures")
        return cls(transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**options)))

    def forward(self, images: Tensor) -> Tensor:
        """Features of images."""
        return self.decode_head(self.segformer(images, output_hidden_states=True, return_dict=True).hidden_states)


class UperNetFeatures(nn.Module):
    """Features [B,channels,H/4,W/4] of images [B,3,H,W]: a backbone and UPerNet's pyramid decoder, without the class layer.

    The auxiliary head is dropped; it only adds a loss. The names in the state dict are those of the network.

    Args:
        network: a ``UperNetForSemanticSegmentation``. The adapter takes over its modules and replaces its class layer by the
            identity, in the network itself.

    Attributes:
        channels: of the features (``hidden_size``).
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.backbone, self.decode_head = network.backbone, network.decode_head
        self.channels = class_layer("UperNetFeatures", self.decode_head.classifier, "network.decode_head.classifier")
        self.decode_head.classifier = nn.Identity()

    @classmethod
    def create(cls, hidden_size: int = 512, **swin: Any) -> UperNetFeatures:
        """A network with random weights on a Swin backbone.

        Args:
            hidden_size: channels of the decoder, and of the features.
            swin: options of a ``SwinConfig``; the defaults are those of Swin-T.
        """
        transformers = require("transformers", "UperNetFeatures")
        stages = [f"stage{i + 1}" for i in range(len(swin.get("depths", (2, 2, 6, 2))))]
        config = transformers.UperNetConfig(
            backbone_config=transformers.SwinConfig(out_features=stages, **swin),
            hidden_size=hidden_size, use_auxiliary_head=False,
        )  # fmt: skip
        return cls(transformers.UperNetForSemanticSegmentation(config))

    def forward(self, images: Tensor) -> Tensor:
        """Features of images."""
        return self.decode_head(self.backbone(images).feature_maps)
