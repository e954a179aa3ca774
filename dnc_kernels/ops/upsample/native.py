"""Launchers of the C++ upsample kernels (csrc/cpu/upsample.cpp, upsample_loss.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native
from .._common import view
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
    """Into those given: sums [2] float64 (loss, class weight); loss [B,H,W]; grad_scores, for grad_loss [B,H,W] (None: 1)."""
    native().upsample_cross_entropy(
        view(scores), view(labels), window or (0, 0, 0, 0), align_corners, view(class_weight), ignore_index, label_smoothing,
        view(grad_loss), view(sums), view(loss), view(grad_scores), torch.get_num_threads(),
    )  # fmt: skip


def argmax(scores: Tensor, align_corners: bool, label: Tensor) -> None:
    """Class of the highest upsampled score into label [B,H,W] int64."""
    native().upsample_argmax(view(scores), align_corners, view(label), torch.get_num_threads())
