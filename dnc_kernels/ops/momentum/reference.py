"""Plain torch: what the momentum kernels must equal. Any float dtype, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .._common import compute_dtype, flat_pixels


def cluster_sums(x: Tensor, cluster: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Sums [M,D] and counts [M]; negative clusters and pixels with a non-finite feature are left out."""
    pixels = flat_pixels(x).to(compute_dtype(x))
    keep = (cluster >= 0) & (cluster < num_clusters) & pixels.isfinite().all(1)
    # row M collects what is left out
    target = torch.where(keep, cluster, num_clusters)
    sums = pixels.new_zeros(num_clusters + 1, x.shape[1])
    sums.index_add_(0, target, torch.where(keep[:, None], pixels, 0))
    counts = torch.zeros(num_clusters + 1, dtype=torch.int64, device=x.device)
    counts.index_add_(0, target, torch.ones_like(target))
    return sums[:-1], counts[:-1]


def apply_momentum_(centroids: Tensor, sums: Tensor, counts: Tensor, momentum: float) -> None:
    """EMA towards the normalised sums and renormalisation, where a pixel was counted and the result is a direction."""
    # float64 throughout, as in the kernels: no length of float32 sums can overflow or vanish
    rows, sums = centroids.reshape(-1, centroids.shape[-1]), sums.double()
    length = sums.norm(dim=1, keepdim=True)
    updated = momentum * rows.double() + (1 - momentum) * sums / length
    norm = updated.norm(dim=1, keepdim=True)
    ok = (counts > 0)[:, None] & length.isfinite() & (length > 0) & norm.isfinite() & (norm > 0)
    centroids.copy_(torch.where(ok, (updated / norm).to(rows.dtype), rows).view_as(centroids))
