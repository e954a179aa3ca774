"""Centroids as the rows that the similarity kernels multiply by: their dtype, order and padding, made once a call.

    rows[slot, d] = p[c,k,d]  (or p/|p|),  0 for d >= D;  bias[slot] = -|p|^2
    reads centroids [C,K,D] once (twice for a norm), writes rows [slots, padded D] in the dtype of x.
    floors: C*K*D*6 bytes for float32 centroids and 16-bit rows, 2.3 MB = 0.8 us (ADE20K, D=256, 3.0 TB/s); 3*C*K*D = 1.2 MFLOP.
    The launch is what it costs.
Plan: a program packs 16 rows, 128 channels at a time. One writer an element: deterministic. The main loops then need no masks
on the side of the centroids. Squares are of the rounded rows, so that a distance is exactly that to the row multiplied by.
Reference: `similarity` in reference.py.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .._triton import cdiv, rounded, tile_of, wide_unless

#: Rows of a program.
ROWS = 16


class Slots(NamedTuple):
    """Order of the packed rows: [class tile][k tile][copy][class]; `copies` values of k beside each other in a tile.

    A tile has `copies * width` slots. With one k a tile the maximum over K is element-wise over tiles; with several the tile is
    halved, which stays within a thread, so that few classes still fill a wide tile.
    """

    width: int  # classes in a tile
    copies: int
    k_tiles: int
    class_tiles: int

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.k_tiles * self.class_tiles


def slots_of(classes: int, k: int, tile: int) -> Slots:
    """The order with the fewest tiles of `tile` slots, 8 classes or more in each; of equals, the one with the fewest copies."""
    options = []
    copies = 1
    while copies <= min(k, tile // 8) or copies == 1:
        width = tile // copies
        options.append(Slots(width, copies, cdiv(k, copies), cdiv(classes, width)))
        copies *= 2
    return min(options, key=lambda s: s.tiles)


@triton.jit
def pack_slots(
    slot, centroids_ptr, rows_ptr, bias_ptr, strides, slots, C, K, D, padded_d,
    METRIC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pack the rows `slot` [ROWS]."""
    if slots is None:
        # what is left of the last tile repeats the last row: it may tie with that row, and never beats it
        m = tl.minimum(slot, C * K - 1)
        c = m // K
        k = m % K
    else:
        tile = slot // (slots.copies * slots.width)
        c = tile // slots.k_tiles * slots.width + slot % slots.width
        k = tile % slots.k_tiles * slots.copies + slot % (slots.copies * slots.width) // slots.width
    valid = (c < C) & (k < K)
    base = c.to(tl.int64) * strides[0] + k.to(tl.int64) * strides[1]
    d = tl.arange(0, BLOCK_D)
    squares = tl.zeros((ROWS,), tl.float32)
    if METRIC == "cosine":
        for start in range(0, D, BLOCK_D):
            at = base[:, None] + (start + d).to(tl.int64)[None, :] * strides[2]
            p = tl.load(centroids_ptr + at, mask=valid[:, None] & (start + d < D)[None, :], other=0.0).to(tl.float32)
            squares += tl.sum(p * p, axis=1)
        # the clamp of torch.nn.functional.normalize
        length = tl.maximum(tl.sqrt_rn(squares), 1e-12)
        squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, padded_d, BLOCK_D):
        at = base[:, None] + (start + d).to(tl.int64)[None, :] * strides[2]
        p = tl.load(centroids_ptr + at, mask=valid[:, None] & (start + d < D)[None, :], other=0.0).to(tl.float32)
        if METRIC == "cosine":
            p = tl.div_rn(p, tl.broadcast_to(length[:, None], (ROWS, BLOCK_D)))
        row = rounded(p, rows_ptr.dtype.element_ty)
        out = slot.to(tl.int64)[:, None] * padded_d + (start + d)[None, :]
        tl.store(rows_ptr + out, row, mask=(start + d < padded_d)[None, :])
        if bias_ptr is not None:
            squares += tl.sum(row.to(tl.float32) * row.to(tl.float32), axis=1)
    if bias_ptr is not None:
        tl.store(bias_ptr + slot, -squares)


@triton.jit
def _pack_kernel(
    centroids_ptr, rows_ptr, bias_ptr, strides, slots, C, K, D, padded_d,
    METRIC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pack_slots(slot, centroids_ptr, rows_ptr, bias_ptr, strides, slots, C, K, D, padded_d, METRIC, ROWS, BLOCK_D)


def slot_count(centroids: Tensor, block_m: int, block_d: int, slots: Slots | None) -> tuple[int, int]:
    """Rows, and channels of a row, of `pack_rows`."""
    classes, k, channels = centroids.shape
    count = cdiv(classes * k, block_m) * block_m if slots is None else slots.tiles * block_m
    return count, cdiv(channels, block_d) * block_d


def pack_rows(
    centroids: Tensor, metric: str, dtype: torch.dtype, block_m: int, block_d: int, slots: Slots | None = None
) -> tuple[Tensor, Tensor | None]:
    """Rows [slots, padded D] and, for sqeuclidean, biases [slots] float32.

    Args:
        centroids: [C,K,D], any float dtype, any strides.
        metric: ``cosine`` divides each row by its length; ``sqeuclidean`` gives it the bias -|p|^2.
        dtype: of the rows: that of x.
        block_m: the number of rows is rounded up to a multiple of it (a multiple of 16).
        block_d: the same for channels, which are filled with zeros.
        slots: order of the rows; slots without a centroid are zero. None: c*K + k, and the last row is repeated.
    """
    classes, k, channels = centroids.shape
    count, padded = slot_count(centroids, block_m, block_d, slots)
    rows = torch.empty((count, padded), dtype=dtype, device=centroids.device)
    bias = torch.empty(count, dtype=torch.float32, device=centroids.device) if metric == "sqeuclidean" else None
    _triton.launch(
        _pack_kernel, (count // ROWS,), centroids, rows, bias, centroids.stride(), slots, classes, k, channels, padded,
        METRIC=metric, ROWS=ROWS, BLOCK_D=tile_of(padded, 128, 1), num_warps=4,
    )  # fmt: skip
    return rows, bias


@triton.jit
def load_x(pixels, inside, d, D, stride_d, EVEN: tl.constexpr, MAP: tl.constexpr):
    """Channels d of the pixels at these pointers, [len(pixels), len(d)]; zeros outside, and beyond D unless EVEN excludes that.

    Pixels are masked, not clamped: the minimum with N - 1 would hide that neighbours in memory are neighbours in the tile.
    """
    mask = inside[:, None]
    if not EVEN:
        mask = mask & (d < D)[None, :]
    return tl.load(pixels[:, None] + (wide_unless(d, MAP >= 3) * stride_d)[None, :], mask=mask, other=0.0)


@triton.jit
def halves(s):
    """Left and right half of the columns of s [N,M]: two [N,M/2] whose elements stay in the threads that hold them."""
    pairs = tl.permute(tl.reshape(s, (s.shape[0], 2, s.shape[1] // 2)), (0, 2, 1))
    return tl.split(pairs)


@triton.jit
def best_of_copies(s, COPIES: tl.constexpr):
    """Maximum of s [N, COPIES*W] over its copies, [N,W], and the copy it came from (int32), the lowest on ties.

    A NaN may hide numbers: a pixel has either none or nothing else.
    """
    tl.static_assert(COPIES == 2 or COPIES == 4 or COPIES == 8 or COPIES == 16)
    left, right = halves(s)
    if COPIES == 2:
        later = right > left
        return tl.where(later, right, left), later.to(tl.int32)
    else:
        left, left_copy = best_of_copies(left, COPIES // 2)
        right, right_copy = best_of_copies(right, COPIES // 2)
        later = right > left
        return tl.where(later, right, left), tl.where(later, right_copy + COPIES // 2, left_copy)
