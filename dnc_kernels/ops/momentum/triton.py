"""Sums of the pixels of each cluster, and the momentum update: launchers of the kernels in triton_sums.py."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..._tensors import pixel_count
from .._triton import Pixels, configuration, launch, map_rank, pixels_of
from .calls import ApplyCall, SumsCall, SumsOut, UpdateCall, rows
from .triton_sums import (
    WIDTH,
    momentum_apply_kernel,
    momentum_columns_kernel,
    momentum_histogram_kernel,
    momentum_place_kernel,
    momentum_result_kernel,
    momentum_units_kernel,
)


def cluster_sums(call: SumsCall, out: SumsOut) -> None:
    """Write sums [M,D] float32 and counts [M] int64 of the pixels of each cluster. Five launches.

    Memory: 8 N + 4 (M/16) (N/BLOCK_T) + 64 (M/16 + N/UNIT) D bytes, and 4 bytes for each of a few numbers per bucket and unit.
    """
    _reduce(call.x, call.cluster, None, *out, 0.0)


def momentum_update_(call: UpdateCall, _: None = None) -> None:
    """Move rows [M,D] float32 towards the pixels of their cluster, in place. Memory and launches of `cluster_sums`.

    Always deterministic.
    """
    _reduce(call.x, call.cluster, rows(call.centroids), None, None, call.momentum)


def apply_momentum_(call: ApplyCall, _: None = None) -> None:
    """Move rows [M,D] float32 towards sums [M,D] float32 where counts [M] > 0, in place. One launch."""
    clusters, channels = call.sums.shape
    block_d = triton.next_power_of_2(channels)
    launch(
        momentum_apply_kernel, (clusters,), call.centroids, call.sums, call.counts, channels, *two_floats(call.momentum),
        BLOCK_D=block_d, num_warps=_warps(block_d),
    )  # fmt: skip


def two_floats(value: float) -> tuple[float, float]:
    """A double as the sum of two numbers that float32 holds: a kernel's float argument is one."""
    (high,) = struct.unpack("f", struct.pack("f", value))
    return high, value - high


def _warps(block_d: int) -> int:
    """Warps for a row of channels, about eight a thread."""
    return min(max(block_d // 256, 1), 8)


class Units(NamedTuple):
    """Sums of a cluster's pixels in parts, a unit each: what `momentum_units_kernel` writes (triton_sums.py)."""

    bucket: Tensor  # [3,buckets] int32
    sums: Tensor  # [units,16,D] float32
    counts: Tensor  # [units,16] int32


class Sorting(NamedTuple):
    """How pixels are sorted by cluster: the sizes of `cluster_units`."""

    tile: int  # pixels of a row of the histogram
    tiles: int
    buckets: int
    units: int
    bins: int  # of a tile's histogram that are made at a time
    unit: int  # pixels
    block_p: int
    block_d: int
    options: dict[str, Any]  # of the kernel that adds up


def sorting_of(x: Tensor, clusters: int, tile: int | None = None) -> Sorting:
    """For x [N,D] or [B,D,H,W]; tile: of a histogram that exists already."""
    pixels, channels = pixel_count(x), x.shape[1]
    adjacent = pixels_of(x).stride_d == 1
    buckets = triton.cdiv(clusters, WIDTH)
    shape = {"N": pixels, "M": clusters, "D": channels, "bits": 8 * x.element_size()}
    use = configuration("momentum", "momentum_rows" if adjacent else "momentum_planes", x.device, **shape)
    own, unit, block_p, bins, block_d = (use.pop(key) for key in ("BLOCK_T", "UNIT", "BLOCK_P", "BLOCK_B", "BLOCK_D"))
    tile = tile or own
    block_d = min(block_d, max(triton.next_power_of_2(channels), 16))
    return Sorting(
        tile, max(triton.cdiv(pixels, tile), 1), buckets, buckets + pixels // unit, bins, unit, block_p, block_d, use
    )


def histogram_of(cluster: Tensor, clusters: int, sorting: Sorting) -> tuple[Tensor, Tensor]:
    """Pixels of each bucket in each tile, [tiles,buckets] int32, and the cleared cursors [2]."""
    histogram = torch.empty((sorting.tiles, sorting.buckets), dtype=torch.int32, device=cluster.device)
    cursor = torch.empty(2, dtype=torch.int32, device=cluster.device)
    launch(
        momentum_histogram_kernel, (sorting.tiles,), cluster, histogram, cursor, cluster.numel(), clusters, sorting.buckets,
        BLOCK_T=sorting.tile, BLOCK_B=sorting.bins, num_warps=_sort_warps(sorting),
    )  # fmt: skip
    return histogram, cursor


def _sort_warps(sorting: Sorting) -> int:
    return 4 if sorting.tile <= 256 else 8


def cluster_units(
    x: Tensor, cluster: Tensor, clusters: int, sorting: Sorting, histogram: Tensor, cursor: Tensor, out: Units
) -> Tensor:
    """Fill `out`; returns the order of the pixels [N] int64. Overwrites the histogram. Three launches."""
    pixels, channels, device = cluster.numel(), x.shape[1], x.device
    unit_bucket, unit_begin = (torch.empty(sorting.units, dtype=torch.int32, device=device) for _ in range(2))
    order = torch.empty(pixels, dtype=torch.int64, device=device)
    address = pixels_of(x)
    launch(
        momentum_columns_kernel, (sorting.buckets,), histogram, out.bucket, cursor, unit_bucket, unit_begin, sorting.tiles,
        sorting.buckets, UNIT=sorting.unit, BLOCK_T=1024, BLOCK_U=128, num_warps=4,
    )  # fmt: skip
    launch(
        momentum_place_kernel, (triton.cdiv(pixels, sorting.tile),), cluster, histogram, out.bucket, order, pixels, clusters,
        sorting.buckets, BLOCK_T=sorting.tile, BLOCK_J=16 if sorting.tile <= 256 else 8, num_warps=_sort_warps(sorting),
    )  # fmt: skip
    launch(
        momentum_units_kernel, (sorting.units, triton.cdiv(channels, sorting.block_d)), x, order, out.bucket, cursor,
        unit_bucket, unit_begin, out.sums, out.counts, sorting.buckets, channels, *_places(address),
        MAP=map_rank(address), ADJACENT=address.stride_d == 1, UNIT=sorting.unit, EMULATED=device.type == "cpu",
        BLOCK_P=sorting.block_p, BLOCK_D=sorting.block_d, **sorting.options,
    )  # fmt: skip
    return order


def _places(address: Pixels) -> tuple[int, ...]:
    return address.hw, address.width, address.stride_b, address.stride_h, address.stride_w, address.stride_d


def empty_units(x: Tensor, sorting: Sorting) -> Units:
    """Without values."""
    return Units(
        torch.empty((3, sorting.buckets), dtype=torch.int32, device=x.device),
        torch.empty((sorting.units, WIDTH, x.shape[1]), dtype=torch.float32, device=x.device),
        torch.empty((sorting.units, WIDTH), dtype=torch.int32, device=x.device),
    )


def _reduce(
    x: Tensor, cluster: Tensor, moved: Tensor | None, sums: Tensor | None, counts: Tensor | None, momentum: float
) -> None:
    target = moved if sums is None else sums
    assert target is not None
    clusters, channels = target.shape
    sorting = sorting_of(x, clusters)
    units = empty_units(x, sorting)
    order = cluster_units(x, cluster, clusters, sorting, *histogram_of(cluster, clusters, sorting), units)
    whole, address = triton.next_power_of_2(channels), pixels_of(x)
    launch(
        momentum_result_kernel, (clusters,), x, order, units.bucket, units.sums, units.counts,
        target, target if counts is None else counts, sorting.buckets, channels, *_places(address), *two_floats(momentum),
        UPDATE=moved is not None, MAP=map_rank(address), UNIT=sorting.unit, BLOCK_U=max(min(4096 // whole, 32), 1),
        BLOCK_P=max(min(4096 // whole, 16), 1), BLOCK_D=whole,
        num_warps=_warps(whole) if whole > 512 else 4,
    )  # fmt: skip
