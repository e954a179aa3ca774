"""Gradient of the cross-entropy of bilinearly interpolated scores, in Triton.

    d loss / d u_c = (own + smooth * W) * exp(u_c - shift) 2^-lse - own * [c = y] - smooth * w_c  (names: triton_loss.py)
    grad_scores[b,c,r,x] = sum over target pixels (i,j) of their share of (r,x) * grad_loss * d loss / d u_c

Reads scores [B,C,h,w] (each four times, three of these from L1 and L2), labels, shift and lse [B,H,W], grad_loss and class
weights if given; writes grad_scores [B,C,h,w]. [B,C,H,W] never exists. E = B*C*H*W exponentials are needed; the cells at the
border of a program make it (ROWS+1)/ROWS * BLOCK/(BLOCK-1) * E.
Floors for [8,150,128,128] fp32 -> 512^2, E = 315 M, 1.10 * E with ROWS=16, BLOCK=32 (rates: triton_loss.py):
  8*B*C*h*w + 16*B*H*W bytes = 191 MB   64 us    1.10 * E exponentials  96 us    1.10 * 13.7 * E operations  170 us

Plan: gathers, without atomics. A thread owns a cell (triton_cells.py). A program owns ROWS rows of source pixels, BLOCK-1 wide,
of CLASSES classes, and walks down their cells; labels, lse and factors of a row of cells lie in registers while the classes
pass. What a cell gives to its right corners goes to the thread to the right, by a shuffle where a program is one warp; what it
gives to its lower corners waits for the next row of cells in the workspace carry [programs,CLASSES,BLOCK] fp32 (twice that
where cells have parts), which stays in L2. A row of cells without a label that counts only passes the carry on. The corners of
a cell are taken from the shift of its pixels before they are interpolated; where one of the pixels has another shift, which
takes scores 1000 apart in a cell, a row of cells is worked on pixel by pixel.

Deterministic: programs and orders of summation depend on sizes only. exp2 is the hardware's (2^-22 relative).
Reference: dnc_kernels/ops/upsample/reference.py, csrc/cpu/upsample_unit.h.
"""

# tuples of tensors grow while a kernel is compiled
# mypy: disallow-untyped-defs=False, disable-error-code=assignment

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from .triton_cells import (
    EXACT,
    FINITE,
    LOG2E,
    LOWEST,
    class_weight,
    corner_offsets,
    corner_scores,
    first_target,
    interpolate,
    label_at,
    shares,
)

# A score of inf, or far above a shift: its difference to LOWEST is finite too.
_HIGHEST = tl.constexpr(1e38)
# Log-sum-exp of an ignored pixel: whatever its scores, its probabilities are 0.
_NO_LSE = tl.constexpr(3e38)


@triton.jit
def gradient_kernel(
    scores_ptr, labels_ptr, weight_ptr, grad_loss_ptr, shift_ptr, lse_ptr, grad_scores_ptr, carry_ptr, scores_at, labels_at,
    grad_loss_at, grad_scores_at, rows, columns, C, ignore_index, smoothing, lanes, blocks, strips,
    PLAIN: tl.constexpr, SMOOTH: tl.constexpr, LARGE: tl.constexpr, WIDE: tl.constexpr, FLAT_X: tl.constexpr,
    FLAT_Y: tl.constexpr, KX: tl.constexpr, KY: tl.constexpr, PARTS_X: tl.constexpr, PARTS_Y: tl.constexpr, ROWS: tl.constexpr,
    CLASSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of ROWS source rows, BLOCK - 1 source columns (samples follow each other) and CLASSES classes.

    PLAIN: neither grad_loss nor class weights.
    """
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
            tl.debug_barrier()  # the next pass over the classes reads what this program left in carry
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
            shift = tl.zeros([BLOCK], tl.float32)  # of the first pixel: as a rule of all
            apart = tl.zeros([BLOCK], tl.int32)
            for k in tl.static_range(KX * KY):
                i, j = i0 + k % KY, j0 + k // KY
                inside = here & (i < i1) & (j < j1)
                i -= rows.target0
                label = label_at(labels_ptr, b, i, j, labels_at, inside, C, ignore_index)
                counts = label >= 0
                at = (b.to(tl.int64) * rows.targets + i) * columns.targets + j
                lses += (tl.load(lse_ptr + at, mask=counts, other=_NO_LSE),)
                own_shift = tl.load(shift_ptr + at, mask=inside, other=0.0)
                if k == 0:
                    shift = own_shift
                apart = tl.maximum(apart, (counts & (own_shift != shift)).to(tl.int32))
                labels += (label.to(tl.float32),)
                any_counts = tl.maximum(any_counts, counts.to(tl.int32))
                factor = counts.to(tl.float32)
                if grad_loss_ptr is not None:
                    at = b.to(tl.int64) * grad_loss_at[0] + i.to(tl.int64) * grad_loss_at[1] + j.to(tl.int64) * grad_loss_at[2]
                    factor = tl.load(grad_loss_ptr + at, mask=counts, other=0.0)
                if SMOOTH:
                    smooths += (factor * (smoothing / C),)
                if not PLAIN:
                    weight = class_weight(weight_ptr, tl.maximum(label, 0))
                    own = tl.where(counts, factor * ((1 - smoothing) * weight), 0.0)  # not 0 * inf
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
            together = tl.where(tl.max(apart, 0) > 0, class0, worked)
            out = to_first + tl.maximum(local, 0).to(tl.int64) * grad_scores_at[2] + class0.to(tl.int64) * grad_scores_at[1]
            found = here & (step + part > 0)
            done = writes & (step > 0) & (part == PARTS - 1)
            slot = carry
            for c in range(class0, together):
                s00, s01, s10, s11 = _from_shift(coming, shift)
                row += tl.where(c + 1 < class1, scores_at[1], 0)
                coming = corner_scores(row, offsets, here)
                u = interpolate(s00, s01, s10, s11, across, down, FLAT_X, FLAT_Y, FINITE, KX, KY)
                powers = ()
                for k in tl.static_range(KX * KY):
                    powers += (tl.exp2(tl.fma(u[k], LOG2E, -lses[k])),)
                top, bottom = _send(
                    powers, labels, owns, ons, level, weight_ptr, c, now, smoothing, to_right, to_bottom, before, PLAIN, SMOOTH,
                    FLAT_X, FLAT_Y, KX, KY,
                )  # fmt: skip
                _hand_on(top, bottom, slot, out, step, part, here, found, done, PARTS, PLANE)
                out += grad_scores_at[1]
                slot += BLOCK
                now += 1.0
            for c in range(together, worked):
                s00, s01, s10, s11 = corner_scores(row, offsets, here)
                row += scores_at[1]
                u = interpolate(s00, s01, s10, s11, across, down, FLAT_X, FLAT_Y, EXACT, KX, KY)
                powers = ()
                for k in tl.static_range(KX * KY):
                    counts = labels[k] >= 0.0
                    at = (b.to(tl.int64) * rows.targets + (i0 + k % KY - rows.target0)) * columns.targets + j0 + k // KY
                    own_shift = tl.load(shift_ptr + at, mask=counts, other=0.0)
                    powers += (tl.where(counts, tl.exp2(tl.fma(u[k] - own_shift, LOG2E, -lses[k])), 0.0),)
                top, bottom = _send(
                    powers, labels, owns, ons, level, weight_ptr, c, now, smoothing, to_right, to_bottom, before, PLAIN, SMOOTH,
                    FLAT_X, FLAT_Y, KX, KY,
                )  # fmt: skip
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
def _send(
    powers, labels, owns, ons, level, weight_ptr, c, now, smoothing, to_right, to_bottom, before, PLAIN: tl.constexpr,
    SMOOTH: tl.constexpr, FLAT_X: tl.constexpr, FLAT_Y: tl.constexpr, KX: tl.constexpr, KY: tl.constexpr,
):  # fmt: skip
    """What the pixels' probabilities of class c, less the label's one, give to the upper and lower corners."""
    each = ()
    for k in tl.static_range(KX * KY):
        if PLAIN:
            each += (powers[k] - tl.where(labels[k] == now, 1 - smoothing, 0.0),)
        else:
            each += (tl.fma(powers[k], ons[k], -tl.where(labels[k] == now, owns[k], 0.0)),)
    top, bottom = _gather(each, to_right, to_bottom, before, FLAT_X, FLAT_Y, KX, KY)
    if SMOOTH:
        weight = class_weight(weight_ptr, c)
        top -= weight * level[0]
        bottom -= weight * level[1]
    return top, bottom


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
def _from_shift(scores, shift):
    """Corners less the shift, finite. A pixel with a share of a NaN or +inf is known by its lse, NaN; no other may see them."""
    return (
        tl.minimum(tl.maximum(scores[0] - shift, LOWEST), _HIGHEST),
        tl.minimum(tl.maximum(scores[1] - shift, LOWEST), _HIGHEST),
        tl.minimum(tl.maximum(scores[2] - shift, LOWEST), _HIGHEST),
        tl.minimum(tl.maximum(scores[3] - shift, LOWEST), _HIGHEST),
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
