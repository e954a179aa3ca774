"""Launchers of the CUDA C++ momentum kernels (csrc/cuda/momentum*.cu); the functions are those of cpu.py."""

from __future__ import annotations

from .._cuda import launch
from .calls import ApplyCall, SumsCall, SumsOut, UpdateCall, rows


def cluster_sums(call: SumsCall, out: SumsOut) -> None:
    """Sums and counts; always deterministic."""
    launch("cluster_sums", call, out)


def apply_momentum_(call: ApplyCall, _: None = None) -> None:
    """The move and renormalisation, in place."""
    launch("apply_momentum_", call._replace(centroids=rows(call.centroids)))


def momentum_update_(call: UpdateCall, _: None = None) -> None:
    """Both in one launch: in a fixed order of addition, or faster."""
    launch("momentum_update_", call._replace(centroids=rows(call.centroids)))
