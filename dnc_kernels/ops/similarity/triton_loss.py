"""Triton kernel of the cross-entropy over class scores. Reference: reference.py; launcher: triton.py.

    r[n,c] = max_k s[n,c,k];  o = LayerNorm_C(r) or r;  z = o * tau;  loss[n] = CE(z[n], label[n])
    dr = the loss's gradient;  dX[n] = sum_c dr[n,c] p[c, w[n,c]]

Reads x [N,D] once from memory and p [M,D] twice a tile of pixels (from L2); writes dX [N,D], own similarities [N,K], prediction
and loss. Neither [N,C,K] nor [N,C] reaches memory: where the classes fit one tile, r and its winners stay in registers; else a
program keeps them for its own BLOCK_N pixels in a slab [BLOCK_N, C] that it uses again for its next pixels, and which L2 holds.

FLOPs 4NMD, bytes N(2 D b + 4K + 20). ADE20K (N=131072, C=150, K=10, D=256, bf16): 201 GFLOP over 800 TF/s = 252 us; 141 MB over
3.0 TB/s = 47 us: compute. Cityscapes/8 (N=262144, C=19): 51 GFLOP = 64 us; 282 MB = 94 us: memory.

Plan: persistent; a program takes tiles of BLOCK_N pixels at a fixed stride. Product 1 with the max in its epilogue and row
statistics (`score_classes`); log-sum-exp (`pixel_losses`); dr (`norm_slopes`, `score_gradients`); product 2 with dS made in
registers (`pixel_gradients`). Each is a loop over class tiles of r, in registers or in the slab. Sums over pixels go to
rows of one pixel (loss), one tile (gradient of the scale) or one program (those of the norm's weight and bias), and are added
up on the device in one order: results repeat bit for bit.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .._triton import offset_of, rounded
from .triton_pack import load_x
from .triton_scores import add_class_tile, class_tile, clear_own, is_finite, load_square, row_scale, targets_of


class Classes(NamedTuple):
    """What the classes have: each [C] fp32, or None."""

    gain: Tensor | None  # of a LayerNorm over the classes
    shift: Tensor | None
    weight: Tensor | None


class Results(NamedTuple):
    """What a launch makes, where wanted."""

    loss: Tensor | None  # [N] fp32
    prediction: Tensor | None  # [N] int64
    own: Tensor | None  # [N,K] fp32
    grad_x: Tensor | None  # like x


class Sums(NamedTuple):
    """What gradients of the pixels add up to, where wanted."""

    pixel: Tensor | None  # [N] fp32: sum of dr over classes, with grad_x for sqeuclidean
    scale: Tensor | None  # [tiles of pixels] fp32: gradient of the scale
    norm: Tensor | None  # [programs,2,columns] fp32: gradients of gain and shift


class Slab(NamedTuple):
    """[programs * BLOCK_N, columns], or [pixels of this launch, columns] with SAVE; None: one tile of classes without SAVE."""

    r: Tensor | None  # fp32 or bf16: r, then dr without factor
    winner: Tensor | None  # uint8


class Sizes(NamedTuple):
    """How much there is of what."""

    classes: int
    k: int
    channels: int
    depth: int  # channels, rounded up to whole blocks
    columns: int  # classes, rounded up to whole tiles
    tiles: int
    groups: int  # of k in a tile


@triton.jit
def load_classes(ptr, c, C, default: tl.constexpr):
    """[BLOCK_C] of an optional [C]."""
    if ptr is not None:
        return tl.load(ptr + c, mask=c < C, other=0.0)
    return tl.full(c.shape, default, tl.float32)


@triton.jit
def load_label(labels_ptr, n, inside, ignore_index, C):
    """[BLOCK_N] int32, -1 for pixels that do not count."""
    label = tl.load(labels_ptr + n, mask=inside, other=-1)
    return tl.where((label != ignore_index) & (label >= 0) & (label < C), label, -1).to(tl.int32)


@triton.jit
def load_factor(factor_ptr, n, inside, PER_PIXEL: tl.constexpr):
    """[BLOCK_N]: what the gradient of a pixel's loss is multiplied by."""
    factor = tl.full(n.shape, 1.0, tl.float32)
    if factor_ptr is not None:
        if PER_PIXEL:
            factor = tl.load(factor_ptr + n, mask=inside, other=0.0)
        else:
            factor = factor * tl.load(factor_ptr)
    return factor


@triton.jit
def add_to(ptr, value, mask):
    """Add to what this program alone writes."""
    tl.store(ptr, tl.load(ptr, mask=mask, other=0.0) + value, mask=mask)


@triton.jit
def score_classes(
    x, pixels, inside, square, label, own_rows, rows_ptr, bias_ptr, slab, slab_rows, norm_eps, sizes, stride_d,
    METRIC: tl.constexpr, ONE_TILE: tl.constexpr, KEEP: tl.constexpr, EVEN_K: tl.constexpr, X_MAP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Product 1: r and winners (of the last tile, all are in the slab), mean and rstd of the rows, which of them are finite.

    Statistics of the rows come from merging those of the tiles.
    """
    C = sizes.classes
    scale = row_scale(square, METRIC)
    mean = tl.zeros((BLOCK_N,), tl.float32)
    deviation = tl.zeros((BLOCK_N,), tl.float32)
    finite = inside
    r = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    winner = tl.zeros((BLOCK_N, BLOCK_C), tl.int32)
    for tile in tl.range(0, 1 if ONE_TILE else sizes.tiles, disable_licm=True):
        r, winner = class_tile(
            x, pixels, inside, scale, square, label, own_rows, tile, rows_ptr, bias_ptr, sizes.k, sizes.channels, sizes.depth,
            sizes.groups, stride_d, METRIC, KEEP, EVEN_K, X_MAP, PRECISION, BLOCK_N, BLOCK_C, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        real = (c < C)[None, :]
        finite = finite & (tl.min(tl.where(real & (is_finite(r) == 0), 0, 1), 1) == 1)
        # columns without a class: what they hold must not meet the sums over classes
        r = tl.where(real, r, 0.0)
        if norm_eps is not None:
            size = tl.minimum(C - tile * BLOCK_C, BLOCK_C).to(tl.float32)
            seen = 1.0 * tile * BLOCK_C
            tile_mean = tl.sum(r, 1) / size
            away = tl.where(real, r - tile_mean[:, None], 0.0)
            delta = tile_mean - mean
            mean += delta * (size / (seen + size))
            deviation += tl.sum(away * away, 1) + delta * delta * (seen * size / (seen + size))
        if not ONE_TILE:
            tl.store(slab.r + slab_rows[:, None] + c[None, :], rounded(r, slab.r.dtype.element_ty))
            tl.store(slab.winner + slab_rows[:, None] + c[None, :], winner.to(tl.uint8))
    rstd = deviation
    if norm_eps is not None:
        rstd = 1.0 / tl.sqrt_rn(deviation / C + norm_eps)
    return r, winner, mean, rstd, finite


@triton.jit
def tile_logits(
    r, mean, rstd, classes, tau, slab, slab_rows, tile, C, ONE_TILE: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Of a class tile: classes, gain, normalised scores, scores after the norm's affine, logits [BLOCK_N, BLOCK_C]."""
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    if not ONE_TILE:
        r = tl.load(slab.r + slab_rows[:, None] + c[None, :]).to(tl.float32)
    gain, shift = load_classes(classes.gain, c, C, 1.0), load_classes(classes.shift, c, C, 0.0)
    xhat = r
    o = r
    if classes.gain is not None:
        xhat = (r - mean[:, None]) * rstd[:, None]
        o = xhat * gain[None, :] + shift[None, :]
    return c, gain, xhat, o, o * tau


@triton.jit
def pixel_losses(
    r, mean, rstd, label, own_weight, classes, tau, smoothing, slab, slab_rows, sizes,
    ONE_TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Loss, largest logit, log-sum-exp less that logit and best class of every pixel; sum of the class weights, for smoothing.

    All is taken from the largest logit: an offset that the classes share must not cost digits.
    """
    C = sizes.classes
    highest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    own_logit = tl.zeros((BLOCK_N,), tl.float32)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    weight_sum = 0.0
    best_class = tl.zeros((BLOCK_N,), tl.int32)
    for tile in tl.range(0, 1 if ONE_TILE else sizes.tiles, disable_licm=True):
        c, _, _, _, z = tile_logits(r, mean, rstd, classes, tau, slab, slab_rows, tile, C, ONE_TILE, BLOCK_C)
        real = (c < C)[None, :]
        z = tl.where(real, z, float("-inf"))
        top = tl.max(z, 1)
        # the lowest class that reaches it; a row that is not finite is judged by `finite`
        at = tl.min(tl.where(z == top[:, None], c[None, :], C), 1)
        best_class = tl.where(top > highest, at, best_class)
        new = tl.maximum(highest, top)
        total = total * tl.exp(highest - new) + tl.sum(tl.exp(z - new[:, None]), 1)
        before = highest
        highest = new
        own_logit += tl.sum(tl.where(label[:, None] == c[None, :], z, 0.0), 1)
        if smoothing is not None:
            weight = tl.where(c < C, load_classes(classes.weight, c, C, 1.0), 0.0)
            # first the tiles before, of weight 0 where there was none
            weighted += tl.where(weight_sum > 0, weight_sum * (before - new), 0.0)
            weighted += tl.sum(tl.where(real, (z - new[:, None]) * weight[None, :], 0.0), 1)
            weight_sum += tl.sum(weight)
    lse = tl.log(total)
    each = own_weight * (lse + (highest - own_logit))
    if smoothing is not None:
        # infinite as soon as a weight is, and not 0 * inf
        spread = tl.where(weight_sum < float("inf"), weight_sum * lse - weighted, weight_sum)
        each = (1.0 - smoothing) * each + smoothing / C * spread
    return each, highest, lse, best_class, weight_sum


@triton.jit
def logits_gradient(z, top, lse, c, C, label, weight, own_weight, weight_sum, smoothing, counted):
    """dz [BLOCK_N, BLOCK_C] of the pixel's loss; exactly 0 for pixels and classes that do not count."""
    share = own_weight
    total = own_weight
    if smoothing is not None:
        share = (1.0 - smoothing) * own_weight
        total = share + smoothing / C * weight_sum
    dz = tl.exp((z - top[:, None]) - lse[:, None]) * total[:, None]
    if smoothing is not None:
        dz = dz - (smoothing / C * weight)[None, :]
    dz = tl.where(label[:, None] == c[None, :], dz - share[:, None], dz)
    return tl.where(counted[:, None] & (c < C)[None, :], dz, 0.0)


@triton.jit
def norm_slopes(
    r, mean, rstd, top, lse, label, own_weight, weight_sum, classes, tau, smoothing, slab, slab_rows, sizes,
    ONE_TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Means over the classes of dz gain and of dz gain xhat, which LayerNorm's gradient needs."""
    C = sizes.classes
    along = tl.zeros((BLOCK_N,), tl.float32)
    slope = tl.zeros((BLOCK_N,), tl.float32)
    if classes.gain is not None:
        for tile in tl.range(0, 1 if ONE_TILE else sizes.tiles, disable_licm=True):
            c, gain, xhat, _, z = tile_logits(r, mean, rstd, classes, tau, slab, slab_rows, tile, C, ONE_TILE, BLOCK_C)
            weight = load_classes(classes.weight, c, C, 1.0)
            dz = logits_gradient(z, top, lse, c, C, label, weight, own_weight, weight_sum, smoothing, label >= 0)
            along += tl.sum(dz * gain[None, :], 1)
            slope += tl.sum(dz * gain[None, :] * xhat, 1)
        along = along / C
        slope = slope / C
    return along, slope


@triton.jit
def score_gradients(
    r, winner, mean, rstd, along, slope, top, lse, label, own_weight, weight_sum, factor, classes, tau, smoothing, sums,
    slab, slab_rows, sizes, pid, SAVE: tl.constexpr, ONE_TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dr without factor (of the last tile, all are in the slab), its sum over the classes, and the scale's gradient."""
    C = sizes.classes
    counted = label >= 0
    dr = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    row_total = tl.zeros((BLOCK_N,), tl.float32)
    scale_grad = 0.0
    for tile in tl.range(0, 1 if ONE_TILE else sizes.tiles, disable_licm=True):
        c, gain, xhat, o, z = tile_logits(r, mean, rstd, classes, tau, slab, slab_rows, tile, C, ONE_TILE, BLOCK_C)
        real = (c < C)[None, :]
        weight = load_classes(classes.weight, c, C, 1.0)
        dz = logits_gradient(z, top, lse, c, C, label, weight, own_weight, weight_sum, smoothing, counted)
        if sums.scale is not None:
            # where, because 0 * NaN of a pixel that does not count is NaN
            scale_grad += tl.sum(tl.where(counted[:, None] & real, dz * o * factor[:, None], 0.0))
        if sums.norm is not None:
            at = sums.norm + 2 * pid * sizes.columns + c
            to_shift = dz * (tau * factor)[:, None]
            add_to(at, tl.sum(tl.where(counted[:, None] & real, to_shift * xhat, 0.0), 0), c < C)
            add_to(at + sizes.columns, tl.sum(to_shift, 0), c < C)
        dr = dz * tau
        if classes.gain is not None:
            dr = (dz * gain[None, :] - along[:, None] - xhat * slope[:, None]) * (rstd * tau)[:, None]
            dr = tl.where(counted[:, None] & real, dr, 0.0)
        row_total += tl.sum(dr, 1)
        if SAVE or not ONE_TILE:
            tl.store(slab.r + slab_rows[:, None] + c[None, :], rounded(dr, slab.r.dtype.element_ty))
        if SAVE and ONE_TILE:
            tl.store(slab.winner + slab_rows[:, None] + c[None, :], winner.to(tl.uint8))
    return dr, row_total, scale_grad


@triton.jit
def pixel_gradients(
    grad_ptr, dr, winner, n, inside, factor_ptr, rows_ptr, slab, slab_rows, sizes, grad_at,
    PER_PIXEL: tl.constexpr, ONE_TILE: tl.constexpr, GRAD_MAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_GRAD: tl.constexpr,
):  # fmt: skip
    """Product 2: writes dX, BLOCK_GRAD channels at a time."""
    for d0 in tl.range(0, sizes.depth, BLOCK_GRAD, disable_licm=True):
        d = d0 + tl.arange(0, BLOCK_GRAD)
        acc = tl.zeros((BLOCK_N, BLOCK_GRAD), tl.float32)
        for tile in tl.range(0, 1 if ONE_TILE else sizes.tiles, disable_licm=True):
            if not ONE_TILE:
                c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
                dr = tl.load(slab.r + slab_rows[:, None] + c[None, :]).to(tl.float32)
                winner = tl.load(slab.winner + slab_rows[:, None] + c[None, :]).to(tl.int32)
            acc = add_class_tile(
                acc, dr, winner, tile, d, rows_ptr, sizes.k, sizes.groups * BLOCK_K, sizes.depth, PRECISION, BLOCK_C
            )  # fmt: skip
        # the factor comes last: times a loss scale, a gradient may exceed what float16 holds
        acc = acc * load_factor(factor_ptr, n, inside, PER_PIXEL)[:, None]
        # addresses after the product, so that none lives through it
        target = targets_of(grad_ptr, n, d, grad_at, GRAD_MAP)
        tl.store(target, rounded(acc, grad_ptr.dtype.element_ty), mask=inside[:, None] & (d < sizes.channels)[None, :])


@triton.jit
def centroid_loss_kernel(
    x_ptr,  # [N,D] or [B,D,H,W]
    rows_ptr,  # packed
    bias_ptr,  # with sqeuclidean
    square_ptr,  # [N] |x|^2 unless the metric is dot
    labels_ptr,  # [N] int64
    scale_ptr,  # [] fp32, or None
    factor_ptr,  # what the gradient is multiplied by: [N] fp32 (PER_PIXEL), [] fp32 or None
    classes,  # Classes
    out,  # Results
    sums,  # Sums
    slab,  # Slab
    x_at,
    grad_at,
    sizes,  # Sizes
    first,  # pixels [first, last) of N
    last,
    ignore_index,
    norm_eps,  # None without a norm
    inverse_temperature,
    smoothing,  # or None
    METRIC: tl.constexpr,
    PER_PIXEL: tl.constexpr,
    SAVE: tl.constexpr,  # keep dr and winners of every pixel
    ONE_TILE: tl.constexpr,
    EVEN_K: tl.constexpr,
    X_MAP: tl.constexpr,
    GRAD_MAP: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_GRAD: tl.constexpr,  # channels of dX at a time
    BLOCK_OWN: tl.constexpr,
):
    """Loss, prediction, own similarities and gradients of pixels [first, last), BLOCK_N at a time."""
    pid = tl.program_id(0).to(tl.int64)
    C, K = sizes.classes, sizes.k
    tau = inverse_temperature
    if scale_ptr is not None:
        tau = tau * tl.load(scale_ptr)
    if sums.norm is not None:
        for tile in range(sizes.tiles):
            for part in tl.static_range(2):
                at = sums.norm + (2 * pid + part) * sizes.columns + tile * BLOCK_C + tl.arange(0, BLOCK_C)
                tl.store(at, tl.zeros((BLOCK_C,), tl.float32))
    for n0 in tl.range(first + tl.program_id(0) * BLOCK_N, last, tl.num_programs(0) * BLOCK_N, disable_licm=True):
        n = n0 + tl.arange(0, BLOCK_N)
        inside = n < last
        pixels = x_ptr + offset_of(n, x_at, X_MAP)
        square = load_square(square_ptr, n, inside)
        label = load_label(labels_ptr, n, inside, ignore_index, C)
        own_rows = None
        if out.own is not None:
            own_rows = out.own + n.to(tl.int64) * K
            clear_own(own_rows, inside & (label < 0), K, BLOCK_OWN)
        x = 0
        if KEEP:
            x = load_x(pixels, inside, tl.arange(0, BLOCK_D), sizes.channels, x_at.stride_d, False, X_MAP)
        if SAVE:
            slab_rows = (n - first) * sizes.columns
        else:
            slab_rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)) * sizes.columns

        r, winner, mean, rstd, finite = score_classes(
            x, pixels, inside, square, label, own_rows, rows_ptr, bias_ptr, slab, slab_rows, norm_eps, sizes, x_at.stride_d,
            METRIC, ONE_TILE, KEEP, EVEN_K, X_MAP, PRECISION, BLOCK_N, BLOCK_C, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        if not ONE_TILE:
            # r and winners of a row were stored by other threads than those that load it now
            tl.debug_barrier()

        # read again, because registers are scarcer than loads
        label = load_label(labels_ptr, n, inside, ignore_index, C)
        counted = label >= 0
        own_weight = tl.where(counted, 1.0, 0.0)
        if classes.weight is not None:
            own_weight = tl.load(classes.weight + label, mask=counted, other=0.0)
        each, top, lse, best_class, weight_sum = pixel_losses(
            r, mean, rstd, label, own_weight, classes, tau, smoothing, slab, slab_rows, sizes, ONE_TILE, BLOCK_N, BLOCK_C
        )  # fmt: skip
        if out.prediction is not None:
            tl.store(out.prediction + n, tl.where(finite, best_class, -1).to(tl.int64), mask=inside)
        if out.loss is not None:
            tl.store(out.loss + n, tl.where(counted, tl.where(finite, each, float("nan")), 0.0), mask=inside)

        if out.grad_x is not None or sums.norm is not None or sums.scale is not None or SAVE:
            lse = tl.where(finite, lse, float("nan"))
            weight_row = tl.zeros((BLOCK_N,), tl.float32) + weight_sum
            along, slope = norm_slopes(
                r, mean, rstd, top, lse, label, own_weight, weight_row, classes, tau, smoothing, slab, slab_rows, sizes,
                ONE_TILE, BLOCK_N, BLOCK_C,
            )  # fmt: skip
            factor = load_factor(factor_ptr, n, inside, PER_PIXEL)
            dr, row_total, scale_grad = score_gradients(
                r, winner, mean, rstd, along, slope, top, lse, label, own_weight, weight_row, factor, classes, tau, smoothing,
                sums, slab, slab_rows, sizes, pid, SAVE, ONE_TILE, BLOCK_N, BLOCK_C,
            )  # fmt: skip
            if sums.scale is not None:
                tl.store(sums.scale + (n0 - first) // BLOCK_N, scale_grad * inverse_temperature)
            if sums.pixel is not None:
                tl.store(sums.pixel + n, row_total * factor, mask=inside)
            if not ONE_TILE:
                # dr of a row was stored by other threads than those that load it now
                tl.debug_barrier()
        if out.grad_x is not None:
            pixel_gradients(
                out.grad_x, dr, winner, n, inside, factor_ptr, rows_ptr, slab, slab_rows, sizes, grad_at,
                PER_PIXEL, ONE_TILE, GRAD_MAP, PRECISION, BLOCK_N, BLOCK_C, BLOCK_K, BLOCK_GRAD,
            )  # fmt: skip
        if not ONE_TILE:
            # the next pixels overwrite the slab
            tl.debug_barrier()
