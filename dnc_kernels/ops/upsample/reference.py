"""Plain torch: bilinear upsampling with cross-entropy or argmax. Any float dtype, any device; the loss is differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._common import compute_dtype

#: Rows of larger maps: (source_rows, source_row0, target_rows, target_row0). The scores at hand are rows source_row0.. of a map
#: of source_rows, the labels rows target_row0.. of one of target_rows. Every row a label is interpolated from must be at hand.
Window = tuple[int, int, int, int]


def upsample(scores: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """[B,C,H,W] in the compute dtype; scores that have this size already pass through bit for bit."""
    wide = scores.to(compute_dtype(scores))
    if tuple(scores.shape[2:]) == size:
        return wide  # interpolating would multiply a neighbour by 0: NaN where that is Inf
    return F.interpolate(wide, size=size, mode="bilinear", align_corners=align_corners)


def upsample_cross_entropy(
    scores: Tensor,
    labels: Tensor,
    align_corners: bool,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """Cross-entropy of the upsampled scores and labels [B,H,W] int64. On a GPU a label outside [0,C) is ignored."""
    if labels.device.type != "cpu":  # torch would end the process' use of the device with an assertion
        labels = torch.where((labels >= 0) & (labels < scores.shape[1]), labels, ignore_index)
    logits = upsample(scores, (labels.shape[1], labels.shape[2]), align_corners)
    return F.cross_entropy(
        logits, labels, class_weight, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
    )


def upsample_argmax(scores: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """[B,H,W] int64: class of the highest upsampled score. One sample at a time, so that one [C,H,W] exists, not B."""
    if torch.compiler.is_compiling():  # the loop would fix B; the compiler fuses instead
        return upsample_alike(scores, size, align_corners).argmax(1)
    return torch.cat([upsample_alike(sample, size, align_corners).argmax(1) for sample in scores.split(1)])


def upsample_alike(scores: Tensor, size: tuple[int, int], align_corners: bool, window: Window | None = None) -> Tensor:
    """`upsample` rounded alike in every class, so that ties stay ties; F.interpolate on CPU breaks some of them."""
    wide = scores.to(compute_dtype(scores))
    for dim, target in zip((2, 3), size, strict=True):
        if dim == 2 and window is not None:
            rows, source0, all_targets, first = window
        else:
            rows, source0, all_targets, first = wide.shape[dim], 0, target, 0
        if rows == all_targets and target == wide.shape[dim]:
            continue
        at = torch.arange(first, first + target, device=wide.device)
        low, high, share = _neighbours(at, rows, all_targets, align_corners)
        share = share.to(wide.dtype).view((-1, 1) if dim == 2 else (-1,))
        wide = wide.index_select(dim, low - source0) * (1 - share) + wide.index_select(dim, high - source0) * share
    return wide


def cross_entropy_with_gradient(
    scores: Tensor,
    labels: Tensor,
    *,
    align_corners: bool,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    window: Window | None = None,
    grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Summed loss [] and its gradient like `scores`, both of the compute dtype and new; not differentiable.

    `window`: `scores` and `labels` are rows of larger maps (`Window`).
    """
    leaf = scores.detach().to(compute_dtype(scores)).requires_grad_(grad)
    with torch.enable_grad():
        logits = upsample_alike(leaf, (labels.shape[1], labels.shape[2]), align_corners, window)
        weight = None if class_weight is None else class_weight.to(logits.dtype)
        loss = F.cross_entropy(
            logits, labels.long(), weight, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum"
        )
    return loss.detach(), torch.autograd.grad(loss, leaf)[0] if grad else None


def target_rows_of(source_rows: int, target_rows: int, align_corners: bool) -> list[int]:
    """For every target row its lower source row, exactly as the kernels find it.

    Target rows whose lower source row is in [r0,r1) need the source rows r0 to min(r1, source_rows - 1), and no others.
    """
    low, _, _ = _neighbours(torch.arange(target_rows), source_rows, target_rows, align_corners)
    return low.tolist()


def _neighbours(at: Tensor, source: int, target: int, align_corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    """For positions `at` (int64) of `target`: source positions below and above, and the share of the one above in float64.

    Positions are ratios of integers, so that no rounding moves one to another cell.
    """
    if align_corners:
        numerator, denominator = at * (source - 1), max(target - 1, 1)
    else:
        numerator, denominator = ((2 * at + 1) * source - target).clamp_min(0), 2 * target
    low = numerator // denominator
    return low, (low + 1).clamp_max(source - 1), (numerator - low * denominator).double() / denominator
