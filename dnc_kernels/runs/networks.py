"""The networks by name, without their class layer, with random weights."""

from __future__ import annotations

from typing import Any

from ..integrations import SegformerFeatures, TimmFeatures, TorchvisionFeatures, UperNetFeatures

NAMES = ("segformer", "upernet-swin", "fcn-resnet50", "deeplabv3-resnet50", "timm:NAME")


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
