"""Triton launchers of the upsampled cross-entropy and argmax; kernels, floors and plans: triton_loss.py, triton_argmax.py.

Launches: the loss 1, its sums 1 more, its gradient 1 more; argmax 1.
Workspace: lse [B,H,W] fp32 and the carry of the gradient, about 1/ROWS of [B,C,h,w] fp32; 16 bytes a program of the loss.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .._triton import configuration, launch
from .reference import Window
from .triton_argmax import argmax_kernel
from .triton_cells import Axis, axis_of
from .triton_loss import add_sums_kernel, cross_entropy_backward_kernel, cross_entropy_kernel


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
    axes = axes_of(scores, (labels.shape[1], labels.shape[2]), align_corners, window)
    options = (ignore_index, label_smoothing)
    if grad_scores is not None and scores.shape[1] == 1:  # one class has probability 1, whatever rounding says
        grad_scores.zero_()
        grad_scores = None
    lse = None if grad_scores is None else torch.empty(labels.shape, dtype=torch.float32, device=scores.device)
    if lse is not None or sums is not None or loss is not None:
        forward(scores, labels, class_weight, *options, axes, sums, loss, lse)
    if grad_scores is not None and lse is not None:
        backward(scores, labels, class_weight, *options, axes, grad_loss, lse, grad_scores)


def forward(
    scores: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    axes: tuple[Axis, Axis],
    sums: Tensor | None,
    loss: Tensor | None,
    lse: Tensor | None,
) -> None:
    """Sums, loss and base-2 log-sum-exp [B,H,W], those given."""
    rows, columns = axes
    batch, classes = scores.shape[:2]
    cell, options = _cells("cross_entropy", scores, axes)
    lanes = batch * columns.cells * cell["PARTS_X"]
    blocks = triton.cdiv(lanes, options["BLOCK"])
    programs = blocks * rows.cells * cell["PARTS_Y"]
    partial = None if sums is None else sums.new_empty((programs, 2))
    launch(
        cross_entropy_kernel, (programs,),
        scores, labels, class_weight, loss, lse, partial, scores.stride(), labels.stride(),
        labels.stride() if loss is None else loss.stride(), rows, columns, classes, ignore_index, label_smoothing, lanes, blocks,
        SMOOTH=label_smoothing > 0, **cell, **options,
    )  # fmt: skip
    if sums is not None:
        launch(add_sums_kernel, (1,), partial, sums, programs, BLOCK=1024, num_warps=8)


def backward(
    scores: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    axes: tuple[Axis, Axis],
    grad_loss: Tensor | None,
    lse: Tensor,
    grad_scores: Tensor,
) -> None:
    """Gradient of the scores from the log-sum-exp that `forward` left."""
    rows, columns = axes
    batch, classes = scores.shape[:2]
    cell, options = _cells("cross_entropy_backward", scores, axes)
    lanes = batch * (columns.sources + 1)
    blocks = triton.cdiv(lanes, options["BLOCK"] - 1)
    strips = triton.cdiv(rows.sources, options["ROWS"])
    programs = blocks * strips * triton.cdiv(classes, options["CLASSES"])
    planes = 1 if cell["PARTS_X"] * cell["PARTS_Y"] == 1 else 2
    carry = scores.new_empty((programs, planes, options["CLASSES"], options["BLOCK"]), dtype=torch.float32)
    launch(
        cross_entropy_backward_kernel, (programs,),
        scores, labels, class_weight, grad_loss, lse, grad_scores, carry, scores.stride(), labels.stride(),
        labels.stride() if grad_loss is None else grad_loss.stride(), grad_scores.stride(), rows, columns, classes, ignore_index,
        label_smoothing, lanes, blocks, strips, PLAIN=grad_loss is None and class_weight is None,
        SMOOTH=label_smoothing > 0, **cell, **options,
    )  # fmt: skip


def argmax(scores: Tensor, align_corners: bool, label: Tensor) -> None:
    """Class of the highest upsampled score into label [B,H,W] int64."""
    rows, columns = axes = axes_of(scores, (label.shape[1], label.shape[2]), align_corners, None)
    cell, options = _cells("argmax", scores, axes)
    lanes = scores.shape[0] * columns.cells * cell["PARTS_X"]
    blocks = triton.cdiv(lanes, options["BLOCK"])
    launch(
        argmax_kernel, (blocks * rows.cells * cell["PARTS_Y"],),
        scores, label, scores.stride(), label.stride(), rows, columns, scores.shape[1], lanes, blocks, **cell, **options,
    )  # fmt: skip


def axes_of(scores: Tensor, size: tuple[int, int], align_corners: bool, window: Window | None) -> tuple[Axis, Axis]:
    """Rows and columns."""
    h, w = scores.shape[2:]
    all_sources, source0, all_targets, target0 = window or (h, 0, size[0], 0)
    rows = axis_of(h, size[0], align_corners, all_sources, source0, all_targets, target0)
    return rows, axis_of(w, size[1], align_corners, w, 0, size[1], 0)


def _cells(kernel: str, scores: Tensor, axes: tuple[Axis, Axis]) -> tuple[dict[str, Any], dict[str, Any]]:
    """How cells are cut up, as the kernels take it; the other meta-parameters."""
    rows, columns = axes
    scale = max(1, round(columns.unit / columns.step))
    use = configuration("upsample", kernel, scores.device, C=scores.shape[1], scale=scale, bits=8 * scores.element_size())
    most = use.pop("MOST")
    (ky, parts_y), (kx, parts_x) = rows.parts(most), columns.parts(most)
    cell = {"KX": kx, "KY": ky, "PARTS_X": parts_x, "PARTS_Y": parts_y, "WIDE": rows.wide or columns.wide}
    large = sum((n - 1) * abs(stride) for n, stride in zip(scores.shape, scores.stride(), strict=True)) >= 2**31
    return {**cell, "FLAT_X": columns.flat, "FLAT_Y": rows.flat, "LARGE": large}, use
