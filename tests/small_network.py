"""What the tests of whole training runs share: digit scenes, a backbone of stride 4, and the head behind one forward."""

import inspect
from functools import cache

import pytest
import torch

from dnc_kernels import nn

CLASSES, SUBCENTROIDS, CHANNELS = 11, 3, 16
CHECKPOINTS = ("none", "scores", "all")


@cache
def scenes(count, size=40):
    """Images [count,3,size,size] in -2..2 and labels [count,size,size], the first three rows unlabelled."""
    pytest.importorskip("sklearn")
    from dnc_kernels.demo.scenes import SceneConfig, make_scenes

    images, labels = (
        torch.from_numpy(a)
        for a in make_scenes(count, seed=0, config=SceneConfig(size, size, tries=60, fragments=0, scale=(2.0, 2.5)))
    )
    labels[:, :3] = 255
    return (images - 0.5) * 4, labels


def make_head(checkpoint=None, k=SUBCENTROIDS, **options):
    """A head for the features of `Net`; every draw comes from its own generator. `checkpoint` goes to a head that has it."""
    if checkpoint is not None and "checkpoint" in inspect.signature(nn.DNCHead).parameters:
        options["checkpoint"] = checkpoint
    options = {"momentum": 0.9, "generator": torch.Generator().manual_seed(0), **options}
    return nn.DNCHead(CHANNELS, CLASSES, k, **options)


class Net(torch.nn.Module):
    """Backbone and head; equal arguments, equal bits."""

    def __init__(self, checkpoint=None, **options):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = torch.nn.Sequential(
            torch.nn.Conv2d(3, CHANNELS, 3, stride=2, padding=1, bias=False),
            torch.nn.BatchNorm2d(CHANNELS),
            torch.nn.ReLU(),
            torch.nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1),
        )
        self.head = make_head(checkpoint, **options)

    def forward(self, images, labels):
        """Loss of a batch."""
        return self.head.loss(self.backbone(images), labels)
