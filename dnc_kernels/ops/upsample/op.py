"""Upsampling with cross-entropy or argmax as torch ops, forward and backward, whatever kernel runs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..._tensors import compute_dtype
from .._common import batched, contiguous_in, kernels, readable, scale_saved
from .._op import Op, save_call, saved_call
from . import reference
from .calls import ArgmaxCall, UpsampleCall, UpsampleOut


def cross_entropy_with_gradient(call: UpsampleCall, grad: bool, out: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Summed loss [] and, with `grad`, its gradient like the scores, both of the compute dtype; not differentiable.

    `out`: where the gradient goes; None: it is new.
    """
    if call.backend == "reference":
        return reference.cross_entropy_with_gradient(call, grad, out)
    if not grad:
        out = None
    elif out is None:
        out = _like_scores(call)
    sums, dtype = call.scores.new_empty(2, dtype=torch.float64), compute_dtype(call.scores)
    call = call._replace(class_weight=contiguous_in(dtype, call.class_weight))
    kernels("upsample", call.backend).upsample_cross_entropy(call, UpsampleOut(sums, None, out))
    return sums[0].to(dtype), out


def _like_scores(call: UpsampleCall) -> Tensor:
    """Of the compute dtype."""
    return torch.empty_like(call.scores, dtype=compute_dtype(call.scores))


# upsample_cross_entropy. With `early` the gradient of the summed loss is made in the forward pass: it has the size of
# probabilities whatever the number of pixels, and meets 1/N together with the incoming gradient, so that gradients of
# half-precision scores are rounded once.


def _loss_out(call: UpsampleCall, reduction: str, early: bool) -> UpsampleOut:
    scores, shape = call.scores, call.labels.shape if reduction == "none" else ()
    sums, loss = scores.new_empty(2, dtype=torch.float64), scores.new_empty(shape, dtype=compute_dtype(scores))
    return UpsampleOut(sums, loss, _like_scores(call) if early else None)


def _launch_loss(call: UpsampleCall, out: UpsampleOut, reduction: str, early: bool) -> None:
    launch = kernels("upsample", call.backend).upsample_cross_entropy
    if reduction == "none":
        launch(call, out)
        return
    sums, loss, grad_scores = out
    assert sums is not None and loss is not None
    launch(call, UpsampleOut(sums, None, grad_scores))
    mean = reduction == "mean"
    if sums.is_cpu:
        total, weight = sums.tolist()
        if mean:
            total = total / weight if weight else total * math.inf
        # torch refuses to fill in a number that is too large
        loss.fill_(total if abs(total) <= torch.finfo(loss.dtype).max else total * math.inf)
    else:  # numbers would wait for the device
        loss.copy_(sums[0] / sums[1] if mean else sums[0])


_loss = Op("upsample", "upsample_cross_entropy", _loss_out, launch=_launch_loss)


def _launch_backward(call: UpsampleCall, out: Tensor) -> None:
    kernels("upsample", call.backend).upsample_cross_entropy(call, UpsampleOut(None, None, out))


_loss_backward = Op("upsample", "upsample_cross_entropy_backward", _like_scores, launch=_launch_backward)


def _save(ctx: Any, out: UpsampleOut, call: UpsampleCall, reduction: str, early: bool) -> None:
    ctx.early, ctx.dtype = early, call.scores.dtype
    sums = out.sums if reduction == "mean" else None
    if early:
        ctx.save_for_backward(sums, out.grad_scores)
    else:
        save_call(ctx, call, sums)


def _backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor]:
    if not ctx.early:
        call, (sums,) = saved_call(ctx)
        grad_loss = _of_the_sum(grad_loss, sums).expand(call.labels.shape)
        return (_loss_backward(call._replace(grad_loss=grad_loss)).to(ctx.dtype),)
    sums, grad_scores = ctx.saved_tensors
    if sums is None or not readable(sums) or batched(grad_loss):
        return (scale_saved(grad_scores, _of_the_sum(grad_loss, sums), ctx.dtype),)
    _, weight = sums.tolist()
    factor = grad_loss.item() / weight if weight else 0.0
    keep = torch._C._autograd._get_current_graph_task_keep_graph()  # another pass will read it
    grad = grad_scores * factor if keep else grad_scores.mul_(factor)
    return (grad if grad.dtype == ctx.dtype else grad.to(ctx.dtype),)


def _of_the_sum(grad_loss: Tensor, sums: Tensor | None) -> Tensor:
    """The gradient of the summed loss for that of the mean; without `sums` there is no mean. 0 where no pixel counts."""
    if sums is None:
        return grad_loss
    weight = sums[1]
    return grad_loss * torch.where(weight == 0, 0.0, 1 / weight).to(grad_loss.dtype)


def _formula(call: UpsampleCall, reduction: str, early: bool) -> Tensor:
    return reference.upsample_cross_entropy(call, reduction)


_loss.differentiable(("scores",), ("loss",), _save, _backward, _formula)


def upsample_cross_entropy(call: UpsampleCall, reduction: str) -> Tensor:
    """Cross-entropy of the upsampled scores. A scalar loss makes the gradient in its forward pass, where one is wanted."""
    if call.backend == "reference":
        return reference.upsample_cross_entropy(call, reduction)
    early = torch.is_grad_enabled() and call.scores.requires_grad and reduction != "none"
    loss = _loss(call, reduction, early).loss
    assert loss is not None
    return loss


def _argmax_out(call: ArgmaxCall, height: int, width: int) -> Tensor:
    return call.scores.new_empty((call.scores.shape[0], height, width), dtype=torch.int64)


upsample_argmax = Op("upsample", "upsample_argmax", _argmax_out, reference.upsample_argmax)
