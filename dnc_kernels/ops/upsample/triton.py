"""Triton launchers of the upsampled cross-entropy and argmax; kernels: triton_loss.py, triton_gradient.py,
triton_argmax.py, built on triton_cells.py.

Launches: the log-sum-exp 1, the loss 1 more, its sums 1 more, the gradient 1 more; argmax 1.
Workspace: shift and lse [B,H,W] fp32 (with label smoothing three of them); the gradient's carry, about 1/ROWS of [B,C,h,w]
fp32, or 2/ROWS where a cell has more than MOST x MOST target pixels; 16 bytes a program of the loss.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .._triton import configuration, launch, processors
from .calls import ArgmaxCall, UpsampleCall, UpsampleOut
from .triton_argmax import argmax_kernel
from .triton_cells import Axis, axis_of
from .triton_gradient import gradient_kernel
from .triton_loss import add_sums_kernel, log_sum_exp_kernel, loss_kernel

# Pixels that a program of the loss works on at a time: 2 for each of 4 * 32 threads.
_PIXELS = 256


def upsample_cross_entropy(call: UpsampleCall, out: UpsampleOut, partial: Tensor | None = None) -> None:
    """Results and the gradient, those given. A label outside [0,C) is ignored: a check would wait for the device.

    partial: instead of sums, [`loss_programs`,2] float64 that add up to them.
    """
    scores, labels = call.scores, call.labels
    sums, loss, grad_scores = out
    if grad_scores is not None and scores.shape[1] == 1:  # one class has probability 1, whatever rounding says
        grad_scores.zero_()
        grad_scores = None
    wanted = sums is not None or loss is not None or partial is not None
    if grad_scores is None and not wanted:
        return
    axes = axes_of(call)
    shift, lse = torch.empty((2, *labels.shape), dtype=torch.float32, device=scores.device)
    spread = torch.empty_like(lse) if wanted and call.label_smoothing > 0 else None
    log_sum_exp(call, axes, shift, lse, spread)
    if wanted:
        _losses(call, axes, shift, lse, spread, sums, loss, partial)
    if grad_scores is not None:
        gradient(call, axes, shift, lse, grad_scores)


def log_sum_exp(call: UpsampleCall, axes: tuple[Axis, Axis], shift: Tensor, lse: Tensor, spread: Tensor | None) -> None:
    """Log-sum-exp as shift + log(2) lse and, if given, the smoothed part of the loss, all [B,H,W] fp32 and contiguous."""
    scores, (rows, columns) = call.scores, axes
    options = _cells("log_sum_exp", scores, axes)
    lanes = scores.shape[0] * columns.cells * options["PARTS_X"]
    blocks = triton.cdiv(lanes, options["BLOCK"])
    launch(
        log_sum_exp_kernel, (blocks * rows.cells * options["PARTS_Y"],),
        scores, call.class_weight, shift, lse, spread, scores.stride(), rows, columns, scores.shape[1], call.label_smoothing,
        lanes, blocks, **options,
    )  # fmt: skip


def _losses(
    call: UpsampleCall, axes: tuple[Axis, Axis], shift: Tensor, lse: Tensor, spread: Tensor | None, sums: Tensor | None,
    loss: Tensor | None, partial: Tensor | None,
) -> None:  # fmt: skip
    """Losses of pixels and their sums, those given."""
    scores, labels, (rows, columns) = call.scores, call.labels, axes
    programs = loss_programs(labels)
    if sums is not None:
        partial = sums.new_empty((programs, 2))
    launch(
        loss_kernel, (programs,),
        scores, labels, call.class_weight, shift, lse, spread, loss, partial, scores.stride(), labels.stride(),
        (labels if loss is None else loss).stride(), rows, columns, scores.shape[1], call.ignore_index, call.label_smoothing,
        lse.numel(), WIDE=rows.wide or columns.wide, FLAT_X=columns.flat, FLAT_Y=rows.flat, BLOCK=_PIXELS, num_warps=4,
    )  # fmt: skip
    if sums is not None:
        launch(add_sums_kernel, (1,), partial, sums, programs, BLOCK=1024, num_warps=4)


def loss_programs(labels: Tensor) -> int:
    """Programs that a loss of labels [B,H,W] takes, each of which has its partial sums."""
    return min(triton.cdiv(labels.numel(), _PIXELS), 8 * processors(labels.device))


def gradient(call: UpsampleCall, axes: tuple[Axis, Axis], shift: Tensor, lse: Tensor, grad_scores: Tensor) -> None:
    """Gradient of the scores, from what `log_sum_exp` left."""
    scores, labels, grad_loss, (rows, columns) = call.scores, call.labels, call.grad_loss, axes
    batch, classes = scores.shape[:2]
    options = _cells("gradient", scores, axes)
    lanes = batch * (columns.sources + 1)
    blocks = triton.cdiv(lanes, options["BLOCK"] - 1)
    strips = triton.cdiv(rows.sources, options["ROWS"])
    programs = blocks * strips * triton.cdiv(classes, options["CLASSES"])
    planes = 1 if options["PARTS_X"] * options["PARTS_Y"] == 1 else 2
    carry = scores.new_empty((programs, planes, options["CLASSES"], options["BLOCK"]), dtype=torch.float32)
    launch(
        gradient_kernel, (programs,),
        scores, labels, call.class_weight, grad_loss, shift, lse, grad_scores, carry, scores.stride(), labels.stride(),
        (labels if grad_loss is None else grad_loss).stride(), grad_scores.stride(), rows, columns, classes,
        call.ignore_index, call.label_smoothing, lanes, blocks, strips, PLAIN=grad_loss is None and call.class_weight is None,
        SMOOTH=call.label_smoothing > 0, **options,
    )  # fmt: skip


def upsample_argmax(call: ArgmaxCall, out: Tensor) -> None:
    """Class of the highest upsampled score."""
    scores = call.scores
    h, w = scores.shape[2:]
    rows, columns = axes = _axis(h, out.shape[1], call.align_corners), _axis(w, out.shape[2], call.align_corners)
    options = _cells("argmax", scores, axes)
    lanes = scores.shape[0] * columns.cells * options["PARTS_X"]
    blocks = triton.cdiv(lanes, options["BLOCK"])
    launch(
        argmax_kernel, (blocks * rows.cells * options["PARTS_Y"],),
        scores, out, scores.stride(), out.stride(), rows, columns, scores.shape[1], lanes, blocks, **options,
    )  # fmt: skip


def axes_of(call: UpsampleCall) -> tuple[Axis, Axis]:
    """Rows and columns."""
    (h, w), (height, width), corners = call.scores.shape[2:], call.labels.shape[1:], call.align_corners
    columns = _axis(w, width, corners)
    if not call.source_rows:
        return _axis(h, height, corners), columns
    return axis_of(h, height, corners, call.source_rows, call.source_row0, call.target_rows, call.target_row0), columns


def _axis(sources: int, targets: int, align_corners: bool) -> Axis:
    """A whole one."""
    return axis_of(sources, targets, align_corners, sources, 0, targets, 0)


def _cells(kernel: str, scores: Tensor, axes: tuple[Axis, Axis]) -> dict[str, Any]:
    """Meta-parameters: how cells are cut up, and what is configured."""
    rows, columns = axes
    scale = max(1, round(columns.unit / columns.step))
    use = configuration("upsample", kernel, scores.device, C=scores.shape[1], scale=scale, bits=8 * scores.element_size())
    most = use.pop("MOST")
    (ky, parts_y), (kx, parts_x) = rows.parts(most), columns.parts(most)
    large = sum((n - 1) * abs(stride) for n, stride in zip(scores.shape, scores.stride(), strict=True)) >= 2**31
    use.update(
        KX=kx, KY=ky, PARTS_X=parts_x, PARTS_Y=parts_y, WIDE=rows.wide or columns.wide, FLAT_X=columns.flat, FLAT_Y=rows.flat,
        LARGE=large,
    )  # fmt: skip
    return use
