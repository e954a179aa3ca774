"""The Sinkhorn kernels in Triton: how to launch them for a shape, and meta-parameters worth trying."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .aot_triton import Launch


def _inputs(device: torch.device, when: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines [N,K] and labels [N] in runs of about 64 pixels, a twentieth left out."""
    n, g, k = when["N"], when["G"], when["K"]
    similarity = torch.empty(n, k, device=device)
    group = torch.empty(n, dtype=torch.int64, device=device)
    if device.type == "cuda":
        similarity.uniform_(-1, 1)
        runs = torch.randint(-1, g, (n // 64 + 1,), device=device).repeat_interleave(64)[:n]
        group.copy_(torch.where(torch.rand(n, device=device) < 0.05, -1, runs))
    return similarity, group


def _forward(device: torch.device, when: dict[str, int]) -> Callable[[], None]:
    from dnc_kernels.ops.sinkhorn import triton
    from dnc_kernels.ops.sinkhorn.calls import SinkhornCall, SinkhornOut

    similarity, group = _inputs(device, when)
    call = SinkhornCall(similarity, group, when["G"], 0.05, 3, -1.0, "triton")
    out = SinkhornOut(torch.empty_like(group))
    return lambda: triton.sinkhorn(call, out)


def _backward(device: torch.device, when: dict[str, int]) -> Callable[[], None]:
    from dnc_kernels.ops.sinkhorn import triton
    from dnc_kernels.ops.sinkhorn.calls import SinkhornBackwardCall, SinkhornBackwardOut, SinkhornCall, SinkhornOut

    similarity, group = _inputs(device, when)
    g, plan, grad = when["G"], torch.empty_like(similarity), torch.empty_like(similarity)
    history = torch.empty(4, g, when["K"], device=device)
    steps = torch.empty(g, dtype=torch.int64, device=device)
    up = torch.empty_like(similarity)
    if device.type == "cuda":
        up.normal_()
        forward = SinkhornCall(similarity, group, g, 0.05, 3, -1.0, "triton")
        triton.sinkhorn(forward, SinkhornOut(None, plan, history, steps))
    call = SinkhornBackwardCall(similarity, group, g, 0.05, history, steps, up, "triton")
    out = SinkhornBackwardOut(grad)
    return lambda: triton.sinkhorn_backward(call, out)


def _candidates(when: dict[str, int]) -> list[dict[str, Any]]:
    return [
        {"BLOCK_N": block, "CELLS": cells, "num_warps": warps, "num_stages": 1}
        for block in ((128, 256, 512) if when["K"] < 16 else (256,))
        for cells in (512, 1024, 2048, 4096)
        for warps in (2, 4, 8)
        if 4 <= cells // (32 * warps) <= 16
    ]


CASES = {"sinkhorn": Launch(_forward, _candidates), "sinkhorn_backward": Launch(_backward, _candidates)}
