"""Launchers of the CUDA C++ similarity kernels (csrc/cuda/similarity*.cu); the functions are those of native.py.

Class scores, the nearest sub-centroid and the loss with the gradient of x have CUDA kernels; no other op of the family gets
here. The gradients of class scores and of a loss' sub-centroids have none: Triton makes them, where it is installed.
"""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

from .. import _cuda
from .._common import METRICS, REDUCTIONS, kernels
from . import reference

_HAS_TRITON = find_spec("triton") is not None


def class_scores(
    x: Tensor, centroids: Tensor, labels: Tensor | None, metric: str, scores: Tensor, winner: Tensor, own: Tensor | None
) -> None:
    """Into scores and winner, of any strides, and own [N,K], contiguous."""
    x = _cuda.aligned(x)
    _cuda.launch("class_scores", x, x, centroids.contiguous(), labels, METRICS.index(metric), scores, winner, own)


def class_scores_backward(
    x: Tensor,
    centroids: Tensor,
    labels: Tensor | None,
    metric: str,
    winner: Tensor | None,
    grad_scores: Tensor | None,
    grad_own: Tensor | None,
    grad_x: Tensor | None,
    accumulate: bool,
    grad_centroids: Tensor | None,
) -> None:
    """Into grad_x, like x, added to what is there with `accumulate`, and grad_centroids; without triton by dense products."""
    made_by = kernels("similarity", "triton") if _HAS_TRITON else reference
    made_by.class_scores_backward(
        x, centroids, labels, metric, winner, grad_scores, grad_own, grad_x, accumulate, grad_centroids
    )


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
        if not _HAS_TRITON:
            raise RuntimeError(
                "centroid_cross_entropy: backend 'cuda' leaves the gradient of centroids to Triton, which is not installed; "
                "`pip install triton`, detach the centroids, or choose backend 'reference'"
            )
        kernels("similarity", "triton").centroid_cross_entropy(
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
