"""Calls of the similarity kernels: fields of the structs of csrc/include/dnc/similarity.h, by their names."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._op import record


@record
class DistanceCall(NamedTuple):
    """Arguments of `centroid_distance`; the result is [N,C,K]."""

    x: Tensor  # [N,D] or [B,D,H,W]
    centroids: Tensor  # [C,K,D]
    metric: str
    backend: str


@record
class ScoresCall(NamedTuple):
    """Arguments of `class_scores`."""

    x: Tensor  # [N,D] or [B,D,H,W]
    centroids: Tensor  # [C,K,D]
    labels: Tensor | None  # [N] int64, negative: none
    metric: str
    backend: str


@record
class ScoresOut(NamedTuple):
    """Results of `class_scores`."""

    scores: Tensor  # [N,C] or [B,C,H,W], any strides
    winner: Tensor  # the same in uint8
    own_similarity: Tensor | None  # [N,K], contiguous; None without labels


@record
class ScoresBackwardCall(NamedTuple):
    """Arguments of the derivative of `class_scores`."""

    x: Tensor  # [N,D] or [B,D,H,W]
    centroids: Tensor  # [C,K,D]
    labels: Tensor | None  # [N] int64, with grad_own_similarity
    metric: str
    winner: Tensor | None  # as `class_scores` gave it, with grad_scores
    grad_scores: Tensor | None  # [N,C] or [B,C,H,W]
    grad_own_similarity: Tensor | None  # [N,K], contiguous
    accumulate: bool  # add to grad_x (metric dot)
    backend: str


@record
class ScoresBackwardOut(NamedTuple):
    """Gradients, those wanted."""

    grad_x: Tensor | None  # like x
    grad_centroids: Tensor | None  # [C,K,D] of the compute dtype


@record
class NearestCall(NamedTuple):
    """Arguments of `nearest_centroid`."""

    x: Tensor  # [N,D] or [B,D,H,W]
    centroids: Tensor  # [C,K,D]
    metric: str
    backend: str


@record
class NearestOut(NamedTuple):
    """Results of `nearest_centroid`."""

    label: Tensor  # [N] int64
    sub: Tensor  # [N] int64
    score: Tensor  # [N] of the compute dtype


@record
class LossCall(NamedTuple):
    """Arguments of `centroid_cross_entropy` and of its derivative."""

    x: Tensor  # [N,D] or [B,D,H,W]
    centroids: Tensor  # [C,K,D]
    labels: Tensor  # [N] int64
    metric: str
    norm_weight: Tensor | None  # [C]; this and the next three contiguous, of the compute dtype
    norm_bias: Tensor | None  # [C]
    norm_eps: float
    scale: Tensor | None  # []
    temperature: float
    class_weight: Tensor | None  # [C]
    ignore_index: int
    label_smoothing: float
    reduction: str
    grad_loss: Tensor | None  # [], or [N] for `none`: what gradients are multiplied by; None: 1
    backend: str


#: What `centroid_cross_entropy` may have gradients for.
LEARNT = ("x", "centroids", "norm_weight", "norm_bias", "scale")


@record
class LossOut(NamedTuple):
    """Results of `centroid_cross_entropy` and its gradients, those wanted; of the compute dtype where nothing is said."""

    loss: Tensor | None = None  # [], or [N] for `none`
    prediction: Tensor | None = None  # [N] int64
    own_similarity: Tensor | None = None  # [N,K]
    grad_x: Tensor | None = None  # like x
    grad_centroids: Tensor | None = None  # [C,K,D]
    grad_norm_weight: Tensor | None = None  # [C]
    grad_norm_bias: Tensor | None = None  # [C]
    grad_scale: Tensor | None = None  # []


@record
class ContrastCall(NamedTuple):
    """Arguments of `subcentroid_cross_entropy`."""

    x: Tensor  # [N,D] or [B,D,H,W]
    centroids: Tensor  # [C,K,D]
    target: Tensor  # [N] int64: c*K + k
    temperature: float
    ignore_index: int
    backend: str


@record
class ContrastOut(NamedTuple):
    """Results of `subcentroid_cross_entropy`."""

    loss: Tensor  # [N] of the compute dtype
    grad_x: Tensor | None  # like x: gradient of the sum of losses


@record
class SweepCall(NamedTuple):
    """Arguments of `scores_and_contrast`: class scores, and the contrast without its targets' terms, from one product."""

    x: Tensor  # [N,D] or [B,D,H,W]
    centroids: Tensor  # [C,K,D]
    labels: Tensor  # [N] int64, negative: none
    temperature: float  # of the contrast
    scale: Tensor  # [] of the compute dtype: what grad_x is multiplied by
    backend: str


@record
class SweepOut(NamedTuple):
    """Results of `scores_and_contrast`."""

    scores: Tensor  # [N,C] or [B,C,H,W], any strides
    winner: Tensor  # the same in uint8
    own_similarity: Tensor  # [N,K], contiguous
    loss: Tensor  # [N]: log-sum-exp over all similarities / temperature, 0 for pixels without a label, as grad_x is
    grad_x: Tensor | None  # like x: gradient of the sum of losses
