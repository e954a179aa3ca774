"""Triton launchers of the upsampled cross-entropy and argmax; kernels: triton_loss.py, triton_gradient.py,
triton_argmax.py, built on triton_cells.py.

Launches: the log-sum-exp 1, the loss 1 more, its sums 1 more, the gradient 1 more; argmax 1.
Workspace: lse [B,H,W] fp32 (with label smoothing two of them); the gradient's carry, about 1/ROWS of [B,C,h,w] fp32, or 2/ROWS
where a cell has more than MOST x MOST target pixels; 16 bytes a program of the loss.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .._triton import configuration, launch, processors
from .reference import Window
from .triton_argmax import argmax_kernel
from .triton_cells import Axis, axis_of
from .triton_gradient import gradient_kernel
from .triton_loss import add_sums_kernel, log_sum_exp_kernel, loss_kernel

# Pixels that a program of the loss works on at a time: 2 for each of 4 * 32 threads.
_PIXELS = 256


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
    if grad_scores is not None and scores.shape[1] == 1:  # one class has probability 1, whatever rounding says
        grad_scores.zero_()
        grad_scores = None
    if grad_scores is None and sums is None and loss is None:
        return
    lse = torch.empty(labels.shape, dtype=torch.float32, device=scores.device)
    options = (ignore_index, label_smoothing, axes)
    wanted = sums is not None or loss is not None
    spread = torch.empty_like(lse) if wanted and label_smoothing > 0 else None
    log_sum_exp(scores, class_weight, label_smoothing, axes, lse, spread)
    if wanted:
        _losses(scores, labels, class_weight, *options, lse, spread, sums, loss)
    if grad_scores is not None:
        gradient(scores, labels, class_weight, *options, grad_loss, lse, grad_scores)


def log_sum_exp(
    scores: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    axes: tuple[Axis, Axis],
    lse: Tensor,
    spread: Tensor | None,
) -> None:
    """Base-2 log-sum-exp and, if given, the smoothed part of the loss, both [B,H,W] fp32 and contiguous."""
    rows, columns = axes
    cell, options = _cells("log_sum_exp", scores, axes)
    lanes = scores.shape[0] * columns.cells * cell["PARTS_X"]
    blocks = triton.cdiv(lanes, options["BLOCK"])
    launch(
        log_sum_exp_kernel, (blocks * rows.cells * cell["PARTS_Y"],),
        scores, class_weight, lse, spread, scores.stride(), rows, columns, scores.shape[1], label_smoothing, lanes, blocks,
        **cell, **options,
    )  # fmt: skip


def _losses(
    scores: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    axes: tuple[Axis, Axis],
    lse: Tensor,
    spread: Tensor | None,
    sums: Tensor | None,
    loss: Tensor | None,
) -> None:
    """Losses of pixels and their sums, those given."""
    rows, columns = axes
    programs = min(triton.cdiv(lse.numel(), _PIXELS), 8 * processors(lse.device))
    partial = None if sums is None else sums.new_empty((programs, 2))
    launch(
        loss_kernel, (programs,),
        scores, labels, class_weight, lse, spread, loss, partial, scores.stride(), labels.stride(),
        labels.stride() if loss is None else loss.stride(), rows, columns, scores.shape[1], ignore_index, label_smoothing,
        lse.numel(), WIDE=rows.wide or columns.wide, FLAT_X=columns.flat, FLAT_Y=rows.flat, BLOCK=_PIXELS, num_warps=4,
    )  # fmt: skip
    if sums is not None:
        launch(add_sums_kernel, (1,), partial, sums, programs, BLOCK=1024, num_warps=4)


def gradient(
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
    """Gradient of the scores, from what `log_sum_exp` left."""
    rows, columns = axes
    batch, classes = scores.shape[:2]
    cell, options = _cells("gradient", scores, axes)
    lanes = batch * (columns.sources + 1)
    blocks = triton.cdiv(lanes, options["BLOCK"] - 1)
    strips = triton.cdiv(rows.sources, options["ROWS"])
    programs = blocks * strips * triton.cdiv(classes, options["CLASSES"])
    planes = 1 if cell["PARTS_X"] * cell["PARTS_Y"] == 1 else 2
    carry = scores.new_empty((programs, planes, options["CLASSES"], options["BLOCK"]), dtype=torch.float32)
    launch(
        gradient_kernel, (programs,),
        scores, labels, class_weight, grad_loss, lse, grad_scores, carry, scores.stride(), labels.stride(),
        labels.stride() if grad_loss is None else grad_loss.stride(), grad_scores.stride(), rows, columns, classes,
        ignore_index, label_smoothing, lanes, blocks, strips, PLAIN=grad_loss is None and class_weight is None,
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
