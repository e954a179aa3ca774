"""The ops, autograd-aware and traceable by torch.compile.

A folder per family: public functions and their checks in ``__init__``, the records of its calls in ``calls``, its torch ops in
``op``, and what runs in ``reference``, ``cpu``, ``triton`` and ``cuda``: functions ``f(call, out)`` of the same names.
"""

from ._op import NAMESPACE as NAMESPACE
from .embedding import normalize_embedding
from .momentum import ClusterSums, apply_momentum_, cluster_sums, momentum_update_
from .similarity import (
    CentroidLoss,
    ClassScores,
    NearestCentroid,
    centroid_cross_entropy,
    centroid_distance,
    class_scores,
    nearest_centroid,
    subcentroid_cross_entropy,
)
from .sinkhorn import sinkhorn_assign, sinkhorn_plan
from .upsample import upsample_argmax, upsample_cross_entropy

__all__ = [
    "CentroidLoss",
    "ClassScores",
    "ClusterSums",
    "NearestCentroid",
    "apply_momentum_",
    "centroid_cross_entropy",
    "centroid_distance",
    "class_scores",
    "cluster_sums",
    "momentum_update_",
    "nearest_centroid",
    "normalize_embedding",
    "sinkhorn_assign",
    "sinkhorn_plan",
    "subcentroid_cross_entropy",
    "upsample_argmax",
    "upsample_cross_entropy",
]
