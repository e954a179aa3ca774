"""Launches of the similarity kernels for shape classes: what is compiled ahead of time, and what the tuner times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dnc_kernels._tensors import pixel_count
from dnc_kernels.ops.similarity.calls import (
    LossCall,
    LossOut,
    ScoresBackwardCall,
    ScoresBackwardOut,
    ScoresCall,
    ScoresOut,
)

from . import triton_contrast
from .aot_triton import Launch
from .triton_contrast import spread

#: Pixels of a shape class: those of an ADE20K step with 1024^2 crops at stride 4.
PIXELS = 131072


def inputs(device: torch.device, when: dict[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    """x [N,D] or [B,D,H,W] near its class, centroids [C,K,D], labels [N], one pixel in ten without."""
    dtype = torch.bfloat16 if when["bits"] == 16 else torch.float32
    classes, k, channels = when["C"], when["K"], when["D"]
    pixels = max(8450, min(PIXELS, 2**33 // (classes * channels)))
    if device.type == "meta":
        x = torch.empty(pixels, channels, dtype=dtype, device=device)
        centroids, labels = (
            torch.empty(classes, k, channels, device=device),
            torch.empty(pixels, dtype=torch.int64, device=device),
        )
    else:
        generator = torch.Generator(device).manual_seed(0)
        centroids = F.normalize(torch.randn(classes, k, channels, generator=generator, device=device), dim=2)
        labels = torch.randint(0, classes, (pixels,), generator=generator, device=device)
        x = centroids[labels, 0] + torch.randn(pixels, channels, generator=generator, device=device) / channels**0.5
        labels[::10] = -100
        x = F.normalize(x, dim=1).to(dtype)
    x = spread(x, when)
    return x, centroids, labels[: pixel_count(x)]


def class_scores(device: torch.device, when: dict[str, int]) -> Callable[[], None]:
    """Scores, winners and own similarities."""
    from dnc_kernels.ops.similarity import triton

    x, centroids, labels = inputs(device, when)
    scores = x.new_empty((x.shape[0], when["C"], *x.shape[2:]), dtype=torch.float32)
    winner, own = scores.to(torch.uint8), scores.new_empty((len(labels), when["K"]))
    call = ScoresCall(x, centroids, labels, "dot", "triton")
    return lambda: triton.class_scores(call, ScoresOut(scores, winner, own))


def _gradient(device: torch.device, when: dict[str, int], *, to_x: bool) -> Callable[[], None]:
    from dnc_kernels.ops.similarity import triton

    x, centroids, labels = inputs(device, when)
    grad = x.new_empty((x.shape[0], when["C"], *x.shape[2:]), dtype=torch.float32)
    winner = grad.to(torch.uint8)
    if device.type != "meta":
        grad.normal_()
        winner.random_(when["K"])
    out = ScoresBackwardOut(torch.empty_like(x) if to_x else None, None if to_x else torch.empty_like(centroids))
    call = ScoresBackwardCall(x, centroids, labels, "dot", winner, grad, None, False, "triton")
    return lambda: triton.class_scores_backward(call, out)


def scores_gradient(device: torch.device, when: dict[str, int]) -> Callable[[], None]:
    """Gradient of the pixels from that of their scores."""
    return _gradient(device, when, to_x=True)


def centroid_gradient(device: torch.device, when: dict[str, int]) -> Callable[[], None]:
    """Gradient of the sub-centroids from that of the scores."""
    return _gradient(device, when, to_x=False)


def centroid_loss(device: torch.device, when: dict[str, int]) -> Callable[[], None]:
    """Loss, prediction, own similarities and dX in one pass, with LayerNorm over the classes."""
    from dnc_kernels.ops.similarity import triton

    x, centroids, labels = inputs(device, when)
    gain = torch.ones(when["C"], device=device)
    shift = torch.zeros_like(gain)
    call = LossCall(x, centroids, labels, "dot", gain, shift, 1e-5, None, 1.0, None, -100, 0.0, "sum", None, "triton")
    out = LossOut(
        loss=gain.new_empty(()), prediction=torch.empty_like(labels), own_similarity=gain.new_empty((len(labels), when["K"])),
        grad_x=torch.empty_like(x), grad_norm_weight=torch.empty_like(gain), grad_norm_bias=torch.empty_like(gain),
    )  # fmt: skip
    return lambda: triton.centroid_cross_entropy(call, out)


def _candidates(
    names: tuple[str, ...], halves: tuple[tuple[int, ...], ...], singles: tuple[tuple[int, ...], ...]
) -> Callable[[dict[str, int]], list[dict[str, Any]]]:
    """Few enough to compile and time within minutes: 16-bit tiles, and those of float32 products."""
    names = (*names, "num_warps", "num_stages")

    def made(when: dict[str, int]) -> list[dict[str, Any]]:
        return [dict(zip(names, tile, strict=True)) for tile in (halves if when["bits"] == 16 else singles)]

    return made


_TILE = ("BLOCK_N", "BLOCK_C", "BLOCK_K", "BLOCK_D")

CASES = {
    "class_scores": Launch(
        class_scores,
        _candidates(
            (*_TILE, "KEEP_D"),
            (
                (128, 32, 2, 64, 256, 8, 3), (128, 64, 1, 64, 256, 8, 3), (128, 32, 4, 64, 256, 8, 2),
                (64, 32, 2, 64, 256, 4, 3), (64, 32, 2, 64, 256, 8, 2), (64, 32, 2, 64, 512, 8, 2),
                (128, 32, 4, 64, 0, 8, 4), (128, 64, 2, 64, 0, 8, 3), (64, 32, 4, 64, 0, 4, 4),
            ),
            ((128, 32, 2, 32, 0, 8, 3), (64, 32, 2, 32, 0, 8, 3), (64, 16, 4, 16, 0, 8, 2), (32, 32, 1, 32, 0, 4, 2)),
        ),
    ),
    "scores_gradient": Launch(
        scores_gradient,
        _candidates(
            _TILE,
            (
                (128, 32, 1, 256, 8, 3), (128, 32, 1, 128, 8, 3), (128, 64, 1, 128, 8, 3), (64, 32, 1, 256, 8, 3),
                (64, 32, 1, 128, 4, 4), (64, 64, 1, 256, 8, 3), (64, 32, 1, 64, 8, 2),
            ),
            ((128, 32, 1, 128, 8, 2), (64, 32, 1, 128, 8, 2), (64, 32, 1, 64, 8, 2), (64, 16, 1, 64, 8, 2)),
        ),
    ),
    "centroid_gradient": Launch(
        centroid_gradient,
        _candidates(
            _TILE,
            (
                (64, 32, 4, 128, 8, 3), (64, 32, 4, 128, 8, 2), (64, 32, 2, 128, 4, 3), (128, 32, 2, 128, 8, 2),
                (64, 32, 4, 256, 8, 2), (32, 32, 4, 128, 8, 2), (64, 32, 2, 128, 8, 2), (32, 32, 2, 64, 8, 2),
            ),
            ((32, 32, 2, 128, 8, 2), (32, 32, 2, 64, 8, 2), (16, 32, 2, 64, 8, 2)),
        ),
    ),
    "centroid_loss": Launch(
        centroid_loss,
        _candidates(
            (*_TILE, "KEEP_D", "BLOCK_GRAD", "PROGRAMS"),
            (
                (128, 32, 2, 64, 256, 256, 1, 8, 3), (128, 32, 2, 64, 256, 128, 1, 8, 3), (128, 32, 2, 64, 256, 256, 1, 8, 2),
                (64, 32, 2, 64, 256, 256, 1, 8, 3), (64, 32, 2, 64, 256, 128, 2, 4, 2), (128, 64, 1, 64, 256, 128, 1, 8, 3),
                (128, 32, 4, 64, 0, 256, 1, 8, 3), (128, 32, 4, 64, 0, 128, 1, 8, 4), (64, 32, 4, 64, 0, 256, 2, 8, 3),
                (64, 32, 2, 64, 512, 256, 1, 8, 2), (64, 32, 1, 64, 256, 64, 1, 8, 2),
            ),
            (
                (64, 32, 2, 32, 0, 128, 1, 8, 2), (64, 32, 2, 32, 0, 64, 1, 8, 2), (128, 32, 2, 32, 0, 128, 1, 8, 2),
                (64, 16, 4, 16, 0, 64, 1, 8, 2), (32, 32, 1, 32, 0, 64, 2, 4, 2),
            ),
        ),
    ),
    **triton_contrast.CASES,
}  # fmt: skip
