"""Pictures as a network sees them: of one size, augmented for training; batches that follow from the seed alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..integrations._optional import require
from .data import DataError, Picture, order_of
from .images import Images

Augment = Literal["none", "crop-flip", "resized-crop"]
AUGMENTS: tuple[Augment, ...] = ("none", "crop-flip", "resized-crop")
View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Views:
    """Pictures [H,W,3] uint8 of any size to tensors [3,size,size] uint8.

    Args:
        size: height and width.
        augment: for training. ``crop-flip``: zeros around the picture, an eighth of its size wide (4 pixels at 32), a random
            crop, half of them mirrored. ``resized-crop``: a random part of 8 to 100% of the area, resized, half of them
            mirrored. ``none``: as for testing.
    """

    size: int
    augment: Augment = "none"

    def test(self, picture: Tensor) -> Tensor:
        """View of a picture [3,H,W] without chance.

        After ``resized-crop`` the short side is resized to 8/7 of `size` and the middle is cut out; otherwise the short side
        becomes `size`. A picture of that size stays as it is.
        """
        return picture if tuple(picture.shape[1:]) == (self.size, self.size) else self._fit(picture)

    def train(self, picture: Tensor) -> Tensor:
        """View of a picture [3,H,W] that draws from torch's global generator."""
        if self.augment == "none":
            return self.test(picture)
        return self._change(picture if self.augment == "resized-crop" else self.test(picture))

    @cached_property
    def _fit(self) -> View:
        v2 = _transforms()
        short = round(self.size * 8 / 7) if self.augment == "resized-crop" else self.size
        return v2.Compose([v2.Resize(short, antialias=True), v2.CenterCrop(self.size)])

    @cached_property
    def _change(self) -> View:
        v2, size = _transforms(), self.size
        crop = (
            v2.RandomCrop(size, padding=size // 8)
            if self.augment == "crop-flip"
            else v2.RandomResizedCrop(size, antialias=True)
        )
        return v2.Compose([crop, v2.RandomHorizontalFlip()])


def _transforms() -> Any:
    return require("torchvision.transforms.v2", "augmenting or resizing images")


def as_tensor(picture: Picture) -> Tensor:
    """A picture [H,W,3] as tensor [3,H,W]."""
    return torch.from_numpy(np.array(picture.transpose(2, 0, 1)))


@dataclass(frozen=True)
class ImageBatches:
    """Batches of a run in which every epoch sees every image once. That of a step follows from `seed` and the step alone.

    So a resumed run needs no state to go on with the same data.

    Args:
        images: to draw from.
        views: how they are seen.
        batch: images per step, of all ranks together; the last batch of an epoch goes on into the next one.
        seed: of order and augmentation.
        workers: processes that read ahead; 0: this one reads when it needs a batch.
        rank, ranks: which part of every batch is ours, in data parallel training.
    """

    images: Images
    views: Views
    batch: int
    seed: int
    workers: int = 0
    rank: int = 0
    ranks: int = 1

    def steps(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images [B,3,h,w] uint8 and labels [B] int64 of steps first..last.

        Raises:
            DataError: a file cannot be read.
        """
        loader: DataLoader[Any] = DataLoader(
            _Steps(self), batch_size=None, sampler=range(first, last + 1), num_workers=self.workers,
            generator=torch.Generator(),  # or it would draw from the global one, which a resumed run has to find as it was
        )  # fmt: skip
        for found in loader:
            if isinstance(found, DataError):
                raise found
            yield found

    def of_step(self, step: int) -> tuple[Tensor, Tensor]:
        """Images and labels of a step, from 1."""
        share = self.batch // self.ranks
        start = (step - 1) * self.batch + self.rank * share
        samples = [self.sample(number) for number in range(start, start + share)]
        return torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])

    def sample(self, number: int) -> tuple[Tensor, int]:
        """The `number`-th sample of training, from 0. The order is one random permutation after another."""
        epoch, position = divmod(number, len(self.images))
        picture, label = self.images.read(int(order_of(len(self.images), self.seed, epoch)[position]))
        if self.views.augment == "none":
            return self.views.test(as_tensor(picture)), label
        with torch.random.fork_rng(devices=[]):
            drawn = np.random.SeedSequence([self.seed, 1, number]).generate_state(1, np.uint64)[0]
            torch.default_generator.manual_seed(int(drawn))
            return self.views.train(as_tensor(picture)), label


class _Steps(torch.utils.data.Dataset[Any]):
    """For a `DataLoader`: batches by the number of their step; an error as a value, or it would arrive as a traceback."""

    def __init__(self, batches: ImageBatches) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor] | DataError:
        try:
            return self.batches.of_step(step)
        except DataError as error:
            return error


@dataclass(frozen=True)
class InOrder:
    """Batches of images as for testing, in order, again and again: images [B,3,h,w] uint8, labels [B] int64, ids.

    Args:
        images: all of them.
        views: how they are seen.
        batch: images per batch.
        rank, ranks: of several ranks each has every `ranks`-th batch.
    """

    images: Images
    views: Views
    batch: int
    rank: int = 0
    ranks: int = 1

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        for start in range(self.rank * self.batch, len(self.images), self.ranks * self.batch):
            numbers = range(start, min(start + self.batch, len(self.images)))
            samples = [self.images.read(number) for number in numbers]
            pictures = torch.stack([self.views.test(as_tensor(picture)) for picture, _ in samples])
            yield pictures, torch.tensor([label for _, label in samples]), [self.images.ids[number] for number in numbers]
