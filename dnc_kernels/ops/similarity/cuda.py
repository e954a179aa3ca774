"""Launchers of the CUDA C++ similarity kernels (csrc/cuda/similarity*.cu); the functions are those of native.py.

Class scores, the nearest sub-centroid and the loss with the gradient of x have CUDA kernels. Distances, the contrast, the
gradients of class scores and of sub-centroids have none and run the Triton kernels.
"""

from __future__ import annotations

from torch import Tensor

from .. import _cuda
from .._common import METRICS, REDUCTIONS
from . import triton
from .triton import centroid_distance, class_scores_backward, subcentroid_cross_entropy


def class_scores(
    x: Tensor, centroids: Tensor, labels: Tensor | None, metric: str, scores: Tensor, winner: Tensor, own: Tensor | None
) -> None:
    """Into scores and winner, of any strides, and own [N,K], contiguous."""
    x = _cuda.aligned(x)
    _cuda.launch("class_scores", x, x, centroids.contiguous(), labels, METRICS.index(metric), scores, winner, own)


def nearest_centroid(x: Tensor, centroids: Tensor, metric: str, label: Tensor, sub: Tensor, score: Tensor) -> None:
    """Into label and sub [N] int64 and score [N]."""
    x = _cuda.aligned(x)
    _cuda.launch("nearest_centroid", x, x, centroids.contiguous(), METRICS.index(metric), label, sub, score)


def centroid_cross_entropy(
    x: Tensor,
    centroids: Tensor,
    labels: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    class_weight: Tensor | None,
    metric: str,
    norm_eps: float,
    temperature: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    grad_loss: Tensor | None,
    loss: Tensor | None,
    prediction: Tensor | None,
    own: Tensor | None,
    grad_x: Tensor | None,
    grad_centroids: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_scale: Tensor | None,
) -> None:
    """Into those given: loss [] or [N], prediction [N] int64, own [N,K], gradients for grad_loss [] or [N] (None: 1).

    grad_x has the dtype of x; everything else, inputs of [C] included, float32. A label outside [0,C) is ignored.
    """
    if grad_centroids is not None:
        triton.centroid_cross_entropy(
            x, centroids, labels, norm_weight, norm_bias, scale, class_weight, metric, norm_eps, temperature, ignore_index,
            label_smoothing, reduction, grad_loss, loss, prediction, own, grad_x, grad_centroids, grad_weight, grad_bias,
            grad_scale,
        )  # fmt: skip
        return
    x = _cuda.aligned(x)
    _cuda.launch(
        "centroid_cross_entropy", x, x, centroids.contiguous(), labels, METRICS.index(metric), norm_weight, norm_bias, norm_eps,
        scale, temperature, class_weight, ignore_index, label_smoothing, REDUCTIONS.index(reduction), grad_loss, loss,
        prediction, own, grad_x, grad_weight, grad_bias, grad_scale,
    )  # fmt: skip


__all__ = [
    "centroid_cross_entropy",
    "centroid_distance",
    "class_scores",
    "class_scores_backward",
    "nearest_centroid",
    "subcentroid_cross_entropy",
]
