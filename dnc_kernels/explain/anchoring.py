"""Anchoring: every sub-centroid becomes a real training sample, and what that costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..errors import check_value, message, whole_number
from ..nn import DNCClassifier, DNCHead, NearestSamples, _sync
from ..nn._labels import pixels_at
from ._stream import Data, Model, Prepare, as_picture, centre, evaluating, head_of, stream
from .anchors import Anchor, Anchors, Figures

SAME = 5e-3  # between the cosines of a sample in two passes, at most: more than 16 bits round


class Found(NamedTuple):
    """A sample that a sub-centroid shall become: its number, the pixel ``y*w + x`` of its feature map, and the cosine."""

    sample: int
    pixel: int
    similarity: float


Places = dict[tuple[int, int], Found]


def anchor(
    model: Model,
    data: Data,
    *,
    prepare: Prepare | None = None,
    classes: Sequence[str] | None = None,
    ids: Sequence[str] | None = None,
    evaluate: Data | None = None,
    crop: int | None = None,
    thumbnail: int = 160,
) -> Anchors:
    """Make every sub-centroid of `model.head` a training sample of its class, in place: it becomes that sample's embedding.

    Within a class the K samples are the K different ones whose cosines to the sub-centroids have the largest sum. In
    segmentation these are pixels of K different images where the class occurs in so many, else K different pixels. A class with
    fewer samples keeps its other sub-centroids (`Anchor.sample` is -1).

    Two passes over `data`, the second one through the backbone only where a chosen sample is; a third one in between if a class
    of a segmentation occurs in fewer than K images. Memory: 3*C*K*K numbers, and the crops.

    The paper (DNC, section 3) replaces sub-centroids by their nearest samples; its code for that was not released, and that two
    of a class may not share one is ours.

    Args:
        model: a backbone with a `DNCHead` or `DNCClassifier`. Its modes are restored; the head's sub-centroids are replaced.
        data: training data, an iterable that can be read again and gives the same batches in the same order: images [B,3,H,W]
            or [B,1,H,W], uint8 or float, labels [B] or [B,H,W], and perhaps the names of the samples. Without augmentation.
        prepare: makes of the images of a batch the input of `model.backbone`; it may scale pictures, not cut them. None: they
            are that input.
        classes: names of the classes; None: their numbers.
        ids: names of the samples; None: those in the data, without any their numbers.
        evaluate: data to measure the classifier on before and after; None: nothing is measured.
        crop: side in pixels of the window around a chosen pixel in segmentation; None: a quarter of the shorter side, at least
            48. Of images the whole is kept.
        thumbnail: pixels of a stored crop's longer side, at most; a larger one is scaled down.

    Raises:
        ValueError, TypeError: wrong shapes or types; data that is used up or comes in another order in the second pass.
        RuntimeError: several ranks: anchor in one process.
    """
    op = "anchor"
    head, segmentation = head_of(op, model)
    c, k, _ = head.prototypes.shape
    if (world := _sync.ranks(head.peers)) > 1:
        fix = "anchor in one process and save; Anchors.load(folder).apply_(head) then serves every rank"
        raise RuntimeError(message(op, "torch.distributed", "of one rank", f"{world} ranks", fix))
    classes = [str(i) for i in range(c)] if classes is None else [str(name) for name in classes]
    check_value(len(classes) == c, op, "classes", f"{c} names, one a class", f"{len(classes)}")
    crop = None if crop is None else whole_number(op, "crop", crop)
    thumbnail = whole_number(op, "thumbnail", thumbnail)

    before = None if evaluate is None else measure(model, evaluate, prepare=prepare)
    with evaluating(model):
        nearest = NearestSamples(head, k)
        samples = 0
        for batch in stream(op, model, data, prepare):
            embedding = head.embed(batch.features())
            nearest.add(embedding, _at_features(head, batch.labels, embedding))
            samples = batch.first + len(batch.images)
        check_value(ids is None or len(ids) == samples, op, "ids", f"{samples} names, one a sample", f"{len(ids or ())}")
        found = _assigned(nearest)
        anchored = Counter(label for label, _ in found)
        short = [label for label in range(c) if 0 < anchored[label] < k]
        if segmentation and short:
            found.update(_pixel_by_pixel(op, model, head, data, prepare, short))
        embeddings, rows = _cut(op, model, head, data, prepare, found, nearest, ids, crop, thumbnail)
    counts = tuple(nearest.wins.sum(1).tolist())
    anchors = Anchors(tuple(classes), segmentation, rows, embeddings, counts, before, None)
    anchors.apply_(head)
    after = None if evaluate is None else measure(model, evaluate, prepare=prepare)
    return Anchors(tuple(classes), segmentation, rows, embeddings, counts, before, after)


def measure(model: Model, data: Data, *, prepare: Prepare | None = None) -> Figures:
    """Accuracy of a model on images, or pixel accuracy, intersection over union and mIoU in segmentation.

    Args:
        model: with a `DNCHead` or `DNCClassifier`.
        data: as for `anchor`; read once.
        prepare: as for `anchor`.
    """
    op = "measure"
    head, segmentation = head_of(op, model)
    c = head.num_classes
    hit, truth, said = (torch.zeros(c, dtype=torch.int64, device=head.prototypes.device) for _ in range(3))
    with evaluating(model):
        for batch in stream(op, model, data, prepare):
            predicted = predictions(head, batch.features(), batch.labels)
            labelled = batch.labels >= 0
            labels, predicted = batch.labels[labelled], predicted[labelled]
            truth += labels.bincount(minlength=c)
            said += predicted[predicted >= 0].bincount(minlength=c)  # -1: a feature that is not finite
            hit += labels[labels == predicted].bincount(minlength=c)
    of = truth + said - hit if segmentation else truth
    per_class = [h / n if n else None for h, n in zip(hit.tolist(), of.tolist(), strict=True)]
    known = [value for value in per_class if value is not None]
    count = int(truth.sum())
    miou = sum(known) / len(known) if segmentation and known else None
    return Figures(int(hit.sum()) / max(1, count), tuple(per_class), miou, count)


def predictions(head: DNCHead | DNCClassifier, features: Tensor, labels: Tensor) -> Tensor:
    """Classes of features, in the shape of the labels."""
    return head.predict(features, labels.shape[1:]) if isinstance(head, DNCHead) else head.predict(features)


def _at_features(head: DNCHead | DNCClassifier, labels: Tensor, embedding: Tensor) -> Tensor:
    """Labels at the size of the features, as the loss takes them."""
    return pixels_at(labels, embedding.shape[2:], head.label_mode) if isinstance(head, DNCHead) else labels


def _assigned(nearest: NearestSamples) -> Places:
    """Different samples for the sub-centroids of each class, with the largest sum of cosines.

    The K best of each sub-centroid suffice: of the K that one likes best the others take K - 1 at most, so an assignment that
    gives it a worse one can be bettered. A class with fewer samples lists all of them for each of its sub-centroids.
    """
    sample, pixel, similarity = (t.cpu().numpy() for t in nearest.result())
    found: Places = {}
    for label, (of_class, cosine) in enumerate(zip(sample, similarity, strict=True)):
        numbers, column = np.unique(of_class, return_inverse=True)
        table: NDArray[np.float64] = np.full((len(of_class), len(numbers)), -np.inf)
        np.put_along_axis(table, column.reshape(of_class.shape), cosine, axis=1)
        table = table[:, numbers >= 0]
        for sub, chosen in zip(*linear_sum_assignment(table, maximize=True), strict=True):
            number = numbers[numbers >= 0][chosen]
            slot = int((of_class[sub] == number).argmax())
            found[label, int(sub)] = Found(int(number), int(pixel[label, sub, slot]), float(cosine[sub, slot]))
    return found


def _pixel_by_pixel(
    op: str, model: Model, head: DNCHead | DNCClassifier, data: Data, prepare: Prepare | None, classes: list[int]
) -> Places:
    """Different pixels for the sub-centroids of these classes, as `_assigned` has different images."""
    nearest = NearestSamples(head, head.num_subcentroids)
    wanted = torch.zeros(head.num_classes, dtype=torch.bool, device=head.prototypes.device)
    wanted[classes] = True
    for batch in stream(op, model, data, prepare):
        embedding = head.embed(batch.features())
        labels = _at_features(head, batch.labels, embedding).reshape(-1)
        kept = ((labels >= 0) & wanted[labels.clamp(min=0)]).nonzero()[:, 0]
        rows = embedding.permute(0, 2, 3, 1).reshape(len(labels), -1)[kept]
        per_image = embedding.shape[2] * embedding.shape[3]
        # image and pixel in one number
        nearest.add(rows, labels[kept], ((batch.first + kept // per_image) << 32) + kept % per_image)
    return {
        place: Found(one.sample >> 32, one.sample & 0xFFFFFFFF, one.similarity)
        for place, one in _assigned(nearest).items()
        if place[0] in classes
    }


def _cut(
    op: str, model: Model, head: DNCHead | DNCClassifier, data: Data, prepare: Prepare | None, found: Places,
    nearest: NearestSamples, ids: Sequence[str] | None, crop: int | None, thumbnail: int,
) -> tuple[Tensor, tuple[tuple[Anchor, ...], ...]]:  # fmt: skip
    """Embeddings [C,K,D] of the samples that were found, and the anchors that they make."""
    embeddings = nearest.prototypes.clone()
    share = (nearest.wins / nearest.wins.sum(1, keepdim=True).clamp(min=1)).tolist()
    rows = [
        [Anchor(label, sub, -1, "", 0.0, part, -1, -1, (0, 0, 0, 0), None) for sub, part in enumerate(of_class)]
        for label, of_class in enumerate(share)
    ]
    places: dict[int, list[tuple[int, int]]] = {}
    for place, one in found.items():
        places.setdefault(one.sample, []).append(place)
    for batch in stream(op, model, data, prepare):
        here = [index for index in range(len(batch.images)) if batch.first + index in places]
        if not here:
            continue
        # the whole batch, not the chosen alone: then every bit is that of the first pass
        embedding = head.embed(batch.features())
        labels = _at_features(head, batch.labels, embedding)
        for index in here:
            sample, image = batch.first + index, as_picture(batch.images[index])
            given = str(sample) if batch.ids is None else batch.ids[index]
            for label, sub in places.pop(sample):
                one = found[label, sub]
                e, its_label, y, x = _feature(embedding, labels, index, one.pixel)
                e = e.to(embeddings.dtype)
                same = its_label == label and abs(float(e @ nearest.prototypes[label, sub]) - one.similarity) <= SAME
                check_value(
                    same, op, "data", "the same samples in the same order in every pass", f"another sample {sample}",
                    "leave out shuffling and augmentation",
                )  # fmt: skip
                embeddings[label, sub] = e
                height, width = image.shape[1:]
                row, column, box = height // 2, width // 2, (0, 0, height, width)
                if isinstance(head, DNCHead):
                    row = centre(y, embedding.shape[2], height, head.align_corners)
                    column = centre(x, embedding.shape[3], width, head.align_corners)
                    box = window(row, column, height, width, crop)
                rows[label][sub] = Anchor(
                    label, sub, sample, str(ids[sample]) if ids is not None else given, one.similarity, share[label][sub],
                    row, column, box, shrunk(cut_out(image, box), thumbnail),
                )  # fmt: skip
    check_value(not places, op, "data", "as many samples in every pass", f"none of number {min(places, default=0)}")
    return embeddings.cpu(), tuple(tuple(row) for row in rows)


def _feature(embedding: Tensor, labels: Tensor, index: int, pixel: int) -> tuple[Tensor, int, int, int]:
    """Embedding [D], label, y and x of a pixel of the feature map of image `index`; or of a sample."""
    if embedding.ndim == 2:
        return embedding[index], int(labels[index]), 0, 0
    y, x = divmod(pixel, embedding.shape[3])
    y = min(y, embedding.shape[2] - 1)  # of data that changed: its label or cosine will tell
    return embedding[index, :, y, x], int(labels[index, y, x]), y, x


def window(row: int, column: int, height: int, width: int, side: int | None = None) -> tuple[int, int, int, int]:
    """Box (top, left, height, width) of a square around a pixel, moved to lie within the picture; see `anchor` for `side`."""
    side = max(48, min(height, width) // 4) if side is None else side
    tall, wide = min(side, height), min(side, width)
    top, left = (
        min(max(0, at - size // 2), length - size) for at, size, length in ((row, tall, height), (column, wide, width))
    )
    return top, left, tall, wide


def cut_out(image: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """The box of an image [3,H,W], a view."""
    top, left, height, width = box
    return image[:, top : top + height, left : left + width]


def shrunk(picture: Tensor, most: int) -> Tensor:
    """A uint8 picture [3,H,W] of its own memory, with at most `most` rows and columns."""
    height, width = picture.shape[1:]
    if max(height, width) <= most:
        return picture.clone(memory_format=torch.contiguous_format)
    size = [max(1, round(length * most / max(height, width))) for length in (height, width)]
    smaller = F.interpolate(picture[None].float(), size, mode="bilinear", antialias=True)[0]
    return smaller.round().clamp(0, 255).to(torch.uint8)
