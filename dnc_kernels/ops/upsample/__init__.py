"""Cross-entropy and argmax of bilinearly upsampled scores (family page: docs/upsample.md)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..._tensors import as_int64, check_ignore_index, compute_dtype
from ...backends import Backend, pick
from ...errors import (
    check_choice,
    check_device,
    check_flag,
    check_float,
    check_integer,
    check_number,
    check_value,
    label_fix,
    map_size,
    renamed,
)
from .._common import REDUCTIONS, Reduction, check_no_gradient, contiguous_in, remembered
from . import op as ops
from .calls import LABEL_DTYPES, ArgmaxCall, UpsampleCall


@renamed(class_weight="weight")
def upsample_cross_entropy(
    scores: Tensor,
    labels: Tensor,
    *,
    align_corners: bool = False,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
) -> Tensor:
    """Cross-entropy of scores that are bilinearly upsampled to the size of the labels.

    Equals ``F.cross_entropy(F.interpolate(scores, labels.shape[1:], mode="bilinear", align_corners=...), labels, ...)``,
    upsampled and summed in float32 (float64 for float64 `scores`). Sizes may also shrink; scores that have the labels' size are
    used as they are.

    Args:
        scores: logits [B,C,h,w], any strides; float32, float64, float16 or bfloat16.
        labels: [B,H,W], any strides, any integer dtype, in [0,C); `ignore_index` or any negative id leaves a pixel out. The
            kernel reads int64, int32 and uint8 in place.
        align_corners: whether corner pixels (True) or corners of corner pixels (False) of both grids coincide.
        weight: [C] weights of the classes; None: 1. It also weights the mean, as in torch, and as there may not require grad.
        ignore_index: outside [0,C).
        label_smoothing: share of the target that is spread over all classes, in [0,1].
        reduction: ``mean`` (over the class weights of the pixels that count), ``sum`` or ``none``.
        backend: what runs (docs/backends.md); None: the choice in force, by default ``auto``.

    Returns:
        A scalar, or [B,H,W] for ``none``; float64 for float64 `scores`, else float32. Differentiable in `scores`: a scalar
        once, ``none`` and the reference any number of times. A pixel that is left out has loss and gradient exactly 0. The mean
        over no pixel is NaN, as in torch, and its gradient is exactly 0. The kernel is deterministic, bit-equal for any number
        of threads, and never holds [B,C,H,W]: a scalar loss makes its gradient in the forward pass and keeps that, one more
        [B,C,h,w]; ``none`` keeps `scores` and recomputes. The reference keeps [B,C,H,W].

    Raises:
        ValueError, TypeError: wrong shape, device, dtype or option; on CPU also a label at or beyond C that is not
            `ignore_index` (on a GPU, and by the reference under torch.compile, it is left out).
    """
    _check_loss(scores, labels, align_corners, weight, ignore_index, label_smoothing, reduction)
    if weight is not None:
        check_no_gradient("upsample_cross_entropy", "weight", weight)
        weight = contiguous_in(compute_dtype(scores), weight.detach())
    call = UpsampleCall(
        scores=scores,
        labels=labels if labels.dtype in LABEL_DTYPES else as_int64(labels),
        source_rows=0,
        source_row0=0,
        target_rows=0,
        target_row0=0,
        align_corners=bool(align_corners),
        class_weight=weight,
        ignore_index=int(ignore_index),
        label_smoothing=float(label_smoothing),
        grad_loss=None,
        backend=pick("upsample_cross_entropy", scores, backend, N=labels.numel(), C=scores.shape[1]),
    )
    return ops.upsample_cross_entropy(call, reduction)


def upsample_argmax(
    scores: Tensor, size: int | Sequence[int], *, align_corners: bool = False, backend: Backend | None = None
) -> Tensor:
    """Class of the highest score at every pixel of the bilinearly upsampled scores.

    Args:
        scores: [B,C,h,w], any strides; float32, float64, float16 or bfloat16.
        size: (H, W), or one number for both; Python or numpy integers.
        align_corners: whether corner pixels (True) or corners of corner pixels (False) of both grids coincide.
        backend: what runs (docs/backends.md); None: the choice in force, by default ``auto``.

    Returns:
        [B,H,W] int64, the lowest class where upsampled scores tie; as in torch, NaN counts as the highest. Not differentiable.
        The kernel never holds [C,H,W]; the reference holds one at a time outside torch.compile.

    Raises:
        ValueError, TypeError: wrong shape, dtype or size.
    """
    op = "upsample_argmax"
    _check_scores(op, scores, align_corners)
    height, width = map_size(op, size)
    chosen = pick(op, scores, backend, N=scores.shape[0] * height * width, C=scores.shape[1])
    return ops.upsample_argmax(ArgmaxCall(scores.detach(), bool(align_corners), chosen), height, width)


@remembered
def _check_scores(op: str, scores: Tensor, align_corners: bool) -> None:
    check_float(op, "scores", scores)
    check_flag(op, "align_corners", align_corners)
    check_value(scores.ndim == 4, op, "scores", "[B,C,h,w]", scores)
    check_value(
        scores.shape[1] > 0 and scores.shape[2] > 0 and scores.shape[3] > 0,
        op, "scores", "of at least one class, row and column", scores,
    )  # fmt: skip


@remembered
def _check_loss(
    scores: Tensor,
    labels: Tensor,
    align_corners: bool,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> None:
    op = "upsample_cross_entropy"
    _check_scores(op, scores, align_corners)
    check_integer(op, "labels", labels)
    if labels.ndim != 3 or labels.shape[0] != scores.shape[0]:
        check_value(False, op, "labels", f"[B,H,W] with B={scores.shape[0]} to match scores", labels, label_fix(labels, scores))
    check_value(labels.shape[1] > 0 and labels.shape[2] > 0, op, "labels", "of at least one row and column", labels)
    check_device(op, "labels", labels, scores, "scores")
    classes = scores.shape[1]
    check_ignore_index(op, ignore_index, classes)
    check_choice(op, "reduction", reduction, REDUCTIONS)
    check_number(op, "label_smoothing", label_smoothing, "in [0,1]", lambda v: 0 <= v <= 1)
    if weight is not None:
        check_float(op, "weight", weight)
        if weight.ndim != 1 or weight.shape[0] != classes:
            check_value(False, op, "weight", f"[C]=[{classes}] to match scores", weight)
        check_device(op, "weight", weight, scores, "scores")


__all__ = ["upsample_argmax", "upsample_cross_entropy"]
