"""Sums of the pixels of each cluster, and the momentum update: launchers of the kernels in triton_sums.py."""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton
from torch import Tensor

from .._triton import configuration, launch, map_rank, pixels_of
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
        momentum_apply_kernel, (clusters,), call.centroids, call.sums, call.counts, channels, *_two_floats(call.momentum),
        BLOCK_D=block_d, num_warps=_warps(block_d),
    )  # fmt: skip


def _two_floats(value: float) -> tuple[float, float]:
    """A double as the sum of two numbers that float32 holds: a kernel's float argument is one."""
    (high,) = struct.unpack("f", struct.pack("f", value))
    return high, value - high


def _warps(block_d: int) -> int:
    """Warps for a row of channels, about eight a thread."""
    return min(max(block_d // 256, 1), 8)


def _reduce(
    x: Tensor, cluster: Tensor, moved: Tensor | None, sums: Tensor | None, counts: Tensor | None, momentum: float
) -> None:
    target = moved if sums is None else sums
    assert target is not None
    (clusters, channels), pixels, device = target.shape, cluster.numel(), x.device
    address = pixels_of(x)
    adjacent = address.stride_d == 1
    buckets = triton.cdiv(clusters, WIDTH)
    shape = {"N": pixels, "M": clusters, "D": channels, "bits": 8 * x.element_size()}
    use = configuration("momentum", "momentum_rows" if adjacent else "momentum_planes", device, **shape)
    tile, unit, block_p = use.pop("BLOCK_T"), use.pop("UNIT"), use.pop("BLOCK_P")
    block_b = use.pop("BLOCK_B")
    block_d = min(use.pop("BLOCK_D"), max(triton.next_power_of_2(channels), 16))
    tiles, most_units = triton.cdiv(pixels, tile), buckets + pixels // unit

    def integers(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=device)

    histogram, bucket_start, cursor = integers(max(tiles, 1), buckets), integers(3, buckets), integers(2)
    unit_bucket, unit_begin, unit_counts = integers(most_units), integers(most_units), integers(most_units, WIDTH)
    order = torch.empty(pixels, dtype=torch.int64, device=device)
    partial = torch.empty((most_units, WIDTH, channels), dtype=torch.float32, device=device)

    sort_warps = 4 if tile <= 256 else 8
    launch(
        momentum_histogram_kernel, (max(tiles, 1),), cluster, histogram, cursor, pixels, clusters, buckets,
        BLOCK_T=tile, BLOCK_B=block_b, num_warps=sort_warps,
    )  # fmt: skip
    launch(
        momentum_columns_kernel, (buckets,), histogram, bucket_start, cursor, unit_bucket, unit_begin, tiles, buckets,
        UNIT=unit, BLOCK_T=1024, BLOCK_U=128, num_warps=4,
    )  # fmt: skip
    launch(
        momentum_place_kernel, (tiles,), cluster, histogram, bucket_start, order, pixels, clusters, buckets,
        BLOCK_T=tile, BLOCK_J=16 if tile <= 256 else 8, num_warps=sort_warps,
    )  # fmt: skip
    places = (address.hw, address.width, address.stride_b, address.stride_h, address.stride_w, address.stride_d)
    meta: dict[str, Any] = {"MAP": map_rank(address), **use}
    launch(
        momentum_units_kernel, (most_units, triton.cdiv(channels, block_d)), x, order, bucket_start, cursor, unit_bucket,
        unit_begin, partial, unit_counts, buckets, channels, *places,
        ADJACENT=adjacent, UNIT=unit, EMULATED=device.type == "cpu", BLOCK_P=block_p, BLOCK_D=block_d, **meta,
    )  # fmt: skip
    whole = triton.next_power_of_2(channels)
    launch(
        momentum_result_kernel, (clusters,), x, order, bucket_start, partial, unit_counts,
        target, target if counts is None else counts, buckets, channels, *places, *_two_floats(momentum),
        UPDATE=moved is not None, MAP=map_rank(address), UNIT=unit, BLOCK_U=max(min(4096 // whole, 32), 1),
        BLOCK_P=max(min(4096 // whole, 16), 1), BLOCK_D=whole,
        num_warps=_warps(whole) if whole > 512 else 4,
    )  # fmt: skip
