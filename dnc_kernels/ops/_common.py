"""What every op family shares: its kernels by backend, argument checks, pixels of rows and maps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import backends
from ..errors import check_device, check_float, check_integer, check_value, describe, label_fix, whole_number

Metric = Literal["dot", "cosine", "sqeuclidean"]
METRICS: tuple[str, ...] = get_args(Metric)
Reduction = Literal["none", "mean", "sum"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)


@cache
def kernels(family: str, backend: str) -> ModuleType:
    """The module that launches a family's kernels, with the same functions for every backend.

    Triton is imported only here: on the first use of one of its kernels.
    """
    return import_module(f".{family}.{backend}", __package__)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is float64, else float32: what kernels accumulate in."""
    for t in tensors:
        if t is not None and t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def contiguous_in(dtype: torch.dtype, t: Tensor | None) -> Tensor | None:
    """An optional tensor in a dtype, contiguous."""
    return t if t is None or (t.dtype == dtype and t.is_contiguous()) else t.to(dtype).contiguous()


_INT64 = torch.iinfo(torch.int64)

#: Calls that a process remembers for each op, at most.
_REMEMBERED = 4096


def remembered(check: Callable[..., None]) -> Callable[..., None]:
    """Decorator of the checks of a call, which see shapes, dtypes, devices and options alone: made once for each of them."""
    passed: set[bytes] = set()

    @wraps(check)
    def run(*arguments: Any) -> None:
        # what is traced must be traced alike each time
        traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        key = None if traced else backends.signature(arguments)
        if key is not None and key in passed:
            return
        check(*arguments)
        if key is not None:
            if len(passed) >= _REMEMBERED:
                passed.clear()
            passed.add(key)

    return run


def check_pixels(op: str, x: Tensor, argument: str = "x") -> tuple[int, int]:
    """Check that `x` is float [N,D] or [B,D,H,W]; return (pixels, channels)."""
    check_float(op, argument, x)
    if x.ndim not in (2, 4):
        fix = f"tokens [B,N,D] are rows {argument}.flatten(0, 1), a map [D,H,W] is {argument}[None]" if x.ndim == 3 else ""
        check_value(False, op, argument, "[N,D] or [B,D,H,W]", x, fix)
    check_value(x.shape[1] > 0, op, argument, "of at least one channel", x)
    return pixel_count(x), x.shape[1]


def check_centroids(op: str, x: Tensor, centroids: Tensor) -> tuple[int, int]:
    """Check that `centroids` is float [C,K,D] with the D of `x`, on its device; return (C, K)."""
    check_float(op, "centroids", centroids)
    check_value(
        centroids.ndim == 3 and centroids.shape[2] == x.shape[1] and centroids.shape[0] > 0 and centroids.shape[1] > 0,
        op, "centroids", lambda: f"[C,K,D] with D={x.shape[1]} to match x", centroids,
    )  # fmt: skip
    check_device(op, "centroids", centroids, x)
    return centroids.shape[0], centroids.shape[1]


def check_labels(op: str, labels: Tensor, x: Tensor, name: str = "x") -> None:
    """Check labels [N] of rows x [N,D], or [B,H,W] (or flat [N]) of a map x [B,D,H,W]; `name` is that of `x`."""
    check_integer(op, "labels", labels)
    if x.ndim == 2:
        if list(labels.shape) != [x.shape[0]]:
            check_value(False, op, "labels", f"[N]=[{x.shape[0]}] to match {name}", labels, label_fix(labels, x))
    elif labels.ndim != 1 or labels.shape[0] != pixel_count(x):
        expected = [x.shape[0], x.shape[2], x.shape[3]]
        if list(labels.shape) != expected:  # the text on failure alone: it would pin the sizes under torch.compile
            check_value(False, op, "labels", f"[B,H,W]={expected} to match {name}", labels, label_fix(labels, x))
    check_device(op, "labels", labels, x, name)


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


def check_no_gradient(op: str, argument: str, tensor: Tensor) -> None:
    """Raise ValueError where a gradient would be wanted that is not made, as torch does for a weight."""
    if tensor.requires_grad and torch.is_grad_enabled():
        got = f"{describe(tensor)} that requires grad"
        check_value(False, op, argument, "without gradient: it gets none", got, f"pass {argument}.detach()")


def check_choice(op: str, argument: str, value: str, choices: tuple[str, ...]) -> None:
    """Check a string option."""
    check_value(value in choices, op, argument, "one of " + ", ".join(choices), repr(value))


def check_label_range(op: str, labels: Tensor, bound: int, ignore_index: int = -100) -> None:
    """Raise ValueError for a label at or beyond `bound` that is not `ignore_index`.

    For reference code on CPU; the kernels check by themselves, and elsewhere such pixels are left out.
    """
    if not readable(labels):
        return
    bad = (labels >= bound) & (labels != ignore_index)
    if bad.any():
        got = first_of(labels, bad)
        fix = "ignore_index=255 leaves such pixels out" if got.startswith("255 ") else ""
        check_value(False, op, "labels", f"in [0,{bound}), ignore_index or negative", got, fix)


def weight_of_counted(
    labels: Tensor, ignore_index: int, num_labels: int, class_weight: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """[]: sum of the class weights (None: 1) of the pixels that count, in `dtype`; without a wait for the device."""
    counted = (labels != ignore_index) & (labels >= 0) & (labels < num_labels)
    if class_weight is None:
        return counted.sum().to(dtype)
    return torch.where(counted, class_weight.to(dtype)[torch.where(counted, labels, 0)], 0).sum()


def readable(t: Tensor) -> bool:
    """Whether numbers of `t` can be read without a wait for a device, and without cutting a trace in two."""
    return type(t) is Tensor and t.is_cpu and not traced()


def traced() -> bool:
    """Whether what runs is traced, compiled or transformed by torch.func: tensors may have no numbers, or not these."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    )


#: Whether a gradient is one of many: under torch.autograd.grad(is_grads_batched=True), which is no transform of torch.func.
batched = torch._C._functorch.is_legacy_batchedtensor


def first_of(labels: Tensor, bad: Tensor) -> str:
    """The first bad label and its place, for an error. Waits for the device."""
    index = int(bad.flatten().nonzero()[0])
    return f"{int(labels.flatten()[index])} at pixel {index}"


def pixel_count(x: Tensor) -> int:
    """N of x [N,D] or [B,D,H,W]."""
    return x.numel() // x.shape[1]


#: Numbers below which torch's own product is as fast as what replaces it.
_FEW = 1 << 16
#: Numbers that are held in float32 at a time: 1 MB.
_PART = 1 << 18


def scale_saved(saved: Tensor, grad: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`saved * grad` in `dtype` (None: that of `saved`), in place where both are one and nothing else can read `saved`: the
    graph is freed after this pass.

    The product is made in the wider of both precisions: in 16 bits a loss scale of 65536 is infinite, and 1/N loses 8 bits.
    """
    dtype = saved.dtype if dtype is None else dtype
    # under tracing the compiler decides about memory
    keep = torch._C._autograd._get_current_graph_task_keep_graph
    if traced() or type(saved) is not Tensor or batched(grad) or keep():
        return (saved.to(torch.promote_types(saved.dtype, grad.dtype)) * grad).to(dtype)
    if saved.is_cpu and grad.numel() == 1 and grad.item() == 1:  # the usual end of a loss; a CPU has no sync
        return saved if dtype == saved.dtype else saved.to(dtype)
    if grad.numel() == 1 and saved.numel() >= _FEW and triton_serves(saved) and _without_gaps(saved):
        from . import _triton

        return _triton.scale(saved, grad, saved if dtype == saved.dtype else torch.empty_like(saved, dtype=dtype))
    # torch would round a factor without dimensions to 16 bits on a GPU
    factor = grad if grad.ndim else grad.reshape([1] * saved.ndim)
    if saved.is_cpu and saved.dtype.itemsize == 2 and factor.dtype == torch.float32 and saved.numel() >= _FEW:
        _scale_half(saved, factor.expand_as(saved))
    else:
        saved.mul_(factor)
    return saved.to(dtype)


def _scale_half(x: Tensor, factor: Tensor) -> None:
    """`x *= factor` for x in 16 bits on a CPU, a part at a time by way of float32.

    torch's product of mixed dtypes takes up to four times as long for the same bits.
    """
    along = 2 if x.ndim == 4 else 0
    step = max(1, _PART * x.shape[along] // x.numel())
    for part, by in zip(x.split(step, along), factor.split(step, along), strict=True):
        part.copy_(part.float().mul_(by))


def triton_serves(x: Tensor) -> bool:
    """Whether Triton's kernels for what is no op of its own run on a tensor: on a GPU that they are written for, unless the
    reference was chosen.
    """
    if x.device.type != "cuda" or x.dtype == torch.float64 or backends.unusable("triton"):
        return False
    if backends.chosen() == "reference" or backends.transformed():
        return False
    return backends.capability(x.device.index) >= backends.OLDEST_CAPABILITY


def _without_gaps(x: Tensor) -> bool:
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def flat_pixels(x: Tensor) -> Tensor:
    """[N,D] of x [N,D] or [B,D,H,W] (reference code; copies where the layout asks for it)."""
    return x if x.ndim == 2 else x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def pixel_map(x: Tensor, rows: Tensor) -> Tensor:
    """Rows [N,M], or [N] for M = 1, as they are (x [N,D]) or as [B,M,H,W] (x [B,D,H,W]), a view: `flat_pixels` undone."""
    if x.ndim == 2:
        return rows
    channels = rows.shape[1] if rows.ndim == 2 else 1
    return rows.view(x.shape[0], x.shape[2], x.shape[3], channels).permute(0, 3, 1, 2)


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off: reference code computes in the dtype it chose, not in autocast's."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)  # the meta device has no autocast


def like_pixels(x: Tensor, values: Tensor) -> Tensor:
    """Per-pixel `values` [N] as [N] (x [N,D]) or [B,H,W] (x [B,D,H,W])."""
    return values if x.ndim == 2 else values.view(x.shape[0], x.shape[2], x.shape[3])
