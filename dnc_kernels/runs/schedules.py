"""How networks are trained: optimizers with their schedules, and named recipes of the paper's runs and of small ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from .views import Augment

Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["poly", "steps", "cosine", "one-cycle"]
OPTIMIZERS: tuple[Optimizer, ...] = ("sgd", "adamw")
SCHEDULES: tuple[Schedule, ...] = ("poly", "steps", "cosine", "one-cycle")
POWER = 0.9  # of the polynomial decay, as in the training recipes of DeepLab, UPerNet and SegFormer
SGD_MOMENTUM = 0.9
#: Matrices by shape, but not by what they do: Swin's and ViT's own code decays none of them.
UNDECAYED = ("relative_position_bias_table", "absolute_pos_embed", "pos_embed", "class_token", "cls_token")


@dataclass(frozen=True)
class Learning:
    """Optimizer and learning rate."""

    optimizer: Optimizer
    learning_rate: float
    """The peak."""
    weight_decay: float
    """On matrices and convolutions only: norms, biases, scales and position embeddings are left alone."""
    schedule: Schedule
    """``poly``: polynomial decay. ``steps``: a tenth at each milestone. ``cosine``: half a wave to 0. ``one-cycle``: torch's
    OneCycleLR, which moves the optimizer's momentum too."""
    warm_up: float = 0.0
    """Share of the steps in which the rate rises."""
    milestones: tuple[float, ...] = ()
    """Of ``steps``, as shares of the steps."""
    clip: float | None = None
    """The gradient's largest length; a longer one is scaled down to it."""

    def optimizer_of(self, network: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a network's learnable parameters."""
        learnable = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        decayed = [p.ndim > 1 and not name.endswith(UNDECAYED) for name, p in learnable]
        groups: list[dict[str, Any]] = [
            {"params": [p for (_, p), yes in zip(learnable, decayed, strict=True) if yes], "weight_decay": self.weight_decay},
            {"params": [p for (_, p), yes in zip(learnable, decayed, strict=True) if not yes], "weight_decay": 0.0},
        ]
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.learning_rate, momentum=SGD_MOMENTUM)
        return torch.optim.AdamW(groups, lr=self.learning_rate)

    def schedule_of(self, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
        """The learning rate of each of `steps` steps."""
        if self.schedule == "one-cycle":
            return OneCycleLR(optimizer, self.learning_rate, total_steps=steps, pct_start=self.warm_up)
        return LambdaLR(optimizer, lambda done: self.rate(done, steps))

    def rate(self, done: int, steps: int) -> float:
        """Share of the peak after `done` of `steps` steps; not for ``one-cycle``."""
        warm_up = round(self.warm_up * steps)
        rise = min(1.0, (done + 1) / max(1, warm_up))
        if self.schedule == "steps":
            return rise * 0.1 ** sum(done >= round(milestone * steps) for milestone in self.milestones)
        if self.schedule == "cosine":
            falling = min(1.0, max(0, done - warm_up) / max(1, steps - warm_up))
            return rise * (1 + math.cos(math.pi * falling)) / 2
        return rise * max(0.0, 1 - done / steps) ** POWER


@dataclass(frozen=True)
class TrainingRecipe:
    """A whole run of a classifier; every field is an option of examples/classify.py."""

    about: str
    dataset: str
    network: str
    size: int
    augment: Augment
    epochs: int
    batch: int
    learning: Learning
    train_images: int | None = None
    """Of the training images only so many, drawn by seed 1234; None: all."""


#: The paper's runs, after the released configuration files (docs/networks.md names what differs), and runs for a CPU.
TRAINING_RECIPES: dict[str, TrainingRecipe] = {
    "cifar-resnet50": TrainingRecipe(
        "the paper's CIFAR run", "cifar10", "cifar:resnet50", 32, "crop-flip", 200, 128,
        Learning("sgd", 0.1, 1e-4, "steps", milestones=(0.5, 0.75)),
    ),
    "imagenet-resnet50": TrainingRecipe(
        "the paper's ImageNet run of ResNet-50", "folder", "torchvision:resnet50", 224, "resized-crop", 100, 256,
        Learning("sgd", 0.1, 1e-4, "steps", milestones=(0.3, 0.6, 0.9)),
    ),
    "imagenet-swin-t": TrainingRecipe(
        "the paper's ImageNet run of Swin-T, without RandAugment, random erasing, Mixup and CutMix",
        "folder", "torchvision:swin_t", 224, "resized-crop", 300, 1024,
        Learning("adamw", 1e-3, 0.05, "cosine", warm_up=20 / 300, clip=5.0),
    ),
    "folder-resnet18": TrainingRecipe(
        "a folder of photographs with ResNet-18", "folder", "torchvision:resnet18", 160, "resized-crop", 30, 64,
        Learning("adamw", 1e-3, 0.05, "one-cycle", warm_up=0.2),
    ),
    "fashion-small": TrainingRecipe(
        "Fashion-MNIST with a small ResNet, for a CPU", "fashion-mnist", "small", 28, "crop-flip", 15, 128,
        Learning("adamw", 1e-2, 0.05, "one-cycle", warm_up=0.2),
    ),
    "fashion-14": TrainingRecipe(
        "10,000 images of Fashion-MNIST at 14x14 with four convolutions: minutes on a CPU",
        "fashion-mnist", "four:96", 14, "none", 8, 128, Learning("adamw", 1e-2, 0.01, "one-cycle", warm_up=0.2), 10_000,
    ),
    "digits": TrainingRecipe(
        "scikit-learn's digits with four convolutions: seconds on a CPU",
        "digits", "four:48", 8, "none", 25, 64, Learning("adamw", 1e-2, 0.01, "one-cycle", warm_up=0.2),
    ),
}  # fmt: skip
