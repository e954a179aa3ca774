"""Cases of nearest_centroid, centroid_distance and subcentroid_cross_entropy for the ahead-of-time compiler and the tuner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dnc_kernels._tensors import pixel_count
from dnc_kernels.ops.similarity import triton_contrast, triton_nearest
from dnc_kernels.ops.similarity.calls import (
    ContrastCall,
    ContrastOut,
    DistanceCall,
    NearestCall,
    NearestOut,
    SweepCall,
    SweepOut,
)

from .aot_triton import Launch

Shape = dict[str, int]


def spread(x: Tensor, when: dict[str, int]) -> Tensor:
    """x [N,D] as a shape class has it: as rows, or (even 0) as maps of 65 x 65, of which a thread loads number by number."""
    if when.get("even", 1):
        return x
    maps, channels = len(x) // 65**2, x.shape[1]
    return x[: maps * 65**2].view(maps, 65, 65, channels).permute(0, 3, 1, 2).contiguous()


def _problem(device: torch.device, when: Shape) -> tuple[Tensor, Tensor, int]:
    """Unit features, centroids [C,K,D] and pixels of a shape; M sub-centroids are M classes where C and K do not matter."""
    n, c, k, d = when["N"], when.get("C", when.get("M", 1)), when.get("K", 1), when["D"]
    dtype = torch.bfloat16 if when.get("bits", 16) == 16 else torch.float32
    if device.type == "meta":
        x, centroids = torch.empty(n, d, dtype=dtype, device=device), torch.empty(c, k, d, device=device)
    else:
        x, centroids = (F.normalize(torch.randn(*sizes, d, device=device), dim=-1) for sizes in ((n,), (c, k)))
    x = spread(x.to(dtype), when)
    return x, centroids, pixel_count(x)


def _nearest(device: torch.device, when: Shape) -> Callable[[], None]:
    x, centroids, n = _problem(device, when)
    label, sub = (torch.empty(n, dtype=torch.int64, device=device) for _ in range(2))
    call, nearest = NearestCall(x, centroids, "dot", "triton"), NearestOut(label, sub, torch.empty(n, device=device))
    return lambda: triton_nearest.nearest_centroid(call, nearest)


def _nearest_candidates(when: Shape) -> list[dict[str, Any]]:
    tiles: tuple[tuple[int, ...], ...]
    if when["bits"] == 32:
        tiles = ((64, 64, 32, 0, 4, 8, 3), (64, 64, 16, 0, 4, 8, 3), (128, 64, 32, 0, 4, 8, 3), (32, 64, 32, 0, 4, 4, 3))
    else:
        tiles = (
            (256, 64, 64, 256, 2, 16, 3), (256, 64, 64, 256, 4, 8, 3), (128, 64, 64, 256, 4, 8, 3), (128, 64, 64, 256, 4, 4, 3),
            (128, 32, 64, 256, 4, 8, 3), (128, 32, 64, 256, 4, 4, 3), (64, 64, 64, 256, 4, 4, 3), (128, 128, 64, 256, 4, 8, 2),
            (128, 128, 64, 0, 4, 8, 3), (128, 128, 64, 0, 4, 8, 4), (128, 256, 64, 0, 8, 8, 3), (128, 256, 64, 0, 16, 8, 4),
            (64, 64, 64, 256, 4, 8, 2),
        )  # fmt: skip
    names = ("BLOCK_N", "BLOCK_M", "BLOCK_D", "KEEP_D", "COPIES", "num_warps", "num_stages")
    return [dict(zip(names, tile, strict=True)) for tile in tiles]


def _distance(device: torch.device, when: Shape) -> Callable[[], None]:
    x, centroids, n = _problem(device, when)
    call, out = DistanceCall(x, centroids, "cosine", "triton"), torch.empty(n, *centroids.shape[:2], device=device)
    return lambda: triton_nearest.centroid_distance(call, out)


def _product_candidates(when: Shape) -> list[dict[str, Any]]:
    tiles: tuple[tuple[int, ...], ...]
    if when["bits"] == 32:
        tiles = ((64, 64, 32, 4, 3), (64, 64, 32, 8, 3), (32, 64, 32, 4, 3), (64, 64, 16, 8, 3))
    else:
        tiles = (
            (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 64, 64, 8, 3), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4),
            (128, 256, 64, 8, 3), (256, 64, 64, 8, 3), (64, 64, 64, 8, 2),
        )  # fmt: skip
    return [dict(zip(("BLOCK_N", "BLOCK_M", "BLOCK_D", "num_warps", "num_stages"), tile, strict=True)) for tile in tiles]


def _contrast(device: torch.device, when: Shape) -> Callable[[], None]:
    if device.type == "meta":
        when = {**when, "N": min(when["N"], 8450)}  # one band says all
    x, centroids, n = _problem(device, when)
    loss, grad = torch.empty(n, device=device), torch.empty_like(x) if when.get("grad", 1) else None
    if not when.get("scored", 1):
        target = torch.empty(n, dtype=torch.int64, device=device)
        if device.type != "meta":
            target.random_(when["C"] * when["K"])
        call = ContrastCall(x, centroids, target, 0.1, -1, "triton")
        return lambda: triton_contrast.subcentroid_cross_entropy(call, ContrastOut(loss, grad))
    labels = torch.empty(n, dtype=torch.int64, device=device)
    if device.type != "meta":
        # labels of a picture change rarely along a row
        labels.copy_(torch.randint(when["C"], (n // 64 + 1,), device=device).repeat_interleave(64)[:n])
    scores = torch.empty(x.shape[0], when["C"], *x.shape[2:], device=device)
    winner, own = torch.empty_like(scores, dtype=torch.uint8), torch.empty(n, when["K"], device=device)
    sweep = SweepCall(x, centroids, labels, 0.1, torch.ones((), device=device), "triton")
    return lambda: triton_contrast.scores_and_contrast(sweep, SweepOut(scores, winner, own, loss, grad))


def _contrast_candidates(when: Shape) -> list[dict[str, Any]]:
    tiles = ((128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 4), (64, 64, 4, 3), (64, 32, 4, 3), (64, 32, 8, 2))
    return [dict(zip(("BLOCK_N", "BLOCK_M", "num_warps", "num_stages"), tile, strict=True)) for tile in tiles]


def _mix_candidates(when: Shape) -> list[dict[str, Any]]:
    tiles: tuple[tuple[int, ...], ...]
    if when["bits"] == 32:
        tiles = ((64, 64, 32, 8, 3), (64, 64, 16, 8, 3), (32, 64, 32, 4, 3))
    else:
        tiles = (
            (128, 256, 64, 8, 3),
            (128, 128, 64, 8, 3),
            (128, 128, 64, 4, 3),
            (128, 256, 32, 8, 4),
            (64, 256, 64, 4, 3),
            (64, 64, 64, 8, 2),
        )
    return [dict(zip(("BLOCK_N", "BLOCK_D", "BLOCK_K", "num_warps", "num_stages"), tile, strict=True)) for tile in tiles]


CASES = {
    "nearest_centroid": Launch(_nearest, _nearest_candidates),
    "centroid_distance": Launch(_distance, _product_candidates),
    "subcentroid_cross_entropy": Launch(_contrast, _contrast_candidates),
    "subcentroid_weights": Launch(_contrast, _product_candidates),
    "subcentroid_mix": Launch(_contrast, _mix_candidates),
}
