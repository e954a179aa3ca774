"""The class of the highest bilinearly interpolated score of every target pixel, in Triton.

    label[b,i,j] = argmax_c u[b,c,i,j],  u: scores interpolated at (i,j); ties: the lowest class; NaN: the highest score

Reads scores [B,C,h,w], each of them four times, three of these from L1 and L2; writes label [B,H,W] int64. [B,C,H,W] never
exists. Floors for [8,150,128,128] fp32 -> 512^2 (3.0 TB/s; 128 lanes * 132 processors * 1.7 GHz = 28 T operations/s):
  memory      4*B*C*h*w + 8*B*H*W bytes = 96 MB    32 us
  arithmetic  6.9 operations * B*C*H*W             78 us

Plan: a thread owns a cell (triton_cells.py) and keeps the best score and class of its target pixels in registers while it
walks over the classes: 4 loads serve up to 16 pixels. Threads of a warp own cells side by side. All classes are rounded alike,
so equal scores stay equal. A program that has met a NaN or Inf walks over the classes once more, with care.
Deterministic: a label depends on its own scores only. Reference: dnc_kernels/ops/upsample/reference.py.
"""

# tuples of tensors grow while a kernel is compiled
# mypy: disallow-untyped-defs=False, disable-error-code=assignment

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from .triton_cells import EXACT, FINITE, constants, corner_offsets, corner_scores, first_target, interpolate, shares


@triton.jit
def argmax_kernel(
    scores_ptr, label_ptr, scores_at, label_at, rows, columns, C, lanes, blocks,
    LARGE: tl.constexpr, WIDE: tl.constexpr, FLAT_X: tl.constexpr, FLAT_Y: tl.constexpr, KX: tl.constexpr, KY: tl.constexpr,
    PARTS_X: tl.constexpr, PARTS_Y: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program per BLOCK cells (or parts of cells) of a row of cells; samples follow each other."""
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

    best = constants(KX * KY, float("-inf"), BLOCK, tl.float32)
    label = constants(KX * KY, 0, BLOCK, tl.int32)
    poison = tl.zeros([BLOCK], tl.float32)  # NaN once a NaN or Inf was met
    row = scores_ptr
    coming = corner_scores(row, offsets, here)
    for c in range(C):
        s00, s01, s10, s11 = coming
        row += tl.where(c + 1 < C, scores_at[1], 0)
        coming = corner_scores(row, offsets, here)  # of the next class, while this one is worked on
        poison = tl.fma(s00, 0.0, tl.fma(s01, 0.0, tl.fma(s10, 0.0, tl.fma(s11, 0.0, poison))))
        u = interpolate(s00, s01, s10, s11, across, down, FLAT_X, FLAT_Y, FINITE, KX, KY)
        new_best, new_label = (), ()
        for k in tl.static_range(KX * KY):
            higher = u[k] > best[k]  # the first of equal scores stays
            new_best += (tl.where(higher, u[k], best[k]),)
            new_label += (tl.where(higher, c, label[k]),)
        best, label = new_best, new_label

    poisoned = poison != poison
    again = tl.max(poisoned.to(tl.int32), 0)
    best = constants(KX * KY, float("-inf"), BLOCK, tl.float32)
    careful = constants(KX * KY, 0, BLOCK, tl.int32)
    row = scores_ptr
    for c in range(C * again):
        s00, s01, s10, s11 = corner_scores(row, offsets, here)
        row += scores_at[1]
        u = interpolate(s00, s01, s10, s11, across, down, FLAT_X, FLAT_Y, EXACT, KX, KY)
        new_best, new_label = (), ()
        for k in tl.static_range(KX * KY):
            higher = (u[k] > best[k]) | ((u[k] != u[k]) & (best[k] == best[k]))  # the first NaN stays
            new_best += (tl.where(higher, u[k], best[k]),)
            new_label += (tl.where(higher, c, careful[k]),)
        best, careful = new_best, new_label

    out = label_ptr + b.to(tl.int64) * label_at[0]
    for k in tl.static_range(KX * KY):
        i, j = i0 + k % KY, j0 + k // KY
        to = out + i.to(tl.int64) * label_at[1] + j.to(tl.int64) * label_at[2]
        chosen = tl.where(poisoned, careful[k], label[k])
        tl.store(to, chosen.to(tl.int64), mask=here & (i < i1) & (j < j1))
