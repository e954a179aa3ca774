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

from .._triton import dot, offset_of, rounded, wide_unless
from .triton_pack import load_x


@triton.jit
def row_squares_kernel(
    x_ptr, square_ptr, x_at, N, D, X_MAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """|x|^2 of every pixel [N] fp32, for the metrics that need it."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    pixels = x_ptr + offset_of(n, x_at, X_MAP)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        v = load_x(pixels, n < N, d, D, x_at.stride_d, False, X_MAP).to(tl.float32)
        total += tl.sum(v * v, 1)
    tl.store(square_ptr + n, total, mask=n < N)


@triton.jit
def load_square(square_ptr, n, inside):
    """[BLOCK_N] |x|^2; 0 where the metric needs none."""
    square = tl.zeros(n.shape, tl.float32)
    if square_ptr is not None:
        square = tl.load(square_ptr + n, mask=inside, other=0.0)
    return square


@triton.jit
def row_scale(square, METRIC: tl.constexpr):
    """What a product of the pixel is multiplied by, from |x|^2."""
    if METRIC == "cosine":
        return 1.0 / tl.maximum(tl.sqrt_rn(square), 1e-12)
    return tl.full(square.shape, 1.0, tl.float32)


@triton.jit
def class_tile(
    x,  # [BLOCK_N, BLOCK_D] with KEEP
    pixels,  # [BLOCK_N] pointers to them
    inside,  # [BLOCK_N]
    scale,  # [BLOCK_N] of `row_scale`
    square,  # [BLOCK_N] |x|^2 for sqeuclidean
    label,  # [BLOCK_N], -1: none
    own_rows,  # [BLOCK_N] pointers to own similarities; None: not wanted
    tile,
    rows_ptr,  # packed sub-centroids
    bias_ptr,
    K,
    D,
    depth,
    groups,
    stride_d,
    METRIC: tl.constexpr,
    KEEP: tl.constexpr,
    EVEN_K: tl.constexpr,
    X_MAP: tl.constexpr,
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
    if own_rows is not None:
        here = (label >= tile * BLOCK_C) & (label < (tile + 1) * BLOCK_C)
        any_here = tl.max(here.to(tl.int32), 0)
    for group in range(groups):
        m = (tile * groups + group).to(tl.int64) * (BLOCK_K * BLOCK_C)
        # one 64-bit base, 32-bit offsets inside the tile: they live in registers through the whole kernel
        tile_rows = rows_ptr + m * depth
        if KEEP:
            p = tl.load(tile_rows + ((j * depth)[None, :] + d[:, None]))
            s = dot(x, p, tl.zeros((BLOCK_N, BLOCK_K * BLOCK_C), tl.float32), PRECISION)
        else:
            s = tl.zeros((BLOCK_N, BLOCK_K * BLOCK_C), tl.float32)
            for d0 in range(0, depth, BLOCK_D):
                part = load_x(pixels, inside, d0 + d, D, stride_d, False, X_MAP)
                p = tl.load(tile_rows + d0 + ((j * depth)[None, :] + d[:, None]))
                s = dot(part, p, s, PRECISION)
        if METRIC == "cosine":
            s = s * scale[:, None]
        if METRIC == "sqeuclidean":
            s = 2.0 * s + tl.load(bias_ptr + m + j)[None, :] - square[:, None]
        if not EVEN_K:
            # rows without a sub-centroid are zero, which may beat a negative similarity
            s = tl.where((group * BLOCK_K + j // BLOCK_C < K)[None, :], s, float("-inf"))
        if own_rows is not None:
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
def clear_own(own_rows, without_label, K, BLOCK_OWN: tl.constexpr):
    """Zeros for the own similarities of pixels without a label."""
    k = tl.arange(0, BLOCK_OWN)
    tl.store(own_rows[:, None] + k[None, :], 0.0, mask=without_label[:, None] & (k < K)[None, :])


@triton.jit
def class_scores_kernel(
    x_ptr,  # [N,D] or [B,D,H,W]
    rows_ptr,  # packed
    bias_ptr,  # with sqeuclidean
    square_ptr,  # [N] |x|^2 unless the metric is dot
    labels_ptr,  # [N] int64, with own
    scores_ptr,  # [N,C] or [B,C,H,W] fp32
    winner_ptr,  # the same strides, uint8
    own_ptr,  # [N,K] fp32, or None
    x_at,
    scores_at,
    N,
    C,
    K,
    D,
    depth,
    tiles,
    groups,
    span,  # class tiles a program
    METRIC: tl.constexpr,
    EVEN_K: tl.constexpr,
    X_MAP: tl.constexpr,
    SCORES_MAP: tl.constexpr,
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
    pixels = x_ptr + offset_of(n, x_at, X_MAP)
    score_rows = offset_of(n, scores_at, SCORES_MAP)
    square = load_square(square_ptr, n, inside)
    scale = row_scale(square, METRIC)
    label = tl.full((BLOCK_N,), -1, tl.int32)
    own_rows = None
    if own_ptr is not None:
        own_rows = own_ptr + n.to(tl.int64) * K
        label = tl.load(labels_ptr + n, mask=inside, other=-1)
        label = tl.where((label >= 0) & (label < C), label, -1).to(tl.int32)
        if tl.program_id(1) == 0:
            clear_own(own_rows, inside & (label < 0), K, BLOCK_OWN)
    x = 0
    if KEEP:
        x = load_x(pixels, inside, tl.arange(0, BLOCK_D), D, x_at.stride_d, False, X_MAP)
    for tile in range(tl.program_id(1) * span, tl.minimum((tl.program_id(1) + 1) * span, tiles)):
        best, winner = class_tile(
            x, pixels, inside, scale, square, label, own_rows, tile, rows_ptr, bias_ptr, K, D, depth, groups, x_at.stride_d,
            METRIC, KEEP, EVEN_K, X_MAP, PRECISION, BLOCK_N, BLOCK_C, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = inside[:, None] & (c < C)[None, :]
        at = score_rows[:, None] + (wide_unless(c, SCORES_MAP >= 3) * scores_at.stride_d)[None, :]
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
    rows_ptr,
    K,
    slots,  # k of a packed tile
    depth,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """acc + dS p of one class tile, a k at a time: dS has the gradient of a class at its winner, zeros elsewhere.

    g and winners stay in the registers that feed the product; no row of another k is moved.
    """
    c = tl.arange(0, BLOCK_C)
    for k in range(K):
        m = (tile * slots + k).to(tl.int64) * BLOCK_C
        p = tl.load(rows_ptr + m * depth + ((c * depth)[:, None] + d[None, :]))
        ds = rounded(tl.where(winner == k, g, 0.0), p.dtype)
        acc = dot(ds, p, acc, PRECISION)
    return acc


@triton.jit
def scores_gradient_kernel(
    g_ptr,  # gradient of the scores, [N,C] or [B,C,H,W] fp32
    winner_ptr,  # the same in uint8
    rows_ptr,  # packed
    grad_ptr,  # gradient of the pixels, [N,D] or [B,D,H,W]
    total_ptr,  # [N] fp32: sum of dS over sub-centroids, or None
    scores_at,
    winner_at,
    grad_at,
    N,
    C,
    K,
    D,
    slots,  # k of a packed tile
    depth,
    tiles,
    ACCUMULATE: tl.constexpr,
    SCORES_MAP: tl.constexpr,
    WINNER_MAP: tl.constexpr,
    GRAD_MAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """DS p [BLOCK_N, BLOCK_D] from the gradient of the scores; what is left of other metrics is `metric_gradient_kernel`'s."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    score_rows = g_ptr + offset_of(n, scores_at, SCORES_MAP)
    winner_rows = winner_ptr + offset_of(n, winner_at, WINNER_MAP)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(tiles):
        c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = inside[:, None] & (c < C)[None, :]
        g = load_classes_of(score_rows, mask, c, scores_at.stride_d, SCORES_MAP).to(tl.float32)
        winner = load_classes_of(winner_rows, mask, c, winner_at.stride_d, WINNER_MAP).to(tl.int32)
        if total_ptr is not None:
            total += tl.sum(g, 1)
        acc = add_class_tile(acc, g, winner, tile, d, rows_ptr, K, slots, depth, PRECISION, BLOCK_C)
    target = targets_of(grad_ptr, n, d, grad_at, GRAD_MAP)
    mask = inside[:, None] & (d < D)[None, :]
    if ACCUMULATE:
        acc += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, rounded(acc, grad_ptr.dtype.element_ty), mask=mask)
    if total_ptr is not None:
        if tl.program_id(1) == 0:
            tl.store(total_ptr + n, total, mask=inside)


@triton.jit
def targets_of(grad_ptr, n, d, at, MAP: tl.constexpr):
    """[BLOCK_N, BLOCK_D] pointers to channels d of pixels n of a tensor with addresses `at`."""
    pixels = grad_ptr + offset_of(n, at, MAP)
    return pixels[:, None] + (wide_unless(d, MAP >= 3) * at.stride_d)[None, :]


@triton.jit
def own_gradient_kernel(
    grad_own_ptr,  # [N,K] fp32
    labels_ptr,  # [N] int64
    centroids_ptr,  # [C,K,D] contiguous, fp32 or the dtype of the gradient
    grad_ptr,  # gradient of the pixels, [N,D] or [B,D,H,W]
    grad_at,
    N,
    C,
    K,
    D,
    ACCUMULATE: tl.constexpr,
    GRAD_MAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad[n] = (grad[n] +) sum_k grad_own[n,k] p[label[n],k]: rows whose factor is 0 are not read."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = n < N
    label = tl.load(labels_ptr + n, mask=inside, other=-1)
    owned = inside & (label >= 0) & (label < C)
    target = targets_of(grad_ptr, n, d, grad_at, GRAD_MAP)
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
    x_at,
    grad_at,
    N,
    D,
    METRIC: tl.constexpr,
    X_MAP: tl.constexpr,
    GRAD_MAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """cosine: (u - y <y,u>) / |x| with y = x/|x|; sqeuclidean: 2 (u - x sum dS). In place. Of zeros it makes zeros."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    pixels = x_ptr + offset_of(n, x_at, X_MAP)
    grads = grad_ptr + offset_of(n, grad_at, GRAD_MAP)
    d = tl.arange(0, BLOCK_D)
    if METRIC == "cosine":
        scale = row_scale(tl.load(square_ptr + n, mask=inside, other=1.0), METRIC)
        along = tl.zeros((BLOCK_N,), tl.float32)
        for d0 in range(0, D, BLOCK_D):
            x = load_x(pixels, inside, d0 + d, D, x_at.stride_d, False, X_MAP).to(tl.float32)
            u = load_x(grads, inside, d0 + d, D, grad_at.stride_d, False, GRAD_MAP).to(tl.float32)
            along += tl.sum(tl.where(u == 0.0, 0.0, x * u), 1)
        slope = tl.where(along == 0.0, 0.0, along * scale * scale)
    else:
        scale = tl.full((BLOCK_N,), 2.0, tl.float32)
        slope = tl.load(total_ptr + n, mask=inside, other=0.0)
    for d0 in range(0, D, BLOCK_D):
        mask = inside[:, None] & (d0 + d < D)[None, :]
        x = load_x(pixels, inside, d0 + d, D, x_at.stride_d, False, X_MAP).to(tl.float32)
        target = grads[:, None] + (wide_unless(d0 + d, GRAD_MAP >= 3) * grad_at.stride_d)[None, :]
        u = tl.load(target, mask=mask, other=0.0).to(tl.float32)
        # a pixel that is sent nothing must not get 0 * NaN
        made = u - tl.where(slope[:, None] == 0.0, 0.0, x * slope[:, None])
        made = tl.where(made == 0.0, 0.0, scale[:, None] * made)
        tl.store(target, rounded(made, grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def centroid_gradient_kernel(
    x_ptr,  # [N,D] or [B,D,H,W]
    g_ptr,  # gradient of the scores, [N,C] or [B,C,H,W] fp32, or None
    winner_ptr,  # the same in uint8
    labels_ptr,  # [N] int64
    grad_own_ptr,  # [N,K] fp32, or None
    factor_ptr,  # [N] fp32: what dS of a pixel is multiplied by, or None
    partial_ptr,  # [splits, tiles, groups, BLOCK_K * BLOCK_C, D] fp32
    total_ptr,  # [splits, tiles, groups, BLOCK_K * BLOCK_C] fp32: sum of dS over pixels
    x_at,
    scores_at,
    winner_at,
    first,  # pixels [first, last); the rows of g and winner begin with pixel `first`
    last,
    C,
    K,
    D,
    groups,
    span,  # pixels a split
    X_MAP: tl.constexpr,
    SCORES_MAP: tl.constexpr,
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
        if g_ptr is not None:
            score_rows = g_ptr + offset_of(n - first, scores_at, SCORES_MAP)
            winner_rows = winner_ptr + offset_of(n - first, winner_at, WINNER_MAP)
            g = load_classes_of(score_rows, mask, c, scores_at.stride_d, SCORES_MAP).to(tl.float32)
            winner = load_classes_of(winner_rows, mask, c, winner_at.stride_d, WINNER_MAP).to(tl.int32)
            if BLOCK_K == 1:
                ds += tl.where(winner == group, g, 0.0)
            else:
                in_group = group * BLOCK_K + tl.arange(0, BLOCK_K)[None, :, None]
                wide = tl.where(winner[:, None, :] == in_group, g[:, None, :], 0.0)
                ds += tl.reshape(wide, (BLOCK_N, BLOCK_K * BLOCK_C))
        if grad_own_ptr is not None:
            k = group * BLOCK_K + j // BLOCK_C
            label = tl.load(labels_ptr + n, mask=inside, other=-1)
            mine = (label[:, None] == (tile * BLOCK_C + j % BLOCK_C)[None, :]) & (k < K)[None, :] & (label < C)[:, None]
            ds += tl.load(grad_own_ptr + (n.to(tl.int64) * K)[:, None] + k[None, :], mask=mine, other=0.0)
        if factor_ptr is not None:
            # a pixel that sends nothing here must not send 0 * NaN
            ds = tl.where(ds == 0.0, 0.0, ds * tl.load(factor_ptr + n, mask=inside, other=0.0)[:, None])
        total += tl.sum(ds, 0)
        pixels = x_ptr + offset_of(n, x_at, X_MAP)
        sending = inside & (tl.max(tl.abs(ds), 1) > 0.0)
        x = load_x(pixels, sending, d0 + tl.arange(0, BLOCK_D), D, x_at.stride_d, False, X_MAP)
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
