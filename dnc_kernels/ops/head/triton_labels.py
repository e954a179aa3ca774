"""What a step begins with, in Triton: labels at feature size and their counts; rows for the products, and factors.

head_labels_kernel reads labels [B,H,W] once, and those of the features again, and writes labels [N] int64, counts [P,2C+1]
int32 and zeros. Floor of labels [8,512,512] int64 for 128x128 features: 17 MB over 3.0 TB/s = 6 us.
head_prepare_kernel reads the counts and the sub-centroids [C,K,D], which it packs twice (../similarity/triton_pack.py), and
writes the factors [7]: a launch more than it computes.
Plan: a program of the first walks over blocks of pixels and counts in registers; the second has a program for 16 packed rows,
and one that adds the counts up in order. Deterministic: counts are integers. Reference: reference.py.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from ..similarity.triton_pack import pack_slots


@triton.jit
def _label_of(labels_ptr, at, inside, C, ignore_index):
    """Labels, -1 for those that leave their pixel out; and whether one is no class and not ignored."""
    label = tl.load(labels_ptr + at, mask=inside, other=-1).to(tl.int64)
    named = inside & (label >= 0) & (label != ignore_index)
    return tl.where(named & (label < C), label, -1), named & (label >= C)


@triton.jit
def _place(b, i, j, at):
    return b.to(tl.int64) * at[0] + i.to(tl.int64) * at[1] + j.to(tl.int64) * at[2]


@triton.jit
def _nearest(i, scale, MIDDLE: tl.constexpr, size):
    """The label that lies in the middle of pixel i, or begins it, as `nn._labels.pixels_at` finds it."""
    place = i.to(tl.float32)
    if MIDDLE:
        place += 0.5
    return tl.minimum((place * scale).to(tl.int32), size - 1)


@triton.jit
def head_labels_kernel(
    labels_ptr, small_ptr, counts_ptr, zeros_ptr, counters_ptr, labels_at, L, H, W, N, h, w, scale_h, scale_w, C, ignore_index,
    zeros, counters, MIDDLE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """L = B H W labels, N = B h w pixels. A program's row of counts: large, small, wrong."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    lane, c = tl.arange(0, BLOCK), tl.arange(0, BLOCK_C)
    large = tl.zeros([BLOCK_C], tl.int32)
    few = tl.zeros([BLOCK_C], tl.int32)
    wrong = tl.zeros([BLOCK], tl.int32)
    for block in range(program, tl.cdiv(L, BLOCK), programs):
        n = block * BLOCK + lane
        label, bad = _label_of(labels_ptr, _place(n // W // H, n // W % H, n % W, labels_at), n < L, C, ignore_index)
        large += tl.histogram(tl.maximum(label, 0).to(tl.int32), BLOCK_C, mask=label >= 0)
        wrong += bad.to(tl.int32)
    for block in range(program, tl.cdiv(N, BLOCK), programs):
        n = block * BLOCK + lane
        i, j = _nearest(n // w % h, scale_h, MIDDLE, H), _nearest(n % w, scale_w, MIDDLE, W)
        label, _ = _label_of(labels_ptr, _place(n // w // h, i, j, labels_at), n < N, C, ignore_index)
        tl.store(small_ptr + n, label, mask=n < N)
        few += tl.histogram(tl.maximum(label, 0).to(tl.int32), BLOCK_C, mask=label >= 0)
    row = counts_ptr + program.to(tl.int64) * (2 * C + 1)
    tl.store(row + c, large, mask=c < C)
    tl.store(row + C + c, few, mask=c < C)
    tl.store(row + 2 * C, tl.sum(wrong, 0))
    none = tl.zeros([BLOCK], tl.int64)
    if zeros_ptr is not None:
        for start in range(program * BLOCK, zeros, programs * BLOCK):
            tl.store(zeros_ptr + start + lane, none, mask=start + lane < zeros)
    if counters_ptr is not None:
        for start in range(program * BLOCK, counters, programs * BLOCK):
            tl.store(counters_ptr + start + lane, none, mask=start + lane < counters)


@triton.jit
def count_rows(counts_ptr, c, inside, P, width, BLOCK_P: tl.constexpr):
    """Sum over the P rows of counts [P,width] of columns c."""
    total = tl.zeros(c.shape, tl.int64)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < P)[:, None] & inside[None, :]
        total += tl.sum(tl.load(counts_ptr + p.to(tl.int64)[:, None] * width + c[None, :], mask=mask, other=0).to(tl.int64), 0)
    return total


@triton.jit
def head_prepare_kernel(
    centroids_ptr, strides, packs, counts_ptr, amounts_ptr, class_weight_ptr, log_scale_ptr, factors_ptr, P, C, K, D,
    temperature, ppc_weight, ppd_weight,
    AT_FEATURES: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """packs: of each packing its rows, their order and channels, and how many programs make it.

    factors None: not wanted. amounts [2]: weight and count where they are known; None: of the counts.
    """
    program = tl.program_id(0)
    done = 0
    for i in tl.static_range(len(packs)):
        pack = packs[i]
        if (program >= done) & (program < done + pack[3]):
            slot = (program - done) * ROWS + tl.arange(0, ROWS)
            pack_slots(slot, centroids_ptr, pack[0], None, strides, pack[1], C, K, D, pack[2], "dot", ROWS, 128)
        done += pack[3]
    if factors_ptr is not None:
        if program == done:
            if amounts_ptr is None:
                c = tl.arange(0, BLOCK_C)
                few = count_rows(counts_ptr, C + c, c < C, P, 2 * C + 1, BLOCK_P).to(tl.float64)
                large = few
                if not AT_FEATURES:
                    large = count_rows(counts_ptr, c, c < C, P, 2 * C + 1, BLOCK_P).to(tl.float64)
                if class_weight_ptr is not None:
                    # a class without a pixel counts nothing, whatever its weight
                    weights = tl.load(class_weight_ptr + c, mask=c < C, other=0.0).to(tl.float64)
                    large = tl.where(large > 0, large * weights, 0.0)
                weight = tl.sum(large, 0)
                count = tl.sum(few, 0)
            else:
                weight = tl.load(amounts_ptr).to(tl.float64)
                count = tl.load(amounts_ptr + 1).to(tl.float64)
            weight = tl.where(weight > 0, weight, 1.0).to(tl.float32)
            count = tl.where(count > 0, count, 1.0).to(tl.float32)
            scale = tl.full([], 1.0, tl.float32)
            if log_scale_ptr is not None:
                scale = tl.exp(tl.load(log_scale_ptr).to(tl.float32))
            # in half precision gradients get the size of probabilities and unit vectors
            unit = tl.full([], 1.0, tl.float32)
            if HALF:
                unit = count * temperature / scale
            tl.store(factors_ptr, unit)
            tl.store(factors_ptr + 1, unit / weight)
            tl.store(factors_ptr + 2, ppc_weight * unit / count)
            tl.store(factors_ptr + 3, ppd_weight * unit / count)
            tl.store(factors_ptr + 4, scale)
            tl.store(factors_ptr + 5, weight)
            tl.store(factors_ptr + 6, count)
