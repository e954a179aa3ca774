"""The C++ momentum kernels as torch ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native
from .._common import NAMESPACE, compute_dtype, keep_dtypes_under_autocast, view


def _empty_sums(x: Tensor, cluster: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((num_clusters, x.shape[1]), dtype=compute_dtype(x)), cluster.new_empty(num_clusters)


@torch.library.custom_op(f"{NAMESPACE}::cluster_sums", mutates_args=(), device_types="cpu")
def cluster_sums(x: Tensor, cluster: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Sums [M,D] and counts [M] (csrc/cpu/momentum.cpp)."""
    sums, counts = _empty_sums(x, cluster, num_clusters)
    native().cluster_sums(view(x), view(cluster), view(sums), view(counts), torch.get_num_threads())
    return sums, counts


@cluster_sums.register_fake
def _(x: Tensor, cluster: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    return _empty_sums(x, cluster, num_clusters)


@torch.library.custom_op(f"{NAMESPACE}::apply_momentum_", mutates_args=("centroids",), device_types="cpu")
def apply_momentum_(centroids: Tensor, sums: Tensor, counts: Tensor, momentum: float) -> None:
    """EMA and renormalisation in place (csrc/cpu/momentum.cpp)."""
    rows = centroids.view(-1, centroids.shape[-1])
    native().apply_momentum_(view(rows), view(sums), view(counts), momentum, torch.get_num_threads())


@apply_momentum_.register_fake
def _(centroids: Tensor, sums: Tensor, counts: Tensor, momentum: float) -> None:
    return None


@torch.library.custom_op(f"{NAMESPACE}::momentum_update_", mutates_args=("centroids",), device_types="cpu")
def momentum_update_(centroids: Tensor, x: Tensor, cluster: Tensor, momentum: float) -> None:
    """Both steps in one op; on CUDA without a host synchronisation (csrc/cuda/momentum.cu)."""
    rows = centroids.view(-1, centroids.shape[-1])
    sums, counts = _empty_sums(x, cluster, rows.shape[0])
    threads = torch.get_num_threads()
    native().cluster_sums(view(x), view(cluster), view(sums), view(counts), threads)
    native().apply_momentum_(view(rows), view(sums), view(counts), momentum, threads)


@momentum_update_.register_kernel("cuda")
def _(centroids: Tensor, x: Tensor, cluster: Tensor, momentum: float) -> None:
    rows = centroids.view(-1, centroids.shape[-1])
    with torch.cuda.device(x.device):
        size = native().momentum_workspace_bytes(rows.shape[0], rows.shape[1], cluster.numel())
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        stream = torch.cuda.current_stream().cuda_stream
        native().momentum_update_cuda_(view(rows), view(x), view(cluster), momentum, workspace.data_ptr(), stream)


@momentum_update_.register_fake
def _(centroids: Tensor, x: Tensor, cluster: Tensor, momentum: float) -> None:
    return None


for _op in (cluster_sums, apply_momentum_, momentum_update_):
    keep_dtypes_under_autocast(_op)
