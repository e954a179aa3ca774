"""How the Triton upsample kernels are launched for a shape class, and the meta-parameters worth trying."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dnc_kernels.ops.upsample import triton as kernels
from dnc_kernels.ops.upsample.calls import ArgmaxCall, UpsampleCall, UpsampleOut

from .aot_triton import Launch

_DTYPES = {16: torch.bfloat16, 32: torch.float32}
#: Labels of 8 maps of 512 x 512.
_BATCH, _SIZE = 8, 512


def _inputs(device: torch.device, when: dict[str, int]) -> UpsampleCall:
    """A call without options; labels in regions of 32 x 32 pixels with a tenth ignored, as images have them."""
    side = _SIZE // when["scale"]
    scores = torch.empty((_BATCH, when["C"], side, side), dtype=_DTYPES[when["bits"]], device=device)
    labels = torch.empty((_BATCH, _SIZE, _SIZE), dtype=torch.int64, device=device)
    if device.type == "cuda":
        scores.normal_()
        regions = torch.randint(when["C"], (_BATCH, _SIZE // 32, _SIZE // 32), device=device)
        regions[torch.rand(regions.shape, device=device) < 0.1] = -100
        labels.copy_(regions.repeat_interleave(32, 1).repeat_interleave(32, 2))
    return UpsampleCall(scores, labels, 0, 0, 0, 0, False, None, -100, 0.0, None, "triton")


def _log_sum_exp(device: torch.device, when: dict[str, int]) -> Callable[[], None]:
    sums = torch.empty(2, dtype=torch.float64, device=device)
    return partial(kernels.upsample_cross_entropy, _inputs(device, when), UpsampleOut(sums))


def _gradient(device: torch.device, when: dict[str, int]) -> Callable[[], None]:
    call = _inputs(device, when)
    shift, lse = torch.empty((2, *call.labels.shape), device=device)
    grad_scores = torch.empty_like(call.scores, dtype=torch.float32)
    axes = kernels.axes_of(call)
    if device.type == "cuda":
        kernels.log_sum_exp(call, axes, shift, lse, None)
    return partial(kernels.gradient, call, axes, shift, lse, grad_scores)


def _argmax(device: torch.device, when: dict[str, int]) -> Callable[[], None]:
    call = _inputs(device, when)
    return partial(kernels.upsample_argmax, ArgmaxCall(call.scores, False, "triton"), call.labels)


def _candidates(when: dict[str, int]) -> list[dict[str, Any]]:
    return [
        {"MOST": most, "BLOCK": block, "num_warps": block // 32}
        for most in (2, 4)
        for block in (32, 64, 128)
        if most <= max(2, when["scale"])
    ]


def _gradient_candidates(when: dict[str, int]) -> list[dict[str, Any]]:
    return [
        {**use, "ROWS": rows, "CLASSES": classes}
        for use in _candidates(when)
        for rows in (8, 16, 32)
        for classes in (8, 16, 32)
        if use["num_warps"] <= 2  # more: a cell's neighbour lies in another warp too often
    ]


CASES = {
    "log_sum_exp": Launch(_log_sum_exp, _candidates),
    "gradient": Launch(_gradient, _gradient_candidates),
    "argmax": Launch(_argmax, _candidates),
}
