"""Triton kernels of nearest_centroid and centroid_distance.

    s[n,m] = <x_n, p_m> (dot), <x_n, p_m>/(|x_n||p_m|) (cosine), 2<x_n, p_m> - |p_m|^2 - |x_n|^2 (sqeuclidean), m = c*K + k
    nearest: (label, sub, score)[n] = max_m s, the lowest m on ties. distance: out[n,m] = 1 - s (cosine), -s (sqeuclidean)
    nearest reads x [N,D] once (again, from L2, for |x|^2) and the packed rows [M,D] from L2 once a program, writes 20 bytes a
    pixel.
    distance reads both once a tile, through L2, and writes [N,M] float32.
    floors on an H100 (800 TF/s bf16, 3.0 TB/s), ADE20K N=131072 M=1500 D=256: nearest 2*N*M*D = 101 GFLOP = 126 us, and
    N*D*2 + N*20 = 70 MB = 23 us; distance 101 GFLOP = 126 us, and N*M*4 + N*D*2 = 853 MB = 285 us.
Plan, nearest: a program owns BLOCK_N pixels and sweeps the rows, BLOCK_M at a time. Its x stays in shared memory while D <=
KEEP_D, else both are read BLOCK_D channels at a time. The columns of a tile meet in a knock-out between COPIES strips of it,
then a running maximum, element by element; columns meet each other once, after the sweep. Left beats right and early beats
late on ties, so the lowest m wins. An element costs three instructions (compare, two selects), which other warps' products
hide in part. What is left of the last tile repeats the last row and is clamped to it. Where pixels are too few to fill the
device, programs sweep parts of the rows, and a second launch takes the best part, in their order.
Plan, distance: a product of BLOCK_N x BLOCK_M tiles; |x|^2 is made from the channels as they pass.
Every pixel's result depends on that pixel alone: deterministic. Reference: `nearest_centroid`, `centroid_distance` in
reference.py.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._tensors import pixel_count
from .. import _triton
from .._triton import (
    SCRATCH,
    Plan,
    cdiv,
    configuration,
    dot,
    dot_precision,
    kept_rows,
    launch,
    map_rank,
    offset_of,
    pixels_of,
    planned,
    tile_of,
    vectors,
)
from .calls import DistanceCall, NearestCall, NearestOut
from .triton_pack import best_of_copies, load_x, pack_rows

_FAMILY = "similarity"
_MOST_PARTS = 16  # of a sweep: what they leave behind stays small beside the pixels


@triton.jit
def _nearest_centroid_kernel(
    x_ptr, rows_ptr, bias_ptr, top_ptr, m_ptr, label_ptr, sub_ptr, score_ptr, x_at, N, D, M, K, m_tiles, n_tiles, padded_d,
    X_MAP: tl.constexpr, METRIC: tl.constexpr, PRECISION: tl.constexpr, KEEP: tl.constexpr, EVEN: tl.constexpr,
    COPIES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # a program sweeps m_tiles tiles; with top_ptr they are part of all, and `_finish_nearest_kernel` takes the best
    part = tl.program_id(0) // n_tiles
    first_m = part * m_tiles * BLOCK_M
    n = tl.program_id(0) % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    pixels = x_ptr + offset_of(n, x_at, X_MAP)
    d = tl.arange(0, BLOCK_D)
    column = tl.arange(0, BLOCK_M)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    if METRIC != "dot":
        # a few channels at a time: all of them at once would not stay in registers
        few = tl.arange(0, 16)
        for start in range(0, padded_d, 16):
            x = load_x(pixels, inside, start + few, D, x_at.stride_d, EVEN, X_MAP).to(tl.float32)
            squares += tl.sum(x * x, axis=1)
    if KEEP:
        kept = load_x(pixels, inside, d, D, x_at.stride_d, EVEN, X_MAP)  # [BLOCK_N, BLOCK_D]

    best = tl.full((BLOCK_N, BLOCK_M // COPIES), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK_N, BLOCK_M // COPIES), tl.int32)
    # [BLOCK_M, BLOCK_D]
    p_ptr = rows_ptr + first_m.to(tl.int64) * padded_d + column[:, None] * padded_d + d[None, :]
    for t in range(m_tiles):
        if KEEP:
            p = tl.load(p_ptr)
            s = dot(kept, tl.trans(p), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PRECISION)
        else:
            s = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for start in range(0, padded_d, BLOCK_D):
                piece = load_x(pixels, inside, start + d, D, x_at.stride_d, EVEN, X_MAP)
                p = tl.load(p_ptr + start)
                s = dot(piece, tl.trans(p), s, PRECISION)
        p_ptr += BLOCK_M * padded_d
        if METRIC == "sqeuclidean":
            s = 2 * s + tl.load(bias_ptr + first_m + t * BLOCK_M + column)[None, :]
        if COPIES == 1:
            better = s > best
            best = tl.where(better, s, best)
            where = tl.where(better, t, where)  # [BLOCK_N, BLOCK_M]
        else:
            top, copy = best_of_copies(s, COPIES)
            better = top > best
            best = tl.where(better, top, best)
            where = tl.where(better, t * COPIES + copy, where)

    top = tl.max(best, axis=1)
    # the strip of a winner and its place in it make its column
    m = where * (BLOCK_M // COPIES) + tl.arange(0, BLOCK_M // COPIES)[None, :]
    m = tl.min(tl.where(best == top[:, None], m, 2147483647), axis=1)
    m = tl.minimum(first_m + m, M - 1)
    if top_ptr is not None:
        tl.store(top_ptr + part.to(tl.int64) * N + n, top, mask=n < N)
        tl.store(m_ptr + part.to(tl.int64) * N + n, m, mask=n < N)
        tl.store(score_ptr + n, squares, mask=n < N)  # every part stores the same
    else:
        _store_nearest(label_ptr, sub_ptr, score_ptr, top, m, squares, n, N, K, METRIC)


@triton.jit
def _store_nearest(label_ptr, sub_ptr, score_ptr, score, m, squares, n, N, K, METRIC: tl.constexpr):
    if METRIC == "cosine":
        score = score / tl.maximum(tl.sqrt_rn(squares), 1e-12)
    if METRIC == "sqeuclidean":
        score = score - squares
    # where all similarities are NaN, nothing beat minus infinity
    finite = tl.abs(score) < float("inf")
    tl.store(label_ptr + n, tl.where(finite, m // K, -1).to(tl.int64), mask=n < N)
    tl.store(sub_ptr + n, tl.where(finite, m % K, -1).to(tl.int64), mask=n < N)
    tl.store(score_ptr + n, tl.where(finite, score, float("nan")), mask=n < N)


@triton.jit
def _finish_nearest_kernel(
    top_ptr, m_ptr, label_ptr, sub_ptr, score_ptr, N, K, parts, METRIC: tl.constexpr, BLOCK: tl.constexpr
):
    """The best of `parts` winners a pixel, the first on ties; score holds |x|^2 before it holds the score."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    m = tl.zeros((BLOCK,), tl.int32)
    at = n.to(tl.int64)
    for _ in range(parts):
        other = tl.load(top_ptr + at, mask=n < N, other=float("-inf"))
        other_m = tl.load(m_ptr + at, mask=n < N, other=0)
        m = tl.where(other > top, other_m, m)
        top = tl.where(other > top, other, top)
        at += N
    squares = tl.load(score_ptr + n, mask=n < N, other=0.0)
    _store_nearest(label_ptr, sub_ptr, score_ptr, top, m, squares, n, N, K, METRIC)


def _depth(use: Mapping[str, Any], channels: int) -> tuple[int, bool]:
    """Channels of a step, and whether they are all of them, so that the tile of x is kept."""
    whole = tile_of(channels)
    kept = whole <= use["KEEP_D"]
    return whole if kept else min(use["BLOCK_D"], whole), kept


def _nearest_bytes(use: Mapping[str, Any], shape: Mapping[str, int]) -> int:
    """Shared memory: the tile of x, or its part of a step, and the rows of a step; what follows the sweep uses it again."""
    depth, kept = _depth(use, shape["D"])
    pixels, rows = use["BLOCK_N"], use["BLOCK_M"]
    tile = kept_rows(pixels, rows, use, shape) if kept else use["num_stages"] * (pixels + rows)
    scratch = 1024 if shape["even"] else SCRATCH
    if shape["tcgen05"]:  # from tensor memory similarities may reach the maximum over copies through another layout
        scratch = max(scratch, 4 * pixels * rows + 1024)
    return max(tile * depth * shape["bits"] // 8 + scratch, SCRATCH)


def _distance_bytes(use: Mapping[str, Any], shape: Mapping[str, int]) -> int:
    """Shared memory: both factors of a step, or the distances on their way out."""
    step = use["num_stages"] * (use["BLOCK_N"] + use["BLOCK_M"]) * tile_of(shape["D"], use["BLOCK_D"]) * shape["bits"] // 8
    return max(step, 4 * use["BLOCK_N"] * use["BLOCK_M"]) + SCRATCH


class _Nearest(NamedTuple):
    """How the nearest sub-centroid is found."""

    launch: Plan
    block_m: int  # rows of a part of the sweep
    block_d: int
    parts: int


@planned
def _nearest_plan(x: Tensor, centroids: Tensor, metric: str, precision: str, processors: int) -> _Nearest:
    n, (classes, k, channels), at = pixel_count(x), centroids.shape, pixels_of(x)
    shape = {"N": n, "D": channels, "M": classes * k, "bits": 8 * x.element_size(), "even": vectors(x, at)}
    use = configuration(_FAMILY, "nearest_centroid", x.device, _nearest_bytes, **shape)
    block_d, kept = _depth(use, channels)
    block_m = use["BLOCK_M"]
    del use["KEEP_D"], use["BLOCK_D"]
    n_tiles, m_tiles = cdiv(n, use["BLOCK_N"]), cdiv(classes * k, block_m)
    # parts of the sweep where the pixels alone leave processors idle; then every part has as many tiles
    parts = max(1, min(m_tiles, processors // max(n_tiles, 1), _MOST_PARTS))
    m_tiles = cdiv(m_tiles, parts)
    parts = cdiv(classes * k, block_m * m_tiles)
    padded = cdiv(channels, block_d) * block_d
    options = {
        "X_MAP": map_rank(at), "METRIC": metric, "PRECISION": precision, "KEEP": kept, "EVEN": padded == channels,
        "BLOCK_D": block_d, **use,
    }  # fmt: skip
    arguments = (at, n, channels, classes * k, k, m_tiles, n_tiles, padded)
    return _Nearest(Plan((n_tiles * parts,), arguments, options), block_m * m_tiles, block_d, parts)


def nearest_centroid(call: NearestCall, out: NearestOut) -> None:
    """Class, sub-centroid and similarity of the nearest sub-centroid of all; -1, -1, NaN without a finite one.

    Sub-centroids are rounded to the dtype of x.
    """
    x, centroids, metric, _ = call
    plan = _nearest_plan(x, centroids, metric, dot_precision(x), _triton.processors(x.device))
    rows, bias = pack_rows(centroids, metric, x.dtype, plan.block_m, plan.block_d)
    tops = indices = None
    if plan.parts > 1:
        tops = torch.empty((plan.parts, pixel_count(x)), dtype=torch.float32, device=x.device)
        indices = torch.empty_like(tops, dtype=torch.int32)
    one = plan.launch
    launch(_nearest_centroid_kernel, one.grid, x, rows, bias, tops, indices, *out, *one.arguments, **one.options)
    if plan.parts > 1:
        n, k = pixel_count(x), centroids.shape[1]
        launch(
            _finish_nearest_kernel, (cdiv(n, 256),), tops, indices, *out, n, k, plan.parts, METRIC=metric, BLOCK=256,
            num_warps=4,
        )  # fmt: skip


@triton.jit
def _centroid_distance_kernel(
    x_ptr, rows_ptr, bias_ptr, out_ptr, x_at, N, D, M, m_tiles, padded_d,
    X_MAP: tl.constexpr, METRIC: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # neighbours share their pixels, which L2 then reads once
    m_tile = tl.program_id(0) % m_tiles
    n = tl.program_id(0) // m_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    inside = n < N
    pixels = x_ptr + offset_of(n, x_at, X_MAP)
    p_ptr = rows_ptr + m_tile.to(tl.int64) * BLOCK_M * padded_d
    tile_rows = tl.arange(0, BLOCK_M)[:, None] * padded_d + d[None, :]
    s = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, padded_d, BLOCK_D):
        x = load_x(pixels, inside, start + d, D, x_at.stride_d, EVEN, X_MAP)
        p = tl.load(p_ptr + tile_rows + start)
        s = dot(x, tl.trans(p), s, PRECISION)
        squares += tl.sum(x.to(tl.float32) * x.to(tl.float32), axis=1)
    if METRIC == "cosine":
        length = tl.maximum(tl.sqrt_rn(squares), 1e-12)
        s = 1 - s / length[:, None]
    else:
        s = squares[:, None] - 2 * s - tl.load(bias_ptr + m)[None, :]
    out = out_ptr + n.to(tl.int64)[:, None] * M + m[None, :]
    tl.store(out, s, mask=inside[:, None] & (m < M)[None, :])


@planned
def _distance_plan(x: Tensor, centroids: Tensor, metric: str, precision: str) -> tuple[int, int, Plan]:
    """Rows and channels of a step, and the launch."""
    n, (classes, k, channels), at = pixel_count(x), centroids.shape, pixels_of(x)
    shape = {"N": n, "D": channels, "M": classes * k, "bits": 8 * x.element_size(), "even": vectors(x, at)}
    use = configuration(_FAMILY, "centroid_distance", x.device, _distance_bytes, **shape)
    block_m, block_d = use["BLOCK_M"], tile_of(channels, use.pop("BLOCK_D"))
    m_tiles, padded = cdiv(classes * k, block_m), cdiv(channels, block_d) * block_d
    options = {
        "X_MAP": map_rank(at), "METRIC": metric, "PRECISION": precision, "EVEN": padded == channels, "BLOCK_D": block_d, **use
    }  # fmt: skip
    arguments = (at, n, channels, classes * k, m_tiles, padded)
    return block_m, block_d, Plan((cdiv(n, use["BLOCK_N"]) * m_tiles,), arguments, options)


def centroid_distance(call: DistanceCall, out: Tensor) -> None:
    """Distance of every pixel to every sub-centroid, which is rounded to the dtype of x."""
    x, centroids, metric, _ = call
    block_m, block_d, plan = _distance_plan(x, centroids, metric, dot_precision(x))
    rows, bias = pack_rows(centroids, metric, x.dtype, block_m, block_d)
    launch(_centroid_distance_kernel, plan.grid, x, rows, bias, out, *plan.arguments, **plan.options)
