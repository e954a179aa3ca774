"""Calls of the upsample kernels: fields of the structs of csrc/include/dnc/upsample.h, by their names."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._op import record

#: Label dtypes that the kernels read in place.
LABEL_DTYPES = (torch.int64, torch.int32, torch.uint8)


@record
class UpsampleCall(NamedTuple):
    """Arguments of `upsample_cross_entropy` and of its derivative.

    The row numbers describe a window of larger maps: the scores at hand are rows source_row0.. of a map of source_rows, the
    labels rows target_row0.. of one of target_rows. Every row a label is interpolated from must be at hand. All 0: no window.
    """

    scores: Tensor  # [B,C,h,w], any strides
    labels: Tensor  # [B,H,W] of a dtype of `LABEL_DTYPES`, any strides
    source_rows: int
    source_row0: int
    target_rows: int
    target_row0: int
    align_corners: bool
    class_weight: Tensor | None  # [C], contiguous, of the compute dtype
    ignore_index: int
    label_smoothing: float
    grad_loss: Tensor | None  # [B,H,W] of the compute dtype, any strides: what gradients are multiplied by; None: 1
    backend: str


@record
class UpsampleOut(NamedTuple):
    """Results of `upsample_cross_entropy` and its gradient, those wanted."""

    sums: Tensor | None = None  # [2] float64: sum of the losses, sum of the class weights of the pixels that count
    loss: Tensor | None = None  # [B,H,W] of the compute dtype, contiguous; of the op with a reduction: []
    grad_scores: Tensor | None = None  # like scores, of the compute dtype, any strides


@record
class ArgmaxCall(NamedTuple):
    """Arguments of `upsample_argmax`; the result is [B,H,W] int64, contiguous."""

    scores: Tensor  # [B,C,h,w], any strides
    align_corners: bool
    backend: str


@record
class ArgmaxOut(NamedTuple):
    """The result of `upsample_argmax` as C++ takes it."""

    label: Tensor
