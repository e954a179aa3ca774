"""Cross-entropy of bilinearly interpolated scores, in Triton.

    u_c = interpolated scores;  lse = log sum_c exp u_c;  own = (1-s) w_y;  smooth = s/C;  W = sum_c w_c
    loss = own * (lse - u_y) + smooth * (W * lse - sum_c w_c u_c)         (s: label smoothing; w: class weights)

log_sum_exp reads scores [B,C,h,w], each of them four times, three of these from L1 and L2, and writes two numbers a pixel,
shift and lse [B,H,W] fp32: the sum of exponentials is exp(shift) 2^lse. One number would lose the digits that an offset of all
scores takes. loss reads both, labels [B,H,W] and the scores of the labels, and writes loss [B,H,W] if asked and a sum a
program. [B,C,H,W] never exists. E = B*C*H*W exponentials are needed; one more a cell makes it 17/16 * E.
Floors for [8,150,128,128] fp32 -> 512^2, E = 315 M (3.0 TB/s; a cycle of a processor is 16 exponentials or 4 instructions for
32 lanes, 132 processors at 1.7 GHz: 3.6 T exponentials/s, 28 T operations/s):
  log_sum_exp  4*B*C*h*w +  8*B*H*W bytes = 96 MB   32 us    17/16 * E exponentials  93 us    7.1 * E operations  79 us
  loss         16*B*H*W + 16*B*H*W of corners       22 us

Plan of log_sum_exp: a thread owns a cell (triton_cells.py), so four loads of a class serve up to 16 target pixels. It walks
over the classes and keeps a sum of exponentials for each pixel in registers, all shifted by the highest score that the corners
have shown so far: a bound that needs one maximum and one rescaling a cell, not one a pixel. Corners are taken from it before
they are interpolated. Where it was far too high for a pixel (scores some 60 apart in a cell, or a NaN or Inf) the program's
pixels are summed again, each with its own maximum, which becomes the shift of a pixel that lies very far below the bound.
Plan of loss: a thread for each target pixel; a program walks over blocks of them.

Deterministic: programs and orders of summation depend on sizes and the kind of device only. exp2 is the hardware's (2^-22
relative). Reference: dnc_kernels/ops/upsample/reference.py, csrc/cpu/upsample_loss.cpp. Gradient: triton_gradient.py.
"""

# tuples of tensors grow while a kernel is compiled
# mypy: disallow-untyped-defs=False, disable-error-code=assignment

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from .triton_cells import (
    EXACT,
    GUARDED,
    LOG2E,
    LOWEST,
    cell_of,
    class_weight,
    constants,
    corner_offsets,
    corner_scores,
    first_target,
    interpolate,
    label_at,
    share,
    shares,
)

_LN2 = tl.constexpr(0.6931471805599453)
# Where the highest score seen starts; a pixel whose scores are all lower is one that is summed again.
_FLOOR = tl.constexpr(-1e30)
# The lowest float32.
_LEAST = tl.constexpr(-3.4028234663852886e38)
# A pixel that lies further below its cell's highest score has a shift of its own: lse would lose digits.
_FAR = tl.constexpr(1000.0)
# Below this sum the shift was too high and small terms are lost: exp2 ends at 2^-126.
_SMALLEST_SUM = tl.constexpr(1e-25)


@triton.jit
def log_sum_exp_kernel(
    scores_ptr, weight_ptr, shift_ptr, lse_ptr, spread_ptr, scores_at, rows, columns, C, smoothing, lanes, blocks,
    LARGE: tl.constexpr, WIDE: tl.constexpr, FLAT_X: tl.constexpr, FLAT_Y: tl.constexpr, KX: tl.constexpr, KY: tl.constexpr,
    PARTS_X: tl.constexpr, PARTS_Y: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """shift and lse [B,H,W]: the log-sum-exp is shift + log(2) lse. If given, spread [B,H,W]: the smoothed part of the loss.

    Pixels of a cell share their shift, the highest score of its corners, but for those that lie very far below it.

    A program per BLOCK cells (or parts of cells) of a row of cells; samples follow each other.
    """
    lane = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    step_y = tl.program_id(0) // blocks
    here = lane < lanes
    b = lane // (columns.cells * PARTS_X)
    x = columns.cell0 + lane % columns.cells
    y = rows.cell0 + step_y // PARTS_Y
    j0 = first_target(x, columns, WIDE) + lane // columns.cells % PARTS_X * KX
    j1 = first_target(x + 1, columns, WIDE)
    i0 = first_target(y, rows, WIDE) + step_y % PARTS_Y * KY
    i1 = first_target(y + 1, rows, WIDE)
    across, down = shares(j0, x, columns, WIDE, KX), shares(i0, y, rows, WIDE, KY)
    offsets = corner_offsets(b, y, x, rows, columns, scores_at, LARGE)

    sums = constants(KX * KY, 0.0, BLOCK, tl.float32)
    highest = tl.full([BLOCK], _FLOOR, tl.float32)
    # sum_c s/C w_c (s_c - highest) at the corners
    weighted00, weighted01 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    weighted10, weighted11 = weighted00, weighted00
    all_weights = 0.0
    row = scores_ptr
    coming = corner_scores(row, offsets, here)
    for c in range(C):
        given = coming
        s00, s01, s10, s11 = _bounded(given)
        row += tl.where(c + 1 < C, scores_at[1], 0)
        coming = corner_scores(row, offsets, here)  # of the next class, while this one is worked on
        seen = tl.maximum(highest, tl.maximum(tl.maximum(s00, s01), tl.maximum(s10, s11)))  # not NaN: that comes from u
        risen = seen - highest
        keep = tl.exp2(-risen * LOG2E)
        highest = seen
        s00, s01, s10, s11 = (s00 - seen) * LOG2E, (s01 - seen) * LOG2E, (s10 - seen) * LOG2E, (s11 - seen) * LOG2E
        u = interpolate(s00, s01, s10, s11, across, down, FLAT_X, FLAT_Y, GUARDED, KX, KY)
        new_sums = ()
        for k in tl.static_range(KX * KY):
            new_sums += (tl.fma(sums[k], keep, tl.exp2(u[k])),)
        sums = new_sums
        if spread_ptr is not None:
            weight = class_weight(weight_ptr, c) * (smoothing / C)  # first: sums of differences may be too large
            fallen = tl.where(all_weights > 0, all_weights * risen, 0.0)  # not 0 * inf
            all_weights += weight
            weighted00 += weight * (given[0] - seen) - fallen
            weighted01 += weight * (given[1] - seen) - fallen
            weighted10 += weight * (given[2] - seen) - fallen
            weighted11 += weight * (given[3] - seen) - fallen

    lost = tl.zeros([BLOCK], tl.int32)
    for k in tl.static_range(KX * KY):
        inside = here & (i0 + k % KY < i1) & (j0 + k // KY < j1)
        usable = (sums[k] > _SMALLEST_SUM) & (sums[k] < float("inf"))
        lost = tl.maximum(lost, (inside & ~usable).to(tl.int32))
    again = tl.max(lost, 0)
    weighted = interpolate(weighted00, weighted01, weighted10, weighted11, across, down, FLAT_X, FLAT_Y, EXACT, KX, KY)
    highs = ()  # one for each pixel
    new_sums, new_weighted = (), ()
    for k in tl.static_range(KX * KY):
        highs += (tl.where(again > 0, _LEAST, highest),)
        new_sums += (tl.where(again > 0, 0.0, sums[k]),)
        new_weighted += (tl.where(again > 0, 0.0, weighted[k]),)
    sums, weighted = new_sums, new_weighted
    row = scores_ptr
    before = 0.0  # weights of the classes before
    for c in range(C * again):
        s00, s01, s10, s11 = corner_scores(row, offsets, here)
        row += scores_at[1]
        u = interpolate(s00, s01, s10, s11, across, down, FLAT_X, FLAT_Y, EXACT, KX, KY)
        weight = class_weight(weight_ptr, c) * (smoothing / C)
        new_sums, new_highs, new_weighted = (), (), ()
        for k in tl.static_range(KX * KY):
            seen = tl.maximum(highs[k], u[k])
            new_sums += (sums[k] * tl.exp2((highs[k] - seen) * LOG2E) + tl.exp2((u[k] - seen) * LOG2E),)
            new_highs += (seen,)
            if spread_ptr is not None:
                fallen = tl.where(before > 0, before * (seen - highs[k]), 0.0)
                new_weighted += (weighted[k] + weight * (u[k] - seen) - fallen,)
            else:
                new_weighted += (weighted[k],)
        sums, highs, weighted = new_sums, new_highs, new_weighted
        if spread_ptr is not None:
            before += weight

    for k in tl.static_range(KX * KY):
        i, j = i0 + k % KY, j0 + k // KY
        inside = here & (i < i1) & (j < j1)
        at = (b.to(tl.int64) * rows.targets + (i - rows.target0)) * columns.targets + j
        lse = tl.log2(tl.where(inside, sums[k], 1.0))
        below = highs[k] - highest  # 0 unless the program's pixels were summed again
        near = below > -_FAR
        own = tl.where(highs[k] < float("inf"), highs[k], 0.0)  # beside a NaN or +inf lse is NaN, and the shift must be finite
        tl.store(shift_ptr + at, tl.where(near, highest, own), mask=inside)
        tl.store(lse_ptr + at, tl.where(near, tl.fma(below, LOG2E, lse), lse), mask=inside)
        if spread_ptr is not None:
            # infinite as soon as a weight is, and not 0 * inf
            spread = tl.where(all_weights < float("inf"), all_weights * (lse * _LN2) - weighted[k], all_weights)
            tl.store(spread_ptr + at, spread, mask=inside)


@triton.jit
def loss_kernel(
    scores_ptr, labels_ptr, weight_ptr, shift_ptr, lse_ptr, spread_ptr, loss_ptr, partial_ptr, scores_at, labels_at, loss_at,
    rows, columns, C, ignore_index, smoothing, pixels,
    WIDE: tl.constexpr, FLAT_X: tl.constexpr, FLAT_Y: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss [B,H,W] and partial [programs,2] fp64 (sums of losses and of class weights), those given.

    A program walks over blocks of target pixels; each thread adds up its own in fp64.
    """
    total, total_weight = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for block in range(tl.program_id(0), tl.cdiv(pixels, BLOCK), tl.num_programs(0)):
        n = block * BLOCK + tl.arange(0, BLOCK)
        inside = tl.arange(0, BLOCK) < pixels - block * BLOCK  # n itself may overflow in the last block
        j = n % columns.targets
        i = n // columns.targets % rows.targets
        b = n // columns.targets // rows.targets
        label = label_at(labels_ptr, b, i, j, labels_at, inside, C, ignore_index)
        counts = label >= 0
        y, x = cell_of(i + rows.target0, rows, WIDE), cell_of(j, columns, WIDE)
        across, down = (share(j, x, columns, WIDE),), (share(i + rows.target0, y, rows, WIDE),)
        own_row = scores_ptr + tl.maximum(label, 0).to(tl.int64) * scores_at[1]
        shift = tl.load(shift_ptr + n, mask=counts, other=0.0)
        s00, s01, s10, s11 = corner_scores(own_row, corner_offsets(b, y, x, rows, columns, scores_at, True), counts)
        u = interpolate(s00, s01, s10, s11, across, down, FLAT_X, FLAT_Y, EXACT, 1, 1)[0] - shift
        # fewer digits are lost where the shift is taken off first, unless it is one pixel's own
        s00, s01, s10, s11 = s00 - shift, s01 - shift, s10 - shift, s11 - shift
        near = tl.maximum(tl.maximum(tl.abs(s00), tl.abs(s01)), tl.maximum(tl.abs(s10), tl.abs(s11))) < _FAR
        u = tl.where(near, interpolate(s00, s01, s10, s11, across, down, FLAT_X, FLAT_Y, EXACT, 1, 1)[0], u)
        weight = class_weight(weight_ptr, tl.maximum(label, 0))
        lse = tl.load(lse_ptr + n, mask=counts, other=0.0) * _LN2
        loss = weight * (1 - smoothing) * (lse - u)
        if spread_ptr is not None:
            loss += tl.load(spread_ptr + n, mask=counts, other=0.0)
        loss = tl.where(counts, loss, 0.0)
        if loss_ptr is not None:
            to = b.to(tl.int64) * loss_at[0] + i.to(tl.int64) * loss_at[1] + j.to(tl.int64) * loss_at[2]
            tl.store(loss_ptr + to, loss, mask=inside)
        total += loss.to(tl.float64)
        total_weight += tl.where(counts, weight, 0.0).to(tl.float64)
    if partial_ptr is not None:
        partial = partial_ptr + tl.program_id(0) * 2
        tl.store(partial, tl.sum(total, 0))
        tl.store(partial + 1, tl.sum(total_weight, 0))


@triton.jit
def add_sums_kernel(partial_ptr, sums_ptr, programs, BLOCK: tl.constexpr):
    """Sums [2] fp64 from partial [programs,2]: each thread its programs in order, then the threads as a tree."""
    loss, weight = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, programs, BLOCK):
        p = start + tl.arange(0, BLOCK)
        loss += tl.load(partial_ptr + p * 2, mask=p < programs, other=0.0)
        weight += tl.load(partial_ptr + p * 2 + 1, mask=p < programs, other=0.0)
    tl.store(sums_ptr, tl.sum(loss, 0))
    tl.store(sums_ptr + 1, tl.sum(weight, 0))


@triton.jit
def _bounded(scores):
    """Corners with LOWEST for -inf; NaN stays NaN."""
    return (
        tl.maximum(scores[0], LOWEST, propagate_nan=tl.PropagateNan.ALL),
        tl.maximum(scores[1], LOWEST, propagate_nan=tl.PropagateNan.ALL),
        tl.maximum(scores[2], LOWEST, propagate_nan=tl.PropagateNan.ALL),
        tl.maximum(scores[3], LOWEST, propagate_nan=tl.PropagateNan.ALL),
    )
