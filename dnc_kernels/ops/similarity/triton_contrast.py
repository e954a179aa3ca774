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
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .._common import pixel_count
from .._triton import SCRATCH, dot, kept_rows, rounded, tile_of
from . import triton_contrast_bands as bands
from .triton_contrast_bands import addresses, counted_pixels, offset_of, score_step, store_gradient, store_own, store_scores
from .triton_pack import Slots, load_x, pack_rows, slots_of

_FAMILY = "similarity"
#: Most channels whose float32 sums stay in registers beside the rest.
FUSED_CHANNELS = 256


@triton.jit
def _subcentroid_cross_entropy_kernel(
    x_ptr, rows_ptr, index_ptr, scale_ptr, loss_ptr, grad_ptr, scores_ptr, winner_ptr, own_ptr,
    x_at, grad_at, scores_at, winner_at, N, D, C, K, tiles, k_tiles, ignore_index, inverse_t, rate, zero,
    X_MAP: tl.constexpr, GRAD_MAP: tl.constexpr, SCORES_MAP: tl.constexpr, WINNER_MAP: tl.constexpr,
    TARGET: tl.constexpr, GRAD: tl.constexpr, WIDTH: tl.constexpr, COPIES: tl.constexpr, SMALL_K: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_M: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # with a target C is the number of sub-centroids and K = 1: every sub-centroid is a class of its own
    first = tl.program_id(0) * BLOCK_N
    row = tl.arange(0, BLOCK_N)
    inside = first + row < N
    n = first + row
    at = offset_of(n, x_at, X_MAP)
    d = tl.arange(0, BLOCK_D)
    x = load_x(x_ptr, at, inside, d, D, x_at.stride_d, EVEN_D)  # [BLOCK_N, BLOCK_D]
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
        e = tl.exp2(s * rate - (risen * rate)[:, None])
        alpha = tl.exp2(top * rate - risen * rate)
        total = total * alpha + tl.sum(e, axis=1)
        top = risen
        if GRAD:
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
    if GRAD:
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


def subcentroid_cross_entropy(
    x: Tensor,
    centroids: Tensor,
    target: Tensor | None,
    temperature: float,
    ignore_index: int,
    scale: Tensor | None,
    loss: Tensor,
    grad_x: Tensor | None,
    labels: Tensor | None,
    scores: Tensor | None,
    winner: Tensor | None,
    own: Tensor | None,
) -> None:
    """Cross-entropy over all sub-centroids and its gradient, or their log-sum-exp beside class scores, from one product.

    Either `target` is given, or `labels`, `scale`, `scores`, `winner` and `own`.

    Args:
        x: [N,D] or [B,D,H,W], any strides; float32, float16, bfloat16.
        centroids: [C,K,D], any float dtype, any strides; rounded to the dtype of x.
        target: [N] int64, ``c*K + k``; what is outside [0,C*K) or equals `ignore_index` is left out.
        temperature: divides similarities.
        ignore_index: of `target`.
        scale: [] float32: `grad_x` is multiplied by it.
        loss: out, [N] float32: zero where left out; NaN for a counted pixel with a non-finite feature.
        grad_x: out, like x, any strides: the gradient of the sum of `loss`, exactly zero where left out. None: not made.
        labels: [N] int64; outside [0,C): `loss`, `grad_x` and `own` are zero.
        scores: out, [N,C] or [B,C,H,W] float32, any strides: NaN for a pixel with a non-finite feature.
        winner: out, the same in uint8.
        own: out, [N,K] float32, contiguous.
    """
    channels = centroids.shape[2]
    if x.element_size() != 2 or channels > FUSED_CHANNELS:
        bands.subcentroid_cross_entropy(
            x, centroids, target, temperature, ignore_index, scale, loss, grad_x, labels, scores, winner, own
        )
        return
    n, (classes, k, _) = pixel_count(x), centroids.shape
    block_d = tile_of(channels)
    use = _triton.configuration(
        _FAMILY, "subcentroid_cross_entropy", x.device, _shared_bytes, N=n, C=classes, K=k, D=block_d,
        grad=grad_x is not None, scored=target is None, even=_triton.vectors(x, _triton.pixels_of(x)),
    )  # fmt: skip
    block_n, block_m = use["BLOCK_N"], use["BLOCK_M"]
    slots = slots_of(classes, k, block_m) if target is None else None
    rows, _ = pack_rows(centroids, "dot", x.dtype, block_m, block_d, slots)
    index = labels if target is None else target
    if slots is None:
        # every sub-centroid is a class of its own, in the order that targets count in
        classes, k = classes * k, 1
        slots = Slots(block_m, 1, 1, len(rows) // block_m)
        scores = winner = own = scale = loss
    assert index is not None and scores is not None and winner is not None
    out = x if grad_x is None else grad_x
    maps = tuple(map(addresses, (x, out, scores, winner)))
    x_map, grad_map, scores_map, winner_map = map(_triton.map_rank, maps)
    _triton.launch(
        _subcentroid_cross_entropy_kernel, (triton.cdiv(n, block_n),), x, rows, index, scale, loss, out, scores, winner, own,
        *maps, n, channels, classes, k, slots.tiles, slots.k_tiles, ignore_index, 1 / temperature,
        math.log2(math.e) / temperature, 0, X_MAP=x_map, GRAD_MAP=grad_map, SCORES_MAP=scores_map, WINNER_MAP=winner_map,
        TARGET=target is not None, GRAD=grad_x is not None, WIDTH=slots.width, COPIES=slots.copies,
        SMALL_K=triton.next_power_of_2(k), EVEN_D=block_d == channels,
        EVEN_M=classes % slots.width == 0 and k % slots.copies == 0, PRECISION=_triton.dot_precision(x), BLOCK_D=block_d, **use,
    )  # fmt: skip
