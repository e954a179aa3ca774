"""Labels of a head: checks, and the label map at the size of the features."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from .._tensors import as_int64, first_of
from ..errors import SWAPPED, check_device, check_integer, check_value, label_fix, map_size, swapped
from ..ops.head import LABEL_DTYPES, label_places, label_range
from ._choices import LabelMode, check_word

#: Check label values on CUDA too, at the price of a host sync.
DEBUG = os.environ.get("DNC_KERNELS_DEBUG", "") == "1"


def check_labels(op: str, labels: Tensor, features: Tensor) -> None:
    """Check that labels are integers [N] for features [N,D] or [B,H,W] for [B,D,h,w], on their device."""
    check_integer(op, "labels", labels)
    batch, ndim = features.shape[0], 3 if features.ndim == 4 else 1
    if labels.ndim != ndim or labels.shape[0] != batch:
        # the message is made on failure alone: torch.compile cannot format a symbolic size
        expected = f"[{batch}{',H,W' if ndim == 3 else ''}] to match features"
        check_value(False, op, "labels", expected, labels, label_fix(labels, features))
    if ndim == 3:
        check_value(labels.shape[1] > 0 and labels.shape[2] > 0, op, "labels", "of at least one row and column", labels)
    if ndim == 3 and swapped(labels, features):
        expected = f"[B,H,W] laid out as features, {features.shape[2]} rows by {features.shape[3]} columns"
        check_value(False, op, "labels", expected, labels, SWAPPED)
    check_device(op, "labels", labels, features, "features")


def sort_out_labels(op: str, labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, int, Tensor]:
    """Labels, the one among them that means "leave out", and how many were wrong (0-d int64).

    `ignore_index` or any negative id leaves a pixel out. An id at or beyond C that is not `ignore_index` is a ValueError where
    it can be read without a sync (on CPU, outside torch.compile) or under DNC_KERNELS_DEBUG=1; then the labels come back as
    they are if one id means "leave out". Elsewhere it counts as wrong; then whatever is left out comes back as -1.
    """
    narrow = abs(ignore_index) < 2**31
    if labels.dtype != torch.int64 and not (labels.dtype == torch.int32 and narrow):
        # an ignore_index of -1 or 1000 cannot be compared with uint8
        labels = labels.to(torch.int32) if labels.dtype.itemsize < 4 and narrow else as_int64(labels)
    if torch.compiler.is_compiling() or not (DEBUG or labels.device.type == "cpu"):
        beyond = labels >= num_classes
        wrong = (beyond & (labels != ignore_index)).sum()
        return torch.where((labels < 0) | beyond, -1, labels.to(torch.int64)), -1, wrong
    none_wrong = torch.zeros((), dtype=torch.int64, device=labels.device)
    if labels.numel() == 0:
        return labels, ignore_index, none_wrong
    least, outside = label_range(labels, num_classes, ignore_index)
    if outside:
        bad = (labels >= num_classes) & (labels != ignore_index)
        check_value(
            False, op, "labels", f"in [0,{num_classes}); ignore_index {ignore_index} or any negative id leaves a pixel out",
            first_of(labels, bad), "set ignore_index, or num_classes",
        )  # fmt: skip
    if least >= 0 or least == ignore_index == -1:
        return labels, ignore_index, none_wrong
    # several ids mean "leave out", and the kernels know one
    return torch.where((labels < 0) | (labels == ignore_index), -1, labels), -1, none_wrong


def labels_of_step(op: str, labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, int]:
    """Labels in a dtype that `ops.head` reads, and the one among them that means "leave out"; checked where `sort_out_labels`
    checks. Elsewhere `ops.head` leaves out what is no class, and counts it.
    """
    if not torch.compiler.is_compiling() and (DEBUG or labels.device.type == "cpu"):
        labels, ignore_index, _ = sort_out_labels(op, labels, num_classes, ignore_index)
    elif labels.dtype not in LABEL_DTYPES:
        labels = labels.to(torch.int32) if labels.dtype.itemsize < 4 else as_int64(labels)
    return labels, ignore_index


def left_out_below_zero(op: str, argument: str, labels: Tensor, bound: int, name: str) -> Tensor:
    """Labels or clusters, flat, in int64 and with -1 for any negative id; a function without an ignore_index has no other.

    An id at or beyond `bound`, called `name`, is a ValueError on CPU, and left out elsewhere and under torch.compile.
    """
    check_integer(op, argument, labels)
    labels = as_int64(labels.reshape(-1))
    if torch.compiler.is_compiling() or labels.device.type != "cpu":
        return torch.where((labels >= 0) & (labels < bound), labels, -1)
    if labels.numel() and int(labels.max()) >= bound:
        expected = f"in [0,{name}); any negative id leaves a pixel out"
        check_value(False, op, argument, expected, first_of(labels, labels >= bound), f"{name}={bound}")
    return labels.clamp(min=-1)


def resize_labels(labels: Tensor, size: int | Sequence[int], mode: LabelMode = "nearest-exact") -> Tensor:
    """Label map at another size: the pixels that `F.interpolate` picks with this mode, without a copy in floats.

    Args:
        labels: [B,H,W] or [H,W], any integer dtype.
        size: (h, w), or one number for both.
        mode: ``nearest-exact`` (the label in the middle of each cell) or ``nearest`` (the first of each cell), as in
            `F.interpolate`. A head does this by itself, with its `label_mode`.

    Returns:
        [B,h,w] or [h,w], in the dtype of `labels`; `labels` itself where it has that size. No host sync.

    Raises:
        ValueError, TypeError: wrong shape, dtype, size or mode.
    """
    op = "resize_labels"
    check_integer(op, "labels", labels)
    check_value(labels.ndim in (2, 3), op, "labels", "[B,H,W] or [H,W]", labels)
    check_word(op, "mode", mode)
    target = map_size(op, size)
    height, width = labels.shape[-2:]
    check_value(height > 0 and width > 0, op, "labels", "of at least one row and column", labels)
    return pixels_at(labels, target, mode)


def pixels_at(labels: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """`resize_labels` without its checks."""
    height, width = labels.shape[-2:]
    if (height, width) == tuple(size):
        return labels
    middle = mode == "nearest-exact"
    rows, columns = (label_places(a, b, middle, labels.device) for a, b in ((height, size[0]), (width, size[1])))
    return labels[..., rows[:, None], columns]


def sample_of_each_class(labels: Tensor, num_classes: int, most: int, uniform: Tensor) -> Tensor:
    """Labels [N] with -1 for all but `most` pixels of each class, drawn by uniform numbers [N]; never waits for the device."""
    labelled = torch.where(labels >= 0, labels, num_classes)
    shuffled = uniform.argsort()
    order = shuffled[labelled[shuffled].argsort(stable=True)]  # by class, in random order within it
    counts = torch.zeros(num_classes + 1, dtype=torch.int64, device=labels.device)
    first = counts.index_add(0, labelled, torch.ones_like(labelled)).cumsum(0).roll(1)
    first[:1].zero_()
    place = torch.arange(len(labels), device=labels.device) - first[labelled[order]]
    return torch.where(torch.zeros_like(labels).scatter(0, order, place) < most, labels, -1)
