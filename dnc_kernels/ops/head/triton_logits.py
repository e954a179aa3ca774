"""Logits of class scores and the gradient back to the features, in Triton.

    logits = scores * scale * length / T                 length = 1 / rstd of the pixel's LayerNorm, where it counts
           = (scores - mean) r * gain + shift            with the norm over the classes; r = 1 / deviation
    dX[n] (+)= sum_c dS[n,c] p[c, winner[n,c]]
    dS = g * pull * scale * length / T;   d rstd = -pull * length * sum_c g * logit;   d log_scale = pull * sum g * logit
       = pull * r (g gain - mean_c(g gain) - xhat mean_c(g gain xhat))    d gain = pull * sum_n g xhat, d shift = pull * sum_n g

head_logits_kernel reads scores [N,C] float32 and rows [N,K] of own similarities, and writes logits [N,C] (in the place of the
scores without a norm), prediction and group [N] int64, and the maxima that the transport begins with. head_gradient_kernel
reads g, logits (or scores) [N,C] float32 and winners [N,C] uint8, and writes dX [N,D]; dS exists in registers alone. Floors of
ADE20K (N=131072, C=150, K=10, D=256, bf16; 3.0 TB/s, 800 TF/s): 157 MB = 52 us; 177 MB + 2*67 MB = 104 us, and 2 N C K D = 101
GFLOP = 126 us.
Plan: a program owns a tile of pixels and all classes of it, in registers; the gradient's walks over tiles of classes, with the
product of similarity/triton_scores.py. Sums over pixels leave a row for each program.
Deterministic: maxima and counts are integers, rows are added up in order. Reference: reference.py.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from .._triton import offset_of, rounded, wide_unless
from ..similarity.triton_scores import add_class_tile, load_classes_of, targets_of
from ..sinkhorn.triton_forward import count_and_maximum, order_key, read_rows


@triton.jit
def _factor(rstd_ptr, factors_ptr, n, here, inverse_t):
    """[BLOCK_N] what scores are multiplied by without a norm."""
    factor = tl.full(n.shape, 1.0, tl.float32) * (tl.load(factors_ptr + 4) * inverse_t)
    if rstd_ptr is not None:
        factor = tl.div_rn(factor, tl.load(rstd_ptr + n, mask=here, other=1.0))
    return factor


@triton.jit
def head_logits_kernel(
    scores_ptr, logits_ptr, rstd_ptr, factors_ptr, gain_ptr, shift_ptr, mean_ptr, deviation_ptr, sampled_ptr, prediction_ptr,
    group_ptr, own_ptr, largest_ptr, count_ptr, scores_at, logits_at, N, C, inverse_t, eps,
    K: tl.constexpr, SCORES_MAP: tl.constexpr, LOGITS_MAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """rstd None: lengths do not count. gain None: no norm; else mean and 1 / deviation are kept. largest None: no maxima."""
    start = tl.program_id(0) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    here = n < N
    c = tl.arange(0, BLOCK_C)
    inside = here[:, None] & (c < C)[None, :]
    s = load_classes_of(scores_ptr + offset_of(n, scores_at, SCORES_MAP), inside, c, scores_at.stride_d, SCORES_MAP)
    # a pixel with a feature that is not finite has NaN scores in every class
    one = tl.sum(tl.where((c == 0)[None, :], s, 0.0), axis=1)
    finite = here & (tl.abs(one) < float("inf"))
    if gain_ptr is None:
        logits = s * _factor(rstd_ptr, factors_ptr, n, here, inverse_t)[:, None]
    else:
        mean = tl.sum(s, axis=1) / C
        centred = tl.where(inside, s - mean[:, None], 0.0)
        r = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)
        gain = tl.load(gain_ptr + c, mask=c < C, other=0.0)
        shift = tl.load(shift_ptr + c, mask=c < C, other=0.0)
        logits = centred * r[:, None] * gain[None, :] + shift[None, :]
        tl.store(mean_ptr + n, mean, mask=here)
        tl.store(deviation_ptr + n, r, mask=here)
    to = logits_ptr + offset_of(n, logits_at, LOGITS_MAP)
    tl.store(to[:, None] + (wide_unless(c, LOGITS_MAP >= 3) * logits_at.stride_d)[None, :], logits, mask=inside)
    best = tl.argmax(tl.where((c < C)[None, :], logits, -float("inf")), axis=1, tie_break_left=True)
    tl.store(prediction_ptr + n, tl.where(finite, best, -1).to(tl.int64), mask=here)
    label = tl.load(sampled_ptr + n, mask=here, other=-1)
    label = tl.where(finite & (label >= 0) & (label < C), label, -1)
    tl.store(group_ptr + n, label, mask=here)
    if largest_ptr is not None:
        own, own_label, _ = read_rows(own_ptr, sampled_ptr, n, N, C, K, K, 1, True, BLOCK_K)
        own_label = tl.where(finite, own_label, -1)
        count_and_maximum(largest_ptr, count_ptr, order_key(own), own_label, sampled_ptr, start, N, K, True)


@triton.jit
def head_gradient_kernel(
    g_ptr, logits_ptr, winner_ptr, rows_ptr, grad_ptr, rstd_ptr, factors_ptr, gain_ptr, mean_ptr, deviation_ptr,
    grad_rstd_ptr, to_scale_ptr, to_norm_ptr, g_at, logits_at, winner_at, grad_at, N, C, K, D, slots, depth, tiles, inverse_t,
    ACCUMULATE: tl.constexpr, G_MAP: tl.constexpr, LOGITS_MAP: tl.constexpr, WINNER_MAP: tl.constexpr, GRAD_MAP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient [BLOCK_N, BLOCK_D] of the features; beside the first channels what goes to the length, scale and norm.

    logits: the scores with a norm (gain given). slots: k of a packed tile.
    """
    program = tl.program_id(0)
    n = program * BLOCK_N + tl.arange(0, BLOCK_N)
    here = n < N
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    g_rows = g_ptr + offset_of(n, g_at, G_MAP)
    logit_rows = logits_ptr + offset_of(n, logits_at, LOGITS_MAP)
    winner_rows = winner_ptr + offset_of(n, winner_at, WINNER_MAP)
    pull = tl.load(factors_ptr + 1)
    along = tl.zeros((BLOCK_N,), tl.float32)
    slope = tl.zeros((BLOCK_N,), tl.float32)
    if gain_ptr is None:
        factor = _factor(rstd_ptr, factors_ptr, n, here, inverse_t) * pull
    else:
        mean = tl.load(mean_ptr + n, mask=here, other=0.0)
        r = tl.load(deviation_ptr + n, mask=here, other=0.0)
        row = to_norm_ptr + program.to(tl.int64) * (2 * C)
        for tile in range(tiles):
            c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
            mask = here[:, None] & (c < C)[None, :]
            g = load_classes_of(g_rows, mask, c, g_at.stride_d, G_MAP)
            s = load_classes_of(logit_rows, mask, c, logits_at.stride_d, LOGITS_MAP)
            xhat = tl.where(mask, (s - mean[:, None]) * r[:, None], 0.0)
            if tl.program_id(1) == 0:
                tl.store(row + c, tl.sum(g * xhat, axis=0) * pull, mask=c < C)
                tl.store(row + C + c, tl.sum(g, axis=0) * pull, mask=c < C)
            g = g * tl.load(gain_ptr + c, mask=c < C, other=0.0)[None, :]
            along += tl.sum(g, axis=1)
            slope += tl.sum(g * xhat, axis=1)
        along = along / C
        slope = slope / C
        factor = r * pull
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for tile in range(tiles):
        c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = here[:, None] & (c < C)[None, :]
        g = load_classes_of(g_rows, mask, c, g_at.stride_d, G_MAP)
        s = load_classes_of(logit_rows, mask, c, logits_at.stride_d, LOGITS_MAP)
        winner = load_classes_of(winner_rows, mask, c, winner_at.stride_d, WINNER_MAP).to(tl.int32)
        if gain_ptr is None:
            along += tl.sum(g * s, axis=1)
            ds = g * factor[:, None]
        else:
            xhat = (s - mean[:, None]) * r[:, None]
            g = g * tl.load(gain_ptr + c, mask=c < C, other=0.0)[None, :]
            ds = tl.where(mask, (g - along[:, None] - xhat * slope[:, None]) * factor[:, None], 0.0)
        acc = add_class_tile(acc, ds, winner, tile, d, rows_ptr, K, slots, depth, PRECISION, BLOCK_C)
    target = targets_of(grad_ptr, n, d, grad_at, GRAD_MAP)
    mask = here[:, None] & (d < D)[None, :]
    if ACCUMULATE:
        acc += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, rounded(acc, grad_ptr.dtype.element_ty), mask=mask)
    if gain_ptr is None:
        if tl.program_id(1) == 0:
            if grad_rstd_ptr is not None:
                length = tl.div_rn(tl.full(n.shape, 1.0, tl.float32), tl.load(rstd_ptr + n, mask=here, other=1.0))
                tl.store(grad_rstd_ptr + n, -pull * along * length, mask=here)
            tl.store(to_scale_ptr + program, tl.sum(along, axis=0) * pull)


@triton.jit
def head_pull_kernel(
    grad_ptr, pull_ptr, target_ptr, rows_ptr, grad_at, N, D,
    GRAD_MAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad[n] += pull[n] * rows[target[n]], rows [M,D] float32: where the embedding's own kernel cannot add it."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    target = tl.load(target_ptr + n, mask=n < N, other=-1)
    factor = tl.load(pull_ptr + n, mask=target >= 0, other=0.0)
    mask = (factor != 0.0)[:, None] & (d < D)[None, :]
    p = tl.load(rows_ptr + (target * D)[:, None] + d[None, :], mask=mask, other=0.0)
    at = targets_of(grad_ptr, n, d, grad_at, GRAD_MAP)
    grad = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, rounded(grad + factor[:, None] * p, grad_ptr.dtype.element_ty), mask=mask)
