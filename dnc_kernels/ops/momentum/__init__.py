"""Sums of the pixels of each sub-centroid, and the momentum update (family page: docs/momentum.md)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._tensors import check_ignore_index, check_pixels, compute_dtype, flat_labels, without_ignored
from ...backends import Backend, pick
from ...errors import (
    MOST,
    check_device,
    check_dtype,
    check_flag,
    check_float,
    check_integer,
    check_number,
    check_value,
    renamed,
    whole_number,
)
from .._common import check_labels, readable, remembered
from . import op as ops
from . import reference
from .calls import ApplyCall, SumsCall, UpdateCall


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
    _check_sums(x, labels, num_clusters, ignore_index)
    clusters = whole_number(op, "num_clusters", num_clusters)
    cluster = without_ignored(flat_labels(labels), ignore_index)
    call = SumsCall(x.detach(), cluster, pick(op, x, backend))
    return ClusterSums(*ops.cluster_sums(call, clusters))


def apply_momentum_(
    centroids: Tensor, sums: Tensor, counts: Tensor, *, momentum: float | Tensor = 0.999, backend: Backend | None = None
) -> None:
    """Move each sub-centroid that has pixels towards their normalised sum, in place, and renormalise it (DNC, eq. 8).

    ``p <- normalise(momentum * p + (1 - momentum) * normalise(sum))`` where ``counts > 0``. A sub-centroid without pixels keeps
    every bit; so does one whose sum or result is zero or not finite: sub-centroids are never lost.

    Args:
        centroids: [C,K,D] or [M,D], float32 or float64, contiguous; changed in place.
        sums: [M,D] float32 or float64, as from `cluster_sums` (all-reduce it and `counts` first in data parallel).
        counts: [M] integers.
        momentum: in [0,1]. A tensor [] on the device of `centroids`, as of a schedule, is not read back where that would wait
            for the device or cut a graph of torch.compile in two: plain torch ops make the move there, unchecked.
        backend: what runs (docs/backends.md); None: the choice in force, by default ``auto``.

    Raises:
        ValueError, TypeError: wrong shape, device, dtype or momentum.
    """
    op = "apply_momentum_"
    _check_in_place(op, centroids)
    if isinstance(momentum, Tensor):
        check_value(momentum.ndim == 0, op, "momentum", "a number or a tensor []", momentum)
        if not readable(momentum):
            _check_apply(centroids, sums, counts, 0.0)
            with torch.no_grad():
                reference.move_(centroids, sums, counts, momentum)
            return
        momentum = float(momentum)
    _check_apply(centroids, sums, counts, momentum)
    channels = centroids.shape[-1]
    call = ApplyCall(
        centroids=centroids.detach(),
        sums=sums.detach().to(compute_dtype(sums)).contiguous(),
        counts=flat_labels(counts),
        momentum=float(momentum),
        backend=pick(op, centroids, backend, sums, N=centroids.numel() // channels, D=channels),
    )
    ops.apply_momentum_(call)


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
    _check_in_place(op, centroids)
    _check_update(centroids, x, labels, momentum, ignore_index)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    else:
        check_flag(op, "deterministic", deterministic)
    call = UpdateCall(
        centroids=centroids.detach(),
        x=x.detach(),
        cluster=without_ignored(flat_labels(labels), ignore_index),
        momentum=float(momentum),
        deterministic=deterministic,
        backend=pick(op, x, backend, centroids, C=centroids.shape[0], K=centroids.shape[1]),
    )
    ops.momentum_update_(call)


@remembered
def _check_sums(x: Tensor, labels: Tensor, num_clusters: int, ignore_index: int) -> None:
    op = "cluster_sums"
    check_pixels(op, x)
    check_ignore_index(op, ignore_index, whole_number(op, "num_clusters", num_clusters, most=MOST))
    check_labels(op, labels, x)


@remembered
def _check_apply(centroids: Tensor, sums: Tensor, counts: Tensor, momentum: float) -> None:
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


@remembered
def _check_update(centroids: Tensor, x: Tensor, labels: Tensor, momentum: float, ignore_index: int) -> None:
    op = "momentum_update_"
    _check_centroids(op, centroids, momentum)
    check_value(centroids.ndim == 3, op, "centroids", "[C,K,D]", centroids)
    check_pixels(op, x)
    check_ignore_index(op, ignore_index, centroids.shape[0] * centroids.shape[1])
    check_labels(op, labels, x)
    check_value(centroids.shape[2] == x.shape[1], op, "centroids", lambda: f"[C,K,D] with D={x.shape[1]} to match x", centroids)
    check_device(op, "centroids", centroids, x)


def _check_centroids(op: str, centroids: Tensor, momentum: float) -> None:
    check_dtype(
        isinstance(centroids, Tensor) and centroids.dtype in (torch.float32, torch.float64),
        op, "centroids", "a float32 or float64 tensor", centroids, "a 16-bit EMA would lose every update",
    )  # fmt: skip
    check_value(centroids.ndim in (2, 3) and centroids.numel() > 0, op, "centroids", "[C,K,D], not empty", centroids)
    check_number(op, "momentum", momentum, "in [0,1]", lambda v: 0 <= v <= 1)


def _check_in_place(op: str, centroids: Tensor) -> None:
    if isinstance(centroids, Tensor) and not centroids.is_contiguous():
        check_value(False, op, "centroids", "contiguous", f"strides {centroids.stride()}", "it is changed in place")


__all__ = ["ClusterSums", "apply_momentum_", "cluster_sums", "momentum_update_"]
