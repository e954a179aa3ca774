"""What ops and layers know of their tensors: pixels as rows or maps, labels, and the precision they compute in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .errors import check_float, check_value, whole_number

_INT64 = torch.iinfo(torch.int64)


def check_pixels(op: str, x: Tensor, argument: str = "x") -> tuple[int, int]:
    """Check that `x` is float [N,D] or [B,D,H,W]; return (pixels, channels)."""
    check_float(op, argument, x)
    if x.ndim not in (2, 4):
        fix = f"tokens [B,N,D] are rows {argument}.flatten(0, 1), a map [D,H,W] is {argument}[None]" if x.ndim == 3 else ""
        check_value(False, op, argument, "[N,D] or [B,D,H,W]", x, fix)
    check_value(x.shape[1] > 0, op, argument, "of at least one channel", x)
    return pixel_count(x), x.shape[1]


def pixel_count(x: Tensor) -> int:
    """N of x [N,D] or [B,D,H,W]."""
    return x.numel() // x.shape[1]


def flat_pixels(x: Tensor) -> Tensor:
    """[N,D] of x [N,D] or [B,D,H,W] (reference code; copies where the layout asks for it)."""
    return x if x.ndim == 2 else x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def pixel_map(x: Tensor, rows: Tensor) -> Tensor:
    """Rows [N,M], or [N] for M = 1, as they are (x [N,D]) or as [B,M,H,W] (x [B,D,H,W]), a view: `flat_pixels` undone."""
    if x.ndim == 2:
        return rows
    channels = rows.shape[1] if rows.ndim == 2 else 1
    return rows.view(x.shape[0], x.shape[2], x.shape[3], channels).permute(0, 3, 1, 2)


def like_pixels(x: Tensor, values: Tensor) -> Tensor:
    """Per-pixel `values` [N] as [N] (x [N,D]) or [B,H,W] (x [B,D,H,W])."""
    return values if x.ndim == 2 else values.view(x.shape[0], x.shape[2], x.shape[3])


def flat_labels(labels: Tensor) -> Tensor:
    """Labels [N] int64, contiguous."""
    if labels.ndim == 1 and labels.dtype == torch.int64 and labels.is_contiguous():
        return labels
    return as_int64(labels.reshape(-1)).contiguous()


def as_int64(ids: Tensor) -> Tensor:
    """Ids of any integer dtype in int64. One of uint64 beyond it becomes its largest number: no id either, and not negative."""
    wide = ids.to(torch.int64)
    return torch.where(wide < 0, _INT64.max, wide) if ids.dtype == torch.uint64 else wide


def check_ignore_index(op: str, ignore_index: int, bound: int) -> int:
    """`ignore_index` as an int of 64 bits. One that is an id below `bound` would drop that class without a word."""
    ignore_index = whole_number(op, "ignore_index", ignore_index, least=None)
    if not _INT64.min <= ignore_index <= _INT64.max:
        fix = "-1 leaves out any negative id"
        check_value(False, op, "ignore_index", "an integer of 64 bits, as labels are", ignore_index, fix)
    if 0 <= ignore_index < bound:
        fix = "use -100, or 255 beyond the classes"
        check_value(False, op, "ignore_index", f"outside [0,{bound})", ignore_index, fix)
    return ignore_index


def without_ignored(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels with -1 for `ignore_index`: for kernels that leave out negative labels alone."""
    return labels if ignore_index < 0 else torch.where(labels == ignore_index, -1, labels)


def first_of(labels: Tensor, bad: Tensor) -> str:
    """The first bad label and its place, for an error. Waits for the device."""
    index = int(bad.flatten().nonzero()[0])
    return f"{int(labels.flatten()[index])} at pixel {index}"


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is float64, else float32: what kernels accumulate in."""
    for t in tensors:
        if t is not None and t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off: reference code computes in the dtype it chose, not in autocast's."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)  # the meta device has no autocast
