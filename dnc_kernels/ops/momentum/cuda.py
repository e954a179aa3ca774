"""Launchers of the CUDA C++ momentum kernels (csrc/cuda/momentum.cu); the functions are those of native.py."""

from __future__ import annotations

from torch import Tensor

from .._cuda import launch


def momentum_update_(rows: Tensor, x: Tensor, cluster: Tensor, momentum: float) -> None:
    """Sums, EMA and renormalisation of rows [M,D], in place, in one launcher."""
    launch("momentum_update_", x, rows, x, cluster, momentum, True)
