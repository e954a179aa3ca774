"""Launchers of the CUDA C++ upsample kernels (csrc/cuda/upsample*.cu); the functions are those of native.py."""

from __future__ import annotations

from torch import Tensor

from .._cuda import launch
from .reference import Window


def cross_entropy(
    scores: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    align_corners: bool,
    ignore_index: int,
    label_smoothing: float,
    window: Window | None,
    grad_loss: Tensor | None,
    sums: Tensor | None,
    loss: Tensor | None,
    grad_scores: Tensor | None,
) -> None:
    """Into those given: sums [2] float64 (loss, class weight); loss [B,H,W]; grad_scores, for grad_loss [B,H,W] (None: 1).

    A label outside [0,C) is ignored: a check would wait for the device.
    """
    launch(
        "upsample_cross_entropy", scores, scores, labels, window or (0, 0, 0, 0), align_corners, class_weight, ignore_index,
        label_smoothing, grad_loss, sums, loss, grad_scores,
    )  # fmt: skip


def argmax(scores: Tensor, align_corners: bool, label: Tensor) -> None:
    """Class of the highest upsampled score into label [B,H,W] int64."""
    launch("upsample_argmax", scores, scores, align_corners, label)
