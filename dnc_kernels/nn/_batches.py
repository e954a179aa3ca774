"""The one way in which data stream through a head: unit embeddings of flat pixels and their classes, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._tensors import check_pixels, flat_pixels, without_ignored
from ..errors import check_device, check_dtype, check_integer, check_value, describe
from ._labels import check_labels, left_out_below_zero, pixels_at, sort_out_labels

if TYPE_CHECKING:
    from .subcentroids import SubCentroids

#: What `embedded` takes: features (or, with a backbone, images), or batches of them with their labels.
Data = Tensor | Iterable[Any]
Prepare = Callable[[Tensor], Tensor]


def embedded(
    head: SubCentroids,
    op: str,
    data: Data,
    labels: Tensor | None = None,
    *,
    backbone: Callable[[Tensor], Tensor] | None = None,
    prepare: Prepare | None = None,
) -> Batches:
    """Data as batches of unit embeddings and classes, to go through as often as `data` allows.

    Args:
        head: a `DNCHead`, a `DNCClassifier`, or a `SubCentroids`, for which features are embeddings already.
        op: name of the caller in messages.
        data: features as the head takes them, with `labels`: one batch. Or batches ``(features, labels, ...)``, such as a
            DataLoader; what comes after the second item is not looked at. Moved to the device of the head, batch by batch.
        labels: with a tensor alone; as of the head's `loss`: [N], or [B,H,W] at the size of the features or of the images.
        backbone: then the first of a batch are images, and ``backbone(prepare(images))`` the features.
        prepare: what the backbone needs done with the images first; None: nothing.

    Raises:
        ValueError, TypeError: labels without a tensor or the other way round, `prepare` without `backbone`, or, while it
            streams, a batch of another form; and as the head's `loss` for features and labels.
    """
    check_value(prepare is None or backbone is not None, op, "prepare", "None without backbone", prepare)
    if isinstance(data, Tensor):
        check_value(labels is not None, op, "labels", "given with a tensor", labels)
    else:
        check_value(labels is None, op, "labels", "None where data is made of batches (features, labels)", labels)
        check_dtype(isinstance(data, Iterable), op, "data", "a tensor or batches (features, labels)", data)
    return Batches(head, op, data, labels, backbone, prepare)


class Batches:
    """Yields ``(e [n,D], group [n])``: unit embeddings of flat pixels, float32 at least, and their classes, int64.

    A class of -1 means "leave out": not labelled, or a feature that is not finite or has no direction; such a row of `e` has
    no meaning. Nothing has a gradient. Head and backbone are in eval mode while a batch is computed, module by module as they
    were afterwards.
    """

    def __init__(
        self,
        head: SubCentroids,
        op: str,
        data: Data,
        labels: Tensor | None,
        backbone: Callable[[Tensor], Tensor] | None,
        prepare: Prepare | None,
    ) -> None:
        self.head, self.op, self.data, self.labels = head, op, data, labels
        self.backbone, self.prepare = backbone, prepare
        #: Whether there is no second pass: a generator, or another iterator that is its own.
        self.once = not isinstance(data, Tensor) and isinstance(data, Iterator)
        self._passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.once and self._passes:
            fix = "pass the DataLoader or a list itself, not an iterator over it"
            check_value(False, self.op, "data", "something that can be gone through again", self.data, fix)
        self._passes += 1
        if isinstance(self.data, Tensor):
            assert self.labels is not None
            yield self._embedded(self.data, self.labels)
            return
        for batch in self.data:
            ok = isinstance(batch, (tuple, list)) and len(batch) >= 2 and all(isinstance(t, Tensor) for t in batch[:2])
            if not ok:
                got = f"({', '.join(map(describe, batch))})" if isinstance(batch, (tuple, list)) else describe(batch)
                fix = "convert arrays with torch.as_tensor(...)" if isinstance(batch, (tuple, list)) else ""
                check_dtype(False, self.op, "data", "batches (features, labels) of tensors", got, fix)
            yield self._embedded(batch[0], batch[1])

    @torch.no_grad()
    def _embedded(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        head, op = self.head, self.op
        device = head.prototypes.device
        check_integer(op, "labels", labels)
        for name, t in (("features", features), ("labels", labels)):
            check_value(device.type == "meta" or not t.is_meta, op, name, f"of values, to be moved to {device}", t)
        features, labels = (t.to(device, non_blocking=True) for t in (features, labels))
        with evaluated(head, self.backbone):
            if self.backbone is not None:
                features = self.backbone(features if self.prepare is None else self.prepare(features))
                check_dtype(isinstance(features, Tensor), op, "backbone", "a function from images to features", features)
                check_device(op, "backbone's features", features, head.prototypes, "the head")
            embed = getattr(head, "embed", None)
            check_pixels(op, features, "features")
            e = features if embed is None else embed(features)
        check_value(e.shape[1] == head.channels, op, "features", f"of D={head.channels} channels", e)
        check_labels(op, labels, features)
        group = self._classes(labels, features)
        e = flat_pixels(e)
        e = e.to(torch.promote_types(e.dtype, torch.float32))
        length = torch.linalg.vector_norm(e, dim=1)
        if embed is None or features.dtype in (torch.float16, torch.bfloat16):
            e = F.normalize(e, dim=1)
        # an embedding has length 1, or 0 for a feature whose channels are all alike
        kept = length.isfinite() & (length > (0 if embed is None else 0.5))
        return e, torch.where(kept, group, -1)

    def _classes(self, labels: Tensor, features: Tensor) -> Tensor:
        """[n] int64, -1: left out; at the size of the features."""
        head, ignored = self.head, -1
        ignore_index = getattr(head, "ignore_index", None)
        if ignore_index is None:
            labels = left_out_below_zero(self.op, "labels", labels, head.num_classes, "C").view(labels.shape)
        else:
            labels, ignored, _ = sort_out_labels(self.op, labels, head.num_classes, ignore_index)
        if features.ndim == 4:
            labels = pixels_at(labels, features.shape[2:], getattr(head, "label_mode", "nearest-exact"))
        return without_ignored(labels.to(torch.int64), ignored).reshape(-1)


@contextmanager
def evaluated(*parts: Any) -> Iterator[None]:
    """Eval mode, by the flag alone: `train()` of a module may do more, such as warn."""
    modules = [m for part in parts if isinstance(part, nn.Module) for m in part.modules() if m.training]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True
