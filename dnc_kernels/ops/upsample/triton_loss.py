"""Cross-entropy of bilinearly interpolated scores and its gradient, in Triton.

    u_c = interpolated scores;  lse = log sum_c exp u_c;  loss = own * (lse - u_y) + smooth * (W * lse - sum_c w_c u_c)
    own = (1-s) w_y;  smooth = s/C;  W = sum_c w_c                          (s: label smoothing; w: class weights)
    d loss / d u_c = (own + smooth * W) * exp(u_c - lse) - own * [c = y] - smooth * w_c

Forward reads scores [B,C,h,w] (each number four times, of which three from L1 and L2) and labels [B,H,W], and writes lse [B,H,W]
fp32, the loss [B,H,W] if asked and one partial sum a program. Backward reads scores, labels, lse, grad_loss and class weights and
writes grad_scores [B,C,h,w]. [B,C,H,W] never exists. E = B*C*H*W exponentials forward and backward each, and 1/16 more forward
(1/KX*KY); backward (ROWS+1)/ROWS * BLOCK/(BLOCK-1) as many, for the cells at the border of a program.
Floors for [8,150,128,128] fp32 -> 512^2, E = 315 M (3.0 TB/s; 16 exponentials and 4 instructions of 32 lanes a cycle, 132
processors at 1.7 GHz: 3.6 T exponentials/s, 28 T operations/s):
  forward   bytes  4*B*C*h*w + (8+4)*B*H*W = 104 MB     35 us    exponentials 17/16 * E     93 us    7 operations * E    79 us
  backward  bytes  8*B*C*h*w + (8+4)*B*H*W = 182 MB     61 us    exponentials 1.1 * E       96 us    11 operations * E  136 us

Plan: a thread owns a cell (triton_cells.py): four loads of a class serve up to 16 target pixels, which stay in registers.
  Forward: a thread walks over the classes and keeps a running sum of exponentials for every target pixel, all shifted by the highest
  score that the corners have shown so far, a bound that needs one maximum and one rescaling a cell instead of one a pixel. A pixel
  for which this bound was far too high is summed again with its own maximum (a cell with scores some 60 apart, or a NaN or Inf).
  Backward: gathers, without atomics. A program owns ROWS rows of source pixels, BLOCK-1 wide, of CLASSES classes, and walks down
  their cells; labels, lse and factors of a row of cells lie in registers while the classes pass. A cell's gradients of its right
  corners go to the thread to the right by a shuffle; those of its lower corners wait, in `carry`, for the next row of cells.
The carry is a workspace [programs,CLASSES,BLOCK] fp32 (twice that where cells have parts), which stays in L2.

Deterministic: programs and orders of summation depend on sizes only. exp2 is the hardware's (2^-22 relative).
Reference: dnc_kernels/ops/upsample/reference.py, csrc/cpu/upsample_loss.cpp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_cells import (
    EXACT,
    FINITE,
    GUARDED,
    cell_of,
    constants,
    corner_offsets,
    corner_scores,
    first_target,
    interpolate,
    share,
    shares,
)

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# A score of -inf counts as this: its differences are finite, and its power of 2 is 0.
_LOWEST = tl.constexpr(-2e38)
# Where the highest score seen starts: no score is that low, and it is a number whose rounding is far from _LOWEST.
_FLOOR = tl.constexpr(-1e30)
_HIGHEST = tl.constexpr(1e38)  # a score of inf in the backward pass: its difference to _LOWEST is finite too
_NO_LSE = tl.constexpr(3e38)  # log-sum-exp of an ignored pixel: whatever its scores, its probabilities are 0
# Below this sum the shift was too high and small terms are lost: exp2 ends at 2^-126.
_SMALLEST_SUM = tl.constexpr(1e-25)


@triton.jit
def log_sum_exp_kernel(
    scores_ptr, weight_ptr, lse_ptr, spread_ptr, scores_at, rows, columns, C, smoothing, lanes, blocks,
    LARGE: tl.constexpr, WIDE: tl.constexpr, FLAT_X: tl.constexpr, FLAT_Y: tl.constexpr, KX: tl.constexpr, KY: tl.constexpr,
    PARTS_X: tl.constexpr, PARTS_Y: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """lse [B,H,W], in powers of 2, and, if given, spread [B,H,W]: the smoothed part of the loss.

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
    weighted00, weighted01 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)  # sum_c w_c s_c at the corners
    weighted10, weighted11 = weighted00, weighted00
    all_weights = 0.0
    row = scores_ptr
    coming = corner_scores(row, offsets, here)
    for c in range(C):
        s00, s01, s10, s11 = _bounded(coming)
        row += tl.where(c + 1 < C, scores_at[1], 0)
        coming = corner_scores(row, offsets, here)  # of the next class, while this one is worked on
        seen = tl.maximum(highest, tl.maximum(tl.maximum(s00, s01), tl.maximum(s10, s11)))  # not NaN: that comes from u
        keep = tl.exp2((highest - seen) * _LOG2E)
        highest = seen
        shift = seen * _LOG2E
        u = interpolate(s00, s01, s10, s11, across, down, FLAT_X, FLAT_Y, GUARDED, KX, KY)
        new_sums = ()
        for k in tl.static_range(KX * KY):
            new_sums += (tl.fma(sums[k], keep, tl.exp2(tl.fma(u[k], _LOG2E, -shift))),)
        sums = new_sums
        if spread_ptr is not None:
            weight = class_weight(weight_ptr, c)
            all_weights += weight
            weighted00, weighted01 = tl.fma(s00, weight, weighted00), tl.fma(s01, weight, weighted01)
            weighted10, weighted11 = tl.fma(s10, weight, weighted10), tl.fma(s11, weight, weighted11)

    lost = tl.zeros([BLOCK], tl.int32)
    for k in tl.static_range(KX * KY):
        inside = here & (i0 + k % KY < i1) & (j0 + k // KY < j1)
        usable = (sums[k] > _SMALLEST_SUM) & (sums[k] < float("inf"))
        lost = tl.maximum(lost, (inside & ~usable).to(tl.int32))
    again = tl.max(lost, 0)
    highs = ()  # one for each pixel
    new_sums = ()
    for k in tl.static_range(KX * KY):
        highs += (tl.where(again > 0, _LOWEST, highest),)
        new_sums += (tl.where(again > 0, 0.0, sums[k]),)
    sums = new_sums
    row = scores_ptr
    for c in range(C * again):
        s00, s01, s10, s11 = _bounded(corner_scores(row, offsets, here))
        row += scores_at[1]
        u = interpolate(s00, s01, s10, s11, across, down, FLAT_X, FLAT_Y, GUARDED, KX, KY)
        new_sums, new_highs = (), ()
        for k in tl.static_range(KX * KY):
            seen = tl.maximum(highs[k], u[k])
            new_sums += (sums[k] * tl.exp2((highs[k] - seen) * _LOG2E) + tl.exp2((u[k] - seen) * _LOG2E),)
            new_highs += (seen,)
        sums, highs = new_sums, new_highs

    weighted = interpolate(weighted00, weighted01, weighted10, weighted11, across, down, FLAT_X, FLAT_Y, GUARDED, KX, KY)
    for k in tl.static_range(KX * KY):
        i, j = i0 + k % KY, j0 + k // KY
        inside = here & (i < i1) & (j < j1)
        at = (b.to(tl.int64) * rows.targets + (i - rows.target0)) * columns.targets + j
        lse = tl.fma(highs[k], _LOG2E, tl.log2(tl.where(inside, sums[k], 1.0)))
        tl.store(lse_ptr + at, lse, mask=inside)
        if spread_ptr is not None:
            tl.store(spread_ptr + at, smoothing / C * (all_weights * (lse * _LN2) - weighted[k]), mask=inside)


@triton.jit
def loss_kernel(
    scores_ptr, labels_ptr, weight_ptr, lse_ptr, spread_ptr, loss_ptr, partial_ptr, scores_at, labels_at, loss_at, rows, columns,
    C, ignore_index, smoothing, pixels, WIDE: tl.constexpr, FLAT_X: tl.constexpr, FLAT_Y: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """loss [B,H,W] and partial [programs,2] fp64 (sums of losses and of class weights), those given: a thread per target pixel.

    A program walks over blocks of pixels; each thread adds up its own in fp64.
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
        s00, s01, s10, s11 = corner_scores(own_row, corner_offsets(b, y, x, rows, columns, scores_at, True), counts)
        u = interpolate(s00, s01, s10, s11, across, down, FLAT_X, FLAT_Y, EXACT, 1, 1)[0]
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
    """sums [2] fp64 from partial [programs,2]: each thread its programs in order, then the threads as a tree."""
    loss, weight = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, programs, BLOCK):
        p = start + tl.arange(0, BLOCK)
        loss += tl.load(partial_ptr + p * 2, mask=p < programs, other=0.0)
        weight += tl.load(partial_ptr + p * 2 + 1, mask=p < programs, other=0.0)
    tl.store(sums_ptr, tl.sum(loss, 0))
    tl.store(sums_ptr + 1, tl.sum(weight, 0))


@triton.jit
def gradient_kernel(
    scores_ptr, labels_ptr, weight_ptr, grad_loss_ptr, lse_ptr, grad_scores_ptr, carry_ptr, scores_at, labels_at, grad_loss_at,
    grad_scores_at, rows, columns, C, ignore_index, smoothing, lanes, blocks, strips,
    PLAIN: tl.constexpr, SMOOTH: tl.constexpr, LARGE: tl.constexpr, WIDE: tl.constexpr, FLAT_X: tl.constexpr,
    FLAT_Y: tl.constexpr, KX: tl.constexpr, KY: tl.constexpr, PARTS_X: tl.constexpr, PARTS_Y: tl.constexpr, ROWS: tl.constexpr,
    CLASSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_scores of ROWS source rows, BLOCK - 1 source columns (samples follow each other) and CLASSES classes. PLAIN: neither grad_loss nor class weights."""
    program = tl.program_id(0)
    block = program % blocks
    strip = program // blocks % strips
    class0 = program // (blocks * strips) * CLASSES
    class1 = tl.minimum(class0 + CLASSES, C)
    # cells of a sample, from -1 on; the first one of a program only hands on to the second
    lane = block * (BLOCK - 1) - 1 + tl.arange(0, BLOCK)
    here = (lane >= 0) & (lane < lanes)
    lane = tl.maximum(lane, 0)
    b = lane // (columns.sources + 1)
    x = lane % (columns.sources + 1) - 1
    writes = here & (x >= 0) & (tl.arange(0, BLOCK) > 0)
    before = tl.maximum(tl.arange(0, BLOCK) - 1, 0)
    first = strip * ROWS
    count = tl.minimum(rows.sources - first, ROWS)

    all_weights = 0.0
    if SMOOTH:
        for c in range(C):
            all_weights += class_weight(weight_ptr, c)
    PARTS: tl.constexpr = PARTS_X * PARTS_Y
    # one plane holds what the next row of cells will find, a second one what this row has found so far
    PLANE: tl.constexpr = CLASSES * BLOCK
    carry = carry_ptr + program.to(tl.int64) * (PLANE * (1 if PARTS == 1 else 2)) + tl.arange(0, BLOCK)
    to_first = grad_scores_ptr + b.to(tl.int64) * grad_scores_at[0] + x.to(tl.int64) * grad_scores_at[3]

    for step in range(count + 1):
        local = first - 1 + step  # row of the cells' upper corners, of those at hand
        y = local + rows.source0
        i_first = first_target(y, rows, WIDE)
        i1 = first_target(y + 1, rows, WIDE)
        j_first = first_target(x, columns, WIDE)
        j1 = first_target(x + 1, columns, WIDE)
        offsets = corner_offsets(b, y, x, rows, columns, scores_at, LARGE)
        for part in range(PARTS):
            i0 = i_first + part // PARTS_X * KY
            j0 = j_first + part % PARTS_X * KX
            across, down = shares(j0, x, columns, WIDE, KX), shares(i0, y, rows, WIDE, KY)
            # cell -1 hands everything to its upper end, the source pixel 0
            to_right = _shares_of_high(across, x, KX)
            to_bottom = _shares_of_high(down, y, KY)
            labels = ()  # as floats: integers would become one 64-bit counter each
            lses = ()
            owns = ()  # factors of the label's one
            ons = ()  # factors of the probability
            smooths = ()
            any_counts = tl.zeros([BLOCK], tl.int32)
            for k in tl.static_range(KX * KY):
                i, j = i0 + k % KY, j0 + k // KY
                inside = here & (i < i1) & (j < j1)
                i -= rows.target0
                label = label_at(labels_ptr, b, i, j, labels_at, inside, C, ignore_index)
                counts = label >= 0
                at = (b.to(tl.int64) * rows.targets + i) * columns.targets + j
                lses += (tl.load(lse_ptr + at, mask=counts, other=_NO_LSE),)
                labels += (label.to(tl.float32),)
                any_counts = tl.maximum(any_counts, counts.to(tl.int32))
                factor = counts.to(tl.float32)
                if grad_loss_ptr is not None:
                    at = b.to(tl.int64) * grad_loss_at[0] + i.to(tl.int64) * grad_loss_at[1] + j.to(tl.int64) * grad_loss_at[2]
                    factor = tl.load(grad_loss_ptr + at, mask=counts, other=0.0)
                if SMOOTH:
                    smooths += (factor * (smoothing / C),)
                if not PLAIN:
                    own = factor * ((1 - smoothing) * class_weight(weight_ptr, tl.maximum(label, 0)))
                    owns += (own,)
                    ons += (own + factor * (smoothing / C) * all_weights,)
            level = (0.0, 0.0)
            if SMOOTH:
                level = _gather(smooths, to_right, to_bottom, before, FLAT_X, FLAT_Y, KX, KY)
            work = tl.max(any_counts, 0)
            row = scores_ptr + class0.to(tl.int64) * scores_at[1]
            coming = corner_scores(row, offsets, here)
            now = class0.to(tl.float32)
            worked = tl.where(work > 0, class1, class0)  # no class where all pixels are ignored
            out = to_first + tl.maximum(local, 0).to(tl.int64) * grad_scores_at[2] + class0.to(tl.int64) * grad_scores_at[1]
            found = here & (step + part > 0)
            done = writes & (step > 0) & (part == PARTS - 1)
            slot = carry
            for c in range(class0, worked):
                s00, s01, s10, s11 = _finite(coming)
                row += tl.where(c + 1 < class1, scores_at[1], 0)
                coming = corner_scores(row, offsets, here)
                u = interpolate(s00, s01, s10, s11, across, down, FLAT_X, FLAT_Y, FINITE, KX, KY)
                each = ()
                for k in tl.static_range(KX * KY):
                    p = tl.exp2(tl.fma(u[k], _LOG2E, -lses[k]))
                    if PLAIN:
                        each += (p - tl.where(labels[k] == now, 1 - smoothing, 0.0),)
                    else:
                        each += (tl.fma(p, ons[k], -tl.where(labels[k] == now, owns[k], 0.0)),)
                top, bottom = _gather(each, to_right, to_bottom, before, FLAT_X, FLAT_Y, KX, KY)
                if SMOOTH:
                    weight = class_weight(weight_ptr, c)
                    top -= weight * level[0]
                    bottom -= weight * level[1]
                _hand_on(top, bottom, slot, out, step, part, here, found, done, PARTS, PLANE)
                out += grad_scores_at[1]
                slot += BLOCK
                now += 1.0
            nothing = tl.zeros([BLOCK], tl.float32)
            for _ in range(worked, class1):
                _hand_on(nothing, nothing, slot, out, step, part, here, found, done, PARTS, PLANE)
                out += grad_scores_at[1]
                slot += BLOCK


@triton.jit
def _hand_on(top, bottom, slot, out, step, part, here, found, done, PARTS: tl.constexpr, PLANE: tl.constexpr):
    """Adds what the row of cells above left for the upper source row, writes it when it is done, and leaves the lower one's."""
    if PARTS == 1:
        top += tl.load(slot, mask=found, other=0.0)
        tl.store(slot, bottom, mask=here)
    else:
        top_slot = slot + step % 2 * PLANE
        bottom_slot = slot + (1 - step % 2) * PLANE
        top += tl.load(top_slot, mask=found, other=0.0)
        bottom += tl.load(bottom_slot, mask=here & (part > 0), other=0.0)
        tl.store(top_slot, top, mask=here)
        tl.store(bottom_slot, bottom, mask=here)
    tl.store(out, top.to(out.dtype.element_ty), mask=done)


@triton.jit
def label_at(labels_ptr, b, i, j, labels_at, inside, C, ignore_index):
    """int32 labels of pixels that count; -1 for the others."""
    at = b.to(tl.int64) * labels_at[0] + i.to(tl.int64) * labels_at[1] + j.to(tl.int64) * labels_at[2]
    label = tl.load(labels_ptr + at, mask=inside, other=0).to(tl.int64)
    return tl.where(inside & (label >= 0) & (label < C) & (label != ignore_index), label, -1).to(tl.int32)


@triton.jit
def class_weight(weight_ptr, c):
    """Class weights of c; 1 where there are none."""
    if weight_ptr is None:
        return 1.0
    else:
        return tl.load(weight_ptr + c)


@triton.jit
def _bounded(scores):
    """Corners with _LOWEST for -inf; NaN stays NaN."""
    return (
        tl.maximum(scores[0], _LOWEST, propagate_nan=tl.PropagateNan.ALL),
        tl.maximum(scores[1], _LOWEST, propagate_nan=tl.PropagateNan.ALL),
        tl.maximum(scores[2], _LOWEST, propagate_nan=tl.PropagateNan.ALL),
        tl.maximum(scores[3], _LOWEST, propagate_nan=tl.PropagateNan.ALL),
    )


@triton.jit
def _finite(scores):
    """Finite corners. A pixel with a share of a NaN or +inf is known by its log-sum-exp, NaN; no other one may see them."""
    return (
        tl.minimum(tl.maximum(scores[0], _LOWEST), _HIGHEST),
        tl.minimum(tl.maximum(scores[1], _LOWEST), _HIGHEST),
        tl.minimum(tl.maximum(scores[2], _LOWEST), _HIGHEST),
        tl.minimum(tl.maximum(scores[3], _LOWEST), _HIGHEST),
    )


@triton.jit
def _shares_of_high(parts, r, K: tl.constexpr):
    made = ()
    for k in tl.static_range(K):
        made += (tl.where(r < 0, 1.0, parts[k]),)
    return made


@triton.jit
def _gather(each, to_right, to_bottom, before, FLAT_X: tl.constexpr, FLAT_Y: tl.constexpr, KX: tl.constexpr, KY: tl.constexpr):
    """What the KX * KY pixels of the cells to the left and right of source columns give to their upper and lower corners.

    The first pixel of a cell may have share 0 of the next source pixel, which then must not see its NaN.
    """
    for kx in tl.static_range(KX):
        column = each[kx * KY]
        for ky in tl.static_range(1, KY):
            column += each[kx * KY + ky]
        low = tl.zeros_like(column)
        if not FLAT_Y:
            low = tl.where(to_bottom[0] == 0, 0.0, each[kx * KY] * to_bottom[0])
            for ky in tl.static_range(1, KY):
                low = tl.fma(each[kx * KY + ky], to_bottom[ky], low)
            column -= low
        if kx == 0:
            top, bottom = column, low
        else:
            top += column
            bottom += low
        if not FLAT_X:
            if kx == 0:
                top_right = tl.where(to_right[0] == 0, 0.0, column * to_right[0])
                bottom_right = tl.where(to_right[0] == 0, 0.0, low * to_right[0])
            else:
                top_right = tl.fma(column, to_right[kx], top_right)
                bottom_right = tl.fma(low, to_right[kx], bottom_right)
    if not FLAT_X:
        top += tl.gather(top_right, before, 0) - top_right
        bottom += tl.gather(bottom_right, before, 0) - bottom_right
    return top, bottom
