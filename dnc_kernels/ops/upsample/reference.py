"""Plain torch: bilinear upsampling with cross-entropy or argmax. Any float dtype, any device; the loss is differentiable."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._tensors import compute_dtype
from .._common import check_label_range
from .calls import ArgmaxCall, UpsampleCall

#: The four row numbers of `UpsampleCall`.
Window = tuple[int, int, int, int]


def upsample(scores: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """[B,C,H,W] in the compute dtype; scores that have this size already pass through bit for bit."""
    wide = scores.to(compute_dtype(scores))
    if tuple(scores.shape[2:]) == size:
        return wide  # interpolating would multiply a neighbour by 0: NaN where that is Inf
    return F.interpolate(wide, size=size, mode="bilinear", align_corners=align_corners)


def upsample_cross_entropy(call: UpsampleCall, reduction: str) -> Tensor:
    """Cross-entropy of the upsampled scores; a label outside [0,C) is left out where no check sees it."""
    scores, labels, ignore_index = call.scores, call.labels.to(torch.int64), call.ignore_index
    check_label_range("upsample_cross_entropy", labels, scores.shape[1], ignore_index)
    counts = (labels >= 0) & (labels < scores.shape[1])
    labels = torch.where(counts, labels, ignore_index)
    logits = upsample(scores, (labels.shape[1], labels.shape[2]), call.align_corners)
    logits = torch.where(counts[:, None], logits, 0)  # torch gives an ignored NaN a NaN gradient
    return F.cross_entropy(
        logits, labels, call.class_weight, ignore_index=ignore_index, label_smoothing=call.label_smoothing, reduction=reduction
    )


def upsample_argmax(call: ArgmaxCall, height: int, width: int) -> Tensor:
    """[B,H,W] int64: class of the highest upsampled score. One sample at a time, so that one [C,H,W] exists, not B."""
    scores, align_corners, _ = call
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # the loop would fix B; the compiler fuses instead
        return upsample_alike(scores, (height, width), align_corners).argmax(1)
    return torch.cat([upsample_alike(sample, (height, width), align_corners).argmax(1) for sample in scores.split(1)])


def upsample_alike(scores: Tensor, size: tuple[int, int], align_corners: bool, window: Window | None = None) -> Tensor:
    """`upsample` rounded alike in every class, so that ties stay ties; F.interpolate on CPU breaks some of them."""
    wide = scores.to(compute_dtype(scores))
    for dim, low, high, share in _steps((scores.shape[2], scores.shape[3]), size, align_corners, window, wide):
        wide = wide.index_select(dim, low) * (1 - share) + wide.index_select(dim, high) * share
    return wide


def _upsample_alike_adjoint(grad: Tensor, size: tuple[int, int], align_corners: bool, window: Window | None) -> Tensor:
    """Gradient of scores of `size` from that of `upsample_alike`, without autograd."""
    for dim, low, high, share in reversed(_steps(size, (grad.shape[2], grad.shape[3]), align_corners, window, grad)):
        shape = list(grad.shape)
        shape[dim] = size[dim - 2]
        to_source = grad.new_zeros(shape).index_add_(dim, low, grad * (1 - share))
        grad = to_source.index_add_(dim, high, grad * share)
    return grad


def _steps(
    size: tuple[int, int], target: tuple[int, int], align_corners: bool, window: Window | None, like: Tensor
) -> list[tuple[int, Tensor, Tensor, Tensor]]:
    """Of every dimension that is interpolated: itself, both neighbours of each target position, the share of the upper one."""
    steps = []
    for dim in (2, 3):
        rows, source0, all_targets, first = size[dim - 2], 0, target[dim - 2], 0
        if dim == 2 and window is not None:
            rows, source0, all_targets, first = window
        if rows == all_targets and target[dim - 2] == size[dim - 2]:
            continue
        at = torch.arange(first, first + target[dim - 2], device=like.device)
        low, high, share = _neighbours(at, rows, all_targets, align_corners)
        steps.append((dim, low - source0, high - source0, share.to(like.dtype).view((-1, 1) if dim == 2 else (-1,))))
    return steps


def cross_entropy_with_gradient(call: UpsampleCall, grad: bool, out: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What `op.cross_entropy_with_gradient` says."""
    scores, labels, class_weight, label_smoothing = call.scores, call.labels, call.class_weight, call.label_smoothing
    window = (call.source_rows, call.source_row0, call.target_rows, call.target_row0) if call.source_rows else None
    logits = upsample_alike(scores.detach(), (labels.shape[1], labels.shape[2]), call.align_corners, window)
    weight = logits.new_ones(logits.shape[1]) if class_weight is None else class_weight.to(logits.dtype)
    kept = ((labels >= 0) & (labels < scores.shape[1]))[:, None]  # ignore_index is no class
    target = torch.where(kept, labels[:, None].long(), 0)
    log_p = logits.log_softmax(1)
    smooth, own = label_smoothing / logits.shape[1] * weight, (1 - label_smoothing) * weight[target]
    each = -own * log_p.gather(1, target) - (log_p * smooth.view(-1, 1, 1)).sum(1, keepdim=True)
    loss = torch.where(kept, each, 0).sum()
    if not grad:
        return loss, None
    to_logits = log_p.exp_() * (own + smooth.sum()) - smooth.view(-1, 1, 1)
    to_logits = torch.where(kept, to_logits.scatter_add_(1, target, -own), 0)
    to_scores = _upsample_alike_adjoint(to_logits, (scores.shape[2], scores.shape[3]), call.align_corners, window)
    return loss, to_scores if out is None else out.copy_(to_scores)


@lru_cache(maxsize=64)
def target_rows_of(source_rows: int, target_rows: int, align_corners: bool) -> tuple[int, ...]:
    """For every target row its lower source row, exactly as the kernels find it.

    Target rows whose lower source row is in [r0,r1) need the source rows r0 to min(r1, source_rows - 1), and no others.
    """
    low, _, _ = _neighbours(torch.arange(target_rows), source_rows, target_rows, align_corners)
    return tuple(low.tolist())


def _neighbours(at: Tensor, source: int, target: int, align_corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    """For positions `at` (int64) of `target`: source positions below and above, and the share of the one above in float64.

    Positions are ratios of integers, so that no rounding moves one to another cell.
    """
    if align_corners:
        numerator, denominator = at * (source - 1), max(target - 1, 1)
    else:
        numerator, denominator = ((2 * at + 1) * source - target).clamp_min(0), 2 * target
    # exact below 2^53; the compiler of torch 2.13 fails on indices that are quotients of integers
    low = (numerator.double() / denominator).to(torch.int64)
    return low, (low + 1).clamp_max(source - 1), (numerator - low * denominator).double() / denominator
