"""Similarities of pixels and sub-centroids, with what follows them fused in (family page: docs/similarity.md)."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from torch import Tensor

from ..._tensors import check_ignore_index, check_pixels, compute_dtype, flat_labels, like_pixels, pixel_map, without_ignored
from ...backends import Backend, pick
from ...errors import check_choice, check_device, check_float, check_number, check_value, holds_a_loss, renamed
from .._common import (
    METRICS,
    REDUCTIONS,
    Metric,
    Reduction,
    check_centroids,
    check_labels,
    check_no_gradient,
    contiguous_in,
    remembered,
)
from . import op as ops
from . import op_loss
from .calls import ContrastCall, DistanceCall, LossCall, NearestCall, ScoresCall

MAX_SUBCENTROIDS = 256  # winners are uint8


class ClassScores(NamedTuple):
    """Result of `class_scores`."""

    scores: Tensor
    winner: Tensor
    own_similarity: Tensor | None


class NearestCentroid(NamedTuple):
    """Result of `nearest_centroid`."""

    label: Tensor
    sub: Tensor
    score: Tensor


@holds_a_loss
class CentroidLoss(NamedTuple):
    """Result of `centroid_cross_entropy`."""

    loss: Tensor
    prediction: Tensor
    own_similarity: Tensor


def centroid_distance(
    x: Tensor, centroids: Tensor, *, metric: Literal["cosine", "sqeuclidean"] = "cosine", backend: Backend | None = None
) -> Tensor:
    """Distance of every pixel to every sub-centroid (DNC, eq. 2).

    The only op that writes [N,C,K]; prefer the fused ops where the matrix itself is not wanted.

    Args:
        x: features [N,D] or [B,D,H,W] (N = B*H*W), any strides, read in place; float32, float64, float16 or bfloat16.
        centroids: [C,K,D], any of these dtypes.
        metric: ``cosine`` (1 - <x,p>/(|x||p|), in [0,2]) or ``sqeuclidean`` (|x-p|^2).
        backend: what runs (docs/backends.md); None: the choice in force, by default ``auto``.

    Returns:
        [N,C,K], or [B,C,K,H,W] for a map; float64 if an input is float64, else float32. Differentiable in `x` and `centroids`.
        sqeuclidean is computed as |x|^2 - 2<x,p> + |p|^2: its absolute error is about eps * (|x|^2 + |p|^2), and it may be
        below zero by that much.

    Raises:
        ValueError, TypeError: wrong shape, device, dtype or metric.
    """
    op = "centroid_distance"
    _check_distance(x, centroids, metric)
    classes, k, _ = centroids.shape
    distance = ops.centroid_distance(DistanceCall(x, centroids, metric, pick(op, x, backend, centroids, C=classes, K=k)))
    if x.ndim == 2:
        return distance
    return distance.view(x.shape[0], x.shape[2], x.shape[3], classes, k).permute(0, 3, 4, 1, 2)


def class_scores(
    x: Tensor,
    centroids: Tensor,
    labels: Tensor | None = None,
    *,
    metric: Metric = "dot",
    ignore_index: int = -100,
    backend: Backend | None = None,
) -> ClassScores:
    """Similarity of every pixel to the nearest sub-centroid of every class (DNC, eq. 3: max over K).

    Args:
        x: features [N,D] or [B,D,H,W], any strides, read in place; float32, float64, float16 or bfloat16.
        centroids: [C,K,D], K <= 256.
        labels: optional [N] or [B,H,W], any integer dtype, in [0,C); `ignore_index` or any negative id leaves a pixel out.
        metric: ``dot`` (<x,p>; the cosine for unit vectors), ``cosine``, or ``sqeuclidean`` (-|x-p|^2).
        ignore_index: outside [0,C).
        backend: what runs (docs/backends.md); None: the choice in force, by default ``auto``.

    Returns:
        scores [N,C] or [B,C,H,W] (in x's memory format), float64 if an input is float64, else float32; winner uint8 of the
        same shape, the k that gave each score, lowest on ties; own_similarity [N,K] or [B,K,H,W], the similarities to the
        sub-centroids of the pixel's label (zeros where it is left out), None without `labels`. A pixel with a non-finite
        feature has NaN scores.
        Scores and own_similarity are differentiable in `x` and `centroids`; a class sends its gradient to its winner alone
        (deviation from amax, which splits ties). [N,C,K] is never in memory; backward keeps `x` only where it needs it.

    Raises:
        ValueError, TypeError: wrong shape, device, dtype or metric; on CPU also a label at or beyond C (on a GPU it is left
            out).
    """
    op = "class_scores"
    _check_scores(x, centroids, labels, metric, ignore_index)
    classes, k, _ = centroids.shape
    flat = None if labels is None else without_ignored(flat_labels(labels), ignore_index)
    call = ScoresCall(x, centroids, flat, metric, pick(op, x, backend, centroids, C=classes, K=k))
    scores, winner, own = ops.class_scores(call)
    return ClassScores(scores, winner, None if own is None else pixel_map(x, own))


def nearest_centroid(
    x: Tensor, centroids: Tensor, *, metric: Metric = "dot", backend: Backend | None = None
) -> NearestCentroid:
    """The nearest sub-centroid of all for every pixel; neither [N,C] nor [N,C,K] is in memory (DNC, eq. 1).

    Args:
        x: features [N,D] or [B,D,H,W], any strides, read in place; float32, float64, float16 or bfloat16.
        centroids: [C,K,D].
        metric: ``dot``, ``cosine`` or ``sqeuclidean``.
        backend: what runs (docs/backends.md); None: the choice in force, by default ``auto``.

    Returns:
        label, sub, score, each [N] or [B,H,W]: class and sub-centroid (int64; the lowest c*K+k on ties) and the similarity,
        float64 if an input is float64, else float32 (for sqeuclidean -|x-p|^2). -1, -1, NaN for a pixel with a non-finite
        feature. Not differentiable.

    Raises:
        ValueError, TypeError: wrong shape, device, dtype or metric.
    """
    op = "nearest_centroid"
    _check_nearest(x, centroids, metric)
    classes, k, _ = centroids.shape
    call = NearestCall(x.detach(), centroids.detach(), metric, pick(op, x, backend, centroids, C=classes, K=k))
    label, sub, score = ops.nearest_centroid(call)
    return NearestCentroid(like_pixels(x, label), like_pixels(x, sub), like_pixels(x, score))


@renamed(class_weight="weight")
def centroid_cross_entropy(
    x: Tensor,
    centroids: Tensor,
    labels: Tensor,
    *,
    metric: Metric = "dot",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    temperature: float | Tensor = 1.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
) -> CentroidLoss:
    """Cross-entropy over nearest sub-centroids (DNC, eq. 4), with prediction and clustering input from the same pass.

    ``r[c] = max_k similarity(x, centroids[c,k])``; ``o = LayerNorm_C(r)`` where `norm_weight` is given, else ``r``;
    the loss is ``cross_entropy(o / temperature, labels)`` as torch defines it.

    Args:
        x: features [N,D] or [B,D,H,W], any strides, read in place; float32, float64, float16 or bfloat16.
        centroids: [C,K,D], K <= 256.
        labels: [N] or [B,H,W], any integer dtype, in [0,C); `ignore_index` or any negative id leaves a pixel out.
        metric: ``dot``, ``cosine`` or ``sqeuclidean`` (scores are -|x-p|^2).
        norm_weight: [C], gain of the LayerNorm over classes; None: no norm.
        norm_bias: [C], its shift; None: none.
        norm_eps: added to the variance over classes.
        temperature: positive number, or a one-element tensor that may get a gradient (a learnable scale s is temperature 1/s).
        weight: [C] non-negative weights of the classes, as in torch, and as there without gradient.
        ignore_index: outside [0,C).
        label_smoothing: in [0,1].
        reduction: ``mean`` (over the class weights of the pixels that count), ``sum`` or ``none``.
        backend: what runs (docs/backends.md); None: the choice in force, by default ``auto``.

    Returns:
        `CentroidLoss`:

        - loss: scalar, or [N] / [B,H,W] for ``none`` (zero where left out), float64 if an input is float64, else float32.
          Differentiable in x, centroids, norm_weight, norm_bias and temperature, once where the gradient is made in the forward
          pass, else any number of times; a class sends its gradient to its nearest sub-centroid, the lowest on ties. Without a
          pixel that counts, ``mean`` is NaN as in torch, with zero gradients.
        - prediction: [N] / [B,H,W] int64, argmax over classes, -1 for a pixel with a non-finite feature (whose loss is NaN,
          as in torch).
        - own_similarity: [N,K] / [B,K,H,W], similarities to the label's own sub-centroids, zeros where left out; carries no
          gradient.

        Memory: neither [N,C,K] nor [N,C] exists. With reduction mean or sum and centroids that need no gradient, the gradient
        of x is made in the forward pass: extra memory is one more x, [N,K] and O(N). Otherwise backward recomputes from `x`.

    Raises:
        ValueError, TypeError: wrong shape, device, dtype or option; on CPU also a label at or beyond C that is not
            `ignore_index` (on a GPU it is left out).
    """
    op = "centroid_cross_entropy"
    _check_loss(
        x, centroids, labels, metric, norm_weight, norm_bias, norm_eps, temperature, weight, ignore_index, label_smoothing,
        reduction,
    )  # fmt: skip
    (classes, k, _), dtype = centroids.shape, compute_dtype(x, centroids)
    if weight is not None:
        check_no_gradient(op, "weight", weight)
    scale = None
    if isinstance(temperature, Tensor):
        scale, temperature = temperature.reshape(()).to(dtype).reciprocal(), 1.0
    call = LossCall(
        x=x,
        centroids=centroids,
        labels=flat_labels(labels),
        metric=metric,
        norm_weight=contiguous_in(dtype, norm_weight),
        norm_bias=contiguous_in(dtype, norm_bias),
        norm_eps=float(norm_eps),
        scale=scale,
        temperature=float(temperature),
        class_weight=None if weight is None else contiguous_in(dtype, weight.detach()),
        ignore_index=int(ignore_index),
        label_smoothing=float(label_smoothing),
        reduction=reduction,
        grad_loss=None,
        backend=pick(op, x, backend, centroids, C=classes, K=k),
    )
    loss, prediction, own, *_ = op_loss.centroid_cross_entropy(call)
    assert loss is not None and prediction is not None and own is not None
    loss = like_pixels(x, loss) if reduction == "none" else loss
    return CentroidLoss(loss, like_pixels(x, prediction), pixel_map(x, own))


@renamed(target="labels")
def subcentroid_cross_entropy(
    x: Tensor,
    centroids: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
) -> Tensor:
    """Cross-entropy over all C*K similarities, the pixel-prototype contrast (ProtoSeg, PPC).

    Args:
        x: features [N,D] or [B,D,H,W]; float32, float64, float16 or bfloat16.
        centroids: [C,K,D].
        labels: [N] or [B,H,W], any integer dtype, sub-centroids ``c*K + k`` in [0,C*K); `ignore_index` or any negative id
            leaves a pixel out.
        temperature: positive number that divides the similarities <x,p>; a tensor is refused, as it would get no gradient.
        ignore_index: outside [0,C*K).
        reduction: ``mean``, ``sum`` or ``none``.
        backend: what runs (docs/backends.md); None: the choice in force, by default ``auto``.

    Returns:
        Scalar, or [N] / [B,H,W] for ``none``, zero where left out; float64 if an input is float64, else float32. Differentiable
        in x and centroids, once where the centroids need no gradient, else any number of times. A pixel with a non-finite
        feature has a NaN loss. Without a pixel that counts, ``mean`` is NaN
        as in torch, with zero gradients.

        Memory: no [N,C*K]. The gradient of x is made in the forward pass: extra memory is one more x and O(N). A gradient of
        the centroids is made from products of 4096 pixels at a time, in plain torch.

    Raises:
        ValueError, TypeError: wrong shape, device, dtype or option; on CPU also a label at or beyond C*K that is not
            `ignore_index` (on a GPU it is left out).
    """
    op = "subcentroid_cross_entropy"
    _check_contrast(x, centroids, labels, temperature, ignore_index, reduction)
    classes, k, _ = centroids.shape
    chosen = pick(op, x, backend, centroids, C=classes, K=k)
    call = ContrastCall(x, centroids, flat_labels(labels), float(temperature), int(ignore_index), chosen)
    loss = op_loss.subcentroid_cross_entropy(call, reduction)
    return like_pixels(x, loss) if reduction == "none" else loss


@remembered
def _check_distance(x: Tensor, centroids: Tensor, metric: str) -> None:
    op = "centroid_distance"
    check_pixels(op, x)
    check_centroids(op, x, centroids)
    check_choice(op, "metric", metric, METRICS[1:])


@remembered
def _check_scores(x: Tensor, centroids: Tensor, labels: Tensor | None, metric: str, ignore_index: int) -> None:
    op = "class_scores"
    check_pixels(op, x)
    classes, k = check_centroids(op, x, centroids)
    check_value(k <= MAX_SUBCENTROIDS, op, "centroids", f"[C,K,D] with K <= {MAX_SUBCENTROIDS}", centroids)
    check_choice(op, "metric", metric, METRICS)
    check_ignore_index(op, ignore_index, classes)
    if labels is not None:
        check_labels(op, labels, x)


@remembered
def _check_nearest(x: Tensor, centroids: Tensor, metric: str) -> None:
    op = "nearest_centroid"
    check_pixels(op, x)
    check_centroids(op, x, centroids)
    check_choice(op, "metric", metric, METRICS)


@remembered
def _check_loss(
    x: Tensor,
    centroids: Tensor,
    labels: Tensor,
    metric: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    temperature: float | Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> None:
    op = "centroid_cross_entropy"
    check_pixels(op, x)
    classes, k = check_centroids(op, x, centroids)
    check_value(k <= MAX_SUBCENTROIDS, op, "centroids", f"[C,K,D] with K <= {MAX_SUBCENTROIDS}", centroids)
    check_labels(op, labels, x)
    check_choice(op, "metric", metric, METRICS)
    check_choice(op, "reduction", reduction, REDUCTIONS)
    check_ignore_index(op, ignore_index, classes)
    check_number(op, "label_smoothing", label_smoothing, "in [0,1]", lambda v: 0 <= v <= 1)
    check_number(op, "norm_eps", norm_eps, "non-negative and finite", lambda v: 0 <= v < math.inf)
    check_value(norm_weight is not None or norm_bias is None, op, "norm_bias", "None without norm_weight", norm_bias)
    for name, vector in (("norm_weight", norm_weight), ("norm_bias", norm_bias), ("weight", weight)):
        if vector is not None:
            check_float(op, name, vector)
            check_value(list(vector.shape) == [classes], op, name, lambda: f"[C]=[{classes}] to match centroids", vector)
            check_device(op, name, vector, x)
    expected = "a number or a tensor of one element"
    if isinstance(temperature, Tensor):
        check_float(op, "temperature", temperature)
        check_value(temperature.numel() == 1, op, "temperature", expected, temperature)
    else:
        fix = "a tensor of one element is taken too"
        check_number(op, "temperature", temperature, "positive and finite", lambda v: 0 < v < math.inf, fix)


@remembered
def _check_contrast(
    x: Tensor, centroids: Tensor, labels: Tensor, temperature: float, ignore_index: int, reduction: str
) -> None:
    op = "subcentroid_cross_entropy"
    check_pixels(op, x)
    classes, k = check_centroids(op, x, centroids)
    check_labels(op, labels, x)
    check_choice(op, "reduction", reduction, REDUCTIONS)
    check_ignore_index(op, ignore_index, classes * k)
    fix = "pass .item() of a tensor: it gets no gradient here; with `centroid_cross_entropy` it gets one"
    check_number(op, "temperature", temperature, "positive and finite", lambda v: 0 < v < math.inf, fix)


__all__ = [
    "CentroidLoss",
    "ClassScores",
    "NearestCentroid",
    "centroid_cross_entropy",
    "centroid_distance",
    "class_scores",
    "nearest_centroid",
    "subcentroid_cross_entropy",
]
