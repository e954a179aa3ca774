"""Plain torch: bilinear upsampling with cross-entropy or argmax. Any float dtype, any device; the loss is differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._common import compute_dtype


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


def upsample_alike(scores: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """`upsample` rounded alike in every class, so that ties stay ties; F.interpolate on CPU breaks some of them."""
    wide = scores.to(compute_dtype(scores))
    for dim, target in zip((2, 3), size, strict=True):
        if wide.shape[dim] == target:
            continue
        low, high, share = _neighbours(wide.shape[dim], target, align_corners, wide)
        shape = (-1, 1) if dim == 2 else (-1,)
        share = share.view(shape)
        wide = wide.index_select(dim, low) * (1 - share) + wide.index_select(dim, high) * share
    return wide


def _neighbours(source: int, target: int, align_corners: bool, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For every one of `target` positions: the source positions below and above, and the share of the one above."""
    at = torch.arange(target, dtype=torch.float64, device=like.device)
    if align_corners:
        at = at * ((source - 1) / (target - 1) if target > 1 else 0.0)
    else:
        at = ((at + 0.5) * (source / target) - 0.5).clamp_min(0)
    low = at.floor().clamp_max(source - 1)
    return low.long(), (low.long() + 1).clamp_max(source - 1), (at - low).to(like.dtype)
