"""Sinkhorn forward in Triton: formulas in csrc/include/dnc/sinkhorn.h, reference in reference.py; launched by triton.py.

With Z = (s - shift)/epsilon, per group of n pixels and with v = 0 first, a pair of marginal steps is one sum over pixels:

    t = 1:  c[k] = sum_n exp((s[n,k] - m[k])/epsilon), m[k] = max_n s[n,k];   u[k] = (max_k m[k] - m[k])/epsilon - log(K c[k])
    t > 1:  c[k] = sum_n S[n,k], S = softmax_k(Z + u);                        u[k] <- u[k] - log(K c[k] / n)

Reads similarity [N,K] (float32/float16/bfloat16, any strides) and group [N] int64 in each of T + 2 passes; writes plan [N,K]
and assignment [N] in the last. Floors of ADE20K (N=131072, K=10, float32, T=3): memory, 6.3 MB once, 2 us at 3 TB/s, and T + 1
more passes through L2, 1 us each; arithmetic, 2 (T + 1) N K exps and logs at 16 a clock and multiprocessor, 3 us. Launches cost
more: T + 3 of them.

Plan: a program owns BLOCK_N pixels, the K similarities of each side by side. Only column sums [G,K] cross programs. They are
int64 multiples of 2^-q: adding integers is exact, so no order of atomics changes a bit. One scale is enough: terms lie in
[0,1], and their sum is at least 1 for t = 1, and at least 1/K for t > 1 (u made every column of exp(Z + u + v) sum to 1/K, so
no row of it exceeds 1, and dividing by the rows' sums shrinks no column). The error of a sum is at most n 2^-(q+1) with
q = 62 - bits(N), hence N^2 K 2^-62 of it: 4e-8 for ADE20K, and below 2 eps sqrt(N) up to N = 2^24.
Contention: a label that fills a sixteenth of a tile is summed inside the tile first (`_frequent`): atomics do not pile up where
a class is large, whether its pixels lie together or are scattered.
Every program derives u of the groups that it meets from the sums of the pass before. What later passes need (u - max u, steps,
history, zeros for the sums after next) is written by the program that owns the group.
Deterministic: integer sums and maxima; float sums inside a tile have a fixed order.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

#: Pixels of a tile whose labels are tried as those of many pixels.
_CANDIDATES = tl.constexpr(16)
#: A label of at least this part of a tile is reduced before its atomics.
_SHARE = tl.constexpr(16)
#: Differences over epsilon are cut here, where exp has long been 0, and so stay finite at any epsilon; largest float32.
_FAR = tl.constexpr(1e30)
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def read_rows(
    similarity_ptr, group_ptr, n, N, G, K: tl.constexpr, stride_sn, stride_sk, HAS_GROUP: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Similarities [BLOCK_N,BLOCK_K], group [BLOCK_N] or -1 where the pixel is left out, whether the group is in range.

    Zeros beyond K, and for a row that is not finite.
    """
    k = tl.arange(0, BLOCK_K)
    inside = n < N
    label = tl.zeros_like(n)
    if HAS_GROUP:
        wide = tl.load(group_ptr + n, mask=inside, other=-1)
        inside = inside & (wide >= 0) & (wide < G)
        label = wide.to(tl.int32)
    at = n.to(tl.int64)[:, None] * stride_sn + k.to(tl.int64)[None, :] * stride_sk
    s = tl.load(similarity_ptr + at, mask=inside[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
    finite = tl.min((tl.abs(s) <= _LARGEST).to(tl.int32), axis=1) > 0  # false for NaN
    s = tl.where(finite[:, None], s, 0.0)
    return s, tl.where(inside & finite, label, -1), inside


@triton.jit
def scaled(s, shift, inverse):
    """(s - shift)/epsilon, in [-_FAR, _FAR] whatever the numbers are."""
    difference = tl.minimum(tl.maximum(s - shift, -_LARGEST), _LARGEST)
    return tl.minimum(tl.maximum(difference * inverse, -_FAR), _FAR)


@triton.jit
def row_maximum(x, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Largest of the first K columns of every row [rows,1]."""
    return tl.max(tl.where((tl.arange(0, BLOCK_K) < K)[None, :], x, -float("inf")), axis=1)[:, None]


@triton.jit
def softmax(score):
    """Softmax of rows with at least one finite score. exp is ex2.approx: relative error 2^-22 and |score - maximum| 2^-24."""
    weight = tl.exp(score - tl.max(score, axis=1)[:, None])
    return weight / tl.sum(weight, axis=1)[:, None]


@triton.jit
def _frequent(label, group_ptr, start, N, BLOCK_N: tl.constexpr, HAS_GROUP: tl.constexpr):
    """Labels [_CANDIDATES] of some pixels of the tile, and the number of its pixels of each; -1: no label."""
    candidate = tl.arange(0, _CANDIDATES)
    if HAS_GROUP:
        n = start + candidate * (BLOCK_N // _CANDIDATES)
        wide = tl.load(group_ptr + n, mask=n < N, other=-1)
        # a label beyond int32 equals none in the tile once it is -1
        candidate = tl.where((wide >= 0) & (wide < 2147483647), wide, -1).to(tl.int32)
    else:
        candidate = tl.where(candidate == 0, 0, -1)
    same = (candidate[:, None] == label[None, :]) & (candidate >= 0)[:, None]
    return candidate, tl.sum(same.to(tl.int32), axis=1)


@triton.jit
def add_rows(table_ptr, value, scale, label, group_ptr, start, N, K: tl.constexpr, HAS_GROUP: tl.constexpr):
    """Add value * scale [BLOCK_N,BLOCK_K], rounded to integers, to the rows of `table` [G,K] that `label` names."""
    BLOCK_N: tl.constexpr = value.shape[0]
    BLOCK_K: tl.constexpr = value.shape[1]
    k = tl.arange(0, BLOCK_K)
    candidate, pixels = _frequent(label, group_ptr, start, N, BLOCK_N, HAS_GROUP)
    most = tl.max(pixels, axis=0)
    while most >= (BLOCK_N + _SHARE - 1) // _SHARE:
        leader = tl.max(tl.where(pixels == most, candidate, -1), axis=0)
        mine = label == leader
        total = tl.sum(tl.where(mine[:, None], value, 0.0), axis=0)
        tl.atomic_add(
            table_ptr + leader.to(tl.int64) * K + k, tl.floor(total * scale + 0.5).to(tl.int64), mask=k < K, sem="relaxed"
        )
        label = tl.where(mine, -1, label)
        pixels = tl.where(candidate == leader, 0, pixels)
        most = tl.max(pixels, axis=0)
    count = tl.floor(value * scale + 0.5).to(tl.int64)
    at = label.to(tl.int64)[:, None] * K + k[None, :]
    tl.atomic_add(table_ptr + at, count, mask=(label >= 0)[:, None] & (k < K)[None, :] & (count != 0), sem="relaxed")


@triton.jit
def order_key(x):
    """Integers, all positive, in the order of the floats."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483649


@triton.jit
def from_order_key(key):
    """The floats again; 0 for the key 0, which stands for none."""
    bits = (tl.where(key == 0, 2147483649, key) - 2147483649).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def count_and_maximum(largest_ptr, count_ptr, key, label, group_ptr, start, N, K: tl.constexpr, HAS_GROUP: tl.constexpr):
    """Raise the rows of `largest` [G,K] to the keys [BLOCK_N,BLOCK_K], and add the pixels of each group to `count` [G]."""
    BLOCK_N: tl.constexpr = key.shape[0]
    BLOCK_K: tl.constexpr = key.shape[1]
    k = tl.arange(0, BLOCK_K)
    candidate, pixels = _frequent(label, group_ptr, start, N, BLOCK_N, HAS_GROUP)
    most = tl.max(pixels, axis=0)
    while most >= (BLOCK_N + _SHARE - 1) // _SHARE:
        leader = tl.max(tl.where(pixels == most, candidate, -1), axis=0)
        mine = label == leader
        top = tl.max(tl.where(mine[:, None], key, 0), axis=0)
        tl.atomic_max(largest_ptr + leader.to(tl.int64) * K + k, top, mask=k < K, sem="relaxed")
        tl.atomic_add(count_ptr + leader, most.to(tl.int64), sem="relaxed")
        label = tl.where(mine, -1, label)
        pixels = tl.where(candidate == leader, 0, pixels)
        most = tl.max(pixels, axis=0)
    left = label >= 0
    tl.atomic_add(count_ptr + label, tl.full([BLOCK_N], 1, tl.int64), mask=left, sem="relaxed")
    at = largest_ptr + label.to(tl.int64)[:, None] * K + k[None, :]
    mask = left[:, None] & (k < K)[None, :]
    # a maximum only grows: a value that is out of date asks for an atomic too many, never for one too few
    tl.atomic_max(at, key, mask=mask & (key > tl.load(at, mask=mask, other=0, cache_modifier=".cg")), sem="relaxed")


@triton.jit(do_not_specialize=["N", "G"])
def sinkhorn_maxima_kernel(
    similarity_ptr, group_ptr, largest_ptr, count_ptr, N, G, stride_sn, stride_sk,
    K: tl.constexpr, HAS_GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Largest similarity of every column of every group (as a key, 0: none), and the pixels of each group."""
    start = tl.program_id(0) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    s, label, _ = read_rows(similarity_ptr, group_ptr, n, N, G, K, stride_sn, stride_sk, HAS_GROUP, BLOCK_K)
    count_and_maximum(largest_ptr, count_ptr, order_key(s), label, group_ptr, start, N, K, HAS_GROUP)


@triton.jit
def _potential(
    g,
    exists,
    t,
    base_ptr,
    sums_ptr,
    count_ptr,
    last_ptr,
    G,
    K: tl.constexpr,
    unit,
    tolerance,
    HAS_TOLERANCE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Step t of groups g [rows], from the sums of its pass: u, u - max u (-inf beyond K), pixels, steps, whether t was done.

    All three tables rotate: sums [3,G,K], base [2,G,K] (u[t-1] - max u[t-1]; for t = 1 the scaled maxima), last [2,G] steps.
    """
    k = tl.arange(0, BLOCK_K)
    mask = exists[:, None] & (k < K)[None, :]
    row = g.to(tl.int64)[:, None] * K + k[None, :]
    table = G.to(tl.int64) * K
    count = tl.load(count_ptr + g, mask=exists, other=0)
    pixels = tl.maximum(count, 1).to(tl.float32)
    base = tl.load(base_ptr + (t % 2) * table + row, mask=mask, other=0.0)
    # below 1/K lies only what rounding left
    c = tl.maximum(tl.load(sums_ptr + (t % 3) * table + row, mask=mask, other=0).to(tl.float32) * unit, 1.0 / K)
    u = base + (tl.where(t > 1, tl.log(pixels), 0.0) - tl.log(tl.full([], K, tl.float32)))[:, None] - tl.log(c)
    u = tl.where((count > 0)[:, None], u, 0.0)
    centred = u - row_maximum(u, K, BLOCK_K)
    steps = tl.where(count > 0, t, 0)
    moved = count > 0
    if HAS_TOLERANCE:
        last = tl.load(last_ptr + ((t + 1) % 2) * G + g, mask=exists, other=0)
        # the new u divides by the column sums of the coupling that stands
        error = tl.max(tl.where((k < K)[None, :], tl.abs(c * (K / pixels)[:, None] - 1.0), 0.0), axis=1)
        moved = moved & ((t == 1) | ((last == t - 1) & (error > tolerance)))
        steps = tl.where(moved, t, last)
        centred = tl.where(moved[:, None] | (count == 0)[:, None], centred, base)
    return u, tl.where((k < K)[None, :], centred, -float("inf")), count, steps, moved


@triton.jit
def _keep_potential(
    t, base_ptr, sums_ptr, count_ptr, last_ptr, history_ptr, steps_ptr, G, K: tl.constexpr, unit, tolerance,
    HAS_TOLERANCE: tl.constexpr, HAS_HISTORY: tl.constexpr, HAS_STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write step t of the program's own groups, and clear the sums of step t + 2."""
    k = tl.arange(0, BLOCK_K)
    g = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = g < G
    u, centred, _, steps, moved = _potential(
        g, exists, t, base_ptr, sums_ptr, count_ptr, last_ptr, G, K, unit, tolerance, HAS_TOLERANCE, BLOCK_K
    )
    mask = exists[:, None] & (k < K)[None, :]
    row = g.to(tl.int64)[:, None] * K + k[None, :]
    table = G.to(tl.int64) * K
    tl.store(base_ptr + ((t + 1) % 2) * table + row, centred, mask=mask)
    tl.store(sums_ptr + ((t + 2) % 3) * table + row, tl.zeros([BLOCK_N, BLOCK_K], tl.int64), mask=mask)
    if HAS_TOLERANCE:
        tl.store(last_ptr + (t % 2) * G + g, steps, mask=exists)
    if HAS_STEPS:
        tl.store(steps_ptr + g, steps.to(tl.int64), mask=exists)
    if HAS_HISTORY:
        if HAS_TOLERANCE:
            before = tl.load(history_ptr + (t - 1) * table + row, mask=mask & (steps > 0)[:, None], other=0.0)
            u = tl.where(moved[:, None], u, before)
        tl.store(history_ptr + t * table + row, u, mask=mask)


@triton.jit
def _keep_maxima(
    largest_ptr, count_ptr, base_ptr, history_ptr, G, K: tl.constexpr, inverse,
    HAS_HISTORY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write what step 1 starts from: the maxima over epsilon, measured from the largest, row 0 of the history."""
    k = tl.arange(0, BLOCK_K)
    g = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (g < G)[:, None] & (k < K)[None, :]
    row = g.to(tl.int64)[:, None] * K + k[None, :]
    count = tl.load(count_ptr + g, mask=g < G, other=0)
    m = from_order_key(tl.load(largest_ptr + row, mask=mask, other=0))
    peak = row_maximum(m, K, BLOCK_K)
    tl.store(base_ptr + G.to(tl.int64) * K + row, -scaled(m, peak, inverse), mask=mask)
    if HAS_HISTORY:
        tl.store(history_ptr + row, tl.where((count > 0)[:, None], peak + tl.zeros_like(m), 0.0), mask=mask)


@triton.jit(do_not_specialize=["t", "N", "G"])
def sinkhorn_sums_kernel(
    similarity_ptr, group_ptr, largest_ptr, count_ptr, base_ptr, sums_ptr, last_ptr, history_ptr, t, N, G, stride_sn, stride_sk,
    inverse, scale, unit, tolerance,
    K: tl.constexpr, FIRST: tl.constexpr, HAS_GROUP: tl.constexpr, HAS_TOLERANCE: tl.constexpr, HAS_HISTORY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Column sums of step t: of exp((s - m)/epsilon) for FIRST (t = 1), else of the softmax after step t - 1."""
    k = tl.arange(0, BLOCK_K)
    start = tl.program_id(0) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    s, label, _ = read_rows(similarity_ptr, group_ptr, n, N, G, K, stride_sn, stride_sk, HAS_GROUP, BLOCK_K)
    used = label >= 0
    if FIRST:
        mask = used[:, None] & (k < K)[None, :]
        m = from_order_key(tl.load(largest_ptr + label.to(tl.int64)[:, None] * K + k[None, :], mask=mask, other=0))
        value = tl.where(mask, tl.exp(scaled(s, m, inverse)), 0.0)
    else:
        _, centred, _, _, moved = _potential(
            label, used, t - 1, base_ptr, sums_ptr, count_ptr, last_ptr, G, K, unit, tolerance, HAS_TOLERANCE, BLOCK_K
        )
        value = softmax(scaled(s, row_maximum(s, K, BLOCK_K), inverse) + centred)
        if HAS_TOLERANCE:
            label = tl.where(moved, label, -1)
    add_rows(sums_ptr + (t % 3) * (G.to(tl.int64) * K), value, scale, label, group_ptr, start, N, K, HAS_GROUP)
    if start < G:  # the program owns groups
        if FIRST:
            _keep_maxima(largest_ptr, count_ptr, base_ptr, history_ptr, G, K, inverse, HAS_HISTORY, BLOCK_N, BLOCK_K)
        else:
            _keep_potential(
                t - 1, base_ptr, sums_ptr, count_ptr, last_ptr, history_ptr, sums_ptr, G, K, unit, tolerance,
                HAS_TOLERANCE, HAS_HISTORY, False, BLOCK_N, BLOCK_K,
            )  # fmt: skip


@triton.jit
def transported(
    s, label, used, t, count_ptr, base_ptr, sums_ptr, last_ptr, G, K: tl.constexpr, inverse, unit, tolerance,
    HAS_TOLERANCE: tl.constexpr, ITERATED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of rows s [BLOCK_N,BLOCK_K] after step t: the logarithm of the plan up to a constant, and what is largest at the
    assigned column.
    """
    k = tl.arange(0, BLOCK_K)
    score = scaled(s, row_maximum(s, K, BLOCK_K), inverse)
    nearest = tl.where((k < K)[None, :], s, -float("inf"))
    if ITERATED:
        _, centred, count, _, _ = _potential(
            label, used, t, base_ptr, sums_ptr, count_ptr, last_ptr, G, K, unit, tolerance, HAS_TOLERANCE, BLOCK_K
        )
        score += centred
        # one pixel has a uniform plan, and takes its nearest
        nearest = tl.where((count == 1)[:, None], nearest, score)
    else:
        score = tl.where((k < K)[None, :], score, -float("inf"))
    return score, nearest


@triton.jit(do_not_specialize=["t", "N", "G"])
def sinkhorn_result_kernel(
    similarity_ptr, group_ptr, count_ptr, base_ptr, sums_ptr, last_ptr, assignment_ptr, plan_ptr, history_ptr, steps_ptr,
    t, N, G, stride_sn, stride_sk, inverse, unit, tolerance,
    K: tl.constexpr, ITERATED: tl.constexpr, HAS_GROUP: tl.constexpr, HAS_TOLERANCE: tl.constexpr, HAS_ASSIGNMENT: tl.constexpr,
    HAS_PLAN: tl.constexpr, HAS_HISTORY: tl.constexpr, HAS_STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Plan and assignment after step t, the last one; without any step (not ITERATED) from the similarities alone."""
    k = tl.arange(0, BLOCK_K)
    start = tl.program_id(0) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    s, label, inside = read_rows(similarity_ptr, group_ptr, n, N, G, K, stride_sn, stride_sk, HAS_GROUP, BLOCK_K)
    used = label >= 0
    score, nearest = transported(
        s, label, used, t, count_ptr, base_ptr, sums_ptr, last_ptr, G, K, inverse, unit, tolerance, HAS_TOLERANCE, ITERATED,
        BLOCK_K,
    )  # fmt: skip
    if HAS_ASSIGNMENT:
        best = tl.argmax(nearest, axis=1, tie_break_left=True)
        tl.store(assignment_ptr + n, tl.where(used, best, -1).to(tl.int64), mask=n < N)
    if HAS_PLAN:
        plan = tl.where(used[:, None], softmax(score), tl.where(inside, float("nan"), 0.0)[:, None])
        tl.store(plan_ptr + n.to(tl.int64)[:, None] * K + k[None, :], plan, mask=(n < N)[:, None] & (k < K)[None, :])
    if ITERATED and (HAS_HISTORY or HAS_STEPS):
        if start < G:  # the program owns groups; what is stored for later steps is read by nobody
            _keep_potential(
                t, base_ptr, sums_ptr, count_ptr, last_ptr, history_ptr, steps_ptr, G, K, unit, tolerance,
                HAS_TOLERANCE, HAS_HISTORY, HAS_STEPS, BLOCK_N, BLOCK_K,
            )  # fmt: skip
