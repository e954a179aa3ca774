"""A small convolutional backbone of stride 4 for the digit scenes, and the softmax head it is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import DNCLoss, resize_labels


class SmallBackbone(nn.Module):
    """Features `[B, out_channels, H/4, W/4]` of images `[B, in_channels, H, W]` in 0..1; nine convolutions.

    H and W must be multiples of 4. The dilated blocks see about 90 pixels, twice the largest digit.
    """

    stride = 4

    def __init__(self, in_channels: int = 3, out_channels: int = 64) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, 24, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(inplace=True),
            nn.Conv2d(24, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, out_channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )
        self.blocks = nn.Sequential(_Block(out_channels, 1), _Block(out_channels, 2), _Block(out_channels, 4))

    def forward(self, images: Tensor) -> Tensor:
        """Features of images."""
        return self.blocks(self.stem((images - 0.5) * 4))  # 4: to about unit variance


class _Block(nn.Module):
    """Two 3x3 convolutions with batch norm around a skip connection; `[B, C, h, w]` to the same shape."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.body(x))


class SoftmaxHead(nn.Module):
    """The ordinary head: a 1x1 convolution, trained by cross-entropy of logits upsampled to the labels; plain torch."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, num_classes, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B,C,h,w] of features [B,in_channels,h,w]."""
        return self.conv(features)

    def loss(self, features: Tensor, labels: Tensor) -> DNCLoss:
        """Mean cross-entropy against labels [B,H,W] int64, in the shape of a DNC head's loss: no PPC, no PPD."""
        logits = self(features)
        upsampled = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(upsampled, labels)
        with torch.no_grad():
            accuracy = (logits.argmax(1) == resize_labels(labels, logits.shape[2:], "nearest")).float().mean()
        none = loss.new_zeros(())
        return DNCLoss(loss, loss.detach(), none, none, accuracy)

    @torch.no_grad()
    def predict(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Classes [B,H,W] int64 at `size`: argmax of the upsampled logits."""
        return F.interpolate(self(features), size=size, mode="bilinear", align_corners=False).argmax(1)
