"""Triton kernels of class scores and their gradients. Reference: reference.py; launchers: triton.py.

    s[n,c,k] = <x[n], p[c,k]>                    dot
             = <x[n], p[c,k]> / (|x[n]| |p[c,k]|)   cosine
             = 2 <x[n], p[c,k]> - |p[c,k]|^2 - |x[n]|^2   sqeuclidean, which is -|x-p|^2
    r[n,c] = max_k s[n,c,k],  w[n,c] = the lowest k that reaches it

class_scores_kernel reads x [N,D] once and p [M,D] once a tile of pixels (from L2), and writes r [N,C] fp32 and w [N,C] uint8;
[N,C,K] stays in registers. FLOPs 2NMD; bytes N(D b + 5C), b bytes a feature. ADE20K (N=131072, M=1500, D=256, bf16): 101 GFLOP
over 800 TF/s = 126 us; 165 MB over 3.0 TB/s = 55 us: compute. Cityscapes/8 (N=262144, M=190): 26 GFLOP = 32 us; 159 MB = 53 us:
memory. scores_gradient_kernel is the transposed product, 2NMD FLOPs, with the sparse matrix dS[n,ck] = g[n,c] [w[n,c] = k] made
in registers. centroid_gradient_kernel is the third product, dS^T x.

Plan: sub-centroids are packed once as [class tile][group of k][k in group][class in tile][D], in the dtype of x
(triton_pack.Slots), so that a tile of the product holds BLOCK_K values of k for BLOCK_C classes and the max over k is element-
wise. A program owns BLOCK_N pixels; where D fits BLOCK_D the tile of x is loaded once and kept. Every sum has one order:
results repeat bit for bit.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from .._triton import dot, pixel_offset, rounded, wide_unless

DOT, COSINE, SQEUCLIDEAN = (tl.constexpr(i) for i in range(3))  # the order of METRICS


@triton.jit
def row_squares_kernel(
    x_ptr, square_ptr, N, D, hw, width, stride_b, stride_h, stride_w, stride_d,
    MAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """|x|^2 of every pixel [N] fp32, for the metrics that need it."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = x_ptr + pixel_offset(n, hw, width, stride_b, stride_h, stride_w, MAP)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        v = load_pixels(rows, n < N, d0, D, stride_d, BLOCK_D, MAP).to(tl.float32)
        total += tl.sum(v * v, 1)
    tl.store(square_ptr + n, total, mask=n < N)


@triton.jit
def load_pixels(rows, inside, d0, D, stride_d, BLOCK_D: tl.constexpr, MAP: tl.constexpr):
    """[BLOCK_N, BLOCK_D] of x from channel d0, zero beyond D and where not `inside`."""
    d = d0 + tl.arange(0, BLOCK_D)
    at = rows[:, None] + (wide_unless(d, MAP >= 3) * stride_d)[None, :]
    return tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def row_scale(square, METRIC: tl.constexpr):
    """What a product of the pixel is multiplied by, from |x|^2."""
    if METRIC == COSINE:
        return 1.0 / tl.maximum(tl.sqrt_rn(square), 1e-12)
    return tl.full(square.shape, 1.0, tl.float32)


@triton.jit
def class_tile(
    x,  # [BLOCK_N, BLOCK_D] with KEEP
    rows,  # [BLOCK_N] pointers to the pixels
    inside,  # [BLOCK_N]
    scale,  # [BLOCK_N] of `row_scale`
    square,  # [BLOCK_N] |x|^2 for sqeuclidean
    label,  # [BLOCK_N], -1: none
    own_rows,  # [BLOCK_N] pointers to own similarities
    tile,
    p_ptr,
    bias_ptr,
    K,
    D,
    DP,
    groups,
    stride_d,
    METRIC: tl.constexpr,
    OWN: tl.constexpr,
    KEEP: tl.constexpr,
    EVEN_K: tl.constexpr,
    MAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scores and winners [BLOCK_N, BLOCK_C] of one class tile; writes own similarities that lie in it."""
    j = tl.arange(0, BLOCK_K * BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    best = tl.full((BLOCK_N, BLOCK_C), float("-inf"), tl.float32)
    winner = tl.zeros((BLOCK_N, BLOCK_C), tl.int32)
    columns = tl.arange(0, BLOCK_C)
    if OWN:
        here = (label >= tile * BLOCK_C) & (label < (tile + 1) * BLOCK_C)
        any_here = tl.max(here.to(tl.int32), 0)
    for group in range(groups):
        m = (tile * groups + group).to(tl.int64) * (BLOCK_K * BLOCK_C)
        # one 64-bit base, 32-bit offsets inside the tile: they live in registers through the whole kernel
        p_tile = p_ptr + m * DP
        if KEEP:
            p = tl.load(p_tile + ((j * DP)[None, :] + d[:, None]))
            s = dot(x, p, tl.zeros((BLOCK_N, BLOCK_K * BLOCK_C), tl.float32), PRECISION)
        else:
            s = tl.zeros((BLOCK_N, BLOCK_K * BLOCK_C), tl.float32)
            for d0 in range(0, DP, BLOCK_D):
                part = load_pixels(rows, inside, d0, D, stride_d, BLOCK_D, MAP)
                p = tl.load(p_tile + d0 + ((j * DP)[None, :] + d[:, None]))
                s = dot(part, p, s, PRECISION)
        if METRIC == COSINE:
            s = s * scale[:, None]
        if METRIC == SQEUCLIDEAN:
            s = 2.0 * s + tl.load(bias_ptr + m + j)[None, :] - square[:, None]
        if not EVEN_K:
            # rows without a sub-centroid are zero, which may beat a negative similarity
            s = tl.where((group * BLOCK_K + j // BLOCK_C < K)[None, :], s, float("-inf"))
        if OWN:
            # neighbouring pixels share few classes: most tiles have nothing to write
            if any_here > 0:
                if BLOCK_K == 1:
                    own = tl.sum(tl.where((label - tile * BLOCK_C)[:, None] == columns[None, :], s, 0.0), 1)
                    tl.store(own_rows + group, own, mask=here)
                else:
                    k = group * BLOCK_K + tl.arange(0, BLOCK_K)
                    mine = (label - tile * BLOCK_C)[:, None, None] == columns[None, None, :]
                    own = tl.sum(tl.where(mine, tl.reshape(s, (BLOCK_N, BLOCK_K, BLOCK_C)), 0.0), 2)
                    tl.store(own_rows[:, None] + k[None, :], own, mask=here[:, None] & (k < K)[None, :])
        if BLOCK_K == 1:
            better = s > best
            best = tl.where(better, s, best)
            winner = tl.where(better, group, winner)
        else:
            top, at = tl.max(tl.reshape(s, (BLOCK_N, BLOCK_K, BLOCK_C)), 1, return_indices=True)
            better = top > best
            best = tl.where(better, top, best)
            winner = tl.where(better, group * BLOCK_K + at, winner)
    return best, winner


@triton.jit
def is_finite(v):
    """Neither NaN nor infinite."""
    return (v - v) == 0.0


@triton.jit
def class_scores_kernel(
    x_ptr,  # [N,D] or [B,D,H,W]
    p_ptr,  # packed
    bias_ptr,
    square_ptr,  # [N] |x|^2 unless the metric is dot
    labels_ptr,  # [N] int64, with OWN
    scores_ptr,  # [N,C] or [B,C,H,W] fp32
    winner_ptr,  # the same strides, uint8
    own_ptr,  # [N,K] fp32, with OWN
    N,
    C,
    K,
    D,
    DP,
    tiles,
    groups,
    span,  # class tiles a program
    hw,
    width,
    stride_b,
    stride_h,
    stride_w,
    stride_d,
    score_hw,
    score_width,
    score_stride_b,
    score_stride_h,
    score_stride_w,
    score_stride_c,
    METRIC: tl.constexpr,
    OWN: tl.constexpr,
    EVEN_K: tl.constexpr,
    MAP: tl.constexpr,
    SCORE_MAP: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
):
    """Scores, winners and own similarities of BLOCK_N pixels in `span` class tiles."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    rows = x_ptr + pixel_offset(n, hw, width, stride_b, stride_h, stride_w, MAP)
    score_rows = pixel_offset(n, score_hw, score_width, score_stride_b, score_stride_h, score_stride_w, SCORE_MAP)
    square = tl.zeros((BLOCK_N,), tl.float32)
    if METRIC != DOT:
        square = tl.load(square_ptr + n, mask=inside, other=0.0)
    scale = row_scale(square, METRIC)
    label = tl.full((BLOCK_N,), -1, tl.int32)
    own_rows = own_ptr + n.to(tl.int64) * K
    if OWN:
        label = tl.load(labels_ptr + n, mask=inside, other=-1)
        label = tl.where((label >= 0) & (label < C), label, -1).to(tl.int32)
        if tl.program_id(1) == 0:
            k = tl.arange(0, BLOCK_OWN)
            tl.store(own_rows[:, None] + k[None, :], 0.0, mask=(inside & (label < 0))[:, None] & (k < K)[None, :])
    x = 0
    if KEEP:
        x = load_pixels(rows, inside, 0, D, stride_d, BLOCK_D, MAP)
    for tile in range(tl.program_id(1) * span, tl.minimum((tl.program_id(1) + 1) * span, tiles)):
        best, winner = class_tile(
            x, rows, inside, scale, square, label, own_rows, tile, p_ptr, bias_ptr, K, D, DP, groups, stride_d,
            METRIC, OWN, KEEP, EVEN_K, MAP, PRECISION, BLOCK_N, BLOCK_C, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = inside[:, None] & (c < C)[None, :]
        at = score_rows[:, None] + (wide_unless(c, SCORE_MAP >= 3) * score_stride_c)[None, :]
        # a feature that is not finite makes every product of its pixel so
        best = tl.where(is_finite(best), best, float("nan"))
        tl.store(scores_ptr + at, best, mask=mask)
        tl.store(winner_ptr + at, winner.to(tl.uint8), mask=mask)


@triton.jit
def load_classes_of(rows, mask, c, stride_c, MAP: tl.constexpr):
    """[BLOCK_N, BLOCK_C] of a map of classes."""
    return tl.load(rows[:, None] + (wide_unless(c, MAP >= 3) * stride_c)[None, :], mask=mask, other=0)


@triton.jit
def add_class_tile(
    acc,  # [BLOCK_N, BLOCK_D]
    g,  # [BLOCK_N, BLOCK_C]
    winner,
    tile,
    d,  # [BLOCK_D] channels
    p_ptr,
    K,
    KP,
    DP,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Acc + dS p of one class tile, a k at a time: dS has the gradient of a class at its winner, zeros elsewhere.

    g and winners stay in the registers that feed the product; no row of another k is moved.
    """
    c = tl.arange(0, BLOCK_C)
    for k in range(K):
        m = (tile * KP + k).to(tl.int64) * BLOCK_C
        p = tl.load(p_ptr + m * DP + ((c * DP)[:, None] + d[None, :]))
        ds = rounded(tl.where(winner == k, g, 0.0), p.dtype)
        acc = dot(ds, p, acc, PRECISION)
    return acc


@triton.jit
def scores_gradient_kernel(
    g_ptr,  # gradient of the scores, [N,C] or [B,C,H,W] fp32
    winner_ptr,  # the same in uint8
    p_ptr,  # packed
    grad_ptr,  # gradient of the pixels, [N,D] or [B,D,H,W]
    total_ptr,  # [N] fp32: sum of dS over sub-centroids, with TOTAL
    N,
    C,
    K,
    D,
    KP,  # k of a packed tile
    DP,
    tiles,
    hw,
    width,
    stride_b,
    stride_h,
    stride_w,
    stride_d,
    score_hw,
    score_width,
    score_stride_b,
    score_stride_h,
    score_stride_w,
    score_stride_c,
    winner_hw,
    winner_width,
    winner_stride_b,
    winner_stride_h,
    winner_stride_w,
    winner_stride_c,
    TOTAL: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    MAP: tl.constexpr,
    SCORE_MAP: tl.constexpr,
    WINNER_MAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """DS p [BLOCK_N, BLOCK_D] from the gradient of the scores; what is left of other metrics is `metric_gradient_kernel`'s."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    score_rows = g_ptr + pixel_offset(n, score_hw, score_width, score_stride_b, score_stride_h, score_stride_w, SCORE_MAP)
    winner_rows = winner_ptr + pixel_offset(
        n, winner_hw, winner_width, winner_stride_b, winner_stride_h, winner_stride_w, WINNER_MAP
    )
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(tiles):
        c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = inside[:, None] & (c < C)[None, :]
        g = load_classes_of(score_rows, mask, c, score_stride_c, SCORE_MAP).to(tl.float32)
        winner = load_classes_of(winner_rows, mask, c, winner_stride_c, WINNER_MAP).to(tl.int32)
        if TOTAL:
            total += tl.sum(g, 1)
        acc = add_class_tile(acc, g, winner, tile, d, p_ptr, K, KP, DP, PRECISION, BLOCK_C)
    rows = grad_ptr + pixel_offset(n, hw, width, stride_b, stride_h, stride_w, MAP)
    target = rows[:, None] + (wide_unless(d, MAP >= 3) * stride_d)[None, :]
    mask = inside[:, None] & (d < D)[None, :]
    if ACCUMULATE:
        acc += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, rounded(acc, grad_ptr.dtype.element_ty), mask=mask)
    if TOTAL:
        if tl.program_id(1) == 0:
            tl.store(total_ptr + n, total, mask=inside)


@triton.jit
def own_gradient_kernel(
    grad_own_ptr,  # [N,K] fp32
    labels_ptr,  # [N] int64
    centroids_ptr,  # [C,K,D] contiguous, fp32 or the dtype of the gradient
    grad_ptr,  # gradient of the pixels, [N,D] or [B,D,H,W]
    N,
    C,
    K,
    D,
    hw,
    width,
    stride_b,
    stride_h,
    stride_w,
    stride_d,
    ACCUMULATE: tl.constexpr,
    MAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad[n] = (grad[n] +) sum_k grad_own[n,k] p[label[n],k]: rows whose factor is 0 are not read."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = n < N
    label = tl.load(labels_ptr + n, mask=inside, other=-1)
    owned = inside & (label >= 0) & (label < C)
    rows = grad_ptr + pixel_offset(n, hw, width, stride_b, stride_h, stride_w, MAP)
    target = rows[:, None] + (wide_unless(d, MAP >= 3) * stride_d)[None, :]
    mask = inside[:, None] & (d < D)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if ACCUMULATE:
        acc += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    for k in range(K):
        g = tl.load(grad_own_ptr + n.to(tl.int64) * K + k, mask=owned, other=0.0)
        at = centroids_ptr + ((label * K + k) * D)[:, None] + d[None, :]
        p = tl.load(at, mask=((g != 0.0) & owned)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        acc += g[:, None] * p
    tl.store(target, rounded(acc, grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def metric_gradient_kernel(
    x_ptr,  # [N,D] or [B,D,H,W]
    square_ptr,  # [N] |x|^2
    total_ptr,  # [N] sum of dS, for sqeuclidean
    grad_ptr,  # u = dS p, which becomes the gradient of x
    N,
    D,
    hw,
    width,
    stride_b,
    stride_h,
    stride_w,
    stride_d,
    grad_hw,
    grad_width,
    grad_stride_b,
    grad_stride_h,
    grad_stride_w,
    grad_stride_d,
    METRIC: tl.constexpr,
    MAP: tl.constexpr,
    GRAD_MAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """cosine: (u - y <y,u>) / |x| with y = x/|x|; sqeuclidean: 2 (u - x sum dS). In place."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    rows = x_ptr + pixel_offset(n, hw, width, stride_b, stride_h, stride_w, MAP)
    grad_rows = grad_ptr + pixel_offset(n, grad_hw, grad_width, grad_stride_b, grad_stride_h, grad_stride_w, GRAD_MAP)
    d = tl.arange(0, BLOCK_D)
    if METRIC == COSINE:
        scale = row_scale(tl.load(square_ptr + n, mask=inside, other=1.0), METRIC)
        along = tl.zeros((BLOCK_N,), tl.float32)
        for d0 in range(0, D, BLOCK_D):
            x = load_pixels(rows, inside, d0, D, stride_d, BLOCK_D, MAP).to(tl.float32)
            u = load_pixels(grad_rows, inside, d0, D, grad_stride_d, BLOCK_D, GRAD_MAP).to(tl.float32)
            along += tl.sum(x * u, 1)
        slope = along * scale * scale
    else:
        scale = tl.full((BLOCK_N,), 2.0, tl.float32)
        slope = tl.load(total_ptr + n, mask=inside, other=0.0)
    for d0 in range(0, D, BLOCK_D):
        mask = inside[:, None] & (d0 + d < D)[None, :]
        x = load_pixels(rows, inside, d0, D, stride_d, BLOCK_D, MAP).to(tl.float32)
        target = grad_rows[:, None] + (wide_unless(d0 + d, GRAD_MAP >= 3) * grad_stride_d)[None, :]
        u = tl.load(target, mask=mask, other=0.0).to(tl.float32)
        made = scale[:, None] * (u - x * slope[:, None])
        tl.store(target, rounded(made, grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def centroid_gradient_kernel(
    x_ptr,  # [N,D] or [B,D,H,W]
    g_ptr,  # gradient of the scores, [N,C] or [B,C,H,W] fp32, with SCORES
    winner_ptr,  # the same in uint8
    labels_ptr,  # [N] int64, with OWN
    grad_own_ptr,  # [N,K] fp32, with OWN
    factor_ptr,  # [N] fp32: what dS of a pixel is multiplied by, with FACTOR
    partial_ptr,  # [splits, tiles, groups, BLOCK_K * BLOCK_C, D] fp32
    total_ptr,  # [splits, tiles, groups, BLOCK_K * BLOCK_C] fp32: sum of dS over pixels
    first,  # pixels [first, last); the rows of g and winner begin with pixel `first`
    last,
    C,
    K,
    D,
    groups,
    span,  # pixels a split
    hw,
    width,
    stride_b,
    stride_h,
    stride_w,
    stride_d,
    score_hw,
    score_width,
    score_stride_b,
    score_stride_h,
    score_stride_w,
    score_stride_c,
    winner_hw,
    winner_width,
    winner_stride_b,
    winner_stride_h,
    winner_stride_w,
    winner_stride_c,
    FACTOR: tl.constexpr,
    SCORES: tl.constexpr,
    OWN: tl.constexpr,
    MAP: tl.constexpr,
    SCORE_MAP: tl.constexpr,
    WINNER_MAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dS^T x over the pixels of one split, for one class tile and group and BLOCK_D channels."""
    tile = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    j = tl.arange(0, BLOCK_K * BLOCK_C)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    d0 = tl.program_id(1) * BLOCK_D
    acc = tl.zeros((BLOCK_K * BLOCK_C, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_K * BLOCK_C,), tl.float32)
    begin = first + tl.program_id(2) * span
    end = tl.minimum(begin + span, last)
    for n0 in range(begin, end, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        inside = n < end
        mask = inside[:, None] & (c < C)[None, :]
        ds = tl.zeros((BLOCK_N, BLOCK_K * BLOCK_C), tl.float32)
        if SCORES:
            score_rows = g_ptr + pixel_offset(
                n - first, score_hw, score_width, score_stride_b, score_stride_h, score_stride_w, SCORE_MAP
            )
            winner_rows = winner_ptr + pixel_offset(
                n - first, winner_hw, winner_width, winner_stride_b, winner_stride_h, winner_stride_w, WINNER_MAP
            )
            g = load_classes_of(score_rows, mask, c, score_stride_c, SCORE_MAP).to(tl.float32)
            winner = load_classes_of(winner_rows, mask, c, winner_stride_c, WINNER_MAP).to(tl.int32)
            if BLOCK_K == 1:
                ds += tl.where(winner == group, g, 0.0)
            else:
                in_group = group * BLOCK_K + tl.arange(0, BLOCK_K)[None, :, None]
                wide = tl.where(winner[:, None, :] == in_group, g[:, None, :], 0.0)
                ds += tl.reshape(wide, (BLOCK_N, BLOCK_K * BLOCK_C))
        if OWN:
            k = group * BLOCK_K + j // BLOCK_C
            label = tl.load(labels_ptr + n, mask=inside, other=-1)
            mine = (label[:, None] == (tile * BLOCK_C + j % BLOCK_C)[None, :]) & (k < K)[None, :] & (label < C)[:, None]
            ds += tl.load(grad_own_ptr + (n.to(tl.int64) * K)[:, None] + k[None, :], mask=mine, other=0.0)
        if FACTOR:
            ds = ds * tl.load(factor_ptr + n, mask=inside, other=0.0)[:, None]
        total += tl.sum(ds, 0)
        rows = x_ptr + pixel_offset(n, hw, width, stride_b, stride_h, stride_w, MAP)
        # a pixel that sends nothing here must not send 0 * NaN
        x = load_pixels(rows, inside & (tl.max(tl.abs(ds), 1) > 0.0), d0, D, stride_d, BLOCK_D, MAP)
        if x.dtype == tl.float16:
            # a gradient times a loss scale may exceed float16; tf32 has its 10 bits of mantissa, and holds x exactly
            acc = dot(tl.trans(ds), x.to(tl.float32), acc, "tf32")
        else:
            acc = dot(tl.trans(rounded(ds, x.dtype)), x, acc, PRECISION)
    m = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (BLOCK_K * BLOCK_C) + j
    d = (d0 + tl.arange(0, BLOCK_D)).to(tl.int64)
    tl.store(partial_ptr + m[:, None] * D + d[None, :], acc, mask=(d < D)[None, :])
    if tl.program_id(1) == 0:
        tl.store(total_ptr + m, total)
