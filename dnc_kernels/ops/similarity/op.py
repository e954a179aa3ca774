"""Distances, class scores and the nearest sub-centroid as torch ops, whatever kernel runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._tensors import compute_dtype, flat_pixels, pixel_count
from .._op import Op, needed, save_call, saved_call
from . import reference
from .calls import DistanceCall, NearestCall, NearestOut, ScoresBackwardCall, ScoresBackwardOut, ScoresCall, ScoresOut


def product(call: Any, k: int | None = None) -> int:
    """Floating-point operations of the similarities of a call's pixels and sub-centroids, or of `k` of every class."""
    classes, every, channels = call.centroids.shape
    return 2 * pixel_count(call.x) * classes * (every if k is None else k) * channels


def _distance_out(call: DistanceCall) -> Tensor:
    return call.x.new_empty((pixel_count(call.x), *call.centroids.shape[:2]), dtype=compute_dtype(call.x, call.centroids))


centroid_distance = Op("similarity", "centroid_distance", _distance_out, reference.centroid_distance, flops=product)


def _save_distance(ctx: Any, out: Tensor, call: DistanceCall) -> None:
    save_call(ctx, call)


def _distance_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Dense products, as torch would; only the winning ops have sparse gradients."""
    (x, centroids, metric, _), _ = saved_call(ctx)
    pixels, rows = flat_pixels(x).to(grad.dtype), centroids.to(grad.dtype).flatten(0, 1)
    # a distance is minus a similarity, or 1 minus it
    grad_x, grad_rows = reference.similarity_backward(pixels, rows, -grad.reshape(-1, len(rows)), metric, *needed(ctx))
    if grad_x is not None:
        if x.ndim == 4:
            grad_x = grad_x.view(x.shape[0], x.shape[2], x.shape[3], x.shape[1]).permute(0, 3, 1, 2)
        grad_x = grad_x.to(x.dtype)
    return grad_x, None if grad_rows is None else grad_rows.view_as(centroids).to(centroids.dtype)


centroid_distance.differentiable(("x", "centroids"), (), _save_distance, _distance_backward)


def _empty_scores(x: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """[N,C], or [B,C,H,W] in the memory format of x."""
    if x.ndim == 2:
        return x.new_empty((x.shape[0], classes), dtype=dtype)
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    shape = (x.shape[0], classes, x.shape[2], x.shape[3])
    return torch.empty(
        shape, dtype=dtype, device=x.device, memory_format=torch.channels_last if last else torch.contiguous_format
    )


def _scores_out(call: ScoresCall) -> ScoresOut:
    x, (classes, k, _), dtype = call.x, call.centroids.shape, compute_dtype(call.x, call.centroids)
    own = None if call.labels is None else x.new_empty((pixel_count(x), k), dtype=dtype)
    return ScoresOut(_empty_scores(x, classes, dtype), _empty_scores(x, classes, torch.uint8), own)


class_scores = Op("similarity", "class_scores", _scores_out, reference.class_scores, flops=product)


def _scores_backward_out(call: ScoresBackwardCall, wanted: list[bool]) -> ScoresBackwardOut:
    x, centroids = call.x, call.centroids
    return ScoresBackwardOut(
        torch.empty_like(x) if wanted[0] else None,
        x.new_empty(centroids.shape, dtype=compute_dtype(x, centroids)) if wanted[1] else None,
    )


def _scores_backward_flops(call: ScoresBackwardCall, wanted: list[bool]) -> int:
    # of every class its winner, and of one class all
    each = (call.grad_scores is not None) * product(call, k=1)
    own = (call.grad_own_similarity is not None) * product(call) // call.centroids.shape[0]
    return sum(wanted) * (each + own)


class_scores_backward = Op("similarity", "class_scores_backward", _scores_backward_out, flops=_scores_backward_flops)


def with_centroids_kept(call: Any) -> Any:
    """The call with the sub-centroids as they are: a momentum update may change such a buffer before backward."""
    return call if call.centroids.requires_grad else call._replace(centroids=call.centroids.clone())


def _save_scores(ctx: Any, out: ScoresOut, call: ScoresCall) -> None:
    save_call(ctx, with_centroids_kept(call), out.winner)


def _scores_backward(ctx: Any, grad_scores: Tensor | None, grad_own: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    (x, centroids, labels, metric, backend), (winner,) = saved_call(ctx)
    own = None if grad_own is None else grad_own.contiguous()
    call = ScoresBackwardCall(x, centroids, labels, metric, winner, grad_scores, own, False, backend)
    made = class_scores_backward(call, needed(ctx))
    return made.grad_x, None if made.grad_centroids is None else made.grad_centroids.to(centroids.dtype)


class_scores.differentiable(("x", "centroids"), ("scores", "own_similarity"), _save_scores, _scores_backward)


def _nearest_out(call: NearestCall) -> NearestOut:
    x, n = call.x, pixel_count(call.x)
    label, sub = x.new_empty(n, dtype=torch.int64), x.new_empty(n, dtype=torch.int64)
    return NearestOut(label, sub, x.new_empty(n, dtype=compute_dtype(x, call.centroids)))


nearest_centroid = Op("similarity", "nearest_centroid", _nearest_out, reference.nearest_centroid, flops=product)
