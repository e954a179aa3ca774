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

    similarity, group = _inputs(device, when)
    g, assignment = when["G"], torch.empty_like(group)
    return lambda: triton.sinkhorn(similarity, group, g, 0.05, 3, -1.0, assignment, None, None, None)


def _backward(device: torch.device, when: dict[str, int]) -> Callable[[], None]:
    from dnc_kernels.ops.sinkhorn import triton

    similarity, group = _inputs(device, when)
    g, plan, grad = when["G"], torch.empty_like(similarity), torch.empty_like(similarity)
    history = torch.empty(4, g, when["K"], device=device)
    steps = torch.empty(g, dtype=torch.int64, device=device)
    up = torch.empty_like(similarity)
    if device.type == "cuda":
        up.normal_()
        triton.sinkhorn(similarity, group, g, 0.05, 3, -1.0, None, plan, history, steps)
    return lambda: triton.sinkhorn_backward(similarity, group, g, 0.05, history, steps, up, grad)


def _candidates(when: dict[str, int]) -> list[dict[str, Any]]:
    return [
        {"BLOCK_N": block, "CELLS": cells, "num_warps": warps, "num_stages": 1}
        for block in ((128, 256, 512) if when["K"] < 16 else (256,))
        for cells in (512, 1024, 2048, 4096)
        for warps in (2, 4, 8)
        if 4 <= cells // (32 * warps) <= 16
    ]


CASES = {"sinkhorn": Launch(_forward, _candidates), "sinkhorn_backward": Launch(_backward, _candidates)}
