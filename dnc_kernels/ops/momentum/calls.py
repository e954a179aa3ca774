"""Calls of the momentum kernels: fields of the structs of csrc/include/dnc/momentum.h, by their names."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._op import record


@record
class SumsCall(NamedTuple):
    """Arguments of `cluster_sums`; the number of clusters is that of its results."""

    x: Tensor  # [N,D] or [B,D,H,W]
    cluster: Tensor  # [N] int64, contiguous, negative: left out
    backend: str


@record
class SumsOut(NamedTuple):
    """Results of `cluster_sums`."""

    sums: Tensor  # [M,D] of the compute dtype, contiguous
    counts: Tensor  # [M] int64


@record
class ApplyCall(NamedTuple):
    """Arguments of `apply_momentum_`."""

    centroids: Tensor  # [C,K,D], of kernels [M,D], contiguous; changed in place
    sums: Tensor  # [M,D] float32 or float64, contiguous
    counts: Tensor  # [M] int64, contiguous
    momentum: float
    backend: str


@record
class UpdateCall(NamedTuple):
    """Arguments of `momentum_update_`."""

    centroids: Tensor  # [C,K,D], of kernels [M,D], contiguous; changed in place
    x: Tensor  # [N,D] or [B,D,H,W]
    cluster: Tensor  # [N] int64, contiguous, negative: left out
    momentum: float
    deterministic: bool
    backend: str


def rows(centroids: Tensor) -> Tensor:
    """[M,D] of centroids [C,K,D] or [M,D], the same memory."""
    return centroids if centroids.ndim == 2 else centroids.view(-1, centroids.shape[2])
