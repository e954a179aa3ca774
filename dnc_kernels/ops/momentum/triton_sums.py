"""Kernels of sums[m] = sum of x[n] over cluster[n] == m and of the momentum update (csrc/include/dnc/momentum.h).

Reads x [N,D] or [B,D,H,W] (float32/float16/bfloat16, any strides) once and cluster [N] int64 three times; writes sums [M,D]
float32 and counts [M] int64, or reads and writes the sub-centroids [M,D] float32. Floors of ADE20K (N=131072, M=1500, D=256):
memory, x is 67 MB in bfloat16, 23 us at 3 TB/s, 134 MB and 46 us in float32 (6 MB of partial sums are written and read in L2);
arithmetic, 16 N D multiply-adds with a one-hot matrix, 1.1 GFLOP, 2 us on tensor cores (float32: three times that).

Plan, five launches. A bucket is 16 neighbouring clusters (m / 16), about a class or two: where classes are coherent in the
image, a bucket's pixels are neighbours, and [B,D,H,W] is read in whole sectors although K clusters alternate inside a class.
A stable counting sort by bucket: (1) the histogram of every tile of pixels; (2) per bucket its exclusive sum over the tiles,
and room for the bucket in the order and for its units; (3) every pixel to its place. (4) A unit is at most UNIT pixels of a
bucket: a program multiplies their one-hot matrix [16,P] by x [P,BLOCK_D], accumulates in float32, and writes 16 partial sums.
(5) A program per cluster adds its units in order and, for the update, moves the sub-centroid. A bucket with half the pixels is
many units. Where pixels of different buckets alternate, rows are still read whole, but [B,D,H,W] costs a sector an element.
Products with 0 and 1 are exact: float32 is cut into three bfloat16 pieces that add up to it.
A NaN or an Inf makes its unit's sums of that channel NaN, and so may an overflow. Only then does step 5 read the bucket's
pixels again, and adds the finite ones of its cluster.
Determinism: which room a bucket gets depends on the order of atomics, what it holds does not: pixels are in order inside a
bucket, so are its units, and every sum has a fixed order. Reference: reference.py; in CUDA C++: csrc/cuda/momentum.cu.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from .._triton import pixel_offset

#: Clusters of a bucket: the smallest side of a product on tensor cores. A power of 2, its logarithm, and its low bits.
WIDTH = 16
_WIDTH = tl.constexpr(WIDTH)
_SHIFT = tl.constexpr(4)
_WITHIN = tl.constexpr(15)
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _bucket_of(cluster_ptr, n, N, M):
    """Bucket of pixels n, and the cluster within it; -1 where left out."""
    cluster = tl.load(cluster_ptr + n, mask=n < N, other=-1)
    inside = (cluster >= 0) & (cluster < M)
    return tl.where(inside, cluster >> _SHIFT, -1).to(tl.int32), tl.where(inside, cluster & _WITHIN, -1).to(tl.int32)


@triton.jit(do_not_specialize=["N", "M"])
def momentum_histogram_kernel(
    cluster_ptr, histogram_ptr, cursor_ptr, N, M, buckets, BLOCK_T: tl.constexpr, BLOCK_B: tl.constexpr
):
    """Pixels of each bucket in each tile, [tiles,buckets]. Clears the two cursors."""
    tile = tl.program_id(0)
    bucket, _ = _bucket_of(cluster_ptr, tile * BLOCK_T + tl.arange(0, BLOCK_T), N, M)
    b = tl.arange(0, BLOCK_B)
    for first in range(0, buckets, BLOCK_B):
        here = (bucket >= first) & (bucket < first + BLOCK_B)
        count = tl.histogram(tl.where(here, bucket - first, 0), BLOCK_B, mask=here)
        tl.store(histogram_ptr + tile.to(tl.int64) * buckets + first + b, count, mask=first + b < buckets)
    if tile == 0:
        tl.store(cursor_ptr + tl.arange(0, 2), tl.zeros([2], tl.int32))


@triton.jit(do_not_specialize=["tiles"])
def momentum_columns_kernel(
    histogram_ptr, bucket_ptr, cursor_ptr, unit_bucket_ptr, unit_begin_ptr, tiles, buckets,
    UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """A program per bucket: its column of the histogram becomes places, and its units are listed.

    bucket [3,buckets]: first place in the order, pixels, first unit.
    """
    b = tl.program_id(0)
    t = tl.arange(0, BLOCK_T)
    total = 0
    for first in range(0, tiles, BLOCK_T):
        at = histogram_ptr + (first + t).to(tl.int64) * buckets + b
        count = tl.load(at, mask=first + t < tiles, other=0)
        tl.store(at, total + tl.cumsum(count, axis=0) - count, mask=first + t < tiles)
        total += tl.sum(count, axis=0)
    units = (total + UNIT - 1) // UNIT
    start = tl.atomic_add(cursor_ptr, total, sem="relaxed")
    first_unit = tl.atomic_add(cursor_ptr + 1, units, sem="relaxed")
    tl.store(bucket_ptr + b, start)
    tl.store(bucket_ptr + buckets + b, total)
    tl.store(bucket_ptr + 2 * buckets + b, first_unit)
    for first in range(0, units, BLOCK_U):
        u = first + tl.arange(0, BLOCK_U)
        tl.store(unit_bucket_ptr + first_unit + u, tl.full([BLOCK_U], 0, tl.int32) + b, mask=u < units)
        tl.store(unit_begin_ptr + first_unit + u, u * UNIT, mask=u < units)


@triton.jit(do_not_specialize=["N", "M"])
def momentum_place_kernel(
    cluster_ptr, histogram_ptr, bucket_ptr, order_ptr, N, M, buckets, BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr
):
    """The order [N]: by bucket, then by pixel; an entry is pixel * 16 + the cluster within the bucket."""
    tile = tl.program_id(0)
    n = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    bucket, within = _bucket_of(cluster_ptr, n, N, M)
    before = tl.zeros([BLOCK_J, BLOCK_T], tl.int32)
    for first in range(0, BLOCK_T, BLOCK_J):
        other = tile * BLOCK_T + first + tl.arange(0, BLOCK_J)
        of_other, _ = _bucket_of(cluster_ptr, other, N, M)
        before += ((of_other[:, None] == bucket[None, :]) & (other[:, None] < n[None, :])).to(tl.int32)
    rank = tl.sum(before, axis=0)
    inside = bucket >= 0
    place = tl.load(histogram_ptr + tile.to(tl.int64) * buckets + bucket, mask=inside, other=0)
    place += tl.load(bucket_ptr + bucket, mask=inside, other=0) + rank
    tl.store(order_ptr + place, n.to(tl.int64) * _WIDTH + within, mask=inside)


@triton.jit
def _upper_bits(x):
    """The float32 of the first 8 bits of each mantissa: x in bfloat16, cut and not rounded, so that nothing overflows."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _add_product(one, x, acc, EMULATED: tl.constexpr):
    """Add one @ x to acc, for a matrix of zeros and ones: exact products, float32 sums.

    EMULATED: factors are float32, since the interpreter knows no product of bfloat16.
    """
    if x.dtype == tl.float32:
        high = _upper_bits(x)
        rest = x - high
        middle = _upper_bits(rest)
        piece: tl.constexpr = tl.float32 if EMULATED else tl.bfloat16
        left = one.to(tl.float32).to(piece)
        acc = tl.dot(left, high.to(piece), acc, input_precision="ieee")
        acc = tl.dot(left, middle.to(piece), acc, input_precision="ieee")
        acc = tl.dot(left, (rest - middle).to(piece), acc, input_precision="ieee")
    else:
        factor: tl.constexpr = tl.float32 if EMULATED else x.dtype
        acc = tl.dot(one.to(tl.float32).to(factor), x.to(factor), acc, input_precision="ieee")
    return acc


@triton.jit
def momentum_units_kernel(
    x_ptr, order_ptr, bucket_ptr, cursor_ptr, unit_bucket_ptr, unit_begin_ptr, partial_ptr, unit_counts_ptr, buckets, D,
    hw, width, stride_b, stride_h, stride_w, stride_d,
    MAP: tl.constexpr, ADJACENT: tl.constexpr, UNIT: tl.constexpr, EMULATED: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums [unit,16,D] and numbers [unit,16] of a unit's pixels of each of the bucket's clusters."""
    unit = tl.program_id(0)
    if unit < tl.load(cursor_ptr + 1):
        b = tl.load(unit_bucket_ptr + unit)
        begin = tl.load(unit_begin_ptr + unit)
        pixels = tl.minimum(tl.load(bucket_ptr + buckets + b) - begin, UNIT)
        order_ptr += tl.load(bucket_ptr + b) + begin
        p = tl.arange(0, BLOCK_P)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        j = tl.arange(0, _WIDTH)
        acc = tl.zeros([_WIDTH, BLOCK_D], tl.float32)
        count = tl.zeros([_WIDTH], tl.int32)
        for first in range(0, pixels, BLOCK_P):
            inside = first + p < pixels
            entry = tl.load(order_ptr + first + p, mask=inside, other=0)
            place = pixel_offset((entry >> _SHIFT).to(tl.int32), hw, width, stride_b, stride_h, stride_w, MAP)
            one = (j[:, None] == (entry & _WITHIN)[None, :]) & inside[None, :]  # [16,P]
            if ADJACENT:
                x = tl.load(x_ptr + place[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)  # [P,D]
            else:
                # [D,P]: neighbouring lanes are neighbouring pixels
                at = x_ptr + d.to(tl.int64)[:, None] * stride_d + place[None, :]
                x = tl.trans(tl.load(at, mask=(d < D)[:, None] & inside[None, :], other=0.0))
            acc = _add_product(one, x, acc, EMULATED)
            count += tl.sum(one.to(tl.int32), axis=1)
        row = unit.to(tl.int64) * _WIDTH + j
        tl.store(partial_ptr + row[:, None] * D + d[None, :], acc, mask=(d < D)[None, :])
        if tl.program_id(1) == 0:
            tl.store(unit_counts_ptr + row, count)


@triton.jit
def _sum_finite(
    x_ptr, order_ptr, pixels, within, D, hw, width, stride_b, stride_h, stride_w, stride_d,
    MAP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum [BLOCK_D] and number of the finite pixels of one cluster, from its bucket's part of the order."""
    p, d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    count = tl.full([], 0, tl.int32)
    for first in range(0, pixels, BLOCK_P):
        inside = first + p < pixels
        entry = tl.load(order_ptr + first + p, mask=inside, other=0)
        own = inside & ((entry & _WITHIN) == within)
        place = pixel_offset((entry >> _SHIFT).to(tl.int32), hw, width, stride_b, stride_h, stride_w, MAP)
        at = x_ptr + place[:, None] + d.to(tl.int64)[None, :] * stride_d
        x = tl.load(at, mask=own[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        own = own & (tl.min((tl.abs(x) <= _LARGEST).to(tl.int32), axis=1) > 0)  # false for NaN
        total += tl.sum(tl.where(own[:, None], x, 0.0), axis=0)
        count += tl.sum(own.to(tl.int32), axis=0)
    return total, count


@triton.jit
def move(row_ptr, total, count, d, D, momentum):
    """unit(momentum * row + (1 - momentum) * unit(total)) over a row with pixels, unless that is no direction.

    In float64: no length of float32 sums overflows or vanishes.
    """
    row = tl.load(row_ptr + d, mask=d < D, other=0.0).to(tl.float64)
    f = total.to(tl.float64)
    length = tl.sqrt(tl.sum(f * f, axis=0))
    ok = (count > 0) & (length > 0) & (length < float("inf"))
    updated = momentum * row + (1.0 - momentum) * (f / tl.where(ok, length, 1.0))
    norm = tl.sqrt(tl.sum(updated * updated, axis=0))
    ok = ok & (norm > 0) & (norm < float("inf"))
    tl.store(row_ptr + d, (updated / tl.where(ok, norm, 1.0)).to(tl.float32), mask=ok & (d < D))


@triton.jit
def double(high, low):
    """A float64 from two float32."""
    return tl.full([], 0.0, tl.float64) + high + low


@triton.jit
def add_units(
    bucket_ptr, partial_ptr, unit_counts_ptr, m, buckets, d, D, UNIT: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Sum [BLOCK_D] and number of the pixels of cluster m: its units, in order."""
    b, within = m >> _SHIFT, m & _WITHIN
    first_unit = tl.load(bucket_ptr + 2 * buckets + b).to(tl.int64)
    units = (tl.load(bucket_ptr + buckets + b) + UNIT - 1) // UNIT
    u = tl.arange(0, BLOCK_U)
    total = tl.zeros([BLOCK_D], tl.float32)
    count = tl.full([], 0, tl.int32)
    for first in range(0, units, BLOCK_U):
        inside = first + u < units
        row = (first_unit + first + u) * _WIDTH + within
        part = tl.load(partial_ptr + row[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)  # [U,D]
        total += tl.sum(part, axis=0)
        count += tl.sum(tl.load(unit_counts_ptr + row, mask=inside, other=0), axis=0)
    return total, count


@triton.jit
def momentum_result_kernel(
    x_ptr, order_ptr, bucket_ptr, partial_ptr, unit_counts_ptr, target_ptr, counts_ptr, buckets, D,
    hw, width, stride_b, stride_h, stride_w, stride_d, momentum_high, momentum_low,
    UPDATE: tl.constexpr, MAP: tl.constexpr, UNIT: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program per cluster: its units, added in order, give sums and counts, or move its sub-centroid (UPDATE)."""
    m = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    total, count = add_units(bucket_ptr, partial_ptr, unit_counts_ptr, m, buckets, d, D, UNIT, BLOCK_U, BLOCK_D)
    b, within = m >> _SHIFT, m & _WITHIN
    if tl.min((tl.abs(total) <= _LARGEST).to(tl.int32), axis=0) == 0:
        total, count = _sum_finite(
            x_ptr, order_ptr + tl.load(bucket_ptr + b), tl.load(bucket_ptr + buckets + b), within, D, hw, width,
            stride_b, stride_h, stride_w, stride_d, MAP, BLOCK_P, BLOCK_D,
        )  # fmt: skip
    at = target_ptr + m.to(tl.int64) * D
    if UPDATE:
        move(at, total, count, d, D, double(momentum_high, momentum_low))
    else:
        tl.store(at + d, total, mask=d < D)
        tl.store(counts_ptr + m, count.to(tl.int64))


@triton.jit
def momentum_apply_kernel(rows_ptr, sums_ptr, counts_ptr, D, momentum_high, momentum_low, BLOCK_D: tl.constexpr):
    """The move of every row [M,D] from sums [M,D] and counts [M], a program each."""
    m = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    at = m.to(tl.int64) * D
    total = tl.load(sums_ptr + at + d, mask=d < D, other=0.0)
    move(rows_ptr + at, total, tl.load(counts_ptr + m), d, D, double(momentum_high, momentum_low))
