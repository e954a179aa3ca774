"""Launchers of the C++ momentum kernels (csrc/cpu/momentum.cpp)."""

from __future__ import annotations

from ..._tensors import compute_dtype
from .._cpu import run
from .calls import ApplyCall, SumsCall, SumsOut, UpdateCall, rows


def cluster_sums(call: SumsCall, out: SumsOut) -> None:
    """Sums and counts."""
    run("cluster_sums", call, out)


def apply_momentum_(call: ApplyCall, _: None = None) -> None:
    """The move and renormalisation, in place."""
    run("apply_momentum_", call._replace(centroids=rows(call.centroids)))


def momentum_update_(call: UpdateCall, _: None = None) -> None:
    """Both; always deterministic."""
    centroids = rows(call.centroids)
    out = SumsOut(call.x.new_empty(centroids.shape, dtype=compute_dtype(call.x)), call.cluster.new_empty(centroids.shape[0]))
    run("cluster_sums", SumsCall(call.x, call.cluster, call.backend), out, op="momentum_update_")
    run("apply_momentum_", ApplyCall(centroids, *out, call.momentum, call.backend), op="momentum_update_")
