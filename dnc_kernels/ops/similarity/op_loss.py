"""The two cross-entropies over sub-centroids as torch ops, whatever kernel runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._tensors import compute_dtype, flat_pixels, pixel_count
from .._common import batched, readable, scale_saved, weight_of_counted
from .._op import Op, needed, save_call, saved_call
from . import reference
from .calls import LEARNT, ContrastCall, ContrastOut, LossCall, LossOut
from .op import product, with_centroids_kept

# centroid_cross_entropy. `wanted`: the gradients, in the order of LEARNT, that are made in the forward pass for an incoming
# gradient of 1.


def _gradients(call: LossCall, wanted: list[bool]) -> list[Tensor | None]:
    tensors = (call.x, call.centroids, call.norm_weight, call.norm_bias, call.scale)
    grads = [torch.empty_like(t) if want and t is not None else None for t, want in zip(tensors, wanted, strict=True)]
    if wanted[1]:
        grads[1] = call.centroids.new_empty(call.centroids.shape, dtype=compute_dtype(call.x, call.centroids))
    return grads


def _loss_out(call: LossCall, wanted: list[bool]) -> LossOut:
    x, n, dtype = call.x, pixel_count(call.x), compute_dtype(call.x, call.centroids)
    loss = x.new_empty(n if call.reduction == "none" else (), dtype=dtype)
    own = x.new_empty((n, call.centroids.shape[1]), dtype=dtype)
    return LossOut(loss, x.new_empty(n, dtype=torch.int64), own, *_gradients(call, wanted))


def _loss_backward_out(call: LossCall, wanted: list[bool]) -> LossOut:
    return LossOut(None, None, None, *_gradients(call, wanted))


def _loss_flops(call: LossCall, wanted: list[bool]) -> int:
    # a class sends its gradient to its winner alone
    return product(call) + sum(wanted[:2]) * product(call, k=1)


_loss = Op("similarity", "centroid_cross_entropy", _loss_out, reference.centroid_cross_entropy, flops=_loss_flops)
_loss_backward = Op(
    "similarity",
    "centroid_cross_entropy_backward",
    _loss_backward_out,
    launch=lambda call, out, _: _loss.launch(call, out),
    flops=_loss_flops,
)


def _save_loss(ctx: Any, out: LossOut, call: LossCall, wanted: list[bool]) -> None:
    ctx.early = any(wanted)
    if ctx.early:
        ctx.save_for_backward(*out[3:])
    else:
        save_call(ctx, with_centroids_kept(call))


def _differentiate_loss(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.early:
        return tuple([None if g is None else scale_saved(g, grad_loss) for g in ctx.saved_tensors])
    call, _ = saved_call(ctx)
    grad_loss = grad_loss.to(compute_dtype(call.x, call.centroids)).contiguous()
    made = _loss_backward(call._replace(grad_loss=grad_loss), needed(ctx))
    to_centroids = None if made.grad_centroids is None else made.grad_centroids.to(call.centroids.dtype)
    return made.grad_x, to_centroids, *made[5:]


_loss.differentiable(LEARNT, ("loss",), _save_loss, _differentiate_loss)


def centroid_cross_entropy(call: LossCall) -> LossOut:
    """Loss, prediction [N], own-class similarities [N,K]; gradients are made early where that is exact and cheaper."""
    wanted, mean = [False] * len(LEARNT), call.reduction == "mean"
    if torch.is_grad_enabled() and call.reduction != "none" and not call.centroids.requires_grad:
        learnt = (call.x, None, call.norm_weight, call.norm_bias, call.scale)
        wanted = [t is not None and t.requires_grad for t in learnt]
    # Early gradients of a mean are made of the sum on a GPU, which does not know how many pixels count before the last one has
    # been read; and for float16, since 1/N would take them below what it holds.
    summed = mean and any(wanted) and (call.backend in ("triton", "cuda") or call.x.dtype == torch.float16)
    out = _loss(call._replace(reduction="sum") if summed else call, wanted)
    if not summed:
        return out
    assert out.loss is not None
    loss = _mean(out.loss, call.labels, call.ignore_index, call.centroids.shape[0], call.backend, call.class_weight)
    return out._replace(loss=loss)


def _mean(
    total: Tensor, labels: Tensor, ignore_index: int, num_labels: int, backend: str, class_weight: Tensor | None = None
) -> Tensor:
    """`total` over the class weights of the pixels that count; NaN with zero gradients without any."""
    if class_weight is None and readable(total):
        kept = labels >= 0
        if backend != "cpu":  # which has refused the others
            kept &= labels < num_labels
        if ignore_index >= 0:
            kept &= labels != ignore_index
        count = int(kept.sum())
        return total / count if count else 0 * total + torch.nan
    weight = weight_of_counted(labels, ignore_index, num_labels, class_weight, total.dtype)
    return torch.where(weight > 0, total / torch.where(weight > 0, weight, 1), torch.nan)


# subcentroid_cross_entropy. The gradient of a pixel is its incoming gradient times a row that does not depend on it, so the row
# is made in the forward pass for every reduction.


def _contrast_out(call: ContrastCall, early: bool) -> ContrastOut:
    x = call.x
    loss = x.new_empty(pixel_count(x), dtype=compute_dtype(x, call.centroids))
    return ContrastOut(loss, torch.empty_like(x) if early else None)


_contrast = Op("similarity", "subcentroid_cross_entropy", _contrast_out, flops=lambda call, early: (1 + early) * product(call))


def _save_contrast(ctx: Any, out: ContrastOut, call: ContrastCall, early: bool) -> None:
    if call.centroids.requires_grad:
        save_call(ctx, call, out.grad_x)
    else:
        ctx.call = None
        ctx.save_for_backward(out.grad_x)


def _differentiate_contrast(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    call, (grad_x,) = (None, ctx.saved_tensors) if ctx.call is None else saved_call(ctx)
    per_pixel = None
    if grad_x is not None:
        per_pixel = scale_saved(grad_x, grad[:, None] if grad_x.ndim == 2 else grad.view(grad_x.shape[0], 1, *grad_x.shape[2:]))
    if call is None or not needed(ctx)[1]:
        return per_pixel, None
    # of a batch of gradients the dispatcher takes one after the other
    return per_pixel, _contrast_backward.overload(*call, grad) if batched(grad) else _contrast_backward(call, grad)


def _contrast_formula(call: ContrastCall, early: bool) -> Tensor:
    return reference.subcentroid_cross_entropy(call, "none")


_contrast.differentiable(("x", "centroids"), ("loss",), _save_contrast, _differentiate_contrast, _contrast_formula)


def _contrast_backward_out(call: ContrastCall, grad: Tensor) -> Tensor:
    return torch.empty_like(call.centroids, memory_format=torch.contiguous_format)


def _launch_contrast_backward(call: ContrastCall, out: Tensor, grad: Tensor) -> None:
    """[C,K,D]: sum over pixels of grad * (softmax - onehot) x / temperature, 4096 pixels at a time. DNC needs none of it."""
    pixels, dtype = flat_pixels(call.x), compute_dtype(call.x, call.centroids)
    rows = call.centroids.to(dtype).flatten(0, 1)
    total = torch.zeros_like(rows)
    for some, g, t in zip(pixels.split(4096), grad.to(dtype).split(4096), call.target.split(4096), strict=True):
        # what is ignored becomes zero rows: leaving rows out would wait for a GPU to count them
        counted = ((t != call.ignore_index) & (t >= 0) & (t < len(rows)))[:, None]
        wide, t = torch.where(counted, some, 0).to(dtype), torch.where(counted, t[:, None], 0)
        p = (wide @ rows.T / call.temperature).softmax(1)
        p.scatter_add_(1, t, -torch.ones_like(p[:, :1]))
        total.addmm_(p.mul_(torch.where(counted, g[:, None] / call.temperature, 0)).T, wide)
    out.copy_(total.view(out.shape))


_contrast_backward = Op(
    "similarity",
    "subcentroid_cross_entropy_backward",
    _contrast_backward_out,
    launch=_launch_contrast_backward,
    flops=lambda call, _: 2 * product(call),
)


def subcentroid_cross_entropy(call: ContrastCall, reduction: str) -> Tensor:
    """Cross-entropy over all C*K similarities; scalar, or [N] for ``none``."""
    if call.backend == "reference":
        return reference.subcentroid_cross_entropy(call, reduction)
    loss = _contrast(call, torch.is_grad_enabled() and call.x.requires_grad).loss
    if reduction == "none":
        return loss
    total, labels = loss.sum(), call.centroids.shape[0] * call.centroids.shape[1]
    return total if reduction == "sum" else _mean(total, call.target, call.ignore_index, labels, call.backend)
