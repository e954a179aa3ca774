"""What follows for a pixel from its sub-centroid, in Triton: the last pass of the transport and all that is counted.

    target = c*K + k* (sinkhorn/triton_forward.py; or a given k);  towards = own[n, k*]
    PPC += lse - towards / T,  PPD += (1 - towards)^2;  pull = -contrast / T - 2 distance (1 - towards)

Reads own similarities [N,K] float32, group, prediction and labels [N] int64, lse [N]; writes target, moving [N] int64, pull
float32, a row of sums for each program, the histogram of momentum/triton_sums.py, and integer counters: wins [M],
and pixels that are correct, labelled, not finite. Floor of ADE20K (N=131072, K=10): 5.2 MB + 45 bytes a pixel = 11 MB over
3.0 TB/s = 4 us. Plan: a program for a tile of pixels, as of the transport. Counters are reduced in the tile where a label is
frequent (`add_rows`). Deterministic: counters are integers, sums are added up in order. Reference: reference.py.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from ..sinkhorn.triton_forward import add_rows, read_rows, transported

#: log2 of the clusters of a bucket (momentum/triton_sums.py).
_SHIFT = tl.constexpr(4)


@triton.jit
def head_cluster_kernel(
    own_ptr, group_ptr, prediction_ptr, small_ptr, lse_ptr, assignment_ptr, tables, counters_ptr, factors_ptr, target_ptr,
    pull_ptr, moving_ptr, sums_ptr, histogram_ptr, cursor_ptr, num_updates_ptr, state_ptr,
    t, N, G, buckets, inverse, unit, inverse_t, warmup, momentum,
    K: tl.constexpr, CORRECT_ONLY: tl.constexpr, SCHEDULE: tl.constexpr, BINS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """tables: of the transport after t iterations, or None where `assignment` is given. momentum: of SCHEDULE, as pairs of
    float32 that add up.
    """
    k = tl.arange(0, BLOCK_K)
    program = tl.program_id(0)
    start = program * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    here = n < N
    s, label, _ = read_rows(own_ptr, group_ptr, n, N, G, K, K, 1, True, BLOCK_K)
    used = label >= 0
    if assignment_ptr is None:
        _, nearest = transported(
            s,
            label,
            used,
            t,
            tables.members,
            tables.base,
            tables.sums,
            tables.last,
            G,
            K,
            inverse,
            unit,
            0.0,
            False,
            True,
            BLOCK_K,
        )
        best = tl.argmax(nearest, axis=1, tie_break_left=True).to(tl.int64)
    else:
        best = tl.load(assignment_ptr + n, mask=used, other=0)
    target = tl.where(used, label.to(tl.int64) * K + best, -1)
    tl.store(target_ptr + n, target, mask=here)
    towards = tl.sum(tl.where(k[None, :] == best[:, None], s, 0.0), axis=1)

    ppc = tl.zeros([BLOCK_N], tl.float32)
    if lse_ptr is not None:
        lse = tl.load(lse_ptr + n, mask=used, other=0.0)
        ppc = tl.where(used, lse - towards * inverse_t, 0.0)
    ppd = tl.where(used, (1 - towards) * (1 - towards), 0.0)
    tl.store(sums_ptr + 2 * program, tl.sum(ppc, 0).to(tl.float64))
    tl.store(sums_ptr + 2 * program + 1, tl.sum(ppd, 0).to(tl.float64))
    if pull_ptr is not None:
        pull = -tl.load(factors_ptr + 2) * inverse_t - 2 * tl.load(factors_ptr + 3) * (1 - towards)
        tl.store(pull_ptr + n, tl.where(used, pull, 0.0), mask=here)

    prediction = tl.load(prediction_ptr + n, mask=here, other=-1)
    small = tl.load(small_ptr + n, mask=here, other=-1)
    labelled = here & (small >= 0) & (prediction >= 0)
    correct = labelled & (prediction == small)
    moving = target
    if CORRECT_ONLY:
        moving = tl.where(correct, target, -1)
    tl.store(moving_ptr + n, moving, mask=here)
    top = tl.argmax(tl.where((k < K)[None, :], s, -float("inf")), axis=1, tie_break_left=True)
    won = tl.where(used[:, None] & (k[None, :] == top[:, None]), 1.0, 0.0)
    add_rows(counters_ptr, won, 1.0, label, group_ptr, start, N, K, True)
    rest = counters_ptr + G.to(tl.int64) * K
    tl.atomic_add(rest, tl.sum(correct.to(tl.int64), 0), sem="relaxed")
    tl.atomic_add(rest + 1, tl.sum(labelled.to(tl.int64), 0), sem="relaxed")
    tl.atomic_add(rest + 2, tl.sum((here & (prediction < 0)).to(tl.int64), 0), sem="relaxed")
    if histogram_ptr is not None:
        b = tl.arange(0, BINS)
        bucket = tl.where(here, moving >> _SHIFT, -1).to(tl.int32)  # of -1 it is -1
        for first in range(0, buckets, BINS):
            inside = (bucket >= first) & (bucket < first + BINS)
            count = tl.histogram(tl.where(inside, bucket - first, 0), BINS, mask=inside)
            tl.store(histogram_ptr + program.to(tl.int64) * buckets + first + b, count, mask=first + b < buckets)
        if program == 0:
            tl.store(cursor_ptr + tl.arange(0, 2), tl.zeros([2], tl.int32))
    if state_ptr is not None:
        if program == 0:
            done = tl.load(num_updates_ptr)
            tl.store(state_ptr, _momentum(done.to(tl.float64), momentum, SCHEDULE))
            tl.store(state_ptr + 1, (done >= warmup).to(tl.float64))


@triton.jit
def _momentum(updates, given, SCHEDULE: tl.constexpr):
    """Momentum after so many updates, float64 (`nn.SubCentroids.momentum_now`)."""
    zero = tl.full([], 0.0, tl.float64)
    first, second, third = zero + given[0] + given[1], zero + given[2] + given[3], zero + given[4] + given[5]
    if SCHEDULE == "recent":
        return 1 - 1 / (first * updates + 1 / (1 - second))
    elif SCHEDULE == "ramp":
        share = updates / third
        share = tl.where(share < 1, share, 1.0)
        return second - (second - first) * (1 - _sine(3.141592653589793 * (share - 0.5))) / 2
    else:
        return first


@triton.jit
def _sine(x):
    """Of |x| <= pi/2 in float64, as its Taylor series to x^21; that of any number takes local memory."""
    series = tl.full([], 1.0, tl.float64)
    for i in tl.static_range(10):
        series = 1 - x * x / ((20 - 2 * i) * (21 - 2 * i)) * series
    return x * series
