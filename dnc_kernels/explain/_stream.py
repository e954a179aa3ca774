"""Training or test data, batch by batch, as images, labels, names and the features of a model's backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .._tensors import without_ignored
from ..errors import SWAPPED, check_dtype, check_integer, check_value, describe, label_fix, swapped
from ..nn import DNCClassifier, DNCHead
from ..nn._batches import evaluated
from ..nn._labels import sort_out_labels

Prepare = Callable[[Tensor], Tensor]
Data = Iterable[Sequence[Any]]


class Model(Protocol):
    """A backbone and its head, such as `DNCSegmenter` and `DNCImageClassifier`."""

    @property
    def backbone(self) -> Any:
        """Turns images into the head's features."""

    @property
    def head(self) -> Any:
        """A `DNCHead` or `DNCClassifier`."""


@dataclass(frozen=True)
class Batch:
    """A batch of the data.

    Args:
        first: number of its first sample.
        images: [B,3,H,W], as the data gave them.
        labels: [B] or [B,H,W] int64 on the head's device, -1 left out.
        ids: names of the samples; None: the data gave none.
        features: runs the backbone.
    """

    first: int
    images: Tensor
    labels: Tensor
    ids: list[str] | None
    features: Callable[[], Tensor]


def head_of(op: str, model: Model) -> tuple[DNCHead | DNCClassifier, bool]:
    """The head of a model, and whether it segments.

    Raises:
        TypeError: it has none of ours.
    """
    head = getattr(model, "head", None)
    ok = isinstance(head, (DNCHead, DNCClassifier)) and hasattr(model, "backbone")
    check_dtype(ok, op, "model", "a module with .backbone and a DNCHead or DNCClassifier as .head", type(model).__name__,
                "DNCSegmenter(backbone, head) makes one")  # fmt: skip
    assert isinstance(head, (DNCHead, DNCClassifier))
    return head, isinstance(head, DNCHead)


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Backbone and head in eval mode and without gradients, afterwards as they were."""
    with evaluated(model.backbone, model.head), torch.no_grad():
        yield


def features_of(op: str, model: Model, images: Tensor, prepare: Prepare | None) -> Tensor:
    """What the backbone makes of images [B,3,H,W]."""
    if prepare is None:
        check_dtype(
            images.is_floating_point(), op, "images", "the backbone's input, in floats, without prepare", images,
            "pass prepare, such as lambda images: images.float() / 255",
        )  # fmt: skip
        images = images.to(model.head.prototypes.dtype)
    else:
        images = prepare(images)
    return model.backbone(images.to(model.head.prototypes.device))


def stream(op: str, model: Model, data: Data, prepare: Prepare | None) -> Iterator[Batch]:
    """The batches of one pass over `data`.

    Raises:
        TypeError, ValueError: `data` can be read once only, or gives something else than batches (images, labels, ids).
    """
    check_dtype(
        isinstance(data, Iterable) and not isinstance(data, Iterator), op, "data",
        "a DataLoader, a list or another iterable that can be read again", data,
        "a generator is used up after one pass: make a list of it, or a class with __iter__",
    )  # fmt: skip
    head, segmentation = head_of(op, model)
    shape = "[B,H,W]" if segmentation else "[B]"
    first = 0
    for item in data:
        ok = isinstance(item, (tuple, list)) and len(item) >= 2 and all(isinstance(t, Tensor) for t in item[:2])
        got = [describe(t) for t in item[:3]] if isinstance(item, (tuple, list)) else type(item).__name__
        check_dtype(ok, op, "data", "batches of (images, labels) or (images, labels, ids)", got)
        images, labels, *more = item
        _check_images(op, images)
        check_integer(op, "labels", labels)
        fits = labels.ndim == (3 if segmentation else 1) and labels.shape[0] == images.shape[0]
        if not fits or (segmentation and swapped(labels, images)):
            fix = SWAPPED if fits else label_fix(labels, images if segmentation else images.flatten(1))
            check_value(False, op, "labels", f"{shape} with B={images.shape[0]} like images", labels, fix)
        ids = None
        if more and not isinstance(more[0], (str, bytes)) and isinstance(more[0], (Sequence, Tensor)):
            ids = [str(name) for name in (more[0].tolist() if isinstance(more[0], Tensor) else more[0])]
            check_value(len(ids) == images.shape[0], op, "ids", f"{images.shape[0]} names, one an image", ids)
        labels, ignored, _ = sort_out_labels(op, labels.to(head.prototypes.device), head.num_classes, head.ignore_index)
        labels = without_ignored(labels.to(torch.int64), ignored)
        yield Batch(first, images, labels, ids, lambda images=images: features_of(op, model, images, prepare))  # type: ignore[misc]
        first += images.shape[0]
    check_value(first > 0, op, "data", "at least one batch", "none")


def _check_images(op: str, images: Tensor) -> None:
    ok = images.ndim == 4 and images.shape[1] in (1, 3) and (images.dtype == torch.uint8 or images.is_floating_point())
    check_value(ok, op, "images", "[B,3,H,W] or [B,1,H,W], uint8 or float", images)


def as_picture(image: Tensor) -> Tensor:
    """[3,H,W] uint8 on the CPU of an image [3,H,W] or [1,H,W].

    Floats in [0,1] are scaled by 255; others, such as normalised ones, are stretched from their least to their largest.
    """
    image = image.detach().cpu().expand(3, -1, -1)
    if image.dtype == torch.uint8:
        return image
    image = image.float()
    least, most = image.aminmax()
    if least < 0 or most > 1:
        image = (image - least) / (most - least).clamp(min=torch.finfo(image.dtype).tiny)
    return (image * 255).round().to(torch.uint8)


def centre(position: int, size: int, of_picture: int, align_corners: bool) -> int:
    """Row (column) of the picture that a row (column) of a feature map of `size` rows is centred on, as bilinear upsampling
    places it.
    """
    if align_corners:
        return round(position * (of_picture - 1) / max(1, size - 1))
    return min(of_picture - 1, int((position + 0.5) * of_picture / size))
