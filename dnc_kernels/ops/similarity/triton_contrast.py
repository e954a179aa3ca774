"""Triton kernel of subcentroid_cross_entropy for few channels in 16 bits; triton_contrast_bands.py has the other.

    s[n,m] = <x_n, p_m>;  loss = logsumexp_m(s / T) - s[target] / T;  dX = (sum_m softmax_m p_m - p_target) * scale / T
    without a target: the terms of the target are left out, and scores[n,c] = max_k s, its winner k and own[n,k] =
    s[n, label, k] come out of the same product.
    reads x [N,D] once, target or labels [N], packed rows [M,D] from L2 once a program; writes loss [N], dX [N,D], and scores
    and winner [N,C], own [N,K].
    floors on an H100 (800 TF/s bf16, 3.0 TB/s), ADE20K N=131072 M=1500 D=256: 4*N*M*D = 201 GFLOP = 252 us (2*N*M*D without
    a gradient: 126 us); 2*N*D*2 + N*12 = 136 MB = 45 us, with scores, winner and own N*C*5 + N*K*4 = 104 MB more, 79 us.
Plan: attention whose keys are its values. A program owns BLOCK_N pixels, whose features stay in shared memory, and sweeps the
rows BLOCK_M at a time: one load serves s = x p^T and, after an online softmax, acc = acc * alpha + exp(s - top) p, [BLOCK_N, D]
in float32 registers. The target's row is gathered for s[target] before the sweep and for its pull after it. With scores the
rows come as [class tile][k tile][copy][class] (triton_pack.Slots), so that the maximum over K is element by element; scores of
a class tile are written when its last k has passed. Similarities with the own sub-centroids are stored as they pass, in class
tiles between the program's least and greatest label. Without scores a program none of whose pixels counts sweeps nothing.
Registers are what limits the tile: 128 of 255 hold sums at D = 256 with 128 pixels in 8 warps.
exp2 is the hardware's, within 2 ulp (PTX ISA, ex2.approx.ftz.f32), of exponents that are at most 0.
Every pixel's results depend on that pixel alone: deterministic. Reference: `subcentroid_cross_entropy` and
`scores_and_contrast_into` in reference.py.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..._tensors import pixel_count
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
    rounded,
    tile_of,
    vectors,
)
from . import triton_contrast_bands as bands
from .calls import ContrastCall, ContrastOut, SweepCall, SweepOut
from .triton_contrast_bands import FAMILY, Scored, counted_pixels, score_step, store_gradient, store_own, store_scores
from .triton_pack import Slots, load_x, pack_rows, slots_of

#: Most channels whose float32 sums stay in registers beside the rest.
FUSED_CHANNELS = 256


@triton.jit
def _subcentroid_cross_entropy_kernel(
    x_ptr, rows_ptr, index_ptr, scale_ptr, loss_ptr, grad_ptr, scores_ptr, winner_ptr, own_ptr,
    x_at, grad_at, scores_at, winner_at, N, D, C, K, tiles, k_tiles, ignore_index, inverse_t, rate, zero,
    X_MAP: tl.constexpr, GRAD_MAP: tl.constexpr, SCORES_MAP: tl.constexpr, WINNER_MAP: tl.constexpr,
    WIDTH: tl.constexpr, COPIES: tl.constexpr, SMALL_K: tl.constexpr, EVEN_D: tl.constexpr, EVEN_M: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # with a target C is the number of sub-centroids and K = 1: every sub-centroid is a class of its own, and has no scores
    TARGET: tl.constexpr = scores_ptr is None
    first = tl.program_id(0) * BLOCK_N
    row = tl.arange(0, BLOCK_N)
    inside = first + row < N
    n = first + row
    d = tl.arange(0, BLOCK_D)
    x = load_x(x_ptr + offset_of(n, x_at, X_MAP), inside, d, D, x_at.stride_d, EVEN_D, X_MAP)  # [BLOCK_N, BLOCK_D]
    index = tl.load(index_ptr + n, mask=inside, other=-1)
    counted = counted_pixels(index, ignore_index, C, TARGET)
    steps = tiles
    if TARGET:
        p_target = tl.load(rows_ptr + tl.where(counted, index, 0)[:, None] * BLOCK_D + d[None, :])
        own = tl.sum(x.to(tl.float32) * p_target.to(tl.float32), axis=1)
        steps = tl.where(tl.max(counted.to(tl.int32), axis=0) > 0, tiles, 0)
    else:
        k = tl.arange(0, SMALL_K)
        no_row = (inside & ~counted)[:, None] & (k < K)[None, :]
        at = n.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(own_ptr + at, tl.zeros((BLOCK_N, SMALL_K), tl.float32), mask=no_row)
        first_label = tl.min(tl.where(counted, index, C), axis=0)
        last_label = tl.max(tl.where(counted, index, -1), axis=0)

    column = tl.arange(0, BLOCK_M)
    p_ptrs = rows_ptr + column[:, None] * BLOCK_D + d[None, :]
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    best = tl.full((BLOCK_N, WIDTH), float("-inf"), tl.float32)
    win = tl.zeros((BLOCK_N, WIDTH // 4), tl.int32)
    class0 = 0
    k0 = 0
    for _ in range(steps):
        p = tl.load(p_ptrs)  # [BLOCK_M, BLOCK_D]
        p_ptrs += BLOCK_M * BLOCK_D
        s = dot(x, tl.trans(p), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PRECISION)
        of_class = class0 + column % WIDTH
        of_k = k0 + column // WIDTH
        if not EVEN_M:
            s = tl.where(((of_class < C) & (of_k < K))[None, :], s, float("-inf"))
        if not TARGET:
            if (first_label < class0 + WIDTH) & (last_label >= class0):
                store_own(own_ptr, index_ptr, s, first + row, N, class0, k0, C, K, COPIES)
            best, win = score_step(s, best, win, k0, COPIES)
        risen = tl.maximum(top, tl.max(s, axis=1))
        e = tl.exp2((s - risen[:, None]) * rate)
        alpha = tl.exp2((top - risen) * rate)
        total = total * alpha + tl.sum(e, axis=1)
        top = risen
        if grad_ptr is not None:
            acc = dot(rounded(e, p.dtype), p, acc * alpha[:, None], PRECISION)
        if not TARGET:
            k0 += COPIES
            if k0 == k_tiles * COPIES:
                store_scores(
                    scores_ptr, winner_ptr, scores_at, winner_at, best, win, first + row, N, class0, C, SCORES_MAP, WINNER_MAP
                )
                best = tl.full((BLOCK_N, WIDTH), float("-inf"), tl.float32)
                k0 = 0
                class0 += WIDTH
        else:
            class0 += WIDTH
        # addresses made of a pixel's number are not known to be the same in every step, so they do not wait in registers
        first += zero

    loss = top * inverse_t + tl.log(total)
    if TARGET:
        # the target is taken from the maximum first: both can be large where their difference is not
        loss = (top - own) * inverse_t + tl.log(total)
    inside = first + row < N
    n = first + row
    index = tl.load(index_ptr + n, mask=inside, other=-1)
    counted = counted_pixels(index, ignore_index, C, TARGET)
    tl.store(loss_ptr + n, tl.where(counted, loss, 0.0), mask=inside)
    if grad_ptr is not None:
        coefficient = inverse_t
        if not TARGET:
            coefficient = tl.load(scale_ptr) * inverse_t
        at = offset_of(n, grad_at, GRAD_MAP)
        store_gradient(
            grad_ptr, acc, coefficient / total, coefficient, rows_ptr, index, counted, at, inside, 0, D, grad_at.stride_d,
            BLOCK_D, TARGET, BLOCK_D // 64 if BLOCK_D > 64 else 1,
        )  # fmt: skip


def _shared_bytes(use: Mapping[str, Any], shape: Mapping[str, int]) -> int:
    """Shared memory: the tile of x and the rows of a step, in 16 bits, and the weights between the products."""
    rows = kept_rows(use["BLOCK_N"], use["BLOCK_M"], use, shape)
    if shape["tcgen05"]:  # both products read a step's rows, the second while the first has the next
        rows += use["BLOCK_M"]
    return 2 * rows * shape["D"] + SCRATCH


class _Contrast(NamedTuple):
    """How a sweep is launched; None for what comes of scores, where there are none."""

    launch: Plan
    block_m: int
    block_d: int
    slots: Slots | None


@planned
def _plan(
    x: Tensor, centroids: Tensor, grad_x: Tensor | None, scores: Tensor | None, winner: Tensor | None, precision: str
) -> _Contrast:
    n, (classes, k, channels), at = pixel_count(x), centroids.shape, pixels_of(x)
    block_d = tile_of(channels)
    use = configuration(
        FAMILY, "subcentroid_cross_entropy", x.device, _shared_bytes, N=n, C=classes, K=k, D=block_d, grad=grad_x is not None,
        scored=scores is not None, even=vectors(x, at),
    )  # fmt: skip
    block_m = use["BLOCK_M"]
    slots = order = slots_of(classes, k, block_m) if scores is not None else None
    if order is None:
        # every sub-centroid is a class of its own, in the order that targets count in
        classes, k = classes * k, 1
        order = Slots(block_m, 1, 1, cdiv(classes, block_m))
    tensors = (x, grad_x, scores, winner)
    addresses = tuple(None if t is None else pixels_of(t) for t in tensors)
    maps = (0 if a is None else map_rank(a) for a in addresses)
    options = {
        **dict(zip(("X_MAP", "GRAD_MAP", "SCORES_MAP", "WINNER_MAP"), maps, strict=True)), "WIDTH": order.width,
        "COPIES": order.copies, "SMALL_K": tile_of(k, None, 1), "EVEN_D": block_d == channels,
        "EVEN_M": classes % order.width == 0 and k % order.copies == 0, "PRECISION": precision, "BLOCK_D": block_d, **use,
    }  # fmt: skip
    arguments = (*addresses, n, channels, classes, k, order.tiles, order.k_tiles)
    return _Contrast(Plan((cdiv(n, use["BLOCK_N"]),), arguments, options), block_m, block_d, slots)


def subcentroid_cross_entropy(call: ContrastCall, out: ContrastOut) -> None:
    """Losses, NaN for a counted pixel with a non-finite feature, and, where given, the gradient.

    Sub-centroids are rounded to the dtype of x. A target outside [0,C*K) is ignored.
    """
    _sweep(call, call.target, call.ignore_index, None, out, (None, None, None))


def sweep_packing(
    x: Tensor, centroids: Tensor, grad_x: Tensor | None, scores: Tensor, winner: Tensor
) -> tuple[int, int, Slots | None] | None:
    """How `scores_and_contrast` wants its rows; None: it packs them itself."""
    if _in_bands(x, centroids):
        return None
    plan = _plan(x, centroids, grad_x, scores, winner, dot_precision(x))
    return plan.block_m, plan.block_d, plan.slots


def _in_bands(x: Tensor, centroids: Tensor) -> bool:
    return x.element_size() != 2 or centroids.shape[2] > FUSED_CHANNELS


def scores_and_contrast(call: SweepCall, out: SweepOut, rows: Tensor | None = None) -> None:
    """Class scores, log-sum-exp and, where given, its gradient. A label outside [0,C) is none.

    rows: the sub-centroids, packed as `sweep_packing` says.
    """
    scored = (out.scores, out.winner, out.own_similarity)
    _sweep(call, call.labels, -1, call.scale, ContrastOut(out.loss, out.grad_x), scored, rows)


def _sweep(
    call: ContrastCall | SweepCall, index: Tensor, ignore_index: int, scale: Tensor | None, out: ContrastOut, scored: Scored,
    rows: Tensor | None = None,
) -> None:  # fmt: skip
    """index: targets where there are no scores, labels beside them."""
    x, centroids, temperature, (loss, grad_x), (scores, winner, own) = call.x, call.centroids, call.temperature, out, scored
    if _in_bands(x, centroids):
        bands.sweep(call, index, ignore_index, scale, out, scored)
        return
    plan = _plan(x, centroids, grad_x, scores, winner, dot_precision(x))
    if rows is None:
        rows, _ = pack_rows(centroids, "dot", x.dtype, plan.block_m, plan.block_d, plan.slots)
    launch(
        _subcentroid_cross_entropy_kernel, plan.launch.grid, x, rows, index, scale, loss, grad_x, scores, winner, own,
        *plan.launch.arguments, ignore_index, 1 / temperature, math.log2(math.e) / temperature, 0, **plan.launch.options,
    )  # fmt: skip
