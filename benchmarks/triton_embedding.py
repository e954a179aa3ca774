"""How the Triton embedding kernels are launched for a shape class, and the meta-parameters worth trying."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dnc_kernels.ops.embedding import triton as kernels

from .aot_triton import Launch

_DTYPES = {16: torch.bfloat16, 32: torch.float32}
#: Layout -> side of a map. 65 is what a crop of 513 pixels leaves at stride 8.
_SIDES = {"rows": 64, "planes": 64, "odd_planes": 65}


def _inputs(layout: str, device: torch.device, when: dict[str, int]) -> tuple[Tensor, ...]:
    """x, weight and bias [D], three statistics [N]; about 2^25 numbers in x."""
    channels, side = when["D"], _SIDES[layout]
    maps = max(1, 2**25 // (channels * side**2))
    shape = (maps * side**2, channels) if layout == "rows" else (maps, channels, side, side)
    x = torch.empty(shape, dtype=_DTYPES[when["bits"]], device=device)
    weight, bias = (torch.empty(channels, device=device) for _ in range(2))
    statistics = [torch.empty(maps * side**2, device=device) for _ in range(3)]
    if device.type == "cuda":
        x.normal_(), weight.normal_(1, 0.1), bias.normal_(0, 0.1)
        kernels.normalize(x, weight, bias, 1e-5, torch.empty_like(x), *statistics)
    return x, weight, bias, *statistics


def _forward(layout: str, device: torch.device, when: dict[str, int]) -> Callable[[], None]:
    x, weight, bias, *statistics = _inputs(layout, device, when)
    return partial(kernels.normalize, x, weight, bias, 1e-5, torch.empty_like(x), *statistics)


def _backward(layout: str, device: torch.device, when: dict[str, int]) -> Callable[[], None]:
    x, weight, bias, *statistics = _inputs(layout, device, when)
    grad_y = torch.empty_like(x)
    if device.type == "cuda":
        grad_y.normal_()
    arguments: list[Any] = [x, weight, bias, *statistics, grad_y, None, *(torch.empty_like(t) for t in (x, weight, bias))]
    return partial(kernels.normalize_backward, *arguments)


def _candidates(layout: str, backward: bool, when: dict[str, int]) -> list[dict[str, Any]]:
    """Tiles of 8 to 64 numbers a thread."""
    pixels = {"rows": (1,), "planes": (16, 32, 64, 128), "odd_planes": (64, 128, 256)}[layout]
    tiles = [
        {"TILE": tile, "PIXELS": least, "num_warps": warps}
        for warps in (1, 2, 4, 8, 16)
        for tile in (1024, 2048, 4096, 8192, 16384)
        for least in pixels
        if 8 <= tile // (32 * warps) <= 64
    ]
    if not backward:
        return tiles
    return [{**tile, "STAGES": stages, "PROGRAMS": n} for tile in tiles for stages in (1, 2, 3) for n in (1, 2, 4)]


CASES = {
    f"normalize{step}_{layout}": Launch(partial(prepare, layout), partial(_candidates, layout, bool(step)))
    for step, prepare in (("", _forward), ("_backward", _backward))
    for layout in _SIDES
}
