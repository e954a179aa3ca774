"""What the Triton kernels share: launching, configurations as data, and the addresses of pixels.

Imported only when a Triton kernel is to run. Under ``TRITON_INTERPRET=1`` (read by triton itself, at import) kernels run on CPU
tensors, which is how they are tested without a GPU.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import INTERPRETED, capability

_INTERPRETED = tl.constexpr(INTERPRETED)
if INTERPRETED and triton.__version__.startswith("3.6."):
    # its interpreter takes a bound of a loop by int() of an array of one element, which numpy refuses from 2.4 on
    from triton.runtime import interpreter

    def _patch_lang_tensor(tensor: Any, scope: Any, patch: Callable[[Any, Any], None] = interpreter._patch_lang_tensor) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_lang_tensor

#: Called instead of a launch, with (kernel, grid, arguments, options), while kernels are compiled ahead of time.
_recorder: Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None] | None = None
#: Device kind that configurations are chosen for instead of the tensor's, while kernels are compiled ahead of time.
_kind: str | None = None
#: Configurations in force instead of the stored ones, by kernel: the tuner's and the tests'.
_overrides: dict[str, dict[str, Any]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run a kernel on the current stream of its first tensor's device. Nothing is launched for an empty grid.

    A fused multiply-add rounds once: it is asked for by name because its default differs between Triton's versions.
    """
    if 0 in grid:
        return
    options.setdefault("enable_fp_fusion", True)
    if _recorder is not None:
        _recorder(kernel, grid, arguments, options)
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    if device.type != "cuda":
        kernel[grid](*arguments, **options)
        return
    with torch.cuda.device(device):
        kernel[grid](*arguments, **options)


def dot_precision(x: Tensor) -> str:
    """``input_precision`` of a float32 product: what torch's own setting says (16-bit products ignore it)."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; 132 where there is none to ask, 2 under the interpreter."""
    if device.type == "cuda":
        return _processors(device.index or 0)
    return 132 if _recorder is not None else 2


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


# Configurations: dnc_kernels/ops/<family>/configs/<kind>.json maps a kernel to [{"when": shape, "use": meta-parameters}, ...].
# The kind is a GPU's name in lower case with dashes, else its architecture (sm_80, sm_90, sm_100), else "interpreter".


def device_kinds(device: torch.device) -> tuple[str, ...]:
    """Kinds whose configurations fit a device, best first."""
    if _kind is not None:
        return (_kind,)
    return _device_kinds(device.index or 0) if device.type == "cuda" else ("interpreter",)


@cache
def _device_kinds(index: int) -> tuple[str, ...]:
    arch = 10 * capability(index)[0]
    return slug(torch.cuda.get_device_name(index)), f"sm_{min(max(arch, 80), 100)}"


def slug(name: str) -> str:
    """A device's name as a file's: lower case, dashes."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


@cache
def stored(family: str, kind: str) -> dict[str, list[dict[str, Any]]]:
    """Configurations of a family for a device kind; empty where there are none."""
    path = Path(__file__).parent / family / "configs" / f"{kind}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def configuration(family: str, kernel: str, device: torch.device, **shape: int) -> dict[str, Any]:
    """Meta-parameters of `kernel` for a shape: those stored for the nearest one. A new dict."""
    if kernel in _overrides:
        return dict(_overrides[kernel])
    return dict(_nearest(family, kernel, device_kinds(device), tuple(sorted(shape.items()))))


@lru_cache(maxsize=4096)
def _nearest(family: str, kernel: str, kinds: tuple[str, ...], shape: tuple[tuple[str, int], ...]) -> Mapping[str, Any]:
    entries = next((found[kernel] for kind in kinds if kernel in (found := stored(family, kind))), None)
    if not entries:
        raise RuntimeError(f"{kernel}: no configuration for {' or '.join(kinds)} in dnc_kernels/ops/{family}/configs")
    sizes = dict(shape)

    def distance(entry: dict[str, Any]) -> float:
        return sum(
            # a width in bits is another kernel, not a larger one
            (1000.0 * (sizes[key] != size)) if key == "bits" else abs(math.log2((sizes[key] + 1) / (size + 1)))
            for key, size in entry["when"].items()
        )

    return min(entries, key=distance)["use"]


@contextmanager
def configured(kernel: str, **use: Any) -> Iterator[None]:
    """Run `kernel` with these meta-parameters inside the block (process-wide)."""
    before = _overrides.get(kernel)
    _overrides[kernel] = use
    try:
        yield
    finally:
        if before is None:
            del _overrides[kernel]
        else:
            _overrides[kernel] = before


class Pixels(NamedTuple):
    """Where the pixels of x [N,D] or [B,D,H,W] lie: arguments of `pixel_offset`, then the stride of a channel."""

    hw: int
    width: int
    stride_b: int
    stride_h: int
    stride_w: int
    stride_d: int


def pixels_of(x: Tensor) -> Pixels:
    """Addresses of the pixels of x, with as few dimensions as its strides allow."""
    if x.ndim == 2:
        return Pixels(0, 0, 0, 0, x.stride(0), x.stride(1))
    b, _, h, w = x.shape
    stride_b, stride_d, stride_h, stride_w = x.stride()
    if h == 1:
        stride_h = w * stride_w
    if w == 1:
        stride_w, w, h = stride_h, h, 1
        stride_h = w * stride_w
    if b == 1:
        stride_b = h * stride_h
    if stride_h == w * stride_w:
        if stride_b == h * w * stride_w:
            return Pixels(0, 0, 0, 0, stride_w, stride_d)
        return Pixels(h * w, 0, stride_b, 0, stride_w, stride_d)
    return Pixels(h * w, w, stride_b, stride_h, stride_w, stride_d)


@triton.jit
def pixel_offset(n, hw, width, stride_b, stride_h, stride_w, MAP: tl.constexpr):
    """Offset of pixels n: rows (MAP 0), planes [B,HW] (1) or [B,H,W] (2) in int64; the same in int32 (3, 4, 5)."""
    inside = n
    offset = 0
    if MAP % 3 > 0:
        inside = n % hw
        offset = wide_unless(n // hw, MAP >= 3) * stride_b
    if MAP % 3 == 2:
        offset += wide_unless(inside // width, MAP >= 3) * stride_h
        inside = inside % width
    return offset + wide_unless(inside, MAP >= 3) * stride_w


@triton.jit
def wide_unless(i, NARROW: tl.constexpr):
    """I before it meets a stride: int64, unless the tensor is known to be small."""
    if NARROW:
        wide = i
    else:
        wide = i.to(tl.int64)
    return wide


def map_rank(pixels: Pixels) -> int:
    """MAP of `pixel_offset`, in int64."""
    return (pixels.hw > 0) + (pixels.width > 0)


def map_kind(x: Tensor, pixels: Pixels) -> int:
    """MAP of `pixel_offset`, in int32 where every offset in x fits: half the registers."""
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return map_rank(pixels) + 3 * (reach < 2**31 - 2**16)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Acc + a b: products of 16-bit numbers are exact, sums in float32."""
    if _INTERPRETED:
        # the interpreter takes the bits of a bfloat16 for an integer
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """float32 `value` as DTYPE, to the nearest."""
    if _INTERPRETED and tl.bfloat16 == DTYPE:
        # the interpreter cuts the bits off
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        out = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        out = value.to(DTYPE)
    return out
