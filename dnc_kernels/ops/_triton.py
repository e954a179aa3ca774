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
from functools import cache, lru_cache, wraps
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._evidence import slug
from ..backends import INTERPRETED, capability
from ._common import _REMEMBERED

R = TypeVar("R")
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
#: Device kind that configurations are chosen for instead of the tensor's, while kernels are compiled ahead of time, and the
#: shared memory that a block of it may have.
_kind: str | None = None
_kind_shared = math.inf
#: Configurations in force instead of the stored ones, by kernel: the tuner's and the tests'.
_overrides: list[tuple[str, dict[str, Any]]] = []


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


class Plan(NamedTuple):
    """What a launch takes beside its tensors."""

    grid: tuple[int, ...]
    arguments: tuple[Any, ...]  # behind the tensors
    options: dict[str, Any]


def planned(plan: Callable[..., R]) -> Callable[..., R]:
    """Decorator of what a launcher derives from layouts (of tensors), options and the device alone: made once for each of them.

    Not where configurations are in force for a block of code, or another device kind is.
    """
    made: dict[tuple[Any, ...], R] = {}

    @wraps(plan)
    def run(*arguments: Any) -> R:
        if _overrides or _kind is not None:
            return plan(*arguments)
        key: list[Any] = []
        for value in arguments:
            if isinstance(value, Tensor):
                key += value.shape, value.stride(), value.dtype, value.device
            else:
                key.append(value)
        found = made.get(tuple(key))
        if found is None:
            if len(made) >= _REMEMBERED:
                made.clear()
            found = made[tuple(key)] = plan(*arguments)
        return found

    return run


def cdiv(a: int, b: int) -> int:
    """A / b, rounded up. Triton's, which serves kernels as well, costs 2 us."""
    return -(-a // b)


def scale(x: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """`x` times `factor` [] to `out`, which may be x: elements without gaps. A factor of 1 in place costs nothing."""
    block = 4096
    launch(_scale_kernel, (triton.cdiv(x.numel(), block),), x, factor, out, x.numel(), x is out, block, num_warps=8)
    return out


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, out_ptr, N, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    """Floor: 2 N numbers, for [131072,256] of bfloat16 134 MB over 3.0 TB/s = 45 us; for a factor of 1 one number a program."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if (not IN_PLACE) or factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x_ptr + at, mask=at < N, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, rounded(value * factor, out_ptr.dtype.element_ty), mask=at < N)


def dot_precision(x: Tensor) -> str:
    """``input_precision`` of a product of x: for float32 what torch's own setting says; it means nothing in 16 bits."""
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


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
    return slug(torch.cuda.get_device_name(index)), architecture(capability(index))


def architecture(of: tuple[int, int]) -> str:
    """The kind whose tensor cores a compute capability has: mma.sync before 9.0 and from 12.0 on, wgmma, tcgen05."""
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(of[0], "sm_80")


def shared_memory(device: torch.device) -> float:
    """Bytes of shared memory that a block may have: what the driver says; no end of it under the interpreter."""
    if _kind is not None:
        return _kind_shared
    return _shared_memory(device.index or 0) if device.type == "cuda" else math.inf


@cache
def _shared_memory(index: int) -> int:
    # what Triton itself compares with when it loads a kernel
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


@cache
def stored(family: str, kind: str) -> dict[str, list[dict[str, Any]]]:
    """Configurations of a family for a device kind; empty where there are none."""
    path = Path(__file__).parent / family / "configs" / f"{kind}.json"
    return json.loads(path.read_text()) if path.exists() else {}


#: Bytes of shared memory that a kernel needs at most, from its meta-parameters and the shape they are for.
Need = Callable[[Mapping[str, Any], Mapping[str, int]], int]
#: What layouts are converted through, beside the tiles that wait for a product: the most in `python -m benchmarks.aot --sweep`.
SCRATCH = 20 << 10
#: What tells kernels apart, where sizes tell shapes of one kernel apart.
_EXACT = ("bits", "even")


def configuration(family: str, kernel: str, device: torch.device, need: Need | None = None, /, **shape: int) -> dict[str, Any]:
    """Meta-parameters of `kernel` for a shape: those stored for the nearest one, cut to the device's shared memory. A new dict.

    need: bytes of it; None: a kernel that needs little whatever its configuration.
    """
    for name, use in reversed(_overrides):
        if name == kernel:
            return dict(use)
    return dict(_chosen(family, kernel, device_kinds(device), tuple(sorted(shape.items())), need, shared_memory(device)))


@lru_cache(maxsize=4096)
def _chosen(
    family: str, kernel: str, kinds: tuple[str, ...], shape: tuple[tuple[str, int], ...], need: Need | None, limit: float
) -> Mapping[str, Any]:
    use = _nearest(family, kernel, kinds, shape)
    return use if need is None else fitted(use, needed_for(kinds, shape), need, limit)


def needed_for(kinds: tuple[str, ...], shape: tuple[tuple[str, int], ...]) -> dict[str, int]:
    """A shape as a `Need` takes it. mma_sync: products read registers; tcgen05: they leave sums in tensor memory."""
    return {**dict(shape), "mma_sync": int(kinds[-1] == "sm_80"), "tcgen05": int(kinds[-1] == "sm_100")}


def fitted(use: Mapping[str, Any], shape: Mapping[str, int], need: Need, limit: float) -> Mapping[str, Any]:
    """The first that needs at most `limit` bytes: `use`, with fewer stages, pixels read anew, fewer pixels, fewer channels."""

    def halved(key: str, least: int) -> list[int]:
        size = use.get(key, 0)
        return [size >> i for i in range(max(size // least, 1).bit_length())]

    cut: dict[str, Any] = {}
    for depth, rows, keep, stages in product(
        halved("BLOCK_D", 32), halved("BLOCK_N", 32), sorted({use.get("KEEP_D", 0), 0}, reverse=True),
        range(use.get("num_stages", 1), min(use.get("num_stages", 1), 2) - 1, -1),
    ):  # fmt: skip
        cut = {**use, **{k: v for k, v in (("BLOCK_D", depth), ("BLOCK_N", rows), ("KEEP_D", keep)) if k in use}}
        if "num_stages" in use:
            cut["num_stages"] = stages
        if need(cut, shape) <= limit:
            break
    return cut


def _nearest(family: str, kernel: str, kinds: tuple[str, ...], shape: tuple[tuple[str, int], ...]) -> Mapping[str, Any]:
    entries = next((found[kernel] for kind in kinds if kernel in (found := stored(family, kind))), None)
    if not entries:
        raise RuntimeError(f"{kernel}: no configuration for {' or '.join(kinds)} in dnc_kernels/ops/{family}/configs")
    sizes = dict(shape)

    def distance(entry: dict[str, Any]) -> float:
        return sum(
            # another width of numbers is another kernel, not a larger one
            (1000.0 * (sizes[key] != size)) if key in _EXACT else abs(math.log2((sizes[key] + 1) / (size + 1)))
            for key, size in entry["when"].items()
            if key in sizes
        )

    return min(entries, key=distance)["use"]


def steps_held(use: Mapping[str, Any], shape: Mapping[str, int]) -> int:
    """Steps of a loop whose tiles are in shared memory at once; for mma.sync one more waits in registers."""
    return max(use["num_stages"] - 1, 1) if shape["mma_sync"] else use["num_stages"]


def kept_rows(pixels: int, rows: int, use: Mapping[str, Any], shape: Mapping[str, int]) -> int:
    """Rows of shared memory at most where a tile of pixels is kept and `rows` a step are multiplied by it."""
    # numbers that were loaded one by one reach the tile through another layout
    copies = 1 if shape["mma_sync"] or shape["even"] else 2
    return copies * pixels + steps_held(use, shape) * rows


def tile_of(size: int, block: int | None = None, least: int = 16) -> int:
    """Block size of a dimension: all of it, but no more than `block`; at least what a product needs."""
    whole = max(1 << (size - 1).bit_length(), least)
    return whole if block is None else min(block, whole)


@contextmanager
def configured(kernel: str, **use: Any) -> Iterator[None]:
    """Run `kernel` with these meta-parameters inside the block: process-wide, as backward passes have threads of their own.

    The block that was opened last counts, whichever is closed first.
    """
    block = (kernel, use)
    _overrides.append(block)
    try:
        yield
    finally:
        for i, other in enumerate(_overrides):
            if other is block:
                del _overrides[i]
                break


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


def vectors(x: Tensor, pixels: Pixels) -> int:
    """1 where 16 numbers on a multiple of 16 lie side by side and Triton can tell, else 0.

    Then a thread loads them one by one, and their addresses take the registers that a large tile needs.
    """
    hw, width, stride_b, stride_h, stride_w, stride_d = pixels
    # of numbers that are all multiples of 16 no low bit is set
    if stride_d == 1:
        return int((hw | width | stride_b | stride_h | stride_w | x.shape[1]) & 15 == 0)
    return int(stride_w == 1 and (hw | width | stride_b | stride_h | stride_d | x.numel() // max(x.shape[1], 1)) & 15 == 0)


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
def offset_of(n, at, MAP: tl.constexpr):
    """`pixel_offset` of pixels n of a tensor with addresses `at` (Pixels)."""
    return pixel_offset(n, at.hw, at.width, at.stride_b, at.stride_h, at.stride_w, MAP)


@triton.jit
def wide_unless(i, NARROW: tl.constexpr):
    """i before it meets a stride: int64, unless the tensor is known to be small."""
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
    """acc + a b: products of 16-bit numbers are exact, sums in float32."""
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
