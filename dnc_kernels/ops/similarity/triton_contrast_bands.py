"""Triton kernels of subcentroid_cross_entropy for many channels, or 32 bits: two products with the softmax between them.

    first:  s[n,m] = <x_n, p_m>; top[t,n] = max and sum[t,n] = sum exp((s - top)/T) over the BLOCK_M columns of tile t;
            weight[n,m] = exp((s - top)/T) in the dtype of x; scores, winner and own as in triton_contrast.py
    second: dX[n] = sum_m weight[n,m] exp((top[t] - lse)/T) p_m * scale / T - the target's pull; loss[n] from top and sum
    reads x once a class tile and rows once a pixel tile, through L2; weights [band, slots] are written once and read once a
    channel tile; a band of pixels is as long as 48 MiB of weights are.
    floors on an H100 (800 TF/s bf16, 3.0 TB/s): ImageNet N=4096 M=4000 D=2048: 4*N*M*D = 134 GFLOP = 168 us, weights
    2*N*M*2 = 66 MB = 22 us. ADE20K N=65536 M=1500 D=768: 302 GFLOP = 377 us, x and dX 201 MB = 67 us, weights 393 MB = 131 us.
Plan: two plain products, so that no sum of D channels has to stay in registers. A tile's own maximum makes its weights at most
1 without waiting for other tiles; the second product scales them in registers as they pass. Two launches a band.
exp2 is the hardware's, within 2 ulp (PTX ISA, ex2.approx.ftz.f32), of exponents that are at most 0.
Every pixel's results depend on that pixel alone: deterministic. Reference: `subcentroid_cross_entropy` and
`scores_and_contrast_into` in reference.py.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._tensors import pixel_count
from .._triton import (
    SCRATCH,
    Pixels,
    cdiv,
    configuration,
    dot,
    dot_precision,
    launch,
    map_rank,
    offset_of,
    pixels_of,
    planned,
    rounded,
    tile_of,
    vectors,
)
from .calls import ContrastCall, ContrastOut, SweepCall
from .triton_pack import Slots, best_of_copies, halves, load_x, pack_rows, slots_of

FAMILY = "similarity"
Scored = tuple[Tensor | None, Tensor | None, Tensor | None]  # scores, winner and own similarities, or none of them
_SCRATCH = 48 << 20  # bytes: they and a band of x stay in the L2 of a recent GPU, 40 to 126 MB


@triton.jit
def counted_pixels(index, ignore_index, C, TARGET: tl.constexpr):
    """Pixels that have a loss. index: targets or labels [BLOCK_N], below C."""
    counted = (index >= 0) & (index < C)
    if TARGET:
        counted &= index != ignore_index
    return counted


@triton.jit
def _packed(t):
    """The four quarters of the columns of t [N,W], numbers below 256, as the bytes of int32 [N,W/4]."""
    left, right = halves(t)
    a, b = halves(left)
    c, d = halves(right)
    return a | (b << 8) | (c << 16) | (d << 24)


@triton.jit
def score_step(s, best, win, k0, COPIES: tl.constexpr):
    """Class maxima best [BLOCK_N, W] and their k after one more tile s [BLOCK_N, COPIES*W] whose first k is k0.

    win [BLOCK_N, W/4]: the k of four classes in a register, which are few beside the sums of the gradient.
    """
    if COPIES == 1:
        value = s
        k = tl.full(s.shape, 0, tl.int32) + k0
    else:
        value, copy = best_of_copies(s, COPIES)
        k = k0 + copy
    better = value > best
    changed = _packed(tl.where(better, 255, 0))
    return tl.where(better, value, best), (win & ~changed) | (_packed(k) & changed)


@triton.jit
def _store_classes(
    scores_ptr, winner_ptr, scores_at, winner_at, best, win, n, N, class0, C, SCORES_MAP: tl.constexpr, WINNER_MAP: tl.constexpr
):
    c = class0 + tl.arange(0, best.shape[1])
    mask = (n < N)[:, None] & (c < C)[None, :]
    best = tl.where(tl.abs(best) < float("inf"), best, float("nan"))
    at = offset_of(n, scores_at, SCORES_MAP)[:, None] + c.to(tl.int64)[None, :] * scores_at.stride_d
    tl.store(scores_ptr + at, best, mask=mask)
    at = offset_of(n, winner_at, WINNER_MAP)[:, None] + c.to(tl.int64)[None, :] * winner_at.stride_d
    tl.store(winner_ptr + at, (win & 255).to(tl.uint8), mask=mask)


@triton.jit
def store_scores(
    scores_ptr, winner_ptr, scores_at, winner_at, best, win, n, N, class0, C, SCORES_MAP: tl.constexpr, WINNER_MAP: tl.constexpr
):
    """Write class maxima and winners of `score_step` from class0 on for pixels n < N; NaN for what is not finite."""
    left, right = halves(best)
    a, b = halves(left)
    c, d = halves(right)
    few = win.shape[1]
    _store_classes(scores_ptr, winner_ptr, scores_at, winner_at, a, win, n, N, class0, C, SCORES_MAP, WINNER_MAP)
    class0 += few
    _store_classes(scores_ptr, winner_ptr, scores_at, winner_at, b, win >> 8, n, N, class0, C, SCORES_MAP, WINNER_MAP)
    class0 += few
    _store_classes(scores_ptr, winner_ptr, scores_at, winner_at, c, win >> 16, n, N, class0, C, SCORES_MAP, WINNER_MAP)
    class0 += few
    _store_classes(scores_ptr, winner_ptr, scores_at, winner_at, d, win >> 24, n, N, class0, C, SCORES_MAP, WINNER_MAP)


@triton.jit
def store_own(own_ptr, labels_ptr, s, n, N, class0, k0, C, K, COPIES: tl.constexpr):
    """Write what similarities s [BLOCK_N, COPIES*WIDTH], from class0 and k0 on, have to do with the labels of pixels n < N.

    A row has one column of its label in every copy: the sum of that column and zeros brings it to the row without a scatter.
    """
    if COPIES > 1:
        left, right = halves(s)
        store_own(own_ptr, labels_ptr, left, n, N, class0, k0, C, K, COPIES // 2)
        store_own(own_ptr, labels_ptr, right, n, N, class0, k0 + COPIES // 2, C, K, COPIES // 2)
    else:
        label = tl.load(labels_ptr + n, mask=n < N, other=-1) - class0
        column = tl.arange(0, s.shape[1])
        own = tl.sum(tl.where(column[None, :] == label[:, None], s, 0.0), axis=1)
        hit = (label >= 0) & (label < tl.minimum(s.shape[1], C - class0)) & (k0 < K)
        tl.store(own_ptr + n.to(tl.int64) * K + k0, own, mask=hit)


@triton.jit
def store_gradient(
    grad_ptr, acc, factor, coefficient, rows_ptr, index, counted, at, inside, first_d, D, stride_d,
    padded_d, TARGET: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write acc * factor - coefficient * p_target [BLOCK_N, columns] from channel first_d on, PARTS of the columns one by one.

    Parts keep the rows of the targets from being in registers all at once.
    """
    if PARTS > 1:
        left, right = halves(acc)
        store_gradient(
            grad_ptr, left, factor, coefficient, rows_ptr, index, counted, at, inside, first_d, D, stride_d, padded_d,
            TARGET, PARTS // 2,
        )  # fmt: skip
        store_gradient(
            grad_ptr, right, factor, coefficient, rows_ptr, index, counted, at, inside, first_d + acc.shape[1] // 2, D,
            stride_d, padded_d, TARGET, PARTS // 2,
        )  # fmt: skip
    else:
        d = first_d + tl.arange(0, acc.shape[1])
        grad = acc * factor[:, None]
        if TARGET:
            p = tl.load(rows_ptr + tl.where(counted, index, 0)[:, None] * padded_d + d[None, :])
            grad -= p.to(tl.float32) * coefficient
        grad = rounded(tl.where(counted[:, None], grad, 0.0), grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + at[:, None] + d.to(tl.int64)[None, :] * stride_d, grad, mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def _subcentroid_weights_kernel(
    x_ptr, rows_ptr, index_ptr, weights_ptr, tops_ptr, sums_ptr, scores_ptr, winner_ptr, own_ptr, x_at, scores_at, winner_at,
    first, pixels, band, D, C, K, class_tiles, k_tiles, padded_d, slots, rate, zero,
    X_MAP: tl.constexpr, SCORES_MAP: tl.constexpr, WINNER_MAP: tl.constexpr, WIDTH: tl.constexpr, COPIES: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_M: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    TARGET: tl.constexpr = scores_ptr is None
    # neighbours share their pixels, which L2 then reads once
    class_tile = tl.program_id(0) % class_tiles
    place = tl.program_id(0) // class_tiles * BLOCK_N
    row = tl.arange(0, BLOCK_N)
    inside = place + row < pixels
    n = first + place + row
    x_pixels = x_ptr + offset_of(n, x_at, X_MAP)
    d = tl.arange(0, BLOCK_D)
    column = tl.arange(0, BLOCK_M)
    class0 = class_tile * WIDTH
    tile = class_tile * k_tiles
    p_ptrs = rows_ptr + tile.to(tl.int64) * BLOCK_M * padded_d + column[:, None] * padded_d + d[None, :]
    of_class = class0 + column % WIDTH
    if not TARGET:
        index = tl.load(index_ptr + n, mask=inside, other=-1)
        any_hit = tl.max(((index >= class0) & (index < class0 + WIDTH)).to(tl.int32), axis=0) > 0
    best = tl.full((BLOCK_N, WIDTH), float("-inf"), tl.float32)
    win = tl.zeros((BLOCK_N, WIDTH // 4), tl.int32)
    k0 = 0
    for _ in range(k_tiles):
        s = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in range(0, padded_d, BLOCK_D):
            x = load_x(x_pixels, inside, start + d, D, x_at.stride_d, EVEN_D, X_MAP)
            s = dot(x, tl.trans(tl.load(p_ptrs + start)), s, PRECISION)
        p_ptrs += BLOCK_M * padded_d
        of_k = k0 + column // WIDTH
        if not EVEN_M:
            s = tl.where(((of_class < C) & (of_k < K))[None, :], s, float("-inf"))
        top = tl.max(s, axis=1)
        e = tl.exp2((s - top[:, None]) * rate)
        part = tile.to(tl.int64) * band + place + row
        tl.store(tops_ptr + part, top)
        tl.store(sums_ptr + part, tl.sum(e, axis=1))
        if weights_ptr is not None:
            weight = (place + row).to(tl.int64)[:, None] * slots + (tile * BLOCK_M + column)[None, :]
            tl.store(weights_ptr + weight, rounded(e, weights_ptr.dtype.element_ty))
        if not TARGET:
            if any_hit:
                store_own(own_ptr, index_ptr, s, first + place + row, first + pixels, class0, k0, C, K, COPIES)
            best, win = score_step(s, best, win, k0, COPIES)
        k0 += COPIES
        tile += 1
        # addresses made of a pixel's place are not known to be the same in every step, so they do not wait in registers
        place += zero
    if not TARGET:
        store_scores(
            scores_ptr, winner_ptr, scores_at, winner_at, best, win, first + place + row, first + pixels, class0, C, SCORES_MAP,
            WINNER_MAP,
        )  # fmt: skip


@triton.jit
def _subcentroid_mix_kernel(
    x_ptr, rows_ptr, index_ptr, scale_ptr, weights_ptr, tops_ptr, sums_ptr, loss_ptr, grad_ptr, own_ptr, x_at, grad_at,
    first, pixels, band, D, C, K, d_tiles, tiles, padded_d, slots, ignore_index, inverse_t, rate,
    X_MAP: tl.constexpr, GRAD_MAP: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr, SMALL_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # own similarities are cleared where there are scores beside the loss
    TARGET: tl.constexpr = own_ptr is None
    # neighbours share their weights, which L2 then reads once
    d_tile = tl.program_id(0) % d_tiles
    local = tl.program_id(0) // d_tiles * BLOCK_N + tl.arange(0, BLOCK_N)  # place in the band
    inside = local < pixels
    n = first + local
    index = tl.load(index_ptr + n, mask=inside, other=-1)
    counted = counted_pixels(index, ignore_index, C, TARGET)
    row = rows_ptr + tl.where(counted, index, 0)[:, None] * padded_d  # of the target
    part = local.to(tl.int64)
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for _ in range(tiles):
        top = tl.maximum(top, tl.load(tops_ptr + part))
        part += band
    part = local.to(tl.int64)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for _ in range(tiles):
        total += tl.load(sums_ptr + part) * tl.exp2((tl.load(tops_ptr + part) - top) * rate)
        part += band

    if d_tile == 0:
        loss = top * inverse_t + tl.log(total)
        if TARGET:
            own = tl.zeros((BLOCK_N,), tl.float32)
            x_pixels = x_ptr + offset_of(n, x_at, X_MAP)
            small = tl.arange(0, 16)
            for start in range(0, padded_d, 16):
                x = load_x(x_pixels, inside, start + small, D, x_at.stride_d, False, X_MAP).to(tl.float32)
                own += tl.sum(x * tl.load(row + (start + small)[None, :]).to(tl.float32), axis=1)
            # the target is taken from the maximum first: both can be large where their difference is not
            loss = (top - own) * inverse_t + tl.log(total)
        else:
            k = tl.arange(0, SMALL_K)
            out = own_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
            tl.store(out, tl.zeros((BLOCK_N, SMALL_K), tl.float32), mask=(inside & ~counted)[:, None] & (k < K)[None, :])
        tl.store(loss_ptr + n, tl.where(counted, loss, 0.0), mask=inside)

    if grad_ptr is not None:
        d = d_tile * BLOCK_D + tl.arange(0, BLOCK_D)
        column = tl.arange(0, BLOCK_K)
        weight_ptrs = weights_ptr + local.to(tl.int64)[:, None] * slots + column[None, :]
        p_ptrs = rows_ptr + column.to(tl.int64)[:, None] * padded_d + d[None, :]
        acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for start in range(0, tiles * TILE, BLOCK_K):
            risen = tl.load(tops_ptr + (start // TILE) * band.to(tl.int64) + local)
            weight = tl.load(weight_ptrs).to(tl.float32) * tl.exp2((risen - top) * rate)[:, None]
            p = tl.load(p_ptrs)
            acc = dot(rounded(weight, p.dtype), p, acc, PRECISION)
            weight_ptrs += BLOCK_K
            p_ptrs += BLOCK_K * padded_d
        coefficient = inverse_t
        if not TARGET:
            coefficient = tl.load(scale_ptr) * inverse_t
        at = offset_of(n, grad_at, GRAD_MAP)
        store_gradient(
            grad_ptr, acc, coefficient / total, coefficient, rows_ptr, index, counted, at, inside, d_tile * BLOCK_D, D,
            grad_at.stride_d, padded_d, TARGET, BLOCK_D // 64 if BLOCK_D > 64 else 1,
        )  # fmt: skip


def _shared_bytes(use: Mapping[str, Any], shape: Mapping[str, int]) -> int:
    """Shared memory of either product: both factors of a step."""
    depth = tile_of(shape["D"], use["BLOCK_D"])
    numbers = (use["BLOCK_N"] + use["BLOCK_M"]) * depth if "BLOCK_M" in use else (use["BLOCK_N"] + depth) * use["BLOCK_K"]
    return use["num_stages"] * numbers * shape["bits"] // 8 + SCRATCH


class _Product(NamedTuple):
    """How one of both products is launched."""

    block_n: int
    programs: int  # for so many pixels
    at: tuple[Pixels | None, ...]
    sizes: tuple[int, ...]
    options: dict[str, Any]


class _Plan(NamedTuple):
    """How a sweep is launched."""

    tile: int  # rows of a step of the first product
    depth: int  # channels of a step of either, at most
    slots: Slots | None  # None: without scores
    tiles: int
    weights: _Product
    mix: _Product


@planned
def _plan(
    x: Tensor, centroids: Tensor, grad_x: Tensor | None, scores: Tensor | None, winner: Tensor | None, precision: str
) -> _Plan:
    n, (classes, k, channels), at = pixel_count(x), centroids.shape, pixels_of(x)
    shape = {"N": n, "C": classes, "K": k, "D": channels, "bits": 8 * x.element_size(), "even": vectors(x, at)}
    use, mix = (
        configuration(FAMILY, kernel, x.device, _shared_bytes, **shape) for kernel in ("subcentroid_weights", "subcentroid_mix")
    )
    tile = use["BLOCK_M"]
    use["BLOCK_D"], mix["BLOCK_D"] = tile_of(channels, use["BLOCK_D"]), tile_of(channels, mix["BLOCK_D"])
    mix["BLOCK_K"] = min(mix["BLOCK_K"], tile)
    slots = order = slots_of(classes, k, tile) if scores is not None else None
    if order is None:
        # every sub-centroid is a class of its own, in the order that targets count in
        classes, k = classes * k, 1
        order = Slots(tile, 1, 1, cdiv(classes, tile))
    depth = max(use["BLOCK_D"], mix["BLOCK_D"])
    padded, count = cdiv(channels, depth) * depth, order.tiles * tile
    grad_at, scores_at, winner_at = (None if t is None else pixels_of(t) for t in (grad_x, scores, winner))
    x_map, grad_map, scores_map, winner_map = (0 if a is None else map_rank(a) for a in (at, grad_at, scores_at, winner_at))
    d_tiles = 1 if grad_x is None else cdiv(channels, mix["BLOCK_D"])
    weights = {
        "X_MAP": x_map, "SCORES_MAP": scores_map, "WINNER_MAP": winner_map, "WIDTH": order.width, "COPIES": order.copies,
        "EVEN_D": padded == channels, "EVEN_M": classes % order.width == 0 and k % order.copies == 0, "PRECISION": precision,
        **use,
    }  # fmt: skip
    mixed = {
        "X_MAP": x_map, "GRAD_MAP": grad_map, "PRECISION": precision, "TILE": tile, "SMALL_K": tile_of(k, None, 1), **mix
    }  # fmt: skip
    sizes = (channels, classes, k, order.class_tiles, order.k_tiles, padded, count)
    mix_sizes = (channels, classes, k, d_tiles, order.tiles, padded, count)
    first = _Product(use["BLOCK_N"], order.class_tiles, (at, scores_at, winner_at), sizes, weights)
    second = _Product(mix["BLOCK_N"], d_tiles, (at, grad_at), mix_sizes, mixed)
    return _Plan(tile, depth, slots, order.tiles, first, second)


def sweep(
    call: ContrastCall | SweepCall, index: Tensor, ignore_index: int, scale: Tensor | None, out: ContrastOut, scored: Scored
) -> None:
    """Losses and, where given, the gradient and class scores, for any number of channels."""
    x, centroids, temperature, (loss, grad_x), (scores, winner, own) = call.x, call.centroids, call.temperature, out, scored
    n, plan = pixel_count(x), _plan(x, centroids, grad_x, scores, winner, dot_precision(x))
    rows, _ = pack_rows(centroids, "dot", x.dtype, plan.tile, plan.depth, plan.slots)
    # the longest band that fits the scratch, then bands of equal length
    weight_bytes = 0 if grad_x is None else len(rows) * x.element_size()
    longest = max(1, _SCRATCH // (weight_bytes + plan.tiles * 8))
    one, two = plan.weights, plan.mix
    unit = max(one.block_n, two.block_n)  # powers of two: whole tiles of both
    band = max(1, cdiv(n, max(1, cdiv(n, longest)) * unit)) * unit
    weights = None if grad_x is None else torch.empty((band, len(rows)), dtype=x.dtype, device=x.device)
    tops, sums = torch.empty((2, plan.tiles, band), dtype=torch.float32, device=x.device)
    rate = math.log2(math.e) / temperature
    for first in range(0, n, band):
        pixels = min(band, n - first)
        launch(
            _subcentroid_weights_kernel, (cdiv(pixels, one.block_n) * one.programs,), x, rows, index, weights, tops, sums,
            scores, winner, own, *one.at, first, pixels, band, *one.sizes, rate, 0, **one.options,
        )  # fmt: skip
        launch(
            _subcentroid_mix_kernel, (cdiv(pixels, two.block_n) * two.programs,), x, rows, index, scale, weights, tops, sums,
            loss, grad_x, own, *two.at, first, pixels, band, *two.sizes, ignore_index, 1 / temperature, rate, **two.options,
        )  # fmt: skip
