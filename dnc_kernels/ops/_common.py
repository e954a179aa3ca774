"""What every op family shares: its kernels by backend, argument checks, pixels of rows and maps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import backends
from .._tensors import first_of, pixel_count
from ..errors import check_device, check_float, check_integer, check_value, describe, label_fix

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


def contiguous_in(dtype: torch.dtype, t: Tensor | None) -> Tensor | None:
    """An optional tensor in a dtype, contiguous."""
    return t if t is None or (t.dtype == dtype and t.is_contiguous()) else t.to(dtype).contiguous()


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


def check_no_gradient(op: str, argument: str, tensor: Tensor) -> None:
    """Raise ValueError where a gradient would be wanted that is not made, as torch does for a weight."""
    if tensor.requires_grad and torch.is_grad_enabled():
        got = f"{describe(tensor)} that requires grad"
        check_value(False, op, argument, "without gradient: it gets none", got, f"pass {argument}.detach()")


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
