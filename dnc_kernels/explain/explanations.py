"""Why a picture or a region of it gets its class: the nearest training sample of each of the likeliest classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from ..errors import check_value, whole_number
from ..nn import DNCClassifier, DNCHead
from ..nn._labels import pixels_at
from ._stream import Model, Prepare, as_picture, centre, evaluating, features_of, head_of
from .anchors import Anchors


class Evidence(NamedTuple):
    """What speaks for a class: its anchor (`label`, `sub`) nearest to the query.

    `similarity` is the cosine to it, `probability` the class's share in the softmax of the logits. `decides` is False where a
    sub-centroid of the class that is no training sample is nearer still.
    """

    label: int
    sub: int
    similarity: float
    probability: float
    decides: bool


@dataclass(frozen=True, eq=False)
class Explanation:
    """A decision and what speaks for it and against it.

    Args:
        query: number of the picture among those that were asked about.
        id: its name.
        picture: [3,H,W] uint8.
        truth: its class; None: unknown.
        evidence: of the likeliest classes, the decision first.
        row, column: in segmentation the pixel that was explained, else the middle.
        region: [H,W] bool, the connected region of one predicted class that the pixel stands for; None: the whole picture.
    """

    query: int
    id: str
    picture: Tensor
    truth: int | None
    evidence: tuple[Evidence, ...]
    row: int
    column: int
    region: NDArray[np.bool_] | None = None

    @property
    def label(self) -> int:
        """The class it was given."""
        return self.evidence[0].label

    @property
    def right(self) -> bool | None:
        """Whether that is the true class; None where that is unknown."""
        return None if self.truth is None else self.truth == self.label


def explain_images(
    model: Model,
    anchors: Anchors,
    pictures: Tensor | Sequence[Tensor],
    *,
    prepare: Prepare | None = None,
    labels: Tensor | Sequence[Tensor | int] | None = None,
    ids: Sequence[str] | None = None,
    top: int = 4,
    regions: int = 4,
) -> list[Explanation]:
    """Explain the class of each picture, or in segmentation of regions of each (DNC, figure 4).

    A region is a connected part of the predicted map. First come the largest of each class, by size, then the second. It is
    explained by the pixel whose embedding is most like the mean of the region's; its true class is the most frequent in it.

    Args:
        model: with `anchors` applied, as `anchor` leaves it.
        anchors: of this head.
        pictures: [B,3,H,W], or a list of [3,H,W] of any sizes; uint8 or float as `prepare` takes them in batches.
        prepare: as for `anchor`.
        labels: true classes [B], or maps [B,H,W] (a list of [H,W]) in segmentation; one that is no class means unknown.
        ids: names of the pictures; None: their numbers.
        top: classes of each explanation, at most.
        regions: of each picture, at most.

    Raises:
        ValueError, TypeError: wrong shapes; a head whose sub-centroids are not these anchors.
    """
    op = "explain_images"
    head, _ = head_of(op, model)
    top, regions = whole_number(op, "top", top), whole_number(op, "regions", regions)
    applied = head.prototypes.shape == anchors.embedding.shape and torch.allclose(
        head.prototypes, anchors.embedding.to(head.prototypes), atol=1e-6, rtol=0
    )
    check_value(applied, op, "anchors", "the sub-centroids of model.head", "others", "call anchors.apply_(model.head)")
    for name, values in (("labels", labels), ("ids", ids)):
        check_value(values is None or len(values) == len(pictures), op, name, f"{len(pictures)}, one a picture", values)
    found: list[Explanation] = []
    with evaluating(model):
        for query, picture in enumerate(pictures):
            check_value(picture.ndim == 3 and picture.shape[0] in (1, 3), op, "pictures", "of [3,H,W]", picture)
            truth = None if labels is None else torch.as_tensor(labels[query])
            name = str(query) if ids is None else str(ids[query])
            features = features_of(op, model, picture[None], prepare)
            whole = _Query(query, name, as_picture(picture), truth)
            if isinstance(head, DNCHead):
                found.extend(_regions(head, anchors, whole, features, top, regions))
            else:
                found.append(_image(head, anchors, whole, features, top))
    return found


class _Query(NamedTuple):
    number: int
    id: str
    picture: Tensor
    truth: Tensor | None


def _image(head: DNCClassifier, anchors: Anchors, query: _Query, features: Tensor, top: int) -> Explanation:
    height, width = query.picture.shape[1:]
    truth = None if query.truth is None else _class(query.truth, anchors)
    evidence = _evidence(anchors, head.snapshot(), head.embed(features)[0], head(features)[0], top)
    return Explanation(query.number, query.id, query.picture, truth, evidence, height // 2, width // 2)


def _regions(head: DNCHead, anchors: Anchors, query: _Query, features: Tensor, top: int, most: int) -> Iterator[Explanation]:
    """Explanations of regions in which a pixel of the feature map has the region's class: the largest of each class, by size,
    then the second of each.
    """
    height, width = query.picture.shape[1:]
    embedding, logits, prototypes = head.embed(features)[0], head(features)[0], head.snapshot()
    small = logits.argmax(0).cpu().numpy()
    predicted = head.predict(features, (height, width))[0].cpu().numpy()
    rows, columns = (
        np.array([centre(i, size, length, head.align_corners) for i in range(size)])
        for size, length in zip(small.shape, (height, width), strict=True)
    )
    masks: list[tuple[int, int, int, NDArray[np.bool_]]] = []
    for label in np.unique(predicted).tolist():
        numbered, _ = ndimage.label(predicted == label)
        areas = np.bincount(numbered.ravel())[1:]
        # more of a class than are shown at all: small ones may hold no feature
        largest = areas.argsort(kind="stable")[::-1][: 2 * most].tolist()
        masks += [(rank, -int(areas[i]), label, numbered == i + 1) for rank, i in enumerate(largest)]
    shown = 0
    for _, _, label, mask in sorted(masks, key=lambda one: one[:3]):
        if shown == most:
            return
        inside = mask[rows[:, None], columns] & (small == label)
        if not inside.any():
            continue  # so small that no feature has its centre there
        ys, xs = inside.nonzero()
        of_region = embedding[:, ys, xs].float()  # [D,n]
        medoid = int((of_region.mean(1) @ of_region).argmax())
        y, x = int(ys[medoid]), int(xs[medoid])
        evidence = _evidence(anchors, prototypes, embedding[:, y, x], logits[:, y, x], top)
        truth = None if query.truth is None else _truth(query.truth, mask, len(anchors.classes))
        yield Explanation(query.number, query.id, query.picture, truth, evidence, int(rows[y]), int(columns[x]), mask)
        shown += 1


def _evidence(anchors: Anchors, prototypes: Tensor, e: Tensor, logits: Tensor, top: int) -> tuple[Evidence, ...]:
    """The nearest anchors of the likeliest classes, of an embedding [D] and its logits [C]."""
    check_value(bool(e.isfinite().all()), "explain_images", "pictures", "of finite features", "NaN or Inf")
    likeliest = logits.float().softmax(0).topk(min(top, len(logits)))
    cosine = (prototypes @ e.to(prototypes.dtype)).cpu()
    real = anchors.sample >= 0
    found = []
    for probability, label in zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True):
        nearest = int(cosine[label].argmax())
        sub = int(torch.where(real[label], cosine[label], -torch.inf).argmax()) if real[label].any() else nearest
        found.append(Evidence(label, sub, float(cosine[label, sub]), probability, sub == nearest and bool(real[label, sub])))
    return tuple(found)


def _truth(labels: Tensor, mask: NDArray[np.bool_], classes: int) -> int | None:
    """The most frequent class of a region in a map of labels [H,W]; None without any."""
    inside = pixels_at(torch.from_numpy(mask), labels.shape, "nearest-exact")
    labels = labels.cpu()[inside]
    labels = labels[(labels >= 0) & (labels < classes)]
    return int(labels.bincount().argmax()) if len(labels) else None


def _class(label: Tensor, anchors: Anchors) -> int | None:
    return int(label) if 0 <= int(label) < len(anchors.classes) else None
