"""Labels of a head: checks, and the label map at the size of the features."""

from __future__ import annotations

import os

import torch
from torch import Generator, Tensor

from ..errors import check_value
from ._starts import uniform

#: Check label values on CUDA too, at the price of a host sync.
DEBUG = os.environ.get("DNC_KERNELS_DEBUG", "") == "1"


def sort_out_labels(op: str, labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, int, Tensor]:
    """Labels, the one among them that means "leave out", and how many were wrong (0-d int64).

    A label outside [0,C) other than `ignore_index` raises ValueError where its value can be read without a sync (on CPU,
    outside torch.compile) or under DNC_KERNELS_DEBUG=1; then the labels come back as they are. Elsewhere it counts as wrong,
    and comes back as -1, as `ignore_index` does.
    """
    if labels.dtype not in (torch.int64, torch.int32):
        labels = labels.to(torch.int32)  # an ignore_index of -1 or 1000 cannot be compared with uint8
    outside = (labels < 0) | (labels >= num_classes)
    bad = outside & (labels != ignore_index)
    if torch.compiler.is_compiling() or not (DEBUG or labels.device.type == "cpu"):
        return torch.where(outside, -1, labels.to(torch.int64)), -1, bad.sum()
    if bad.any():
        index = int(bad.flatten().nonzero()[0])
        check_value(
            False, op, "labels", f"in [0,{num_classes}) or ignore_index {ignore_index}",
            f"{int(labels.flatten()[index])} at pixel {index}", "set ignore_index, or num_classes",
        )  # fmt: skip
    return labels, ignore_index, torch.zeros((), dtype=torch.int64, device=labels.device)


def without_ignored(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels as int64 with -1 for `ignore_index`."""
    labels = labels.to(torch.int64)
    return labels if ignore_index == -1 else torch.where(labels == ignore_index, -1, labels)


def resize_labels(labels: Tensor, size: tuple[int, int], mode: str = "nearest") -> Tensor:
    """Label map [B,H,W] at `size`: the pixels that `F.interpolate` with this mode picks, without a float copy."""
    height, width = labels.shape[1:]
    if (height, width) == tuple(size):
        return labels
    rows, columns = (_nearest(source, target, mode, labels.device) for source, target in ((height, size[0]), (width, size[1])))
    return labels[:, rows[:, None], columns]


def sample_of_each_class(labels: Tensor, num_classes: int, most: int, generator: Generator | None) -> Tensor:
    """Labels [N] with -1 for all but `most` pixels of each class, drawn evenly. Sorts, and never waits for the device."""
    labelled = torch.where(labels >= 0, labels, num_classes)
    shuffled = uniform((len(labels),), labels.device, generator).argsort()
    order = shuffled[labelled[shuffled].argsort(stable=True)]  # by class, in random order within it
    counts = torch.zeros(num_classes + 1, dtype=torch.int64, device=labels.device)
    first = counts.index_add(0, labelled, torch.ones_like(labelled)).cumsum(0).roll(1)
    first[:1].zero_()
    place = torch.arange(len(labels), device=labels.device) - first[labelled[order]]
    return torch.where(torch.zeros_like(labels).scatter(0, order, place) < most, labels, -1)


def _nearest(source: int, target: int, mode: str, device: torch.device) -> Tensor:
    # torch multiplies in fp32 by a scale rounded to fp32; integer arithmetic picks other pixels at some sizes, such as 2 to 82
    scale = torch.full((), source, dtype=torch.float32, device=device) / target
    middle = 0.5 if mode == "nearest-exact" else 0.0
    return ((torch.arange(target, dtype=torch.float32, device=device) + middle) * scale).to(torch.int64).clamp(max=source - 1)
