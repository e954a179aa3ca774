"""How the head's own Triton kernels are launched for a shape class, and the meta-parameters worth trying."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dnc_kernels._tensors import pixel_count
from dnc_kernels.ops.head import FirstPass, Step, head_first_pass, table_size
from dnc_kernels.ops.head import triton as kernels
from dnc_kernels.ops.head.bands import bands
from dnc_kernels.ops.sinkhorn.triton import tables_of

from .aot_triton import Launch
from .triton_similarity import PIXELS

Shape = dict[str, int]


def first_pass(device: torch.device, when: Shape) -> tuple[Step, FirstPass, Tensor]:
    """A step of one band, what its first pass gives, and the labels [N]: planes of 128 x 128 pixels, or (even 0) of 65 x 65."""
    classes, k, channels = when["C"], when["K"], when.get("D", 256)
    side = 128 if when.get("even", 1) else 65
    batch = max(1, min(PIXELS, 2**33 // (classes * channels)) // side**2)
    dtype = torch.bfloat16 if when.get("bits", 16) == 16 else torch.float32
    x = torch.empty(batch, channels, side, side, dtype=dtype, device=device)
    weight, gain = torch.ones(channels, device=device), torch.ones(classes, device=device) if when.get("norm", 1) else None
    sampled = torch.empty(batch * side**2, dtype=torch.int64, device=device)
    centroids, zeros = torch.empty(classes, k, channels, device=device), torch.zeros(table_size(classes, k), device=device)
    call = Step(
        x=x, weight=weight, bias=weight, eps=1e-5, centroids=centroids, labels=sampled.view(batch, side, side), ignored=-1,
        at_features=True, confidence=gain is None, temperature=1.0, log_scale=None, norm_weight=gain, norm_bias=gain,
        norm_eps=1e-5, class_weight=None, label_smoothing=0.0, align_corners=False, ppc_weight=0.01, ppd_weight=0.01,
        contrast_temperature=0.1, zeros=zeros.to(torch.int64), band_pixels=pixel_count(x), whole=False, parts="triton",
        backend="triton",
    )  # fmt: skip
    out = head_first_pass.allocate(call, sampled, None, None, None, True, False)
    if device.type == "cuda":
        centroids.normal_()
        # labels of a picture change rarely along a row
        sampled.copy_(torch.randint(classes, (len(sampled) // 64 + 1,), device=device).repeat_interleave(64)[: len(sampled)])
        for t in (out.factors, out.statistics):
            t.fill_(1.0)
        for given in (out.grad, out.own_similarity):
            assert given is not None
            given.normal_()
    return call, out, sampled


def _maps(call: Step) -> tuple[Tensor, Tensor]:
    """Numbers like the scores of a step, and mean and 1 / deviation of each pixel."""
    x, classes = call.x, call.centroids.shape[0]
    maps = torch.empty((x.shape[0], classes, *x.shape[2:]), device=x.device)
    moments = torch.ones((2, pixel_count(x)), device=x.device)
    return maps.normal_() if x.is_cuda else maps, moments


def _logits(device: torch.device, when: Shape) -> Callable[[], None]:
    call, out, sampled = first_pass(device, when)
    scores, moments = _maps(call)
    assert call.zeros is not None
    tables, every = tables_of(call.zeros, when["C"], when["K"]), slice(None)
    logits = torch.empty_like(scores) if when["norm"] else scores
    return lambda: kernels.band_logits(call, out, scores, logits, every, sampled, moments, tables)


def _gradient(device: torch.device, when: Shape) -> Callable[[], None]:
    call, out, _ = first_pass(device, when)
    scores, moments = _maps(call)
    maps = [torch.empty_like(scores), scores, torch.zeros_like(scores, dtype=torch.uint8)]
    if device.type == "cuda":
        maps[0].normal_()
        maps[2].random_(when["K"])
    # no tile has fewer pixels than 16
    rows = pixel_count(call.x) // 16 + 1
    to_scale, to_norm = (torch.empty(rows, *sizes, device=device) for sizes in ((), (2, when["C"])))
    (whole,) = bands(call.x, call.band_pixels)
    packed = kernels.Rows(None, None)
    return lambda: kernels.band_gradient(call, out, whole, maps, moments, packed, to_scale, to_norm)


def _logits_candidates(when: Shape) -> list[dict[str, Any]]:
    return [
        {"BLOCK_N": rows, "CELLS": cells, "num_warps": warps}
        for rows in (32, 64, 128)
        for cells in (4096, 8192, 16384, 32768)
        for warps in (4, 8, 16)
        if 16 <= cells // (32 * warps) <= 64
    ]


def _gradient_candidates(when: Shape) -> list[dict[str, Any]]:
    tiles: tuple[tuple[int, ...], ...]
    if when["bits"] == 16:
        tiles = (
            (64, 32, 1, 128, 8, 3), (64, 32, 1, 256, 8, 3), (64, 32, 1, 128, 4, 3), (64, 16, 1, 256, 8, 3),
            (64, 32, 1, 64, 4, 3), (128, 32, 1, 128, 8, 3), (128, 32, 1, 256, 16, 3), (128, 16, 1, 128, 8, 3),
            (128, 32, 1, 64, 8, 2), (32, 32, 1, 64, 8, 2),
        )  # fmt: skip
    else:
        tiles = ((64, 32, 1, 64, 8, 2), (32, 32, 1, 64, 8, 2), (32, 16, 1, 64, 8, 2), (32, 16, 1, 128, 8, 2))
    names = ("BLOCK_N", "BLOCK_C", "BLOCK_K", "BLOCK_D", "num_warps", "num_stages")
    return [dict(zip(names, tile, strict=True)) for tile in tiles]


CASES = {
    "head_logits": Launch(_logits, _logits_candidates),
    "head_gradient": Launch(_gradient, _gradient_candidates),
}
