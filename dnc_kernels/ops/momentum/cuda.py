"""Launchers of the CUDA C++ momentum kernels (csrc/cuda/momentum*.cu); the functions are those of native.py."""

from __future__ import annotations

from torch import Tensor

from .._cuda import launch


def cluster_sums(x: Tensor, cluster: Tensor, sums: Tensor, counts: Tensor) -> None:
    """Sums [M,D] float32 and counts [M] int64; always deterministic."""
    launch("cluster_sums", x, x, cluster, sums, counts)


def apply_momentum_(rows: Tensor, sums: Tensor, counts: Tensor, momentum: float) -> None:
    """EMA and renormalisation of rows [M,D] float32, in place."""
    launch("apply_momentum_", rows, rows, sums, counts, momentum)


def momentum_update_(rows: Tensor, x: Tensor, cluster: Tensor, momentum: float, deterministic: bool) -> None:
    """Both in one launch: in a fixed order of addition, or faster."""
    launch("momentum_update_", x, rows, x, cluster, momentum, deterministic)
