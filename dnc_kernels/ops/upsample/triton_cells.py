"""Where target pixels lie between source pixels: what the upsample kernels in Triton are built on.

A cell is the square between source pixels (r,x) and (r+1,x+1); its target pixels are those interpolated from these four
corners. Cell -1 lies before the first source pixel, where positions are clamped to it. A thread owns a cell: it loads the four
corners of a class and makes all target pixels of the cell from them, in registers. A cell of more than MOST x MOST target
pixels is cut into parts. Where a map shrinks, most cells have no target pixel and their threads nothing to do.

Positions are ratios of integers, as in reference._neighbours, so that no rounding moves a pixel to another cell.
"""

# tuples of tensors grow while a kernel is compiled
# mypy: disallow-untyped-defs=False, disable-error-code=assignment

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl


class Axis(NamedTuple):
    """One dimension. Target pixel i of the whole map lies at (step * i + base) / unit source pixels."""

    step: int
    base: int
    unit: int
    last: int  # last source pixel of the whole map
    source0: int  # first source pixel at hand
    sources: int  # source pixels at hand
    target0: int  # likewise
    targets: int
    cell0: int  # first cell with a target pixel at hand
    cells: int  # from there to the last one

    @property
    def flat(self) -> bool:
        """Nothing is interpolated: every target pixel is a source pixel."""
        return self.step == self.unit

    @property
    def wide(self) -> bool:
        """Numerators do not fit 32 bits."""
        return (self.last + 3) * (self.step + self.unit) * 2 + abs(self.base) >= 2**31

    def parts(self, most: int) -> tuple[int, int]:
        """Target pixels of a part of a cell, parts of a cell."""
        pixels = -(-self.unit // self.step)
        parts = -(-pixels // most)
        return -(-pixels // parts), parts


@lru_cache(maxsize=4096)
def axis_of(
    sources: int, targets: int, align_corners: bool, all_sources: int, source0: int, all_targets: int, target0: int
) -> Axis:
    """Pixels source0.. of all_sources and target0.. of all_targets are at hand."""
    if not align_corners:
        step, base, unit = 2 * all_sources, all_sources - all_targets, 2 * all_targets
    elif all_sources == 1:  # all target pixels lie on the only source pixel: in cell 0, whose shares count as 0
        step, base, unit = 1, 0, all_targets
    else:
        step, base, unit = all_sources - 1, 0, max(all_targets - 1, 1)
    cell0, end = ((step * i + base) // unit for i in (target0, target0 + targets - 1))
    return Axis(step, base, unit, all_sources - 1, source0, sources, target0, targets, cell0, end - cell0 + 1)


@triton.jit
def first_target(r, axis, WIDE: tl.constexpr):
    """First target pixel at hand whose cell is r or a later one; the end of those at hand where there is none."""
    if WIDE:
        r = r.to(tl.int64)
    ahead = tl.maximum(r * axis.unit - axis.base, 0)
    i = (ahead + (axis.step - 1)) // axis.step
    return tl.minimum(tl.maximum(i, axis.target0), axis.target0 + axis.targets).to(tl.int32)


@triton.jit
def cell_of(i, axis, WIDE: tl.constexpr):
    """Cell of target pixels i."""
    if WIDE:
        i = i.to(tl.int64)
    ahead = i * axis.step + axis.base  # at least -unit: the division below must not see a negative number
    return ((ahead + axis.unit) // axis.unit - 1).to(tl.int32)


@triton.jit
def share(i, r, axis, WIDE: tl.constexpr):
    """Share of source pixel r+1 in target pixel i of cell r, rounded once; 0 before the first and behind the last cell."""
    if WIDE:
        i, r = i.to(tl.int64), r.to(tl.int64)
    beyond = (i * axis.step + axis.base - r * axis.unit).to(tl.float32)
    exact = tl.div_rn(beyond, tl.zeros_like(beyond) + axis.unit)
    return tl.where((r < 0) | (r >= axis.last), 0.0, exact)


@triton.jit
def shares(i, r, axis, WIDE: tl.constexpr, K: tl.constexpr):
    """Shares of K target pixels from i on."""
    made = ()
    for k in tl.static_range(K):
        made += (share(i + k, r, axis, WIDE),)
    return made


@triton.jit
def source_at(r, axis):
    """Source pixel r, or the nearest one at hand, counted from the first at hand."""
    inside = tl.minimum(tl.maximum(r, 0), axis.last) - axis.source0
    return tl.minimum(tl.maximum(inside, 0), axis.sources - 1)


LOG2E = tl.constexpr(1.4426950408889634)
# A score of -inf counts as this: its differences are finite, and its power of 2 is 0.
LOWEST = tl.constexpr(-2e38)

# How interpolation treats scores that are not finite.
FINITE = tl.constexpr(0)  # there are none
GUARDED = tl.constexpr(1)  # a pixel that has no share of them does not see them
EXACT = tl.constexpr(2)  # also, infinities of one sign stay


@triton.jit
def blend(low, high, part, MODE: tl.constexpr, FIRST: tl.constexpr):
    """`part` of the way from low to high.

    FIRST: the first pixel of a cell. Beside clamped ones, whose two neighbours are the same pixel, only it can have share 0.
    """
    if MODE == EXACT:
        return tl.where(part == 0, low, (1 - part) * low + part * high)
    elif MODE == GUARDED and FIRST:
        return tl.where(part == 0, low, tl.fma(part, high - low, low))
    else:
        return tl.fma(part, high - low, low)


@triton.jit
def interpolate(
    s00, s01, s10, s11, across, down, FLAT_X: tl.constexpr, FLAT_Y: tl.constexpr, MODE: tl.constexpr, KX: tl.constexpr,
    KY: tl.constexpr,
):  # fmt: skip
    """Scores of KX * KY target pixels, column by column, from the corners of their cell and the shares of its far ends."""
    made = ()
    for kx in tl.static_range(KX):
        if FLAT_X:
            top, bottom = s00, s10
        else:
            top, bottom = blend(s00, s01, across[kx], MODE, kx == 0), blend(s10, s11, across[kx], MODE, kx == 0)
        for ky in tl.static_range(KY):
            if FLAT_Y:
                made += (top,)
            else:
                made += (blend(top, bottom, down[ky], MODE, ky == 0),)
    return made


@triton.jit
def corner_offsets(b, y, x, rows, columns, scores_at, LARGE: tl.constexpr):
    """Offsets of the corners of cells (y,x) of samples b; scores_at: strides [b,c,h,w].

    int32, which halves a loop's address arithmetic, unless that would overflow (LARGE).
    """
    y0, y1, x0, x1 = source_at(y, rows), source_at(y + 1, rows), source_at(x, columns), source_at(x + 1, columns)
    sample = b.to(tl.int64) * scores_at[0]
    low = sample + y0.to(tl.int64) * scores_at[2]
    high = sample + y1.to(tl.int64) * scores_at[2]
    left, right = x0.to(tl.int64) * scores_at[3], x1.to(tl.int64) * scores_at[3]
    if LARGE:
        return low + left, low + right, high + left, high + right
    else:
        return (
            (low + left).to(tl.int32), (low + right).to(tl.int32), (high + left).to(tl.int32), (high + right).to(tl.int32)
        )  # fmt: skip


@triton.jit
def corner_scores(row, offsets, here):
    """fp32 scores of the class at `row` at the four corners; 0 where there is no cell."""
    s00 = tl.load(row + offsets[0], mask=here, other=0.0).to(tl.float32)
    s01 = tl.load(row + offsets[1], mask=here, other=0.0).to(tl.float32)
    s10 = tl.load(row + offsets[2], mask=here, other=0.0).to(tl.float32)
    s11 = tl.load(row + offsets[3], mask=here, other=0.0).to(tl.float32)
    return s00, s01, s10, s11


@triton.jit
def constants(count: tl.constexpr, value, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """`count` tensors [BLOCK]: one for each target pixel of a cell."""
    made = ()
    for _ in tl.static_range(count):
        made += (tl.full([BLOCK], value, dtype),)
    return made


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
