"""Triton kernel of the cross-entropy over class scores. Reference: reference.py; launcher: triton.py.

    r[n,c] = max_k s[n,c,k];  o = LayerNorm_C(r) or r;  z = o * tau;  loss[n] = CE(z[n], label[n])
    dr = the loss's gradient;  dX[n] = sum_c dr[n,c] p[c, w[n,c]]

Reads x [N,D] once from memory and p [M,D] twice a tile of pixels (from L2); writes dX [N,D], own similarities [N,K], prediction
and loss. Neither [N,C,K] nor [N,C] reaches memory: where the classes fit one tile, r and its winners stay in registers; else a
program keeps them for its own BLOCK_N pixels in a slab [BLOCK_N, C] that it uses again for its next pixels, and which L2 holds.

FLOPs 4NMD, bytes N(2 D b + 4K + 20). ADE20K (N=131072, C=150, K=10, D=256, bf16): 201 GFLOP over 800 TF/s = 252 us; 141 MB over
3.0 TB/s = 47 us: compute. Cityscapes/8 (N=262144, C=19): 51 GFLOP = 64 us; 282 MB = 94 us: memory.

Plan: persistent; a program takes tiles of BLOCK_N pixels at a fixed stride. Product 1 with the max in its epilogue
(`class_tile`); row statistics; log-sum-exp; dr; product 2 with dS made in registers (`add_class_tile`). Sums over pixels go to
rows of one pixel (loss), one tile (gradient of the scale) or one program (those of the norm's weight and bias), and are added
up on the device in one order: results repeat bit for bit.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from .._triton import pixel_offset, rounded, wide_unless
from .triton_scores import DOT, SQEUCLIDEAN, add_class_tile, class_tile, is_finite, load_pixels, row_scale


@triton.jit
def logits_of(r, mean, rstd, gain, shift, tau, NORM: tl.constexpr):
    """Normalised scores, scores after the norm's affine, logits [BLOCK_N, BLOCK_C]."""
    xhat = r
    o = r
    if NORM:
        xhat = (r - mean[:, None]) * rstd[:, None]
        o = xhat * gain[None, :] + shift[None, :]
    return xhat, o, o * tau


@triton.jit
def load_classes(ptr, c, C, default: tl.constexpr, GIVEN: tl.constexpr):
    """[BLOCK_C] of an optional [C]."""
    if GIVEN:
        return tl.load(ptr + c, mask=c < C, other=0.0)
    return tl.full(c.shape, default, tl.float32)


@triton.jit
def logits_gradient(z, lse, c, C, label, weight, own_weight, weight_sum, smoothing, counted, SMOOTH: tl.constexpr):
    """Dz [BLOCK_N, BLOCK_C] of the pixel's loss; exactly 0 for pixels and classes that do not count."""
    share = own_weight
    total = own_weight
    if SMOOTH:
        share = (1.0 - smoothing) * own_weight
        total = share + smoothing / C * weight_sum
    dz = tl.exp(z - lse[:, None]) * total[:, None]
    if SMOOTH:
        dz = dz - (smoothing / C * weight)[None, :]
    dz = tl.where(label[:, None] == c[None, :], dz - share[:, None], dz)
    return tl.where(counted[:, None] & (c < C)[None, :], dz, 0.0)


@triton.jit
def load_label(labels_ptr, n, inside, ignore_index, C):
    """[BLOCK_N] int32, -1 for pixels that do not count."""
    label = tl.load(labels_ptr + n, mask=inside, other=-1)
    return tl.where((label != ignore_index) & (label >= 0) & (label < C), label, -1).to(tl.int32)


@triton.jit
def load_factor(factor_ptr, n, inside, FACTOR: tl.constexpr):
    """[BLOCK_N]: what the gradient of a pixel's loss is multiplied by."""
    factor = tl.full(n.shape, 1.0, tl.float32)
    if FACTOR == 1:
        factor = factor * tl.load(factor_ptr)
    if FACTOR == 2:
        factor = tl.load(factor_ptr + n, mask=inside, other=0.0)
    return factor


@triton.jit
def add_to(ptr, value, mask):
    """Add to what this program alone writes."""
    tl.store(ptr, tl.load(ptr, mask=mask, other=0.0) + value, mask=mask)


@triton.jit
def centroid_loss_kernel(
    x_ptr,  # [N,D] or [B,D,H,W]
    p_ptr,  # packed
    bias_ptr,
    square_ptr,  # [N] |x|^2 unless the metric is dot
    labels_ptr,  # [N] int64
    gain_ptr,  # [C] fp32, with NORM
    shift_ptr,  # [C] fp32, with SHIFT
    scale_ptr,  # [] fp32, with SCALE
    weight_ptr,  # [C] fp32, with WEIGHT
    factor_ptr,  # what the gradient is multiplied by: [] (FACTOR 1) or [N] (FACTOR 2) fp32
    loss_ptr,  # [N] fp32, with FORWARD
    prediction_ptr,  # [N] int64, with FORWARD
    own_ptr,  # [N,K] fp32, with FORWARD
    grad_ptr,  # like x, with GRAD
    total_ptr,  # [N] fp32: sum of dr over classes, with GRAD for sqeuclidean
    scale_grad_ptr,  # [tiles of pixels] fp32: gradient of the scale, with SCALE
    norm_sums_ptr,  # [programs,2,CP] fp32: gradients of gain and shift, with PARAMETERS
    slab_r_ptr,  # [programs * BLOCK_N, CP] fp32 or bf16, or [pixels of this launch, CP] with SAVE: r, then dr without factor
    slab_w_ptr,  # the same in uint8: winners
    first,  # pixels [first, last) of N
    last,
    C,
    K,
    D,
    DP,
    CP,  # classes, rounded up to whole tiles
    tiles,
    groups,
    ignore_index,
    norm_eps,
    inverse_temperature,
    smoothing,
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
    NORM: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    WEIGHT: tl.constexpr,
    SMOOTH: tl.constexpr,
    FACTOR: tl.constexpr,
    FORWARD: tl.constexpr,
    GRAD: tl.constexpr,
    PARAMETERS: tl.constexpr,
    SAVE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    EVEN_K: tl.constexpr,
    MAP: tl.constexpr,
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
    tau = inverse_temperature
    if SCALE:
        tau = tau * tl.load(scale_ptr)
    columns = tl.arange(0, BLOCK_C)
    if PARAMETERS:
        for tile in range(tiles):
            for part in tl.static_range(2):
                at = norm_sums_ptr + (2 * pid + part) * CP + tile * BLOCK_C + columns
                tl.store(at, tl.zeros((BLOCK_C,), tl.float32))
    for n0 in tl.range(first + tl.program_id(0) * BLOCK_N, last, tl.num_programs(0) * BLOCK_N, disable_licm=True):
        n = n0 + tl.arange(0, BLOCK_N)
        inside = n < last
        rows = x_ptr + pixel_offset(n, hw, width, stride_b, stride_h, stride_w, MAP)
        square = tl.zeros((BLOCK_N,), tl.float32)
        if METRIC != DOT:
            square = tl.load(square_ptr + n, mask=inside, other=0.0)
        row_factor = row_scale(square, METRIC)
        label = load_label(labels_ptr, n, inside, ignore_index, C)
        own_rows = own_ptr + n.to(tl.int64) * K
        if FORWARD:
            k = tl.arange(0, BLOCK_OWN)
            tl.store(own_rows[:, None] + k[None, :], 0.0, mask=(inside & (label < 0))[:, None] & (k < K)[None, :])
        x = 0
        if KEEP:
            x = load_pixels(rows, inside, 0, D, stride_d, BLOCK_D, MAP)
        if SAVE:
            slab = (n - first) * CP
        else:
            slab = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)) * CP

        # product 1, and the statistics of the rows by merging those of the tiles
        mean = tl.zeros((BLOCK_N,), tl.float32)
        deviation = tl.zeros((BLOCK_N,), tl.float32)
        finite = inside
        r = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        winner = tl.zeros((BLOCK_N, BLOCK_C), tl.int32)
        for tile in tl.range(0, 1 if ONE_TILE else tiles, disable_licm=True):
            r, winner = class_tile(
                x, rows, inside, row_factor, square, label, own_rows, tile, p_ptr, bias_ptr, K, D, DP, groups, stride_d,
                METRIC, FORWARD, KEEP, EVEN_K, MAP, PRECISION, BLOCK_N, BLOCK_C, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            c = tile * BLOCK_C + columns
            real = (c < C)[None, :]
            finite = finite & (tl.min(tl.where(real & (is_finite(r) == 0), 0, 1), 1) == 1)
            # columns without a class: what they hold must not meet the sums over classes
            r = tl.where(real, r, 0.0)
            if NORM:
                size = tl.minimum(C - tile * BLOCK_C, BLOCK_C).to(tl.float32)
                seen = 1.0 * tile * BLOCK_C
                tile_mean = tl.sum(r, 1) / size
                away = tl.where(real, r - tile_mean[:, None], 0.0)
                delta = tile_mean - mean
                mean += delta * (size / (seen + size))
                deviation += tl.sum(away * away, 1) + delta * delta * (seen * size / (seen + size))
            if not ONE_TILE:
                tl.store(slab_r_ptr + slab[:, None] + c[None, :], rounded(r, slab_r_ptr.dtype.element_ty))
                tl.store(slab_w_ptr + slab[:, None] + c[None, :], winner.to(tl.uint8))
        rstd = 1.0 / tl.sqrt_rn(deviation / C + norm_eps)
        if not ONE_TILE:
            # r and winners of a row were stored by other threads than those that load it now
            tl.debug_barrier()

        # read again, because registers are scarcer than loads
        label = load_label(labels_ptr, n, inside, ignore_index, C)
        counted = label >= 0
        own_weight = tl.where(counted, 1.0, 0.0)
        if WEIGHT:
            own_weight = tl.load(weight_ptr + label, mask=counted, other=0.0)

        # log-sum-exp of the logits, the logit of the label, the best class
        highest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_N,), tl.float32)
        own_logit = tl.zeros((BLOCK_N,), tl.float32)
        weighted = tl.zeros((BLOCK_N,), tl.float32)
        weight_sum = 0.0
        best_class = tl.zeros((BLOCK_N,), tl.int32)
        for tile in tl.range(0, 1 if ONE_TILE else tiles, disable_licm=True):
            c = tile * BLOCK_C + columns
            real = (c < C)[None, :]
            if not ONE_TILE:
                r = tl.load(slab_r_ptr + slab[:, None] + c[None, :]).to(tl.float32)
            gain, shift = load_classes(gain_ptr, c, C, 1.0, NORM), load_classes(shift_ptr, c, C, 0.0, SHIFT)
            xhat, o, z = logits_of(r, mean, rstd, gain, shift, tau, NORM)
            z = tl.where(real, z, float("-inf"))
            top = tl.max(z, 1)
            # the lowest class that reaches it; a row that is not finite is judged by `finite`
            at = tl.min(tl.where(z == top[:, None], c[None, :], C), 1)
            best_class = tl.where(top > highest, at, best_class)
            new = tl.maximum(highest, top)
            total = total * tl.exp(highest - new) + tl.sum(tl.exp(z - new[:, None]), 1)
            highest = new
            own_logit += tl.sum(tl.where(label[:, None] == c[None, :], z, 0.0), 1)
            if SMOOTH:
                weight = tl.where(c < C, load_classes(weight_ptr, c, C, 1.0, WEIGHT), 0.0)
                weight_sum += tl.sum(weight)
                weighted += tl.sum(tl.where(real, z * weight[None, :], 0.0), 1)
        lse = highest + tl.log(total)
        each = own_weight * (lse - own_logit)
        if SMOOTH:
            each = (1.0 - smoothing) * each + smoothing / C * (weight_sum * lse - weighted)
        each = tl.where(counted, tl.where(finite, each, float("nan")), 0.0)
        if FORWARD:
            tl.store(prediction_ptr + n, tl.where(finite, best_class, -1).to(tl.int64), mask=inside)
            tl.store(loss_ptr + n, each, mask=inside)

        if GRAD or PARAMETERS or SAVE:
            lse = tl.where(finite, lse, float("nan"))
            weight_row = tl.zeros((BLOCK_N,), tl.float32) + weight_sum
            # LayerNorm's gradient needs two sums over the classes
            along = tl.zeros((BLOCK_N,), tl.float32)
            slope = tl.zeros((BLOCK_N,), tl.float32)
            if NORM:
                for tile in tl.range(0, 1 if ONE_TILE else tiles, disable_licm=True):
                    c = tile * BLOCK_C + columns
                    if not ONE_TILE:
                        r = tl.load(slab_r_ptr + slab[:, None] + c[None, :]).to(tl.float32)
                    gain, shift = load_classes(gain_ptr, c, C, 1.0, NORM), load_classes(shift_ptr, c, C, 0.0, SHIFT)
                    weight = load_classes(weight_ptr, c, C, 1.0, WEIGHT)
                    xhat, o, z = logits_of(r, mean, rstd, gain, shift, tau, NORM)
                    dz = logits_gradient(z, lse, c, C, label, weight, own_weight, weight_row, smoothing, counted, SMOOTH)
                    along += tl.sum(dz * gain[None, :], 1)
                    slope += tl.sum(dz * gain[None, :] * xhat, 1)
                along = along / C
                slope = slope / C
            factor = load_factor(factor_ptr, n, inside, FACTOR)
            dr = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
            row_total = tl.zeros((BLOCK_N,), tl.float32)
            scale_grad = 0.0
            for tile in tl.range(0, 1 if ONE_TILE else tiles, disable_licm=True):
                c = tile * BLOCK_C + columns
                real = (c < C)[None, :]
                if not ONE_TILE:
                    r = tl.load(slab_r_ptr + slab[:, None] + c[None, :]).to(tl.float32)
                gain, shift = load_classes(gain_ptr, c, C, 1.0, NORM), load_classes(shift_ptr, c, C, 0.0, SHIFT)
                weight = load_classes(weight_ptr, c, C, 1.0, WEIGHT)
                xhat, o, z = logits_of(r, mean, rstd, gain, shift, tau, NORM)
                dz = logits_gradient(z, lse, c, C, label, weight, own_weight, weight_row, smoothing, counted, SMOOTH)
                if SCALE:
                    # where, because 0 * NaN of a pixel that does not count is NaN
                    scale_grad += tl.sum(tl.where(counted[:, None] & real, dz * o * factor[:, None], 0.0))
                if PARAMETERS:
                    at = norm_sums_ptr + 2 * pid * CP + c
                    to_shift = dz * (tau * factor)[:, None]
                    add_to(at, tl.sum(tl.where(counted[:, None] & real, to_shift * xhat, 0.0), 0), c < C)
                    add_to(at + CP, tl.sum(to_shift, 0), c < C)
                dr = dz * tau
                if NORM:
                    dr = (dz * gain[None, :] - along[:, None] - xhat * slope[:, None]) * (rstd * tau)[:, None]
                    dr = tl.where(counted[:, None] & real, dr, 0.0)
                row_total += tl.sum(dr, 1)
                if SAVE or not ONE_TILE:
                    tl.store(slab_r_ptr + slab[:, None] + c[None, :], rounded(dr, slab_r_ptr.dtype.element_ty))
                if SAVE and ONE_TILE:
                    tl.store(slab_w_ptr + slab[:, None] + c[None, :], winner.to(tl.uint8))
            if SCALE:
                tl.store(scale_grad_ptr + (n0 - first) // BLOCK_N, scale_grad * inverse_temperature)
            if METRIC == SQEUCLIDEAN and GRAD:
                tl.store(total_ptr + n, row_total * factor, mask=inside)
            if not ONE_TILE:
                # dr of a row was stored by other threads than those that load it now
                tl.debug_barrier()

        # product 2
        if GRAD:
            for d0 in tl.range(0, DP, BLOCK_GRAD, disable_licm=True):
                d = d0 + tl.arange(0, BLOCK_GRAD)
                acc = tl.zeros((BLOCK_N, BLOCK_GRAD), tl.float32)
                for tile in tl.range(0, 1 if ONE_TILE else tiles, disable_licm=True):
                    if not ONE_TILE:
                        c = tile * BLOCK_C + columns
                        dr = tl.load(slab_r_ptr + slab[:, None] + c[None, :]).to(tl.float32)
                        winner = tl.load(slab_w_ptr + slab[:, None] + c[None, :]).to(tl.int32)
                    acc = add_class_tile(acc, dr, winner, tile, d, p_ptr, K, groups * BLOCK_K, DP, PRECISION, BLOCK_C)
                # after the product, so that no address lives through it
                grad_rows = grad_ptr + pixel_offset(
                    n, grad_hw, grad_width, grad_stride_b, grad_stride_h, grad_stride_w, GRAD_MAP
                )
                # the factor comes last: times a loss scale, a gradient may exceed what float16 holds
                acc = acc * load_factor(factor_ptr, n, inside, FACTOR)[:, None]
                target = grad_rows[:, None] + (wide_unless(d, GRAD_MAP >= 3) * grad_stride_d)[None, :]
                tl.store(target, rounded(acc, grad_ptr.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])
        if not ONE_TILE:
            # the next pixels overwrite the slab
            tl.debug_barrier()
