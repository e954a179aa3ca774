"""Upsampling with cross-entropy or argmax as torch ops, forward and backward, whatever kernel runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._common import NAMESPACE, compute_dtype, keep_dtypes_under_autocast, kernels, scale_saved
from . import reference

#: Label dtypes that the kernels read in place.
LABEL_DTYPES = (torch.int64, torch.int32, torch.uint8)


def cross_entropy_with_gradient(
    scores: Tensor,
    labels: Tensor,
    *,
    align_corners: bool,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    window: reference.Window | None = None,
    grad: bool = True,
    out: Tensor | None = None,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Summed loss [] and its gradient like `scores`, both of the compute dtype; not differentiable.

    `window`: `scores` and `labels` are rows of larger maps (`reference.Window`). `out`: where the gradient goes; None: it is
    new.
    """
    options = (align_corners, class_weight, ignore_index, label_smoothing)
    if backend == "reference":
        return reference.cross_entropy_with_gradient(scores, labels, *options, window, grad, out)
    made = None
    if grad:
        made = torch.empty_like(scores, dtype=compute_dtype(scores)) if out is None else out
    sums = scores.new_empty(2, dtype=torch.float64)
    _run(scores, labels, *options, backend, window=window, sums=sums, grad_scores=made)
    return sums[0].to(compute_dtype(scores)), made


def _run(
    scores: Tensor,
    labels: Tensor,
    align_corners: bool,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    backend: str,
    *,
    window: reference.Window | None = None,
    grad_loss: Tensor | None = None,
    sums: Tensor | None = None,
    loss: Tensor | None = None,
    grad_scores: Tensor | None = None,
) -> None:
    """Call the kernel; results go into `sums` [2] float64, `loss` [B,H,W] and `grad_scores`, where given."""
    weight = None if class_weight is None else class_weight.to(compute_dtype(scores)).contiguous()
    kernels("upsample", backend).cross_entropy(
        scores, labels, weight, align_corners, ignore_index, label_smoothing, window, grad_loss, sums, loss, grad_scores
    )


@torch.library.custom_op(f"{NAMESPACE}::upsample_cross_entropy", mutates_args=())
def _loss_op(
    scores: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    align_corners: bool,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    early: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, the factor of its reduction [], and with `early` the gradient of the summed loss, else [0].

    The early gradient is that of the sum: it has the size of probabilities whatever the number of pixels, and meets 1/N
    together with the incoming gradient, so that gradients of half-precision scores are rounded once.
    """
    each, factor, grad = _loss_fake(
        scores, labels, class_weight, align_corners, ignore_index, label_smoothing, reduction, early, backend
    )
    sums = scores.new_empty(2, dtype=torch.float64)
    _run(
        scores, labels, align_corners, class_weight, ignore_index, label_smoothing, backend, sums=sums,
        loss=each if reduction == "none" else None, grad_scores=grad if early else None,
    )  # fmt: skip
    total, weight = sums.unbind()
    if reduction == "mean":
        factor.copy_(torch.where(weight == 0, 0.0, 1 / weight))  # no pixel: a NaN loss with gradient 0
        total = total / weight
    else:
        factor.fill_(1)
    return each if reduction == "none" else each.copy_(total), factor, grad


@_loss_op.register_fake
def _loss_fake(
    scores: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    align_corners: bool,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    early: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(scores)
    return (
        scores.new_empty(labels.shape if reduction == "none" else (), dtype=dtype),
        scores.new_empty((), dtype=dtype),
        torch.empty_like(scores, dtype=dtype) if early else scores.new_empty(0, dtype=dtype),
    )


@torch.library.custom_op(f"{NAMESPACE}::upsample_cross_entropy_backward", mutates_args=())
def _backward_op(
    grad_loss: Tensor,
    scores: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    align_corners: bool,
    ignore_index: int,
    label_smoothing: float,
    backend: str,
) -> Tensor:
    """Gradient of the scores by recomputation; grad_loss [B,H,W], any strides."""
    dtype = compute_dtype(scores)
    made = torch.empty_like(scores, dtype=dtype)
    _run(
        scores, labels, align_corners, class_weight, ignore_index, label_smoothing, backend,
        grad_loss=grad_loss.to(dtype), grad_scores=made,
    )  # fmt: skip
    return made.to(scores.dtype)


@_backward_op.register_fake
def _(
    grad_loss: Tensor,
    scores: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    align_corners: bool,
    ignore_index: int,
    label_smoothing: float,
    backend: str,
) -> Tensor:
    return torch.empty_like(scores)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    scores, labels, class_weight, *ctx.options, _, ctx.early, ctx.backend = inputs
    _, factor, grad = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(factor, grad)
    ctx.dtype = scores.dtype
    ctx.save_for_backward(*((factor, grad) if ctx.early else (factor, scores, labels, class_weight)))


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    factor, *saved = ctx.saved_tensors
    if grad_loss is None:
        return (None,) * 9
    grad = grad_loss.to(factor.dtype) * factor
    if ctx.early:
        return scale_saved(saved[0], grad, ctx.dtype), *(None,) * 8
    scores, labels, class_weight = saved
    return (_backward_op(grad.expand(labels.shape), scores, labels, class_weight, *ctx.options, ctx.backend), *(None,) * 8)


_loss_op.register_autograd(_backward, setup_context=_save)


def upsample_cross_entropy(
    scores: Tensor,
    labels: Tensor,
    align_corners: bool,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    backend: str,
) -> Tensor:
    """Cross-entropy of the upsampled scores. A scalar loss makes the gradient in its forward pass, where one is wanted."""
    early = torch.is_grad_enabled() and scores.requires_grad and reduction != "none"
    if labels.dtype not in LABEL_DTYPES:
        labels = labels.to(torch.int64)
    return _loss_op(scores, labels, class_weight, align_corners, ignore_index, label_smoothing, reduction, early, backend)[0]


@torch.library.custom_op(f"{NAMESPACE}::upsample_argmax", mutates_args=())
def upsample_argmax(scores: Tensor, height: int, width: int, align_corners: bool, backend: str) -> Tensor:
    """Class of the highest upsampled score, [B,H,W] int64."""
    label = _argmax_fake(scores, height, width, align_corners, backend)
    kernels("upsample", backend).argmax(scores, align_corners, label)
    return label


@upsample_argmax.register_fake
def _argmax_fake(scores: Tensor, height: int, width: int, align_corners: bool, backend: str) -> Tensor:
    return scores.new_empty((scores.shape[0], height, width), dtype=torch.int64)


for _op in (_loss_op, _backward_op, upsample_argmax):
    keep_dtypes_under_autocast(_op)
