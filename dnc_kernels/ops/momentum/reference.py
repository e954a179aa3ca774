"""Plain torch: what the momentum kernels must equal. Any float dtype, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._tensors import compute_dtype, flat_pixels
from .._common import check_label_range
from .calls import ApplyCall, SumsCall, SumsOut, UpdateCall


def cluster_sums(call: SumsCall, num_clusters: int) -> SumsOut:
    """Sums [M,D] and counts [M]; raises for a cluster at or beyond M."""
    check_label_range("cluster_sums", call.cluster, num_clusters)
    return sums_of(call.x, call.cluster, num_clusters)


def apply_momentum_(call: ApplyCall) -> None:
    """The move of sub-centroids with pixels, in place."""
    move_(call.centroids, call.sums, call.counts, call.momentum)


def momentum_update_(call: UpdateCall) -> None:
    """Both; a cluster at or beyond M raises before anything has moved."""
    clusters = call.centroids.shape[0] * call.centroids.shape[1]
    check_label_range("momentum_update_", call.cluster, clusters)
    move_(call.centroids, *sums_of(call.x, call.cluster, clusters), call.momentum)


def sums_of(x: Tensor, cluster: Tensor, num_clusters: int) -> SumsOut:
    """Sums [M,D] and counts [M]; clusters outside [0,M) and pixels with a non-finite feature are left out."""
    pixels = flat_pixels(x).to(compute_dtype(x))
    keep = (cluster >= 0) & (cluster < num_clusters) & pixels.isfinite().all(1)
    # row M collects what is left out
    target = torch.where(keep, cluster, num_clusters)
    sums = pixels.new_zeros(num_clusters + 1, x.shape[1])
    sums = sums.index_add(0, target, torch.where(keep[:, None], pixels, 0))
    counts = torch.zeros(num_clusters + 1, dtype=torch.int64, device=x.device).index_add(0, target, torch.ones_like(target))
    return SumsOut(sums[:-1], counts[:-1])


def move_(centroids: Tensor, sums: Tensor, counts: Tensor, momentum: float | Tensor) -> None:
    """EMA towards the normalised sums and renormalisation, where a pixel was counted and the result is a direction."""
    # float64 throughout, as in the kernels: no length of float32 sums can overflow or vanish
    rows, sums = centroids.reshape(-1, centroids.shape[-1]), sums.double()
    length = sums.norm(dim=1, keepdim=True)
    updated = momentum * rows.double() + (1 - momentum) * sums / length
    norm = updated.norm(dim=1, keepdim=True)
    ok = (counts > 0)[:, None] & length.isfinite() & (length > 0) & norm.isfinite() & (norm > 0)
    centroids.copy_(torch.where(ok, (updated / norm).to(rows.dtype), rows).view_as(centroids))
