"""A backbone and a head as one module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..nn import DNCHead, DNCLoss


class DNCSegmenter(nn.Module):
    """A network that gives features and the head that classifies them, as one module to save, move and train.

    Args:
        backbone: turns images [B,3,H,W] into features [B,head.in_channels,h,w], as the adapters of this package do.
        head: classifies those features.
    """

    def __init__(self, backbone: nn.Module, head: DNCHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor, labels: Tensor | None = None, *, update: bool | None = None) -> Tensor | DNCLoss:
        """What the head gives for the features of images [B,3,H,W]: logits [B,C,h,w], or with labels [B,H,W] its loss."""
        return self.head(self.backbone(images), labels, update=update)

    def loss(self, images: Tensor, labels: Tensor, *, update: bool | None = None) -> DNCLoss:
        """Training loss of images and labels [B,H,W]; moves the sub-centroids in training mode (`DNCHead.loss`)."""
        return self.head.loss(self.backbone(images), labels, update=update)

    def predict(self, images: Tensor, size: int | Sequence[int] | None = None) -> Tensor:
        """Classes [B,H,W] int64 of images at `size` (None: the size of the images); call `eval()` first."""
        features = self.backbone(images)
        return self.head.predict(features, (images.shape[2], images.shape[3]) if size is None else size)
