"""What every op family shares: views for the C++ library, argument checks, registration."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import backends
from ..backends import native
from ..errors import check_device, check_float, check_integer, check_value, label_fix, whole_number

NAMESPACE = "dnc_kernels"
Metric = Literal["dot", "cosine", "sqeuclidean"]
METRICS: tuple[str, ...] = get_args(Metric)
Reduction = Literal["none", "mean", "sum"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)

# the order of dnc::DType
_DTYPES = {
    dtype: code
    for code, dtype in enumerate(
        (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
    )
}

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


@cache
def kernels(family: str, backend: str) -> ModuleType:
    """The module that launches a family's kernels, with the same functions for every backend.

    ``native`` is C++ on the CPU. Triton is imported only here: on the first use of one of its kernels.
    """
    return import_module(f".{family}.{'native' if backend == 'cpu' else backend}", __package__)


def view(tensor: Tensor | None) -> Any:
    """The C++ view of a tensor, strides and all; None is the absent view; a scalar is one element."""
    if tensor is None:
        return native().View()
    shape, stride = (tensor.shape, tensor.stride()) if tensor.ndim else ((1,), (1,))
    made = native().View(tensor.data_ptr(), _DTYPES[tensor.dtype], shape, stride)
    made.tensor = tensor  # a temporary must live until the kernel has run
    return made


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is float64, else float32: what kernels accumulate in."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def keep_dtypes_under_autocast(op: Any) -> None:
    """Register for autocast: inputs stay as they are; bfloat16 features are read in place, fp32 ones keep their precision.

    The kernels accumulate in fp32 whatever the input dtype, so a cast could only lose bits or copy a feature map.
    """
    overload = op._opoverload
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutocastCUDA
    )

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return overload(*args, **kwargs)

    for key in ("AutocastCPU", "AutocastCUDA"):
        _library.impl(op._name, kernel, key)


def check_pixels(op: str, x: Tensor, argument: str = "x") -> tuple[int, int]:
    """Check that `x` is float [N,D] or [B,D,H,W]; return (pixels, channels)."""
    check_float(op, argument, x)
    check_value(x.ndim in (2, 4), op, argument, "[N,D] or [B,D,H,W]", x)
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


def check_labels(op: str, labels: Tensor, x: Tensor, name: str = "x") -> Tensor:
    """Check labels [N] of rows x [N,D], or [B,H,W] (or flat [N]) of a map x [B,D,H,W]; return them flat, int64 and contiguous.

    `name` is that of `x`.
    """
    check_integer(op, "labels", labels)
    if x.ndim == 2:
        check_value(list(labels.shape) == [x.shape[0]], op, "labels", lambda: f"[N]=[{x.shape[0]}] to match {name}", labels)
    elif labels.ndim != 1 or labels.shape[0] != pixel_count(x):
        expected = [x.shape[0], x.shape[2], x.shape[3]]
        if list(labels.shape) != expected:  # the text on failure alone: it would pin the sizes under torch.compile
            check_value(False, op, "labels", f"[B,H,W]={expected} to match {name}", labels, label_fix(labels))
    check_device(op, "labels", labels, x, name)
    return labels.reshape(-1).to(torch.int64).contiguous()


def check_ignore_index(op: str, ignore_index: int, bound: int) -> int:
    """`ignore_index` as an int. One that is an id below `bound` would drop that class without a word."""
    ignore_index = whole_number(op, "ignore_index", ignore_index, least=None)
    if 0 <= ignore_index < bound:
        fix = "use -100, or 255 beyond the classes"
        check_value(False, op, "ignore_index", f"outside [0,{bound})", ignore_index, fix)
    return ignore_index


def without_ignored(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels with -1 for `ignore_index`: for kernels that leave out negative labels alone."""
    return labels if ignore_index < 0 else torch.where(labels == ignore_index, -1, labels)


def check_choice(op: str, argument: str, value: str, choices: tuple[str, ...]) -> int:
    """Check a string option; return its index."""
    check_value(value in choices, op, argument, "one of " + ", ".join(choices), repr(value))
    return choices.index(value)


def check_label_range(op: str, labels: Tensor, bound: int, ignore_index: int = -100) -> None:
    """Raise ValueError for a label at or beyond `bound` that is not `ignore_index`.

    For reference code on CPU; the kernels check by themselves, and elsewhere such pixels are left out.
    """
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or type(labels) is not Tensor:
        return
    bad = (labels >= bound) & (labels != ignore_index)
    if bad.any():
        got = first_of(labels, bad)
        fix = "ignore_index=255 leaves such pixels out" if got.startswith("255 ") else ""
        check_value(False, op, "labels", f"in [0,{bound}), ignore_index or negative", got, fix)


def first_of(labels: Tensor, bad: Tensor) -> str:
    """The first bad label and its place, for an error. Waits for the device."""
    index = int(bad.flatten().nonzero()[0])
    return f"{int(labels.flatten()[index])} at pixel {index}"


def pixel_count(x: Tensor) -> int:
    """N of x [N,D] or [B,D,H,W]."""
    return x.numel() // x.shape[1]


#: Numbers below which torch's own product is as fast on a GPU as the kernel that replaces it.
_FEW = 1 << 16


def scale_saved(saved: Tensor, grad: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`saved * grad` in `dtype` (None: that of `saved`), in place where both are one and nothing else can read `saved`: the
    graph is freed after this pass.

    The product is made in the wider of both precisions: in 16 bits a loss scale of 65536 is infinite, and 1/N loses 8 bits.
    """
    dtype = saved.dtype if dtype is None else dtype
    # under tracing the compiler decides about memory
    traced = torch.compiler.is_compiling() or type(saved) is not Tensor
    if traced or torch._C._autograd._get_current_graph_task_keep_graph():
        return (saved.to(torch.promote_types(saved.dtype, grad.dtype)) * grad).to(dtype)
    if saved.device.type == "cpu" and grad.numel() == 1 and grad.item() == 1:  # the usual end of a loss; a CPU has no sync
        return saved.to(dtype)
    if grad.numel() == 1 and saved.numel() >= _FEW and triton_serves(saved) and _without_gaps(saved):
        from . import _triton

        return _triton.scale(saved, grad, saved if dtype == saved.dtype else torch.empty_like(saved, dtype=dtype))
    # torch would round a factor without dimensions to 16 bits on a GPU
    return saved.mul_(grad if grad.ndim else grad.reshape([1] * saved.ndim)).to(dtype)


def triton_serves(x: Tensor) -> bool:
    """Whether Triton's kernels for what is no op of its own run on a tensor: on a GPU that they are written for, unless the
    reference was chosen.
    """
    if x.device.type != "cuda" or x.dtype == torch.float64 or backends.chosen() == "reference" or backends.unusable("triton"):
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
