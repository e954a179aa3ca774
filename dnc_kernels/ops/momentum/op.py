"""Cluster sums and the momentum update as torch ops, whatever kernel runs."""

from __future__ import annotations

from ..._tensors import compute_dtype
from .._op import Op
from . import reference
from .calls import ApplyCall, SumsCall, SumsOut, UpdateCall


def _sums_out(call: SumsCall, num_clusters: int) -> SumsOut:
    sums = call.x.new_empty((num_clusters, call.x.shape[1]), dtype=compute_dtype(call.x))
    return SumsOut(sums, call.cluster.new_empty(num_clusters))


def _apply_out(call: ApplyCall) -> None: ...


def _update_out(call: UpdateCall) -> None: ...


cluster_sums = Op("momentum", "cluster_sums", _sums_out, reference.cluster_sums)
apply_momentum_ = Op("momentum", "apply_momentum_", _apply_out, reference.apply_momentum_, mutates=("centroids",))
momentum_update_ = Op("momentum", "momentum_update_", _update_out, reference.momentum_update_, mutates=("centroids",))
