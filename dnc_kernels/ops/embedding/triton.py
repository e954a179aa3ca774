"""Triton launchers and kernels of the embedding, forward and backward.

    xhat = (x - mean) * rstd,  z = xhat * weight + bias,  y = z * inverse_norm      over the D channels of a pixel

Forward reads x and writes y and 3 statistics [N] fp32; backward reads x, grad_y and the statistics and writes grad_x. Nothing
else moves: forward 2*N*D elements, backward 3*N*D, plus 12 bytes per pixel. About 12 and 30 operations per element.
Floors for N=131072, D=256 in bf16 (memory at 3.0 TB/s; arithmetic at 128 lanes * 132 processors * 1.7 GHz = 28 T/s):
  forward   (2*2*N*D + 12*N) B / 3.0 TB/s = 45 us    12*N*D / 28 T/s = 14 us
  backward  (3*2*N*D + 12*N) B / 3.0 TB/s = 68 us    30*N*D / 28 T/s = 36 us
In fp32 the bytes double.

Plan: a program owns a tile of TILE numbers, BLOCK_N pixels x BLOCK_D channels, which stays in registers between the load and
the store. The tile's last dimension is the one that is contiguous in memory, AXIS that of the channels:
  rows        [BLOCK_N,BLOCK_D], channels side by side ([N,D], channels_last): all channels of some pixels
  planes      [BLOCK_D,BLOCK_N], pixels side by side (NCHW), at least PIXELS of them: all channels of 16 pixels or more, so that
              a channel's piece is a whole sector of 32 bytes
  odd planes  the same where sizes or strides of the map are no multiples of 16: a thread then loads one number at a time and
              would need too many addresses for all channels, so it takes a few channels of a pixel
Where a tile does not hold all D channels of its pixels (D > TILE / PIXELS), it is passed over them several times, and what is
read again comes from L1 or L2: x three times forward, x and grad_y twice backward.
Backward is one launch of a few programs per processor. Each walks over tiles, with the loads of the next tiles under way, and
keeps its sums of grad_weight and grad_bias in registers (several passes: in its rows of the workspace [programs,2,D] fp32); one
small launch adds the programs' sums. Without those two gradients there is a program per tile.

Deterministic: tiles belong to programs by number, sums are added in program order. Bit-equal from run to run on a kind of
device. Reference: dnc_kernels/ops/embedding/reference.py.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._tensors import pixel_count
from .._triton import Pixels, configuration, launch, map_rank, pixel_offset, pixels_of, processors
from .calls import NormalizeBackwardCall, NormalizeBackwardOut, NormalizeCall, NormalizeOut

# torch.nn.functional.normalize's bound of the length
_SMALLEST_NORM = tl.constexpr(1e-12)


def normalize_embedding(call: NormalizeCall, out: NormalizeOut) -> None:
    """Embedding and statistics. One launch."""
    x, weight, bias, eps, _ = call
    y, mean, rstd, inverse_norm = out
    pixels, x_at, y_at = pixel_count(x), pixels_of(x), pixels_of(y)
    options = _plan("normalize", x, x_at)
    launch(
        normalize_kernel, (triton.cdiv(pixels, options["BLOCK_N"]),),
        x, weight, bias, y, mean, rstd, inverse_norm, x_at, y_at, pixels, x.shape[1], eps,
        X_MAP=_map(x_at), Y_MAP=_map(y_at), **options,
    )  # fmt: skip


class Pull(NamedTuple):
    """What each pixel's embedding receives beside its gradient: a multiple of one row. For pixels with channels side by side
    (`takes_pull`): rows that are gathered across the channels take more registers than there are.
    """

    factor: Tensor  # [N] float32
    target: Tensor  # [N] int64, a row; negative: none
    rows: Tensor  # [M,D] float32, contiguous


def takes_pull(x: Tensor) -> bool:
    """Whether `normalize_embedding_backward` of x takes a `Pull`."""
    at = pixels_of(x)
    return at.stride_d <= at.stride_w


def backward_programs(x: Tensor) -> int:
    """Programs that add up the gradients of weight and bias."""
    at = pixels_of(x)
    options = _plan("normalize_backward", x, at)
    return min(triton.cdiv(pixel_count(x), options["BLOCK_N"]), options["PROGRAMS"] * processors(x.device))


def normalize_embedding_backward(
    call: NormalizeBackwardCall, out: NormalizeBackwardOut, pull: Pull | None = None, partial: Tensor | None = None
) -> None:
    """Gradients, those given. One launch, or two.

    partial: instead of those of weight and bias, [`backward_programs`,2,D] float32 that add up to them.
    """
    x, grad_y, (grad_x, grad_weight, grad_bias) = call.x, call.grad_y, out
    pixels, channels = pixel_count(x), x.shape[1]
    x_at, grad_y_at, grad_x_at = pixels_of(x), pixels_of(grad_y), pixels_of(x if grad_x is None else grad_x)
    options = _plan("normalize_backward", x, x_at)
    programs = tiles = triton.cdiv(pixels, options["BLOCK_N"])
    resident = options.pop("PROGRAMS") * processors(x.device)
    summed = partial is None and (grad_weight is not None or grad_bias is not None)
    if summed or partial is not None:
        programs = min(tiles, resident)
    if summed:
        partial = x.new_empty((programs, 2, channels), dtype=torch.float32)
    launch(
        normalize_backward_kernel, (programs,),
        x, call.weight, call.bias, call.mean, call.rstd, call.inverse_norm, grad_y, call.grad_rstd, pull, grad_x, partial,
        x_at, grad_y_at, grad_x_at, pixels, channels, tiles,
        X_MAP=_map(x_at), GRAD_Y_MAP=_map(grad_y_at), GRAD_X_MAP=_map(grad_x_at), **options,
    )  # fmt: skip
    if summed:
        block = 32
        launch(
            add_partials_kernel, (triton.cdiv(channels, block),), partial, grad_weight, grad_bias, programs, channels,
            BLOCK_P=64, BLOCK_D=block, num_warps=4,
        )  # fmt: skip


def _even(at: Pixels) -> bool:
    """Whether Triton can tell that 16 pixels on a multiple of 16 lie side by side, on 16-byte borders."""
    return at.stride_w == 1 and (at.hw | at.width | at.stride_b | at.stride_h | at.stride_d) & 15 == 0


def _map(at: Pixels) -> int:
    """MAP of `_pixels`."""
    return map_rank(at) + (4 if at.stride_w == 1 and not _even(at) else 0)


def _plan(kernel: str, x: Tensor, at: Pixels) -> dict[str, Any]:
    """Meta-parameters: shape of the tile, the dimension of its channels, and what is configured."""
    channels, layout = x.shape[1], "rows"
    if at.stride_d > at.stride_w:
        layout = "planes" if _even(at) else "odd_planes"
    use = configuration("embedding", f"{kernel}_{layout}", x.device, D=channels, bits=8 * x.element_size())
    size = use.pop("TILE")
    block_d = min(triton.next_power_of_2(channels), size // use.pop("PIXELS"))
    use.update(
        BLOCK_N=size // block_d, BLOCK_D=block_d, AXIS=1 if layout == "rows" else 0, WHOLE=channels <= block_d,
        MASKED=channels % block_d != 0,
    )  # fmt: skip
    return use


@triton.jit
def normalize_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, inverse_norm_ptr, x_at, y_at, N, D, eps,
    X_MAP: tl.constexpr, Y_MAP: tl.constexpr, AXIS: tl.constexpr, WHOLE: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Forward: a program per tile of pixels."""
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    here = tl.arange(0, BLOCK_N) < N - first  # n itself may overflow in the last tile
    x_row = _pixels(x_ptr, n, x_at, X_MAP)
    y_row = _pixels(y_ptr, n, y_at, Y_MAP)
    d = tl.arange(0, BLOCK_D)
    x = _load(x_row, d, x_at.stride_d, here, D, MASKED and WHOLE, AXIS)  # all D channels, or the first ones
    # The mean in two passes, the second of which corrects the first; the variance from the differences to the first. The first
    # may be that of a part of the channels: its distance from the mean is at most sqrt(D / BLOCK_D) deviations.
    center = tl.sum(x, AXIS)
    center = tl.div_rn(center, _like(center, D if WHOLE else BLOCK_D))
    if WHOLE:
        left, squares = _moments(x, center, d, D, MASKED, AXIS)
    else:
        left = tl.zeros([BLOCK_N], tl.float32)
        squares = left
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            x = _load(x_row, d, x_at.stride_d, here, D, MASKED, AXIS)
            part_left, part_squares = _moments(x, center, d, D, MASKED, AXIS)
            left += part_left
            squares += part_squares
    channels = _like(center, D)
    left = tl.div_rn(left, channels)
    mean = center + left
    variance = tl.div_rn(squares, channels) - left * left
    variance = tl.where(variance < 0, 0.0, variance)  # rounding may leave a hair below 0; NaN stays NaN
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    if WHOLE:
        weight, bias = _channels(weight_ptr, d, D, 1.0, MASKED, AXIS), _channels(bias_ptr, d, D, 0.0, MASKED, AXIS)
        _, z = _affine(x, mean, rstd, weight, bias, d, D, MASKED, AXIS)
        inverse_norm = _inverse_length(tl.sum(z * z, AXIS))
        _store(y_row, d, y_at.stride_d, here, D, z * tl.expand_dims(inverse_norm, AXIS), MASKED, AXIS)
    else:
        length = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            weight, bias = _channels(weight_ptr, d, D, 1.0, MASKED, AXIS), _channels(bias_ptr, d, D, 0.0, MASKED, AXIS)
            x = _load(x_row, d, x_at.stride_d, here, D, MASKED, AXIS)
            _, z = _affine(x, mean, rstd, weight, bias, d, D, MASKED, AXIS)
            length += tl.sum(z * z, AXIS)
        inverse_norm = _inverse_length(length)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            weight, bias = _channels(weight_ptr, d, D, 1.0, MASKED, AXIS), _channels(bias_ptr, d, D, 0.0, MASKED, AXIS)
            x = _load(x_row, d, x_at.stride_d, here, D, MASKED, AXIS)
            _, z = _affine(x, mean, rstd, weight, bias, d, D, MASKED, AXIS)
            _store(y_row, d, y_at.stride_d, here, D, z * tl.expand_dims(inverse_norm, AXIS), MASKED, AXIS)
    tl.store(mean_ptr + n, mean, mask=here)
    tl.store(rstd_ptr + n, rstd, mask=here)
    tl.store(inverse_norm_ptr + n, inverse_norm, mask=here)


@triton.jit
def normalize_backward_kernel(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, inverse_norm_ptr, grad_y_ptr, grad_rstd_ptr, pull, grad_x_ptr,
    partial_ptr, x_at, grad_y_at, grad_x_at, N, D, tiles,
    X_MAP: tl.constexpr, GRAD_Y_MAP: tl.constexpr, GRAD_X_MAP: tl.constexpr, AXIS: tl.constexpr, WHOLE: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Backward: a program walks over tiles of pixels; partial [programs,2,D] gets its sums of grad_weight and grad_bias.

    pull: a `Pull`, or None.
    """
    program = tl.program_id(0)
    if WHOLE:
        d = tl.arange(0, BLOCK_D)
        weight, bias = _channels(weight_ptr, d, D, 1.0, MASKED, AXIS), _channels(bias_ptr, d, D, 0.0, MASKED, AXIS)
    if partial_ptr is not None:
        to_weight_ptr = partial_ptr + program.to(tl.int64) * (2 * D)
        to_bias_ptr = to_weight_ptr + D
        if WHOLE:
            # rows: pixels are added up once, at the end, because they lie in different warps; planes: tile by tile, they do not
            to_weight = tl.zeros([BLOCK_N, BLOCK_D] if AXIS == 1 else [BLOCK_D], tl.float32)
            to_bias = to_weight
    for tile in tl.range(program, tiles, tl.num_programs(0), num_stages=STAGES):
        first = tile * BLOCK_N
        n = first + tl.arange(0, BLOCK_N)
        here = tl.arange(0, BLOCK_N) < N - first
        # behind the last pixel everything is 0, and so is what is added to the sums
        mean = tl.load(mean_ptr + n, mask=here, other=0.0)
        rstd = tl.load(rstd_ptr + n, mask=here, other=0.0)
        inverse_norm = tl.load(inverse_norm_ptr + n, mask=here, other=0.0)
        x_row = _pixels(x_ptr, n, x_at, X_MAP)
        grad_y_row = _pixels(grad_y_ptr, n, grad_y_at, GRAD_Y_MAP)
        factor, pull_row = _pulled(pull, n, here, D)
        if WHOLE:
            x = _load(x_row, d, x_at.stride_d, here, D, MASKED, AXIS)
            g = _received(grad_y_row, d, grad_y_at.stride_d, here, D, factor, pull_row, MASKED, AXIS)
            xhat, z = _affine(x, mean, rstd, weight, bias, d, D, MASKED, AXIS)
            gz, gw, zw, gwx, zwx = _sums(xhat, z, g, weight, AXIS)
        else:
            gz = tl.zeros([BLOCK_N], tl.float32)
            gw, zw, gwx, zwx = gz, gz, gz, gz
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                weight, bias = _channels(weight_ptr, d, D, 1.0, MASKED, AXIS), _channels(bias_ptr, d, D, 0.0, MASKED, AXIS)
                x = _load(x_row, d, x_at.stride_d, here, D, MASKED, AXIS)
                g = _received(grad_y_row, d, grad_y_at.stride_d, here, D, factor, pull_row, MASKED, AXIS)
                xhat, z = _affine(x, mean, rstd, weight, bias, d, D, MASKED, AXIS)
                part_gz, part_gw, part_zw, part_gwx, part_zwx = _sums(xhat, z, g, weight, AXIS)
                gz += part_gz
                gw += part_gw
                zw += part_zw
                gwx += part_gwx
                zwx += part_zwx
        # below the bound the length is a constant, and nothing is projected out; NaN stays NaN
        along = tl.where(inverse_norm < 1 / _SMALLEST_NORM, gz * inverse_norm * inverse_norm * inverse_norm,
                         tl.where(inverse_norm != inverse_norm, inverse_norm, 0.0))  # fmt: skip
        level = (inverse_norm * gw - along * zw) / D
        slope = inverse_norm * gwx - along * zwx
        if grad_rstd_ptr is not None:  # d rstd / dx = -rstd^2 * xhat / D
            slope += tl.load(grad_rstd_ptr + n, mask=here, other=0.0) * rstd
        slope = slope / D
        if grad_x_ptr is not None:
            grad_x_row = _pixels(grad_x_ptr, n, grad_x_at, GRAD_X_MAP)
        if WHOLE:
            dz, grad_x = _gradient(xhat, z, g, rstd, inverse_norm, along, level, slope, weight, AXIS)
            if grad_x_ptr is not None:
                _store(grad_x_row, d, grad_x_at.stride_d, here, D, grad_x, MASKED, AXIS)
            if partial_ptr is not None:
                to_weight += dz * xhat if AXIS == 1 else tl.sum(dz * xhat, 1 - AXIS)
                to_bias += dz if AXIS == 1 else tl.sum(dz, 1 - AXIS)
        else:
            tl.debug_barrier()  # grad_x may be grad_y: all of a pixel is read before any of it is written
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                weight, bias = _channels(weight_ptr, d, D, 1.0, MASKED, AXIS), _channels(bias_ptr, d, D, 0.0, MASKED, AXIS)
                x = _load(x_row, d, x_at.stride_d, here, D, MASKED, AXIS)
                g = _received(grad_y_row, d, grad_y_at.stride_d, here, D, factor, pull_row, MASKED, AXIS)
                xhat, z = _affine(x, mean, rstd, weight, bias, d, D, MASKED, AXIS)
                dz, grad_x = _gradient(xhat, z, g, rstd, inverse_norm, along, level, slope, weight, AXIS)
                if grad_x_ptr is not None:
                    _store(grad_x_row, d, grad_x_at.stride_d, here, D, grad_x, MASKED, AXIS)
                if partial_ptr is not None:
                    before = (d < D) & (tile > program)  # the program's first tile finds nothing
                    to_weight = tl.load(to_weight_ptr + d, mask=before, other=0.0) + tl.sum(dz * xhat, 1 - AXIS)
                    to_bias = tl.load(to_bias_ptr + d, mask=before, other=0.0) + tl.sum(dz, 1 - AXIS)
                    tl.store(to_weight_ptr + d, to_weight, mask=d < D)
                    tl.store(to_bias_ptr + d, to_bias, mask=d < D)
    if partial_ptr is not None and WHOLE:
        tl.store(to_weight_ptr + d, tl.sum(to_weight, 0) if AXIS == 1 else to_weight, mask=d < D)
        tl.store(to_bias_ptr + d, tl.sum(to_bias, 0) if AXIS == 1 else to_bias, mask=d < D)


@triton.jit
def add_partials_kernel(partial_ptr, grad_weight_ptr, grad_bias_ptr, programs, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """grad_weight and grad_bias [D], those given, from partial [programs,2,D], in program order."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    if grad_weight_ptr is not None:
        tl.store(grad_weight_ptr + d, _column_sums(partial_ptr, d, programs, D, BLOCK_P, BLOCK_D), mask=d < D)
    if grad_bias_ptr is not None:
        tl.store(grad_bias_ptr + d, _column_sums(partial_ptr + D, d, programs, D, BLOCK_P, BLOCK_D), mask=d < D)


@triton.jit
def _column_sums(partial_ptr, d, programs, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in range(0, programs, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < programs)[:, None] & (d < D)[None, :]
        total += tl.load(partial_ptr + p.to(tl.int64)[:, None] * (2 * D) + d[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _pixels(ptr, n, at, MAP: tl.constexpr):
    """[BLOCK_N] pointers to pixels n. MAP: that of pixel_offset; 4 more: they lie side by side unbeknown to Triton."""
    pointers = ptr + pixel_offset(n, at.hw, at.width, at.stride_b, at.stride_h, at.stride_w, MAP % 4)
    if MAP >= 4:
        # Threads side by side then take pixels side by side, not channels (Triton 3.6 would). That two of them might straddle
        # two rows of the map is harmless: their alignment is unknown, so each is loaded alone.
        pointers = tl.max_contiguous(pointers, 2)
    return pointers


@triton.jit
def _elements(row, d, stride_d, here, D, MASKED: tl.constexpr, AXIS: tl.constexpr):
    mask = tl.expand_dims(here, AXIS)
    if MASKED:
        mask = mask & tl.expand_dims(d < D, 1 - AXIS)
    return tl.expand_dims(row, AXIS) + tl.expand_dims(d.to(tl.int64), 1 - AXIS) * stride_d, mask


@triton.jit
def _load(row, d, stride_d, here, D, MASKED: tl.constexpr, AXIS: tl.constexpr):
    """[BLOCK_N,BLOCK_D] fp32: channels d of the pixels at `row`; 0 where there are none."""
    pointers, mask = _elements(row, d, stride_d, here, D, MASKED, AXIS)
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _pulled(pull, n, here, D):
    """[BLOCK_N] factors and pointers to the rows of pixels n; None without a `Pull`."""
    if pull is None:
        return None, None
    else:
        target = tl.load(pull.target + n, mask=here, other=-1)
        factor = tl.load(pull.factor + n, mask=here & (target >= 0), other=0.0)
        return factor, pull.rows + tl.maximum(target, 0) * D


@triton.jit
def _received(row, d, stride_d, here, D, factor, pull_row, MASKED: tl.constexpr, AXIS: tl.constexpr):
    """[BLOCK_N,BLOCK_D] fp32: what the embedding of the pixels at `row` receives in channels d."""
    g = _load(row, d, stride_d, here, D, MASKED, AXIS)
    if factor is not None:
        # a row that is not wanted is not read: it may hold what must not be multiplied by 0
        g += tl.expand_dims(factor, AXIS) * _load(pull_row, d, 1, here & (factor != 0.0), D, MASKED, AXIS)
    return g


@triton.jit
def _store(row, d, stride_d, here, D, values, MASKED: tl.constexpr, AXIS: tl.constexpr):
    pointers, mask = _elements(row, d, stride_d, here, D, MASKED, AXIS)
    tl.store(pointers, values.to(row.dtype.element_ty), mask=mask)


@triton.jit
def _like(t, value):
    """A number as a tensor like t: sizes may be compile-time constants."""
    return tl.zeros_like(t) + value


@triton.jit
def _moments(x, center, d, D, MASKED: tl.constexpr, AXIS: tl.constexpr):
    """Sums over channels of x - center and of its square."""
    t = x - tl.expand_dims(center, AXIS)
    if MASKED:
        t = tl.where(tl.expand_dims(d < D, 1 - AXIS), t, 0.0)
    return tl.sum(t, AXIS), tl.sum(t * t, AXIS)


@triton.jit
def _channels(ptr, d, D, other: tl.constexpr, MASKED: tl.constexpr, AXIS: tl.constexpr):
    """[1,BLOCK_D] of weight or bias; `other` where it is not given, 0 where there is no channel."""
    if ptr is None:
        channels = tl.full(d.shape, other, tl.float32)
    elif MASKED:
        channels = tl.load(ptr + d, mask=d < D, other=0.0)
    else:
        channels = tl.load(ptr + d)
    return tl.expand_dims(channels, 1 - AXIS)


@triton.jit
def _affine(x, mean, rstd, weight, bias, d, D, MASKED: tl.constexpr, AXIS: tl.constexpr):
    """Normalised x and z, both 0 where there is no channel."""
    xhat = (x - tl.expand_dims(mean, AXIS)) * tl.expand_dims(rstd, AXIS)
    if MASKED:
        xhat = tl.where(tl.expand_dims(d < D, 1 - AXIS), xhat, 0.0)
    return xhat, xhat * weight + bias


@triton.jit
def _inverse_length(squares):
    """1 / max(|z|, 1e-12); but 0 for z = 0, which makes y and its gradient 0. NaN stays NaN."""
    length = tl.sqrt_rn(squares)
    return tl.where(length == 0, 0.0, tl.div_rn(1.0, tl.where(length < _SMALLEST_NORM, _SMALLEST_NORM, length)))


@triton.jit
def _sums(xhat, z, g, weight, AXIS: tl.constexpr):
    """[BLOCK_N] sums over channels of g*z, g*w, z*w, g*w*xhat and z*w*xhat: all that a pixel's gradient needs, in one pass."""
    gw = g * weight
    zw = z * weight
    return tl.sum(g * z, AXIS), tl.sum(gw, AXIS), tl.sum(zw, AXIS), tl.sum(gw * xhat, AXIS), tl.sum(zw * xhat, AXIS)


@triton.jit
def _gradient(xhat, z, g, rstd, inverse_norm, along, level, slope, weight, AXIS: tl.constexpr):
    """Gradients of z and x."""
    dz = tl.expand_dims(inverse_norm, AXIS) * g - tl.expand_dims(along, AXIS) * z
    grad_x = dz * weight - tl.expand_dims(level, AXIS) - xhat * tl.expand_dims(slope, AXIS)
    return dz, tl.expand_dims(rstd, AXIS) * grad_x
