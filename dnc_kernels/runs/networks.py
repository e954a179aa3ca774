"""The networks by name, without their class layer, with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import message
from ..integrations import (
    DNCImageClassifier,
    DNCSegmenter,
    SegformerFeatures,
    SoftmaxImageClassifier,
    TimmFeatures,
    TorchvisionFeatures,
    UperNetFeatures,
    image_classifier,
    softmax_classifier,
)
from ..integrations._optional import require
from ..integrations.classifier import NETWORK_NAMES
from ..nn import DNCHead

NAMES = ("segformer", "upernet-swin", "fcn-resnet50", "deeplabv3-resnet50", "timm:NAME")
CLASSIFIER_NAMES = (*NETWORK_NAMES, "small", "four:D")


def make_backbone(name: str, size: tuple[int, int], *, tiny: bool = False) -> Any:
    """Network `name` of `NAMES` without its class layer: a module with `channels`.

    Args:
        name: of the network; after ``timm:`` the name of a timm backbone.
        size: height and width of its images.
        tiny: SegFormer and Swin with a few channels and one layer per stage, to see that everything works.

    Raises:
        ValueError: neither here nor in timm is there a network of that name.
        ModuleNotFoundError: the network's package is not installed.
    """
    if name == "segformer":
        small: dict[str, Any] = {
            "depths": [1] * 4, "hidden_sizes": [16, 32, 64, 64], "num_attention_heads": [1, 2, 2, 2], "decoder_hidden_size": 64,
        }  # fmt: skip
        return SegformerFeatures.create(**(small if tiny else {}))
    if name == "upernet-swin":
        small = {"hidden_size": 64, "embed_dim": 24, "depths": [1] * 4, "num_heads": [2, 2, 4, 4], "window_size": 4}
        return UperNetFeatures.create(**(small if tiny else {}))
    if name in ("fcn-resnet50", "deeplabv3-resnet50"):
        return TorchvisionFeatures.create(name.replace("-", "_"))
    kind, _, timm_name = name.partition(":")
    if kind != "timm" or not timm_name:
        raise ValueError(f"--network must be one of {', '.join(NAMES)}; got {name!r}")
    return TimmFeatures.create(timm_name, image_size=size)


def make_segmenter(backbone: Any, about: Mapping[str, Any]) -> DNCSegmenter:
    """`backbone` with the head that a run is about: its `num_classes`, `subcentroids`, `embed_channels` and so on."""
    return DNCSegmenter(backbone, DNCHead(
        backbone.channels, about["num_classes"], about["subcentroids"],
        embed_channels=about["embed_channels"], ignore_index=about["ignore_index"], recipe=about["recipe"],
    ))  # fmt: skip


class _Pooled(nn.Sequential):
    """Layers and the mean over all positions: features [B,channels] of images [B,3,H,W]."""

    def __init__(self, channels: int, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.channels = channels

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).mean((2, 3))


def _convolution(before: int, after: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]


def four_convolutions(channels: int) -> nn.Module:
    """Four 3x3 convolutions with batch norm and ReLU, the second and the third of stride 2: features [B,channels]."""
    widths = (channels // 6, channels // 3, channels * 2 // 3, channels)
    pairs = zip((3, *widths), widths, (1, 2, 2, 1), strict=False)
    return _Pooled(channels, *(layer for pair in pairs for layer in _convolution(*pair)))


def small_resnet() -> nn.Module:
    """Three residual blocks of torchvision on a 3x3 stem, 0.2 M weights: features [B,96] of images of about 28x28."""
    resnet = require("torchvision.models.resnet", "--network small")

    def block(before: int, after: int, stride: int) -> nn.Module:
        same = stride == 1 and before == after
        shortcut = None if same else nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        return resnet.BasicBlock(before, after, stride, shortcut)

    return _Pooled(96, *_convolution(3, 24), block(24, 24, 2), block(24, 48, 2), block(48, 96, 2))


def make_classifier(about: Mapping[str, Any]) -> DNCImageClassifier | SoftmaxImageClassifier:
    """The network and head that a run is about.

    Args:
        about: `network` (of `CLASSIFIER_NAMES`), `size`, `classes` (names), `head` (``dnc`` or ``softmax``), `subcentroids`,
            `memory`, `head_recipe` and `momentum` (None: the recipe's).

    Raises:
        ValueError: there is no network of that name.
        ModuleNotFoundError: its package is not installed.
    """
    name, classes, size = about["network"], len(about["classes"]), (about["size"], about["size"])
    network: Any = name
    kind, _, width = name.partition(":")
    if name == "small":
        network = small_resnet()
    elif kind == "four":
        if not width.isdecimal() or int(width) < 2:
            raise ValueError(message("--network", "D", "a number of channels of at least 2 in four:D", name))
        network = four_convolutions(int(width))
    elif kind not in [known.partition(":")[0] for known in NETWORK_NAMES]:
        raise ValueError(f"--network must be one of {', '.join(CLASSIFIER_NAMES)}; got {name!r}")
    if about["head"] == "softmax":
        return softmax_classifier(network, classes, image_size=size)
    return image_classifier(
        network, classes, about["subcentroids"], image_size=size, memory_size=about["memory"], recipe=about["head_recipe"],
        momentum=about["momentum"],
    )  # fmt: skip
