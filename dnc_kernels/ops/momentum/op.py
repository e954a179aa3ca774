"""Cluster sums and the momentum update as torch ops, whatever kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor

from .._common import NAMESPACE, compute_dtype, keep_dtypes_under_autocast, kernels


def _empty_sums(x: Tensor, cluster: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((num_clusters, x.shape[1]), dtype=compute_dtype(x)), cluster.new_empty(num_clusters)


@torch.library.custom_op(f"{NAMESPACE}::cluster_sums", mutates_args=())
def cluster_sums(x: Tensor, cluster: Tensor, num_clusters: int, backend: str) -> tuple[Tensor, Tensor]:
    """Sums [M,D] and counts [M]."""
    sums, counts = _empty_sums(x, cluster, num_clusters)
    kernels("momentum", backend).cluster_sums(x, cluster, sums, counts)
    return sums, counts


@cluster_sums.register_fake
def _(x: Tensor, cluster: Tensor, num_clusters: int, backend: str) -> tuple[Tensor, Tensor]:
    return _empty_sums(x, cluster, num_clusters)


@torch.library.custom_op(f"{NAMESPACE}::apply_momentum_", mutates_args=("centroids",))
def apply_momentum_(centroids: Tensor, sums: Tensor, counts: Tensor, momentum: float, backend: str) -> None:
    """EMA and renormalisation in place."""
    kernels("momentum", backend).apply_momentum_(centroids.view(-1, centroids.shape[-1]), sums, counts, momentum)


@apply_momentum_.register_fake
def _(centroids: Tensor, sums: Tensor, counts: Tensor, momentum: float, backend: str) -> None:
    return None


@torch.library.custom_op(f"{NAMESPACE}::momentum_update_", mutates_args=("centroids",))
def momentum_update_(centroids: Tensor, x: Tensor, cluster: Tensor, momentum: float, deterministic: bool, backend: str) -> None:
    """Both steps in one op; on CUDA without a host synchronisation."""
    rows = centroids.view(-1, centroids.shape[-1])
    kernels("momentum", backend).momentum_update_(rows, x, cluster, momentum, deterministic)


@momentum_update_.register_fake
def _(centroids: Tensor, x: Tensor, cluster: Tensor, momentum: float, deterministic: bool, backend: str) -> None:
    return None


for _op in (cluster_sums, apply_momentum_, momentum_update_):
    keep_dtypes_under_autocast(_op)
