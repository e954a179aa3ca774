"""The memory of a training step of `DNCHead` as a formula: docs/layer.md, "Memory" and "On a GPU"."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ..ops.head import BAND_PIXELS, device_band

if TYPE_CHECKING:
    from .head import DNCHead


class Sizes(NamedTuple):
    """What a step is made for."""

    n: int  # pixels at feature size
    width: int  # of the features
    channels: int
    itemsize: int  # bytes of a feature's number
    labels: int  # pixels at label size


def bytes_on_cpu(head: DNCHead, sizes: Sizes) -> int:
    """Where threads take a band each."""
    n, width, channels, itemsize, labels = sizes
    row, classes, k = channels * itemsize, head.num_classes, head.num_subcentroids
    similarities = 4 * n * k
    clustering = similarities * (2 if head.assignment == "gumbel" else 1)
    rest = similarities + 60 * n + 8 * labels + 48 * classes * k * channels + 8_000_000
    if head.checkpoint == "none":
        return n * (5 * row + 26 * classes) + max(12 * labels, clustering) + rest
    pairs = (torch.get_num_threads() + 1) // 2
    band = min(n, max(head.band_pixels or BAND_PIXELS, 2 * width) * pairs) * (8 * channels + 32 * classes)
    embedding = head.checkpoint == "scores" or head.revive_after is not None
    return n * row * (1 + embedding) + max(12 * labels + band, clustering) + rest


def bytes_on_gpu(head: DNCHead, sizes: Sizes) -> int:
    """With Triton's kernels, which have no memory of their own: what their launchers allocate."""
    n, width, channels, itemsize, labels = sizes
    row, classes, k, norm = channels * itemsize, head.num_classes, head.num_subcentroids, head.scores == "norm"
    m = classes * k
    # sums in parts, a row for each of so many programs
    rest = n * (4 * k + 80) + 5000 * (channels + classes) + 1_000_000
    clustering = n * (channels // 8 + 40 + (8 * k if head.assignment == "gumbel" else 0))
    if head.checkpoint == "none":
        clustering = max(20 * labels + _contrast(head, sizes, n), clustering)
        return n * ((2 + bool(head.ppc_weight)) * row + (18 if norm else 30) * classes) + clustering + 48 * m * channels + rest
    pixels = head.band_pixels or device_band(channels, classes, itemsize, norm)
    whole = pixels >= n
    pixels = min(n, max(pixels, width) + width)
    kept = whole or head.checkpoint == "scores" or head.revive_after is not None
    of_pixel = (14 if norm else 10) * classes + 16 + (0 if kept else row)
    if head.loss_size == "features":
        labels = n
    band = pixels * of_pixel + 12 * labels * pixels // max(n, 1) + _contrast(head, sizes, pixels)
    of_centroids = 16 if head._updates_at_once() else 48
    return n * row * (1 + kept) + max(band, clustering) + of_centroids * m * channels + rest


def _contrast(head: DNCHead, sizes: Sizes, pixels: int) -> int:
    """What the contrast keeps of its similarities where one kernel cannot do all of it."""
    if not head.ppc_weight or (sizes.itemsize == 2 and sizes.channels <= 256):
        return 0
    return min(52_000_000, pixels * (sizes.itemsize + 1) * (5 * head.num_classes * head.num_subcentroids // 4 + 128))
