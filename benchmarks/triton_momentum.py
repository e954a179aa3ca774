"""The momentum kernels in Triton: how to launch them for a shape, and meta-parameters worth trying."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .aot_triton import Launch


def _cluster(device: torch.device, when: dict[str, int]) -> Tensor:
    """Clusters [N]: runs of 64 pixels of ten neighbouring clusters in turn, a twentieth left out."""
    n, m = when["N"], when["M"]
    cluster = torch.empty(n, dtype=torch.int64, device=device)
    if device.type == "cuda":
        first = torch.randint(0, (m + 9) // 10, (n // 64 + 1,), device=device).repeat_interleave(64)[:n] * 10
        own = (first + torch.randint(0, 10, (n,), device=device)).clamp(max=m - 1)
        cluster.copy_(torch.where(torch.rand(n, device=device) < 0.05, -1, own))
    return cluster


def _update(device: torch.device, when: dict[str, int], planes: bool) -> Callable[[], None]:
    from dnc_kernels.ops.momentum import triton
    from dnc_kernels.ops.momentum.calls import UpdateCall

    n, d = when["N"], when["D"]
    dtype = torch.float32 if when["bits"] == 32 else torch.bfloat16
    x = torch.empty((2, d, n // 1024, 512) if planes else (n, d), dtype=dtype, device=device)
    rows = torch.empty(when["M"], d, device=device)
    cluster = _cluster(device, when)
    if device.type == "cuda":
        x.normal_()
        rows.normal_()
    call = UpdateCall(rows, x, cluster, 0.999, True, "triton")
    return lambda: triton.momentum_update_(call)


def _rows(device: torch.device, when: dict[str, int]) -> Callable[[], None]:
    return _update(device, when, False)


def _planes(device: torch.device, when: dict[str, int]) -> Callable[[], None]:
    return _update(device, when, True)


def _candidates(when: dict[str, int]) -> list[dict[str, Any]]:
    return [
        {
            "BLOCK_T": tile,
            "BLOCK_B": 256 if when["M"] < 20000 else 1024,
            "UNIT": unit,
            "BLOCK_P": p,
            "BLOCK_D": d,
            "num_warps": warps,
            "num_stages": stages,
        }
        for tile in (256, 512)
        for unit in (256, 512, 1024, 2048)
        for p, d in ((32, 64), (32, 128), (64, 64), (64, 128), (64, 256), (128, 64))
        for warps in (4, 8)
        for stages in (2, 4)
        if 16 <= p * d // (32 * warps) <= 128
    ]


CASES = {"momentum_rows": Launch(_rows, _candidates), "momentum_planes": Launch(_planes, _candidates)}
