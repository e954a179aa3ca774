"""Sinkhorn backward in Triton: the adjoint unrolled over all steps; the same in C++: csrc/cpu/sinkhorn_backward.cpp.

    Z = (s - row maximum)/epsilon, P = softmax_k(Z + u[T]), G = grad_plan;  A = P (G - sum_k G P);  dZ = A;  du[T] = sum_n A
    t = T..2:  c = column sums of S = softmax_k(Z + u[t-1]), which u[t] divided by;  h = du[t]/c;  d[n] = sum_k h S
               dZ -= S (h - d);  du[t-1] = sum_n d S
    t = 1:     dZ -= du[1] exp((s - peak)/epsilon + u[1] + log K);  grad_similarity = dZ/epsilon

Reads similarity and group in T + 2 passes, grad_plan in two; reads and writes grad [N,K] float32, which holds dZ, in T + 1.
Floors of ADE20K (N=131072, K=10, float32, T=3): memory, 11.5 MB read and 5.2 MB written once, 6 us at 3 TB/s, and T + 1 more
passes of about 12 MB through L2, 2 us each; arithmetic, 2 (T + 1) N K exps at 16 a clock and multiprocessor, 3 us.
T + 3 launches.

Plan, contention and determinism as in triton_forward.py. Sums are signed integers in units that follow what is summed, per
group: at first the largest |G|, of which n terms of at most 2 P each are summed; then the sum over k of |du[t]|, which bounds
the sum over pixels and k of |d S|, since c = sum_n S. A NaN or an Inf in G spreads to its group alone.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from .triton_forward import add_rows, count_and_maximum, from_order_key, order_key, read_rows, row_maximum, scaled, softmax

#: A step's sums are multiples of its bound times this; seven times the bound still fits an int64.
_STEP_SCALE = tl.constexpr(2.0**60)
_STEP_UNIT = tl.constexpr(2.0**-60)


@triton.jit(do_not_specialize=["N", "G"])
def sinkhorn_gradient_size_kernel(
    similarity_ptr, group_ptr, grad_plan_ptr, size_ptr, count_ptr, N, G, stride_sn, stride_sk, stride_gn, stride_gk,
    K: tl.constexpr, HAS_GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Largest |grad_plan| of every group (as a key; NaN above all), and its pixels."""
    start = tl.program_id(0) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    _, label, _ = read_rows(similarity_ptr, group_ptr, n, N, G, K, stride_sn, stride_sk, HAS_GROUP, BLOCK_K)
    up = _read_gradient(grad_plan_ptr, n, label >= 0, stride_gn, stride_gk, K, BLOCK_K)
    # of positive numbers, NaN above all: the keys are ordered where a maximum of floats would drop a NaN
    key = tl.max(order_key(tl.abs(up)), axis=1)
    count_and_maximum(size_ptr, count_ptr, key[:, None], label, group_ptr, start, N, 1, HAS_GROUP)


@triton.jit
def _read_gradient(grad_plan_ptr, n, used, stride_gn, stride_gk, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows [BLOCK_N,BLOCK_K] of grad_plan, 0 where not used and beyond K."""
    k = tl.arange(0, BLOCK_K)
    at = n.to(tl.int64)[:, None] * stride_gn + k.to(tl.int64)[None, :] * stride_gk
    return tl.load(grad_plan_ptr + at, mask=used[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _read_centred(history_ptr, t, g, used, G, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """u[t] - max_k u[t] of groups g [rows], -inf beyond K; t is a number or one for each row, 0: zeros."""
    k = tl.arange(0, BLOCK_K)
    inside = (k < K)[None, :]
    step = t + tl.zeros_like(g)
    row = (step.to(tl.int64) * G + g)[:, None] * K + k[None, :]
    u = tl.load(history_ptr + row, mask=(used & (step > 0))[:, None] & inside, other=0.0)
    return tl.where(inside, u - row_maximum(u, K, BLOCK_K), -float("inf"))


@triton.jit(do_not_specialize=["N", "G"])
def sinkhorn_plan_gradient_kernel(
    similarity_ptr, group_ptr, grad_plan_ptr, history_ptr, steps_ptr, size_ptr, sums_ptr, grad_ptr,
    N, G, stride_sn, stride_sk, stride_gn, stride_gk, inverse, scale,
    K: tl.constexpr, ITERATED: tl.constexpr, HAS_GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A to grad, or A/epsilon for a group without steps; du of each group's last step to table 0 of sums."""
    k = tl.arange(0, BLOCK_K)
    start = tl.program_id(0) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    s, label, _ = read_rows(similarity_ptr, group_ptr, n, N, G, K, stride_sn, stride_sk, HAS_GROUP, BLOCK_K)
    used = label >= 0
    steps = tl.load(steps_ptr + label, mask=used, other=0).to(tl.int32)
    centred = _read_centred(history_ptr, steps, label, used, G, K, BLOCK_K)
    plan = softmax(scaled(s, row_maximum(s, K, BLOCK_K), inverse) + centred)
    up = _read_gradient(grad_plan_ptr, n, used, stride_gn, stride_gk, K, BLOCK_K)
    A = tl.where(used[:, None], plan * (up - tl.sum(plan * up, axis=1)[:, None]), 0.0)
    out = A * tl.where(steps > 0, 1.0, inverse)[:, None]
    tl.store(grad_ptr + n.to(tl.int64)[:, None] * K + k[None, :], out, mask=(n < N)[:, None] & (k < K)[None, :])
    if ITERATED:
        size = from_order_key(tl.load(size_ptr + label, mask=used, other=0))
        add_rows(sums_ptr, _share(A, size), scale, label, group_ptr, start, N, K, HAS_GROUP)


@triton.jit
def _share(value, size):
    """value/size of rows; a size of 0 has values of 0."""
    return value / tl.where(size == 0.0, 1.0, size)[:, None]


@triton.jit
def _read_du(t, g, used, steps, sums_ptr, size_ptr, bound_ptr, G, unit, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """du[t] [rows,BLOCK_K]: table 0 where t is the group's last step, else the table of the pass before (1 to 3 in turn)."""
    k = tl.arange(0, BLOCK_K)
    last = steps == t
    table = tl.where(last, 0, 1 + t % 3).to(tl.int64) * G
    row = (table + g)[:, None] * K + k[None, :]
    count = tl.load(sums_ptr + row, mask=used[:, None] & (k < K)[None, :], other=0).to(tl.float32)
    size = from_order_key(tl.load(size_ptr + g, mask=used & last, other=0))
    bound = tl.load(bound_ptr + ((t + 1) % 2) * G + g, mask=used & (steps > t), other=0.0)
    # the unit first: a small size times the unit might vanish
    return (count * tl.where(last, unit, _STEP_UNIT)[:, None]) * tl.where(last, size, bound)[:, None]


@triton.jit(do_not_specialize=["t", "N", "G"])
def sinkhorn_step_gradient_kernel(
    similarity_ptr, group_ptr, history_ptr, steps_ptr, size_ptr, count_ptr, sums_ptr, bound_ptr, grad_ptr,
    t, N, G, stride_sn, stride_sk, inverse, unit,
    K: tl.constexpr, FIRST: tl.constexpr, HAS_GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Back through step t of the groups that made it; FIRST: t = 1, and grad is complete."""
    k = tl.arange(0, BLOCK_K)
    start = tl.program_id(0) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    s, label, _ = read_rows(similarity_ptr, group_ptr, n, N, G, K, stride_sn, stride_sk, HAS_GROUP, BLOCK_K)
    steps = tl.load(steps_ptr + label, mask=label >= 0, other=0).to(tl.int32)
    label = tl.where(steps >= t, label, -1)
    used = label >= 0
    mask = used[:, None] & (k < K)[None, :]
    du = _read_du(t, label, used, steps, sums_ptr, size_ptr, bound_ptr, G, unit, K, BLOCK_K)
    row = (label + t.to(tl.int64) * G)[:, None] * K + k[None, :]
    now = tl.load(history_ptr + row, mask=mask, other=0.0) + tl.log(tl.full([], K, tl.float32))
    at = grad_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    dz = tl.load(at, mask=mask, other=0.0)
    if FIRST:
        peak = tl.load(history_ptr + label.to(tl.int64) * K, mask=used, other=0.0)
        weight = tl.exp(tl.where(mask, scaled(s, peak[:, None], inverse) + now, 0.0))
        tl.store(at, (dz - weight * du) * inverse, mask=mask)
    else:
        centred = _read_centred(history_ptr, t - 1, label, used, G, K, BLOCK_K)
        S = softmax(scaled(s, row_maximum(s, K, BLOCK_K), inverse) + centred)
        pixels = tl.load(count_ptr + label, mask=used, other=1).to(tl.float32)
        # 1/c, from u[t] = u[t-1] - max u[t-1] + log n - log K - log c
        h = du * tl.exp(tl.where(mask, now - centred - tl.log(pixels)[:, None], 0.0))
        d = tl.sum(S * h, axis=1)[:, None]
        tl.store(at, dz - S * (h - d), mask=mask)
        bound = tl.sum(tl.abs(du), axis=1)
        table = sums_ptr + (1 + (t + 2) % 3) * (G.to(tl.int64) * K)
        add_rows(table, tl.where(mask, _share(d * S, bound), 0.0), _STEP_SCALE, label, group_ptr, start, N, K, HAS_GROUP)
        if start < G:  # the program owns groups
            _keep_bound(t, steps_ptr, sums_ptr, size_ptr, bound_ptr, G, unit, K, BLOCK_N, BLOCK_K)


@triton.jit
def _keep_bound(
    t, steps_ptr, sums_ptr, size_ptr, bound_ptr, G, unit, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Write the bound of du[t-1] for the program's own groups, and clear the sums of du[t-2]."""
    k = tl.arange(0, BLOCK_K)
    g = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.load(steps_ptr + g, mask=g < G, other=0).to(tl.int32)
    used = steps >= t
    du = _read_du(t, g, used, steps, sums_ptr, size_ptr, bound_ptr, G, unit, K, BLOCK_K)
    tl.store(bound_ptr + (t % 2) * G + g, tl.sum(tl.abs(du), axis=1), mask=used & (g < G))
    row = ((1 + (t + 1) % 3) * G.to(tl.int64) + g)[:, None] * K + k[None, :]
    tl.store(sums_ptr + row, tl.zeros([BLOCK_N, BLOCK_K], tl.int64), mask=(g < G)[:, None] & (k < K)[None, :])
