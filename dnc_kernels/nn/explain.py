"""Which real training samples a sub-centroid stands for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .._tensors import check_pixels, flat_pixels, without_ignored
from ..errors import check_device, check_instance, check_integer, check_value, label_fix, swapped, whole_number
from ._labels import left_out_below_zero, pixels_at, sort_out_labels
from .subcentroids import SubCentroids


class Nearest(NamedTuple):
    """The samples nearest to each sub-centroid, nearest first; -1, -1 and -Inf where there are fewer."""

    sample: Tensor
    pixel: Tensor
    similarity: Tensor


class NearestSamples:
    """Keeps, batch after batch, the training samples that each sub-centroid is most like, so that a decision shows as "like
    these".

    Selection rule (the paper shows such samples, its code was not released): for sub-centroid k of class c, the samples
    labelled c with the largest cosine to it, ties to the earlier one. Of an image only its best pixel counts, or a sub-centroid
    would show one spot many times. With `nearest_only` a pixel counts for its nearest own sub-centroid alone, so no pixel
    explains two of them. Samples whose features are not finite never count.

    Args:
        sub_centroids: a `SubCentroids`, `DNCHead` or `DNCClassifier`; its sub-centroids at construction time are the ones
            explained.
        count: samples to keep of each sub-centroid.
        nearest_only: see above.
        ignore_index: label to leave out, apart from any negative id; None: that of the head, if it has one.

    Attributes:
        wins: [C,K] int64, of each sub-centroid the samples (pixels) of its class that are nearer to it than to any other of the
            class, over all batches: 0 is a sub-centroid that does nothing.

    Memory: 3 * C*K*count numbers, and for a batch [N,K] similarities and a few of their size.
    """

    def __init__(
        self,
        sub_centroids: SubCentroids,
        count: int = 8,
        *,
        nearest_only: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        check_instance("NearestSamples", "sub_centroids", sub_centroids, SubCentroids, "a SubCentroids or a head")
        count = whole_number("NearestSamples", "count", count)
        if ignore_index is not None:
            ignore_index = whole_number("NearestSamples", "ignore_index", ignore_index, None)
        self.prototypes = sub_centroids.snapshot().detach().clone()
        self.count, self.nearest_only = count, nearest_only
        self.ignore_index = getattr(sub_centroids, "ignore_index", None) if ignore_index is None else ignore_index
        self.label_mode = getattr(sub_centroids, "label_mode", "nearest-exact")
        classes, k, _ = self.prototypes.shape
        device = self.prototypes.device
        self._similarity = torch.full((classes, k, count), -torch.inf, dtype=self.prototypes.dtype, device=device)
        self._sample = torch.full((classes, k, count), -1, dtype=torch.int64, device=device)
        self._pixel = self._sample.clone()
        self.wins = torch.zeros((classes, k), dtype=torch.int64, device=device)
        self._seen = 0

    @torch.no_grad()
    def add(self, embedding: Tensor, labels: Tensor, samples: Tensor | None = None) -> None:
        """Consider a batch.

        Args:
            embedding: [N,D] samples or [B,D,h,w] images, as `head.embed` gives them.
            labels: any integer dtype, in [0,C); `ignore_index` or any negative id leaves a pixel out. [N] for samples. For
                images [B,H,W], as large as the embedding or larger, such as the labels of the images: they are resized by the
                head's `label_mode`, without one ``nearest-exact``. Or flat [N], at the size of the embedding.
            samples: [N] or [B] int64 number of each sample; None: numbered in the order of their coming.

        Raises:
            ValueError, TypeError: wrong shape, dtype or device; on CPU a label at or beyond C that is not `ignore_index`, which
                is left out on a GPU.
        """
        op = "NearestSamples.add"
        classes, k, _ = self.prototypes.shape
        pixels, _ = check_pixels(op, embedding, "embedding")
        check_integer(op, "labels", labels)
        check_device(op, "labels", labels, embedding, "embedding")
        batch, size = embedding.shape[0], embedding.shape[2:]
        fits = list(labels.shape) == [pixels]
        if len(size) == 2 and labels.ndim == 3:
            # smaller ones are likelier to be transposed than meant
            fits = labels.shape[0] == batch and labels.shape[1] >= size[0] and labels.shape[2] >= size[1]
            fits = fits and not swapped(labels, embedding)
        maps = f" or [B,H,W]={[batch, *size]}, or larger," if len(size) == 2 else ""
        check_value(fits, op, "labels", f"[N]=[{pixels}]{maps} to match embedding", labels, label_fix(labels, embedding))
        channels = self.prototypes.shape[2]
        check_value(
            embedding.shape[1] == channels, op, "embedding", f"of {channels} channels, as head.embed gives it", embedding
        )
        check_device(op, "embedding", embedding, self.prototypes, "nearest.prototypes")
        if samples is None:
            samples = torch.arange(self._seen, self._seen + batch, device=embedding.device)
        check_integer(op, "samples", samples)
        check_value(list(samples.shape) == [batch], op, "samples", lambda: f"[{batch}]", samples)
        self._seen += batch
        if pixels == 0:
            return
        ignored = -1
        if self.ignore_index is not None:
            labels, ignored, _ = sort_out_labels(op, labels, classes, self.ignore_index)
        else:
            labels = left_out_below_zero(op, "labels", labels, classes, "C").view(labels.shape)
        if labels.ndim == 3:
            labels = pixels_at(labels, size, self.label_mode)
        labels = without_ignored(labels.to(torch.int64), ignored).reshape(-1)
        own = ops.class_scores(embedding, self.prototypes, labels.view(batch, *size)).own_similarity
        assert own is not None
        own = flat_pixels(own)
        if own.device.type == "cpu" and (most := own.nan_to_num(posinf=0, neginf=0).abs().amax()) > 1.05:  # 16 bits round
            fix = "pass head.embed(features)"
            check_value(False, op, "embedding", "of unit length", f"a similarity of {float(most):.3g}", fix)
        keep = (labels >= 0) & own.isfinite().all(1)
        value = torch.where(keep[:, None], own.to(self._similarity.dtype), -torch.inf)
        nearest, group = value.argmax(1), torch.where(keep, labels, 0)
        self.wins.view(-1).index_add_(0, group * k + nearest, keep.to(torch.int64))
        if self.nearest_only:
            value = torch.where(torch.nn.functional.one_hot(nearest, k).bool(), value, -torch.inf)
        per_image = pixels // batch
        where = torch.arange(pixels, device=value.device)
        if per_image > 1:
            value, group, where = _best_of_each_image(value, group, batch, classes)
        else:
            where = where[:, None].expand(-1, k)
        self._merge(value, group, samples[where // per_image], where % per_image)

    def _merge(self, value: Tensor, group: Tensor, sample: Tensor, pixel: Tensor) -> None:
        """Merge candidate rows (value, sample, pixel [R,K], group [R]) into the lists."""
        classes, k, count = self._similarity.shape
        # by class, then by similarity: two stable sorts, all sub-centroids at once
        order = value.argsort(dim=0, descending=True, stable=True)
        order = order.gather(0, group[order].argsort(dim=0, stable=True))
        sorted_group = group[order]
        sizes = torch.zeros(classes, dtype=torch.int64, device=group.device).index_add_(0, group, torch.ones_like(group))
        rank = torch.arange(len(group), device=group.device)[:, None] - (sizes.cumsum(0) - sizes)[sorted_group]
        # what ranks behind `count` goes to a slot that is dropped
        slot = torch.where(
            rank < count, (sorted_group * k + torch.arange(k, device=group.device)) * count + rank, classes * k * count
        )
        lists = []
        for held, new, empty in (
            (self._similarity, value, -torch.inf), (self._sample, sample, -1), (self._pixel, pixel, -1),
        ):  # fmt: skip
            fresh = torch.full((classes * k * count + 1,), empty, dtype=held.dtype, device=held.device)
            fresh[slot.flatten()] = new.gather(0, order).flatten()
            lists.append(torch.cat([held, fresh[:-1].view_as(held)], dim=2))
        best = lists[0].argsort(dim=2, descending=True, stable=True)[..., :count]
        self._similarity, self._sample, self._pixel = (values.gather(2, best) for values in lists)
        none = self._similarity == -torch.inf
        self._sample, self._pixel = (torch.where(none, -1, values) for values in (self._sample, self._pixel))

    def result(self) -> Nearest:
        """Sample number, pixel ``y*w + x`` in its feature map (0 for [N,D] samples) and cosine, each [C,K,count]."""
        return Nearest(self._sample, self._pixel, self._similarity)


def nearest_samples(
    sub_centroids: SubCentroids,
    embedding: Tensor,
    labels: Tensor,
    count: int = 8,
    *,
    nearest_only: bool = False,
    ignore_index: int | None = None,
) -> Nearest:
    """The samples of one batch that each sub-centroid is most like: `NearestSamples` in one call."""
    accumulator = NearestSamples(sub_centroids, count, nearest_only=nearest_only, ignore_index=ignore_index)
    accumulator.add(embedding, labels)
    return accumulator.result()


def _best_of_each_image(value: Tensor, group: Tensor, batch: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best pixel of each image, class and sub-centroid: values [B*C,K], classes [B*C], pixel numbers [B*C,K]."""
    pixels, k = value.shape
    number = torch.arange(pixels, device=value.device)
    row = (number // (pixels // batch) * classes + group)[:, None].expand(-1, k)
    best = value.new_full((batch * classes, k), -torch.inf).scatter_reduce_(0, row, value, "amax")
    at = torch.where(value == best.gather(0, row), number[:, None], pixels)
    first = torch.full((batch * classes, k), pixels, dtype=torch.int64, device=value.device).scatter_reduce_(0, row, at, "amin")
    return best, torch.arange(classes, device=value.device).repeat(batch), first.clamp(max=pixels - 1)
