"""Distances, class scores and the nearest sub-centroid as torch ops, whatever kernel runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._common import NAMESPACE, compute_dtype, flat_pixels, keep_dtypes_under_autocast, kernels, pixel_count
from . import reference


def _empty_scores(x: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """[N,C], or [B,C,H,W] in the memory format of x."""
    if x.ndim == 2:
        return x.new_empty((x.shape[0], classes), dtype=dtype)
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    shape = (x.shape[0], classes, x.shape[2], x.shape[3])
    return torch.empty(
        shape, dtype=dtype, device=x.device, memory_format=torch.channels_last if last else torch.contiguous_format
    )


@torch.library.custom_op(f"{NAMESPACE}::centroid_distance", mutates_args=())
def centroid_distance(x: Tensor, centroids: Tensor, metric: str, backend: str) -> Tensor:
    """[N,C,K]."""
    out = _distance_fake(x, centroids, metric, backend)
    kernels("similarity", backend).centroid_distance(x, centroids, metric, out)
    return out


@centroid_distance.register_fake
def _distance_fake(x: Tensor, centroids: Tensor, metric: str, backend: str) -> Tensor:
    return x.new_empty((pixel_count(x), *centroids.shape[:2]), dtype=compute_dtype(x, centroids))


def _save_distance(ctx: Any, inputs: Any, output: Any) -> None:
    x, centroids, ctx.metric, _ = inputs
    ctx.save_for_backward(x, centroids)


def _distance_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Dense products, as torch would; only the winning ops have sparse gradients."""
    x, centroids = ctx.saved_tensors
    pixels, rows = flat_pixels(x).to(grad.dtype), centroids.to(grad.dtype).flatten(0, 1)
    # a distance is minus a similarity, or 1 minus it
    grad_x, grad_rows = reference.similarity_backward(pixels, rows, -grad.flatten(1), ctx.metric, *ctx.needs_input_grad[:2])
    if grad_x is not None:
        if x.ndim == 4:
            grad_x = grad_x.view(x.shape[0], x.shape[2], x.shape[3], x.shape[1]).permute(0, 3, 1, 2)
        grad_x = grad_x.to(x.dtype)
    if grad_rows is not None:
        grad_rows = grad_rows.view_as(centroids).to(centroids.dtype)
    return grad_x, grad_rows, None, None


centroid_distance.register_autograd(_distance_backward, setup_context=_save_distance)


@torch.library.custom_op(f"{NAMESPACE}::class_scores", mutates_args=())
def class_scores(
    x: Tensor, centroids: Tensor, labels: Tensor | None, metric: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, winners, own-class similarities ([0] without labels)."""
    scores, winner, own = _class_scores_fake(x, centroids, labels, metric, backend)
    kernels("similarity", backend).class_scores(
        x, centroids, labels, metric, scores, winner, own if labels is not None else None
    )
    return scores, winner, own


@class_scores.register_fake
def _class_scores_fake(
    x: Tensor, centroids: Tensor, labels: Tensor | None, metric: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x, centroids)
    scores, winner = (_empty_scores(x, centroids.shape[0], t) for t in (dtype, torch.uint8))
    own = x.new_empty((pixel_count(x), centroids.shape[1]) if labels is not None else (0,), dtype=dtype)
    return scores, winner, own


@torch.library.custom_op(f"{NAMESPACE}::class_scores_backward", mutates_args=())
def class_scores_backward(
    x: Tensor,
    centroids: Tensor,
    labels: Tensor | None,
    metric: str,
    winner: Tensor,
    grad_scores: Tensor | None,
    grad_own: Tensor | None,
    to_x: bool,
    to_centroids: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and centroids; [0] where not wanted."""
    grad_x, grad_centroids = _class_scores_backward_fake(
        x, centroids, labels, metric, winner, grad_scores, grad_own, to_x, to_centroids, backend
    )
    # the gradient of small tensors is made in the compute type and cast afterwards
    total = grad_centroids.to(compute_dtype(x, centroids))
    kernels("similarity", backend).class_scores_backward(
        x, centroids, labels, metric, winner, grad_scores, None if grad_own is None else grad_own.contiguous(),
        grad_x if to_x else None, False, total if to_centroids else None,
    )  # fmt: skip
    return grad_x, grad_centroids if total is grad_centroids else total.to(grad_centroids.dtype)


@class_scores_backward.register_fake
def _class_scores_backward_fake(
    x: Tensor,
    centroids: Tensor,
    labels: Tensor | None,
    metric: str,
    winner: Tensor,
    grad_scores: Tensor | None,
    grad_own: Tensor | None,
    to_x: bool,
    to_centroids: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x) if to_x else x.new_empty(0),
        torch.empty_like(centroids, memory_format=torch.contiguous_format) if to_centroids else centroids.new_empty(0),
    )


def _save_scores(ctx: Any, inputs: Any, output: Any) -> None:
    x, centroids, labels, ctx.metric, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    # a buffer that a momentum update may change before backward: keep what the scores were made with
    kept = centroids if centroids.requires_grad else centroids.clone()
    ctx.save_for_backward(x, kept, labels, output[1])


def _scores_backward(ctx: Any, grad_scores: Tensor | None, _: Any, grad_own: Tensor | None) -> tuple[Tensor | None, ...]:
    x, centroids, labels, winner = ctx.saved_tensors
    to_x, to_centroids = ctx.needs_input_grad[:2]
    if labels is None:
        grad_own = None
    if grad_scores is None and grad_own is None:
        return (None,) * 5
    grad_x, grad_centroids = class_scores_backward(
        x, centroids, labels, ctx.metric, winner, grad_scores, grad_own, to_x, to_centroids, ctx.backend
    )
    return grad_x if to_x else None, grad_centroids if to_centroids else None, None, None, None


class_scores.register_autograd(_scores_backward, setup_context=_save_scores)


def scores_into(
    x: Tensor, centroids: Tensor, labels: Tensor, scores: Tensor, winner: Tensor, own: Tensor, backend: str
) -> None:
    """Class scores (metric dot) into given tensors: scores and winner of any strides, `own` contiguous. No autograd."""
    if backend == "reference":
        reference.scores_into(x, centroids, labels, scores, winner, own)
    else:
        kernels("similarity", backend).class_scores(x, centroids, labels, "dot", scores, winner, own)


def add_scores_gradient_(grad: Tensor, centroids: Tensor, winner: Tensor, grad_scores: Tensor, backend: str) -> None:
    """Add to `grad`, of pixels, what the gradient of their class scores (metric dot) gives. No autograd."""
    if backend == "reference":
        reference.add_scores_gradient_(grad, centroids, winner, grad_scores)
    else:
        kernels("similarity", backend).class_scores_backward(
            grad, centroids, None, "dot", winner, grad_scores, None, grad, True, None
        )


def add_own_gradient_(grad: Tensor, centroids: Tensor, labels: Tensor, grad_own: Tensor, backend: str) -> None:
    """Add to `grad`, of pixels, what the gradient [N,K] of their own-class similarities (metric dot) gives. No autograd."""
    if backend == "reference":
        reference.add_own_gradient_(grad, centroids, labels, grad_own)
    else:
        kernels("similarity", backend).class_scores_backward(
            grad, centroids, labels, "dot", None, None, grad_own, grad, True, None
        )


@torch.library.custom_op(f"{NAMESPACE}::nearest_centroid", mutates_args=())
def nearest_centroid(x: Tensor, centroids: Tensor, metric: str, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Label [N], sub [N], score [N]."""
    label, sub, score = _nearest_fake(x, centroids, metric, backend)
    kernels("similarity", backend).nearest_centroid(x, centroids, metric, label, sub, score)
    return label, sub, score


@nearest_centroid.register_fake
def _nearest_fake(x: Tensor, centroids: Tensor, metric: str, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    label, sub = (x.new_empty(pixel_count(x), dtype=torch.int64) for _ in range(2))
    return label, sub, x.new_empty(pixel_count(x), dtype=compute_dtype(x, centroids))


for _op in (centroid_distance, class_scores, class_scores_backward, nearest_centroid):
    keep_dtypes_under_autocast(_op)
