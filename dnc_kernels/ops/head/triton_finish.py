"""The end of a step in Triton: partial sums become the loss and small gradients, and the sub-centroids move.

Reads the partial sums of the parts before, the sums of the pixels of each cluster [M,D] float32 (or their units,
momentum/triton_sums.py) and the sub-centroids; writes five numbers, the gradients [2D+1+2C] and the buffers of
`nn.SubCentroids`. Floor of ADE20K (M=1500, D=256): 4.6 MB over 3.0 TB/s = 2 us; the launch is what it costs.
Plan: first a program for each class where there is an update, one for the numbers, then one for each 32 gradients.
Deterministic: every sum has one order. Reference: reference.py for the numbers, `nn.SubCentroids._update` for the buffers.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from ..momentum.triton_sums import add_units, move
from .triton_labels import count_rows


@triton.jit
def _total(ptr, P, stride, BLOCK: tl.constexpr):
    """Sum over P numbers, `stride` apart, in float64: each lane its own in order, then the lanes as a tree."""
    p = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, P, BLOCK):
        total += tl.load(ptr + (start + p).to(tl.int64) * stride, mask=start + p < P, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _columns(to_ptr, from_ptr, block, P, width, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """Sums over the P rows of a table [P,width] of BLOCK columns, in row order."""
    j = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK_P, BLOCK], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < P)[:, None] & (j < width)[None, :]
        total += tl.load(from_ptr + p.to(tl.int64)[:, None] * width + j[None, :], mask=mask, other=0.0)
    tl.store(to_ptr + j, tl.sum(total, 0), mask=j < width)


@triton.jit
def _update_class(
    c, buffers, sums_ptr, pixels_ptr, bucket_ptr, counts_ptr, counters_ptr, state_ptr, P, C, D, buckets, decay, dead,
    K: tl.constexpr, UNIT: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Move the sub-centroids of class c and write down what has happened to them."""
    k = tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    momentum = tl.load(state_ptr)
    moves = tl.load(state_ptr + 1) > 0
    seen = tl.full([], 0, tl.int64)
    for i in range(K):
        m = c * K + i
        if bucket_ptr is None:
            total = tl.load(sums_ptr + m.to(tl.int64) * D + d, mask=d < D, other=0.0)
            count = tl.load(pixels_ptr + m)
        else:
            total, count = add_units(bucket_ptr, sums_ptr, pixels_ptr, m, buckets, d, D, UNIT, BLOCK_U, BLOCK_D)
            count = count.to(tl.int64)
        tl.store(buffers.last_counts + m, count)
        seen += count
        if buffers.previous is not None:
            old = tl.load(buffers.prototypes + m.to(tl.int64) * D + d, mask=d < D, other=0.0)
            tl.store(buffers.previous + m.to(tl.int64) * D + d, old, mask=d < D)
        move(buffers.prototypes + m.to(tl.int64) * D, total, tl.where(moves, count, 0), d, D, momentum)
    own = c * K + k
    won = tl.load(counters_ptr + own, mask=k < K, other=0)
    wins = tl.load(buffers.wins + own, mask=k < K, other=0.0)
    wins = wins * tl.where(tl.max(won, 0) > 0, decay, 1.0) + won.to(tl.float32)
    tl.store(buffers.wins + own, wins, mask=k < K)
    idle = tl.load(buffers.idle_updates + own, mask=k < K, other=0) + (seen > 0).to(tl.int64)
    tl.store(buffers.idle_updates + own, tl.where(wins >= dead * tl.sum(wins, 0), 0, idle), mask=k < K)
    one = C + c + tl.arange(0, 1)
    tl.store(buffers.class_counts + c + tl.arange(0, 1), count_rows(counts_ptr, one, one >= 0, P, 2 * C + 1, BLOCK_P))


@triton.jit
def head_finish_kernel(
    losses_ptr, parts_ptr, factors_ptr, counts_ptr, counters_ptr, to_scale_ptr, to_norm_ptr, to_affine_ptr, results, grads_ptr,
    sums_ptr, pixels_ptr, bucket_ptr, state_ptr, buffers, programs, C, D, buckets, ppc_weight, ppd_weight, decay, dead,
    PPC: tl.constexpr, K: tl.constexpr, UNIT: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """programs: rows of losses, parts, counts, to_scale, to_norm and to_affine. buffers None: no update."""
    program = tl.program_id(0)
    classes = 0
    if buffers is not None:
        classes = C
        if program < C:
            _update_class(
                program, buffers, sums_ptr, pixels_ptr, bucket_ptr, counts_ptr, counters_ptr, state_ptr, programs[2], C, D,
                buckets, decay, dead, K, UNIT, BLOCK_U, BLOCK_P, BLOCK_K, BLOCK_D,
            )  # fmt: skip
    if program == classes:
        cross_entropy = _total(losses_ptr, programs[0], 2, BLOCK) / tl.load(factors_ptr + 5).to(tl.float64)
        count = tl.load(factors_ptr + 6).to(tl.float64)
        zero = tl.full([], 0.0, tl.float64)
        ppc, ppd = zero, zero
        if parts_ptr is not None:
            if PPC:
                ppc = _total(parts_ptr, programs[1], 2, BLOCK) / count
            if ppd_weight != 0:
                ppd = _total(parts_ptr + 1, programs[1], 2, BLOCK) / count
        tl.store(results.cross_entropy, cross_entropy.to(tl.float32))
        tl.store(results.ppc, ppc.to(tl.float32))
        tl.store(results.ppd, ppd.to(tl.float32))
        tl.store(results.loss, (cross_entropy + ppc_weight * ppc + ppd_weight * ppd).to(tl.float32))
        rest = counters_ptr + C.to(tl.int64) * K
        labelled = tl.maximum(tl.load(rest + 1), 1).to(tl.float32)
        tl.store(results.accuracy, tl.div_rn(tl.load(rest).to(tl.float32), labelled))
        tl.store(grads_ptr + 2 * D, _total(to_scale_ptr, programs[3], 1, BLOCK).to(tl.float32))
        if buffers is not None:
            tl.store(buffers.num_updates, tl.load(buffers.num_updates) + 1)
            tl.store(buffers.nonfinite_pixels, tl.load(buffers.nonfinite_pixels) + tl.load(rest + 2))
            wrong = 2 * C + tl.arange(0, 1)
            bad = tl.sum(count_rows(counts_ptr, wrong, wrong >= 0, programs[2], 2 * C + 1, BLOCK_P), 0)
            tl.store(buffers.bad_labels, tl.load(buffers.bad_labels) + bad)
    if program > classes:
        block = program - classes - 1
        affine = tl.cdiv(2 * D, BLOCK)
        if block < affine:
            _columns(grads_ptr, to_affine_ptr, block, programs[5], 2 * D, BLOCK_P, BLOCK)
        else:
            _columns(grads_ptr + 2 * D + 1, to_norm_ptr, block - affine, programs[4], 2 * C, BLOCK_P, BLOCK)
