"""Image classifiers: a network of timm, torchvision or transformers with a DNC head, or a softmax head, as its class layer."""

from __future__ import annotations

from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import check_dtype, message
from ..nn import DNCClassifier, DNCLoss
from ._optional import require
from .timm_backbones import check_timm_name, fixed_size

Head = TypeVar("Head", bound="DNCClassifier | SoftmaxClassifier")

#: What `image_classifier` builds by name; NAME is of the package's own list.
NETWORK_NAMES = ("timm:NAME", "torchvision:NAME", "cifar:resnetNN", "hf-resnet", "hf-swin")


class SoftmaxClassifier(nn.Linear):
    """The ordinary class layer behind the calls of `DNCClassifier`: a linear layer, trained by cross-entropy.

    Args:
        in_features: D.
        num_classes: C.
        ignore_index: label to leave out; any other negative label is left out too.
        label_smoothing: of the cross-entropy, in [0,1].
    """

    def __init__(
        self, in_features: int, num_classes: int, *, ignore_index: int = -100, label_smoothing: float = 0.0, **where: Any
    ) -> None:
        super().__init__(in_features, num_classes, **where)
        self.num_classes, self.ignore_index, self.label_smoothing = num_classes, ignore_index, label_smoothing

    def forward(self, features: Tensor, labels: Tensor | None = None, *, update: bool | None = None) -> Any:
        """Logits [N,C] of features [N,D]; with labels [N] what `loss` gives. Nothing is there to `update`."""
        return super().forward(features) if labels is None else self.loss(features, labels, update=update)

    def loss(self, features: Tensor, labels: Tensor, *, update: bool | None = None) -> DNCLoss:
        """Mean cross-entropy of features [N,D] and labels [N], in the shape of a DNC head's loss: no PPC, no PPD."""
        logits = super().forward(features)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = torch.where((labels < 0) | (labels == self.ignore_index), -1, labels).long()
        count = (labels >= 0).sum().clamp(min=1)
        total = F.cross_entropy(logits, labels, ignore_index=-1, label_smoothing=self.label_smoothing, reduction="sum")
        loss = total / count
        accuracy = (logits.detach().argmax(1) == labels).sum() / count
        none = loss.new_zeros(())
        return DNCLoss(loss, loss, none, none, accuracy)

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """Classes [N] int64 of features [N,D]."""
        return super().forward(features).argmax(1)


class _ImageClassifier(nn.Module, Generic[Head]):
    """A network that gives one feature per image and the head that classifies it, as one module to save, move and train.

    Args:
        backbone: turns images [B,3,H,W] into features [B,D]; `pooled_features` makes one of a network.
        head: classifies those features.
    """

    head: Head

    def __init__(self, backbone: nn.Module, head: Head) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor, labels: Tensor | None = None, *, update: bool | None = None) -> Tensor | DNCLoss:
        """Logits [B,C] of images [B,3,H,W], or with labels [B] the loss (what DistributedDataParallel and compile see)."""
        return self.head(self.backbone(images), labels, update=update)

    def loss(self, images: Tensor, labels: Tensor, *, update: bool | None = None) -> DNCLoss:
        """Training loss of images and labels [B]; moves the sub-centroids, if any, in training mode (`DNCClassifier.loss`)."""
        return self.head.loss(self.backbone(images), labels, update=update)

    def predict(self, images: Tensor) -> Tensor:
        """Classes [B] int64 of images; call `eval()` first."""
        return self.head.predict(self.backbone(images))


class DNCImageClassifier(_ImageClassifier[DNCClassifier]):
    """A network with a `DNCClassifier`: images are classified by the nearest sub-centroid of their feature.

    Args:
        backbone: turns images [B,3,H,W] into features [B,D]; `pooled_features` makes one of a network.
        head: classifies those features.
    """


class SoftmaxImageClassifier(_ImageClassifier[SoftmaxClassifier]):
    """The softmax twin of `DNCImageClassifier`: the same calls, the same backbone, a linear class layer."""


class HuggingFaceClassifierFeatures(nn.Module):
    """Features [B,channels] of images [B,3,H,W]: a ResNet or Swin of transformers, without the class layer.

    The names in the state dict are those of the network.

    Args:
        network: a ``ResNetForImageClassification`` or ``SwinForImageClassification``. The adapter shares its modules; the
            network itself stays whole.

    Attributes:
        channels: of the features.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self._body = next((name for name in ("resnet", "swin") if hasattr(network, name)), "")
        check_dtype(
            bool(self._body), "HuggingFaceClassifierFeatures", "network",
            "a ResNetForImageClassification or SwinForImageClassification", type(network).__name__,
        )  # fmt: skip
        setattr(self, self._body, getattr(network, self._body))
        self.channels = _last_linear(network.classifier, "network.classifier").in_features

    @classmethod
    def create(cls, kind: str, **options: Any) -> HuggingFaceClassifierFeatures:
        """A network with random weights.

        Args:
            kind: ``resnet`` or ``swin``.
            options: of a ``ResNetConfig`` (default: ResNet-50) or ``SwinConfig`` (default: Swin-T).
        """
        transformers = require("transformers", "HuggingFaceClassifierFeatures")
        name = {"resnet": "ResNet", "swin": "Swin"}[kind]
        config = getattr(transformers, f"{name}Config")(**options)
        return cls(getattr(transformers, f"{name}ForImageClassification")(config))

    def forward(self, images: Tensor) -> Tensor:
        """Features of images."""
        return getattr(self, self._body)(images).pooler_output.flatten(1)


class Pooled(NamedTuple):
    """A network without its class layer, and the channels D of the features [B,D] that it gives."""

    backbone: nn.Module
    channels: int


def pooled_features(network: Any) -> Pooled:
    """A network without its class layer: pooled features [B,D] of images [B,3,H,W]. State-dict names stay the network's.

    Args:
        network: with the weights that you loaded or with random ones. A model of timm, or of torchvision (ResNet, Swin and any
            other whose class layer is the linear layer `fc`, `head`, `heads` or `classifier`): its class layer becomes the
            identity, in the network itself. A ``ResNetForImageClassification`` or ``SwinForImageClassification`` of
            transformers stays whole. A module with an attribute `channels` that gives features already is taken as it is.

    Raises:
        TypeError: none of these.
    """
    if type(network).__module__.startswith("transformers."):
        features = HuggingFaceClassifierFeatures(network)
        return Pooled(features, features.channels)
    if callable(getattr(network, "reset_classifier", None)):  # timm's own way
        layer = network.get_classifier()
        network.reset_classifier(0)
        # what comes before the class layer may be wider than what comes out of the last stage
        return Pooled(network, layer.in_features if isinstance(layer, nn.Linear) else network.num_features)
    if isinstance(getattr(network, "channels", None), int):
        return Pooled(network, network.channels)
    for name in ("fc", "head", "heads", "classifier"):
        layer = getattr(network, name, None)
        if isinstance(layer, nn.Linear):
            setattr(network, name, nn.Identity())
            return Pooled(network, layer.in_features)
        if isinstance(layer, nn.Sequential) and isinstance(layer[-1], nn.Linear):
            last = layer[-1]
            layer[-1] = nn.Identity()
            return Pooled(network, last.in_features)
    expected = "a classification network of timm, torchvision or transformers, or a module that gives features and has channels"
    raise TypeError(message("pooled_features", "network", expected, type(network).__name__))


def _last_linear(layer: nn.Module, where: str) -> nn.Linear:
    found = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    check_dtype(len(found) == 1, "HuggingFaceClassifierFeatures", where, "one linear class layer", repr(layer))
    return found[0]


def named_network(name: str, image_size: tuple[int, int] | None = None) -> Pooled:
    """Network `name` of `NETWORK_NAMES` without its class layer, with random weights; nothing is downloaded.

    Args:
        name: ``cifar:resnet50`` is torchvision's with the stem that 32x32 images need: a 3x3 convolution of stride 1 and no
            pooling.
        image_size: height and width of the images, for networks that are built for one size (ViT, Swin).

    Raises:
        ValueError: there is no network of that name.
        ModuleNotFoundError: its package is not installed.
    """
    kind, _, of_package = name.partition(":")
    if kind == "timm" and of_package:
        timm = require("timm", "image_classifier")
        check_timm_name("image_classifier", "network", of_package)
        return pooled_features(timm.create_model(of_package, pretrained=False, **fixed_size(timm, of_package, image_size)))
    if kind in ("torchvision", "cifar") and of_package:
        models = require("torchvision.models", "image_classifier")
        known = [
            n for n in models.list_models(module=models) if kind == "torchvision" or n in ("resnet18", "resnet34", "resnet50")
        ]
        if of_package not in known:
            raise ValueError(message("image_classifier", "network", f"after {kind}: one of {', '.join(known)}", name))
        network = models.get_model(of_package, weights=None)
        if kind == "cifar":
            network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision starts them
            network.maxpool = nn.Identity()
        return pooled_features(network)
    if name in ("hf-resnet", "hf-swin"):
        features = HuggingFaceClassifierFeatures.create(name.removeprefix("hf-"))
        return Pooled(features, features.channels)
    raise ValueError(message("image_classifier", "network", f"one of {', '.join(NETWORK_NAMES)}", name))


def image_classifier(
    network: Any, num_classes: int, num_subcentroids: int = 4, *, image_size: tuple[int, int] | None = None, **head_options: Any
) -> DNCImageClassifier:
    """A network with a `DNCClassifier` in place of its class layer.

    ``model = image_classifier("timm:resnet18", num_classes=10); model.loss(images, labels).loss.backward()``

    Args:
        network: a name of `NETWORK_NAMES`, built with random weights; or a network, as `pooled_features` takes it.
        num_classes: C.
        num_subcentroids: K.
        image_size: height and width, where a network is built by name for one size.
        head_options: further arguments of `DNCClassifier`.
    """
    backbone, channels = named_network(network, image_size) if isinstance(network, str) else pooled_features(network)
    return DNCImageClassifier(backbone, DNCClassifier(channels, num_classes, num_subcentroids, **head_options))


def softmax_classifier(
    network: Any, num_classes: int, *, image_size: tuple[int, int] | None = None, **head_options: Any
) -> SoftmaxImageClassifier:
    """The softmax twin of `image_classifier`; with the same seed of torch its backbone begins with the same weights.

    Args:
        network: as of `image_classifier`, and so are the next two.
        num_classes: C.
        image_size: height and width, where a network is built by name for one size.
        head_options: further arguments of `SoftmaxClassifier`.
    """
    backbone, channels = named_network(network, image_size) if isinstance(network, str) else pooled_features(network)
    return SoftmaxImageClassifier(backbone, SoftmaxClassifier(channels, num_classes, **head_options))
