"""Launchers of the C++ momentum kernels (csrc/cpu/momentum.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native
from .._common import compute_dtype, view


def cluster_sums(x: Tensor, cluster: Tensor, sums: Tensor, counts: Tensor, op: str = "cluster_sums") -> None:
    """Sums [M,D] in the compute dtype and counts [M] int64; errors name `op`."""
    native().cluster_sums(op, view(x), view(cluster), view(sums), view(counts), torch.get_num_threads())


def apply_momentum_(rows: Tensor, sums: Tensor, counts: Tensor, momentum: float) -> None:
    """EMA and renormalisation of rows [M,D], in place."""
    native().apply_momentum_(view(rows), view(sums), view(counts), momentum, torch.get_num_threads())


def momentum_update_(rows: Tensor, x: Tensor, cluster: Tensor, momentum: float, deterministic: bool = True) -> None:
    """Both; always deterministic."""
    sums, counts = x.new_empty(rows.shape, dtype=compute_dtype(x)), cluster.new_empty(rows.shape[0])
    cluster_sums(x, cluster, sums, counts, "momentum_update_")
    apply_momentum_(rows, sums, counts, momentum)
