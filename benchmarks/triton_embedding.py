"""How the Triton embedding kernels are launched for a shape class, and the meta-parameters worth trying."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dnc_kernels.ops.embedding import triton as kernels
from dnc_kernels.ops.embedding.calls import NormalizeBackwardCall, NormalizeBackwardOut, NormalizeCall, NormalizeOut

from .aot_triton import Launch

_DTYPES = {16: torch.bfloat16, 32: torch.float32}
#: Layout -> side of a map. 65 is what a crop of 513 pixels leaves at stride 8.
_SIDES = {"rows": 64, "planes": 64, "odd_planes": 65}


def _records(layout: str, device: torch.device, when: dict[str, int]) -> tuple[NormalizeCall, NormalizeOut]:
    """A call of about 2^25 numbers and its results, which are there on a GPU."""
    channels, side = when["D"], _SIDES[layout]
    maps = max(1, 2**25 // (channels * side**2))
    shape = (maps * side**2, channels) if layout == "rows" else (maps, channels, side, side)
    x = torch.empty(shape, dtype=_DTYPES[when["bits"]], device=device)
    weight, bias = (torch.empty(channels, device=device) for _ in range(2))
    call = NormalizeCall(x, weight, bias, 1e-5, "triton")
    out = NormalizeOut(torch.empty_like(x), *(torch.empty(maps * side**2, device=device) for _ in range(3)))
    if device.type == "cuda":
        x.normal_(), weight.normal_(1, 0.1), bias.normal_(0, 0.1)
        kernels.normalize_embedding(call, out)
    return call, out


def _forward(layout: str, device: torch.device, when: dict[str, int]) -> Callable[[], None]:
    return partial(kernels.normalize_embedding, *_records(layout, device, when))


def _backward(layout: str, device: torch.device, when: dict[str, int]) -> Callable[[], None]:
    (x, weight, bias, _, backend), (_, mean, rstd, inverse_norm) = _records(layout, device, when)
    grad_y = torch.empty_like(x)
    if device.type == "cuda":
        grad_y.normal_()
    call = NormalizeBackwardCall(x, weight, bias, mean, rstd, inverse_norm, grad_y, None, backend)
    assert weight is not None and bias is not None
    out = NormalizeBackwardOut(torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias))
    return partial(kernels.normalize_embedding_backward, call, out)


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
