"""Adapter for timm: any backbone that can give its feature maps."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import message
from ._optional import require

_FINEST_STRIDE = 4  # where segmentation heads work; the stride-2 maps of a ResNet would quadruple the pixels


def check_timm_name(op: str, argument: str, name: str) -> None:
    """Raise ValueError, which names the closest, unless timm has a model `name`."""
    timm = require("timm", op)
    if not timm.is_model(name):
        close = get_close_matches(name, timm.list_models())
        raise ValueError(message(op, argument, "a model of timm", name, f"close: {', '.join(close)}" if close else ""))


def fixed_size(timm: Any, name: str, image_size: tuple[int, int] | None) -> dict[str, Any]:
    """The option of ``timm.create_model`` that a network built for one size of images needs; none for the others."""
    published = timm.get_pretrained_cfg(name)
    fixed = image_size is not None and published is not None and published.fixed_input_size
    return {"img_size": image_size} if fixed else {}


class TimmFeatures(nn.Module):
    """Features [B,channels,h,w] of images: the feature maps of a timm backbone, joined at the size of the finest.

    A backbone has no decode head, so this adds the smallest one that uses all maps: a 1x1 convolution per map, bilinear
    upsampling, a sum, batch norm and ReLU. Maps with a stride below 4 are left out where there are others.

    Args:
        network: what ``timm.create_model(name, features_only=True)`` gives.
        channels: of the features.

    Attributes:
        channels: as given.
    """

    def __init__(self, network: Any, channels: int = 128) -> None:
        super().__init__()
        reductions, widths = network.feature_info.reduction(), network.feature_info.channels()
        self.network, self.channels = network, channels
        self._used = [i for i, stride in enumerate(reductions) if stride >= _FINEST_STRIDE] or list(range(len(reductions)))
        # maps are NCHW except for a few transformers, which say so
        self._channels_last = getattr(getattr(network, "output_fmt", None), "value", "NCHW") == "NHWC"
        self.lateral = nn.ModuleList(nn.Conv2d(widths[i], channels, 1, bias=False) for i in self._used)
        self.norm = nn.BatchNorm2d(channels)

    @classmethod
    def create(
        cls, name: str, channels: int = 128, *, image_size: tuple[int, int] | None = None, **options: Any
    ) -> TimmFeatures:
        """A backbone with random weights.

        Args:
            name: of the backbone in timm, such as ``resnet18`` or ``convnext_atto``.
            channels: of the features.
            image_size: height and width of the images, for backbones that are built for one size (ViT, Swin).
            options: further arguments of ``timm.create_model``.

        Raises:
            ValueError: timm has no backbone of that name.
        """
        timm = require("timm", "TimmFeatures")
        check_timm_name("TimmFeatures", "name", name)
        options = {**fixed_size(timm, name, image_size), **options}
        return cls(timm.create_model(name, pretrained=False, features_only=True, **options), channels)

    def forward(self, images: Tensor) -> Tensor:
        """Features of images."""
        maps = self.network(images)
        maps = [maps[i].movedim(-1, 1) if self._channels_last else maps[i] for i in self._used]
        size = max((tuple(m.shape[2:]) for m in maps), key=lambda s: s[0] * s[1])
        joined = [
            F.interpolate(lateral(m), size=size, mode="bilinear", align_corners=False) if tuple(m.shape[2:]) != size
            else lateral(m)
            for lateral, m in zip(self.lateral, maps, strict=True)
        ]  # fmt: skip
        return F.relu(self.norm(sum(joined[1:], joined[0])))
