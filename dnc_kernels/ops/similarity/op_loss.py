"""The two cross-entropies over sub-centroids as torch ops, whatever kernel runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._common import (
    NAMESPACE,
    compute_dtype,
    flat_pixels,
    keep_dtypes_under_autocast,
    kernels,
    pixel_count,
    scale_saved,
)
from . import reference

# centroid_cross_entropy. `early` makes the gradients of the loss (for an incoming gradient of 1) in the forward pass.


def _run_loss(
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
    backend: str,
    *,
    grad_loss: Tensor | None = None,
    loss: Tensor | None = None,
    prediction: Tensor | None = None,
    own: Tensor | None = None,
    grads: tuple[Tensor | None, ...] = (None,) * 5,
) -> tuple[Tensor | None, ...]:
    """Call the kernel; return grads (of x, centroids, norm_weight, norm_bias, scale) with their dtypes as given."""
    dtype = compute_dtype(x, centroids)

    def small(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(dtype).contiguous()

    # gradients of small tensors are made in the compute type and cast afterwards; grad_x is written in x's own dtype
    wide = (grads[0], *(None if g is None else (g if g.dtype == dtype else g.to(dtype)) for g in grads[1:]))
    kernels("similarity", backend).centroid_cross_entropy(
        x, centroids, labels, small(norm_weight), small(norm_bias), small(scale), small(class_weight), metric, norm_eps,
        temperature, ignore_index, label_smoothing, reduction, small(grad_loss), loss, prediction, own, *wide,
    )  # fmt: skip
    return tuple(w if g is None or w is None or w.dtype == g.dtype else w.to(g.dtype) for w, g in zip(wide, grads, strict=True))


def _empty_grads(tensors: tuple[Tensor | None, ...], wanted: list[bool]) -> tuple[Tensor, ...]:
    x = tensors[0]
    assert x is not None
    out = []
    for t, want in zip(tensors, wanted, strict=True):
        if t is None or not want:
            out.append(x.new_empty(0))
        else:
            out.append(torch.empty_like(t) if t is x else torch.empty_like(t, memory_format=torch.contiguous_format))
    return tuple(out)


def _chosen(grads: tuple[Tensor, ...], wanted: list[bool]) -> tuple[Tensor | None, ...]:
    return tuple(g if want else None for g, want in zip(grads, wanted, strict=True))


@torch.library.custom_op(f"{NAMESPACE}::centroid_cross_entropy", mutates_args=())
def _loss_op(
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
    early: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, prediction, own similarities, and early gradients of x, norm_weight, norm_bias, scale ([0] where not wanted)."""
    loss, prediction, own, *empty = _loss_fake(
        x, centroids, labels, norm_weight, norm_bias, scale, class_weight, metric, norm_eps, temperature, ignore_index,
        label_smoothing, reduction, early, backend,
    )  # fmt: skip
    chosen = _chosen(tuple(empty), early)
    made = _run_loss(
        x, centroids, labels, norm_weight, norm_bias, scale, class_weight, metric, norm_eps, temperature, ignore_index,
        label_smoothing, reduction, backend, loss=loss, prediction=prediction, own=own, grads=(chosen[0], None, *chosen[1:]),
    )  # fmt: skip
    grads = [e if m is None else m for e, m in zip(empty, (made[0], *made[2:]), strict=True)]
    return loss, prediction, own, grads[0], grads[1], grads[2], grads[3]


@_loss_op.register_fake
def _loss_fake(
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
    early: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x, centroids)
    loss = x.new_empty(pixel_count(x) if reduction == "none" else (), dtype=dtype)
    prediction = x.new_empty(pixel_count(x), dtype=torch.int64)
    own = x.new_empty((pixel_count(x), centroids.shape[1]), dtype=dtype)
    grads = _empty_grads((x, norm_weight, norm_bias, scale), early)
    return loss, prediction, own, grads[0], grads[1], grads[2], grads[3]


@torch.library.custom_op(f"{NAMESPACE}::centroid_cross_entropy_backward", mutates_args=())
def _loss_backward_op(
    grad_loss: Tensor,
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
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, centroids, norm_weight, norm_bias, scale by recomputation ([0] where not wanted)."""
    empty = _empty_grads((x, centroids, norm_weight, norm_bias, scale), wanted)
    made = _run_loss(
        x, centroids, labels, norm_weight, norm_bias, scale, class_weight, metric, norm_eps, temperature, ignore_index,
        label_smoothing, reduction, backend, grad_loss=grad_loss, grads=_chosen(empty, wanted),
    )  # fmt: skip
    grads = [e if m is None else m for e, m in zip(empty, made, strict=True)]
    return grads[0], grads[1], grads[2], grads[3], grads[4]


@_loss_backward_op.register_fake
def _(
    grad_loss: Tensor,
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
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = _empty_grads((x, centroids, norm_weight, norm_bias, scale), wanted)
    return grads[0], grads[1], grads[2], grads[3], grads[4]


def _save_loss(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, early, ctx.backend = inputs
    ctx.tensors, ctx.options = 7, tuple(tensors[7:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.early = any(early)
    if ctx.early:
        ctx.save_for_backward(*output[3:])
    else:
        kept = tensors[1] if tensors[1].requires_grad else tensors[1].clone()
        ctx.save_for_backward(tensors[0], kept, *tensors[2:7])


def _loss_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    nothing = (None,) * (ctx.tensors + len(ctx.options) + 2)
    if grad_loss is None:
        return nothing
    if ctx.early:
        grads = [scale_saved(g, grad_loss) for g in ctx.saved_tensors]
        chosen = [g if need else None for g, need in zip(grads, (needs[0], needs[3], needs[4], needs[5]), strict=True)]
        return chosen[0], None, None, *chosen[1:], *nothing[6:]
    wanted = [needs[0], needs[1], needs[3], needs[4], needs[5]]
    made = _chosen(_loss_backward_op(grad_loss, *ctx.saved_tensors, *ctx.options, wanted, ctx.backend), wanted)
    return made[0], made[1], None, *made[2:], *nothing[6:]


_loss_op.register_autograd(_loss_backward, setup_context=_save_loss)


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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, prediction [N], own-class similarities [N,K]; gradients are made early where that is exact and cheaper."""
    once = torch.is_grad_enabled() and reduction != "none" and not centroids.requires_grad
    early = [bool(once and t is not None and t.requires_grad) for t in (x, norm_weight, norm_bias, scale)]
    # early gradients of a mean are made of the sum: 1/N would take them below what float16 holds
    made = "sum" if any(early) else reduction
    loss, prediction, own, *_ = _loss_op(
        x, centroids, labels, norm_weight, norm_bias, scale, class_weight, metric, norm_eps, temperature, ignore_index,
        label_smoothing, made, early, backend,
    )  # fmt: skip
    if made != reduction:
        loss = _mean(loss, labels, ignore_index, centroids.shape[0], class_weight)
    return loss, prediction, own


def _mean(total: Tensor, labels: Tensor, ignore_index: int, num_labels: int, class_weight: Tensor | None = None) -> Tensor:
    """`total` over the class weights of the pixels that count; NaN with zero gradients without any."""
    kept = (labels != ignore_index) & (labels >= 0) & (labels < num_labels)
    if class_weight is None:
        weight = kept.sum().to(total.dtype)
    else:
        weight = torch.where(kept, class_weight.to(total.dtype)[torch.where(kept, labels, 0)], 0).sum()
    return torch.where(weight > 0, total / torch.where(weight > 0, weight, 1), torch.nan)


# subcentroid_cross_entropy. The gradient of a pixel is its incoming gradient times a row that does not depend on it, so the row
# is made in the forward pass for every reduction.


@torch.library.custom_op(f"{NAMESPACE}::subcentroid_cross_entropy", mutates_args=())
def _contrast_op(
    x: Tensor, centroids: Tensor, target: Tensor, temperature: float, ignore_index: int, early: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Losses [N] and the gradient of their sum with respect to x ([0] where not wanted)."""
    loss, grad_x = _contrast_fake(x, centroids, target, temperature, ignore_index, early, backend)
    kernels("similarity", backend).subcentroid_cross_entropy(
        x, centroids, target, temperature, ignore_index, None, loss, grad_x if early else None, None, None, None, None
    )
    return loss, grad_x


@_contrast_op.register_fake
def _contrast_fake(
    x: Tensor, centroids: Tensor, target: Tensor, temperature: float, ignore_index: int, early: bool, backend: str
) -> tuple[Tensor, Tensor]:
    loss = x.new_empty(pixel_count(x), dtype=compute_dtype(x, centroids))
    return loss, torch.empty_like(x) if early else x.new_empty(0)


def _save_contrast(ctx: Any, inputs: Any, output: Any) -> None:
    x, centroids, target, ctx.temperature, ctx.ignore_index, *_ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *((x, centroids, target) if centroids.requires_grad else ()))


def _contrast_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    grad_x, *kept = ctx.saved_tensors
    per_pixel = None
    if ctx.needs_input_grad[0]:
        per_pixel = scale_saved(grad_x, grad[:, None] if grad_x.ndim == 2 else grad.view(grad_x.shape[0], 1, *grad_x.shape[2:]))
    grad_centroids = None
    if kept:
        grad_centroids = _contrast_centroid_gradient(grad, *kept, ctx.temperature, ctx.ignore_index)
    return per_pixel, grad_centroids, *(None,) * 5


_contrast_op.register_autograd(_contrast_backward, setup_context=_save_contrast)


@torch.library.custom_op(f"{NAMESPACE}::subcentroid_cross_entropy_backward", mutates_args=())
def _contrast_centroid_gradient(
    grad: Tensor, x: Tensor, centroids: Tensor, target: Tensor, temperature: float, ignore_index: int
) -> Tensor:
    """[C,K,D]: sum over pixels of grad * (softmax - onehot) x / temperature, 4096 pixels at a time. DNC needs none of it."""
    pixels, dtype = flat_pixels(x), compute_dtype(x, centroids)
    rows = centroids.to(dtype).flatten(0, 1)
    total = torch.zeros_like(rows)
    for some, g, t in zip(pixels.split(4096), grad.to(dtype).split(4096), target.split(4096), strict=True):
        # what is ignored becomes zero rows: leaving rows out would wait for a GPU to count them
        counted = ((t != ignore_index) & (t >= 0) & (t < len(rows)))[:, None]
        wide, t = torch.where(counted, some, 0).to(dtype), torch.where(counted, t[:, None], 0)
        p = (wide @ rows.T / temperature).softmax(1)
        p.scatter_add_(1, t, -torch.ones_like(p[:, :1]))
        total.addmm_(p.mul_(torch.where(counted, g[:, None] / temperature, 0)).T, wide)
    return total.view(centroids.shape).to(centroids.dtype)


@_contrast_centroid_gradient.register_fake
def _(grad: Tensor, x: Tensor, centroids: Tensor, target: Tensor, temperature: float, ignore_index: int) -> Tensor:
    return torch.empty_like(centroids, memory_format=torch.contiguous_format)


def subcentroid_cross_entropy(
    x: Tensor, centroids: Tensor, target: Tensor, temperature: float, ignore_index: int, reduction: str, backend: str
) -> Tensor:
    """Cross-entropy over all C*K similarities; scalar, or [N] for ``none``."""
    early = torch.is_grad_enabled() and x.requires_grad
    loss, _ = _contrast_op(x, centroids, target, temperature, ignore_index, early, backend)
    if reduction == "none":
        return loss
    return (
        loss.sum() if reduction == "sum" else _mean(loss.sum(), target, ignore_index, centroids.shape[0] * centroids.shape[1])
    )


def scores_and_contrast_into(
    x: Tensor,
    centroids: Tensor,
    labels: Tensor,
    temperature: float,
    scale: Tensor,
    scores: Tensor,
    winner: Tensor,
    own: Tensor,
    lse: Tensor,
    gradient: Tensor | None,
    backend: str,
) -> None:
    """Class scores and contrast from one product, into given tensors; no autograd.

    Args:
        x: as of `class_scores`.
        centroids: as there.
        labels: [N] int64, negative: none.
        temperature: of the contrast.
        scale: [] in the compute type.
        scores: [N,C] or [B,C,H,W], of any strides.
        winner: the same in uint8.
        own: [N,K], contiguous.
        lse: [N], log-sum-exp over all similarities / temperature; 0 for pixels without a label, as `gradient` is.
        gradient: like x: `scale` times the gradient of `lse` with respect to x; None: not made.
        backend: what runs.
    """
    if backend == "reference":
        reference.scores_and_contrast_into(x, centroids, labels, temperature, scale, scores, winner, own, lse, gradient)
        return
    kernels("similarity", backend).subcentroid_cross_entropy(
        x, centroids, None, temperature, -1, scale, lse, gradient, labels, scores, winner, own
    )


for _op in (_loss_op, _loss_backward_op, _contrast_op, _contrast_centroid_gradient):
    keep_dtypes_under_autocast(_op)
