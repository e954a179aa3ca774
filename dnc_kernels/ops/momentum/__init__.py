"""Sums of the pixels of each sub-centroid, and the momentum update (family page: docs/momentum.md)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...backends import Backend, pick
from ...errors import check_device, check_dtype, check_float, check_integer, check_value, renamed, whole_number
from .._common import check_ignore_index, check_label_range, check_labels, check_pixels, without_ignored
from . import op as ops
from . import reference


class ClusterSums(NamedTuple):
    """Result of `cluster_sums`."""

    sums: Tensor
    counts: Tensor


@renamed(cluster="labels")
def cluster_sums(
    x: Tensor, labels: Tensor, num_clusters: int, *, ignore_index: int = -100, backend: Backend | None = None
) -> ClusterSums:
    """Sum and number of the pixels of each cluster.

    Args:
        x: features [N,D] or [B,D,H,W], any strides, read in place; float32, float64, float16 or bfloat16.
        labels: [N] or [B,H,W], any integer dtype, clusters in [0,M); `ignore_index` or any negative id leaves a pixel out.
        num_clusters: M > 0.
        ignore_index: outside [0,M).
        backend: what runs (docs/backends.md); None: the choice in force, by default ``auto``.

    Returns:
        sums [M,D], float64 for float64 `x`, else float32; counts [M] int64. A pixel with a NaN or Inf feature is left out of
        both. Not differentiable. Deterministic: the same bits for any number of threads. Extra memory on CPU: at most seven
        times `sums` and a thirty-second of `x`, and 2 MiB per thread; 8 N bytes more where features are not finite.

    Raises:
        ValueError, TypeError: wrong shape, device or dtype; on CPU also a label at or beyond M that is not `ignore_index` (on
            a GPU it is left out).
    """
    op = "cluster_sums"
    check_pixels(op, x)
    clusters = whole_number(op, "num_clusters", num_clusters)
    ignored = check_ignore_index(op, ignore_index, clusters)
    flat = without_ignored(check_labels(op, labels, x), ignored)
    chosen = pick(op, x, backend)
    if chosen == "reference":
        check_label_range(op, flat, clusters)
        return ClusterSums(*reference.cluster_sums(x.detach(), flat, clusters))
    return ClusterSums(*ops.cluster_sums(x.detach(), flat, clusters, chosen))


def apply_momentum_(
    centroids: Tensor, sums: Tensor, counts: Tensor, *, momentum: float = 0.999, backend: Backend | None = None
) -> None:
    """Move each sub-centroid that has pixels towards their normalised sum, in place, and renormalise it (DNC, eq. 8).

    ``p <- normalise(momentum * p + (1 - momentum) * normalise(sum))`` where ``counts > 0``. A sub-centroid without pixels keeps
    every bit; so does one whose sum or result is zero or not finite: sub-centroids are never lost.

    Args:
        centroids: [C,K,D] or [M,D], float32 or float64, contiguous; changed in place.
        sums: [M,D] float32 or float64, as from `cluster_sums` (all-reduce it and `counts` first in data parallel).
        counts: [M] integers.
        momentum: in [0,1].
        backend: what runs (docs/backends.md); None: the choice in force, by default ``auto``.

    Raises:
        ValueError, TypeError: wrong shape, device, dtype or momentum.
    """
    op = "apply_momentum_"
    _check_centroids(op, centroids, momentum)
    channels = centroids.shape[-1]
    rows = centroids.numel() // channels
    check_float(op, "sums", sums)
    check_value(list(sums.shape) == [rows, channels], op, "sums", lambda: f"[M,D]=[{rows},{channels}] to match centroids", sums)
    check_integer(op, "counts", counts)
    check_value(list(counts.shape) == [rows], op, "counts", lambda: f"[M]=[{rows}] to match centroids", counts)
    check_device(op, "sums", sums, centroids, "centroids")
    check_device(op, "counts", counts, centroids, "centroids")
    chosen = pick(op, centroids, backend, sums, N=rows, D=channels)
    if chosen == "reference":
        with torch.no_grad():
            reference.apply_momentum_(centroids, sums.detach(), counts, momentum)
    else:
        sums = sums.detach().to(torch.float64 if sums.dtype == torch.float64 else torch.float32).contiguous()
        ops.apply_momentum_(centroids.detach(), sums, counts.to(torch.int64).contiguous(), momentum, chosen)


@renamed(cluster="labels")
def momentum_update_(
    centroids: Tensor,
    x: Tensor,
    labels: Tensor,
    *,
    momentum: float = 0.999,
    ignore_index: int = -100,
    deterministic: bool | None = None,
    backend: Backend | None = None,
) -> None:
    """Move each sub-centroid towards its pixels, in place: `cluster_sums`, then `apply_momentum_` (DNC, eq. 8).

    Args:
        centroids: [C,K,D], float32 or float64, contiguous; changed in place.
        x: features [N,D] or [B,D,H,W], any strides, read in place; float32, float64, float16 or bfloat16.
        labels: [N] or [B,H,W], any integer dtype, sub-centroids ``c*K + k`` in [0,C*K); `ignore_index` or any negative id
            leaves a pixel out.
        momentum: in [0,1].
        ignore_index: outside [0,C*K).
        deterministic: add the pixels of a sub-centroid in a fixed order, so that reruns are bit-equal. Only ``cuda`` has a
            faster kernel, where neighbouring pixels share sub-centroids. None: what `torch.use_deterministic_algorithms` says.
        backend: what runs (docs/backends.md); None: the choice in force, by default ``auto``.

    Raises:
        ValueError, TypeError: wrong shape, device, dtype or momentum; on CPU also a label at or beyond C*K that is not
            `ignore_index` (on a GPU it is left out). Nothing has moved then.
    """
    op = "momentum_update_"
    _check_centroids(op, centroids, momentum)
    check_value(centroids.ndim == 3, op, "centroids", "[C,K,D]", centroids)
    clusters = centroids.shape[0] * centroids.shape[1]
    check_pixels(op, x)
    ignored = check_ignore_index(op, ignore_index, clusters)
    flat = without_ignored(check_labels(op, labels, x), ignored)
    check_value(centroids.shape[2] == x.shape[1], op, "centroids", lambda: f"[C,K,D] with D={x.shape[1]} to match x", centroids)
    check_device(op, "centroids", centroids, x)
    chosen = pick(op, x, backend, centroids, C=centroids.shape[0], K=centroids.shape[1])
    if chosen == "reference":
        check_label_range(op, flat, clusters)
        with torch.no_grad():
            sums, counts = reference.cluster_sums(x.detach(), flat, clusters)
            reference.apply_momentum_(centroids, sums, counts, momentum)
    else:
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        ops.momentum_update_(centroids.detach(), x.detach(), flat, momentum, deterministic, chosen)


def _check_centroids(op: str, centroids: Tensor, momentum: float) -> None:
    check_dtype(
        isinstance(centroids, Tensor) and centroids.dtype in (torch.float32, torch.float64),
        op, "centroids", "a float32 or float64 tensor", centroids, "a 16-bit EMA would lose every update",
    )  # fmt: skip
    check_value(centroids.ndim in (2, 3) and centroids.numel() > 0, op, "centroids", "[C,K,D], not empty", centroids)
    check_value(
        centroids.is_contiguous(), op, "centroids", "contiguous", f"strides {centroids.stride()}", "it is changed in place"
    )
    check_value(0 <= momentum <= 1, op, "momentum", "in [0,1]", momentum)


__all__ = ["ClusterSums", "apply_momentum_", "cluster_sums", "momentum_update_"]
